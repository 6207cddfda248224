"""Dynamic batching without processes, sockets or models: the items are numbers."""

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
    """Squares numbers. With ``hold``, runs block until ``go`` is set, so a test controls what is in the queue."""

    def __init__(self, hold: bool = False) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()
        if not hold:
            self.go.set()
        self.batches: list[list[int]] = []
        self.delivered: queue.SimpleQueue[BatchRun[Number, list[int]]] = queue.SimpleQueue()

    def run(self, items: Sequence[Number]) -> list[int]:
        self.begun.set()
        assert self.go.wait(30)
        self.batches.append([item.value for item in items])
        if any(item.value < 0 for item in items):
            raise ValueError("a negative number")
        return [item.value**2 for item in items]

    def results(self, num: int) -> dict[int, int | str]:
        """Wait for ``num`` results: the square or the name of the error, by the value of the item."""
        results: dict[int, int | str] = {}
        while len(results) < num:
            batch = self.delivered.get(timeout=30)
            if isinstance(batch.result, Exception):
                results |= {item.value: type(batch.result).__name__ for item in batch.items}
            else:
                results |= {item.value: square for item, square in zip(batch.items, batch.result, strict=True)}
        return results


@contextmanager
def batching(
    squares: Squares, seconds_of: dict[int, float] | None = None, max_wait: float = 0.0
) -> Iterator[Batcher[Number, list[int]]]:
    batcher = Batcher(squares.run, squares.delivered.put, seconds_of or AS_ON_A_GPU, max_wait)
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
def test_a_gpu_pads_batches_and_a_cpu_runs_the_whole_queue_unless_smaller_batches_are_faster(
    waiting: int, on_a_gpu: int, on_a_cpu: int, with_small_caches: int
) -> None:
    gpu, cpu, small = (best_size(waiting, times) for times in (AS_ON_A_GPU, AS_ON_A_CPU, SMALL_CACHES))
    assert min(waiting, gpu) == min(waiting, on_a_gpu)
    assert min(waiting, cpu) == on_a_cpu
    assert small == with_small_caches


def test_items_queued_during_a_run_become_one_batch_in_order() -> None:
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


def test_only_the_bad_item_of_a_batch_fails() -> None:
    squares = Squares(hold=True)
    with batching(squares) as batcher:
        batcher.put([Number(9)])
        assert squares.begun.wait(30)
        batcher.put([Number(1), Number(-2), Number(3)])
        squares.go.set()
        assert squares.results(4) == {9: 81, 1: 1, -2: "ValueError", 3: 9}
    assert squares.batches == [[9], [1, -2, 3], [1], [-2], [3]]


def test_cancelled_and_late_items_are_delivered_as_timeouts_and_never_run() -> None:
    squares = Squares(hold=True)
    with batching(squares) as batcher:
        batcher.put([Number(9)])
        assert squares.begun.wait(30)
        cancelled = Number(2)
        batcher.put([Number(1), cancelled, Number(3, deadline=0.0)])
        cancelled.cancelled = True
        squares.go.set()
        assert squares.results(4) == {9: 81, 1: 1, 2: "TimeoutError", 3: "TimeoutError"}
    assert squares.batches == [[9], [1]]


def test_the_first_item_of_a_batch_waits_at_most_max_wait_for_more() -> None:
    squares = Squares()
    with batching(squares, {1: 0.001, 2: 0.001}, max_wait=30) as batcher:
        batcher.put([Number(1)])
        batcher.put([Number(2)])  # a full batch must not wait for 30 s, or the test times out
        assert squares.results(2) == {1: 1, 2: 4}
    assert squares.batches == [[1, 2]]
    with batching(squares, max_wait=0.01) as batcher:
        batcher.put([Number(5)])
        assert squares.results(1) == {5: 25}


def test_close_runs_all_queued_items() -> None:
    squares = Squares()
    with batching(squares) as batcher:
        batcher.put([Number(value) for value in range(50)])
    assert squares.results(50) == {value: value**2 for value in range(50)}


def test_a_batcher_without_a_thread_runs_one_batch_per_call_of_run_one() -> None:
    squares = Squares()
    batcher = Batcher(squares.run, squares.delivered.put, {1: 0.001, 2: 0.001})
    batcher.put([Number(value) for value in (1, -2, 3, 4, 5)])
    batcher.run_one()
    assert squares.batches == [[1, -2], [1], [-2]]
    assert batcher.num_waiting == 3
    batcher.close()
    assert squares.results(5) == {1: 1, -2: "ValueError", 3: 9, 4: 16, 5: 25}


def test_a_batcher_without_a_thread_runs_one_batch_at_a_time_whichever_threads_call_run_one() -> None:
    running = threading.Lock()
    squares = Squares()

    def run(items: Sequence[Number]) -> list[int]:
        assert running.acquire(blocking=False), "two batches run at the same time"
        try:
            return squares.run(items)
        finally:
            running.release()

    batcher = Batcher(run, squares.delivered.put, {1: 0.001, 2: 0.001})
    batcher.put([Number(value) for value in range(400)])
    threads = [threading.Thread(target=lambda: [batcher.run_one() for _ in range(100)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert squares.results(400) == {value: value**2 for value in range(400)}
    for thread in threads:
        thread.join(30)


def test_images_wait_before_they_are_decoded_when_two_batches_wait_to_be_run() -> None:
    squares = Squares(hold=True)
    with batching(squares, {1: 0.001, 2: 0.001}) as batcher:
        num_waiting: list[int] = []

        def put() -> None:
            for value in range(100):
                batcher.put([Number(value)])
                num_waiting.append(batcher.num_waiting)

        thread = threading.Thread(target=put)
        thread.start()
        assert squares.begun.wait(30)
        squares.go.set()
        assert squares.results(100) == {value: value**2 for value in range(100)}
        thread.join(30)
    assert max(num_waiting) <= 4
