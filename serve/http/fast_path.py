"""The fast path: answers a POST of one image to /v1/classify without FastAPI.

Such a request is parsed here, sent to the engine process and answered with one write. Every other request (another
route, body form or encoding, an invalid key, an unusual parameter) is passed to the FastAPI routes, so that its errors
are reported in one place.
"""

import logging
import re
from collections.abc import Mapping
from functools import lru_cache

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from serve.engine.messages import OutputKind
from serve.http.bodies import ANY_BYTES
from serve.http.connection import BoundedConnection
from serve.http.service import (
    CLIENT_CLOSED_REQUEST,
    ROUTE,
    TIMEOUT_HEADER,
    Head,
    RequestContext,
    Service,
    server_timing,
)
from serve.monitoring.logs import requests_log
from serve.pool.dispatcher import EnginePool
from serve.pool.pending_requests import PendingRequest, RequestResult
from serve.problems import MEDIA_TYPE, ProblemError, make_problem

_JSON = "application/json"
_PATH = ROUTE.encode()
_START = b"POST " + _PATH
_PAIR = re.compile(rb"(top_k|model|version)=([A-Za-z0-9._-]{1,64})")
_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ?(\d{1,8})\r\n")
_UNUSUAL = (b"transfer-encoding", b"content-encoding", b"expect", b"upgrade")
_TIMEOUT = TIMEOUT_HEADER.lower().encode()
_MAX_KNOWN_HEAD_BYTES = 1024
_END = b"\r\n\r\n"


class _NoEvent:
    def set(self) -> None:
        """Do nothing: no code waits for this event."""


class Exchange:
    """A request on the fast path. It has the attributes that uvicorn uses of its own request cycle."""

    __slots__ = (
        "context", "deadline", "disconnected", "head", "held_bytes", "keep_alive", "message_event", "parts", "pending",
        "pool", "response_complete",
    )  # fmt: skip

    def __init__(self, context: RequestContext, head: Head, deadline: float, pool: EnginePool) -> None:
        self.context = context
        self.head = head
        self.deadline = deadline
        self.pool = pool
        self.keep_alive = head.keep_alive
        self.parts: list[bytes] = []
        self.held_bytes = 0
        self.pending: PendingRequest | None = None
        self.disconnected = False
        self.response_complete = False
        self.message_event = _NO_EVENT


_NO_EVENT = _NoEvent()


class Connection(BoundedConnection):
    """The connection of one client, with the fast path for requests with one image."""

    _exchange: Exchange | None = None
    _head_key = b""

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the request of a client that has disconnected."""
        if exchange := self._exchange:
            exchange.disconnected = True
            if exchange.pending:
                exchange.pool.cancel(exchange.pending)
            self._finish(exchange, CLIENT_CLOSED_REQUEST)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Answer a whole request with a known head at once; pass other bytes to the parser."""
        is_idle = not (self._receiving_head or self._receiving_body or self._closing or self.busy)
        if is_idle and data.startswith(_START) and self.service and self._handle_known_head(data, self.service):
            return
        super().data_received(data)

    def on_body(self, body: bytes) -> None:
        """Store a part of the body."""
        if not isinstance(self.cycle, Exchange):
            super().on_body(body)
        elif exchange := self._exchange:
            exchange.parts.append(body)
            self._count_body(exchange, len(body))

    def on_message_complete(self) -> None:
        """Classify the image when the body is complete."""
        if not isinstance(self.cycle, Exchange):
            super().on_message_complete()
            return
        self._receiving_body = False
        if exchange := self._exchange:
            self._classify(exchange)

    def _handle_known_head(self, data: bytes, service: Service) -> bool:
        """Handle a whole request whose head equals a known one, except for the length of the body.

        Returns:
            Whether the request was handled; if not, the parser must read it.
        """
        self._head_key = b""
        end = data.find(b"\r\n\r\n", 0, _MAX_KNOWN_HEAD_BYTES)
        length = _LENGTH.search(data, 0, end + 2) if end > 0 else None
        if length is None:
            return False
        key = data[: length.start(1)] + data[length.end(1) : end]
        head = service.known_heads.get(key)
        if head is None:
            self._head_key = key  # remembered if the parser finds that the fast path can handle it
            return False
        num_bytes = len(data) - end - 4
        if num_bytes != int(length[1]) or num_bytes > service.settings.max_body_bytes:
            return False
        if self._reject_if_full(head, service):
            return True
        exchange = self._begin(head, service)
        if exchange is None:
            return False
        exchange.parts.append(data[end + 4 :])
        self._count_body(exchange, num_bytes)
        if not exchange.response_complete:
            self._classify(exchange)
        return True

    def _reject_if_full(self, head: Head, service: Service) -> bool:
        """Reject a request if the queue is full; return whether it was rejected.

        This is done before any other work, because thousands of requests per second may arrive under overload.
        """
        if not head.is_bare or not service.accepting or service.stopping or requests_log.isEnabledFor(logging.INFO):
            return False
        try:
            service.keys.authorise(head.authorization, "classify")
            pool = service.models.find(head.model, head.version).pool
        except ProblemError:
            return False
        rejection = pool.rejection()
        if rejection is None:
            return False
        start = _start(tuple(self.server_state.default_headers), rejection.problem.status, MEDIA_TYPE, pool.provider)
        request_id = service.new_request_id().encode()
        self.transport.write(b"".join((start, _middle(rejection), request_id, _END, rejection.problem.body)))
        service.telemetry.count_request(ROUTE, rejection.problem.status, "full")
        self.on_response_complete()
        return True

    def _begin_request(self) -> None:
        """Begin a request whose headers are complete: on the fast path if possible, otherwise in the framework."""
        key, self._head_key = self._head_key, b""
        head = self._parse_head(self.service) if self.service and not self.busy else None
        if self.service is None or head is None or self._begin(head, self.service) is None:
            super()._begin_request()
        elif key:
            self.service.remember_head(key, head)

    def _parse_head(self, service: Service) -> Head | None:
        """Parse the headers of a request with one image; None if the fast path cannot handle the request."""
        fields = dict(self.headers)
        query = _query(self.url)
        is_plain_post = len(fields) == len(self.headers) and self.parser.get_method() == b"POST"
        if query is None or not is_plain_post or not _is_one_image(fields, service.settings.max_body_bytes):
            return None

        def text(name: bytes) -> str:
            return fields.get(name, b"").decode("latin-1")

        return Head(
            authorization=text(b"authorization"),
            request_id=text(b"x-request-id"),
            traceparent=text(b"traceparent"),
            timeout=text(_TIMEOUT),
            model=query.get("model"),
            version=query.get("version"),
            top_k=int(query.get("top_k", service.settings.top_k)),
            keep_alive=self.parser.get_http_version() != "1.0" and self.parser.should_keep_alive(),
        )

    def _begin(self, head: Head, service: Service) -> Exchange | None:
        """Begin a request on the fast path; None if the FastAPI routes must report a problem with it."""
        if not service.accepting:
            return None
        try:
            service.keys.authorise(head.authorization, "classify")
            pool = service.models.find(head.model, head.version).pool
            context = service.request_context(head.request_id, head.traceparent)
            deadline = service.deadline(context, head.timeout)
        except ProblemError:
            return None
        exchange = Exchange(context, head, deadline, pool)
        self._exchange = exchange
        self.cycle = exchange  # type: ignore[assignment] # it has the attributes that uvicorn uses
        return exchange

    def _count_body(self, exchange: Exchange, num_bytes: int) -> None:
        """Count bytes of the body, and reject the request if too many are in memory."""
        assert self.service
        exchange.held_bytes += num_bytes
        try:
            self.service.reserve_bytes(num_bytes)
        except ProblemError as error:
            self._answer_problem(exchange, error)

    def _classify(self, exchange: Exchange) -> None:
        assert self.service
        service, head = self.service, exchange.head

        def on_result(result: RequestResult | ProblemError) -> None:
            if isinstance(result, ProblemError):
                self._answer_problem(exchange, result)
                return
            try:
                body = service.response_body(served, result, exchange.context)
            except ProblemError as error:
                self._answer_problem(exchange, error)
            else:
                self._write(exchange, 200, _JSON, body, f"server-timing: {server_timing(result.stage_seconds)}\r\n")

        try:
            served = service.models.find(head.model, head.version)  # a reload may have happened between head and body
            exchange.pool = served.pool
            top_k = min(head.top_k, len(served.pool.manifest.task.class_names))
            content = exchange.parts[0] if len(exchange.parts) == 1 else b"".join(exchange.parts)
            exchange.pending = served.pool.submit([content], OutputKind.ANSWERS, top_k, exchange.deadline, on_result)
        except ProblemError as error:
            self._answer_problem(exchange, error)

    def _answer_problem(self, exchange: Exchange, error: ProblemError) -> None:
        if error.headers and "Connection" in error.headers:
            exchange.keep_alive = False
        self._write(exchange, error.problem.status, MEDIA_TYPE, error.problem.body, _lines(error))

    def _write(self, exchange: Exchange, status: int, media_type: str, body: bytes, more: str) -> None:
        """Send a response in one write; ``more`` has the header lines that only some responses have."""
        assert self.service
        if self.service.stopping:
            exchange.keep_alive = False
        if exchange.context.trace:
            more += f"traceparent: {exchange.context.trace.header}\r\n"
        if not exchange.keep_alive:
            more += "connection: close\r\n"
        common = tuple(self.server_state.default_headers)
        start = _start(common, status, media_type, exchange.pool.provider)
        head = f"{len(body)}\r\n{more}x-request-id: {exchange.context.request_id}\r\n\r\n"
        self.transport.write(b"".join((start, head.encode("latin-1"), body)))
        self._finish(exchange, status)
        if not exchange.keep_alive:
            self._close_after_response()
        self.on_response_complete()

    def _finish(self, exchange: Exchange, status: int) -> None:
        assert self.service
        self._exchange = None
        exchange.response_complete = True
        exchange.parts = []
        self.service.reserve_bytes(-exchange.held_bytes)
        self.service.count(exchange.context, ROUTE, status)

    def _on_late_body(self, waited: float) -> None:
        if exchange := self._exchange:
            assert self.service
            detail = f"the body did not arrive within {self.service.settings.body_seconds:g} s"
            problem = make_problem(408, f"{detail}; send a smaller body or use a faster connection.")
            self._answer_problem(exchange, ProblemError(problem, {"Connection": "close"}))
        else:
            super()._on_late_body(waited)


@lru_cache
def _start(common: tuple[tuple[bytes, bytes], ...], status: int, media_type: str, provider: str) -> bytes:
    """The first bytes of a response, up to the length of the body. They change once per second, with the date."""
    own = f"content-type: {media_type}\r\nx-ltkd-provider: {provider}\r\ncontent-length: ".encode("latin-1")
    return b"".join((STATUS_LINE[status], *[b"%b: %b\r\n" % pair for pair in common], own))


@lru_cache
def _middle(rejection: ProblemError) -> bytes:
    """The bytes of a rejection from the length of its body to the request id."""
    return f"{len(rejection.problem.body)}\r\n{_lines(rejection)}x-request-id: ".encode("latin-1")


def _lines(error: ProblemError) -> str:
    """The header lines of an error, except ``Connection``, which ``_write`` adds."""
    headers = error.headers or {}
    return "".join([f"{name.lower()}: {value}\r\n" for name, value in headers.items() if name != "Connection"])


def _is_one_image(fields: Mapping[bytes, bytes], max_bytes: int) -> bool:
    any_bytes = ANY_BYTES.encode()
    media_type, length = fields.get(b"content-type", any_bytes), fields.get(b"content-length", b"")
    return (
        (media_type == any_bytes or media_type.startswith(b"image/"))
        and length.isdigit()
        and int(length) <= max_bytes
        and not any(name in fields for name in _UNUSUAL)
    )


def _query(url: bytes) -> dict[str, str] | None:
    """The query parameters of a URL that the fast path can handle; None for any other URL."""
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
