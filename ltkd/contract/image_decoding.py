"""Decode and resize images. Training, certification and serving all use this module.

Only JPEG, PNG and WebP are accepted. The EXIF orientation is applied. Only the first frame of an animation is used.
Transparent pixels are blended with white. 16-bit grey is scaled to 8 bits. Grey, palette and CMYK images become RGB.
The centre square is cropped and resized as a ``Preprocessing`` states; an image that already has the target size is not
resized. Depending on the preprocessing, the JPEG decoder scales down while it decodes, which saves most of the time and
memory of a photograph. The limit of pixels counts them as they are decoded.

The number of parts of a file (PNG chunks, JPEG segments and scans) is limited to more than any encoder writes, because
a decoder can spend minutes on a megabyte of empty chunks, colour profiles or scans.
"""

import io
import math
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ltkd.contract.preprocessing import Preprocessing
from ltkd.errors import ImageDecodeError, ImageError, ImageTooLargeError, ImageTypeError

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 25_000_000  # of an image that somebody sends
MAX_PIXELS_OF_FILES = 50_000_000  # of the files of a data set
MAX_HEADER_PIXELS = 89_478_485  # whatever the decoder scales; Pillow warns of more
_JPEG_PIXELS_PER_DECODED = 8  # the codes of all pixels are read, which takes about an eighth of their decoding
MAX_PARTS = 10_000  # PNG chunks, JPEG segments; libpng writes a chunk every 8 kB
MAX_SCANS = 32  # scans of a progressive JPEG; encoders write about ten
BACKGROUND = (255, 255, 255)

_MODES_16_BIT = ("I", "I;16", "I;16B", "I;16L")
_ORIENTATION = 0x0112
_SWAPS_SIDES = (5, 6, 7, 8)  # orientations that exchange width and height
_UPRIGHT = 1
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_CHUNK = struct.Struct(">I4s")
_JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # excludes escaped bytes and restart markers of a scan
_JPEG_SEGMENT = re.compile(rb"\xff[\xc0-\xc7\xc9-\xcf\xda-\xef\xfe]")  # markers that are followed by a length
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_SCALABLE = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # with a DCT; decoders cannot scale lossless JPEGs

Box = tuple[int, int, int, int]
"""Left, top, width and height in pixels."""


@dataclass(frozen=True)
class DecodedImage:
    """Pixels ready for a network.

    Attributes:
        pixels_SS3: uint8 [S, S, 3], RGB.
        decoded_pixels: The number of pixels that ``max_pixels`` limits, a measure of the time and memory of decoding.
        warnings: Changes to the image that the sender may not expect.
    """

    pixels_SS3: NDArray[np.uint8]
    decoded_pixels: int
    warnings: tuple[str, ...]


def decode_image(content: bytes, preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """Decode one image and crop and resize it.

    Args:
        content: A whole JPEG, PNG or WebP file.
        preprocessing: Size of the result, and how the image is cropped and scaled to it.
        max_pixels: An image that needs more decoded pixels is rejected after reading the header, before memory is
            allocated. A JPEG that the decoder scales down counts as the pixels that remain, but at least an eighth of
            its own; a progressive one counts in full, because its decoder holds the coefficients of all pixels.

    Raises:
        ImageTypeError: The bytes are not of one of these types.
        ImageDecodeError: The image is damaged or truncated.
        ImageTooLargeError: It has too many pixels.
    """
    with _open_image(content, max_pixels, MAX_HEADER_PIXELS) as image:
        size = f"{image.width} x {image.height} pixels"
        decoded_pixels = _scale_while_decoding(image, content, preprocessing)
        if decoded_pixels > max_pixels:
            raise ImageTooLargeError(_too_large(size, max_pixels))
        rgb, warnings = _decode_upright(image)
        return DecodedImage(_square(rgb, preprocessing), decoded_pixels, warnings)


def is_known_type(content: bytes) -> bool:
    """Whether the first bytes are those of a JPEG, PNG or WebP file."""
    return content.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or (
        content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    )


def load_image(path: Path, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Decode one image file of a data set to the pixels of ``decode_image``, uint8 [S, S, 3]; errors name the file."""
    with _errors_with_path(path), _open_file(path) as (image, content):
        _scale_while_decoding(image, content, preprocessing)
        return _square(_decode_upright(image)[0], preprocessing)


def load_crop(path: Path, size_px: int, choose_box: Callable[[int, int], Box]) -> NDArray[np.uint8]:
    """Decode one image file, crop a box and resize it to uint8 [S, S, 3]; errors name the file.

    The JPEG decoder scales down as long as each side of the box keeps at least ``size_px`` pixels.

    Args:
        path: A JPEG, PNG or WebP file.
        size_px: Side of the result in pixels.
        choose_box: Returns the box for the width and height of the upright image. It is called before decoding.
    """
    with _errors_with_path(path), _open_file(path) as (image, _):
        stored_width = image.width
        swapped = _orientation(image)[0] in _SWAPS_SIDES
        width, height = (image.height, image.width) if swapped else image.size
        left, top, box_width, box_height = choose_box(width, height)
        min_size = (math.ceil(width * size_px / box_width), math.ceil(height * size_px / box_height))
        draft = image.draft(image.mode, min_size[::-1] if swapped else min_size)
        scale = draft[1][2] / stored_width if draft else 1.0
        rgb, _ = _decode_upright(image)
        x0, x1, y0, y1 = (scale * edge for edge in (left, left + box_width, top, top + box_height))
        x, y = math.floor(x0), math.floor(y0)
        part = rgb.crop((x, y, min(math.ceil(x1), rgb.width), min(math.ceil(y1), rgb.height)))
        box = (x0 - x, y0 - y, min(x1 - x, part.width), min(y1 - y, part.height))
        return np.asarray(part.resize((size_px, size_px), Image.Resampling.BILINEAR, box))


def image_size_px(path: Path) -> tuple[int, int]:
    """Read the width and height of an image file from its header, without decoding it.

    Raises:
        ImageDecodeError: The header cannot be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Exception as reason:
        raise ImageDecodeError(
            f"{path}: the file has no readable JPEG, PNG or WebP header ({reason}); replace it."
        ) from None


def save_image(pixels_HW3: NDArray[np.uint8], path: Path) -> None:
    """Write pixels as a PNG file."""
    Image.fromarray(pixels_HW3).save(path, format="PNG")


@contextmanager
def _open_image(content: bytes, max_pixels: int, max_header_pixels: int) -> Iterator[Image.Image]:
    """Read the header of an image; every exception inside the context becomes an ImageError.

    Args:
        content: The whole file.
        max_pixels: The limit that an error names.
        max_header_pixels: Images with more pixels are rejected, even if a decoder would scale them down.
    """
    if not content:
        raise ImageTypeError("the image is empty (0 bytes); send a JPEG, PNG or WebP file.")
    if not is_known_type(content):
        raise ImageTypeError(
            f"the file is not a JPEG, PNG or WebP image (it begins with {content[:8]!r}); "
            "convert it to one of these formats."
        )
    _check_parts(content)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > max_header_pixels:
                raise ImageTooLargeError(_too_large(f"{image.width} x {image.height} pixels", max_pixels))
            yield image
    except ImageDecodeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLargeError(_too_large("far too many pixels", max_pixels)) from None
    except UnidentifiedImageError:  # Pillow's message has only the address of a buffer
        raise ImageDecodeError("the image is damaged or truncated (no readable header); send the whole file.") from None
    except Exception as reason:  # decoders raise many types of exception for damaged or malicious files
        summary = str(reason).partition("\n")[0][:100] or type(reason).__name__
        raise ImageDecodeError(f"the image is damaged or truncated ({summary}); send the whole file.") from None


@contextmanager
def _open_file(path: Path) -> Iterator[tuple[Image.Image, bytes]]:
    content = path.read_bytes()
    with _open_image(content, MAX_PIXELS_OF_FILES, MAX_PIXELS_OF_FILES) as image:
        yield image, content


def _check_parts(content: bytes) -> None:
    """Reject a file with so many parts that decoding could take minutes, even if it has few pixels."""
    if content.startswith(b"\x89PNG"):
        chunks = list(islice(_png_chunks(content), MAX_PARTS + 1))
        _check_count(len(chunks), MAX_PARTS, "chunks")
        _check_count(chunks.count(b"iCCP"), 1, "colour profile")
    elif content.startswith(b"\xff\xd8"):
        _check_count(_num_jpeg_reads(content), MAX_PARTS, "segments")
        _check_count(sum(1 for _ in islice(_jpeg_scans(content), MAX_SCANS + 1)), MAX_SCANS, "scans")


def _check_count(num: int, limit: int, parts: str) -> None:
    if num > limit:
        raise ImageDecodeError(
            f"the image has more than {limit:,} {parts}, which no encoder writes; save it again with an image editor."
        )


def _png_chunks(content: bytes) -> Iterator[bytes]:
    """The names of the chunks of a PNG."""
    start, name = 8, b""
    while name != b"IEND" and start + _PNG_CHUNK.size <= len(content):
        length, name = _PNG_CHUNK.unpack_from(content, start)
        yield name
        start += 12 + length


def _num_jpeg_reads(content: bytes) -> int:
    """Number of segments before the first scan plus the bytes between them; Pillow reads each one separately."""
    start, num_reads = 2, 0
    while num_reads <= MAX_PARTS and (found := _JPEG_SEGMENT.search(content, start)):
        num_reads += 1 + found.start() - start
        if content[found.end() - 1] == _START_OF_SCAN:
            return num_reads
        start = _after_segment(content, found.end())
    return num_reads + max(0, len(content) - start)


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int]]:
    """The markers of a JPEG up to its end marker, each with the position of the byte after it."""
    start = 2
    while found := _JPEG_MARKER.search(content, start):
        marker, start = content[found.end() - 1], found.end()
        yield marker, start
        if marker == _END_OF_IMAGE:
            return
        start = _after_segment(content, start)


def _after_segment(content: bytes, start: int) -> int:
    return start + int.from_bytes(content[start : start + 2])


@dataclass(frozen=True)
class _Scan:
    """One scan that a JPEG decoder reads.

    Attributes:
        is_whole: Whether it has the whole image; otherwise the decoder holds the coefficients of all pixels.
        is_scalable: Whether the image is coded with a DCT, in which the decoder can scale; lossless JPEGs are not.
    """

    is_whole: bool
    is_scalable: bool


def _jpeg_scans(content: bytes) -> Iterator[_Scan]:
    """The scans that a JPEG decoder reads."""
    frame, components = 0, b""
    for marker, start in _jpeg_segments(content):
        if marker in _START_OF_FRAME:
            frame, components = marker, content[start + 7 : start + 8]
        elif marker == _START_OF_SCAN:
            whole = frame not in _PROGRESSIVE and content[start + 2 : start + 3] == components
            yield _Scan(whole, frame in _SCALABLE)
            if whole:
                return  # this scan has all colours, and the decoder stops after it


@contextmanager
def _errors_with_path(path: Path) -> Iterator[None]:
    """Prefix the errors of reading and decoding a file with its path."""
    try:
        yield
    except OSError as reason:
        raise ImageDecodeError(f"{path}: the file cannot be read ({reason.strerror}); replace it.") from None
    except ImageError as error:
        raise type(error)(f"{path}: {error}") from None


def _scale_while_decoding(image: Image.Image, content: bytes, preprocessing: Preprocessing) -> int:
    """Set the scale of a JPEG's decoder; return the number of pixels for ``max_pixels``. Nothing is decoded yet."""
    num_pixels, side_px = image.width * image.height, preprocessing.min_decoded_px
    scan = next(_jpeg_scans(content), None) if content.startswith(b"\xff\xd8") else None
    if side_px is None or scan is None or not scan.is_scalable:
        return num_pixels
    image.draft(image.mode, (side_px, side_px))
    if not scan.is_whole:
        return num_pixels
    return max(image.width * image.height, num_pixels // _JPEG_PIXELS_PER_DECODED)


def _square(rgb: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    size = (preprocessing.input_px, preprocessing.input_px)
    if rgb.size != size or preprocessing.crop_ratio < 1:
        filter_ = Image.Resampling[preprocessing.interpolation.upper()]
        rgb = ImageOps.fit(rgb, size, filter_, bleed=(1 - preprocessing.crop_ratio) / 2)
    return np.asarray(rgb, dtype=np.uint8)


def _decode_upright(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """Decode an image to RGB, apply its EXIF orientation, and list the changes that the sender may not expect."""
    warnings = []
    if getattr(image, "n_frames", 1) > 1:
        warnings.append("the image is animated; only the first frame was used")
    orientation, readable = _orientation(image)
    if not readable:
        warnings.append("the EXIF data cannot be read; the image was treated as upright")
    image.load()
    upright = image
    if orientation != _UPRIGHT:
        upright = image.transpose(_TO_UPRIGHT[orientation])
        warnings.append("the EXIF orientation was applied")
    if upright.mode in _MODES_16_BIT:
        warnings.append("16-bit grey was scaled to 8 bit")
        upright = _grey_8_bit(upright)
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            warnings.append("transparent pixels were blended with white")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, (*BACKGROUND, 255)), rgba).convert("RGB")
    else:
        rgb = upright if upright.mode == "RGB" else upright.convert("RGB")
    return rgb, tuple(warnings)


def _orientation(image: Image.Image) -> tuple[int, bool]:
    """The EXIF orientation of an image, and whether its EXIF data could be read; an invalid one means upright."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # Pillow raises many types of exception for invalid EXIF data; the pixels may be valid
        return _UPRIGHT, False
    return (orientation if isinstance(orientation, int) and orientation in _TO_UPRIGHT else _UPRIGHT), True


def _grey_8_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits. Pillow's own conversion clips, which makes most of the image white."""
    grey_HW = np.asarray(image).astype(np.uint32)
    scaled = Image.fromarray((grey_HW // 257).astype(np.uint8))
    transparent = image.info.get("transparency")  # a PNG can declare one grey level to be transparent
    if transparent is not None:
        scaled.putalpha(Image.fromarray(np.where(grey_HW == transparent, 0, 255).astype(np.uint8)))
    return scaled


def _too_large(size: str, max_pixels: int) -> str:
    return f"the image has {size} (the limit is {max_pixels:,}); scale it down."
