"""Engine processes are started, replaced when they end, and killed when they stall."""

import asyncio
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
from serve_toys import (
    encoded,
    toy_bundle,
    toy_engine,
    toy_pixels,
    toy_process,
    write_toy_bundle,
)

import serve.pool.supervisor
from ltkd.contract.image_decoding import DecodedImage, decode_image
from ltkd.contract.preprocessing import Preprocessing
from ltkd.errors import BundleError, DeviceError, UsageError
from serve.engine import classifier
from serve.engine.messages import EngineConfig
from serve.pool import engine_process, supervisor
from serve.pool.dispatcher import EnginePool
from serve.pool.engine_process import ChildProcess
from serve.pool.supervisor import engine_configs
from serve.problems import ProblemError
from serve.settings import Settings
from tests.serve.pool.test_dispatcher import PNG, deadline, problem_of_request, real_process, run, stop, until


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


def test_with_two_processes_each_replacement_is_counted() -> None:
    async def test() -> None:
        started: list[ChildProcess] = []
        restarts: list[int] = []
        pool = await EnginePool.start(2 * [real_process(toy_bundle(), started)], Settings())
        pool.on_restart = lambda: restarts.append(len(started))
        try:
            for num in (1, 2):
                os.kill(started[-1].pid, signal.SIGKILL)
                await until(lambda num=num: len(restarts) == num)  # type: ignore[misc]
            assert restarts == [3, 4]
        finally:
            await pool.close(5)

    run(test)


def test_a_stalled_process_is_killed_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        started: list[ChildProcess] = []
        pool = await EnginePool.start([real_process(toy_bundle(), started)], Settings(stall_seconds=0.3))
        try:
            stop(started[0].pid)
            assert (await problem_of_request(pool.classify([PNG], 1, deadline()))).status == 503
            await pool.classify([PNG], 1, deadline())
            assert len(started) == 2
        finally:
            await pool.close(5)

    run(test)
    assert "with requests made no progress for" in caplog.text


class Clock:
    """The clock of an engine process and of its supervisor: the real one plus what the test adds."""

    def __init__(self) -> None:
        self.added_seconds = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.added_seconds


class BlockedDecoder:
    """Decodes one large image each time that the test releases it."""

    def __init__(self) -> None:
        self.released = threading.Semaphore(0)
        self.num_decoded = 0

    def decode(self, content: bytes, preprocessing: Preprocessing, max_pixels: int) -> DecodedImage:
        assert self.released.acquire(timeout=60)
        self.num_decoded += 1
        return decode_image(content, preprocessing, max_pixels)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_process_that_decodes_slowly_is_not_killed_and_one_whose_decoder_does_not_return_is(
    num_threads: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, decoder = Clock(), BlockedDecoder()
    for module in (supervisor, engine_process, classifier):
        monkeypatch.setattr(module, "time", clock)

    async def test() -> None:
        settings = Settings(stall_seconds=30)
        large = encoded(toy_pixels(1, 600, 600), "JPEG")

        def start() -> ChildProcess:
            return toy_process(toy_engine(), settings, num_threads, lambda: nullcontext(decoder.decode))

        pool = await EnginePool.start([start], settings)
        try:
            (process,) = pool._supervisor.processes
            request = asyncio.create_task(pool.classify([large] * 6, 1, deadline(10_000)))
            await until(lambda: bool(process.requests))
            for _ in range(5):  # 100 s in all
                clock.added_seconds += 20
                before = process.last_message_at
                pool._check_progress()
                decoder.released.release()
                await until(lambda before=before: process.last_message_at > before)  # type: ignore[misc]
            assert pool._supervisor.processes == [process]
            assert not request.done()
            clock.added_seconds += 31
            pool._check_progress()
            assert (await problem_of_request(request)).status == 503
        finally:
            decoder.released.release(10)
            await pool.close(5)

    run(test)
    assert "with requests made no progress for 31." in caplog.text


def test_a_process_that_still_has_requests_when_its_time_is_over_is_killed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_process, "_END_SECONDS", 1000)  # much longer than ``run`` allows

    async def test() -> None:
        started: list[ChildProcess] = []
        pool = await EnginePool.start([real_process(toy_bundle(), started)], Settings())
        stop(started[0].pid)
        request = asyncio.create_task(pool.classify([PNG], 1, deadline()))
        await until(lambda: pool.num_waiting == 1)
        await pool.close(0.01)
        assert (await problem_of_request(request)).status == 503
        await until(lambda: not is_running(started[0].pid))

    run(test)


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
