"""Send requests to a model's engine processes, and make sure that each gets exactly one result.

A request is admitted, sent to the process with the fewest requests, and gets its result when the response arrives, when
its deadline passes, or when the process dies, whichever is first. Work for requests that were cancelled is cancelled in
the engine process too. While no process is running, requests wait for the next one; if that cannot be started either,
they get a 503.
"""

import asyncio
import contextlib
import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Self

from ltkd.contract.bundle import Manifest, Precision
from ltkd.contract.node_assignment import NodeAssignment
from serve.engine.answers import model_ref
from serve.engine.messages import (
    EngineConfig,
    EngineReady,
    EngineRequest,
    EngineResponse,
    OutputKind,
    pack_cancel,
    pack_request,
)
from serve.pool.admission import Admission
from serve.pool.engine_process import ChildProcess, EngineProcess, launch
from serve.pool.pending_requests import (
    AnswerCallback,
    PendingQueue,
    PendingRequest,
    RequestResult,
    ResultCallback,
    request_result,
)
from serve.pool.supervisor import Supervisor, engine_configs
from serve.problems import Content, Problem, ProblemError, make_problem
from serve.settings import Settings

_CHECK_SECONDS = 0.25


class EnginePool:
    """One model version and its engine processes. All of it runs in the event loop's thread.

    Attributes:
        manifest: The manifest of its bundle.
        precision: Which of the bundle's models runs.
        provider: The execution provider that runs it, by ONNX Runtime's name.
        nodes: How many of the model's nodes run on which provider.
        alive: Whether at least one engine process is ready.
        on_change: Called when ``alive`` changes.
        on_answer: Called for every answered request that was not cancelled, of /v1 and of /v2.
    """

    manifest: Manifest
    precision: Precision
    provider: str
    nodes: NodeAssignment

    def __init__(self, start_process: Callable[[], ChildProcess], settings: Settings) -> None:
        self.alive = False
        self.on_change: Callable[[], None] | None = None
        self.on_answer: AnswerCallback | None = None
        self._stall_seconds = settings.stall_seconds
        self._admission = Admission(settings.max_queue_images, settings.max_queue_seconds)
        self._supervisor = Supervisor(
            start_process,
            on_response=self._on_response,
            on_ready=self._on_ready,
            on_lost=self._on_lost,
            on_not_replaced=self._reject_pending,
            while_replacing=self.admission_paused,
        )
        self._pending: PendingQueue | None = None  # only while no process is running
        self._paused_without_process = contextlib.ExitStack()
        self._deadlines: list[tuple[float, int, PendingRequest]] = []
        self._next_number = 0
        self._closing = False
        self._emptied = asyncio.Event()
        self._check: asyncio.TimerHandle | None = None
        self._check_at = math.inf

    @classmethod
    async def start(
        cls, bundle: Path, settings: Settings, launch: Callable[[EngineConfig], ChildProcess] = launch
    ) -> Self:
        """Start the engine processes of a bundle: verified, its golden samples replayed, warmed up.

        Args:
            bundle: The bundle's directory.
            settings: Device, precision, sizes and limits.
            launch: Starts an engine process.

        Raises:
            LtkdError: The bundle or the device cannot be used.
        """
        configs = engine_configs(bundle, settings)
        following = itertools.cycle(configs)

        def start_process(config: EngineConfig | None = None) -> ChildProcess:
            config = config or next(following)
            return replace(launch(config), start_again=lambda: start_process(config))

        return await cls.start_with(start_process, settings, len(configs))

    @classmethod
    async def start_with(
        cls, start_process: Callable[[], ChildProcess], settings: Settings, num_processes: int | None = None
    ) -> Self:
        """Start with engine processes that ``start_process`` makes, by default as many as the settings say, or one."""
        pool = cls(start_process, settings)
        try:
            with pool.admission_paused():
                await pool._supervisor.start(num_processes or settings.processes or 1)
        except BaseException:
            await pool.close(0)
            raise
        return pool

    @cached_property
    def ref_json(self) -> bytes:
        """Which model answers, in JSON."""
        return model_ref(self.manifest, self.precision, self.provider).model_dump_json().encode()

    @property
    def num_waiting(self) -> int:
        """Images that were accepted and have no result yet."""
        return self._admission.num_images

    def rejection(self) -> ProblemError | None:
        """Why a request of one image would be rejected now; None if it would be accepted."""
        return self._admission.rejection(1, time.monotonic(), math.inf)

    def submit(
        self, contents: Sequence[Content], output: OutputKind, top_k: int, deadline: float, on_result: ResultCallback
    ) -> PendingRequest | None:
        """Send a request to an engine process.

        Args:
            contents: Images in the form that ``output`` implies; a problem that is known already keeps its position.
            output: What to compute for them.
            top_k: Classes to list in an answer.
            deadline: On the clock of ``time.monotonic``.
            on_result: Called once, unless the request is cancelled; perhaps before this function returns.

        Returns:
            The request, for ``cancel``; None if there was nothing to send.

        Raises:
            ProblemError: 429, 503 or 504: the request was not accepted.
        """
        images = [content for content in contents if not isinstance(content, Problem)]
        problems = {}
        if len(images) < len(contents):
            problems = {place: content for place, content in enumerate(contents) if isinstance(content, Problem)}
            if not images:
                on_result(RequestResult(list(problems.values()), [None] * len(problems), {}, 0))
                return None
        process = self._least_loaded()
        now = time.monotonic()
        if deadline <= now:
            raise ProblemError(make_problem(504, "the deadline passed before the images had arrived; allow more time."))
        self._admission.admit(len(images), now, deadline)
        self._next_number = number = self._next_number + 1
        request = PendingRequest(number, process, problems, len(images), now, on_result)
        process.requests[number] = request
        process.write(pack_request(EngineRequest(number, deadline, output, top_k, images)))
        heapq.heappush(self._deadlines, (deadline, number, request))
        if deadline < self._check_at:
            self._schedule_check(min(deadline, now + _CHECK_SECONDS))
        return request

    def cancel(self, request: PendingRequest) -> None:
        """Cancel a request: it gets no result, and images that have not run yet are dropped."""
        request.on_result = None
        if request.number in request.process.requests:
            request.process.write(pack_cancel(request.number))

    async def infer(
        self, contents: Sequence[Content], output: OutputKind, top_k: int, deadline: float
    ) -> RequestResult:
        """Send a request and wait for its result. Cancelling the coroutine cancels the request.

        Raises:
            ProblemError: 429 too many requests, 503 the engine process died, 504 the deadline passed.
        """
        future: asyncio.Future[RequestResult | ProblemError] = asyncio.get_running_loop().create_future()

        def on_result(result: RequestResult | ProblemError) -> None:
            if not future.done():
                future.set_result(result)

        request = self.submit(contents, output, top_k, deadline, on_result)
        try:
            result = await future
        except asyncio.CancelledError:
            if request:
                self.cancel(request)
            raise
        if isinstance(result, ProblemError):
            raise result
        return result

    async def classify(self, contents: Sequence[Content], top_k: int, deadline: float) -> RequestResult:
        """Answer encoded images.

        Raises:
            ProblemError: As ``infer``.
        """
        return await self.infer(contents, OutputKind.ANSWERS, top_k, deadline)

    @contextlib.contextmanager
    def admission_paused(self) -> Iterator[None]:
        """Reject no request for its waiting time while a process starts, in this pool or in another one."""
        self._admission.pause_admission()
        try:
            yield
        finally:
            self._admission.resume(time.monotonic())

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
            return processes[0] if len(processes) == 1 else min(processes, key=lambda process: len(process.requests))
        if self._pending and not self._closing:
            return self._pending
        detail = "the service is stopping" if self._closing else "the model's engine process is being replaced"
        raise ProblemError(make_problem(503, f"{detail}; try again."), self._retry_after())

    def _on_response(self, request: PendingRequest, response: EngineResponse) -> None:
        """Pass the result to the request."""
        self._release(request, time.monotonic(), response.batch_size)
        if on_result := request.on_result:
            request.on_result = None
            result = request_result(response, request.problems)
            if self.on_answer:
                self.on_answer(result.facts, result.stage_seconds, result.batch_size)
            on_result(result)

    def _on_ready(self, process: EngineProcess, ready: EngineReady) -> None:
        """Use a process that has become ready, and send it the requests that waited for one."""
        self.manifest, self.precision, self.provider = ready.manifest, ready.precision, ready.provider
        self.nodes = ready.nodes
        self._admission.expect(ready.seconds_of)
        self._paused_without_process.close()
        pending, self._pending = self._pending, None
        if pending:
            pending.move_to(process)
        self._note_change()

    def _on_lost(self, process: EngineProcess) -> None:
        """Answer 503 to the requests of a process that has ended; queue new requests until there is another one."""
        if not self._supervisor.processes and not self._closing:
            self._pending = PendingQueue()
            self._paused_without_process.enter_context(self.admission_paused())
        self._note_change()
        self._fail(process, "the engine process that had the request died and is being replaced; try again.")

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
            if on_result := request.on_result:
                request.on_result = None
                on_result(ProblemError(problem, self._retry_after()))

    def _release(self, request: PendingRequest, answered_at: float | None = None, batch_size: int = 0) -> None:
        self._admission.release(request.num_images, answered_at, batch_size)
        if not self.num_waiting:
            self._emptied.set()

    def _retry_after(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self._supervisor.started_in_seconds)))}

    def _note_change(self) -> None:
        alive = bool(self._supervisor.processes)
        if alive != self.alive:
            self.alive = alive
            if self.on_change:
                self.on_change()

    def _check_progress(self) -> None:
        """Answer 504 to requests whose deadline has passed, and kill stalled processes."""
        now = time.monotonic()
        late = ProblemError(
            make_problem(
                504, "there was no answer within the deadline; send fewer images per request, or allow more time."
            )
        )
        while self._deadlines and (self._deadlines[0][0] <= now or not self._deadlines[0][2].on_result):
            _, _, request = heapq.heappop(self._deadlines)
            if on_result := request.on_result:
                self.cancel(request)
                on_result(late)
        self._supervisor.kill_stalled(self._stall_seconds)
        self._check_at = math.inf
        if self.num_waiting:
            next_deadline = self._deadlines[0][0] if self._deadlines else math.inf
            self._schedule_check(min(next_deadline, now + _CHECK_SECONDS))

    def _schedule_check(self, at: float) -> None:
        if self._check:
            self._check.cancel()
        self._check_at = at
        self._check = asyncio.get_running_loop().call_later(at - time.monotonic(), self._check_progress)
