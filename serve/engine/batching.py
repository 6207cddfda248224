"""Dynamic batching: queued items are run in batches by a single thread.

If a batch fails, its items are run again one by one, so that one bad item fails alone. The batch size is the one that
gives the highest throughput for the items in the queue. A GPU runs only the sizes that are warmed up, and a larger
batch costs next to nothing, so batches are padded to the next of these sizes. A CPU runs every size without padding, so
a batch takes all items in the queue, unless smaller batches are faster.

``serve.engine.classifier`` batches decoded images with it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

_OVERHEAD_SECONDS = 2e-4  # per batch: stacking, building the answers, sending
_GOOD_ENOUGH = 0.9  # of the best rate: the times were measured once, on a machine that had other work too
_CLOSE_TIMEOUT_SECONDS = 10.0
_MAX_BATCHES_WAITING = 2  # one that is run next, one that is filled meanwhile


class Waiting(Protocol):
    """The interface of an item in the queue."""

    @property
    def deadline(self) -> float:
        """The time after which its result is useless, on the clock of ``time.monotonic``."""

    @property
    def cancelled(self) -> bool:
        """Whether its request was cancelled."""


Item = TypeVar("Item", bound=Waiting)
Result = TypeVar("Result")


@dataclass(frozen=True)
class BatchRun(Generic[Item, Result]):
    """A batch after its run.

    Attributes:
        items: The items of the batch.
        result: The result of the run. An exception if a run of a single item failed, and ``TimeoutError`` for items
            that were dropped.
        began: When the run began, on the clock of ``time.monotonic``.
        seconds: How long it took.
    """

    items: Sequence[Item]
    result: Result | Exception
    began: float
    seconds: float


def best_size(waiting: int, seconds_of: Mapping[int, float]) -> int:
    """The largest batch size that has at least 90 % of the best throughput for the items in the queue.

    Args:
        waiting: How many items are in the queue, at least one.
        seconds_of: How long a run of each size takes, padded or not.
    """
    rate_of = {size: min(waiting, size) / (seconds + _OVERHEAD_SECONDS) for size, seconds in seconds_of.items()}
    enough = _GOOD_ENOUGH * max(rate_of.values())
    return max(size for size, rate in rate_of.items() if rate >= enough)


class Batcher(Generic[Item, Result]):
    """Accepts items from any thread and runs them in batches in one thread: its own, or its caller's.

    Args:
        run: Runs a batch of at most the largest size. Called in that thread.
        deliver: Called in that thread with every batch after its run, and with ``TimeoutError`` for dropped items.
        seconds_of: How long a run of each size takes.
        max_wait: How long the first item of a batch may wait for more items, in seconds.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Result],
        deliver: Callable[[BatchRun[Item, Result]], None],
        seconds_of: Mapping[int, float],
        max_wait: float = 0.0,
    ) -> None:
        self.max_size = max(seconds_of)
        self._run = run
        self._deliver = deliver
        self._num_to_take = [min(num, best_size(num, seconds_of)) for num in range(1, self.max_size + 1)]
        self._max_wait = max_wait
        self._queue: deque[Item] = deque()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._running = threading.Lock()
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def has_thread(self) -> bool:
        """Whether it runs its batches itself."""
        return self._thread is not None

    def start(self) -> None:
        """Start a thread that runs the batches."""
        self._thread = threading.Thread(target=self._run_batches, name="batcher", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """How many items are in the queue and not in a batch yet."""
        return len(self._queue)

    def put(self, items: Sequence[Item]) -> None:
        """Append items to the queue, in order.

        If the batcher has a thread, the call waits while the queue has two batches: images wait before they are
        decoded, where requests take turns, and not here, where they do not.
        """
        with self._lock:
            while self._thread and len(self._queue) >= _MAX_BATCHES_WAITING * self.max_size and not self._closing:
                self._room.wait()
            was_empty = not self._queue
            self._queue.extend(items)
            if was_empty or len(self._queue) >= self.max_size:
                self._changed.notify()

    def run_one(self) -> None:
        """Run the next batch, if there is one, in the caller's thread; for a batcher that was not started.

        Any thread may call it. One batch is run at a time.
        """
        with self._running:
            if self._queue:
                self._drop_or_run(self._take())

    def close(self) -> None:
        """Run all queued items, then end the thread. A run that does not return within 10 s is abandoned."""
        with self._lock:
            self._closing = True
            self._changed.notify()
            self._room.notify_all()
        if self._thread:
            self._thread.join(_CLOSE_TIMEOUT_SECONDS)
        else:
            while self._queue:
                self.run_one()

    def _run_batches(self) -> None:
        while batch := self._next():
            self._drop_or_run(batch)

    def _next(self) -> list[Item]:
        """Wait for items and take a batch from the queue; empty after ``close``."""
        with self._lock:
            while not self._queue and not self._closing:
                self._changed.wait()
            if self._max_wait:
                self._wait_for_more()
            batch = self._take() if self._queue else []
            self._room.notify_all()
            return batch

    def _wait_for_more(self) -> None:
        until = time.monotonic() + self._max_wait
        while len(self._queue) < self.max_size and not self._closing:
            remaining = until - time.monotonic()
            if remaining <= 0 or not self._changed.wait(remaining):
                return

    def _take(self) -> list[Item]:
        num = self._num_to_take[min(len(self._queue), self.max_size) - 1]
        return [self._queue.popleft() for _ in range(num)]

    def _drop_or_run(self, batch: list[Item]) -> None:
        now = time.monotonic()
        dropped = [item for item in batch if item.cancelled or item.deadline <= now]
        if dropped:
            self._deliver(BatchRun(dropped, TimeoutError(), now, 0.0))
            batch = [item for item in batch if item not in dropped]
        if batch:
            self._run_and_deliver(batch)

    def _run_and_deliver(self, batch: Sequence[Item]) -> None:
        began = time.monotonic()
        try:
            result: Result | Exception = self._run(batch)
        except Exception as reason:  # any error is the result of these items
            if len(batch) > 1:  # run the items one by one, so that only the bad one fails
                for item in batch:
                    self._run_and_deliver([item])
                return
            result = reason
        self._deliver(BatchRun(batch, result, began, time.monotonic() - began))
