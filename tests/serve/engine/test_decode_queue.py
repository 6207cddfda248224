"""The order in which images are decoded, and the sizes that are read from their headers."""

import struct
import threading
import zlib

import pytest
from PIL import Image
from serve_toys import encoded, toy_pixels

from ltkd.contract.image_decoding import decode_image
from ltkd.contract.preprocessing import Preprocessing
from serve.engine.decode_queue import ORDINARY_PIXELS, DecodeQueue, header_pixels


def taken(queue: DecodeQueue[str]) -> list[tuple[str, int]]:
    """All images of the queue, in the order in which they would be decoded."""
    images = []
    while image := queue.take_image(wait=False):
        images.append(image)
    return images


def test_requests_take_turns_and_the_images_of_each_stay_in_order() -> None:
    queue: DecodeQueue[str] = DecodeQueue()
    queue.put("many", range(4))
    queue.put("two", (5, 7))
    queue.put("one", (0,))
    queue.put("none", ())
    assert taken(queue) == [("many", 0), ("two", 5), ("one", 0), ("many", 1), ("two", 7), ("many", 2), ("many", 3)]
    assert not queue


def test_a_request_that_was_taken_whole_has_no_turn_until_its_other_images_are_put_back() -> None:
    queue: DecodeQueue[str] = DecodeQueue()
    queue.put("many", range(3))
    queue.put("one", (0,))
    turn = queue.take_request()
    assert turn
    request, waiting = turn
    assert (request, waiting.popleft()) == ("many", 0)
    assert taken(queue) == [("one", 0)]
    queue.put(request, waiting)
    assert taken(queue) == [("many", 1), ("many", 2)]


def test_every_image_is_taken_by_exactly_one_of_several_threads_and_all_end_after_close() -> None:
    queue: DecodeQueue[int] = DecodeQueue()
    images: list[tuple[int, int]] = []

    def take() -> None:
        while image := queue.take_image(wait=True):
            images.append(image)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for request in range(20):
        queue.put(request, range(request))
    queue.close()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert sorted(images) == [(request, index) for request in range(20) for index in range(request)]


@pytest.mark.parametrize(("height_px", "width_px"), [(1, 1), (3, 300), (700, 513)])
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "L", {}),
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "CMYK", {"comment": b"x" * 9000}),
        ("JPEG", "L", {"exif": Image.Exif()}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGB", {"exif": b"Exif\0\0" + b"x" * 9}),
    ],
)
def test_the_size_in_the_header_is_found(
    kind: str, mode: str, options: dict[str, object], height_px: int, width_px: int
) -> None:
    image = Image.fromarray(toy_pixels(1, height_px, width_px)).convert(mode)
    content = encoded(image, kind, **options)
    assert header_pixels(content) == height_px * width_px


def test_the_size_of_another_format_in_a_comment_is_not_read() -> None:
    jpeg = encoded(toy_pixels(1, 600, 700), "JPEG")
    png_size, webp_size = b"xxxxxxIHDR" + b"\0\0\0\1" * 2, b"xxWEBPVP8X" + b"\0" * 20
    for comment in (png_size, webp_size):
        content = jpeg[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(comment)) + comment + jpeg[2:]
        assert content[12:16] == b"IHDR" or content[8:15] == b"WEBPVP8"
        assert decode_image(content, Preprocessing(input_px=8), 420_000).decoded_pixels
        assert header_pixels(content) == 420_000


def test_a_file_without_a_size_is_ordinary_unless_it_may_be_a_large_image() -> None:
    png, jpeg, webp = (encoded(toy_pixels(1), kind) for kind in ("PNG", "JPEG", "WEBP"))
    for content in (b"", b"junk", png[1:], b"JUNK" + webp[4:], b"\0" * 100):
        assert header_pixels(content) == 0
    for content in (jpeg[:5], jpeg[:100], b"\xff\xd8" + b"\xff\xe0\0\2" * 10_000, b"\xff\xd8\xff" * 1000):
        assert header_pixels(content) > ORDINARY_PIXELS
    text = struct.pack(">I4sI", 0, b"tEXt", zlib.crc32(b"tEXt"))  # libpng reads it, and then the size
    for content in (png[:20], png[:8] + text + png[8:], webp[:14], webp[:12] + b"JUNK\0\0\0\0" + webp[12:]):
        assert header_pixels(content) > ORDINARY_PIXELS
