"""The command ``ltkd serve``: open the port, start the first engine process and run the server.

Nothing heavy is imported at the top of this module. The engine process of the bundle is started first; while it
verifies and warms up the model, this process imports the web framework (serve/server.py).
"""

import gc
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from ltkd.contract.bundle import MANIFEST_FILE
from ltkd.errors import UsageError
from serve.engine.messages import EngineConfig
from serve.pool.dispatcher import EnginePool
from serve.pool.engine_process import ChildProcess, launch
from serve.pool.supervisor import engine_configs
from serve.settings import Settings


def serve(
    path: Path, settings: Settings, given: Mapping[str, object] | None = None, show_settings: bool = False
) -> None:
    """Serve a bundle, or a directory of bundles, until SIGTERM or SIGINT. Both signals stop the service cleanly.

    Args:
        path: A bundle, or a directory of bundles or of versions.
        settings: The settings of this start.
        given: The options given on the command line, to mark them when the settings are printed.
        show_settings: Print all settings, not only those that differ from the default.

    Raises:
        LtkdError: A bundle, the device or the address cannot be used.
    """
    with _signal_handlers(), _listener(settings.host, settings.port) as listener:
        gc.disable()  # until the service has started (ltkd.contract.resources)
        started_early: list[ChildProcess] = []
        if (path / MANIFEST_FILE).exists():
            started_early.append(launch(engine_configs(path, settings)[0]))

        def launch_or_use_early(config: EngineConfig) -> ChildProcess:
            return started_early.pop() if started_early else launch(config)

        async def start_pool(bundle: Path) -> EnginePool:
            starts = [partial(launch_or_use_early, config) for config in engine_configs(bundle, settings)]
            return await EnginePool.start(starts, settings)

        try:
            from serve.server import run  # noqa: PLC0415 - slow; the engine process starts meanwhile

            run(path, settings, given or {}, show_settings, listener, start_pool)
        finally:
            gc.enable()
            for child in started_early:  # the service stopped before it used this process
                child.kill()
                child.connection.close()


@contextmanager
def _listener(host: str, port: int) -> Iterator[socket.socket]:
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as reason:
        raise UsageError(f"cannot listen on {host} port {port} ({reason.strerror}); choose another address.") from None
    with listener:
        yield listener


class HangupNote:
    """Notes SIGHUP during the start, which it would end. ``serve.api.operations.reload_on_hangup`` then obeys it."""

    def __init__(self) -> None:
        self.noted = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        """Handle the signal."""
        self.noted = True


@contextmanager
def _signal_handlers() -> Iterator[None]:
    """Exit with code 0 on SIGTERM and SIGINT at any time; uvicorn raises the signal again once it has drained."""
    handlers: dict[int, Callable[[int, FrameType | None], None]] = {signal.SIGTERM: _exit, signal.SIGINT: _exit}
    if hasattr(signal, "SIGHUP"):
        handlers[signal.SIGHUP] = HangupNote()
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)
