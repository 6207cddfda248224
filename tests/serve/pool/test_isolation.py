"""What goes wrong with one request, or in the metrics, reaches no other request and does not end the engine process."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import pytest
from serve_toys import BlockedEngine, blocked_engine, toy_engine, toy_process

from ltkd.errors import DeviceError
from serve.engine.messages import EngineResponse, Kind, pack_text
from serve.engine.messages import unpack_response as unpack
from serve.pool import dispatcher
from serve.pool.dispatcher import EnginePool
from serve.pool.engine_process import ChildProcess, connected_sockets
from serve.pool.pending_requests import RequestResult
from serve.problems import ProblemError
from serve.settings import Settings
from tests.serve.pool.test_dispatcher import (
    PNG,
    between_two_processes,
    deadline,
    problem_of_request,
    run,
    toy_pool,
    until,
)

Pending = list[asyncio.Task[RequestResult]]


@asynccontextmanager
async def counted_pool(settings: Settings | None = None) -> AsyncIterator[tuple[EnginePool, BlockedEngine]]:
    """A pool with a blocked engine; at the end it must answer with the process that it began with."""
    engine = blocked_engine()
    async with toy_pool(engine, settings) as pool:
        (process,) = pool._supervisor.processes
        yield pool, engine
        engine.go.set()
        assert len((await pool.classify([PNG], 1, deadline())).results) == 1
        assert pool._supervisor.processes == [process]
        await until(lambda: pool.num_waiting == 0)
        assert process.ordinary.num_images == process.large.num_images == 0


def raise_in_callbacks(pool: EnginePool) -> None:
    """Let whoever waits for the result of a request fail as soon as there is one."""
    holders = [*pool._supervisor.processes, *([pool._pending] if pool._pending else [])]
    for holder in holders:
        for request in holder.requests.values():
            request.result.add_done_callback(raise_an_error)


def raise_an_error(*_: object) -> None:
    raise RuntimeError("a defect of one request")


async def send(pool: EnginePool, num: int, seconds: float = 60.0) -> Pending:
    tasks = [asyncio.create_task(pool.classify([PNG], 1, deadline(seconds))) for _ in range(num)]
    before = pool.num_waiting
    await until(lambda: pool.num_waiting == before + num)
    return tasks


async def statuses(tasks: Iterable[asyncio.Task[RequestResult]]) -> list[int]:
    """The status of each request."""
    results = await asyncio.gather(*tasks, return_exceptions=True)
    return [result.problem.status if isinstance(result, ProblemError) else 200 for result in results]


@pytest.fixture
def errors_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    errors: list[str] = []
    monkeypatch.setattr(
        asyncio.BaseEventLoop, "call_exception_handler", lambda _, context: errors.append(str(context["exception"]))
    )
    return errors


def test_whatever_a_request_does_with_its_answer_the_others_are_answered(errors_of_the_loop: list[str]) -> None:
    async def test() -> None:
        async with counted_pool() as (pool, engine):
            bad = await send(pool, 3)
            raise_in_callbacks(pool)
            good = await send(pool, 3)
            engine.go.set()
            assert await statuses([*bad, *good]) == [200] * 6

    run(test)
    assert errors_of_the_loop == ["a defect of one request"] * 3


def test_whatever_a_request_does_at_its_deadline_the_others_are_answered(errors_of_the_loop: list[str]) -> None:
    async def test() -> None:
        async with counted_pool() as (pool, engine):
            bad = await send(pool, 3, seconds=0.1)
            raise_in_callbacks(pool)
            late, good = await send(pool, 3, seconds=0.1), await send(pool, 3)
            assert await statuses([*bad, *late]) == [504] * 6
            engine.go.set()
            assert await statuses(good) == [200] * 3

    run(test)
    assert errors_of_the_loop == ["a defect of one request"] * 3


def test_whatever_a_request_does_when_its_process_ends_the_others_get_503(errors_of_the_loop: list[str]) -> None:
    async def test() -> None:
        engine = blocked_engine()
        async with toy_pool(engine) as pool:
            bad = await send(pool, 3)
            raise_in_callbacks(pool)
            others = await send(pool, 3)
            pool._supervisor.processes[0].kill()
            assert await statuses([*bad, *others]) == [503] * 6
            engine.go.set()
            await until(lambda: pool.alive)
            assert len((await pool.classify([PNG], 1, deadline())).results) == 1
            assert pool.num_waiting == 0

    run(test)
    assert errors_of_the_loop == ["a defect of one request"] * 3


def test_whatever_a_request_does_when_no_process_can_be_started_the_next_attempt_is_made(
    errors_of_the_loop: list[str],
) -> None:
    attempts = 0

    def start() -> ChildProcess:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise ValueError("not a known error")
        return toy_process(toy_engine())

    async def test() -> None:
        async with between_two_processes(start) as (pool, may_start):
            bad = await send(pool, 3)
            raise_in_callbacks(pool)
            others = await send(pool, 3)
            may_start.set()
            assert await statuses([*bad, *others]) == [503] * 6
            assert "not a known error" in pool.reason
            await until(lambda: pool.alive)
            assert len((await pool.classify([PNG], 1, deadline())).results) == 1
            assert (pool.num_waiting, pool.reason) == (0, "")

    run(test)
    assert errors_of_the_loop == ["a defect of one request"] * 3


def test_a_request_that_cannot_be_sent_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with counted_pool() as (pool, _):
            with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a defect of one request"):
                patch.setattr(dispatcher, "pack_request", raise_an_error)
                await pool.classify([PNG], 1, deadline())
            assert pool.num_waiting == 0

    run(test)


def test_an_error_in_the_metrics_costs_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with counted_pool() as (pool, engine):
            pool.on_answer = pool.on_restart = raise_an_error
            tasks = await send(pool, 3)
            engine.go.set()
            assert await statuses(tasks) == [200] * 3

    run(test)
    assert caplog.text.count("RuntimeError: a defect of one request") == 4


def test_an_error_in_the_metrics_does_not_keep_a_process_from_being_replaced() -> None:
    async def test() -> None:
        async with toy_pool() as pool:
            pool.on_restart = raise_an_error
            pool._supervisor.processes[0].kill()
            await until(lambda: not pool.alive)
            assert len((await pool.classify([PNG], 1, deadline())).results) == 1

    run(test)


def test_a_response_that_cannot_be_read_is_500_for_its_request_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unpack_all_but_the_second(message: memoryview) -> EngineResponse:
        response = unpack(message)
        if response.number == 2:
            raise ValueError("not a response")
        return response

    monkeypatch.setattr(dispatcher, "unpack_response", unpack_all_but_the_second)

    async def test() -> None:
        async with counted_pool() as (pool, engine):
            tasks = await send(pool, 3)
            engine.go.set()
            assert await statuses(tasks) == [200, 500, 200]

    run(test)
    assert "ValueError: not a response" in caplog.text


@pytest.mark.parametrize(
    "message",
    [
        pack_text(Kind.RESPONSE, "short"),
        b"\x05\0\0\0\x06\xff\xff\xff\xff",
        b"\x01\0\0\0\xff",
        pack_text(Kind.READY, "{"),
    ],
)
def test_a_message_that_cannot_be_read_does_not_end_the_connection(message: bytes) -> None:
    async def test() -> None:
        async with counted_pool() as (pool, engine):
            tasks = await send(pool, 2)
            pool._supervisor.processes[0].data_received(message)
            engine.go.set()
            assert await statuses(tasks) == [200, 200]

    run(test)


@pytest.mark.parametrize("kind", [Kind.READY, Kind.FAILED])
def test_a_process_whose_first_message_cannot_be_read_is_an_error_at_once(kind: Kind) -> None:
    async def test() -> None:
        ours, theirs = connected_sockets()
        with theirs:
            theirs.sendall(pack_text(kind, "{}"))
            with pytest.raises(DeviceError, match="did not start correctly"):
                await EnginePool.start([lambda: ChildProcess(ours, lambda: None, 0)], Settings())

    run(test)


def test_a_late_request_counts_until_the_process_has_dropped_it() -> None:
    async def test() -> None:
        async with counted_pool() as (pool, engine):
            await until(lambda: pool.alive)
            problem = await problem_of_request(pool.classify([PNG], 1, deadline(0.05)))
            assert (problem.status, pool.num_waiting) == (504, 1)
            engine.go.set()
            await until(lambda: pool.num_waiting == 0)

    run(test)
