"""Who is let in: bounds on what is in hand, and how long one has to wait for a place."""

import math

from serve.problems import ProblemError, problem_of

_MEMORY_IMAGES = 100  # the measured rate forgets what lies so many images back


class Admission:
    """Counts the images in hand, measures how fast they go, and refuses what would wait too long.

    Args:
        max_images: In hand at one time.
        max_seconds: A request that would wait longer for its turn is refused.
    """

    def __init__(self, max_images: int, max_seconds: float) -> None:
        self.num_images = 0
        self.seconds_each = 0.0
        self._max_images = max_images
        self._max_seconds = max_seconds
        self._busy_since = 0.0

    def expect(self, seconds_each: float) -> None:
        """Begin with a guess of how long an image takes."""
        self.seconds_each = self.seconds_each or seconds_each

    def admit(self, num_images: int, now: float) -> None:
        """Take a request in hand.

        Raises:
            ProblemError: 429, with the whole seconds after which there should be a place.
        """
        wait = self.num_images * self.seconds_each
        if self.num_images + num_images > self._max_images or wait > self._max_seconds:
            retry = max(1, math.ceil(wait))
            detail = f"{self.num_images} images are in hand, for which {wait:.1f} s are needed; try again in {retry} s."
            raise ProblemError(problem_of(429, detail), {"Retry-After": str(retry)})
        if not self.num_images:
            self._busy_since = now
        self.num_images += num_images

    def release(self, num_images: int, now: float | None) -> None:
        """Let a request go.

        Args:
            num_images: Of the request.
            now: When it was answered; None if it was not, which says nothing of the rate.
        """
        self.num_images -= num_images
        if now is None:
            return
        if self.num_images:  # the last one of a burst had nobody to share its batch with: that is not the rate
            # several requests of a batch come back together: the first takes the whole time, the others none
            share = min(1.0, num_images / _MEMORY_IMAGES)
            self.seconds_each += share * ((now - self._busy_since) / num_images - self.seconds_each)
        self._busy_since = now
