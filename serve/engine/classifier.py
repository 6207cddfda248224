"""Classification in an engine process: decode the images of a request, batch them, run the model, build the answers.

``serve.engine.message_loop`` passes requests in and sends the responses; this module uses neither HTTP nor sockets.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ltkd.contract.image_decoding import DecodedImage, decode_image
from ltkd.errors import ImageError, ImageTooLargeError
from serve.engine.answers import NOT_FINITE, AnswerBuilder
from serve.engine.batching import Batcher, BatchRun
from serve.engine.decode_queue import ORDINARY_PIXELS, DecodeQueue, PixelLimits, header_pixels
from serve.engine.large_images import Decode, DecoderKilledError
from serve.engine.messages import EngineRequest, EngineResponse, ImageResult, OutputKind, PredictionFacts
from serve.engine.session import Engine
from serve.problems import image_problem

_MAX_DECODE_SECONDS = 0.005  # after that long, decoded images are queued and the decoding thread reads new messages
_ALIVE_SECONDS = 0.25
_LATE = ImageResult(
    504, b"the deadline passed before the image was answered; send fewer at a time, or allow more time."
)
_INTERNAL_ERROR = ImageResult(500, b"the service failed on this image; its log has the cause.")
_NOT_FINITE = ImageResult(500, NOT_FINITE.encode())


@dataclass(slots=True, eq=False)
class Request:
    """A request in progress.

    Attributes:
        message: The request as it was received.
        arrived: When it was received, on the clock of ``time.monotonic``.
        num_pending: How many of its images have no result yet.
        results: One result per image, in the order of the request.
        decoded: When its last image was decoded.
        began: When the last batch with one of its images began.
        pixels_left: How many pixels of its further images may be decoded.
        infer_seconds: How long that batch ran.
        batch_size: How many images were in that batch.
        cancelled: Whether the server process cancelled it.
    """

    message: EngineRequest
    arrived: float
    num_pending: int
    results: list[ImageResult]
    decoded: float
    began: float
    pixels_left: int
    infer_seconds: float = 0.0
    batch_size: int = 0
    cancelled: bool = False

    def response(self) -> EngineResponse:
        """The response to the server process, which ignores the results of a cancelled request."""
        decode_seconds, queue_seconds = self.decoded - self.arrived, max(0.0, self.began - self.decoded)
        results = [] if self.cancelled else self.results
        return EngineResponse(
            self.message.number, decode_seconds, queue_seconds, self.infer_seconds, self.batch_size, results
        )


@dataclass(slots=True, eq=False)
class Item:
    """One decoded image of a request."""

    request: Request
    index: int
    pixels_SS3: NDArray[np.uint8]
    warnings: tuple[str, ...]

    @property
    def deadline(self) -> float:
        """The deadline of its request."""
        return self.request.message.deadline

    @property
    def cancelled(self) -> bool:
        """Whether its request was cancelled."""
        return self.request.cancelled


class Classifier:
    """Decodes images, batches them and builds the answers.

    Args:
        engine: Computes the logits.
        limits: Images with more decoded pixels are rejected from their header.
        max_wait: How long an image may wait for more images, in seconds.
        send: Called with responses, several at a time, from several threads.
        report: Called with unexpected exceptions, for the log.
        note_progress: Called after an image was decoded or a batch was run, at most every 0.25 s.

    Attributes:
        ordinary: The images to be decoded by ``decode_waiting`` or ``decode_next``.
        large: The images to be decoded by ``decode_large``.
        batcher: Runs the decoded images. The caller starts its thread, or calls ``run_one`` repeatedly.
    """

    def __init__(
        self,
        engine: Engine,
        limits: PixelLimits,
        max_wait: float,
        send: Callable[[Sequence[EngineResponse]], None],
        report: Callable[[Exception], None],
        note_progress: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._answer_builder = AnswerBuilder(engine.manifest, engine.precision)
        self._preprocessing = engine.manifest.task.preprocessing
        self._limits = limits
        self._large_are_allowed = limits.per_image > ORDINARY_PIXELS
        self._send = send
        self._report = report
        self._note_progress = note_progress
        self._shown_at = 0.0
        self._requests: dict[int, Request] = {}
        self._results_lock = threading.Lock()
        self.ordinary: DecodeQueue[Request] = DecodeQueue()
        self.large: DecodeQueue[Request] = DecodeQueue()
        self.batcher: Batcher[Item, NDArray[np.float32]] = Batcher(
            self._run, self._deliver, engine.seconds_of, max_wait
        )

    def accept(self, message: EngineRequest) -> None:
        """Queue the images of a request to be decoded."""
        now, num = time.monotonic(), len(message.contents)
        request = Request(message, now, num, [_LATE] * num, now, now, self._limits.per_request)
        self._requests[message.number] = request
        ordinary, large, rejected = [], [], []
        for index, content in enumerate(message.contents):
            raw = message.output_kind == OutputKind.LOGITS_OF_PIXELS
            num_pixels = 0 if raw else header_pixels(content)
            if num_pixels > ORDINARY_PIXELS:
                large.append(index)
            elif num_pixels > request.pixels_left:
                rejected.append((request, index, _rejected(self._beyond(request.pixels_left))))
            else:
                request.pixels_left -= num_pixels
                ordinary.append(index)
        self.ordinary.put(request, ordinary)
        self.large.put(request, large)
        if rejected:
            self._store_results(rejected)

    def cancel(self, number: int) -> None:
        """Cancel a request; those of its images that are not in a batch yet will not be run."""
        if request := self._requests.get(number):
            request.cancelled = True

    def cancel_all(self) -> None:
        """Cancel all requests."""
        for request in list(self._requests.values()):
            request.cancelled = True

    def decode_waiting(self) -> None:
        """Decode ordinary images, at most one batch of them, and queue the decoded images together."""
        ready: list[Item] = []
        until = time.monotonic() + _MAX_DECODE_SECONDS
        while len(ready) < self.batcher.max_size and (image := self.ordinary.take_image(wait=False)):
            request, index = image
            if item := self._decode_or_reject(request, index, self._decode_ordinary):
                ready.append(item)
            if request.decoded > until:
                break
        if ready:
            self.batcher.put(ready)

    def decode_next(self) -> bool:
        """Wait for an ordinary image and decode it; False after ``ordinary`` was closed and is empty."""
        if not (image := self.ordinary.take_image(wait=True)):
            return False
        if item := self._decode_or_reject(*image, self._decode_ordinary):
            self.batcher.put([item])
        return True

    def decode_large(self, decode: Decode) -> bool:
        """Wait for a large image and decode it; False after ``large`` was closed and is empty."""
        if not (turn := self.large.take_request()):
            return False
        request, waiting = turn
        item = self._decode_or_reject(request, waiting.popleft(), partial(self._decode_large, decode, request))
        self.large.put(request, waiting)
        if item:
            self.batcher.put([item])
        return True

    def close(self) -> None:
        """Run the queued images, then end."""
        self.batcher.close()

    def _decode_or_reject(self, request: Request, index: int, decode: Callable[[bytes], DecodedImage]) -> Item | None:
        """Decode an image; if it is not to be run now, store its result or queue it as a large one, and return None."""
        decoded = self._decode(request, index, decode)
        request.decoded = request.began = time.monotonic()
        self._show_progress(request.decoded)
        if isinstance(decoded, Item):
            return decoded
        if decoded is None:
            self.large.put(request, [index])
            return None
        self._store_results([(request, index, decoded)])
        return None

    def _decode(
        self, request: Request, index: int, decode: Callable[[bytes], DecodedImage]
    ) -> Item | ImageResult | None:
        """Decode an image; None if it is a large one, although its header says otherwise (two headers, for example)."""
        message = request.message
        if request.cancelled or message.deadline <= time.monotonic():
            return _LATE
        content = message.contents[index]
        try:
            if message.output_kind == OutputKind.LOGITS_OF_PIXELS:
                side_px = self._preprocessing.input_px
                return Item(request, index, np.frombuffer(content, np.uint8).reshape(side_px, side_px, 3), ())
            image = decode(content)
        except ImageError as error:
            may_be_large = decode == self._decode_ordinary and self._large_are_allowed
            return None if may_be_large and isinstance(error, ImageTooLargeError) else _rejected(error)
        except DecoderKilledError as error:
            return ImageResult(503, str(error).encode())
        except Exception as reason:  # a defect; it must not end the thread, which serves all requests
            self._report(reason)
            return _INTERNAL_ERROR
        return Item(request, index, image.pixels_SS3, image.warnings)

    def _decode_ordinary(self, content: bytes) -> DecodedImage:
        return decode_image(content, self._preprocessing, min(ORDINARY_PIXELS, self._limits.per_image))

    def _decode_large(self, decode: Decode, request: Request, content: bytes) -> DecodedImage:
        """Decode an image within the limits of an image and of its request.

        Raises:
            ImageError: As ``decode``.
        """
        left, per_image = request.pixels_left, self._limits.per_image
        try:
            image = decode(content, self._preprocessing, min(per_image, left))
        except ImageTooLargeError as error:
            raise self._beyond(left) if left < per_image else error from None
        request.pixels_left -= image.decoded_pixels
        return image

    def _beyond(self, left: int) -> ImageTooLargeError:
        return ImageTooLargeError(
            f"the images of one request may have {self._limits.per_request:,} pixels together, and {left:,} were left "
            "for this image, which has more; send it in another request."
        )

    def _show_progress(self, now: float) -> None:
        if now - self._shown_at > _ALIVE_SECONDS:
            self._shown_at = now
            self._note_progress()

    def _run(self, items: Sequence[Item]) -> NDArray[np.float32]:
        return self._engine.logits([item.pixels_SS3 for item in items])

    def _deliver(self, batch: BatchRun[Item, NDArray[np.float32]]) -> None:
        for item in batch.items:
            request = item.request
            request.began, request.infer_seconds, request.batch_size = batch.began, batch.seconds, len(batch.items)
        results: Sequence[ImageResult] = [_INTERNAL_ERROR] * len(batch.items)
        if isinstance(batch.result, TimeoutError):
            results = [_LATE] * len(batch.items)
        elif isinstance(batch.result, Exception):
            self._report(batch.result)
        else:
            try:
                results = self._results(batch.items, batch.result)
            except Exception as reason:  # a defect; it must not end the thread, which serves all requests
                self._report(reason)
        self._store_results(
            [(item.request, item.index, result) for item, result in zip(batch.items, results, strict=True)]
        )
        self._show_progress(time.monotonic())

    def _results(self, items: Sequence[Item], logits_NC: NDArray[np.float32]) -> list[ImageResult]:
        predictions = self._answer_builder.predict(logits_NC)
        texts = self._answer_builder.json(
            predictions, [item.request.message.top_k for item in items], [item.warnings for item in items]
        )
        facts = map(
            PredictionFacts,
            predictions.groups,
            predictions.labels,
            predictions.confidences,
            predictions.decisions,
            map(len, predictions.sets),
        )
        results = [ImageResult(0, text, fact) for text, fact in zip(texts, facts, strict=True)]
        for row, item in enumerate(items):
            if item.request.message.output_kind != OutputKind.ANSWERS:
                row_facts = results[row].facts if predictions.finite[row] else None
                results[row] = ImageResult(0, logits_NC[row].tobytes(), row_facts)
            elif not predictions.finite[row]:
                results[row] = _NOT_FINITE
        return results

    def _store_results(self, results: Sequence[tuple[Request, int, ImageResult]]) -> None:
        """Store the results of images, and send the responses of the requests that are complete."""
        responses = []
        with self._results_lock:
            for request, index, result in results:
                request.results[index] = result
                request.num_pending -= 1
                if not request.num_pending:
                    del self._requests[request.message.number]
                    responses.append(request.response())
        if responses:
            self._send(responses)


def _rejected(error: ImageError) -> ImageResult:
    problem = image_problem(error)
    return ImageResult(problem.status, problem.detail.encode())
