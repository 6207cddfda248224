"""Requests that were accepted and have no result yet, and the results they get."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from serve.engine.messages import EngineResponse, PredictionFacts
from serve.pool.admission import ImageQueue
from serve.problems import Problem, ProblemError, make_problem

if TYPE_CHECKING:
    from serve.pool.engine_process import EngineProcess


class RequestResult(NamedTuple):
    """The result of one request.

    Attributes:
        results: One per image, in the order of the request: the answer in JSON (or logits, float32 [C]), or the problem
            that prevented an answer.
        facts: The prediction facts of each answered image; None for a rejected one.
        stage_seconds: ``decode``, ``queue`` and ``infer``, of the slowest image.
        batch_size: Size of the last batch that contained one of the images; 0 if none was run.
    """

    results: list[bytes | Problem]
    facts: list[PredictionFacts | None]
    stage_seconds: dict[str, float]
    batch_size: int


AnswerCallback = Callable[[Sequence[PredictionFacts | None], Mapping[str, float], int], None]
"""Called for every answered request with its ``facts``, ``stage_seconds`` and ``batch_size``."""


@dataclass(slots=True, eq=False)
class PendingRequest:
    """A request that was accepted and has no result yet.

    Attributes:
        number: Identifies it in the messages to and from the engine process.
        process: The engine process it was sent to, or the queue it waits in for one.
        problems: Problems of the images that were not sent, by position.
        num_images: Number of images that were sent.
        is_large: Whether one of them is large (``serve.engine.decode_queue``).
        sent_at: Time of sending, on the clock of ``time.monotonic``.
        deadline: On the same clock.
        result: Its result, or the problem that prevented one. A callback of it cannot disturb other requests.
    """

    number: int
    process: "EngineProcess | PendingQueue"
    problems: dict[int, Problem]
    num_images: int
    is_large: bool
    sent_at: float
    deadline: float
    result: "asyncio.Future[RequestResult | ProblemError]"

    @property
    def queue(self) -> ImageQueue:
        """The queue that counts its images."""
        return self.process.large if self.is_large else self.process.ordinary

    def finish(self, result: RequestResult | ProblemError) -> None:
        """Set the result, unless the request has one or was cancelled."""
        if not self.result.done():
            self.result.set_result(result)


class PendingQueue:
    """Requests that wait while no engine process is running. It takes them as an engine process does.

    Attributes:
        requests: The waiting requests, by number.
        ordinary: Counts the images of requests without large images; how long they wait is not known.
        large: Counts the images of the other requests.
    """

    def __init__(self) -> None:
        self.requests: dict[int, PendingRequest] = {}
        self.ordinary, self.large = ImageQueue(), ImageQueue()
        self._messages: dict[int, bytes] = {}

    def send(self, request: PendingRequest, message: bytes) -> None:
        """Keep a request and its message for the next engine process."""
        self.requests[request.number] = request
        self._messages[request.number] = message

    def cancel(self, number: int) -> bool:
        """Drop a request and its message. Returns False: it gets no response."""
        del self.requests[number], self._messages[number]
        return False

    def move_to(self, process: "EngineProcess", now: float) -> None:
        """Send all waiting requests to an engine process."""
        for number, request in self.requests.items():
            request.process = process
            request.queue.add(request.num_images, now)
            process.send(request, self._messages[number])


def request_result(response: EngineResponse, problems: Mapping[int, Problem]) -> RequestResult:
    """An engine process's response, with the problems of images that were not sent inserted at their positions."""
    _, decode_seconds, queue_seconds, infer_seconds, batch_size, image_results = response
    results: list[bytes | Problem] = []
    facts: list[PredictionFacts | None] = []
    for status, payload, prediction in image_results:
        results.append(make_problem(status, payload.decode()) if status else payload)
        facts.append(prediction)
    for position in sorted(problems):
        results.insert(position, problems[position])
        facts.insert(position, None)
    stage_seconds = {"decode": decode_seconds}
    if batch_size:
        stage_seconds["queue"] = queue_seconds
        stage_seconds["infer"] = infer_seconds
    return RequestResult(results, facts, stage_seconds, batch_size)
