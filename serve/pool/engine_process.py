"""The front's end of the line to one engine process: what comes back, and what is noticed when it ends."""

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import ltkd.errors
from ltkd.errors import DeviceError, LtkdError, UsageError
from serve.engine.messages import (
    EngineConfig,
    EngineReady,
    EngineResponse,
    Failed,
    Kind,
    MessageReader,
    PredictionFacts,
    unpack_response,
    unpack_text,
)
from serve.problems import Problem, ProblemError, problem_of

_START_SECONDS = 300.0
_END_SECONDS = 2.0  # for a process that has nothing left to do
_LINE_BYTES = 2**20  # so that neither side waits for the other to read while it has work
_log = logging.getLogger(__name__)


class RequestResult(NamedTuple):
    """What came back for one request.

    Attributes:
        results: One an image, in the order of the request: the answer in JSON (or logits, float32 [C]), or why there
            is none.
        seen: The facts of each answered image; None in the place of a refused one.
        stage_seconds: ``decode``, ``queue`` and ``infer``, of the slowest image.
        batch_size: Images in the last batch that one of them ran in; 0 if nothing ran.
    """

    results: list[bytes | Problem]
    seen: list[PredictionFacts | None]
    stage_seconds: dict[str, float]
    batch_size: int


ResultCallback = Callable[[RequestResult | ProblemError], None]
"""Told what became of one request."""
AnswerCallback = Callable[[Sequence[PredictionFacts | None], Mapping[str, float], int], None]
"""Told of every answer: its ``seen``, ``stage_seconds`` and ``batch_size``."""


@dataclass(frozen=True)
class ChildProcess:
    """An engine process that was started.

    Attributes:
        line: Our end of the line.
        kill: Ends it at once; harmless when it has ended.
        pid: Its number.
    """

    line: socket.socket
    kill: Callable[[], None]
    pid: int


def launch(orders: EngineConfig) -> ChildProcess:
    """Start an engine process.

    Raises:
        UsageError: This system cannot hand a socket to another process.
    """
    if sys.platform == "win32":
        raise UsageError("the service needs Linux or macOS; on Windows, run it in WSL or a container.")
    ours, theirs = connected_lines()
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - this very interpreter, and arguments of our own
            [sys.executable, "-P", "-m", "serve.engine", str(theirs.fileno()), orders.model_dump_json()],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    threading.Thread(target=process.wait, name=f"wait-{process.pid}", daemon=True).start()  # leaves no zombie
    return ChildProcess(ours, process.kill, process.pid)


def connected_lines() -> tuple[socket.socket, socket.socket]:
    """Two ends of a line."""
    ends = socket.socketpair()
    for end in ends:
        for size in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, size, _LINE_BYTES)
    return ends


class EngineProcess(asyncio.Protocol):
    """The connection with one engine process.

    Args:
        launched: The process.
        on_done: Told what became of a request.
        on_lost: Told that a process that was ready is gone.

    Attributes:
        calls: What the process has in hand, by number, the oldest first.
        ready: Whether it was made ready; only then its end is told.
        since: When it became ready, on the clock of ``time.monotonic``.
        heard: When it last said something.
    """

    transport: asyncio.Transport

    def __init__(
        self,
        launched: ChildProcess,
        on_done: Callable[[EngineResponse], None],
        on_lost: Callable[["EngineProcess"], None],
    ) -> None:
        self.calls: dict[int, PendingRequest] = {}
        self.ready = False
        self.since = self.heard = time.monotonic()
        self._launched = launched
        self._on_done = on_done
        self._on_lost = on_lost
        self._hello: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.Event()
        self._inbox = MessageReader()
        self._outbox: list[bytes] = []

    async def open(self) -> EngineReady:
        """Connect, and wait until the process is ready.

        Raises:
            LtkdError: It did not become so.
        """
        loop = asyncio.get_running_loop()
        try:
            await loop.create_unix_connection(lambda: self, sock=self._launched.line)
            async with asyncio.timeout(_START_SECONDS):
                hello = await self._hello
        except TimeoutError:
            await self.end()
            raise DeviceError(f"the engine process was not ready within {_START_SECONDS:g} s.") from None
        except BaseException:
            await self.end()
            raise
        self.since = time.monotonic()
        return hello

    def write(self, message: bytes) -> None:
        """Send something to the process, together with what else this turn of the event loop brings."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(message)

    def _flush(self) -> None:
        messages, self._outbox = self._outbox, []
        self.transport.write(messages[0] if len(messages) == 1 else b"".join(messages))

    def kill(self) -> None:
        """End the process at once, whatever it is doing."""
        self._launched.kill()
        self.transport.abort()

    async def end(self) -> None:
        """Let the process end by itself; kill it if it does not."""
        self.ready = False
        if not hasattr(self, "transport"):
            self._launched.line.close()
        else:
            with contextlib.suppress(OSError, RuntimeError):  # it may have ended already
                self.transport.write_eof()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), _END_SECONDS)
            self.transport.abort()
        self._launched.kill()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The line is open."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class

    def data_received(self, data: bytes) -> None:
        """The process says something."""
        self.heard = time.monotonic()
        for kind, message in self._inbox.feed(data):
            if kind == Kind.DONE:
                self._on_done(unpack_response(message))
            elif kind == Kind.LOG:
                _log.error("in the engine process: %s", unpack_text(message).rstrip())
            elif kind == Kind.HELLO:
                self._hello.set_result(EngineReady.model_validate_json(unpack_text(message)))
            elif kind == Kind.FAILED:
                self._hello.set_exception(_error(Failed.model_validate_json(unpack_text(message))))

    def connection_lost(self, exc: Exception | None) -> None:
        """The process is gone."""
        self._ended.set()
        if not self._hello.done():
            self._hello.set_exception(DeviceError("the engine process ended before it was ready; see what it printed."))
        was_ready, self.ready = self.ready, False
        self._launched.kill()
        if was_ready:
            self._on_lost(self)


def _error(failed: Failed) -> LtkdError:
    """The error that an engine process ended with, as it was there."""
    kind = getattr(ltkd.errors, failed.error, LtkdError)
    return kind(failed.message) if isinstance(kind, type) and issubclass(kind, LtkdError) else LtkdError(failed.message)


@dataclass(slots=True, eq=False)
class PendingRequest:
    """A request in the hands of an engine process.

    Attributes:
        number: Its number on the line.
        line: Where it was sent, or where it waits for a process that it can be sent to.
        problems: Of the images that were not sent, by their place.
        num_images: Images that were sent.
        sent: When, on the clock of ``time.monotonic``.
        answered: Told what became of it; None once it has been, or when nobody waits any more.
    """

    number: int
    line: "EngineProcess | PendingQueue"
    problems: dict[int, Problem]
    num_images: int
    sent: float
    answered: ResultCallback | None


class PendingQueue:
    """Requests that wait while no engine process is there: to who writes on it a line, whose other end comes later.

    Attributes:
        calls: What was written, by number.
    """

    def __init__(self) -> None:
        self.calls: dict[int, PendingRequest] = {}
        self._written: list[bytes] = []

    def write(self, message: bytes) -> None:
        """Keep something that a process is to be told."""
        self._written.append(message)

    def move_to(self, line: EngineProcess) -> None:
        """Send everything to a process."""
        for call in self.calls.values():
            call.line = line
        line.calls.update(self.calls)
        line.write(b"".join(self._written))


def request_result(done: EngineResponse, problems: Mapping[int, Problem]) -> RequestResult:
    """What came back, with the problems of images that were not sent in their places."""
    _, decode_seconds, queue_seconds, infer_seconds, batch_size, outcomes = done
    results: list[bytes | Problem] = []
    facts: list[PredictionFacts | None] = []
    for status, payload, seen in outcomes:
        results.append(problem_of(status, payload.decode()) if status else payload)
        facts.append(seen)
    for place in sorted(problems):
        results.insert(place, problems[place])
        facts.insert(place, None)
    stage_seconds = {"decode": decode_seconds}
    if batch_size:
        stage_seconds["queue"] = queue_seconds
        stage_seconds["infer"] = infer_seconds
    return RequestResult(results, facts, stage_seconds, batch_size)
