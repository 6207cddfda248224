"""Engine processes are started, replaced when they end, and killed when they stall."""

import asyncio
import os
import queue
import signal
import socket
from pathlib import Path

import pytest
from serve_toys import (
    toy_bundle,
    toy_engine,
    toy_process,
    write_toy_bundle,
)

from ltkd.errors import BundleError, DeviceError
from serve.pool.dispatcher import EnginePool
from serve.pool.engine_process import ChildProcess
from serve.problems import ProblemError
from serve.settings import Settings
from tests.serve.pool.test_dispatcher import PNG, deadline, problem_of_request, real_process, run, until


def test_with_two_processes_the_other_one_keeps_answering() -> None:
    async def test() -> None:
        started: list[ChildProcess] = []
        pool = await EnginePool.start_with(real_process(toy_bundle(), started), Settings(processes=2))
        try:
            os.kill(started[0].pid, signal.SIGKILL)
            statuses = set()
            while len(started) < 3:  # until its end is detected, the killed process may still get requests
                results = await asyncio.gather(pool.classify([PNG], 1, deadline()), return_exceptions=True)
                statuses |= {one.problem.status for one in results if isinstance(one, ProblemError)}
                assert pool.alive
            assert statuses <= {503}
            assert len((await pool.classify([PNG], 1, deadline())).results) == 1
        finally:
            await pool.close(5)

    run(test)


def test_a_stalled_process_is_killed_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        started: list[ChildProcess] = []
        pool = await EnginePool.start_with(real_process(toy_bundle(), started), Settings(stall_seconds=0.3))
        try:
            os.kill(started[0].pid, signal.SIGSTOP)  # as in a run that never ends
            assert (await problem_of_request(pool.classify([PNG], 1, deadline()))).status == 503
            await pool.classify([PNG], 1, deadline())
            assert len(started) == 2
        finally:
            await pool.close(5)

    run(test)
    assert "with requests made no progress for" in caplog.text


def test_a_bundle_that_cannot_be_served_gives_the_reason_and_leaves_no_process(tmp_path: Path) -> None:
    async def test() -> None:
        started: list[ChildProcess] = []
        wrong = write_toy_bundle(tmp_path / "toy", golden_shift=0.5)
        with pytest.raises(BundleError, match=r"differ by 0\.5 from the certified ones"):
            await EnginePool.start_with(real_process(wrong, started), Settings())
        with pytest.raises(BundleError, match="no such directory"):
            await EnginePool.start_with(real_process(tmp_path / "nowhere", started), Settings())
        for child in started:
            await until(lambda child=child: not is_running(child.pid))  # type: ignore[misc]

    run(test)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_process_that_ends_before_it_is_ready_is_an_error() -> None:
    async def test() -> None:
        def start() -> ChildProcess:
            ours, theirs = socket.socketpair()
            theirs.close()
            return ChildProcess(ours, lambda: None, 0)

        with pytest.raises(DeviceError, match="ended before it was ready"):
            await EnginePool.start_with(start, Settings())

    run(test)


def test_a_replacement_that_serves_another_bundle_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        other = toy_engine()
        other.manifest = other.manifest.model_copy(update={"name": "other"})
        engines = iter([toy_engine(), other, toy_engine()])
        processes: queue.SimpleQueue[ChildProcess] = queue.SimpleQueue()

        def start() -> ChildProcess:
            started = toy_process(next(engines))
            processes.put(started)
            return started

        pool = await EnginePool.start_with(start, Settings())
        try:
            processes.get().kill()
            await until(lambda: not pool.alive)
            await until(lambda: pool.alive)
            assert pool.manifest.name == "toy"
        finally:
            await pool.close(5)

    run(test)
    assert "the bundle on disk differs from the one that was served" in caplog.text
