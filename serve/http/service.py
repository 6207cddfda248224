"""What every request needs, whichever way it is answered: models, limits, counters, and whether to answer."""

import asyncio
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple, Protocol

from serve.engine.answers import answers_json, rejected_image_json
from serve.http.api_keys import Keys
from serve.monitoring.feedback import Feedback
from serve.monitoring.logs import LogValue, Trace, log_request, request_id_of, requests_log, trace_of
from serve.monitoring.prometheus import Reason, Telemetry
from serve.pool.dispatcher import EnginePool
from serve.pool.engine_process import RequestResult
from serve.pool.repository import ModelRepository, ServedModel, StartWorker
from serve.problems import Problem, ProblemError, problem_of
from serve.settings import Settings

CLIENT_LEFT = 499  # nginx's number, for metrics and log alone: nobody reads an answer
ROUTE = "/v1/classify"
TIMEOUT_HEADER = "X-Request-Timeout"
_REASONS: dict[int, Reason] = {
    401: "unauthorised", 403: "unauthorised", 408: "slow", 413: "too_large", 429: "full",
    499: "left", 503: "not_ready", 504: "late",
}  # fmt: skip
_MAX_KNOWN_HEADS = 1000
_SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?")


_log = logging.getLogger(__name__)


@dataclass(slots=True)
class RequestContext:
    """A request as its headers tell it.

    Attributes:
        request_id: The caller's where it is plain, else a new one.
        trace: Our place in the caller's trace.
        began: When its headers had arrived, on the clock of ``time.monotonic``.
        facts: What else the log shall say of it.
    """

    request_id: str
    trace: Trace | None
    began: float
    facts: Mapping[str, LogValue] | None = None


class Head(NamedTuple):
    """What the head of a usual request says; empty where it says nothing.

    Attributes:
        authorization: Header of this name.
        request_id: Header ``X-Request-ID``.
        traceparent: Header of this name.
        timeout: Header TIMEOUT_HEADER.
        model: Parameter of the URL.
        version: Likewise.
        top_k: Likewise.
        keep_alive: Whether the connection stays open after it.
    """

    authorization: str
    request_id: str
    traceparent: str
    timeout: str
    model: str | None
    version: str | None
    top_k: int
    keep_alive: bool

    @property
    def is_bare(self) -> bool:
        """Whether an answer needs to take up nothing of it."""
        return self.keep_alive and not (self.request_id or self.traceparent)


class Checked(Protocol):
    """A client's connection."""

    def check(self, now: float) -> None:
        """Part with a client that takes too long."""


class Service:
    """The models and all that answers share. It belongs to the event loop's thread.

    Args:
        root: A bundle, or a directory of bundles or of versions.
        settings: See there.
        start_worker: Starts the engine processes of a bundle.

    Attributes:
        accepting: Whether requests are taken: from the end of the start to the end of the drain.
        leaving: Whether the end was asked for: not ready any more, but still answering.
        connections: Of all clients.
        known_heads: Heads of usual requests, without the length of the body, and what they were judged to be.
    """

    def __init__(self, root: Path, settings: Settings, start_worker: StartWorker[EnginePool] | None = None) -> None:
        async def start(path: Path) -> EnginePool:
            return await EnginePool.start(path, settings)

        self.settings = settings
        self.telemetry = Telemetry()
        self.keys = Keys(settings.key_file)
        self.feedback = Feedback(settings.feedback_images)
        self.models = ModelRepository(root, start_worker or start, self.telemetry, settings)
        self.accepting = False
        self.leaving = False
        self.connections: set[Checked] = set()
        self.known_heads: dict[bytes, Head] = {}
        self._held_bytes = 0
        self._id_prefix = os.urandom(8).hex()
        self._num_asked = 0
        self._checking: asyncio.Task[None] | None = None

    def asked(self, request_id: str, traceparent: str) -> RequestContext:
        """A request with these headers, empty where it has none."""
        request_id = request_id_of(request_id) if request_id else self.new_request_id()
        return RequestContext(request_id, trace_of(traceparent) if traceparent else None, time.monotonic())

    def new_request_id(self) -> str:
        """Random once and counted from there: randomness for each costs as much as an answer's JSON."""
        self._num_asked += 1
        return f"{self._id_prefix}{self._num_asked:016x}"

    async def start(self) -> None:
        """Start every model, once.

        Raises:
            LtkdError: One of them cannot be served.
        """
        if not self.accepting:
            await self.models.start()
            self.accepting = True
            self._checking = asyncio.create_task(self._check_connections())

    async def close(self) -> None:
        """Answer what was accepted, and end every process."""
        self.accepting = False
        if self._checking:
            self._checking.cancel()
        await self.models.close()

    @property
    def ready(self) -> bool:
        """Whether load balancers should send requests here."""
        return self.accepting and not self.leaving and self.models.ready

    def know_head(self, key: bytes, head: Head) -> None:
        """Remember a head; clients that stay send the same one again and again."""
        if len(self.known_heads) >= _MAX_KNOWN_HEADS:
            self.known_heads.clear()
        self.known_heads[key] = head

    def require_ready(self) -> None:
        """Raises a ProblemError, 503, unless ready."""
        if not self.ready:
            why = "stopping" if self.leaving else "starting" if not self.accepting else "replacing an engine process"
            raise ProblemError(
                problem_of(503, f"the service is not ready, it is {why}; try again."), {"Retry-After": "1"}
            )

    def require_accepting(self) -> None:
        """Raises a ProblemError, 503, before the start has ended and after the drain."""
        if not self.accepting:
            raise ProblemError(problem_of(503, "the service is not ready; try again."), {"Retry-After": "1"})

    def provider(self) -> str:
        """The provider of the model that answers by default; empty where there is none."""
        served = self.models.all()
        return served[0].worker.provider if served else ""

    def hold_bytes(self, num_bytes: int) -> None:
        """Count bytes of a body into memory; they are let go with ``hold_bytes(-num_bytes)``.

        Raises:
            ProblemError: 429, there would be too many.
        """
        self._held_bytes += num_bytes
        if num_bytes > 0 and self._held_bytes > self.settings.max_queue_bytes:
            detail = (
                f"{self.settings.max_queue_bytes:,} bytes of bodies are in hand, which is all that is held; try again."
            )
            raise ProblemError(problem_of(429, detail), {"Retry-After": "1", "Connection": "close"})

    def deadline(self, asked: RequestContext, wanted: str) -> float:
        """When a request must be answered, on the clock of ``time.monotonic``.

        Args:
            asked: The request.
            wanted: Its header TIMEOUT_HEADER, empty if it has none: seconds, at most the service's own limit count.

        Raises:
            ProblemError: 400, the header is no number of seconds.
        """
        longest, wanted = self.settings.timeout_seconds, wanted.strip()
        if not wanted:
            return asked.began + longest
        if not _SECONDS.fullmatch(wanted) or not float(wanted):
            raise ProblemError(problem_of(400, f"{TIMEOUT_HEADER} is {wanted[:40]!r}, expected seconds such as 0.5."))
        return asked.began + min(longest, float(wanted))

    def answer(self, served: ServedModel[EnginePool], classified: RequestResult, asked: RequestContext) -> bytes:
        """The body of an answer, which is noted.

        Raises:
            ProblemError: No image could be used; the first problem speaks for all.
        """
        problems = [result for result in classified.results if isinstance(result, Problem)]
        if len(problems) == len(classified.results):
            raise _none_usable(problems, asked)
        self.note(served, classified, asked)
        results = [rejected_image_json(one) if isinstance(one, Problem) else one for one in classified.results]
        return answers_json(served.worker.ref_json, results)

    def note(self, served: ServedModel[EnginePool], classified: RequestResult, asked: RequestContext) -> None:
        """Note what there is to log of an answer, and to remember until its true label is told."""
        if requests_log.isEnabledFor(logging.INFO):
            asked.facts = _facts(served, classified)
        self.feedback.remember(asked.request_id, served.ledger, classified.seen)

    def count(self, asked: RequestContext, route: str, status: int) -> None:
        """Note an answered request."""
        self.telemetry.count_request(route, status, _REASONS.get(status))
        if requests_log.isEnabledFor(logging.INFO):
            log_request(route, status, time.monotonic() - asked.began, asked.request_id, asked.trace, asked.facts or {})

    async def _check_connections(self) -> None:
        limits = self.settings
        shortest = min(limits.header_seconds, limits.body_seconds, limits.idle_seconds, limits.write_seconds)
        while True:
            await asyncio.sleep(min(0.5, shortest / 4))
            now = time.monotonic()
            for connection in list(self.connections):
                connection.check(now)


def _facts(served: ServedModel[EnginePool], classified: RequestResult) -> dict[str, LogValue]:
    """What the log says of an answer."""
    names = served.worker.manifest.task.groups.names
    groups: list[str] = [names[seen.group] for seen in classified.seen if seen]
    return {"model": served.key.name, "version": served.key.version, "groups": groups}


def _none_usable(problems: Sequence[Problem], asked: RequestContext) -> ProblemError:
    """The first problem speaks for all."""
    first = problems[0]
    if first.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error("request %s: %s", asked.request_id, first.detail)
    if len(problems) > 1:
        detail = f"none of the {len(problems)} images could be used; the first: {first.detail}"
        first = problem_of(first.status, detail)
    return ProblemError(first)


def server_timing(stage_seconds: Mapping[str, float]) -> str:
    """The ``Server-Timing`` header of stages, in milliseconds."""
    if len(stage_seconds) == 3:
        decode, queue, infer = stage_seconds.values()
        return f"decode;dur={1000 * decode:.2f}, queue;dur={1000 * queue:.2f}, infer;dur={1000 * infer:.2f}"
    return ", ".join([f"{stage};dur={1000 * seconds:.2f}" for stage, seconds in stage_seconds.items()])
