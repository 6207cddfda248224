"""The connection of one client: uvicorn's protocol class with the limits and timeouts that it lacks.

It limits the size and number of headers and the number of connections. It sets timeouts for headers, bodies, idle
connections and clients that do not read. A rejected client gets a problem response and has a moment to read it before
the connection is closed.
"""

import asyncio
import time
from collections.abc import Collection
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from serve.http.service import RequestContext, Service
from serve.problems import MEDIA_TYPE, make_problem

_LINGER_SECONDS = 2.0  # a client that is rejected while it sends needs time to read the response
_NO_CONTEXT = RequestContext("", None, 0.0)  # for requests that are rejected before their headers were read


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
        service: Has the settings with the limits; None before the service is started.
        since: Start of the connection's current state, on the clock of ``time.monotonic``.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        service = app_state.get("service")
        assert service is None or isinstance(service, Service)
        self.service = service
        self.since = time.monotonic()
        self._receiving_head = False
        self._receiving_body = False
        self._head_bytes = 0
        self._closing = False
        self._served_one = False

    @property
    def busy(self) -> bool:
        """Whether a request has no complete response yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        """Register the connection; reject it if too many are open."""
        super().connection_made(transport)
        self.flow = Flow(transport, self.pipeline)
        if self.service:
            self.service.connections.add(self)
            if len(self.connections) > self.service.settings.max_connections:
                self._reject(503, f"{self.service.settings.max_connections} connections are open; try again.")

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the connection."""
        if self.service:
            self.service.connections.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse received bytes, and reject a request that is not valid HTTP or whose head is too large."""
        if self._closing:
            return
        if not self._receiving_head and not self._receiving_body:
            self._begin_head()
        if self._receiving_head:
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # upgrades are not supported; the request is answered without one
        except httptools.HttpParserError:
            if not self._closing:
                self._reject(400, "this is not HTTP/1.1; send a request with its headers and a Content-Length.")
        else:
            if self._receiving_head and self.service and self._head_bytes > self.service.settings.max_header_bytes:
                self._reject_head()

    def pause_writing(self) -> None:
        """Stop reading from a client that does not read its responses."""
        super().pause_writing()
        self.flow.pause_reading()
        self.since = time.monotonic()

    def resume_writing(self) -> None:
        """Resume reading when the client has read its responses."""
        super().resume_writing()
        if not self.busy:
            self.flow.resume_reading()

    def check(self, now: float) -> None:
        """Close the connection if the client exceeds a time limit. The service calls this regularly."""
        assert self.service
        limits, waited = self.service.settings, now - self.since
        if self._closing:
            if waited > _LINGER_SECONDS:
                self.transport.abort()
        elif self.flow.write_paused:
            if waited > limits.write_seconds:
                self.transport.abort()
        elif self._receiving_head:
            if waited > limits.header_seconds and not self.busy:
                self._reject(408, f"the headers did not arrive within {limits.header_seconds:g} s; send them sooner.")
        elif self._receiving_body:
            if waited > limits.body_seconds:
                self._on_late_body(waited)
        elif not self.busy and waited > (limits.idle_seconds if self._served_one else limits.header_seconds):
            self.transport.close()

    def on_message_begin(self) -> None:
        """Start the head of a request. uvicorn's own callback is called when the headers are complete."""
        if not self._receiving_head:
            self._begin_head()
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Store a header; reject the request if there are too many."""
        super().on_header(name, value)
        if self.service and len(self.headers) > self.service.settings.max_headers:
            self._reject_head()
            raise ValueError  # stops the parser

    def on_headers_complete(self) -> None:
        """Check the size of the head, and begin the request."""
        if self.service:
            head_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if head_bytes > self.service.settings.max_header_bytes:
                self._reject_head()
                raise ValueError  # stops the parser
        self._receiving_head, self._receiving_body = False, True
        self.since = time.monotonic()
        self._begin_request()

    def on_message_complete(self) -> None:
        """End the body of the request."""
        self._receiving_body = False
        self.since = time.monotonic()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Continue with the next pipelined request, if there is one, and with reading."""
        self._served_one = True
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        self.flow.resume_reading()
        if not (self.busy or self._receiving_head or self._receiving_body):
            self.since = time.monotonic()

    def _begin_head(self) -> None:
        self._receiving_head = True
        self._head_bytes = 0
        self.since = time.monotonic()

    def _begin_request(self) -> None:
        """Pass the request to the framework when its headers are complete."""
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)
        super().on_headers_complete()

    def _reject_head(self) -> None:
        assert self.service
        limits = self.service.settings
        allowed = f"at most {limits.max_header_bytes:,} bytes and {limits.max_headers} lines"
        self._reject(431, f"the request line and headers are too large ({allowed} are accepted); send fewer.")

    def _on_late_body(self, waited: float) -> None:
        """Abort the connection if the body is much too late. The code that reads the body has already sent a 408."""
        assert self.service
        if waited > 2 * self.service.settings.body_seconds + _LINGER_SECONDS:
            self.transport.abort()

    def _reject(self, status: int, detail: str) -> None:
        """Send a problem before a request has begun, and close the connection."""
        if self.busy:
            self.transport.abort()  # a response is being sent, and another one must not be mixed with it
            return
        body = make_problem(status, detail).body
        retry = "retry-after: 1\r\n" if status == HTTPStatus.SERVICE_UNAVAILABLE else ""
        head = f"content-length: {len(body)}\r\ncontent-type: {MEDIA_TYPE}\r\n{retry}connection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head.encode("latin-1") + body)
        if self.service:
            self.service.count(_NO_CONTEXT, "none", status)
        self._close_after_response()

    def _close_after_response(self) -> None:
        """Close the connection after the response.

        If the client is still sending, its bytes are read for a moment longer: after an immediate close it might not
        receive the response.
        """
        self._closing = True
        self.since = time.monotonic()
        if self._receiving_head or self._receiving_body:
            self.transport.write_eof()
        else:
            self.transport.close()
