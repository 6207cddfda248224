"""The connection of one client: uvicorn's protocol class with the limits and timeouts that it lacks.

It limits the size of request heads and the number of connections, sets deadlines for heads and for clients that do not
read, and answers malformed requests with a problem, after the responses to the requests before them. Limits of bodies
are in the application (serve/http/bodies.py), so that they hold under every ASGI server.

This is the only module that uses the inside of uvicorn. tests/serve/http/test_uvicorn.py lists what it uses, and says
what to do when that changes.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Collection
from enum import Enum
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from serve.http.bodies import JSON
from serve.http.service import Service
from serve.problems import MEDIA_TYPE, make_problem

PROBES = (b"/livez", b"/readyz", b"/v2/health/live", b"/v2/health/ready")
_IDLE_AFTER_SECONDS = 1.0  # a client that has connected or received a response may be about to send a request
_MAX_PIPELINED = 128  # requests that a client may send without waiting for responses
_SMALL_CHUNK_BYTES, _MAX_SMALL_CHUNKS = 64, 1000  # no client sends a body byte by byte, and each chunk takes 3 us
_LINGER_SECONDS = 2.0  # a client that is rejected while it sends needs time to read the response


class Phase(Enum):
    """What the parser reads next."""

    START = "the first byte of a request"
    HEAD = "the rest of a head"
    BODY = "the rest of a body"


class Flow(FlowControl):
    """Flow control that reads more only if the client reads its responses and has no pipelined requests waiting.

    uvicorn resumes reading after each response, so a client that pipelines without end would fill the memory.
    """

    def __init__(self, transport: asyncio.Transport, pipeline: Collection[object]) -> None:
        super().__init__(transport)
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        """Resume reading, unless the client does not read its responses or has pipelined requests waiting."""
        if not self.write_paused and not self._pipeline:
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """The connection of one client.

    Attributes:
        since: Start of the connection's current state, on the clock of ``time.monotonic``.
        served_one: Whether a request was answered.
    """

    def __init__(
        self,
        service: Service,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.since = time.monotonic()
        self._unanswered: deque[RequestResponseCycle] = deque()  # begun, and without a complete response
        self._service = service
        self._limits = service.settings
        self._phase = Phase.START
        self.served_one = False
        self._only_probes = False
        self._num_body_bytes = self._num_chunks = 0  # of the current body
        self._num_control_bytes = 0  # received since the head began, or since the last byte of a body
        self._upgrading = False
        self._rejection: bytes | None = None

    @property
    def is_idle(self) -> bool:
        """Whether the connection is open, no request on it waits for a response, and it is not about to send one."""
        waits = self._unanswered or time.monotonic() - self.since < _IDLE_AFTER_SECONDS
        return not waits and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        """Register the connection. If too many are open, close the one that has been idle for the longest time.

        Those on which no request was answered yet are closed first: clients with a persistent connection keep it.
        """
        super().connection_made(transport)
        self.flow = Flow(transport, self.pipeline)
        if len(self.connections) > self._limits.max_connections:
            others = [each for each in self.connections if isinstance(each, Connection) and each is not self]
            if idle := [each for each in others if each.is_idle]:
                min(idle, key=lambda each: (each.served_one, each.since)).abort()
            else:
                self._only_probes = True

    def abort(self) -> None:
        """Close the connection at once. The application is told so, and what it sends is ignored."""
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell all requests that the client has left; uvicorn tells only the last of several pipelined ones."""
        self.abort()
        super().connection_lost(exc)
        if self.timeout_keep_alive_task:  # uvicorn leaves it if the client reset the connection
            self.timeout_keep_alive_task.cancel()

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, and reject a request that is not valid HTTP or whose head is too large."""
        if self._rejection is not None:
            return
        self._num_control_bytes = len(data) + (self._num_control_bytes if self._phase != Phase.START else 0)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self._reject(400, "this is not valid HTTP/1.1; send a request with its headers and a Content-Length.")
        else:
            if self._phase != Phase.START and self._num_control_bytes > self._limits.max_header_bytes:
                self._reject_head()

    def pause_writing(self) -> None:
        """Stop reading from a client that does not read its responses."""
        super().pause_writing()
        self.flow.pause_reading()
        self.since = time.monotonic()

    def resume_writing(self) -> None:
        """Resume reading when the client has read its responses."""
        super().resume_writing()
        if not self._unanswered:
            self.flow.resume_reading()

    def check(self, now: float) -> None:
        """Close the connection if the client exceeds a time limit. The server calls this regularly."""
        if now - self.since <= self._allowed_seconds():
            return
        if self._phase == Phase.HEAD and self._rejection is None and not self.flow.write_paused:
            detail = f"the headers did not arrive within {self._limits.header_seconds:g} s; send them sooner."
            self._reject(408, detail)
        else:
            self.abort()

    def _allowed_seconds(self) -> float:
        """How long the current state may last."""
        limits = self._limits
        if self.flow.write_paused:
            return limits.write_seconds
        if self._unanswered:
            return math.inf  # the application has deadlines for the body and for the response
        if self._rejection is not None:
            return _LINGER_SECONDS
        if self._phase == Phase.BODY:  # of a request that was answered before its body had arrived
            return limits.body_seconds + _LINGER_SECONDS
        return limits.idle_seconds if self.served_one and self._phase == Phase.START else limits.header_seconds

    def on_message_begin(self) -> None:
        """Start the head of a request."""
        super().on_message_begin()
        self._phase = Phase.HEAD
        if not self._unanswered:
            self.since = time.monotonic()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header. Fields in the trailer of a chunked body are ignored: they must not become headers."""
        if self._phase == Phase.BODY:
            return
        super().on_header(name, value)
        if len(self.headers) > self._limits.max_headers:
            self._reject_head()
            raise ValueError  # stops the parser

    def on_headers_complete(self) -> None:
        """Check the size of the head, and begin the request."""
        head_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head_bytes > self._limits.max_header_bytes:
            self._reject_head()
            raise ValueError  # stops the parser
        if self.parser.should_upgrade():
            self._upgrading = True
            return
        if self._only_probes and self.url not in PROBES:
            self._reject(503, f"{self._limits.max_connections} connections are open; try again.")
            raise ValueError  # stops the parser
        if len(self._unanswered) >= _MAX_PIPELINED:
            self._reject(429, f"{_MAX_PIPELINED} requests wait for their responses; read these before sending more.")
            raise ValueError  # stops the parser
        super().on_headers_complete()  # raises an exception for an invalid URL
        self._unanswered.append(self.cycle)
        self._phase = Phase.BODY
        self._num_body_bytes = self._num_chunks = 0

    def on_body(self, body: bytes) -> None:
        """Store a part of the body."""
        self._num_control_bytes = 0
        self._num_body_bytes += len(body)
        self._num_chunks += 1
        if self._num_chunks > _MAX_SMALL_CHUNKS + self._num_body_bytes // _SMALL_CHUNK_BYTES:
            self._reject(400, f"the body is sent in chunks of less than {_SMALL_CHUNK_BYTES} bytes; send larger ones.")
            raise ValueError  # stops the parser
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the body of the request."""
        if not self._upgrading:
            self._phase = Phase.START
            self._num_control_bytes = 0
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Continue with the next pipelined request, if there is one, and with reading."""
        self.served_one = True
        self._unanswered.popleft()
        self.since = time.monotonic()
        super().on_response_complete()
        self._send_rejection()
        if self._only_probes:
            self.transport.close()  # these are not counted, so they must not stay

    def _feed(self, data: bytes) -> None:
        """Parse bytes. A request with an ``Upgrade`` header is parsed again without it.

        The parser expects another protocol after such a head, but a server may ignore the header (RFC 9110, 7.8), and
        some clients send it with every first request.

        Raises:
            HttpParserError: The bytes are not valid HTTP.
        """
        while data and self._rejection is None:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                rest = data[upgrade.args[0] :]
            self._upgrading = False
            method, version = self.parser.get_method(), self.parser.get_http_version().encode()
            if method == b"CONNECT":
                self._reject(405, "CONNECT is not supported; send the request directly.")
                return
            lines = [b"%b: %b\r\n" % (name, value) for name, value in self.headers if name != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as in uvicorn
            data = b"%b %b HTTP/%b\r\n%b\r\n%b" % (method, self.url, version, b"".join(lines), rest)

    def _reject_head(self) -> None:
        limits = self._limits
        allowed = f"at most {limits.max_header_bytes:,} bytes and {limits.max_headers} lines"
        self._reject(431, f"the request line and headers are too large ({allowed} are accepted); send fewer.")

    def _reject(self, status: int, detail: str) -> None:
        """Send a problem when the requests before it are answered, then close the connection.

        No further bytes are parsed. If the invalid bytes are in a body, its request gets no other response.
        """
        if self._rejection is not None:
            return  # the parser reports the exception of a callback too
        if self._phase == Phase.BODY and not self._drop_request():
            self._rejection = b""  # the request has a response already
            self._send_rejection()
            return
        context = self._service.request_context("", "")
        body = make_problem(status, detail).body
        retry = "retry-after: 1\r\n" if status == HTTPStatus.SERVICE_UNAVAILABLE else ""
        # clients of the Open Inference Protocol accept no other media type
        media_type = JSON if self._phase != Phase.START and self.url.startswith(b"/v2") else MEDIA_TYPE
        head = f"content-length: {len(body)}\r\ncontent-type: {media_type}\r\n{retry}connection: close\r\n"
        head += f"x-request-id: {context.request_id}\r\n\r\n"
        self._rejection = STATUS_LINE[status] + head.encode("latin-1") + body
        self._service.count(context, "none", status)
        self._send_rejection()

    def _drop_request(self) -> bool:
        """Drop the request whose body is invalid; return whether it was unanswered."""
        cycle = self.cycle
        if cycle.response_complete:
            return False
        self._unanswered.pop()
        waiting = [entry for entry in self.pipeline if entry[0] is not cycle]
        if len(waiting) < len(self.pipeline):
            self.pipeline.clear()
            self.pipeline.extend(waiting)
        else:
            if cycle.response_started:
                self.abort()  # another response must not be mixed with it
            cycle.disconnected = True  # the application gets http.disconnect, and what it sends is ignored
            cycle.message_event.set()
        return True

    def _send_rejection(self) -> None:
        """Send the rejection if nothing has to be sent before it.

        After it, the client's bytes are read for a moment longer: after an immediate close it might not receive the
        response.
        """
        if self._rejection is None or self._unanswered or self.transport.is_closing():
            return
        self.since = time.monotonic()
        self.transport.write(self._rejection)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
