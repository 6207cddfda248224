"""Decode large images in a process of its own: ``python -m serve.engine.large_images DESCRIPTOR``.

An image of 25 megapixels takes up to 1.4 s and 0.6 GB. In the engine process it would delay every other request,
because Pillow holds the interpreter's lock for up to 0.2 s of that time, and a decoder that does not end would stop the
engine. The process runs at a low priority, so that ordinary images take precedence on the same cores, and the system
ends it when one image takes too long.

Each request is two messages: preprocessing and limit in JSON, and the file. Each response is a result in JSON, and the
pixels.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from PIL import Image

import ltkd.errors
from ltkd.contract.image_decoding import DecodedImage, decode_image
from ltkd.contract.preprocessing import Preprocessing
from ltkd.errors import ImageDecodeError, ImageError

Decode = Callable[[bytes, Preprocessing, int], DecodedImage]
"""``ltkd.contract.image_decoding.decode_image`` or another function with its arguments."""

MAX_SECONDS = 10  # of processor time; the slowest image of 25 megapixels that was found takes 1.4 s
_MAX_WALL_SECONDS = 60.0  # for a process that is stopped or blocked; hardly any client waits for longer
_END_SECONDS = 5.0
_SOCKET_BUFFER_BYTES = 2**20
_NICENESS = 10  # about a tenth of the processor time while another process uses the rest


class DecoderKilledError(Exception):
    """Another process ended the decoder while it decoded an image, or it was stuck; the image is not the reason."""


class _LargeImageDecoder:
    """Decodes images in another process, which is started for the first of them. Not thread-safe."""

    def __init__(self, program: Sequence[str]) -> None:
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def decode(self, content: bytes, preprocessing: Preprocessing, max_pixels: int) -> DecodedImage:
        """Decode one image as ``decode_image`` does.

        Raises:
            ImageError: As ``decode_image``, or the process ended because of the image.
            DecoderKilledError: The process was killed while it decoded the image, or was stuck.
        """
        arguments = json.dumps([preprocessing.model_dump(), max_pixels]).encode()
        try:
            try:
                self._send(arguments, content)
            except OSError:  # the process ended while it had no image
                self.close()
                self._send(arguments, content)
            result, pixels = self._receive()
        except (EOFError, OSError):
            if self.close() == -signal.SIGKILL:
                raise DecoderKilledError("the decoder was killed while it decoded the image; try again.") from None
            raise ImageDecodeError(
                f"the image needs more than {MAX_SECONDS} s of processor time, or the decoder ran out of memory or "
                "crashed; save the image again with an image editor, or scale it down."
            ) from None
        if "error" in result:
            raise getattr(ltkd.errors, result["error"], RuntimeError)(result["message"])
        side_px = preprocessing.input_px
        pixels_SS3 = np.frombuffer(pixels, np.uint8).reshape(side_px, side_px, 3)
        return DecodedImage(pixels_SS3, result["decoded_pixels"], tuple(result["warnings"]))

    def close(self) -> int | None:
        """End the process, and return its exit status; None if it was not started."""
        process, connection = self._process, self._connection
        self._connection = self._process = None
        if not process or not connection:
            return None
        if connection.poll():  # it is ending: its own exit status is wanted
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_SECONDS)
        connection.close()
        process.kill()
        process.communicate()
        return process.returncode

    def _send(self, *messages: bytes) -> None:
        connection = self._connection or self._start()
        with self._killed_if_stuck():
            for message in messages:
                connection.send_bytes(message)

    def _receive(self) -> tuple[dict[str, Any], bytes]:
        assert self._connection
        with self._killed_if_stuck():
            return json.loads(self._connection.recv_bytes()), self._connection.recv_bytes()

    @contextlib.contextmanager
    def _killed_if_stuck(self) -> Iterator[None]:
        """Kill the process if the block takes too long; then the connection ends, and with it the block."""
        assert self._process
        timer = threading.Timer(_MAX_WALL_SECONDS, self._process.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        with theirs:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, with arguments of this module
                [sys.executable, "-P", *self._program, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.PIPE,  # the system closes it when this process ends
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._connection = Connection(ours.detach())
        return self._connection


@contextlib.contextmanager
def large_image_decoder(program: Sequence[str] = ("-m", "serve.engine.large_images")) -> Iterator[Decode]:
    """A function that decodes one image at a time in another process, which ends with the context.

    Args:
        program: What Python runs in that process.
    """
    decoder = _LargeImageDecoder(program)
    try:
        yield decoder.decode
    finally:
        decoder.close()


def main() -> None:
    """Decode images until the engine process ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are sent to all processes; the server process decides when to end
    os.nice(_NICENESS)
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    threading.Thread(target=_end_with_the_engine, daemon=True).start()
    with Connection(int(sys.argv[1])) as connection, contextlib.suppress(EOFError, OSError):
        while True:
            preprocessing, max_pixels = json.loads(connection.recv_bytes())
            content = connection.recv_bytes()
            result, pixels = _decode(content, Preprocessing(**preprocessing), max_pixels)
            connection.send_bytes(json.dumps(result).encode())
            connection.send_bytes(pixels)


def _decode(content: bytes, preprocessing: Preprocessing, max_pixels: int) -> tuple[dict[str, object], bytes]:
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # the default action of its signal ends the process
    try:
        image = decode_image(content, preprocessing, max_pixels)
    except ImageError as error:
        return {"error": type(error).__name__, "message": str(error)}, b""
    except Exception:  # a defect, which the engine process reports
        return {"error": "RuntimeError", "message": traceback.format_exc()}, b""
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {"warnings": image.warnings, "decoded_pixels": image.decoded_pixels}, image.pixels_SS3.tobytes()


def _end_with_the_engine() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
