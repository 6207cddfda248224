"""Engine processes are started, replaced when they end, and killed when they stall."""

import asyncio
import os
import queue
import signal
import socket
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
from serve_toys import (
    toy_bundle,
    toy_engine,
    toy_process,
    write_toy_bundle,
)

import serve.pool.supervisor
from ltkd.errors import BundleError, DeviceError, UsageError
from serve.engine.messages import EngineConfig
from serve.pool.dispatcher import EnginePool
from serve.pool.engine_process import ChildProcess
from serve.pool.supervisor import engine_configs
from serve.problems import ProblemError
from serve.settings import Settings
from tests.serve.pool.test_dispatcher import PNG, deadline, problem_of_request, real_process, run, until


def test_with_two_processes_the_other_one_keeps_answering() -> None:
    async def test() -> None:
        started: list[ChildProcess] = []
        pool = await EnginePool.start(2 * [real_process(toy_bundle(), started)], Settings())
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
        pool = await EnginePool.start([real_process(toy_bundle(), started)], Settings(stall_seconds=0.3))
        try:
            os.kill(started[0].pid, signal.SIGSTOP)  # as in a run that never ends
            assert (await problem_of_request(pool.classify([PNG], 1, deadline()))).status == 503
            await pool.classify([PNG], 1, deadline())
            assert len(started) == 2
        finally:
            await pool.close(5)

    run(test)
    assert "with requests sent no message for" in caplog.text


def test_a_bundle_that_cannot_be_served_gives_the_reason_and_leaves_no_process(tmp_path: Path) -> None:
    async def test() -> None:
        started: list[ChildProcess] = []
        wrong = write_toy_bundle(tmp_path / "toy", golden_shift=0.5)
        with pytest.raises(BundleError, match=r"differ by 0\.5 from the certified ones"):
            await EnginePool.start([real_process(wrong, started)], Settings())
        with pytest.raises(BundleError, match="no such directory"):
            await EnginePool.start([real_process(tmp_path / "nowhere", started)], Settings())
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
            await EnginePool.start([start], Settings())

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

        pool = await EnginePool.start([start], Settings())
        try:
            processes.get().kill()
            await until(lambda: not pool.alive)
            await until(lambda: pool.alive)
            assert pool.manifest.name == "toy"
        finally:
            await pool.close(5)

    run(test)
    assert "the bundle on disk is another one than the processes before served" in caplog.text


def start_pool(launch: Callable[[EngineConfig], ChildProcess], settings: Settings) -> Awaitable[EnginePool]:
    return EnginePool.start([partial(launch, config) for config in engine_configs(toy_bundle(), settings)], settings)


def test_each_gpu_has_a_process_and_a_replacement_runs_on_the_gpu_of_the_lost_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve.pool.supervisor, "num_cuda_devices", lambda: 2)
    launched: list[EngineConfig] = []
    children: list[ChildProcess] = []

    def launch(config: EngineConfig) -> ChildProcess:
        launched.append(config)
        children.append(toy_process(toy_engine()))
        return children[-1]

    async def test() -> None:
        pool = await start_pool(launch, Settings(device="cuda"))
        try:
            children[1].kill()
            await until(lambda: len(launched) == 3)
            children[0].kill()
            await until(lambda: len(launched) == 4)
        finally:
            await pool.close(5)

    run(test)
    assert [config.device for config in launched] == ["cuda:0", "cuda:1", "cuda:1", "cuda:0"]
    assert {config.processes for config in launched} == {2}


def test_processes_of_one_model_do_not_differ_in_their_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.pool.supervisor, "num_cuda_devices", lambda: 2)

    def launch(config: EngineConfig) -> ChildProcess:
        engine = toy_engine()
        engine.provider = {"auto:0": "CUDAExecutionProvider", "auto:1": "CPUExecutionProvider"}[config.device]
        return toy_process(engine)

    async def test() -> None:
        with pytest.raises(
            DeviceError, match=r"fp32 on C.*ExecutionProvider, but the others run fp32 on C.*; name the"
        ):
            await start_pool(launch, Settings())

    run(test)


def test_processes_that_do_not_fit_the_gpus_are_an_error_before_a_process_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve.pool.supervisor, "num_cuda_devices", lambda: 2)
    with pytest.raises(UsageError, match="3 processes cannot be divided equally among 2 GPUs"):
        engine_configs(toy_bundle(), Settings(processes=3))
    assert [config.device for config in engine_configs(toy_bundle(), Settings(device="cpu", processes=3))] == 3 * [
        "cpu"
    ]
