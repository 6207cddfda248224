"""What the command ``ltkd serve`` does."""

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from ltkd.errors import UsageError
from serve.app import create_app
from serve.launch import collect_rarely
from serve.logs import set_up_logging, settings_lines
from serve.operations import reload_on_hangup
from serve.protocol import Connection
from serve.service import Service
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
    set_up_logging(settings.log_format, settings.log_level)
    with (
        _signals_exit(),
        _listening(settings.host, settings.port) as listener,
        asyncio.Runner(loop_factory=_loop_factory()) as runner,
    ):
        runner.run(_serve(path, settings, given or {}, listener))


async def _serve(path: Path, settings: Settings, given: Mapping[str, object], listener: socket.socket) -> None:
    service = Service(path, settings)
    try:
        await service.start()
        for line in settings_lines(settings, given):
            print(line, file=sys.stderr)  # noqa: T201 - the start of the log, in whatever form that is
        host, port = listener.getsockname()[:2]
        print(_greeting(service, host, port), flush=True)  # noqa: T201 - the line a user waits for
        reload_on_hangup(service.models, service.keys)
        config = uvicorn.Config(
            create_app(service),
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=settings.max_connections,
            timeout_graceful_shutdown=settings.drain_seconds,
        )
        collect_rarely()
        await Server(config, service).serve(sockets=[listener])
    finally:
        await service.close()


class Server(uvicorn.Server):
    """uvicorn's server, with a delay between the signal and the end in which it says that it is leaving."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._leave_at = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the delay; a second one ends it."""
        if self._service.leaving:
            super().handle_exit(sig, frame)
            return
        self._captured_signals.append(sig)
        self._service.leaving = True
        self._leave_at = time.monotonic() + self._service.settings.delay_seconds

    async def on_tick(self, counter: int) -> bool:
        """Whether it is time to end."""
        if self._service.leaving and time.monotonic() >= self._leave_at:
            self.should_exit = True
        return await super().on_tick(counter)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - not on every system
    except ImportError:
        return None
    return uvloop.new_event_loop


def _greeting(service: Service, host: str, port: int) -> str:
    shown = f"[{host}]" if ":" in host else host
    what = ", ".join(
        f"{served.key.name} ({len(served.worker.manifest.task.class_names)} classes, {served.worker.precision}, "
        f"{served.worker.provider})"
        for served in service.models.all()
    )
    return (
        f"serving {what} on http://{shown}:{port} - try: "
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
