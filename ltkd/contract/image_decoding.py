"""Bytes to pixels: the one decoder and resizer that training, parity and serving share.

Rules: JPEG, PNG and WebP and nothing else; EXIF orientation is applied; of an animation the first frame
counts; transparency is laid on white; 16-bit grey is scaled to 8 bit; grey, palette and CMYK become RGB. The centre
square is taken and resized with an anti-aliased bilinear filter; an image that already has the size is not touched.

A file has so many parts at most as no encoder writes: of a megabyte of empty chunks, colour profiles or scans a decoder
makes minutes of work.
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

from ltkd.errors import ImageDecodeError, ImageError, ImageTypeError

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_PIXELS = 50_000_000
MAX_PARTS = 10_000  # PNG chunks, JPEG segments; libpng writes a chunk every 8 kB
MAX_SCANS = 32  # of a progressive JPEG; encoders write some ten
BACKGROUND = (255, 255, 255)

_MODES_16_BIT = ("I", "I;16", "I;16B", "I;16L")
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # orientations that exchange width and height
_UPRIGHT = 1
_UNDOING = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_CHUNK = struct.Struct(">I4s")
_JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # neither a byte of a scan nor a restart within it
_JPEG_SEGMENT = re.compile(rb"\xff[\xc0-\xc7\xc9-\xcf\xda-\xef\xfe]")  # those that have a length
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}

Box = tuple[int, int, int, int]
"""Left, top, width and height in pixels."""


@dataclass(frozen=True)
class DecodedImage:
    """Pixels ready for a network.

    Attributes:
        pixels_SS3: uint8 [S, S, 3], RGB.
        warnings: What was done to the image that its sender may not expect.
    """

    pixels_SS3: NDArray[np.uint8]
    warnings: tuple[str, ...]


def decode_image(content: bytes, size_px: int, max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """Decode one image and bring it to a square of ``size_px``.

    Args:
        content: A whole JPEG, PNG or WebP file.
        size_px: Side of the result in pixels.
        max_pixels: Images with more pixels are refused from their header, before memory is taken.

    Raises:
        ImageTypeError: The bytes are of none of these types.
        ImageDecodeError: The image is damaged, truncated or too large.
    """
    with _opened(content, max_pixels) as image:
        return _square(image, size_px)


def is_known_type(content: bytes) -> bool:
    """Whether the bytes begin like a JPEG, PNG or WebP file."""
    return content.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or (
        content[:4] == b"RIFF" and content[8:12] == b"WEBP"
    )


def load_image(path: Path, size_px: int, *, draft: bool = False) -> NDArray[np.uint8]:
    """Decode one image file to uint8 [S, S, 3]; errors name the file.

    Args:
        path: A JPEG, PNG or WebP file.
        size_px: Side of the result in pixels.
        draft: Let the JPEG decoder scale down by 2, 4 or 8 as long as no detail of the result is lost. It reads the
            whole file and finds the same damage in a fraction of the time; the pixels differ a little.
    """
    with _named(path), _opened(path.read_bytes(), MAX_PIXELS) as image:
        if draft:
            image.draft(image.mode, (size_px, size_px))
        return _square(image, size_px).pixels_SS3


def load_crop(path: Path, size_px: int, choose: Callable[[int, int], Box]) -> NDArray[np.uint8]:
    """Decode one image file, cut a box out of it and stretch that to uint8 [S, S, 3]; errors name the file.

    The JPEG decoder scales down as far as the box keeps ``size_px`` pixels a side.

    Args:
        path: A JPEG, PNG or WebP file.
        size_px: Side of the result in pixels.
        choose: Width and height of the upright image to the box; asked before anything is decoded.
    """
    with _named(path), _opened(path.read_bytes(), MAX_PIXELS) as image:
        stored_width = image.width
        turned = _orientation(image)[0] in _TURNED
        width, height = (image.height, image.width) if turned else image.size
        left, top, box_width, box_height = choose(width, height)
        enough = (math.ceil(width * size_px / box_width), math.ceil(height * size_px / box_height))
        drafted = image.draft(image.mode, enough[::-1] if turned else enough)
        scale = drafted[1][2] / stored_width if drafted else 1.0
        rgb, _ = _upright(image)
        x0, x1, y0, y1 = (scale * edge for edge in (left, left + box_width, top, top + box_height))
        x, y = math.floor(x0), math.floor(y0)
        part = rgb.crop((x, y, min(math.ceil(x1), rgb.width), min(math.ceil(y1), rgb.height)))
        box = (x0 - x, y0 - y, min(x1 - x, part.width), min(y1 - y, part.height))
        return np.asarray(part.resize((size_px, size_px), Image.Resampling.BILINEAR, box))


def image_size_px(path: Path) -> tuple[int, int]:
    """Width and height of an image file, from its header alone.

    Raises:
        ImageDecodeError: The header cannot be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Exception as reason:
        raise ImageDecodeError(f"{path}: no readable JPEG, PNG or WebP header ({reason}); replace the file.") from None


def save_image(pixels_HW3: NDArray[np.uint8], path: Path) -> None:
    """Write pixels as a PNG file."""
    Image.fromarray(pixels_HW3).save(path, format="PNG")


@contextmanager
def _opened(content: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """An image whose header is read; whatever goes wrong in the context becomes an ImageError."""
    if not content:
        raise ImageTypeError("the image is empty (0 bytes); send the bytes of a JPEG, PNG or WebP file.")
    if not is_known_type(content):
        raise ImageTypeError(f"not a JPEG, PNG or WebP image (it begins with {content[:8]!r}); convert it to one.")
    _check_parts(content)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ImageDecodeError(_too_large(f"{image.width} x {image.height}", max_pixels))
            yield image
    except ImageDecodeError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageDecodeError(_too_large("far too many", max_pixels)) from None
    except UnidentifiedImageError:  # its own message is the address of a buffer
        raise ImageDecodeError("the image is damaged or truncated (no readable header); send the whole file.") from None
    except Exception as reason:  # whatever a decoder throws at hostile bytes means just this
        said = str(reason).partition("\n")[0][:100] or type(reason).__name__
        raise ImageDecodeError(f"the image is damaged or truncated ({said}); send the whole file.") from None


def _check_parts(content: bytes) -> None:
    """Refuse a file of so many parts that decoding it would take minutes, whatever its size in pixels."""
    if content.startswith(b"\x89PNG"):
        chunks = list(islice(_png_chunks(content), MAX_PARTS + 1))
        _check_count(len(chunks), MAX_PARTS, "chunks")
        _check_count(chunks.count(b"iCCP"), 1, "colour profile")
    elif content.startswith(b"\xff\xd8"):
        _check_count(_jpeg_steps(content), MAX_PARTS, "segments")
        _check_count(sum(1 for _ in islice(_jpeg_scans(content), MAX_SCANS + 1)), MAX_SCANS, "scans")


def _check_count(seen: int, most: int, parts: str) -> None:
    if seen > most:
        raise ImageDecodeError(f"the image has more than {most:,} {parts}, as no encoder writes; save it again.")


def _png_chunks(content: bytes) -> Iterator[bytes]:
    """The names of a PNG's chunks."""
    start, name = 8, b""
    while name != b"IEND" and start + _PNG_CHUNK.size <= len(content):
        length, name = _PNG_CHUNK.unpack_from(content, start)
        yield name
        start += 12 + length


def _jpeg_steps(content: bytes) -> int:
    """Segments before the first scan, and bytes between them: Pillow reads past each of these by itself."""
    start, steps = 2, 0
    while steps <= MAX_PARTS and (found := _JPEG_SEGMENT.search(content, start)):
        steps += 1 + found.start() - start
        if content[found.end() - 1] == _START_OF_SCAN:
            return steps
        start = _after_segment(content, found.end())
    return steps + max(0, len(content) - start)


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int]]:
    """The markers of a JPEG, up to its end, each with the place of what follows it."""
    start = 2
    while found := _JPEG_MARKER.search(content, start):
        marker, start = content[found.end() - 1], found.end()
        yield marker, start
        if marker == _END_OF_IMAGE:
            return
        start = _after_segment(content, start)


def _after_segment(content: bytes, start: int) -> int:
    return start + int.from_bytes(content[start : start + 2])


def _jpeg_scans(content: bytes) -> Iterator[int]:
    """Where the scans of a JPEG begin that its decoder goes through."""
    progressive, components = False, b""
    for marker, start in _jpeg_segments(content):
        if marker in _START_OF_FRAME:
            progressive, components = marker in _PROGRESSIVE, content[start + 7 : start + 8]
        elif marker == _START_OF_SCAN:
            yield start
            if not progressive and content[start + 2 : start + 3] == components:
                return  # all colours are in this scan, and the decoder looks no further


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of reading and decoding a file begin with its path."""
    try:
        yield
    except OSError as reason:
        raise ImageDecodeError(f"{path}: cannot be read ({reason.strerror}); replace the file.") from None
    except ImageError as error:
        raise type(error)(f"{path}: {error}") from None


def _square(image: Image.Image, size_px: int) -> DecodedImage:
    rgb, warnings = _upright(image)
    if rgb.size != (size_px, size_px):
        rgb = ImageOps.fit(rgb, (size_px, size_px), Image.Resampling.BILINEAR)
    return DecodedImage(np.asarray(rgb, dtype=np.uint8), warnings)


def _upright(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    """The image decoded, turned as its EXIF orientation says, in RGB; and what its sender may not expect."""
    warnings = []
    if getattr(image, "n_frames", 1) > 1:
        warnings.append("animated: the first frame was used")
    orientation, readable = _orientation(image)
    if not readable:
        warnings.append("its EXIF data cannot be read: it was taken as upright")
    image.load()
    upright = image
    if orientation != _UPRIGHT:
        upright = image.transpose(_UNDOING[orientation])
        warnings.append("rotated as its EXIF orientation says")
    if upright.mode in _MODES_16_BIT:
        warnings.append("16-bit grey was scaled to 8 bit")
        upright = _grey_8_bit(upright)
    if upright.has_transparency_data:
        rgba = upright.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            warnings.append("transparency was laid on white")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, (*BACKGROUND, 255)), rgba).convert("RGB")
    else:
        rgb = upright if upright.mode == "RGB" else upright.convert("RGB")
    return rgb, tuple(warnings)


def _orientation(image: Image.Image) -> tuple[int, bool]:
    """The EXIF orientation of an image, and whether its EXIF data could be read; no such orientation is upright."""
    try:
        seen = image.getexif().get(_ORIENTATION)
    except Exception:  # whatever Pillow throws at odd EXIF data; the pixels may be sound
        return _UPRIGHT, False
    return (seen if isinstance(seen, int) and seen in _UNDOING else _UPRIGHT), True


def _grey_8_bit(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bit; Pillow's own conversion clips, which turns most of it white."""
    grey_HW = np.asarray(image).astype(np.uint32)
    scaled = Image.fromarray((grey_HW // 257).astype(np.uint8))
    clear = image.info.get("transparency")  # the one grey level that PNG declares transparent
    if clear is not None:
        scaled.putalpha(Image.fromarray(np.where(grey_HW == clear, 0, 255).astype(np.uint8)))
    return scaled


def _too_large(seen: str, max_pixels: int) -> str:
    return f"the image has {seen} pixels, at most {max_pixels:,} are taken; scale it down."
