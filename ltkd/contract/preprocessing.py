"""How an image becomes the pixels of a network's input; ``image_decoding`` does what these records state.

Runs and bundles contain it, so that training's evaluation, certification and the service get the same pixels.
"""

import math
from typing import Literal

from pydantic import Field

from ltkd.contract.records import Record

Interpolation = Literal["bilinear", "bicubic", "lanczos"]
JpegScaling = Literal["none", "twice", "once"]
_SIDES_OF_THE_RESULT = {"twice": 2, "once": 1}
_ADVERBS = {"bilinear": "bilinearly", "bicubic": "bicubically", "lanczos": "with a Lanczos filter"}


class Resizing(Record):
    """How images of any size are cropped and scaled. The defaults are those of new runs.

    Attributes:
        interpolation: The anti-aliased filter that resizes the crop.
        crop_ratio: Side of the centre square that is used, as a fraction of the shorter side of the image. "Resize to
            256, crop 224" is 224 / 256; timm calls it ``crop_pct``.
        jpeg_scaling: Whether the JPEG decoder scales by 1/2, 1/4 or 1/8, which takes a fraction of the time. ``twice``
            and ``once`` keep at least that many times the side of the result in the square; ``none`` decodes in full.
    """

    interpolation: Interpolation = "bilinear"
    crop_ratio: float = Field(default=1.0, ge=0.1, le=1)
    jpeg_scaling: JpegScaling = "twice"


FULL_DECODING = Resizing(jpeg_scaling="none")
"""The resizing of runs and bundles that do not state one, because they were made before there was a choice."""


class Preprocessing(Resizing):
    """Everything that decides which pixels an image file gives.

    Attributes:
        input_px: Width and height of the result in pixels.
    """

    input_px: int = Field(gt=0)

    @property
    def min_decoded_px(self) -> int | None:
        """The sides that a JPEG must keep when its decoder scales it down; None if it is decoded in full."""
        if self.jpeg_scaling == "none":
            return None
        return math.ceil(_SIDES_OF_THE_RESULT[self.jpeg_scaling] * self.input_px / self.crop_ratio)

    @property
    def rule(self) -> str:
        """The crop and the filter in words, such as "the centre square is resized bilinearly"."""
        share = "" if self.crop_ratio == 1 else f" of {self.crop_ratio:.4g} of the shorter side"
        scaled = (
            ""
            if self.min_decoded_px is None
            else (
                f", after a JPEG was decoded at 1/2, 1/4 or 1/8 of its size if both sides keep {self.min_decoded_px} px"
            )
        )
        return f"the centre square{share} is resized {_ADVERBS[self.interpolation]}{scaled}"

    @property
    def description(self) -> str:
        """The whole preprocessing in words."""
        return f"decode to RGB and resize to {self.input_px} x {self.input_px} ({self.rule})"
