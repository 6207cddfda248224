"""Keep the engine processes of one model version running: start them, replace those that end, kill stalled ones.

The supervisor does not handle requests. The dispatcher passes callbacks to it and decides what happens to requests.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from ltkd.contract.bundle import Manifest
from ltkd.errors import BundleError, DeviceError, LtkdError
from serve.engine.devices import engine_devices, num_cuda_devices
from serve.engine.messages import EngineConfig, EngineReady
from serve.pool.engine_process import ChildProcess, EngineProcess
from serve.pool.pending_requests import PendingRequest
from serve.settings import Settings

_BACKOFF_SECONDS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_STABLE_SECONDS = 30.0  # if a process ran for this long before it ended, its replacement starts without a pause

_log = logging.getLogger(__name__)

StartProcess = Callable[[], ChildProcess]
"""Starts one engine process on its device; called again for each replacement."""


class BundleChangedError(BundleError):
    """A replacement serves another bundle than the processes before."""


class Supervisor:
    """The running engine processes of one model version. All of it runs in the event loop's thread.

    Args:
        on_response: Called with a request, the message with its response and the time of its arrival.
        on_ready: Called when a process can take requests.
        on_lost: Called when a process that was ready has ended, before its replacement is started.
        on_not_replaced: Awaited with the error after each failed attempt to replace a process.

    Attributes:
        processes: The processes that are ready.
        started_in_seconds: How long the last process took to become ready.
    """

    def __init__(
        self,
        *,
        on_response: Callable[[PendingRequest, memoryview, float], None],
        on_ready: Callable[[EngineProcess, EngineReady], None],
        on_lost: Callable[[EngineProcess], None],
        on_not_replaced: Callable[[Exception], Awaitable[None]],
    ) -> None:
        self.processes: list[EngineProcess] = []
        self.started_in_seconds = 1.0
        self._starts: dict[EngineProcess, StartProcess] = {}
        self._on_response = on_response
        self._on_ready = on_ready
        self._on_lost = on_lost
        self._on_not_replaced = on_not_replaced
        self._manifest: Manifest | None = None
        self._runs = ""
        self._replacing = True
        self._replacements: set[asyncio.Task[None]] = set()

    async def start(self, starts: Sequence[StartProcess]) -> None:
        """Start all processes at the same time, and wait until they are ready.

        Args:
            starts: One for each process; it starts the process and its replacements.

        Raises:
            LtkdError: A process could not become ready. The others may be running; ``close`` ends them.
        """
        for outcome in await asyncio.gather(*map(self._start_one, starts), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    def stop_replacing(self) -> None:
        """Do not replace processes that end from now on."""
        self._replacing = False

    async def close(self) -> None:
        """Cancel replacements that are in progress, and end all processes."""
        self.stop_replacing()
        for task in self._replacements:
            task.cancel()
        await asyncio.gather(*self._replacements, return_exceptions=True)
        await asyncio.gather(*(process.end() for process in list(self.processes)))

    def kill_stalled(self, stall_seconds: float) -> None:
        """Kill each process that has had requests and made no progress for longer than ``stall_seconds``.

        An engine process sends a message for every image that it decoded and every batch that it ran, at most a few
        per second; so a request may take longer than ``stall_seconds``.
        """
        now = time.monotonic()
        for process in list(self.processes):
            if process.requests:
                oldest = next(iter(process.requests.values()))
                stalled_seconds = now - max(process.last_message_at, oldest.sent_at)
                if stalled_seconds > stall_seconds:
                    _log.error(
                        "an engine process with requests made no progress for %.1f s; killing it", stalled_seconds
                    )
                    process.kill()

    async def _start_one(self, start: StartProcess) -> None:
        """Start an engine process and wait until it is ready."""
        began = time.monotonic()
        process = EngineProcess(start(), self._on_response, self._lost)
        ready = await process.open()
        if self._manifest not in (None, ready.manifest):
            await process.end()
            raise BundleChangedError("the bundle on disk is another one than the processes before served.")
        runs = f"{ready.precision} on {ready.provider}"
        if self.processes and runs != self._runs:  # "auto" on several GPUs of which one does not work
            await process.end()
            raise DeviceError(
                f"an engine process would run {runs}, but the others run {self._runs}; name the --device."
            )
        self._manifest, self._runs = ready.manifest, runs
        self.started_in_seconds = time.monotonic() - began
        process.ready = True
        self.processes.append(process)
        self._starts[process] = start
        self._on_ready(process, ready)

    def _lost(self, process: EngineProcess) -> None:
        """Handle the end of a process; start a replacement unless the pool is closing."""
        self.processes.remove(process)
        start = self._starts.pop(process)
        num_requests = len(process.requests)
        self._on_lost(process)
        if not self._replacing:
            return
        name = self._manifest.name if self._manifest else ""
        _log.error(
            "an engine process of %s died with %d requests in progress; starting another one", name, num_requests
        )
        task = asyncio.get_running_loop().create_task(self._replace(process, start))
        self._replacements.add(task)
        task.add_done_callback(self._replacements.discard)

    async def _replace(self, lost: EngineProcess, start: StartProcess) -> None:
        """Try to start an engine process until one is ready, with increasing pauses."""
        attempt = 0 if time.monotonic() - lost.ready_since > _STABLE_SECONDS else 1
        while True:
            await asyncio.sleep(_BACKOFF_SECONDS[min(attempt, len(_BACKOFF_SECONDS) - 1)])
            attempt += 1
            try:
                await self._start_one(start)
                return
            except Exception as error:  # also of a defect: the next attempt may succeed
                is_known = isinstance(error, LtkdError | OSError)
                _log.error("no engine process could be started: %s", error, exc_info=not is_known)
                await self._on_not_replaced(error)


def engine_configs(bundle: Path, settings: Settings) -> list[EngineConfig]:
    """The configuration of each engine process of a bundle.

    Raises:
        UsageError: The processes cannot be divided equally among the GPUs.
        DeviceError: There is no such GPU.
    """
    num_gpus = 0 if settings.device == "cpu" else num_cuda_devices()
    devices = engine_devices(settings.device, settings.processes, num_gpus)
    config = EngineConfig(
        bundle=bundle.resolve(),
        device=devices[0],
        precision=settings.precision,
        max_batch=settings.max_batch,
        max_wait_ms=settings.max_wait_ms,
        max_pixels=settings.max_pixels,
        max_request_pixels=settings.max_request_pixels,
        processes=len(devices),
    )
    return [config.model_copy(update={"device": device}) for device in devices]
