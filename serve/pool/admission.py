"""Who is let in: bounds on what is in hand, and how long one has to wait for a turn."""

import math
from collections.abc import Mapping
from functools import lru_cache

from serve.engine.batching import best_size
from serve.problems import ProblemError, problem_of

_MEMORY_SECONDS = 2.0  # of work, after which the measured rate has forgotten most; a machine that halts is no rate
_TIMES_ALONE, _LEAST_SECONDS = 10, 0.05
_LET_GO = 0.25  # of each second afterwards: what waited is worked off at up to three quarters of full load
_COLD_SECONDS = 0.5  # the first answers of a process are slow ones


class Admission:
    """Counts the images in hand, measures how fast they go, and refuses what would wait too long.

    A queue that is longer than a moment helps nobody: under a load that is more than the model can do, it stays full,
    and every answer is late by all of it.

    Args:
        max_images: In hand at one time.
        max_seconds: A request that would wait longer for its turn is refused; None takes ten times what the model needs
            for one image, at least 0.05.
    """

    def __init__(self, max_images: int, max_seconds: float | None) -> None:
        self.num_images = 0
        self.seconds_each = 0.0
        self._max_images = max_images
        self._max_seconds = max_seconds
        self._full_batch = 1
        self._busy_since = 0.0
        self._num_eased = 0
        self._left_behind = 0
        self._resumed = -math.inf

    def expect(self, seconds_of: Mapping[int, float]) -> None:
        """Begin with a guess of how long an image takes: the batch sizes that are run, and how long each takes."""
        self._full_batch = best_size(self._max_images, seconds_of)
        self.seconds_each = self.seconds_each or min(seconds / size for size, seconds in seconds_of.items())
        if self._max_seconds is None:
            self._max_seconds = max(_LEAST_SECONDS, _TIMES_ALONE * seconds_of[min(seconds_of)])

    def refusal(self, num_images: int, now: float, deadline: float) -> ProblemError | None:
        """Why a request cannot be taken in hand: 429, with the seconds after which there should be a place."""
        wait = self.num_images * self.seconds_each
        if (
            self.num_images + num_images > self._max_images
            or wait > self._allowed_seconds(now)
            or now + wait > deadline
        ):
            return _full(self.num_images, max(1, math.ceil(wait)))
        return None

    def admit(self, num_images: int, now: float, deadline: float) -> None:
        """Take a request in hand.

        Raises:
            ProblemError: As ``refusal``.
        """
        if refusal := self.refusal(num_images, now, deadline):
            raise ProblemError(refusal.problem, refusal.headers)  # a new one: each raise adds a traceback
        if not self.num_images:
            self._busy_since = now
        self.num_images += num_images

    def release(self, num_images: int, now: float | None = None, batch_size: int = 0) -> None:
        """Let a request go.

        Args:
            num_images: Of the request.
            now: When it was answered; None if it was not, which says nothing of the rate.
            batch_size: Of the batch that it ran in. A small one says how many came, and not how fast they could go.
        """
        self.num_images -= num_images
        if now is None:
            return
        if self.num_images and self.seconds_each and self._is_full(batch_size):
            # the last one of a burst had nobody to share its batch with: that is not the rate;
            # and several requests of a batch come back together: the first takes the whole time, the others none
            taken = now - self._busy_since
            kept = math.exp(-taken / _MEMORY_SECONDS)
            gained = (1 - kept) / taken if taken > 0 else 1 / _MEMORY_SECONDS
            self.seconds_each = 1 / (kept / self.seconds_each + gained * num_images)
        self._busy_since = now

    def _is_full(self, batch_size: int) -> bool:
        # at best, half of those who are let in run while the other half wait
        let_in = math.inf if self._max_seconds is None else self._max_seconds / self.seconds_each
        return 2 * batch_size >= min(self._full_batch, let_in / 2)

    def pause_admission(self) -> None:
        """Until ``resume``, let everybody wait, up to the bound on the number: it is not the load that slows it."""
        self._num_eased += 1

    def resume(self, now: float) -> None:
        """End what ``pause_admission`` began; what gathered meanwhile may take its time."""
        self._num_eased -= 1
        self._busy_since = self._resumed = now
        self._left_behind = self.num_images

    def _allowed_seconds(self, now: float) -> float:
        if self._num_eased or self._max_seconds is None:
            return math.inf
        excused = self._left_behind * self.seconds_each + _COLD_SECONDS - _LET_GO * (now - self._resumed)
        return self._max_seconds + max(0.0, excused)


@lru_cache
def _full(num_images: int, retry_seconds: int) -> ProblemError:
    """Made once: where thousands are refused in a second, the same is said again and again."""
    detail = f"{num_images} images are in hand, and more would not be answered soon; try again in {retry_seconds} s."
    return ProblemError(problem_of(429, detail), {"Retry-After": str(retry_seconds)})
