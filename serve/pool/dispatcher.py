"""Send requests to a model's engine processes, and make sure that each gets exactly one result.

A request is admitted, sent to the process with the fewest requests, and gets its result when the response arrives, when
its deadline passes, or when the process dies, whichever is first. Work for requests that were cancelled is cancelled in
the engine process too. While no process is running, requests wait for the next one; if that cannot be started either,
they get a 503.
"""

import asyncio
import contextlib
import heapq
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Self

from ltkd.contract.bundle import Manifest, Precision
from ltkd.contract.node_assignment import NodeAssignment
from serve.engine.decode_queue import is_large_image
from serve.engine.messages import EngineReady, EngineRequest, OutputKind, pack_request, unpack_response
from serve.pool.admission import expected_seconds_each, require_room
from serve.pool.engine_process import EngineProcess
from serve.pool.pending_requests import AnswerCallback, PendingQueue, PendingRequest, RequestResult, request_result
from serve.pool.supervisor import BundleChangedError, StartProcess, Supervisor
from serve.problems import Content, Problem, ProblemError, make_problem
from serve.settings import Settings

_CHECK_SECONDS = 0.25
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def _errors_logged() -> Iterator[None]:
    """Log the exception of a callback: requests, and the processes, must not be lost with it."""
    try:
        yield
    except Exception:
        _log.exception("a callback of the engine pool failed")


class EnginePool:
    """One model version and its engine processes. All of it runs in the event loop's thread.

    Attributes:
        manifest: The manifest of its bundle.
        precision: Which of the bundle's models runs.
        provider: The execution provider that runs it, by ONNX Runtime's name.
        nodes: How many of the model's nodes run on which provider.
        alive: Whether at least one engine process is ready.
        reason: Why none is ready; empty while one is.
        on_restart: Called when an engine process that died has been replaced.
        on_answer: Called for every answered request that was not cancelled, of /v1 and of /v2.
        on_bundle_changed: Awaited if no process can be started because the bundle on disk is another one.
    """

    manifest: Manifest
    precision: Precision
    provider: str
    nodes: NodeAssignment

    def __init__(self, settings: Settings) -> None:
        self.alive = False
        self.reason = "it is starting"
        self.on_restart: Callable[[], None] | None = None
        self.on_answer: AnswerCallback | None = None
        self.on_bundle_changed: Callable[[], Awaitable[object]] | None = None
        self._settings = settings
        self._supervisor = Supervisor(
            on_response=self._on_response,
            on_ready=self._on_ready,
            on_lost=self._on_lost,
            on_not_replaced=self._on_not_replaced,
        )
        self._pending: PendingQueue | None = None  # only while no process is running
        self._seconds_each = 0.0  # measured by the process that ended last
        self._deadlines: list[tuple[float, int, PendingRequest]] = []
        self._next_number = 0
        self._closing = False
        self._emptied = asyncio.Event()
        self._check: asyncio.TimerHandle | None = None
        self._check_at = math.inf

    @classmethod
    async def start(cls, starts: Sequence[StartProcess], settings: Settings) -> Self:
        """Start engine processes: the bundle is verified, its golden samples are replayed, and they are warmed up.

        Args:
            starts: One for each engine process; it starts the process and its replacements.
            settings: Limits.

        Raises:
            LtkdError: The bundle or the device cannot be used.
        """
        pool = cls(settings)
        try:
            await pool._supervisor.start(starts)
        except BaseException:
            await pool.close(0)
            raise
        return pool

    @property
    def num_waiting(self) -> int:
        """Images that were accepted and have no result yet."""
        num_pending = _num_images(self._pending) if self._pending else 0
        return num_pending + sum(map(_num_images, self._supervisor.processes))

    async def infer(
        self, contents: Sequence[Content], output: OutputKind, top_k: int, deadline: float
    ) -> RequestResult:
        """Send a request to an engine process and wait for its result.

        If the coroutine is cancelled, so is the request: its images that have not run yet are dropped.

        Args:
            contents: Images in the form that ``output`` implies; a problem that is known already keeps its position.
            output: What to compute for them.
            top_k: Classes to list in an answer.
            deadline: On the clock of ``time.monotonic``.

        Raises:
            ProblemError: 429 too many requests, 503 the engine process died, 504 the deadline passed.
        """
        images = [content for content in contents if not isinstance(content, Problem)]
        problems = {place: content for place, content in enumerate(contents) if isinstance(content, Problem)}
        if not images:
            return RequestResult(list(problems.values()), [None] * len(problems), {}, 0)
        process = self._least_loaded()
        now = time.monotonic()
        if deadline <= now:
            raise ProblemError(make_problem(504, "the deadline passed before the images had arrived; allow more time."))
        is_large = output != OutputKind.LOGITS_OF_PIXELS and any(map(is_large_image, images))
        queue = process.large if is_large else process.ordinary
        require_room(len(images), self.num_waiting, queue, deadline - now, self._settings)
        self._next_number = number = self._next_number + 1
        message = pack_request(EngineRequest(number, deadline, output, top_k, images))
        future: asyncio.Future[RequestResult | ProblemError] = asyncio.get_running_loop().create_future()
        request = PendingRequest(number, process, problems, len(images), is_large, now, deadline, future)
        process.send(request, message)
        queue.add(len(images), now)
        heapq.heappush(self._deadlines, (deadline, number, request))
        if deadline < self._check_at:
            self._schedule_check(min(deadline, now + _CHECK_SECONDS))
        try:
            result = await future
        except asyncio.CancelledError:
            self._cancel(request)
            raise
        if isinstance(result, ProblemError):
            raise ProblemError(result.problem, result.headers)  # a raised local variable would be a reference cycle
        return result

    async def classify(self, contents: Sequence[Content], top_k: int, deadline: float) -> RequestResult:
        """Answer encoded images.

        Raises:
            ProblemError: As ``infer``.
        """
        return await self.infer(contents, OutputKind.ANSWERS, top_k, deadline)

    async def close(self, drain_seconds: float) -> None:
        """Wait up to ``drain_seconds`` for the results of accepted requests, then end the processes."""
        self._closing = True
        self._supervisor.stop_replacing()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                while self.num_waiting:
                    self._emptied.clear()
                    await self._emptied.wait()
        self._reject_pending()
        await self._supervisor.close()
        if self._check:
            self._check.cancel()

    def _least_loaded(self) -> EngineProcess | PendingQueue:
        if self.alive and not self._closing:
            processes = self._supervisor.processes
            return processes[0] if len(processes) == 1 else min(processes, key=_num_images)
        if self._pending and not self._closing:
            return self._pending
        detail = "the service is stopping" if self._closing else f"the model is not available: {self.reason}"
        raise ProblemError(make_problem(503, f"{detail.rstrip('.')}; try again."), self._retry_after())

    def _on_response(self, request: PendingRequest, message: memoryview, arrived_at: float) -> None:
        """Set the result of a request."""
        was_cancelled = request.result.done()
        self._release(request)
        try:
            result = request_result(unpack_response(message), request.problems)
        except Exception:
            _log.exception("a response of the engine process could not be read")
            request.finish(ProblemError(make_problem(500, "the answer could not be read; the log has the cause.")))
            return
        request.finish(result)
        # images of a cancelled request that were not run say nothing about the speed
        num_processed = min(request.num_images, result.batch_size) if was_cancelled else request.num_images
        allowed = min(self._settings.max_queue_seconds, request.deadline - request.sent_at)
        request.queue.measure(num_processed, result.batch_size, arrived_at - request.sent_at, arrived_at, allowed)
        if self.on_answer and not was_cancelled:
            with _errors_logged():
                self.on_answer(result.facts, result.stage_seconds, result.batch_size)

    def _on_ready(self, process: EngineProcess, ready: EngineReady) -> None:
        """Use a process that has become ready, and send it the requests that waited for one."""
        self.manifest, self.precision, self.provider = ready.manifest, ready.precision, ready.provider
        self.nodes = ready.nodes
        process.ordinary.seconds_each = self._seconds_each or expected_seconds_each(ready.seconds_of)
        pending, self._pending = self._pending, None
        if pending:
            pending.move_to(process, time.monotonic())
        self.alive, self.reason = True, ""
        if self.on_restart:  # set after the start
            with _errors_logged():
                self.on_restart()

    def _on_lost(self, process: EngineProcess) -> None:
        """Answer 503 to the requests of a process that has ended; queue new requests until there is another one."""
        self._seconds_each = process.ordinary.seconds_each
        if not self._supervisor.processes:
            self.alive = False
            self.reason = "its engine process died and is being replaced"
            if not self._closing:
                self._pending = PendingQueue()
        self._fail(process, "the engine process that had the request died and is being replaced; try again.")

    async def _on_not_replaced(self, error: Exception) -> None:
        """Reject the requests that wait for a process, and report a bundle that has changed on disk."""
        if not self.alive:
            self.reason = f"no engine process could be started: {error}"
        self._reject_pending()
        if self.on_bundle_changed and isinstance(error, BundleChangedError):
            with _errors_logged():
                await self.on_bundle_changed()

    def _reject_pending(self) -> None:
        """Answer 503 to requests that wait for a process that cannot be started."""
        pending, self._pending = self._pending, None
        if pending:
            self._fail(pending, "the engine process died and could not be replaced; try again.")

    def _fail(self, process: EngineProcess | PendingQueue, detail: str) -> None:
        """Answer 503 to all requests of a process or of the queue."""
        lost = list(process.requests.values())
        process.requests.clear()
        for request in lost:
            self._release(request)
        problem = make_problem(503, detail)
        for request in lost:
            request.finish(ProblemError(problem, self._retry_after()))

    def _release(self, request: PendingRequest) -> None:
        request.queue.remove(request.num_images)
        if not self.num_waiting:
            self._emptied.set()

    def _retry_after(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self._supervisor.started_in_seconds)))}

    def _check_progress(self) -> None:
        """Answer 504 to requests whose deadline has passed, and kill stalled processes."""
        now = time.monotonic()
        late = "there was no answer within the deadline; send fewer images per request, or allow more time."
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2].result.done()):
            _, _, request = heapq.heappop(self._deadlines)
            if not request.result.done():
                self._cancel(request)
                request.finish(ProblemError(make_problem(504, late)))
        self._supervisor.kill_stalled(self._settings.stall_seconds)
        self._check_at = math.inf
        if self.num_waiting:
            next_deadline = self._deadlines[0][0] if self._deadlines else math.inf
            self._schedule_check(min(next_deadline, now + _CHECK_SECONDS))

    def _cancel(self, request: PendingRequest) -> None:
        if request.number in request.process.requests and not request.process.cancel(request.number):
            self._release(request)

    def _schedule_check(self, at: float) -> None:
        if self._check:
            self._check.cancel()
        self._check_at = at
        self._check = asyncio.get_running_loop().call_later(at - time.monotonic(), self._check_progress)


def _num_images(process: EngineProcess | PendingQueue) -> int:
    return process.ordinary.num_images + process.large.num_images
