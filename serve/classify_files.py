"""Classification of files, without the service: what ``ltkd classify`` does."""

import warnings
from pathlib import Path

from PIL import Image

from ltkd.contract.bundle import open_bundle
from ltkd.contract.image_decoding import MAX_PIXELS, DecodedImage, decode_image
from ltkd.errors import ImageError, UsageError
from serve.engine.answers import Answer, AnswerBuilder, RejectedImage
from serve.engine.messages import Device
from serve.engine.session import open_engine
from serve.problems import image_problem

_BATCH = 64  # files decoded at one time; more would only take memory


def classify_files(
    bundle_path: Path, images: list[Path], top_k: int = 5, device: Device = "auto"
) -> list[Answer | RejectedImage]:
    """Classify image files with the engine and the answers of the service.

    Returns:
        One result a file, in order; a file that is no usable image is refused in its own place.

    Raises:
        UsageError: A file cannot be read.
        LtkdError: The bundle or the device cannot be used.
    """
    engine = open_engine(open_bundle(bundle_path), device, max_batch=8)
    answerer = AnswerBuilder(engine.manifest, engine.precision)
    results: list[Answer | RejectedImage] = []
    for first in range(0, len(images), _BATCH):
        decoded = [_decoded(path, engine.manifest.task.input_px) for path in images[first : first + _BATCH]]
        usable = [image for image in decoded if isinstance(image, DecodedImage)]
        judged = answerer.judge(engine.logits([image.pixels_SS3 for image in usable]))
        found = iter(answerer.records(judged, [top_k] * len(usable), [image.warnings for image in usable]))
        results += [image if isinstance(image, RejectedImage) else next(found) for image in decoded]
    return results


def _decoded(path: Path, size_px: int) -> DecodedImage | RejectedImage:
    try:
        content = path.read_bytes()
    except OSError as reason:
        raise UsageError(f"{path} cannot be read ({reason.strerror}); give the path of an image.") from None
    with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
        try:
            return decode_image(content, size_px, MAX_PIXELS)
        except ImageError as error:
            return RejectedImage(error=image_problem(error))
