"""Requests to engine processes: each gets exactly one result, whatever happens to the process.

Most engine processes here are threads that a test can block; some are real processes, which a test can kill.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from serve_toys import (
    BlockedEngine,
    ToyEngine,
    blocked_engine,
    encoded,
    expected_logits,
    toy_bundle,
    toy_engine,
    toy_pixels,
    toy_process,
)

from serve.engine.messages import EngineConfig, OutputKind, PredictionFacts
from serve.pool.dispatcher import EnginePool
from serve.pool.engine_process import ChildProcess, launch
from serve.pool.pending_requests import RequestResult
from serve.problems import Problem, ProblemError, make_problem
from serve.settings import Settings

PNG = encoded(toy_pixels(3))
SOON = 60.0


def deadline(seconds: float = SOON) -> float:
    return time.monotonic() + seconds


@asynccontextmanager
async def toy_pool(
    engine: ToyEngine | None = None, settings: Settings | None = None, num_threads: int = 1
) -> AsyncIterator[EnginePool]:
    settings = settings or Settings()
    toy = engine or toy_engine()
    starts = (settings.processes or 1) * [lambda: toy_process(toy, settings, num_threads)]
    pool = await EnginePool.start(starts, settings)
    try:
        yield pool
    finally:
        if isinstance(toy, BlockedEngine):
            toy.go.set()
        await pool.close(5)


def run(test: Callable[[], Coroutine[None, None, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    """Run the event loop until a condition holds; the timeout of ``run`` bounds the wait."""
    while not condition():
        await asyncio.sleep(0.005)


def stop(pid: int) -> None:
    """Stop a process, as in a run that never ends, and wait until none of its threads can answer any more."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)


async def problem_of_request(request: Awaitable[RequestResult]) -> Problem:
    with pytest.raises(ProblemError) as raised:
        await request
    return raised.value.problem


@pytest.mark.parametrize("num_threads", [1, 3])
def test_results_keep_the_order_of_the_images_and_problems_their_positions(num_threads: int) -> None:
    async def test() -> None:
        known = make_problem(400, "not base64")
        async with toy_pool(num_threads=num_threads) as pool:
            result = await pool.classify([known, PNG, b"junk", PNG], 2, deadline())
        first, second, third, fourth = result.results
        assert first == known
        assert isinstance(third, Problem) and third.status == 415
        assert isinstance(second, bytes) and second == fourth
        assert [facts is None for facts in result.facts] == [True, False, True, False]
        assert isinstance(result.facts[1], PredictionFacts)
        assert set(result.stage_seconds) == {"decode", "queue", "infer"}

    run(test)


def test_logits_arrive_unchanged(num: int = 5) -> None:
    async def test() -> None:
        images = np.stack([toy_pixels(seed) for seed in range(num)])
        async with toy_pool() as pool:
            pixels = [pixels_SS3.tobytes() for pixels_SS3 in images]
            of_pixels = (await pool.infer(pixels, OutputKind.LOGITS_OF_PIXELS, 1, deadline())).results
            (row, rejected) = (await pool.infer([PNG, b"junk"], OutputKind.LOGITS, 1, deadline())).results
        assert of_pixels == [row_C.tobytes() for row_C in expected_logits(images)]
        assert isinstance(rejected, Problem)
        assert isinstance(row, bytes)
        # a product with another number of rows: float32 sums of 192 terms of size 1
        np.testing.assert_allclose(np.frombuffer(row, np.float32), expected_logits(toy_pixels(3)[None])[0], atol=1e-4)

    run(test)


def test_a_cancelled_request_is_never_run() -> None:
    async def test() -> None:
        engine = blocked_engine()
        async with toy_pool(engine) as pool:
            first = asyncio.create_task(pool.classify([PNG], 1, deadline()))
            await until(engine.begun.is_set)
            cancelled = asyncio.create_task(pool.classify([PNG] * 7, 1, deadline()))
            await until(lambda: pool.num_waiting == 8)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            kept = asyncio.create_task(pool.classify([PNG], 1, deadline()))
            await until(lambda: pool.num_waiting == 9)
            engine.go.set()
            await asyncio.gather(first, kept)
            await until(lambda: pool.num_waiting == 0)
        assert sum(engine.sizes) == 2

    run(test)


def test_a_late_request_gets_504_at_once_and_is_never_run() -> None:
    async def test() -> None:
        engine = blocked_engine()
        async with toy_pool(engine) as pool:
            first = asyncio.create_task(pool.classify([PNG], 1, deadline()))
            await until(engine.begun.is_set)
            late = await problem_of_request(pool.classify([PNG] * 3, 1, deadline(0.05)))
            past = await problem_of_request(pool.classify([PNG], 1, deadline(-1)))
            assert not first.done()  # the engine is still blocked: the 504 did not wait for it
            engine.go.set()
            await first
        assert (late.status, past.status) == (504, 504)
        assert engine.sizes == [1]

    run(test)


def test_a_request_beyond_the_queue_time_gets_429_with_the_seconds_that_the_queue_takes() -> None:
    async def test() -> None:
        engine = blocked_engine()
        engine.seconds_of = {1: 3.0, 4: 12.0}  # the reported time per image is 3 s
        async with toy_pool(engine, Settings(max_queue_images=100, max_queue_seconds=10)) as pool:
            requests = [asyncio.create_task(pool.classify([PNG], 1, deadline())) for _ in range(4)]
            await until(lambda: pool.num_waiting == 4)
            with pytest.raises(ProblemError) as raised:
                await pool.classify([PNG], 1, deadline())
            assert raised.value.problem.status == 429
            assert raised.value.headers == {"Retry-After": "2"}  # of the 12 s that the queue takes, 10 s are allowed
            engine.go.set()
            await asyncio.gather(*requests)
            await pool.classify([PNG], 1, deadline())  # accepted again

    run(test)


def test_by_default_128_requests_wait_if_they_are_answered_within_a_second() -> None:
    async def test() -> None:
        engine = blocked_engine()
        engine.seconds_of = {1: 0.0077}  # the last of 128 waits for 0.98 s
        async with toy_pool(engine) as pool:
            requests = [asyncio.create_task(pool.classify([PNG], 1, deadline())) for _ in range(128)]
            await until(lambda: pool.num_waiting == 128)
            engine.go.set()
            assert [len(result.results) for result in await asyncio.gather(*requests)] == [1] * 128

    run(test)


def test_a_request_goes_to_the_process_with_the_fewest_images() -> None:
    async def test() -> None:
        engine = blocked_engine()
        async with toy_pool(engine, Settings(processes=2)) as pool:
            requests = []
            for num_images in (8, 1, 2, 4, 1):
                before = pool.num_waiting
                requests.append(asyncio.create_task(pool.classify([PNG] * num_images, 1, deadline())))
                await until(lambda before=before: pool.num_waiting > before)  # type: ignore[misc]
            assert sorted(process.ordinary.num_images for process in pool._supervisor.processes) == [8, 8]
            engine.go.set()
            await asyncio.gather(*requests)
            assert pool.num_waiting == 0

    run(test)


def test_a_replacement_is_expected_to_be_as_fast_as_the_process_that_died() -> None:
    async def test() -> None:
        async with toy_pool() as pool:
            (process,) = pool._supervisor.processes
            assert process.ordinary.seconds_each == 0.001 / 32
            process.ordinary.seconds_each = 0.5
            process.kill()
            await until(lambda: not pool.alive)
            await until(lambda: pool.alive)
            assert pool._supervisor.processes[0].ordinary.seconds_each == 0.5

    run(test)


def test_more_images_than_the_queue_holds_get_429() -> None:
    async def test() -> None:
        engine = blocked_engine()
        async with toy_pool(engine, Settings(max_queue_images=4, max_images=4)) as pool:
            request = asyncio.create_task(pool.classify([PNG] * 3, 1, deadline()))
            await until(lambda: pool.num_waiting == 3)
            assert (await problem_of_request(pool.classify([PNG] * 2, 1, deadline()))).status == 429
            engine.go.set()
            await request

    run(test)


def test_closing_answers_accepted_requests_and_accepts_no_more() -> None:
    async def test() -> None:
        engine = blocked_engine()
        async with toy_pool(engine) as pool:
            requests = [asyncio.create_task(pool.classify([PNG], 1, deadline())) for _ in range(3)]
            await until(lambda: pool.num_waiting == 3)
            closing = asyncio.create_task(pool.close(20))
            await asyncio.sleep(0)
            assert (await problem_of_request(pool.classify([PNG], 1, deadline()))).status == 503
            engine.go.set()
            assert [len((await request).results) for request in requests] == [1, 1, 1]
            await closing

    run(test)


def real_process(bundle: Path, started: list[ChildProcess]) -> Callable[[], ChildProcess]:
    def start() -> ChildProcess:
        config = EngineConfig(
            bundle=bundle,
            device="cpu",
            precision=None,
            max_batch=4,
            max_wait_ms=None,
            max_pixels=10**6,
            max_request_pixels=10**7,
        )
        started.append(launch(config))
        return started[-1]

    return start


def test_a_killed_process_costs_its_requests_a_503_and_is_replaced() -> None:
    async def test() -> None:
        started: list[ChildProcess] = []
        restarts: list[bool] = []
        settings = Settings(max_queue_seconds=SOON)  # a busy machine must not reject the requests
        pool = await EnginePool.start([real_process(toy_bundle(), started)], settings)
        pool.on_restart = lambda: restarts.append(pool.alive)
        try:
            before = await pool.classify([PNG], 1, deadline())
            stop(started[0].pid)  # it still has the requests when it is killed
            requests = [asyncio.create_task(pool.classify([PNG], 1, deadline())) for _ in range(5)]
            await until(lambda: pool.num_waiting == 5)
            os.kill(started[0].pid, signal.SIGKILL)
            problems = [await problem_of_request(request) for request in requests]
            assert [problem.status for problem in problems] == [503] * 5
            assert not pool.alive
            assert (await pool.classify([PNG], 1, deadline())).results == before.results
            assert (len(started), restarts) == (2, [True])
        finally:
            await pool.close(5)

    run(test)


@asynccontextmanager
async def between_two_processes(
    then: Callable[[], ChildProcess], settings: Settings | None = None
) -> AsyncIterator[tuple[EnginePool, asyncio.Event]]:
    """A pool whose process has died, and the event to set before ``then`` may start the next one."""
    started: list[ChildProcess] = []
    may_start = asyncio.Event()

    def start() -> ChildProcess:
        started.append(toy_process(toy_engine()) if not started else then())
        return started[-1]

    pool = await EnginePool.start([start], settings or Settings())
    connect = pool._supervisor._start_one

    async def connect_later(start_process: Callable[[], ChildProcess]) -> None:
        await may_start.wait()
        await connect(start_process)

    pool._supervisor._start_one = connect_later  # type: ignore[method-assign]
    started[0].kill()
    await until(lambda: not pool.alive)
    try:
        yield pool, may_start
    finally:
        await pool.close(5)


def test_requests_that_arrive_while_no_process_runs_wait_for_the_next_one() -> None:
    async def test() -> None:
        engine = blocked_engine()
        engine.go.set()
        settings = Settings(max_queue_seconds=1e-9)  # otherwise every request that has to wait would be rejected
        async with between_two_processes(lambda: toy_process(engine), settings) as (pool, may_start):
            requests = [asyncio.create_task(pool.classify([PNG], 1, deadline())) for _ in range(20)]
            cancelled = asyncio.create_task(pool.classify([PNG] * 3, 1, deadline()))
            await until(lambda: pool.num_waiting == 23)
            late = await problem_of_request(pool.classify([PNG], 1, deadline(0.01)))
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            assert pool.num_waiting == 20
            assert pool._pending and len(pool._pending._messages) == 20  # up to 20 MB each
            may_start.set()
            assert [len((await request).results) for request in requests] == [1] * 20
            await until(lambda: pool.num_waiting == 0)
        assert late.status == 504
        assert sum(engine.sizes) == 20  # neither the late request nor the cancelled one

    run(test)


def test_the_number_of_images_that_wait_for_the_next_process_is_bounded() -> None:
    async def test() -> None:
        settings = Settings(max_queue_images=4, max_images=4)
        async with between_two_processes(lambda: toy_process(toy_engine()), settings) as (pool, may_start):
            request = asyncio.create_task(pool.classify([PNG] * 4, 1, deadline()))
            await until(lambda: pool.num_waiting == 4)
            assert (await problem_of_request(pool.classify([PNG], 1, deadline()))).status == 429
            may_start.set()
            await request

    run(test)


def test_requests_do_not_wait_for_a_process_that_cannot_be_started() -> None:
    def fail() -> ChildProcess:
        raise OSError("no more processes")

    async def test() -> None:
        async with between_two_processes(fail) as (pool, may_start):
            request = asyncio.create_task(pool.classify([PNG], 1, deadline()))
            await until(lambda: pool.num_waiting == 1)
            may_start.set()
            waited = await problem_of_request(request)
            at_once = await problem_of_request(pool.classify([PNG], 1, deadline()))
            assert (waited.status, at_once.status, pool.num_waiting) == (503, 503, 0)

    run(test)


def test_closing_answers_requests_that_wait_for_a_process() -> None:
    async def test() -> None:
        async with between_two_processes(lambda: toy_process(toy_engine())) as (pool, _):
            request = asyncio.create_task(pool.classify([PNG], 1, deadline()))
            await until(lambda: pool.num_waiting == 1)
            await pool.close(0.01)
            assert (await problem_of_request(request)).status == 503

    run(test)


def test_requests_with_large_images_have_a_queue_and_a_speed_of_their_own() -> None:
    large = encoded(toy_pixels(1, 600, 600))

    async def test() -> None:
        async with toy_pool(engine := blocked_engine()) as pool:
            (process,) = pool._supervisor.processes
            process.large.seconds_each = 5.0  # as when images of 25 MP are decoded
            requests = [asyncio.create_task(pool.classify([content], 1, deadline())) for content in (large, PNG)]
            await until(lambda: pool.num_waiting == 2)
            assert (process.large.num_images, process.ordinary.num_images) == (1, 1)
            assert (await problem_of_request(pool.classify([PNG, large], 1, deadline()))).status == 429
            requests.append(asyncio.create_task(pool.classify([PNG], 1, deadline())))
            await until(lambda: process.ordinary.num_images == 2)
            engine.go.set()
            await asyncio.gather(*requests)
            assert pool.num_waiting == process.large.num_requests == process.ordinary.num_requests == 0

    run(test)
