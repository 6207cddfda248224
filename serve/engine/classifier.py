"""The engine process's work: decode, batch, infer, answer. It knows neither HTTP nor sockets."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ltkd.contract.image_decoding import decode_image
from ltkd.errors import ImageError
from serve.engine.answers import NOT_FINITE, AnswerBuilder
from serve.engine.batching import Batcher, BatchRun
from serve.engine.messages import EngineRequest, EngineResponse, ImageResult, OutputKind, PredictionFacts
from serve.engine.session import Engine
from serve.problems import image_problem

_HAND_OVER_SECONDS = 0.005  # after so long decoded images go on, and whoever decodes looks for what else is new
_LATE = ImageResult(
    504, b"the deadline passed before the image was answered; send fewer at a time, or allow more time."
)
_BROKEN = ImageResult(500, b"the service failed on this image; its log has the cause.")
_ENDLESS = ImageResult(500, NOT_FINITE.encode())


@dataclass(slots=True, eq=False)
class Request:
    """A request on its way through decode, queue and run.

    Attributes:
        work: What is asked.
        arrived: When it came, on the clock of ``time.monotonic``.
        left: How many of its images are not settled.
        outcomes: What became of them.
        decoded: When its last image was decoded.
        began: When the last batch with one of them began.
        infer_seconds: How long that batch ran.
        batch_size: How many images were in it.
        cancelled: Whether nobody waits for it any more.
    """

    work: EngineRequest
    arrived: float
    left: int
    outcomes: list[ImageResult]
    decoded: float
    began: float
    infer_seconds: float = 0.0
    batch_size: int = 0
    cancelled: bool = False

    def done(self) -> EngineResponse:
        """What the front is told of it; nobody reads the outcomes of a request that was cancelled."""
        decode_seconds, queue_seconds = self.decoded - self.arrived, max(0.0, self.began - self.decoded)
        outcomes = [] if self.cancelled else self.outcomes
        return EngineResponse(
            self.work.number, decode_seconds, queue_seconds, self.infer_seconds, self.batch_size, outcomes
        )


@dataclass(slots=True, eq=False)
class Item:
    """One image of a request, decoded."""

    request: Request
    place: int
    pixels_SS3: NDArray[np.uint8]
    warnings: tuple[str, ...]

    @property
    def deadline(self) -> float:
        """When its request is late."""
        return self.request.work.deadline

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.request.cancelled


Job = tuple[Request, int]
"""One image of a request, still encoded: the request and the place in it."""


class Classifier:
    """Decodes, batches and answers.

    Args:
        engine: What gives the logits.
        max_pixels: Images with more pixels are refused from their header.
        max_wait: How long an image may wait for others, in seconds.
        send: Given requests as they are done, several at a time; called by several threads.
        report: Given what went wrong inside; for the log.

    Attributes:
        batcher: Runs what is decoded; started, or asked for one batch after another.
    """

    def __init__(
        self,
        engine: Engine,
        max_pixels: int,
        max_wait: float,
        send: Callable[[Sequence[EngineResponse]], None],
        report: Callable[[Exception], None],
    ) -> None:
        self._engine = engine
        self._answerer = AnswerBuilder(engine.manifest, engine.precision)
        self._max_pixels = max_pixels
        self._send = send
        self._report = report
        self._requests: dict[int, Request] = {}
        self._settling = threading.Lock()
        self.batcher: Batcher[Item, NDArray[np.float32]] = Batcher(
            self._run, self._deliver, engine.seconds_of, max_wait
        )

    def accept(self, work: EngineRequest) -> list[Job]:
        """Take a request in; its images are to be decoded by any thread."""
        now, num = time.monotonic(), len(work.contents)
        request = Request(work, now, num, [_LATE] * num, now, now)
        self._requests[work.number] = request
        return [(request, place) for place in range(num)]

    def cancel(self, number: int) -> None:
        """Drop a request that nobody waits for, wherever it is."""
        if request := self._requests.get(number):
            request.cancelled = True

    def decode(self, jobs: deque[Job]) -> None:
        """Decode jobs, as many as fit into a batch, and queue the images together.

        Args:
            jobs: Taken from its left end.
        """
        ready: list[Item] = []
        until = time.monotonic() + _HAND_OVER_SECONDS
        while jobs and len(ready) < self.batcher.max_size:
            request, place = jobs.popleft()
            if item := self._decoded(request, place):
                ready.append(item)
            if request.decoded > until:
                break
        if ready:
            self.batcher.put(ready)

    def close(self) -> None:
        """Answer what was queued, then end."""
        self.batcher.close()

    def _decoded(self, request: Request, place: int) -> Item | None:
        """The image, or None if there is none to run; then what became of it is noted."""
        decoded = self._decode(request, place)
        request.decoded = request.began = time.monotonic()
        if isinstance(decoded, Item):
            return decoded
        self._settle([(request, place, decoded)])
        return None

    def _decode(self, request: Request, place: int) -> Item | ImageResult:
        work, size_px = request.work, self._engine.manifest.task.input_px
        if request.cancelled or work.deadline <= time.monotonic():
            return _LATE
        content = work.contents[place]
        try:
            if work.wanted == OutputKind.LOGITS_OF_PIXELS:
                return Item(request, place, np.frombuffer(content, np.uint8).reshape(size_px, size_px, 3), ())
            image = decode_image(content, size_px, self._max_pixels)
        except ImageError as error:
            problem = image_problem(error)
            return ImageResult(problem.status, problem.detail.encode(), None)
        except Exception as reason:  # a defect: it must not end the thread that all others need
            self._report(reason)
            return _BROKEN
        return Item(request, place, image.pixels_SS3, image.warnings)

    def _run(self, items: Sequence[Item]) -> NDArray[np.float32]:
        return self._engine.logits([item.pixels_SS3 for item in items])

    def _deliver(self, ran: BatchRun[Item, NDArray[np.float32]]) -> None:
        for item in ran.items:
            request = item.request
            request.began, request.infer_seconds, request.batch_size = ran.began, ran.seconds, len(ran.items)
        outcomes: Sequence[ImageResult] = [_BROKEN] * len(ran.items)
        if isinstance(ran.result, TimeoutError):
            outcomes = [_LATE] * len(ran.items)
        elif isinstance(ran.result, Exception):
            self._report(ran.result)
        else:
            try:
                outcomes = self._outcomes(ran.items, ran.result)
            except Exception as reason:  # a defect: it must not end the thread that all others need
                self._report(reason)
        self._settle([(item.request, item.place, outcome) for item, outcome in zip(ran.items, outcomes, strict=True)])

    def _outcomes(self, items: Sequence[Item], logits_NC: NDArray[np.float32]) -> list[ImageResult]:
        judged = self._answerer.judge(logits_NC)
        texts = self._answerer.json(
            judged, [item.request.work.top_k for item in items], [item.warnings for item in items]
        )
        facts = zip(
            judged.groups, judged.labels, judged.confidences, judged.decisions, map(len, judged.sets), strict=False
        )
        outcomes = [ImageResult(0, text, PredictionFacts(*fact)) for text, fact in zip(texts, facts, strict=True)]
        for row, item in enumerate(items):
            if item.request.work.wanted != OutputKind.ANSWERS:
                seen = outcomes[row].seen if judged.finite[row] else None
                outcomes[row] = ImageResult(0, logits_NC[row].tobytes(), seen)
            elif not judged.finite[row]:
                outcomes[row] = _ENDLESS
        return outcomes

    def _settle(self, settled: Sequence[tuple[Request, int, ImageResult]]) -> None:
        """Note what became of images, and send the requests that have none left."""
        done = []
        with self._settling:
            for request, place, outcome in settled:
                request.outcomes[place] = outcome
                request.left -= 1
                if not request.left:
                    del self._requests[request.work.number]
                    done.append(request.done())
        if done:
            self._send(done)
