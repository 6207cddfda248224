"""Batches out of whatever waits: one thread owns the run, and nobody else's mistake fails an item.

A run costs as much as the size it is padded to. So the owner takes the size that serves the waiting items fastest: on a
GPU, where only some sizes are warm and a larger batch costs next to nothing, it pads up; on a CPU, where every size is
run as it is, it takes all that wait, unless fewer at a time are faster.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

_AROUND_A_RUN_SECONDS = 2e-4  # stacking, answering, sending: once a batch
_NEARLY = 0.9  # the times were measured once, on a machine that had other work too
_END_SECONDS = 10.0


class Waiting(Protocol):
    """What a batcher asks of an item."""

    @property
    def deadline(self) -> float:
        """When its answer is of no use any more, on the clock of ``time.monotonic``."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""


Item = TypeVar("Item", bound=Waiting)
Result = TypeVar("Result")


@dataclass(frozen=True)
class BatchRun(Generic[Item, Result]):
    """A batch after its run.

    Attributes:
        items: What was in it.
        result: What the run gave, or what it raised for the one item of a batch that was repeated.
        began: When the run began, on the clock of ``time.monotonic``.
        seconds: How long it took.
    """

    items: Sequence[Item]
    result: Result | Exception
    began: float
    seconds: float


def best_size(waiting: int, seconds_of: Mapping[int, float]) -> int:
    """The size to run now: the one that answers most of the waiting items in a second, or nearly.

    Args:
        waiting: How many items wait, at least one.
        seconds_of: How long a run of each size takes, padded or not.
    """
    rate_of = {size: min(waiting, size) / (seconds + _AROUND_A_RUN_SECONDS) for size, seconds in seconds_of.items()}
    enough = _NEARLY * max(rate_of.values())
    return max(size for size, rate in rate_of.items() if rate >= enough)


class Batcher(Generic[Item, Result]):
    """Takes items from any thread and runs them in batches in one thread: its own, or that of its caller.

    Args:
        run: Runs at most the largest size of items. Called by the one thread.
        deliver: Given every batch after its run, and every dropped item with ``TimeoutError``. Called by that thread.
        seconds_of: How long a run of each size takes.
        max_wait: How long the first item of a batch may wait for others, in seconds.
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
        self._changed = threading.Condition(threading.Lock())
        self._closing = False
        self._owner: threading.Thread | None = None

    def start(self) -> None:
        """Run batches in a thread of its own from now on."""
        self._owner = threading.Thread(target=self._own, name="owner", daemon=True)
        self._owner.start()

    @property
    def num_waiting(self) -> int:
        """Items that were put and are in no batch yet."""
        return len(self._queue)

    def put(self, items: Sequence[Item]) -> None:
        """Queue items in order."""
        with self._changed:
            was_empty = not self._queue
            self._queue.extend(items)
            if was_empty or len(self._queue) >= self.max_size:
                self._changed.notify()

    def run_one(self) -> None:
        """Run the next batch, if anything waits, in the caller's thread; for a batcher that was not started."""
        if self._queue:
            self._drop_or_run(self._take())

    def close(self) -> None:
        """Run what waits, then end the thread; a run that does not come back is left behind."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._owner:
            self._owner.join(_END_SECONDS)
        else:
            while self._queue:
                self.run_one()

    def _own(self) -> None:
        while batch := self._next():
            self._drop_or_run(batch)

    def _next(self) -> list[Item]:
        """Wait for items and take the best number of them; empty at the end."""
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            if self._max_wait:
                self._wait_for_more()
            return self._take() if self._queue else []

    def _wait_for_more(self) -> None:
        until = time.monotonic() + self._max_wait
        while len(self._queue) < self.max_size and not self._closing:
            left = until - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
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
            self._attempt(batch)

    def _attempt(self, batch: Sequence[Item]) -> None:
        began = time.monotonic()
        try:
            result: Result | Exception = self._run(batch)
        except Exception as reason:  # whatever it is, it belongs to the items
            if len(batch) > 1:  # only the culprit shall fail
                for item in batch:
                    self._attempt([item])
                return
            result = reason
        self._deliver(BatchRun(batch, result, began, time.monotonic() - began))
