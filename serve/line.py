"""The front's end of the line to one engine process: what comes back, and what is noticed when it ends."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Generic, TypeVar, cast

import ltkd.errors
from ltkd.errors import DeviceError, LtkdError
from serve.launch import Launched
from serve.wire import Done, Failed, Hello, Inbox, Kind, unpack_done, unpack_text

_START_SECONDS = 300.0
_END_SECONDS = 2.0  # for a process that has nothing left to do
_log = logging.getLogger(__name__)

Call = TypeVar("Call")


class Line(asyncio.Protocol, Generic[Call]):
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
        self, launched: Launched, on_done: Callable[[Done], None], on_lost: Callable[["Line[Call]"], None]
    ) -> None:
        self.calls: dict[int, Call] = {}
        self.ready = False
        self.since = self.heard = time.monotonic()
        self._launched = launched
        self._on_done = on_done
        self._on_lost = on_lost
        self._hello: asyncio.Future[Hello] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.Event()
        self._inbox = Inbox()
        self._outbox: list[bytes] = []

    async def open(self) -> Hello:
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
                self._on_done(unpack_done(message))
            elif kind == Kind.LOG:
                _log.error("in the engine process: %s", unpack_text(message).rstrip())
            elif kind == Kind.HELLO:
                self._hello.set_result(Hello.model_validate_json(unpack_text(message)))
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
