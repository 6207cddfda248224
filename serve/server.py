"""The server: starts the models, listens, and on SIGTERM leaves in good order."""

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

import uvicorn

from ltkd.contract.resources import num_cores, trim_memory
from serve.api.app import create_app
from serve.api.operations import reload_on_hangup
from serve.http.fast_path import Connection
from serve.http.service import Service
from serve.monitoring.logs import log_settings, set_up_logging
from serve.pool.dispatcher import EnginePool
from serve.pool.repository import StartWorker
from serve.settings import Settings


def run(
    path: Path,
    settings: Settings,
    given: Mapping[str, object],
    listener: socket.socket,
    start_worker: StartWorker[EnginePool],
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        path: A bundle, or a directory of bundles or of versions.
        settings: As read.
        given: What the command line gave, for the print of the settings.
        listener: Bound and listening.
        start_worker: Starts the engine processes of a bundle.

    Raises:
        LtkdError: A bundle or the device cannot be used.
    """
    set_up_logging(settings.log_format, settings.log_level)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(Service(path, settings, start_worker), given, listener))


async def _serve(service: Service, given: Mapping[str, object], listener: socket.socket) -> None:
    try:
        await service.start()
        app = create_app(service)
        reload_on_hangup(service.models, service.keys)
        log_settings(service.settings, given)
        host, port = listener.getsockname()[:2]
        print(_greeting(service, host, port), flush=True)  # noqa: T201 - the line a user waits for
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=service.settings.max_connections,
            timeout_graceful_shutdown=service.settings.drain_seconds,
        )
        trim_memory()
        await Server(config, service).serve(sockets=[listener])
    finally:
        await service.close()


class Server(uvicorn.Server):
    """uvicorn's server, with a delay between the signal and the end in which it says that it is leaving."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._leave_at = 0.0
        self._num_refused = 0
        self._engines_finish = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the delay; a second one ends it."""
        if self._service.leaving:
            super().handle_exit(sig, frame)
            return
        self._captured_signals.append(sig)
        self._service.leaving = True
        self._leave_at = time.monotonic() + self._service.settings.delay_seconds

    async def on_tick(self, counter: int) -> bool:
        """Whether it is time to end; called ten times a second."""
        num_refused = self._service.telemetry.num_rejected("full")
        self._let_engines_finish(num_refused > self._num_refused)
        self._num_refused = num_refused
        if self._service.leaving and time.monotonic() >= self._leave_at:
            self.should_exit = True
        return await super().on_tick(counter)

    def _let_engines_finish(self, overloaded: bool) -> None:
        """On one core, while requests are refused, look at what arrives only when a run pauses or has had its slice.

        Otherwise each request that arrives interrupts a run, and one is turned away as dearly as one is answered.
        """
        if overloaded != self._engines_finish and sys.platform == "linux" and num_cores() == 1:
            self._engines_finish = overloaded
            with contextlib.suppress(OSError):  # a sandbox may forbid it
                os.sched_setscheduler(0, os.SCHED_BATCH if overloaded else os.SCHED_OTHER, os.sched_param(0))


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
