"""Glyphs: a data set of rendered letters and digits, of any size and without a download.

An image shows one character in one of the typefaces that matplotlib ships, with random size, position, slant,
rotation, blur, noise and colours. Upper and lower case letters that look alike are one class, as in EMNIST's balanced
split, which leaves 47 classes. Image i of a class is a function of (split, class, i) alone.
"""

import colorsys
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"
TYPEFACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold",
    "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmb10", "cmr10", "cmss10", "cmtt10",
)  # fmt: skip
SIZE_PX = 24
TRAIN_PER_CLASS = 300
TEST_PER_CLASS = 72

_CANVAS_PX = 48  # rendered at twice the size and scaled down, so that edges are smooth


def class_names() -> list[str]:
    """Class names that are valid, distinct folder names on any file system: ``upper_A``, ``lower_a``, ``digit_0``."""
    kinds = {True: "upper", False: "lower"}
    return [f"digit_{c}" if c.isdigit() else f"{kinds[c.isupper()]}_{c}" for c in _characters()]


def render_glyphs(labels_N: NDArray[np.int64], numbers_N: NDArray[np.int64], split: int) -> NDArray[np.uint8]:
    """Render glyphs, uint8 [N, 24, 24, 3].

    Args:
        labels_N: Class of each image.
        numbers_N: Number of each image within its class.
        split: 0 for training and 1 for test images; the two never share a random stream.
    """
    images_NSS3 = np.empty((len(labels_N), SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    for position, (label, number) in enumerate(zip(labels_N.tolist(), numbers_N.tolist(), strict=True)):
        images_NSS3[position] = _render(_characters()[label], np.random.default_rng((split, label, number)))
    return images_NSS3


@lru_cache(maxsize=1)
def _characters() -> str:
    """The characters in label order, shuffled so that the head has characters of every kind."""
    return "".join(np.random.default_rng(0).permutation(list(CHARACTERS)))


@lru_cache(maxsize=len(TYPEFACES) * 16)
def _font(typeface: str, size_px: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # noqa: PLC0415  # only needed to find its typefaces

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{typeface}.ttf"), size_px)


def _render(character: str, random: np.random.Generator) -> NDArray[np.uint8]:
    font = _font(TYPEFACES[random.integers(len(TYPEFACES))], int(random.integers(30, 39)))
    mask = Image.new("L", (_CANVAS_PX, _CANVAS_PX))
    centre_xy = _CANVAS_PX / 2 + random.uniform(-3, 3, size=2)
    ImageDraw.Draw(mask).text(tuple(centre_xy), character, fill=255, font=font, anchor="mm")
    angle, slant = random.normal(0, 0.15, size=2)
    mask = mask.transform(mask.size, Image.Transform.AFFINE, _affine(angle, slant), Image.Resampling.BILINEAR)
    mask = mask.filter(ImageFilter.GaussianBlur(random.uniform(0, 1.2))).resize(
        (SIZE_PX, SIZE_PX), Image.Resampling.BOX
    )
    ink_SS1 = np.asarray(mask, dtype=np.float32)[..., None] / 255
    paper_3, ink_3 = _colours(random)
    shade_SS1 = _shade(random)
    noise_SS3 = random.normal(0, random.uniform(2, 14), size=(SIZE_PX, SIZE_PX, 3))
    image_SS3 = paper_3 * (1 - ink_SS1) + ink_3 * ink_SS1 + shade_SS1 + noise_SS3
    return np.asarray(image_SS3.clip(0, 255), dtype=np.uint8)


def _affine(angle: float, slant: float) -> tuple[float, ...]:
    """The map from output to input coordinates: a rotation and a shear about the centre of the canvas."""
    cos, sin, middle = np.cos(angle), np.sin(angle), _CANVAS_PX / 2
    matrix = np.array([[cos, sin], [-sin, cos]]) @ np.array([[1, slant], [0, 1]])
    shift = middle - matrix @ (middle, middle)
    return (*matrix[0], shift[0], *matrix[1], shift[1])


def _colours(random: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Draw the colours of paper and ink, RGB 0..255; the ink is darker by 0.4 to 0.6 of the range of lightness."""
    paper_light = random.uniform(0.6, 0.95)
    ink_light = paper_light - random.uniform(0.4, 0.6)
    colours = [
        255 * np.array(colorsys.hls_to_rgb(random.random(), light, random.uniform(0, 0.6)), dtype=np.float32)
        for light in (paper_light, max(0.0, ink_light))
    ]
    return colours[0], colours[1]


def _shade(random: np.random.Generator) -> NDArray[np.float32]:
    """Draw a linear gradient of brightness across the image, up to +-20, [S, S, 1]."""
    line_S = np.linspace(-1, 1, SIZE_PX, dtype=np.float32)
    slope_x, slope_y = random.uniform(-10, 10, size=2)
    return np.asarray((slope_x * line_S[None, :] + slope_y * line_S[:, None])[..., None], dtype=np.float32)
