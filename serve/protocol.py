"""The connection of one client: uvicorn's, with limits that it lacks and a short way for the usual request.

One image in a plain POST to /v1/classify is parsed here, handed to the engine process and answered with one write,
without a task, a framework or a record on the way. Whatever is the least unusual about a request (another route, form
or encoding, a key that is not known, an odd parameter) goes the ordinary way, so that one place judges it.

Beside that, all connections get deadlines for headers, body, idleness and reading, and bounds on headers.
"""

import asyncio
import re
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any  # uvicorn's own signature

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from serve.bodies import ANY_BYTES
from serve.models import Served
from serve.problems import MEDIA_TYPE, Problem, ProblemError, problem_of
from serve.service import CLIENT_LEFT, ROUTE, TIMEOUT_HEADER, Asked, Head, Service, server_timing
from serve.wire import Wanted
from serve.worker import Call, Classified, Worker

_PATH = ROUTE.encode()
_PAIR = re.compile(rb"(top_k|model|version)=([A-Za-z0-9._-]{1,64})")
_UNUSUAL = (b"transfer-encoding", b"content-encoding", b"expect", b"upgrade")
_TIMEOUT = TIMEOUT_HEADER.lower().encode()
_START = b"POST " + _PATH
_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ?(\d{1,8})\r\n")
_MAX_KNOWN_HEAD_BYTES = 1024
_LINGER_SECONDS = 2.0  # a client that is refused while it sends needs time to read why
_NOBODY = Asked("", None, 0.0)  # a request that was refused before its headers were read


class Exchange:
    """A request on the short way. To uvicorn it looks like a cycle of its own, as far as it looks."""

    __slots__ = (
        "asked", "body", "call", "deadline", "disconnected", "held_bytes", "keep_alive", "message_event",
        "more_body", "response_complete", "served", "top_k",
    )  # fmt: skip

    def __init__(self, this: Asked, served: Served[Worker], top_k: int, deadline: float, keep_alive: bool) -> None:
        self.asked = this
        self.served = served
        self.top_k = top_k
        self.deadline = deadline
        self.keep_alive = keep_alive
        self.body = b""
        self.held_bytes = 0
        self.call: Call | None = None
        self.more_body = True
        self.disconnected = False
        self.response_complete = False
        self.message_event = _NO_EVENT


class _NoEvent:
    def set(self) -> None:
        """Nobody waits for it."""


_NO_EVENT = _NoEvent()


class Flow(FlowControl):
    """Reads on only for a client that reads its answers and has not asked for more than it waits for.

    uvicorn reads on after each answer, so a client that asks without end fills the memory.
    """

    def __init__(self, connection: "Connection", transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._connection = connection

    def resume_reading(self) -> None:
        """Read on, unless there is a reason to wait."""
        if not self.write_paused and not self._connection.pipeline:
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """One client's connection.

    Attributes:
        since: When what it does now began, on the clock of ``time.monotonic``.
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
        self._head_bytes = 0
        self._num_headers = 0
        self._receiving_head = False
        self._receiving_body = False
        self._fields: dict[bytes, bytes] = {}
        self._twice = False
        self._head_key = b""
        self._refused = False
        self._served_one = False
        self._in_hand: Exchange | None = None

    # the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        self.flow = Flow(self, transport)
        if self.service:
            self.service.connections.add(self)
            if len(self.connections) > self.service.settings.max_connections:
                self._refuse(503, f"{self.service.settings.max_connections} connections are open; try again.")

    def connection_lost(self, exc: Exception | None) -> None:
        if self.service:
            self.service.connections.discard(self)
        if self._in_hand:
            self._leave(self._in_hand)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if not self._receiving_head and not self._receiving_body:
            if data.startswith(_START) and self._is_known(data):
                return
            self._begin_head()
        if self._receiving_head:
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # nothing is upgraded to; the request is answered as if it had not asked
        except httptools.HttpParserError:
            if not self._refused:
                self._refuse(400, "this is not HTTP/1.1; send a request with its headers and a Content-Length.")
        else:
            if self._receiving_head and self.service and self._head_bytes > self.service.settings.max_header_bytes:
                self._refuse_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.flow.pause_reading()  # who does not read answers asks for no more of them
        self.since = time.monotonic()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.cycle is None or self.cycle.response_complete:
            self.flow.resume_reading()

    def check(self, now: float) -> None:
        """Part with a client that takes too long; called now and then."""
        assert self.service
        settings, waited = self.service.settings, now - self.since
        busy = self.cycle is not None and not self.cycle.response_complete
        if self._refused:
            if waited > _LINGER_SECONDS:
                self.transport.abort()
        elif self.flow.write_paused:
            if waited > settings.write_seconds:
                self.transport.abort()
        elif self._receiving_head:
            if waited > settings.header_seconds and not busy:
                self._refuse(408, f"the headers did not arrive within {settings.header_seconds:g} s; send them sooner.")
        elif self._receiving_body:
            if waited > settings.body_seconds:
                self._refuse_body(waited)
        elif not busy and waited > (settings.idle_seconds if self._served_one else settings.header_seconds):
            self.transport.close()

    # a request, as the parser finds it

    def on_message_begin(self) -> None:
        if not self._receiving_head:
            self._begin_head()
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._fields = {}
        self._twice = False
        self._num_headers = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self._num_headers += 1
        if self.service and self._num_headers > self.service.settings.max_headers:
            self._refuse_head()
            raise ValueError  # the parser shall stop
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self._twice = self._twice or name in self._fields
        self._fields[name] = value
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        if self.service:
            head_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if head_bytes > self.service.settings.max_header_bytes:
                self._refuse_head()
                raise ValueError  # the parser shall stop
        self._receiving_head, self._receiving_body = False, True
        self.since = time.monotonic()
        exchange = self._exchange()
        if exchange:
            self._in_hand = exchange
            self.cycle = exchange  # type: ignore[assignment] # it has what uvicorn asks of a cycle
        else:
            self._go_the_ordinary_way()

    def on_body(self, body: bytes) -> None:
        exchange = self.cycle
        if not isinstance(exchange, Exchange):
            super().on_body(body)
            return
        if exchange.response_complete or not self.service:
            return
        exchange.body += body
        self._take_in(exchange, len(body))

    def on_message_complete(self) -> None:
        self._receiving_body = False
        self.since = time.monotonic()
        exchange = self.cycle
        if not isinstance(exchange, Exchange):
            super().on_message_complete()
        elif not exchange.response_complete:
            self._classify(exchange)

    def on_response_complete(self) -> None:
        self._served_one = True
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        self.flow.resume_reading()
        if self.cycle is not None and not self.cycle.response_complete:
            return
        if not self._receiving_head and not self._receiving_body:
            self.since = time.monotonic()

    # the short way

    def _is_known(self, data: bytes) -> bool:
        """Take a whole request whose head was judged before, byte for byte but for the length of its body."""
        self._head_key = b""
        end = data.find(b"\r\n\r\n", 0, _MAX_KNOWN_HEAD_BYTES)
        length = _LENGTH.search(data, 0, end + 2) if end > 0 else None
        if length is None or self.service is None:
            return False
        key = data[: length.start(1)] + data[length.end(1) : end]
        known = self.service.known_heads.get(key)
        if known is None:
            self._head_key = key
            return False
        if (
            len(data) - end - 4 != int(length[1])
            or int(length[1]) > self.service.settings.max_body_bytes
            or (self.cycle is not None and not self.cycle.response_complete)
        ):
            return False
        exchange = self._begin(known)
        if exchange is None:
            return False
        self.cycle = exchange  # type: ignore[assignment] # it has what uvicorn asks of a cycle
        self._in_hand = exchange
        exchange.body = data[end + 4 :]
        self._take_in(exchange, len(exchange.body))
        if not exchange.response_complete:
            self._classify(exchange)
        return True

    def _exchange(self) -> Exchange | None:
        """The request if it is a usual one, else None."""
        service, fields = self.service, self._fields
        if (
            service is None
            or self._twice
            or (self.cycle is not None and not self.cycle.response_complete)
            or self.parser.get_method() != b"POST"
            or not self._is_one_image(service.settings.max_body_bytes)
        ):
            return None
        query = _query(self.url)
        if query is None:
            return None

        def text(name: bytes) -> str:
            return fields.get(name, b"").decode("latin-1")

        head = Head(
            authorization=text(b"authorization"),
            request_id=text(b"x-request-id"),
            traceparent=text(b"traceparent"),
            timeout=text(_TIMEOUT),
            model=query.get("model"),
            version=query.get("version"),
            top_k=int(query.get("top_k", service.settings.top_k)),
            keep_alive=self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive(),
        )
        exchange = self._begin(head)
        if exchange and self._head_key:
            service.know_head(self._head_key, head)
        self._head_key = b""
        return exchange

    def _begin(self, head: Head) -> Exchange | None:
        """The request with such a head; None if the ordinary way must say what is wrong with it."""
        service = self.service
        assert service
        if not service.accepting:
            return None
        try:
            service.keys.authorise(head.authorization, "classify")
            served = service.models.find(head.model, head.version)
            this = service.asked(head.request_id, head.traceparent)
            deadline = service.deadline(this, head.timeout)
        except ProblemError:
            return None
        top_k = min(head.top_k, len(served.worker.manifest.task.class_names))
        return Exchange(this, served, top_k, deadline, head.keep_alive)

    def _take_in(self, exchange: Exchange, num_bytes: int) -> None:
        """Count bytes of the body, and refuse the request if there are too many in hand."""
        assert self.service
        exchange.held_bytes += num_bytes
        try:
            self.service.hold_bytes(num_bytes)
        except ProblemError as error:
            self._answer_problem(exchange, error)

    def _is_one_image(self, max_bytes: int) -> bool:
        fields = self._fields
        media_type = fields.get(b"content-type", ANY_BYTES.encode())
        length = fields.get(b"content-length", b"")
        return (
            (media_type.startswith(b"image/") or media_type == ANY_BYTES.encode())
            and length.isdigit()
            and int(length) <= max_bytes
            and not any(name in fields for name in _UNUSUAL)
        )

    def _classify(self, exchange: Exchange) -> None:
        def answered(told: Classified | ProblemError) -> None:
            self._answer(exchange, told)

        try:
            exchange.call = exchange.served.worker.submit(
                [exchange.body], Wanted.ANSWERS, exchange.top_k, exchange.deadline, answered
            )
        except ProblemError as error:
            self._answer_problem(exchange, error)

    def _answer(self, exchange: Exchange, told: Classified | ProblemError) -> None:
        assert self.service
        if isinstance(told, ProblemError):
            self._answer_problem(exchange, told)
            return
        try:
            body = self.service.answer(exchange.served, told, exchange.asked)
        except ProblemError as error:
            self._answer_problem(exchange, error)
            return
        self._write(exchange, 200, "application/json", body, {"server-timing": server_timing(told.stage_seconds)})

    def _answer_problem(self, exchange: Exchange, error: ProblemError) -> None:
        self._write(
            exchange, error.problem.status, MEDIA_TYPE, error.problem.model_dump_json().encode(), error.headers or {}
        )

    def _write(self, exchange: Exchange, status: int, media_type: str, body: bytes, headers: Mapping[str, str]) -> None:
        """Send an answer, once, as one piece."""
        assert self.service
        if "Connection" in headers or self.service.leaving:
            exchange.keep_alive = False
        more = "".join([f"{name.lower()}: {value}\r\n" for name, value in headers.items() if name != "Connection"])
        if exchange.asked.trace:
            more += f"traceparent: {exchange.asked.trace.header}\r\n"
        if not exchange.keep_alive:
            more += "connection: close\r\n"
        head = (
            f"content-length: {len(body)}\r\ncontent-type: {media_type}\r\n{more}"
            f"x-request-id: {exchange.asked.request_id}\r\nx-ltkd-provider: {exchange.served.worker.provider}\r\n\r\n"
        )
        always = b"".join([b"%b: %b\r\n" % pair for pair in self.server_state.default_headers])
        self.transport.write(b"".join((STATUS_LINE[status], always, head.encode("latin-1"), body)))
        self._finish(exchange, status)
        if not exchange.keep_alive:
            self._close_softly()
        self.on_response_complete()

    def _finish(self, exchange: Exchange, status: int) -> None:
        assert self.service
        self._in_hand = None
        exchange.response_complete = True
        exchange.body = b""
        if exchange.held_bytes:
            self.service.hold_bytes(-exchange.held_bytes)
        self.service.count(exchange.asked, ROUTE, status)

    def _leave(self, exchange: Exchange) -> None:
        """The client is gone: what it asked is not computed."""
        exchange.disconnected = True
        if exchange.call:
            exchange.served.worker.cancel(exchange.call)
        self._finish(exchange, CLIENT_LEFT)

    # the ordinary way

    def _go_the_ordinary_way(self) -> None:
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)
        super().on_headers_complete()

    # refusals before there is a request

    def _begin_head(self) -> None:
        self._receiving_head = True
        self._head_bytes = 0
        self.since = time.monotonic()

    def _refuse_head(self) -> None:
        assert self.service
        limits = self.service.settings
        allowed = f"at most {limits.max_header_bytes:,} bytes and {limits.max_headers} lines"
        self._refuse(431, f"the request line and headers are too large, {allowed} are taken; send fewer.")

    def _refuse_body(self, waited: float) -> None:
        """The body is late; on the ordinary way its reader says so, and this only makes sure that it ends."""
        assert self.service
        seconds = self.service.settings.body_seconds
        exchange = self.cycle
        if isinstance(exchange, Exchange) and not exchange.response_complete:
            detail = f"the body did not arrive within {seconds:g} s; send less, or over a faster line."
            self._answer_problem(exchange, ProblemError(problem_of(408, detail), {"Connection": "close"}))
        elif waited > 2 * seconds + _LINGER_SECONDS:
            self.transport.abort()

    def _refuse(self, status: int, detail: str) -> None:
        """Answer what never became a request, and part."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.transport.abort()  # an answer is under way, and another one must not get between its bytes
            return
        problem: Problem = problem_of(status, detail)
        body = problem.model_dump_json().encode()
        retry = "retry-after: 1\r\n" if status == HTTPStatus.SERVICE_UNAVAILABLE else ""
        head = f"content-length: {len(body)}\r\ncontent-type: {MEDIA_TYPE}\r\n{retry}connection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head.encode("latin-1") + body)
        if self.service:
            self.service.count(_NOBODY, "none", status)
        self._close_softly()

    def _close_softly(self) -> None:
        """Send no more, but read what still comes for a moment: closed at once, the client might not see the answer."""
        self._refused = True
        self.since = time.monotonic()
        if self._receiving_head or self._receiving_body:
            self.transport.write_eof()
        else:
            self.transport.close()


def _query(url: bytes) -> dict[str, str] | None:
    """The parameters of a plain classify URL; None for any other."""
    path, mark, query = url.partition(b"?")
    if path != _PATH:
        return None
    found: dict[str, str] = {}
    for pair in query.split(b"&") if query or mark else ():
        parts = _PAIR.fullmatch(pair)
        if not parts or parts[1].decode() in found:
            return None
        found[parts[1].decode()] = parts[2].decode()
    top_k = found.get("top_k", "1")
    return found if top_k.isdigit() and int(top_k) > 0 else None
