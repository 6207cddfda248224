"""Engine processes as the front sees them: real ones that are killed and stopped, and threads that tests can hold."""

import asyncio
import os
import queue
import signal
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from serve_toys import (
    HeldEngine,
    ToyEngine,
    encoded,
    expected_logits,
    held_engine,
    toy_bundle,
    toy_engine,
    toy_pixels,
    toy_process,
    write_toy_bundle,
)

from ltkd.errors import BundleError, DeviceError
from serve.engine.messages import EngineConfig, OutputKind, PredictionFacts
from serve.pool.dispatcher import EnginePool
from serve.pool.engine_process import ChildProcess, RequestResult, launch
from serve.problems import Problem, ProblemError, problem_of
from serve.settings import Settings

PNG = encoded(toy_pixels(3))
SOON = 60.0


def deadline(seconds: float = SOON) -> float:
    return time.monotonic() + seconds


@asynccontextmanager
async def toy_worker(
    engine: ToyEngine | None = None, settings: Settings | None = None, num_threads: int = 1
) -> AsyncIterator[EnginePool]:
    settings = settings or Settings()
    toy = engine or toy_engine()
    worker = await EnginePool.start_with(lambda: toy_process(toy, settings.max_pixels, num_threads), settings)
    try:
        yield worker
    finally:
        if isinstance(toy, HeldEngine):
            toy.go.set()
        await worker.close(5)


def run(test: Callable[[], Coroutine[None, None, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop go on until something is so; the test's own limit bounds it."""
    while not condition():
        await asyncio.sleep(0.005)


async def problem_of_call(call: Awaitable[RequestResult]) -> Problem:
    with pytest.raises(ProblemError) as said:
        await call
    return said.value.problem


@pytest.mark.parametrize("num_threads", [1, 3])
def test_answers_come_back_in_order_with_the_problems_in_their_places(num_threads: int) -> None:
    async def test() -> None:
        known = problem_of(400, "not base64")
        async with toy_worker(num_threads=num_threads) as worker:
            classified = await worker.classify([known, PNG, b"junk", PNG], 2, deadline())
        first, second, third, fourth = classified.results
        assert first == known
        assert isinstance(third, Problem) and third.status == 415
        assert isinstance(second, bytes) and second == fourth
        assert [seen is None for seen in classified.seen] == [True, False, True, False]
        assert isinstance(classified.seen[1], PredictionFacts)
        assert set(classified.stage_seconds) == {"decode", "queue", "infer"}

    run(test)


def test_logits_come_back_as_they_were(num: int = 5) -> None:
    async def test() -> None:
        images = np.stack([toy_pixels(seed) for seed in range(num)])
        async with toy_worker() as worker:
            pixels = [pixels_SS3.tobytes() for pixels_SS3 in images]
            of_pixels = (await worker.ask(pixels, OutputKind.LOGITS_OF_PIXELS, 1, deadline())).results
            (row, refused) = (await worker.ask([PNG, b"junk"], OutputKind.LOGITS, 1, deadline())).results
        assert of_pixels == [row_C.tobytes() for row_C in expected_logits(images)]
        assert isinstance(refused, Problem)
        assert isinstance(row, bytes)
        # a matmul of another number of rows: float32 sums of 192 terms of size 1
        np.testing.assert_allclose(np.frombuffer(row, np.float32), expected_logits(toy_pixels(3)[None])[0], atol=1e-4)

    run(test)


def test_a_call_that_is_cancelled_is_never_run() -> None:
    async def test() -> None:
        engine = held_engine()
        async with toy_worker(engine) as worker:
            first = asyncio.create_task(worker.classify([PNG], 1, deadline()))
            await until(engine.begun.is_set)
            leaving = asyncio.create_task(worker.classify([PNG] * 7, 1, deadline()))
            await until(lambda: worker.num_waiting == 8)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            staying = asyncio.create_task(worker.classify([PNG], 1, deadline()))
            await until(lambda: worker.num_waiting == 9)
            engine.go.set()
            await asyncio.gather(first, staying)
            await until(lambda: worker.num_waiting == 0)
        assert sum(engine.sizes) == 2

    run(test)


def test_a_call_that_is_late_is_504_at_once_and_never_run() -> None:
    async def test() -> None:
        engine = held_engine()
        async with toy_worker(engine) as worker:
            first = asyncio.create_task(worker.classify([PNG], 1, deadline()))
            await until(engine.begun.is_set)
            late = await problem_of_call(worker.classify([PNG] * 3, 1, deadline(0.05)))
            past = await problem_of_call(worker.classify([PNG], 1, deadline(-1)))
            assert not first.done()  # the network is still held: 504 did not wait for it
            engine.go.set()
            await first
        assert (late.status, past.status) == (504, 504)
        assert engine.sizes == [1]

    run(test)


def test_beyond_the_bound_it_is_429_with_the_seconds_that_the_queue_takes() -> None:
    async def test() -> None:
        engine = held_engine()
        engine.seconds_of = {1: 3.0, 4: 12.0}  # what it says it needs for an image: 3 s
        async with toy_worker(engine, Settings(max_queue_images=100, max_queue_seconds=10)) as worker:
            calls = [asyncio.create_task(worker.classify([PNG], 1, deadline())) for _ in range(4)]
            await until(lambda: worker.num_waiting == 4)
            with pytest.raises(ProblemError) as said:
                await worker.classify([PNG], 1, deadline())
            assert said.value.problem.status == 429
            assert said.value.headers == {"Retry-After": "12"}
            engine.go.set()
            await asyncio.gather(*calls)
            await worker.classify([PNG], 1, deadline())  # and there is a place again

    run(test)


def test_more_images_than_have_a_place_are_429() -> None:
    async def test() -> None:
        engine = held_engine()
        async with toy_worker(engine, Settings(max_queue_images=4, max_images=4)) as worker:
            call = asyncio.create_task(worker.classify([PNG] * 3, 1, deadline()))
            await until(lambda: worker.num_waiting == 3)
            assert (await problem_of_call(worker.classify([PNG] * 2, 1, deadline()))).status == 429
            engine.go.set()
            await call

    run(test)


def test_closing_answers_what_was_accepted_and_accepts_no_more() -> None:
    async def test() -> None:
        engine = held_engine()
        async with toy_worker(engine) as worker:
            calls = [asyncio.create_task(worker.classify([PNG], 1, deadline())) for _ in range(3)]
            await until(lambda: worker.num_waiting == 3)
            closing = asyncio.create_task(worker.close(20))
            await asyncio.sleep(0)
            assert (await problem_of_call(worker.classify([PNG], 1, deadline()))).status == 503
            engine.go.set()
            assert [len((await call).results) for call in calls] == [1, 1, 1]
            await closing

    run(test)


def real_process(bundle: Path, started: list[ChildProcess]) -> Callable[[], ChildProcess]:
    def start() -> ChildProcess:
        orders = EngineConfig(
            bundle=bundle, device="cpu", precision=None, max_batch=4, max_wait_ms=None, max_pixels=10**6
        )
        started.append(launch(orders))
        return started[-1]

    return start


def test_a_killed_process_costs_its_requests_a_503_and_is_replaced() -> None:
    async def test() -> None:
        started: list[ChildProcess] = []
        changes: list[bool] = []
        worker = await EnginePool.start_with(real_process(toy_bundle(), started), Settings())
        worker.on_change = lambda: changes.append(worker.alive)
        try:
            before = await worker.classify([PNG], 1, deadline())
            os.kill(started[0].pid, signal.SIGSTOP)  # so that it certainly has the requests in hand
            calls = [asyncio.create_task(worker.classify([PNG], 1, deadline())) for _ in range(5)]
            await until(lambda: worker.num_waiting == 5)
            os.kill(started[0].pid, signal.SIGKILL)
            problems = [await problem_of_call(call) for call in calls]
            assert [problem.status for problem in problems] == [503] * 5
            assert not worker.alive
            assert (await worker.classify([PNG], 1, deadline())).results == before.results
            assert (len(started), changes) == (2, [False, True])
        finally:
            await worker.close(5)

    run(test)


@asynccontextmanager
async def between_two_processes(
    then: Callable[[], ChildProcess], settings: Settings | None = None
) -> AsyncIterator[tuple[EnginePool, asyncio.Event]]:
    """A worker whose process has died, and what must be set before ``then`` may start the next one."""
    launched: list[ChildProcess] = []
    may_start = asyncio.Event()

    def start() -> ChildProcess:
        launched.append(toy_process(toy_engine()) if not launched else then())
        return launched[-1]

    worker = await EnginePool.start_with(start, settings or Settings())
    connect = worker._connect

    async def connect_later() -> None:
        await may_start.wait()
        await connect()

    worker._connect = connect_later  # type: ignore[method-assign]
    launched[0].kill()
    await until(lambda: not worker.alive)
    try:
        yield worker, may_start
    finally:
        await worker.close(5)


def test_what_comes_while_no_process_is_there_waits_for_the_next_one() -> None:
    async def test() -> None:
        engine = held_engine()
        engine.go.set()
        settings = Settings(max_queue_seconds=1e-9)  # whoever had to wait at all would be refused at other times
        async with between_two_processes(lambda: toy_process(engine), settings) as (worker, may_start):
            calls = [asyncio.create_task(worker.classify([PNG], 1, deadline())) for _ in range(20)]
            leaving = asyncio.create_task(worker.classify([PNG] * 3, 1, deadline()))
            await until(lambda: worker.num_waiting == 23)
            late = await problem_of_call(worker.classify([PNG], 1, deadline(0.01)))
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            may_start.set()
            assert [len((await call).results) for call in calls] == [1] * 20
            await until(lambda: worker.num_waiting == 0)
        assert late.status == 504
        assert sum(engine.sizes) == 20  # neither the late one nor those who had left

    run(test)


def test_only_so_many_wait_for_the_next_process() -> None:
    async def test() -> None:
        settings = Settings(max_queue_images=4, max_images=4)
        async with between_two_processes(lambda: toy_process(toy_engine()), settings) as (worker, may_start):
            call = asyncio.create_task(worker.classify([PNG] * 4, 1, deadline()))
            await until(lambda: worker.num_waiting == 4)
            assert (await problem_of_call(worker.classify([PNG], 1, deadline()))).status == 429
            may_start.set()
            await call

    run(test)


def test_nobody_waits_for_a_process_that_cannot_be_started() -> None:
    def fail() -> ChildProcess:
        raise OSError("no more processes")

    async def test() -> None:
        async with between_two_processes(fail) as (worker, may_start):
            call = asyncio.create_task(worker.classify([PNG], 1, deadline()))
            await until(lambda: worker.num_waiting == 1)
            may_start.set()
            waited = await problem_of_call(call)
            at_once = await problem_of_call(worker.classify([PNG], 1, deadline()))
            assert (waited.status, at_once.status, worker.num_waiting) == (503, 503, 0)

    run(test)


def test_closing_does_not_leave_those_without_an_answer_who_wait_for_a_process() -> None:
    async def test() -> None:
        async with between_two_processes(lambda: toy_process(toy_engine())) as (worker, _):
            call = asyncio.create_task(worker.classify([PNG], 1, deadline()))
            await until(lambda: worker.num_waiting == 1)
            await worker.close(0.01)
            assert (await problem_of_call(call)).status == 503

    run(test)


def test_with_two_processes_the_other_one_goes_on_answering() -> None:
    async def test() -> None:
        started: list[ChildProcess] = []
        worker = await EnginePool.start_with(real_process(toy_bundle(), started), Settings(processes=2))
        try:
            os.kill(started[0].pid, signal.SIGKILL)
            statuses = set()
            while len(started) < 3:  # until the dead one is noticed, it may still be given requests
                told = await asyncio.gather(worker.classify([PNG], 1, deadline()), return_exceptions=True)
                statuses |= {one.problem.status for one in told if isinstance(one, ProblemError)}
                assert worker.alive
            assert statuses <= {503}
            assert len((await worker.classify([PNG], 1, deadline())).results) == 1
        finally:
            await worker.close(5)

    run(test)


def test_a_process_that_has_work_and_says_nothing_is_killed_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        started: list[ChildProcess] = []
        worker = await EnginePool.start_with(real_process(toy_bundle(), started), Settings(stall_seconds=0.3))
        try:
            os.kill(started[0].pid, signal.SIGSTOP)  # a run that never comes back looks just so
            assert (await problem_of_call(worker.classify([PNG], 1, deadline()))).status == 503
            await worker.classify([PNG], 1, deadline())
            assert len(started) == 2
        finally:
            await worker.close(5)

    run(test)
    assert "said nothing for" in caplog.text


def test_a_bundle_that_cannot_be_served_says_why_and_leaves_no_process(tmp_path: Path) -> None:
    async def test() -> None:
        started: list[ChildProcess] = []
        wrong = write_toy_bundle(tmp_path / "toy", golden_shift=0.5)
        with pytest.raises(BundleError, match="give logits that differ"):
            await EnginePool.start_with(real_process(wrong, started), Settings())
        with pytest.raises(BundleError, match="no such directory"):
            await EnginePool.start_with(real_process(tmp_path / "nowhere", started), Settings())
        for launched in started:
            await until(lambda launched=launched: not is_running(launched.pid))  # type: ignore[misc]

    run(test)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_process_that_ends_before_it_is_ready_is_told() -> None:
    async def test() -> None:
        def start() -> ChildProcess:
            ours, theirs = socket.socketpair()
            theirs.close()
            return ChildProcess(ours, lambda: None, 0)

        with pytest.raises(DeviceError, match="ended before it was ready"):
            await EnginePool.start_with(start, Settings())

    run(test)


def test_a_replacement_of_another_bundle_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        other = toy_engine()
        other.manifest = other.manifest.model_copy(update={"name": "other"})
        engines = iter([toy_engine(), other, toy_engine()])
        processes: queue.SimpleQueue[ChildProcess] = queue.SimpleQueue()

        def start() -> ChildProcess:
            launched = toy_process(next(engines))
            processes.put(launched)
            return launched

        worker = await EnginePool.start_with(start, Settings())
        try:
            processes.get().kill()
            await until(lambda: not worker.alive)
            await until(lambda: worker.alive)
            assert worker.manifest.name == "toy"
        finally:
            await worker.close(5)

    run(test)
    assert "the bundle is another than the one that was served" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priority of their own")
def test_on_one_core_a_process_gets_ready_at_a_low_priority_and_answers_at_that_of_the_others() -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # what is started now stays on it
    try:
        launched = real_process(toy_bundle(), [])()
    finally:
        os.sched_setaffinity(0, cores)
    try:
        launched.line.settimeout(60)
        launched.line.recv(1)  # it is ready
        own = os.getpriority(os.PRIO_PROCESS, 0)
        threads = [int(folder.name) for folder in Path(f"/proc/{launched.pid}/task").iterdir()]
        of_thread = {thread: os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}
        assert of_thread[launched.pid] > own
        assert own in of_thread.values()
    finally:
        launched.kill()
        launched.line.close()


@pytest.fixture
def engine_process() -> Iterator[ChildProcess]:
    launched = real_process(toy_bundle(), [])()
    yield launched
    launched.kill()
    launched.line.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_process_ends_with_its_line_and_not_by_signals_meant_for_the_front(
    engine_process: ChildProcess, number: int
) -> None:
    engine_process.line.settimeout(60)
    (length, kind) = struct.unpack("<IB", engine_process.line.recv(5, socket.MSG_WAITALL))
    assert kind == 3  # HELLO
    engine_process.line.recv(length - 1, socket.MSG_WAITALL)
    os.kill(engine_process.pid, number)
    engine_process.line.shutdown(socket.SHUT_WR)
    assert engine_process.line.recv(1) == b""  # it closed its end: it was alive to see ours
