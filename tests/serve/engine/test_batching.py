"""Batches out of whatever waits, without processes, sockets or networks: the items are numbers."""

import math
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from serve.engine.batching import Batcher, BatchRun, best_size

POWERS = (1, 2, 4, 8, 16, 32)
AS_ON_A_GPU = dict.fromkeys(POWERS, 0.002)
AS_ON_A_CPU = {size: 0.001 * size for size in range(1, 33)}
SMALL_CACHES = {size: 0.001 * (size if size <= 8 else 2 * size) for size in range(1, 33)}


@dataclass(eq=False)
class Number:
    value: int
    deadline: float = math.inf
    cancelled: bool = False


class Squares:
    """Squares numbers; holds the first run until it is let go, so that a test knows what waits behind it."""

    def __init__(self, hold: bool = False) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()
        if not hold:
            self.go.set()
        self.batches: list[list[int]] = []
        self.told: queue.SimpleQueue[BatchRun[Number, list[int]]] = queue.SimpleQueue()

    def run(self, items: Sequence[Number]) -> list[int]:
        self.begun.set()
        assert self.go.wait(30)
        self.batches.append([item.value for item in items])
        if any(item.value < 0 for item in items):
            raise ValueError("a negative number")
        return [item.value**2 for item in items]

    def results(self, num: int) -> dict[int, int | str]:
        """What became of so many items, by their value."""
        found: dict[int, int | str] = {}
        while len(found) < num:
            ran = self.told.get(timeout=30)
            if isinstance(ran.result, Exception):
                found |= {item.value: type(ran.result).__name__ for item in ran.items}
            else:
                found |= {item.value: square for item, square in zip(ran.items, ran.result, strict=True)}
        return found


@contextmanager
def batching(
    squares: Squares, seconds_of: dict[int, float] | None = None, max_wait: float = 0.0
) -> Iterator[Batcher[Number, list[int]]]:
    batcher = Batcher(squares.run, squares.told.put, seconds_of or AS_ON_A_GPU, max_wait)
    batcher.start()
    try:
        yield batcher
    finally:
        squares.go.set()
        batcher.close()


@pytest.mark.parametrize(
    ("waiting", "on_a_gpu", "on_a_cpu", "with_small_caches"),
    [(1, 1, 1, 1), (2, 2, 2, 2), (3, 4, 3, 3), (5, 8, 5, 5), (15, 16, 15, 8), (20, 32, 20, 8), (99, 32, 32, 8)],
)
def test_a_gpu_pads_up_and_a_cpu_takes_all_that_wait_unless_fewer_are_faster(
    waiting: int, on_a_gpu: int, on_a_cpu: int, with_small_caches: int
) -> None:
    gpu, cpu, small = (best_size(waiting, times) for times in (AS_ON_A_GPU, AS_ON_A_CPU, SMALL_CACHES))
    assert min(waiting, gpu) == min(waiting, on_a_gpu)
    assert min(waiting, cpu) == on_a_cpu
    assert small == with_small_caches


def test_what_waits_behind_a_run_becomes_one_batch_in_its_order() -> None:
    squares = Squares(hold=True)
    with batching(squares) as batcher:
        batcher.put([Number(0)])
        assert squares.begun.wait(30)
        for value in (3, 1, 2):
            batcher.put([Number(value)])
        squares.go.set()
        assert squares.results(4) == {0: 0, 3: 9, 1: 1, 2: 4}
    assert squares.batches == [[0], [3, 1, 2]]


def test_no_batch_is_larger_than_the_largest_size() -> None:
    squares = Squares()
    with batching(squares) as batcher:
        batcher.put([Number(value) for value in range(100)])
        assert squares.results(100) == {value: value**2 for value in range(100)}
    assert max(map(len, squares.batches)) <= 32


def test_only_the_culprit_of_a_batch_fails() -> None:
    squares = Squares(hold=True)
    with batching(squares) as batcher:
        batcher.put([Number(9)])
        assert squares.begun.wait(30)
        batcher.put([Number(1), Number(-2), Number(3)])
        squares.go.set()
        assert squares.results(4) == {9: 81, 1: 1, -2: "ValueError", 3: 9}
    assert squares.batches == [[9], [1, -2, 3], [1], [-2], [3]]


def test_what_is_cancelled_or_late_is_told_and_never_run() -> None:
    squares = Squares(hold=True)
    with batching(squares) as batcher:
        batcher.put([Number(9)])
        assert squares.begun.wait(30)
        left = Number(2)
        batcher.put([Number(1), left, Number(3, deadline=0.0)])
        left.cancelled = True
        squares.go.set()
        assert squares.results(4) == {9: 81, 1: 1, 2: "TimeoutError", 3: "TimeoutError"}
    assert squares.batches == [[9], [1]]


def test_the_first_of_a_batch_waits_for_others_only_as_long_as_it_may() -> None:
    squares = Squares()
    with batching(squares, {1: 0.001, 2: 0.001}, max_wait=30) as batcher:
        batcher.put([Number(1)])
        batcher.put([Number(2)])  # a full batch does not wait out the 30 s: the test would time out
        assert squares.results(2) == {1: 1, 2: 4}
    assert squares.batches == [[1, 2]]
    with batching(squares, max_wait=0.01) as batcher:
        batcher.put([Number(5)])
        assert squares.results(1) == {5: 25}


def test_the_end_waits_for_what_was_put() -> None:
    squares = Squares()
    with batching(squares) as batcher:
        batcher.put([Number(value) for value in range(50)])
    assert squares.results(50) == {value: value**2 for value in range(50)}


def test_a_batcher_without_a_thread_runs_one_batch_after_another_when_asked() -> None:
    squares = Squares()
    batcher = Batcher(squares.run, squares.told.put, {1: 0.001, 2: 0.001})
    batcher.put([Number(value) for value in (1, -2, 3, 4, 5)])
    batcher.run_one()
    assert squares.batches == [[1, -2], [1], [-2]]
    assert batcher.num_waiting == 3
    batcher.close()
    assert squares.results(5) == {1: 1, -2: "ValueError", 3: 9, 4: 16, 5: 25}
