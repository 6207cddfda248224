"""Admission control: decide which requests are accepted, by the length of the queue and the measured speed."""

import math
from collections.abc import Mapping
from functools import lru_cache

from serve.engine.batching import best_size
from serve.problems import ProblemError, make_problem

_MEMORY_SECONDS = 2.0  # time constant of the measured rate; pauses of the machine should not count for long
_MAX_QUEUE_RUNS, _MIN_QUEUE_SECONDS = 10, 0.05
_CATCH_UP_SHARE = 0.25  # of each second after a pause: with up to three quarters of full load the backlog shrinks
_COLD_SECONDS = 0.5  # the first answers of a process are slow


class Admission:
    """Counts accepted images, measures the rate at which they are answered, and rejects those that would wait too long.

    A long queue does not help under overload: it stays full, and every answer is late by the time of the whole queue.

    Attributes:
        num_images: Images that were accepted and have no result yet.
        seconds_each: Measured time per image at full load; 0 until the first estimate.

    Args:
        max_images: Accepted images at one time.
        max_seconds: A request that would wait longer in the queue is rejected. None allows ten times what the model
            takes for one image, at least 0.05 s.
    """

    def __init__(self, max_images: int, max_seconds: float | None) -> None:
        self.num_images = 0
        self.seconds_each = 0.0
        self._max_images = max_images
        self._max_seconds = max_seconds
        self._full_batch = 1
        self._busy_since = 0.0
        self._num_pauses = 0
        self._backlog = 0
        self._resumed = -math.inf

    def expect(self, seconds_of: Mapping[int, float]) -> None:
        """Estimate the rate from the time that each batch size took at the start.

        Args:
            seconds_of: Batch size to seconds per batch.
        """
        self._full_batch = best_size(self._max_images, seconds_of)
        self.seconds_each = self.seconds_each or min(seconds / size for size, seconds in seconds_of.items())
        if self._max_seconds is None:
            self._max_seconds = max(_MIN_QUEUE_SECONDS, _MAX_QUEUE_RUNS * seconds_of[min(seconds_of)])

    def rejection(self, num_images: int, now: float, deadline: float) -> ProblemError | None:
        """Why a request is rejected: 429, with the seconds after which the queue should have room. None accepts it."""
        wait = self.num_images * self.seconds_each
        if (
            self.num_images + num_images > self._max_images
            or wait > self._allowed_seconds(now)
            or now + wait > deadline
        ):
            return _full(self.num_images, max(1, math.ceil(wait)))
        return None

    def admit(self, num_images: int, now: float, deadline: float) -> None:
        """Accept a request.

        Raises:
            ProblemError: As ``rejection``.
        """
        if rejection := self.rejection(num_images, now, deadline):
            raise ProblemError(rejection.problem, rejection.headers)  # a copy: each raise adds a traceback
        if not self.num_images:
            self._busy_since = now
        self.num_images += num_images

    def release(self, num_images: int, now: float | None = None, batch_size: int = 0) -> None:
        """Count a request's images as finished.

        Args:
            num_images: Images of the request.
            now: When it was answered; None if it was not answered, and then the rate is not updated.
            batch_size: Size of the batch that it ran in. Small batches mean few requests, not a low rate, so they do
                not update the rate.
        """
        self.num_images -= num_images
        if now is None:
            return
        if self.num_images and self.seconds_each and self._is_full(batch_size):
            # the last request of a burst runs in a small batch, which does not show the rate; and the requests of one
            # batch end together, so the first one accounts for the whole time and the others for none
            elapsed = now - self._busy_since
            kept = math.exp(-elapsed / _MEMORY_SECONDS)
            gained = (1 - kept) / elapsed if elapsed > 0 else 1 / _MEMORY_SECONDS
            self.seconds_each = 1 / (kept / self.seconds_each + gained * num_images)
        self._busy_since = now

    def _is_full(self, batch_size: int) -> bool:
        # at best, half of the accepted images run while the other half wait
        max_accepted = math.inf if self._max_seconds is None else self._max_seconds / self.seconds_each
        return 2 * batch_size >= min(self._full_batch, max_accepted / 2)

    def pause_admission(self) -> None:
        """Until ``resume``, limit only the number of images: answers are slow because a process is starting."""
        self._num_pauses += 1

    def resume(self, now: float) -> None:
        """End a pause. The backlog that it left does not cause rejections while it is processed."""
        self._num_pauses -= 1
        self._busy_since = self._resumed = now
        self._backlog = self.num_images

    def _allowed_seconds(self, now: float) -> float:
        if self._num_pauses or self._max_seconds is None:
            return math.inf
        allowance = self._backlog * self.seconds_each + _COLD_SECONDS - _CATCH_UP_SHARE * (now - self._resumed)
        return self._max_seconds + max(0.0, allowance)


@lru_cache
def _full(num_images: int, retry_seconds: int) -> ProblemError:
    """The rejection, cached: under overload the same one is sent thousands of times per second."""
    detail = f"{num_images} images are waiting, and more would not be answered in time; try again in {retry_seconds} s."
    return ProblemError(make_problem(429, detail), {"Retry-After": str(retry_seconds)})
