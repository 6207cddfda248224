"""Large images are decoded in a process of their own, with the same result, and whatever happens to that process."""

import os
import select
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from serve_toys import SIZE_PX, bomb_png, encoded, served, toy_bundle, toy_pixels

from ltkd.contract.image_decoding import DecodedImage, decode_image
from ltkd.contract.preprocessing import Preprocessing
from ltkd.errors import ImageDecodeError, ImageError, ImageTooLargeError, ImageTypeError
from serve.engine import large_images
from serve.engine.large_images import Decode, DecoderKilledError, large_image_decoder

MAX_PIXELS = 1_000_000
PREPROCESSING = Preprocessing(input_px=SIZE_PX, jpeg_scaling="none")
_ENDLESS = """
from serve.engine import large_images

def decode_image(content, preprocessing, max_pixels):
    while content == b"endless":
        pass
    raise MemoryError("a secret internal detail")

large_images.decode_image = decode_image
large_images.MAX_SECONDS = 0.2
large_images.main()
"""


def outcome(decode: Decode, content: bytes) -> DecodedImage | tuple[type[ImageError], str]:
    try:
        return decode(content, PREPROCESSING, MAX_PIXELS)
    except ImageError as error:
        return type(error), str(error)


def test_the_result_is_that_of_decode_image() -> None:
    photo = Image.fromarray(toy_pixels(5, 600, 900))
    clear = photo.convert("RGBA")
    clear.putalpha(128)
    with large_image_decoder() as decode:
        for content in (encoded(photo, "JPEG"), encoded(clear, "WEBP"), encoded(photo)):
            here, there = decode_image(content, PREPROCESSING), decode(content, PREPROCESSING, MAX_PIXELS)
            np.testing.assert_array_equal(here.pixels_SS3, there.pixels_SS3)
            assert (here.warnings, here.decoded_pixels) == (there.warnings, there.decoded_pixels)
            assert there.decoded_pixels == 540_000
        for content, error in (
            (b"junk", ImageTypeError),
            (encoded(photo)[:5000], ImageDecodeError),
            (bomb_png(1500), ImageTooLargeError),
        ):
            rejected = outcome(decode, content)
            assert rejected == outcome(decode_image, content)
            assert isinstance(rejected, tuple) and rejected[0] is error


def test_an_image_that_is_decoded_for_too_long_is_rejected_and_the_next_one_has_a_new_process() -> None:
    with large_image_decoder(("-c", _ENDLESS)) as decode:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"(?s)Traceback.*a secret internal detail"):  # reported as a defect
                decode(b"defect", PREPROCESSING, MAX_PIXELS)
            with pytest.raises(ImageDecodeError, match=r"needs more than 10 s of processor time.*scale it down"):
                decode(b"endless", PREPROCESSING, MAX_PIXELS)


_SLOW = """
import os, sys
from pathlib import Path
from serve.engine import large_images

Path(sys.argv[1]).open("a").write(f"{os.getpid()}\\n")
decode_image = large_images.decode_image

def decode_slowly(content, preprocessing, max_pixels):
    if content.startswith(b"kill"):
        os.kill(os.getpid(), int(content[4:]))
    return decode_image(content, preprocessing, max_pixels)

large_images.decode_image = decode_slowly
del sys.argv[1]
large_images.main()
"""


def test_a_process_that_was_killed_between_two_images_is_replaced_and_the_next_image_decoded(tmp_path: Path) -> None:
    photo = encoded(toy_pixels(5, 600, 900))  # more bytes than the socket's buffer holds
    assert len(photo) > 2**20
    with large_image_decoder(("-c", _SLOW, str(tmp_path / "pids"))) as decode:
        decode(photo, PREPROCESSING, MAX_PIXELS)
        for signal_number in (signal.SIGKILL, signal.SIGPROF):
            pid = int((tmp_path / "pids").read_text().split()[-1])
            os.kill(pid, signal_number)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            decode(photo, PREPROCESSING, MAX_PIXELS)
    assert len((tmp_path / "pids").read_text().split()) == 3


@pytest.mark.parametrize(
    ("signal_number", "error"),
    [
        (signal.SIGKILL, DecoderKilledError),  # the system was short of memory
        (signal.SIGPROF, ImageDecodeError),  # the image took too long
        (signal.SIGSEGV, ImageDecodeError),  # the image crashed the decoder
    ],
)
def test_only_a_process_that_was_killed_from_outside_is_not_the_fault_of_the_image(
    tmp_path: Path, signal_number: signal.Signals, error: type[Exception]
) -> None:
    with large_image_decoder(("-c", _SLOW, str(tmp_path / "pids"))) as decode:
        with pytest.raises(error):
            decode(b"kill%d" % signal_number, PREPROCESSING, MAX_PIXELS)
        decode(encoded(toy_pixels(3)), PREPROCESSING, MAX_PIXELS)


@pytest.mark.parametrize("size_px", [(8, 8), (600, 900)])  # the process has all of the file, or only a part
def test_a_process_that_is_stopped_is_killed_after_a_time_and_the_next_image_has_a_new_one(
    tmp_path: Path, size_px: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with large_image_decoder(("-c", _SLOW, str(tmp_path / "pids"))) as decode:
        decode(encoded(toy_pixels(3)), PREPROCESSING, MAX_PIXELS)
        pid = int((tmp_path / "pids").read_text())
        os.kill(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        with monkeypatch.context() as patched:
            patched.setattr(large_images, "_MAX_WALL_SECONDS", 0.02)
            with pytest.raises(DecoderKilledError, match="try again"):
                decode(encoded(toy_pixels(5, *size_px)), PREPROCESSING, MAX_PIXELS)
        decode(encoded(toy_pixels(3)), PREPROCESSING, MAX_PIXELS)


_DECODE_ONE = """
import sys
from ltkd.contract.preprocessing import Preprocessing
from serve.engine.large_images import large_image_decoder
with large_image_decoder() as decode:
    decode(sys.stdin.buffer.read(), Preprocessing(input_px=8), 10**6)
    print("decoded", flush=True)
    import signal
    signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_has_a_low_priority_and_ends_with_the_engine_process_and_not_with_a_signal_to_all() -> None:
    engine = subprocess.Popen([sys.executable, "-c", _DECODE_ONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with engine:
        assert engine.stdin and engine.stdout
        engine.stdin.write(encoded(toy_pixels(3)))
        engine.stdin.close()
        assert engine.stdout.readline() == b"decoded\n"
        (child,) = (
            int(pid)
            for thread in Path(f"/proc/{engine.pid}/task").iterdir()
            for pid in (thread / "children").read_text().split()
        )
        assert os.getpriority(os.PRIO_PROCESS, child) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(child, number)
        handle = os.pidfd_open(child)
        assert not select.select([handle], [], [], 0)[0]
        engine.kill()
        assert select.select([handle], [], [], 30)[0]  # readable when the process has ended
        os.close(handle)


@cache
def bomb_webp() -> bytes:
    """Some 4 KB that would decode to 50 megapixels."""
    return encoded(Image.new("RGB", (7071, 7071)), "WEBP", lossless=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_request_of_64_small_files_of_50_megapixels_is_rejected_and_others_are_answered_meanwhile() -> None:
    files = [("image", ("bomb.webp", bomb_webp(), "image/webp"))] * 64
    assert sum(len(content) for _, (_, content, _) in files) < 300_000
    with served(toy_bundle()) as service, ThreadPoolExecutor(2) as pool:
        before = set(service.pids())
        attack = pool.submit(lambda: httpx.post(f"{service.url}/v1/classify", files=files, timeout=60))
        with httpx.Client(base_url=service.url, timeout=60) as client:
            for _ in range(5):
                assert client.post("/v1/classify", content=encoded(toy_pixels(3))).status_code == 200
        rejected = attack.result()
        assert rejected.status_code == 422
        assert "none of the 64 images could be used" in rejected.json()["detail"]
        assert "7071 x 7071 pixels (the limit is 25,000,000)" in rejected.json()["detail"]
        assert before <= set(service.pids())  # the engine process is the one that began
        assert service.peak_bytes() < 600 * 2**20
