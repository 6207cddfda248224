"""Classify image files without starting the service. This is the command ``ltkd classify``.

It uses the same decoder, engine and answers as the service, so it gives the same results.
"""

import warnings
from pathlib import Path

from PIL import Image

from ltkd.contract.bundle import open_bundle
from ltkd.contract.image_decoding import MAX_PIXELS, DecodedImage, decode_image
from ltkd.contract.preprocessing import Preprocessing
from ltkd.errors import ImageError, UsageError
from serve.engine.answers import Answer, AnswerBuilder, RejectedImage
from serve.engine.session import open_engine
from serve.problems import image_problem

_BATCH = 64  # files decoded at a time; more would only use memory


def classify_files(
    bundle_path: Path, images: list[Path], top_k: int = 5, device: str = "auto"
) -> list[Answer | RejectedImage]:
    """Classify image files as the service would.

    Returns:
        One result per file, in order. A file that is not a usable image gets a RejectedImage in its place.

    Raises:
        UsageError: A file cannot be read.
        LtkdError: The bundle or the device cannot be used.
    """
    engine = open_engine(open_bundle(bundle_path), device, max_batch=8)
    builder = AnswerBuilder(engine.manifest, engine.precision)
    results: list[Answer | RejectedImage] = []
    for first in range(0, len(images), _BATCH):
        decoded = [_decode(path, engine.manifest.task.preprocessing) for path in images[first : first + _BATCH]]
        usable = [image for image in decoded if isinstance(image, DecodedImage)]
        predictions = builder.predict(engine.logits([image.pixels_SS3 for image in usable]))
        answers = iter(builder.records(predictions, [top_k] * len(usable), [image.warnings for image in usable]))
        results += [image if isinstance(image, RejectedImage) else next(answers) for image in decoded]
    return results


def _decode(path: Path, preprocessing: Preprocessing) -> DecodedImage | RejectedImage:
    try:
        content = path.read_bytes()
    except OSError as reason:
        raise UsageError(f"{path} cannot be read ({reason.strerror}); give the path of an image file.") from None
    with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
        try:
            return decode_image(content, preprocessing, MAX_PIXELS)
        except ImageError as error:
            return RejectedImage(error=image_problem(error))
