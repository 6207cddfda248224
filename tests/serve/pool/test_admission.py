"""Which requests are accepted, in a simulation of engine processes on a virtual clock."""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from serve.pool.admission import ImageQueue, expected_seconds_each, require_room
from serve.problems import ProblemError
from serve.settings import Settings

NEVER = 1e9
MAX_BATCH = 32
ENGINES: dict[str, Callable[[int], float]] = {
    "small network": lambda size: 0.0005 + 0.0012 * size,
    "network on a GPU": lambda size: 0.02 + 0.0006 * size,
    "photographs": lambda size: 0.02 * size,
}
"""Seconds for a batch of each size."""


def queue_of(num_images: int, seconds_each: float) -> ImageQueue:
    queue = ImageQueue()
    queue.seconds_each = seconds_each
    for _ in range(num_images):
        queue.add(1, 0.0)
    return queue


def retry_after(num_images: int, queue: ImageQueue, seconds_left: float = NEVER, **limits: float) -> str | None:
    """The Retry-After of the rejection; None if the request is accepted."""
    try:
        require_room(num_images, queue.num_images, queue, seconds_left, Settings.model_validate(limits))
    except ProblemError as error:
        assert error.problem.status == 429
        assert error.headers is not None
        return error.headers["Retry-After"]
    return None


@dataclass(eq=False)
class Request:
    num_images: int
    num_left: int
    sent_at: float
    deadline: float
    on_result: Callable[[bool], None]


@dataclass(eq=False)
class Process:
    """Takes up to 32 images from its requests, which take turns, and runs them as one batch."""

    queue: ImageQueue = field(default_factory=ImageQueue)
    requests: deque[Request] = field(default_factory=deque)
    running: bool = False


class Simulation:
    """Engine processes on a virtual clock, with the admission of the pool.

    Attributes:
        now: The time in seconds.
        refused: Requests that got 429.
        late: Requests that were not answered before their deadline.
        seconds: The time that each answered request took.
        images: Images that were answered in time.
    """

    def __init__(self, engine: str, num_processes: int = 1, factor: float = 1.0) -> None:
        """``factor`` is that by which the first estimate of the speed is wrong."""
        self.now = 0.0
        self.refused = self.late = self.images = 0
        self.seconds: list[float] = []
        self._seconds_of = ENGINES[engine]
        self._limits = Settings()
        self._processes = [Process() for _ in range(num_processes)]
        estimate = expected_seconds_each({size: self._seconds_of(size) for size in (1, 2, 4, 8, 16, MAX_BATCH)})
        for process in self._processes:
            process.queue.seconds_each = factor * estimate
        self.capacity = num_processes * MAX_BATCH / self._seconds_of(MAX_BATCH)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), event))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()
        self.now = until

    def send(self, num_images: int, timeout: float, on_result: Callable[[bool], None] = lambda _: None) -> None:
        process = min(self._processes, key=lambda process: process.queue.num_images)
        num_waiting = sum(process.queue.num_images for process in self._processes)
        try:
            require_room(num_images, num_waiting, process.queue, timeout, self._limits)
        except ProblemError:
            self.refused += 1
            on_result(False)
            return
        process.queue.add(num_images, self.now)
        process.requests.append(Request(num_images, num_images, self.now, self.now + timeout, on_result))
        if not process.running:
            self._run_batch(process)

    def open_loop(self, rate: float, until: float, timeout: float = 10.0, sizes: tuple[int, ...] = (1,)) -> None:
        """Requests that arrive independently of each other, ``rate`` images per second on average."""
        chance = random.Random(7)
        mean = sum(sizes) / len(sizes)

        def arrive() -> None:
            self.send(chance.choice(sizes), timeout)
            if (then := self.now + chance.expovariate(rate / mean)) < until:
                self.at(then, arrive)

        self.at(self.now, arrive)

    def closed_loop(self, num_clients: int) -> None:
        """Clients that send the next request when they have the answer; after a rejection they wait for a second."""

        def client(answered: bool) -> None:
            self.at(self.now if answered else self.now + 1, lambda: self.send(1, 10.0, client))

        for _ in range(num_clients):
            client(True)

    def _run_batch(self, process: Process) -> None:
        room = MAX_BATCH
        batch: dict[Request, None] = {}
        dropped = []
        while process.requests and room:
            request = process.requests.popleft()
            if request.deadline <= self.now:
                dropped.append(request)
                continue
            request.num_left -= 1
            room -= 1
            batch[request] = None
            if request.num_left:
                process.requests.append(request)
        self._answer(process, dropped, 0)
        process.running = bool(batch)
        if batch:
            size = MAX_BATCH - room

            def end() -> None:
                self._answer(process, [request for request in batch if not request.num_left], size)
                self._run_batch(process)

            self.at(self.now + self._seconds_of(size), end)

    def _answer(self, process: Process, requests: list[Request], batch_size: int) -> None:
        for request in requests:
            in_time = self.now <= request.deadline
            process.queue.remove(request.num_images)
            num_processed = request.num_images if in_time else min(request.num_images, batch_size)
            seconds, allowed = self.now - request.sent_at, min(1.0, request.deadline - request.sent_at)
            process.queue.measure(num_processed, batch_size, seconds, self.now, allowed)
            self.seconds.append(seconds)
            self.late += not in_time
            self.images += request.num_images if in_time else 0
            request.on_result(True)


def test_the_limit_counts_the_images_of_all_requests() -> None:
    queue = queue_of(8, seconds_each=0.01)
    assert retry_after(2, queue, max_queue_images=10, max_images=10) is None
    assert retry_after(3, queue, max_queue_images=10, max_images=10) == "1"
    slow = queue_of(8, seconds_each=2.0)
    assert retry_after(4, slow, max_queue_images=10, max_images=10, max_queue_seconds=60) == "4"  # two images


def test_a_request_that_would_wait_longer_than_a_second_gets_429_with_the_seconds_until_it_would_not() -> None:
    assert retry_after(1, queue_of(100, seconds_each=0.01)) is None
    assert retry_after(1, queue_of(101, seconds_each=0.01)) == "1"
    assert retry_after(1, queue_of(101, seconds_each=0.05)) == "5"  # of the 5.05 s, 1 s is allowed
    assert retry_after(1, queue_of(101, seconds_each=0.05), max_queue_seconds=6) is None


def test_a_deadline_shorter_than_the_limit_counts() -> None:
    queue = queue_of(40, seconds_each=0.01)
    assert retry_after(1, queue, seconds_left=0.42) is None
    assert retry_after(1, queue, seconds_left=0.40) == "1"
    assert retry_after(20, queue, seconds_left=0.59) == "1"  # its own images need 0.2 s
    assert retry_after(20, queue, seconds_left=0.61) is None


def test_a_request_of_any_size_is_accepted_while_no_other_one_waits() -> None:
    assert retry_after(64, queue_of(0, seconds_each=1.0), seconds_left=0.1) is None


def test_while_no_process_runs_only_the_number_of_images_is_limited() -> None:
    assert retry_after(1, queue_of(1000, seconds_each=0.0), seconds_left=0.01) is None
    assert retry_after(25, queue_of(1000, seconds_each=0.0)) == "1"


@pytest.mark.parametrize("num_processes", [1, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_at_half_load_no_request_of_a_hundred_thousand_is_refused(engine: str, num_processes: int) -> None:
    simulation = Simulation(engine, num_processes)
    seconds = 100_000 / (0.5 * simulation.capacity)
    simulation.open_loop(0.5 * simulation.capacity, seconds)
    simulation.run(seconds + 10)
    # three standard deviations of the number that arrives
    assert simulation.images == pytest.approx(100_000, abs=3 * 100_000**0.5)
    assert (simulation.refused, simulation.late) == (0, 0)


@pytest.mark.parametrize("load", [2, 10])
@pytest.mark.parametrize("num_processes", [1, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_under_overload_the_capacity_is_used_and_every_accepted_request_is_answered_within_a_second_and_a_batch(
    engine: str, num_processes: int, load: int
) -> None:
    simulation = Simulation(engine, num_processes)
    simulation.open_loop(load * simulation.capacity, 8)
    simulation.run(8)
    assert simulation.images > 0.9 * 8 * simulation.capacity
    assert max(simulation.seconds) < 1 + ENGINES[engine](MAX_BATCH)
    assert simulation.late == 0


@pytest.mark.parametrize("factor", [1 / 20, 20])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_estimate_that_is_wrong_is_corrected_within_seconds(engine: str, factor: float) -> None:
    simulation = Simulation(engine, 1, factor)
    simulation.open_loop(2 * simulation.capacity, 30)
    simulation.run(5)
    before = simulation.images
    simulation.seconds.clear()
    simulation.run(30)
    assert simulation.images - before > 0.9 * 25 * simulation.capacity
    assert max(simulation.seconds) < 1 + ENGINES[engine](MAX_BATCH)


@pytest.mark.parametrize("timeout", [0.1, 0.3])
@pytest.mark.parametrize("engine", ENGINES)
def test_under_overload_with_short_deadlines_no_time_is_lost_with_late_answers(engine: str, timeout: float) -> None:
    simulation = Simulation(engine)
    simulation.open_loop(2 * simulation.capacity, 20, timeout)
    simulation.run(20)
    # a deadline of 0.1 s allows only batches of a few images, which are slower on a GPU
    assert simulation.images > 0.8 * 20 * simulation.capacity
    assert simulation.late == 0


@pytest.mark.parametrize("num_processes", [1, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_requests_of_many_images_among_single_ones_keep_within_the_limit(engine: str, num_processes: int) -> None:
    simulation = Simulation(engine, num_processes)
    simulation.open_loop(2 * simulation.capacity, 100, sizes=(1, 32))
    simulation.run(100)
    # in one process, a queue of 1 s holds one or two requests of 0.64 s; it is empty at times
    assert simulation.images > 0.8 * 100 * simulation.capacity
    # a request runs in up to two batches; and all of its images count when the last one is answered, so that the
    # measured speed varies by a quarter
    assert max(simulation.seconds) < 1.25 + 2 * ENGINES[engine](MAX_BATCH)


@pytest.mark.parametrize("engine", ["small network", "network on a GPU"])
def test_128_clients_that_wait_for_their_answers_are_never_refused(engine: str) -> None:
    simulation = Simulation(engine)
    simulation.closed_loop(128)
    simulation.run(30)
    assert simulation.refused == 0
    assert simulation.images > 0.98 * 30 * simulation.capacity


@pytest.mark.parametrize("num_clients", [40, 128])
def test_as_many_clients_as_can_be_answered_within_a_second_are_not_refused(num_clients: int) -> None:
    simulation = Simulation("photographs")  # 50 per second
    simulation.closed_loop(num_clients)
    simulation.run(30)
    assert (simulation.refused == 0) is (num_clients < simulation.capacity)


def test_images_from_a_few_clients_do_not_make_a_burst_look_slow() -> None:
    simulation = Simulation("network on a GPU")
    simulation.closed_loop(1)  # 48 per second, one at a time
    simulation.run(30)
    for _ in range(600):  # 0.8 s of work in full batches, 12 s one at a time
        simulation.send(1, 10.0)
    assert simulation.refused == 0


def test_a_stall_under_load_is_forgotten() -> None:
    queue = queue_of(2, seconds_each=0.01)
    queue.num_images -= 1
    queue.measure(1, 1, 0.3, 0.3, 1.0)
    queue.add(1, 0.3)
    queue.num_images -= 1
    queue.measure(1, 1, 60.0, 60.3, 1.0)  # the machine was suspended
    queue.add(1, 60.3)
    queue.num_images -= 1
    queue.measure(1, 1, 60.0, 60.31, 1.0)
    assert retry_after(1, queue) == "30"  # one image waits, and it seems to need half a minute
    queue.num_images -= 1
    queue.measure(1, 1, 0.02, 60.32, 1.0)  # the queue is empty, and the image needed 0.02 s
    queue.add(40, 60.4)
    assert retry_after(1, queue) is None


def test_images_that_were_rejected_or_dropped_do_not_make_the_queue_look_fast() -> None:
    queue = queue_of(1, seconds_each=0.01)
    queue.num_images -= 1
    queue.measure(1, 0, 0.0001, 0.0001, 1.0)  # not an image
    assert queue.seconds_each == 0.01


def test_a_request_waits_for_its_turns_and_not_for_all_images_of_others() -> None:
    queue = ImageQueue()
    queue.seconds_each = 0.02
    for _ in range(2):
        queue.add(64, 0.0)
    assert queue.wait_seconds(1) == pytest.approx(0.04)  # one image of each of the two
    assert queue.wait_seconds(64) == pytest.approx(2.56)
    assert retry_after(1, queue) is None
    assert retry_after(64, queue) == "2"
