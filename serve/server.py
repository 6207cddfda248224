"""Run the server process: start the models, serve HTTP with uvicorn and shut down gracefully on SIGTERM.

serve/main.py calls it with an open socket; serve/api/app.py has the routes.
"""

import asyncio
import faulthandler
import math
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from ltkd.contract.resources import trim_memory
from serve.api.app import create_app
from serve.api.operations import reload_on_hangup
from serve.http.connection import Connection
from serve.http.service import Service
from serve.monitoring.logs import log_settings, set_up_logging
from serve.pool.dispatcher import EnginePool
from serve.pool.model_repository import ServedModel, StartPool
from serve.settings import Settings

_END_SECONDS = 1.0  # of the drain, for ending the engine processes


def run(
    path: Path,
    settings: Settings,
    given: Mapping[str, object],
    show_settings: bool,
    listener: socket.socket,
    start_pool: StartPool[EnginePool],
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        path: A bundle, or a directory of bundles or of versions.
        settings: The settings of this start.
        given: The options given on the command line, to mark them when the settings are printed.
        show_settings: Print all settings, not only those that differ from the default.
        listener: A bound, listening socket.
        start_pool: Starts the engine processes of a bundle.

    Raises:
        LtkdError: A bundle or the device cannot be used.
    """
    set_up_logging(settings.log_format, settings.log_level)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        service = Service(path, settings, start_pool)
        runner.run(_serve(service, given, show_settings, listener))


async def _serve(service: Service, given: Mapping[str, object], show_settings: bool, listener: socket.socket) -> None:
    try:
        await service.start()
        app = create_app(service)
        reload_on_hangup(service.models, service.keys)
        log_settings(service.settings, given, show_settings)
        host, port = listener.getsockname()[:2]
        print(_start_message(service, host, port), flush=True)  # noqa: T201 - the user waits for this line
        trim_memory()
        await Server(app, service).serve(sockets=[listener])
    finally:
        await service.close()


class Server(uvicorn.Server):
    """uvicorn's server, with a delay between the signal and the shutdown, and time limits for connections.

    During the delay the service is not ready but still answers, so that load balancers can send requests elsewhere.
    Then accepted requests are answered. When delay and drain are over, the process ends, whatever it is doing.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(Connection, service),  # type: ignore[arg-type] # called like the class itself
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # nothing here depends on the client's address
                timeout_keep_alive=math.ceil(settings.idle_seconds),
                timeout_graceful_shutdown=max(1, math.floor(settings.drain_seconds - _END_SECONDS)),
            )
        )
        self._service = service
        self._signal: tuple[int, FrameType | None] | None = None
        self._stop_at = math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the delay on the first signal; end it on a second one."""
        if self._signal:
            super().handle_exit(sig, frame)
            return
        settings = self._service.settings
        self._signal = sig, frame
        self._service.stopping = True
        self._stop_at = time.monotonic() + settings.delay_seconds
        # a thread without the interpreter's lock: it prints where the process hangs, and ends it
        faulthandler.dump_traceback_later(settings.delay_seconds + settings.drain_seconds, exit=True)

    async def on_tick(self, counter: int) -> bool:
        """Check the time limits of all connections; return whether to shut down. Called ten times a second."""
        now = time.monotonic()
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.check(now)
        if self._signal and not self.should_exit and now >= self._stop_at:
            super().handle_exit(*self._signal)
        return await super().on_tick(counter)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - not available on every system
    except ImportError:
        return None
    return uvloop.new_event_loop


def _start_message(service: Service, host: str, port: int) -> str:
    url_host = f"[{host}]" if ":" in host else host
    models = ", ".join(map(_model_sentence, service.models.all()))
    return (
        f"serving {models} on http://{url_host}:{port} - try: "
        f"curl -H 'Content-Type: image/jpeg' --data-binary @FILE http://{url_host}:{port}/v1/classify"
    )


def _model_sentence(served: ServedModel[EnginePool]) -> str:
    pool = served.pool
    num_classes = len(pool.manifest.task.class_names)
    return f"{served.key.name} version {served.key.version} ({num_classes} classes, {pool.precision}, {pool.provider})"
