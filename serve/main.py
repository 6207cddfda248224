"""What the commands ``ltkd serve`` and ``ltkd classify`` do."""

import signal
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn
from PIL import Image

from ltkd.bundle import open_bundle
from ltkd.errors import UsageError
from ltkd.images import MAX_PIXELS
from serve.answers import Answer, Refused
from serve.app import create_app
from serve.classifier import decode, infer, results_of, usable
from serve.engine import Device, Engine, open_engine
from serve.settings import Settings

_BATCH = 64  # files decoded at one time; more would only take memory


def serve(bundle_path: Path, settings: Settings) -> None:
    """Serve a bundle until SIGTERM or SIGINT; both end it cleanly.

    Raises:
        LtkdError: The bundle, the device or the address cannot be used.
    """
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # refused like any image with too many pixels
    with _signals_exit():
        engine = open_engine(open_bundle(bundle_path), settings.device)
        with _listening(settings.host, settings.port) as listener:
            host, port = listener.getsockname()[:2]
            print(_greeting(engine, host, port), flush=True)  # noqa: T201 - the line a user waits for
            config = uvicorn.Config(
                create_app(engine, settings),
                loop="auto",  # uvloop and httptools wherever they exist
                http="auto",
                ws="none",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=settings.drain_seconds,
            )
            uvicorn.Server(config).run(sockets=[listener])


def classify_files(
    bundle_path: Path, images: list[Path], top_k: int = 5, device: Device = "auto"
) -> list[Answer | Refused]:
    """Classify image files with the engine and the answers of the service.

    Returns:
        One result a file, in order; a file that is no usable image is refused in its own place.

    Raises:
        UsageError: A file cannot be read.
        LtkdError: The bundle or the device cannot be used.
    """
    engine = open_engine(open_bundle(bundle_path), device)
    size_px = engine.manifest.task.input_px
    results = []
    for first in range(0, len(images), _BATCH):
        decoded = [decode(_content(path), size_px, MAX_PIXELS) for path in images[first : first + _BATCH]]
        results += results_of(engine, decoded, infer(engine, usable(decoded)), top_k)
    return results


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as reason:
        raise UsageError(f"{path} cannot be read ({reason.strerror}); give the path of an image.") from None


def _greeting(engine: Engine, host: str, port: int) -> str:
    manifest = engine.manifest
    shown = f"[{host}]" if ":" in host else host
    return (
        f"serving {manifest.name} ({len(manifest.task.class_names)} classes, {engine.precision}, {engine.provider}) "
        f"on http://{shown}:{port} - try: "
        f"curl -H 'Content-Type: image/jpeg' --data-binary @FILE http://{shown}:{port}/v1/classify"
    )


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as reason:
        raise UsageError(f"cannot listen on {host} port {port} ({reason.strerror}); give another --port.") from None
    with listener:
        yield listener


@contextmanager
def _signals_exit() -> Iterator[None]:
    """Leave with 0 on SIGTERM and SIGINT, at any time; uvicorn raises again what it caught, once it has drained."""
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)
