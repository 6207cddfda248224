"""From the bytes of images to results: decode, infer, answer.

The stages are plain functions; the service runs them off its event loop through a Classifier.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ltkd.cores import num_cores
from ltkd.errors import ImageError
from ltkd.images import DecodedImage, decode_image
from serve.answers import Answer, Refused, answers
from serve.engine import Engine
from serve.problems import Problem, ProblemError, image_problem, problem_of

Content = bytes | Problem
Decoded = DecodedImage | Problem


@dataclass(frozen=True)
class Classified:
    """The results of one request and how long its stages took.

    Attributes:
        results: One an image, in the order of the request.
        stage_seconds: Wall time of each stage that was entered.
    """

    results: list[Answer | Refused]
    stage_seconds: dict[str, float]


def decode(content: Content, size_px: int, max_pixels: int) -> Decoded:
    """Decode one image, or say what is wrong with it; a problem that is known already stays."""
    if isinstance(content, Problem):
        return content
    try:
        return decode_image(content, size_px, max_pixels)
    except ImageError as error:
        return image_problem(error)


def infer(engine: Engine, images: Sequence[DecodedImage]) -> NDArray[np.float32]:
    """The logits of decoded images in one batch; no image, no run."""
    if not images:
        return np.zeros((0, len(engine.manifest.task.class_names)), np.float32)
    return engine.logits(np.stack([image.pixels_SS3 for image in images]))


def usable(decoded: Sequence[Decoded]) -> list[DecodedImage]:
    """The images among what was decoded."""
    return [image for image in decoded if isinstance(image, DecodedImage)]


def results_of(
    engine: Engine, decoded: Sequence[Decoded], logits_NC: NDArray[np.float32], top_k: int
) -> list[Answer | Refused]:
    """Put the answers of the images that could be used, and the problems of the others, back in order."""
    said = [image.warnings for image in usable(decoded)]
    found = iter(answers(logits_NC, engine.manifest.task, top_k, said))
    return [Refused(error=image) if isinstance(image, Problem) else next(found) for image in decoded]


class Classifier:
    """Classifies requests off the event loop: a few threads decode, one thread owns the engine."""

    def __init__(self, engine: Engine, max_pixels: int, max_requests: int) -> None:
        self._engine = engine
        self._max_pixels = max_pixels
        self._max_requests = max_requests
        self._in_hand = 0
        self._decoders = ThreadPoolExecutor(num_cores(), "decode")
        self._owner = ThreadPoolExecutor(1, "infer")

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Hold a place for one request, so that bodies and pixels in memory are bounded.

        Raises:
            ProblemError: All places are taken.
        """
        if self._in_hand >= self._max_requests:
            detail = f"{self._in_hand} requests are in hand, at most {self._max_requests} are taken; try again."
            raise ProblemError(problem_of(429, detail), {"Retry-After": "1"})
        self._in_hand += 1
        try:
            yield
        finally:
            self._in_hand -= 1

    async def classify(self, contents: Sequence[Content], top_k: int) -> Classified:
        """Classify the images of one request."""
        loop = asyncio.get_running_loop()
        size_px = self._engine.manifest.task.input_px
        started = time.perf_counter()
        decoded = await asyncio.gather(
            *(loop.run_in_executor(self._decoders, decode, content, size_px, self._max_pixels) for content in contents)
        )
        stage_seconds = {"decode": time.perf_counter() - started}
        logits_NC = infer(self._engine, [])
        if images := usable(decoded):
            logits_NC, stage_seconds["infer"] = await loop.run_in_executor(self._owner, self._timed_infer, images)
        return Classified(results_of(self._engine, decoded, logits_NC, top_k), stage_seconds)

    def close(self) -> None:
        """End the threads; work that has begun is finished."""
        self._decoders.shutdown()
        self._owner.shutdown()

    def _timed_infer(self, images: Sequence[DecodedImage]) -> tuple[NDArray[np.float32], float]:
        started = time.perf_counter()
        return infer(self._engine, images), time.perf_counter() - started
