"""One engine process: its priority while it starts, and how it ends."""

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_toys import blocked_engine, encoded, toy_bundle, toy_pixels

from serve.engine.decode_queue import PixelLimits
from serve.engine.message_loop import serve_connection
from serve.engine.messages import EngineRequest, Kind, OutputKind, pack_request, pack_text
from serve.pool.engine_process import ChildProcess, EngineProcess, connected_sockets
from tests.serve.pool.test_dispatcher import real_process, run, until


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority per thread")
def test_on_one_core_a_process_starts_at_low_priority_and_answers_at_normal_priority() -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # a process started now inherits the affinity
    try:
        started = real_process(toy_bundle(), [])()
    finally:
        os.sched_setaffinity(0, cores)
    try:
        started.connection.settimeout(60)
        started.connection.recv(1)  # the first byte arrives when the process is ready
        own = os.getpriority(os.PRIO_PROCESS, 0)
        threads = [int(folder.name) for folder in Path(f"/proc/{started.pid}/task").iterdir()]
        of_thread = {thread: os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}
        assert of_thread[started.pid] > own
        assert own in of_thread.values()
    finally:
        started.kill()
        started.connection.close()


@pytest.fixture
def engine_process() -> Iterator[ChildProcess]:
    started = real_process(toy_bundle(), [])()
    yield started
    started.kill()
    started.connection.close()


_AT_THE_FIRST_IMPORT = """
import signal, sys
from serve.engine.__main__ import main

class Finder:
    def find_spec(self, name, path, target=None):
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        print([signal.getsignal(number) == signal.SIG_IGN for number in numbers], "numpy" in sys.modules)
        raise SystemExit

sys.meta_path.insert(0, Finder())
main()
"""


def test_a_process_ignores_signals_meant_for_the_server_before_it_imports_libraries() -> None:
    started = subprocess.run([sys.executable, "-c", _AT_THE_FIRST_IMPORT], capture_output=True, text=True, check=False)
    assert (started.stdout, started.stderr) == ("[True, True, True] False\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_process_ends_with_its_connection_and_ignores_signals_meant_for_the_server(
    engine_process: ChildProcess, number: int
) -> None:
    engine_process.connection.settimeout(60)
    (length, kind) = struct.unpack("<IB", engine_process.connection.recv(5, socket.MSG_WAITALL))
    assert kind == 3  # READY
    engine_process.connection.recv(length - 1, socket.MSG_WAITALL)
    os.kill(engine_process.pid, number)
    engine_process.connection.shutdown(socket.SHUT_WR)
    assert (
        engine_process.connection.recv(1) == b""
    )  # the end of the stream: the process was still running and closed its socket


def test_a_process_whose_server_was_killed_drops_the_images_that_it_has() -> None:
    engine = blocked_engine()
    ours, theirs = connected_sockets()
    serving = threading.Thread(target=serve_connection, args=(theirs, engine, PixelLimits(10**6, 10**7), 0.0, 1))
    serving.start()
    image, until_when = encoded(toy_pixels(3)), time.monotonic() + 60
    requests = [EngineRequest(num, until_when, OutputKind.ANSWERS, 1, num * [image]) for num in (1, 200)]
    with ours:
        ours.sendall(b"".join(map(pack_request, requests)))
        assert engine.begun.wait(30)
    engine.go.set()
    serving.join(60)
    assert not serving.is_alive()
    assert len(engine.sizes) == 1


def test_a_process_that_gets_ready_while_its_start_is_cancelled_causes_no_error() -> None:
    async def test() -> None:
        errors: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        ours, theirs = socket.socketpair()
        process = EngineProcess(ChildProcess(ours, lambda: None, 0), lambda *_: None, lambda _: None)
        opening = asyncio.create_task(process.open())
        await until(lambda: hasattr(process, "transport"))
        opening.cancel()
        with theirs:
            theirs.sendall(pack_text(Kind.READY, "{}") + pack_text(Kind.FAILED, "{}"))
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert errors == []

    run(test)
