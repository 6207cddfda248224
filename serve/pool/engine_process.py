"""The server process's side of one engine process: start it, exchange messages with it, end it."""

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import ltkd.errors
from ltkd.errors import DeviceError, LtkdError, UsageError
from serve.engine.messages import (
    EngineConfig,
    EngineReady,
    Failed,
    Kind,
    MessageReader,
    pack_cancel,
    unpack_number,
    unpack_text,
)
from serve.pool.admission import ImageQueue
from serve.pool.pending_requests import PendingRequest

_START_SECONDS = 300.0
_END_SECONDS = 0.5  # for a process without requests
_SOCKET_BUFFER_BYTES = 2**20  # large enough that neither process waits for the other to read
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChildProcess:
    """An engine process that was started.

    Attributes:
        connection: The server process's end of the socket pair.
        kill: Kills the process; has no effect if it has ended.
        pid: Its process id.
    """

    connection: socket.socket
    kill: Callable[[], None]
    pid: int


def launch(config: EngineConfig) -> ChildProcess:
    """Start an engine process.

    Raises:
        UsageError: This operating system cannot pass a socket to a child process.
    """
    if sys.platform == "win32":
        raise UsageError("the service needs Linux or macOS; on Windows, run it in WSL or a container.")
    ours, theirs = connected_sockets()
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - this interpreter, with arguments of this module
            [sys.executable, "-P", "-m", "serve.engine", str(theirs.fileno()), config.model_dump_json()],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    threading.Thread(
        target=process.wait, name=f"wait-{process.pid}", daemon=True
    ).start()  # so that it does not stay a zombie
    return ChildProcess(ours, process.kill, process.pid)


def connected_sockets() -> tuple[socket.socket, socket.socket]:
    """A socket pair with buffers large enough for a request of many images."""
    ends = socket.socketpair()
    for end in ends:
        for size in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, size, _SOCKET_BUFFER_BYTES)
    return ends


class EngineProcess(asyncio.Protocol):
    """The connection to one engine process.

    Args:
        child: The process.
        on_response: Called with a request, the RESPONSE message and the time of its arrival.
        on_lost: Called when a process that was ready has ended.

    Attributes:
        requests: The requests that were sent and have no response yet, by number, the oldest first.
        ordinary: Counts the images of requests without large images.
        large: Counts the images of the other requests.
        ready: Whether the process can take requests. ``on_lost`` is called only for a process that was ready.
        ready_since: When it became ready, on the clock of ``time.monotonic``.
        last_message_at: When its last message arrived; each shows that it has made progress.
    """

    transport: asyncio.Transport

    def __init__(
        self,
        child: ChildProcess,
        on_response: Callable[[PendingRequest, memoryview, float], None],
        on_lost: Callable[["EngineProcess"], None],
    ) -> None:
        self.requests: dict[int, PendingRequest] = {}
        self.ordinary, self.large = ImageQueue(), ImageQueue()
        self.ready = False
        self.ready_since = self.last_message_at = time.monotonic()
        self._child = child
        self._on_response = on_response
        self._on_lost = on_lost
        self._is_ready: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.Event()
        self._reader = MessageReader()
        self._outbox: list[bytes] = []

    async def open(self) -> EngineReady:
        """Connect, and wait until the process reports that it is ready.

        Raises:
            LtkdError: The process could not become ready.
        """
        loop = asyncio.get_running_loop()
        try:
            await loop.create_unix_connection(lambda: self, sock=self._child.connection)
            async with asyncio.timeout(_START_SECONDS):
                ready = await self._is_ready
        except TimeoutError:
            await self.end()
            raise DeviceError(f"the engine process was not ready within {_START_SECONDS:g} s.") from None
        except BaseException:
            await self.end()
            raise
        self.ready_since = time.monotonic()
        return ready

    def send(self, request: PendingRequest, message: bytes) -> None:
        """Send a request."""
        self.requests[request.number] = request
        self.write(message)

    def cancel(self, number: int) -> bool:
        """Cancel a request that was sent. Returns True: its response still arrives."""
        self.write(pack_cancel(number))
        return True

    def write(self, message: bytes) -> None:
        """Send a message. All messages of one iteration of the event loop are sent in one write."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(message)

    def _flush(self) -> None:
        messages, self._outbox = self._outbox, []
        self.transport.write(messages[0] if len(messages) == 1 else b"".join(messages))

    def kill(self) -> None:
        """Kill the process at once."""
        self._child.kill()
        self.transport.abort()

    async def end(self) -> None:
        """Let the process end by itself; kill it if it does not. If it still has requests, they are lost at once."""
        self.ready = bool(self.requests)  # if so, its loss is reported
        if not hasattr(self, "transport"):
            self._child.connection.close()
        else:
            with contextlib.suppress(OSError, RuntimeError):  # it may have ended already
                self.transport.write_eof()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), 0 if self.requests else _END_SECONDS)
            self.transport.abort()
        self._child.kill()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport of the connection."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's has the same methods but another base class

    def data_received(self, data: bytes) -> None:
        """Handle every message that has arrived completely. ALIVE has no effect but that it arrived."""
        self.last_message_at = time.monotonic()
        for kind, message in self._reader.feed(data):
            try:
                self._handle(kind, message)
            except Exception as error:  # a defect; the other messages must be handled and the process kept
                _log.exception("a message of the engine process could not be handled")
                if not self._is_ready.done():
                    self._is_ready.set_exception(DeviceError(f"the engine process did not start correctly: {error}"))

    def _handle(self, kind: int, message: memoryview) -> None:
        if kind == Kind.RESPONSE:
            if request := self.requests.pop(unpack_number(message), None):
                self._on_response(request, message, self.last_message_at)
        elif kind == Kind.LOG:
            _log.error("in the engine process: %s", unpack_text(message).rstrip())
        elif kind == Kind.READY and not self._is_ready.done():  # cancelled if the pool is closing
            self._is_ready.set_result(EngineReady.model_validate_json(unpack_text(message)))
        elif kind == Kind.FAILED and not self._is_ready.done():
            self._is_ready.set_exception(_error(Failed.model_validate_json(unpack_text(message))))

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the end of the process."""
        self._ended.set()
        if not self._is_ready.done():
            self._is_ready.set_exception(
                DeviceError("the engine process ended before it was ready; its output above has the reason.")
            )
        was_ready, self.ready = self.ready, False
        self._child.kill()
        if was_ready:
            self._on_lost(self)


def _error(failed: Failed) -> LtkdError:
    """The error that ended an engine process, rebuilt from its message."""
    kind = getattr(ltkd.errors, failed.error, LtkdError)
    return kind(failed.message) if isinstance(kind, type) and issubclass(kind, LtkdError) else LtkdError(failed.message)
