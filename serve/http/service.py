"""The state that all requests of the server process share: models, API keys, limits, metrics and readiness."""

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from pathlib import Path

from serve.engine.answers import answers_json, rejected_image_json, served_answer_json
from serve.http.api_keys import Keys
from serve.http.bodies import BodyMemory
from serve.monitoring.feedback import Feedback
from serve.monitoring.logs import LogValue, Trace, log_request, request_id_of, requests_log, trace_of
from serve.monitoring.prometheus import Reason, Telemetry
from serve.pool.dispatcher import EnginePool
from serve.pool.engine_process import launch
from serve.pool.model_repository import ModelRepository, ServedModel, StartPool
from serve.pool.pending_requests import RequestResult
from serve.pool.supervisor import engine_configs
from serve.problems import Problem, ProblemError, make_problem
from serve.settings import Settings

CLIENT_CLOSED_REQUEST = 499  # nginx's code; only in metrics and the log, because no response is sent
TIMEOUT_HEADER = "X-Request-Timeout"
_REASONS: dict[int, Reason] = {
    401: "unauthorised", 403: "unauthorised", 408: "slow", 413: "too_large", 429: "full",
    499: "left", 503: "not_ready", 504: "late",
}  # fmt: skip
_SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?")


_log = logging.getLogger(__name__)


@dataclass(slots=True)
class RequestContext:
    """Identity, trace and start time of one request.

    Attributes:
        request_id: The client's id if it is valid, else a new one.
        trace: The span of this request in the client's trace; None if it sent none.
        began: Time when the headers had arrived, on the clock of ``time.monotonic``.
        memory: Counts the bytes of all request bodies.
        held_bytes: The bytes that this request holds: its body as it arrived, and what was decompressed from it.
        facts: Further fields for the log.
        key: The name of the client's API key; empty without a valid one.
        over_limit: Whether the request was rejected because the key has sent too many.
    """

    request_id: str
    trace: Trace | None
    began: float
    memory: BodyMemory
    held_bytes: int = 0
    facts: Mapping[str, LogValue] | None = None
    key: str = ""
    over_limit: bool = False

    def hold(self, num_bytes: int) -> None:
        """Count bytes that this request holds in memory.

        Raises:
            ProblemError: 429, all requests together hold too many.
        """
        self.held_bytes += num_bytes
        self.memory.hold(num_bytes, self.held_bytes)


class Service:
    """The models and the state that all requests share. Use it only on the thread of the event loop.

    Args:
        root: A bundle, or a directory of bundles or of versions.
        settings: The settings of this start.
        start_pool: Starts the engine processes of a bundle.

    Attributes:
        accepting: Whether requests are accepted. True from the end of the start to the end of the drain.
        stopping: Whether shutdown has begun. The service is then not ready but still answers.
        body_memory: Counts the bytes of all request bodies in memory.
    """

    def __init__(self, root: Path, settings: Settings, start_pool: StartPool[EnginePool] | None = None) -> None:
        async def start(path: Path) -> EnginePool:
            starts = [partial(launch, config) for config in engine_configs(path, settings)]
            return await EnginePool.start(starts, settings)

        self.settings = settings
        self.telemetry = Telemetry()
        self.keys = Keys(settings.key_file)
        self.feedback = Feedback(settings.feedback_images)
        self.models = ModelRepository(root, start_pool or start, self.telemetry, settings)
        self.accepting = False
        self.stopping = False
        self.body_memory = BodyMemory(settings.max_queue_bytes)
        self._id_prefix = os.urandom(8).hex()
        self._num_request_ids = 0

    def request_context(self, request_id: str, traceparent: str) -> RequestContext:
        """Create the context of a request from its headers; absent headers are empty strings."""
        request_id = request_id_of(request_id) if request_id else self.new_request_id()
        trace = trace_of(traceparent) if traceparent else None
        return RequestContext(request_id, trace, time.monotonic(), self.body_memory)

    def new_request_id(self) -> str:
        """Return a unique id: a random prefix and a counter. A random id per request would cost as much as its JSON."""
        self._num_request_ids += 1
        return f"{self._id_prefix}{self._num_request_ids:016x}"

    async def start(self) -> None:
        """Start all models. Further calls do nothing.

        Raises:
            LtkdError: A model cannot be served.
        """
        if not self.accepting:
            await self.models.start()
            self.accepting = True

    async def close(self) -> None:
        """Answer the accepted requests, then end all engine processes."""
        self.accepting = False
        await self.models.close()

    @property
    def ready(self) -> bool:
        """Whether load balancers should send requests here."""
        return self.accepting and not self.stopping and self.models.ready

    def require_ready(self) -> None:
        """Raise a ProblemError with status 503 unless the service is ready."""
        if not self.ready:
            why = "it is stopping" if self.stopping else "it is starting"
            if self.accepting and not self.stopping:
                each = [f"{model.name} version {model.version}: {model.reason}" for model in self.models.unavailable()]
                why = f"no model can answer ({'; '.join(each)})"
            raise ProblemError(
                make_problem(503, f"the service is not ready because {why}; try again."), {"Retry-After": "1"}
            )

    def require_accepting(self) -> None:
        """Raise a ProblemError with status 503 before the start has ended and after the drain."""
        if not self.accepting:
            raise ProblemError(make_problem(503, "the service is not ready; try again."), {"Retry-After": "1"})

    def provider(self) -> str:
        """The execution provider of the first model; empty if no model is served."""
        served = self.models.all()
        return served[0].pool.provider if served else ""

    def deadline(self, context: RequestContext, timeout: str) -> float:
        """Compute the time by which a request must be answered, on the clock of ``time.monotonic``.

        Args:
            context: The request.
            timeout: Its header TIMEOUT_HEADER in seconds; empty if it has none. It can only shorten the timeout.

        Raises:
            ProblemError: 400, the header is not a number of seconds.
        """
        longest, timeout = self.settings.timeout_seconds, timeout.strip()
        if not timeout:
            return context.began + longest
        if not _SECONDS.fullmatch(timeout) or not float(timeout):
            detail = f"{TIMEOUT_HEADER} is {timeout[:40]!r}, expected a positive number of seconds such as 0.5."
            raise ProblemError(make_problem(400, detail))
        return context.began + min(longest, float(timeout))

    def response_body(self, served: ServedModel[EnginePool], result: RequestResult, context: RequestContext) -> bytes:
        """Build the JSON body of a response, and record the result.

        Raises:
            ProblemError: No image could be used. Its status and detail are those of the first problem.
        """
        problems = [each for each in result.results if isinstance(each, Problem)]
        if len(problems) == len(result.results):
            raise _all_rejected(problems, context)
        ids = self.record(served, result, context)
        results = [
            rejected_image_json(each) if isinstance(each, Problem) else served_answer_json(answer_id, each)
            for answer_id, each in zip(ids, result.results, strict=True)
        ]
        return answers_json(served.ref_json, results)

    def record(self, served: ServedModel[EnginePool], result: RequestResult, context: RequestContext) -> list[str]:
        """Record a result for the metrics, for the log and for later feedback.

        Returns:
            The id of each answer; empty for a rejected image.
        """
        if requests_log.isEnabledFor(logging.INFO):
            context.facts = _log_fields(served, result)
        served.metrics.record_total(time.monotonic() - context.began)
        return self.feedback.remember(context.key, served.feedback, result.facts)

    def count(self, context: RequestContext, route: str, status: int) -> None:
        """Count a finished request in the metrics, and log it."""
        self.telemetry.count_request(
            route, status, "over_limit" if context.over_limit else _REASONS.get(status), context.key
        )
        if requests_log.isEnabledFor(logging.INFO):
            seconds = time.monotonic() - context.began
            more = ({"key": context.key} if context.key else {}) | dict(context.facts or {})
            log_request(route, status, seconds, context.request_id, context.trace, more)


def _log_fields(served: ServedModel[EnginePool], result: RequestResult) -> dict[str, LogValue]:
    """The fields of an answered request in the log."""
    names = served.pool.manifest.task.groups.names
    groups: list[str] = [names[facts.group] for facts in result.facts if facts]
    return {"model": served.key.name, "version": served.key.version, "groups": groups}


def _all_rejected(problems: Sequence[Problem], context: RequestContext) -> ProblemError:
    """The error for a request without a usable image, made from its first problem."""
    first = problems[0]
    if first.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        _log.error("request %s: %s", context.request_id, first.detail)
    if len(problems) > 1:
        detail = f"none of the {len(problems)} images could be used; the first: {first.detail}"
        first = make_problem(first.status, detail)
    return ProblemError(first)


def server_timing(stage_seconds: Mapping[str, float]) -> str:
    """Format the ``Server-Timing`` header, in milliseconds."""
    if len(stage_seconds) == 3:
        decode, queue, infer = stage_seconds.values()
        return f"decode;dur={1000 * decode:.2f}, queue;dur={1000 * queue:.2f}, infer;dur={1000 * infer:.2f}"
    return ", ".join([f"{stage};dur={1000 * seconds:.2f}" for stage, seconds in stage_seconds.items()])
