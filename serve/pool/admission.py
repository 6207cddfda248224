"""Admission control: reject a request that would be answered too late, by the length of the queue and the speed.

A long queue does not help under overload: it stays full, and every answer is late by the time of the whole queue.
"""

import math
from collections.abc import Mapping

from serve.problems import ProblemError, make_problem
from serve.settings import Settings

_SATURATED_SHARE = 0.25  # of the time allowed in the queue
_MEASURE_SECONDS = 0.25  # long enough for several requests of many images, short enough to notice slower images soon


class ImageQueue:
    """Images that one engine process has been sent and has not answered, and its measured speed.

    A process has two: requests with large images, which are decoded elsewhere at a low priority, say nothing about the
    speed of the others.

    Attributes:
        num_images: The images that have no result yet.
        num_requests: Their requests.
        seconds_each: Time per image at full load; 0 if unknown, as for requests that wait for a process to start.
        batch_size: Images in the last batch.
    """

    def __init__(self) -> None:
        self.num_images = self.num_requests = 0
        self.seconds_each = 0.0
        self.batch_size = 0
        self._began = self._last_answer = 0.0  # of the measurement
        self._num_answered = 0  # after it began

    def wait_seconds(self, num_images: int) -> float:
        """How long a further request waits for others. Requests take turns, one image each."""
        return min(self.num_images, self.num_requests * num_images) * self.seconds_each

    def add(self, num_images: int, now: float) -> None:
        """Count a request that is sent."""
        if not self.num_images:
            self._begin(now)
        self.num_images += num_images
        self.num_requests += 1

    def remove(self, num_images: int) -> None:
        """Count a request that has ended."""
        self.num_images -= num_images
        self.num_requests -= 1

    def measure(self, num_images: int, batch_size: int, seconds: float, now: float, allowed: float) -> None:
        """Update the speed with a request that was answered and is no longer counted.

        Args:
            num_images: Images of the request that were processed.
            batch_size: Images in the last batch that contained one of them; 0 if none was run.
            seconds: Time from sending the request to the answer.
            now: When it was answered; the same for all requests of a batch.
            allowed: How long it might have waited in the queue, in seconds.
        """
        # Unless requests wait for others, the time between two answers, and the size of the batches, depend on how
        # often requests arrive. The first condition finds an estimate that is too low, the second one too high.
        longest = max(seconds, self.num_images * self.seconds_each)
        saturated = longest >= _SATURATED_SHARE * allowed
        if now > self._last_answer:  # all requests of the batch before have been counted
            last, self._last_answer = self._last_answer, now
            if not saturated:
                self._begin(now)
            elif last - self._began >= _MEASURE_SECONDS and self._num_answered:
                # the mean with the estimate before: a short pause of the machine should not count for much
                self.seconds_each = (self.seconds_each + (last - self._began) / self._num_answered) / 2
                self._began, self._num_answered = last, 0
        if now > self._began:
            self._num_answered += num_images
        if batch_size:
            self.batch_size = batch_size
        if batch_size and not self.num_images:
            # after a long stall the estimate may be so high that no request is accepted while another one is in
            # progress; then the queue is never saturated, and only this bound corrects the estimate
            self.seconds_each = min(self.seconds_each, seconds / num_images)

    def _begin(self, now: float) -> None:
        self._began = self._last_answer = now
        self._num_answered = 0


def expected_seconds_each(seconds_of: Mapping[int, float]) -> float:
    """The time per image at full load, by the seconds that a batch of each size took when the process started."""
    return min(seconds / size for size, seconds in seconds_of.items())


def require_room(num_images: int, num_waiting: int, queue: ImageQueue, seconds_left: float, limits: Settings) -> None:
    """Reject a request that would not be answered in time.

    Args:
        num_images: Images of the request.
        num_waiting: Images of all requests that have no result yet, in all engine processes.
        queue: The queue that the request would wait in.
        seconds_left: Time until its deadline.
        limits: Images, and time in the queue.

    Raises:
        ProblemError: 429, with the seconds after which there is room if no other request takes it.
    """
    # the request is answered together with the other images of its last batch
    own_seconds = max(num_images, queue.batch_size) * queue.seconds_each
    allowed = min(limits.max_queue_seconds, max(0.0, seconds_left - own_seconds))
    excess = num_waiting + num_images - limits.max_queue_images
    wait = queue.wait_seconds(num_images)
    if excess > 0 or wait > allowed:
        retry_after = max(1, math.ceil(max(wait - allowed, excess * queue.seconds_each)))
        detail = (
            f"{num_waiting} images are waiting, and more would not be answered in time; try again in {retry_after} s."
        )
        raise ProblemError(make_problem(429, detail), {"Retry-After": str(retry_after)})
