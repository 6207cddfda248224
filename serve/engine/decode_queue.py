"""The order in which images are decoded, and how large they are by their headers.

Requests take turns: one image of each, then the next one of each. So a request of many images does not delay a request
of one image behind all of them. Images of more than ORDINARY_PIXELS are *large*: they wait in a queue of their own and
are decoded by other processes (``serve.engine.large_images``).
"""

import struct
import threading
from collections import deque
from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

ORDINARY_PIXELS = 2**18
"""An image of 512 x 512 pixels takes at most 12 ms (16-bit PNG with transparency), a JPEG some 4 ms."""
_MANY_PIXELS = 2**62
_MAX_JPEG_SEGMENTS = 100  # before the size of the image; cameras write about ten
_JPEG_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PNG_SIZE, _JPEG_SIZE = struct.Struct(">II"), struct.Struct(">HH")

Request = TypeVar("Request")


class PixelLimits(NamedTuple):
    """How many pixels may be decoded.

    Attributes:
        per_image: Of one image.
        per_request: Of all images of one request together.
    """

    per_image: int
    per_request: int


class DecodeQueue(Generic[Request]):
    """Images that wait to be decoded. Any thread may use it; requests take turns."""

    def __init__(self) -> None:
        self._turns: deque[tuple[Request, deque[int]]] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def __bool__(self) -> bool:
        return bool(self._turns)

    def put(self, request: Request, indices: Iterable[int]) -> None:
        """Append a request.

        Args:
            request: If it is in the queue already, it gets two turns.
            indices: Which of its images are to be decoded, in order. If there are none, the call has no effect.
        """
        if waiting := deque(indices):
            with self._changed:
                self._turns.append((request, waiting))
                self._changed.notify(len(waiting))

    def take_image(self, *, wait: bool) -> tuple[Request, int] | None:
        """Take one image of the request whose turn it is; its other images are appended again.

        Args:
            wait: Wait for an image, or for ``close``.

        Returns:
            The request and the index of the image. None if there is no image, or, with ``wait``, after ``close``.
        """
        with self._changed:
            if not (turn := self._take(wait)):
                return None
            request, waiting = turn
            index = waiting.popleft()
            if waiting:
                self._turns.append(turn)
            return request, index

    def take_request(self) -> tuple[Request, deque[int]] | None:
        """Wait for the request whose turn it is, and take it with all its images; None after ``close``.

        The caller decodes one image and puts the others back. So at most one image of each request is being decoded.
        """
        with self._changed:
            return self._take(wait=True)

    def close(self) -> None:
        """Let the threads that wait end, as soon as there are no more images."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _take(self, wait: bool) -> tuple[Request, deque[int]] | None:
        while wait and not self._turns and not self._closed:
            self._changed.wait()
        return self._turns.popleft() if self._turns else None


def is_large_image(content: bytes) -> bool:
    """Whether an image is large by its header."""
    return header_pixels(content) > ORDINARY_PIXELS


def header_pixels(content: bytes) -> int:
    """Width times height of an image, read from the first bytes of its file in microseconds.

    The result only decides where the image is decoded. ``decode_image`` reads the header again, with all its checks.

    Returns:
        0 if the bytes are not those of a JPEG, PNG or WebP file: it is rejected without decoding. A very large number
        if the file does not contain its size where encoders write it.
    """
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png_pixels(content)
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return _webp_pixels(content)
    return _jpeg_pixels(content) if content.startswith(b"\xff\xd8\xff") else 0


def _png_pixels(content: bytes) -> int:
    if content[12:16] != b"IHDR" or len(content) < 24:
        return _MANY_PIXELS
    width, height = _PNG_SIZE.unpack_from(content, 16)
    return int(width * height)


def _webp_pixels(content: bytes) -> int:
    kind = content[12:16]
    if len(content) < 30 or kind not in (b"VP8X", b"VP8L", b"VP8 "):
        return _MANY_PIXELS
    if kind == b"VP8X":
        return (1 + int.from_bytes(content[24:27], "little")) * (1 + int.from_bytes(content[27:30], "little"))
    if kind == b"VP8L":
        sizes = int.from_bytes(content[21:25], "little")
        return (1 + (sizes & 0x3FFF)) * (1 + (sizes >> 14 & 0x3FFF))
    width, height = (int.from_bytes(content[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    return width * height


def _jpeg_pixels(content: bytes) -> int:
    start = 2
    for _ in range(_MAX_JPEG_SEGMENTS):
        if len(content) < start + 9 or content[start] != 0xFF:
            break
        if content[start + 1] in _JPEG_START_OF_FRAME:
            height, width = _JPEG_SIZE.unpack_from(content, start + 5)
            return int(width * height)
        start += 2 + int.from_bytes(content[start + 2 : start + 4])
    return _MANY_PIXELS
