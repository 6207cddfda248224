"""What the command ``ltkd serve`` does.

Nothing heavy is imported here: the engine process of the bundle is started first, and while it proves and warms the
model, this process imports the framework.
"""

import gc
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ltkd.contract.bundle import MANIFEST_FILE
from ltkd.errors import UsageError
from serve.pool.dispatcher import EnginePool, orders
from serve.pool.engine_process import ChildProcess, launch
from serve.settings import Settings


def serve(path: Path, settings: Settings, given: Mapping[str, object] | None = None) -> None:
    """Serve a bundle, or a directory of them, until SIGTERM or SIGINT; both end it cleanly.

    Args:
        path: A bundle, or a directory of bundles or of versions.
        settings: As read.
        given: What the command line gave, for the print of the settings.

    Raises:
        LtkdError: A bundle, the device or the address cannot be used.
    """
    with _signals_exit(), _listening(settings.host, settings.port) as listener:
        gc.disable()  # until the start is over (ltkd.contract.resources)
        ahead: list[ChildProcess] = []
        if (path / MANIFEST_FILE).exists():
            ahead.append(launch(orders(path, settings)))

        async def start_worker(bundle: Path) -> EnginePool:
            def start_process() -> ChildProcess:
                return ahead.pop() if ahead else launch(orders(bundle, settings))

            return await EnginePool.start_with(start_process, settings)

        try:
            from serve.server import run  # noqa: PLC0415 - takes as long as the engine process, which starts meanwhile

            run(path, settings, given or {}, listener, start_worker)
        finally:
            gc.enable()
            for launched in ahead:  # the start ended before it was needed
                launched.kill()
                launched.line.close()


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
