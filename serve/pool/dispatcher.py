"""The front's side of a model's engine processes: what is asked of them, and what becomes of it when one dies.

A request is admitted, sent down a line, and answered when its outcomes come back, when its deadline passes, or when the
process dies, whichever comes first; what nobody waits for any more is cancelled over there. While no process is there,
requests wait for the next one; if that cannot be started either, they are answered. All of it belongs to the event
loop's thread.
"""

import asyncio
import contextlib
import heapq
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

from ltkd.contract.bundle import Manifest, Precision
from ltkd.errors import BundleError, LtkdError
from serve.engine.answers import model_ref
from serve.engine.messages import EngineConfig, EngineRequest, EngineResponse, OutputKind, pack_cancel, pack_request
from serve.pool.admission import Admission
from serve.pool.engine_process import (
    AnswerCallback,
    ChildProcess,
    EngineProcess,
    PendingQueue,
    PendingRequest,
    RequestResult,
    ResultCallback,
    launch,
    request_result,
)
from serve.problems import Content, Problem, ProblemError, problem_of
from serve.settings import Settings

_BACKOFF_SECONDS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_SETTLED_SECONDS = 30.0  # a process that lived so long died of something new
_WATCH_SECONDS = 0.25

_log = logging.getLogger(__name__)


class EnginePool:
    """A model version in engine processes of its own, watched and replaced.

    Attributes:
        manifest: The manifest of its bundle.
        precision: Which of the bundle's models runs.
        provider: The execution provider that really runs it, as ONNX Runtime names it.
        alive: Whether at least one engine process answers.
        on_change: Called when that changes.
        on_answer: Called for every answer that somebody still waited for, whichever protocol asked.
    """

    manifest: Manifest
    precision: Precision
    provider: str

    def __init__(self, start_process: Callable[[], ChildProcess], settings: Settings) -> None:
        self.alive = False
        self.on_change: Callable[[], None] | None = None
        self.on_answer: AnswerCallback | None = None
        self._start_process = start_process
        self._stall_seconds = settings.stall_seconds
        self._admission = Admission(settings.max_queue_images, settings.max_queue_seconds)
        self._lines: list[EngineProcess] = []
        self._parked: PendingQueue | None = None
        self._away = contextlib.ExitStack()
        self._deadlines: list[tuple[float, int, PendingRequest]] = []
        self._next_number = 0
        self._closing = False
        self._emptied = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching: asyncio.TimerHandle | None = None
        self._watch_at = math.inf
        self._started_in_seconds = 1.0

    @classmethod
    async def start(cls, bundle: Path, settings: Settings) -> Self:
        """A model version that answers: verified, its golden samples replayed, warm.

        Args:
            bundle: The bundle's directory.
            settings: Device, precision, sizes and limits.

        Raises:
            LtkdError: The bundle or the device cannot be used.
        """
        return await cls.start_with(lambda: launch(orders(bundle, settings)), settings)

    @classmethod
    async def start_with(cls, start_process: Callable[[], ChildProcess], settings: Settings) -> Self:
        """The same with engine processes of another make."""
        worker = cls(start_process, settings)
        with worker.admission_paused():
            starts = [worker._connect() for _ in range(settings.processes)]
            started = await asyncio.gather(*starts, return_exceptions=True)
        for one in started:
            if isinstance(one, BaseException):
                await worker.close(0)
                raise one
        return worker

    @cached_property
    def ref_json(self) -> bytes:
        """Which model answers, in JSON."""
        return model_ref(self.manifest, self.precision, self.provider).model_dump_json().encode()

    @property
    def num_waiting(self) -> int:
        """Images that were accepted and are not answered."""
        return self._admission.num_images

    def refusal(self) -> ProblemError | None:
        """Why no image is accepted now, whoever asks for it; None if one may be."""
        return self._admission.refusal(1, time.monotonic(), math.inf)

    def submit(
        self, contents: Sequence[Content], wanted: OutputKind, top_k: int, deadline: float, answered: ResultCallback
    ) -> PendingRequest | None:
        """Ask for something, and be told what becomes of it.

        Args:
            contents: Images as ``wanted`` says; a problem that is known already stays in its place.
            wanted: What is to be made of them.
            top_k: Classes to list in an answer.
            deadline: On the clock of ``time.monotonic``.
            answered: Told once, unless the call is cancelled; perhaps before this function returns.

        Returns:
            What ``cancel`` takes; None if there was nothing to send.

        Raises:
            ProblemError: 429, 503 or 504: it was not accepted.
        """
        images = [content for content in contents if not isinstance(content, Problem)]
        problems = {}
        if len(images) < len(contents):
            problems = {place: content for place, content in enumerate(contents) if isinstance(content, Problem)}
            if not images:
                answered(RequestResult(list(problems.values()), [None] * len(problems), {}, 0))
                return None
        line = self._best_line()
        now = time.monotonic()
        if deadline <= now:
            raise ProblemError(problem_of(504, "the deadline passed before the images had arrived; allow more time."))
        self._admission.admit(len(images), now, deadline)
        self._next_number = number = self._next_number + 1
        call = line.calls[number] = PendingRequest(number, line, problems, len(images), now, answered)
        line.write(pack_request(EngineRequest(number, deadline, wanted, top_k, images)))
        heapq.heappush(self._deadlines, (deadline, number, call))
        if deadline < self._watch_at:
            self._watch_again(min(deadline, now + _WATCH_SECONDS))
        return call

    def cancel(self, call: PendingRequest) -> None:
        """Drop what nobody waits for any more."""
        call.answered = None
        if call.number in call.line.calls:
            call.line.write(pack_cancel(call.number))

    async def ask(self, contents: Sequence[Content], wanted: OutputKind, top_k: int, deadline: float) -> RequestResult:
        """The same as a coroutine; cancelled, the work is dropped.

        Raises:
            ProblemError: 429 full, 503 the engine process died, 504 the deadline passed.
        """
        future: asyncio.Future[RequestResult | ProblemError] = asyncio.get_running_loop().create_future()

        def answered(told: RequestResult | ProblemError) -> None:
            if not future.done():
                future.set_result(told)

        call = self.submit(contents, wanted, top_k, deadline, answered)
        try:
            told = await future
        except asyncio.CancelledError:
            if call:
                self.cancel(call)
            raise
        if isinstance(told, ProblemError):
            raise told
        return told

    async def classify(self, contents: Sequence[Content], top_k: int, deadline: float) -> RequestResult:
        """Answer encoded images.

        Raises:
            ProblemError: As ``ask``.
        """
        return await self.ask(contents, OutputKind.ANSWERS, top_k, deadline)

    @contextlib.contextmanager
    def admission_paused(self) -> Iterator[None]:
        """Refuse nobody for the time that the queue takes while a process starts, here or beside this one."""
        self._admission.pause_admission()
        try:
            yield
        finally:
            self._admission.resume(time.monotonic())

    async def close(self, drain_seconds: float) -> None:
        """Answer what was accepted, for as long as that may take, then end the processes."""
        self._closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                while self.num_waiting:
                    self._emptied.clear()
                    await self._emptied.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._give_up_parked()
        await asyncio.gather(*(line.end() for line in list(self._lines)))
        if self._watching:
            self._watching.cancel()

    def _best_line(self) -> EngineProcess | PendingQueue:
        if self.alive and not self._closing:
            return self._lines[0] if len(self._lines) == 1 else min(self._lines, key=lambda line: len(line.calls))
        if self._parked and not self._closing:
            return self._parked
        detail = "the service is stopping" if self._closing else "the model's engine process is being replaced"
        raise ProblemError(problem_of(503, f"{detail}; try again."), self._retry_after())

    def _on_done(self, done: EngineResponse) -> None:
        """Take in what became of a request."""
        for line in self._lines:
            if call := line.calls.pop(done.number, None):
                self._forget(call, time.monotonic(), done.batch_size)
                if answered := call.answered:
                    call.answered = None
                    classified = request_result(done, call.problems)
                    if self.on_answer:
                        self.on_answer(classified.seen, classified.stage_seconds, classified.batch_size)
                    answered(classified)
                return

    def _on_lost(self, line: "EngineProcess") -> None:
        """An engine process died, or was killed: answer what it had, and start another."""
        self._lines.remove(line)
        num_lost = len(line.calls)
        if not self._lines and not self._closing:
            self._parked = PendingQueue()
            self._away.enter_context(self.admission_paused())
        self._note_change()
        self._fail(line, "the engine process that had the request died and is being replaced; try again.")
        if self._closing:
            return
        _log.error("an engine process died with %d requests in hand; another one is being started", num_lost)
        task = asyncio.get_running_loop().create_task(self._replace(line))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _fail(self, line: EngineProcess | PendingQueue, detail: str) -> None:
        """Answer 503 to everything on a line."""
        lost = list(line.calls.values())
        line.calls.clear()
        for call in lost:
            self._forget(call)
        problem = problem_of(503, detail)
        for call in lost:
            if answered := call.answered:
                call.answered = None
                answered(ProblemError(problem, self._retry_after()))

    def _give_up_parked(self) -> None:
        """Let nobody wait any longer for a process that does not come."""
        parked, self._parked = self._parked, None
        if parked:
            self._fail(parked, "the engine process died and could not be replaced; try again.")

    def _forget(self, call: PendingRequest, answered_at: float | None = None, batch_size: int = 0) -> None:
        self._admission.release(call.num_images, answered_at, batch_size)
        if not self.num_waiting:
            self._emptied.set()

    def _retry_after(self) -> dict[str, str]:
        return {"Retry-After": str(max(1, math.ceil(self._started_in_seconds)))}

    async def _connect(self) -> None:
        """Start an engine process and wait until it is ready."""
        began = time.monotonic()
        line: EngineProcess = EngineProcess(self._start_process(), self._on_done, self._on_lost)
        hello = await line.open()
        if hello.manifest != getattr(self, "manifest", hello.manifest):
            await line.end()
            raise BundleError("the bundle is another than the one that was served; reload to serve it.")
        self._started_in_seconds = time.monotonic() - began
        self.manifest, self.precision, self.provider = hello.manifest, hello.precision, hello.provider
        self._admission.expect(hello.seconds_of)
        line.ready = True
        self._lines.append(line)
        self._away.close()
        parked, self._parked = self._parked, None
        if parked:
            parked.move_to(line)
        self._note_change()

    async def _replace(self, lost: "EngineProcess") -> None:
        """Start engine processes until one is ready, with pauses that grow."""
        attempt = 0 if time.monotonic() - lost.since > _SETTLED_SECONDS else 1
        while True:
            await asyncio.sleep(_BACKOFF_SECONDS[min(attempt, len(_BACKOFF_SECONDS) - 1)])
            attempt += 1
            try:
                with self.admission_paused():
                    await self._connect()
                return
            except (LtkdError, OSError) as reason:
                _log.error("no engine process could be started: %s", reason)
                self._give_up_parked()

    def _note_change(self) -> None:
        alive = bool(self._lines)
        if alive != self.alive:
            self.alive = alive
            if self.on_change:
                self.on_change()

    def _watch(self) -> None:
        """Answer what is late, and kill processes that have work and say nothing."""
        now = time.monotonic()
        late = ProblemError(problem_of(504, "there was no answer within the deadline; send fewer, or allow more time."))
        while self._deadlines and (self._deadlines[0][0] <= now or not self._deadlines[0][2].answered):
            _, _, call = heapq.heappop(self._deadlines)
            if answered := call.answered:
                self.cancel(call)
                answered(late)
        for line in list(self._lines):
            if line.calls:
                silent_seconds = now - max(line.heard, next(iter(line.calls.values())).sent)
                if silent_seconds > self._stall_seconds:
                    _log.error("an engine process has work and said nothing for %.1f s; it is killed", silent_seconds)
                    line.kill()
        self._watch_at = math.inf
        if self.num_waiting:
            next_deadline = self._deadlines[0][0] if self._deadlines else math.inf
            self._watch_again(min(next_deadline, now + _WATCH_SECONDS))

    def _watch_again(self, at: float) -> None:
        if self._watching:
            self._watching.cancel()
        self._watch_at = at
        self._watching = asyncio.get_running_loop().call_later(at - time.monotonic(), self._watch)


def orders(bundle: Path, settings: Settings) -> EngineConfig:
    """What the engine processes of a bundle are told."""
    return EngineConfig(
        bundle=bundle.resolve(),
        device=settings.device,
        precision=settings.precision,
        max_batch=settings.max_batch,
        max_wait_ms=settings.max_wait_ms,
        max_pixels=settings.max_pixels,
        processes=settings.processes,
    )
