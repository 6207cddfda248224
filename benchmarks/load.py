"""A load generator for HTTP/1.1 on localhost: closed loop, open loop, and clients that disconnect.

It is one thread with plain sockets and epoll (Linux). Event-loop timers have a resolution of milliseconds, so the last
two milliseconds before a request is due are spent in a busy loop. Run it on its own core. The number of
connections, the sending time and the timeout of the last requests are bounded. Every response is checked. Each request
has an ``X-Request-ID`` of its own, as proxies send it, and a response with the id of another request is incorrect.

Latency is measured from the time at which a request was *due*, not from the time at which it was sent. Otherwise the
delay that a stalled server causes would not be counted. In a closed loop the two times are equal.
"""

import gc
import heapq
import ipaddress
import math
import random
import secrets
import select
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

REFUSED, LOST, UNANSWERED, CLIENT_LEFT = -1, -2, -3, -4
STATUS_NAMES = {
    REFUSED: "connection refused",
    LOST: "connection lost",
    UNANSWERED: "no answer",
    CLIENT_LEFT: "client left",
}
MAX_CONNECTIONS = 900  # one file descriptor each; the usual limit of a process is 1,024
SPIN_S = 0.002
_NO_ID = b"0" * 16  # replaced in each request that is sent
_TIMEOUT_S = 5.0
_RECONNECT_DELAY_S = 0.02
_DISCONNECT_WITHIN_S = 0.05
_CHUNK = 2**18

Address = tuple[str, int]
Event = tuple[float, Callable[[], None]]
"""Seconds from the start of a run, and the action at that time."""


@dataclass(frozen=True)
class Request:
    """A request as bytes, and a check whether the body of a 200 response is correct."""

    content: bytes
    is_correct: Callable[[bytes], bool]

    @cached_property
    def id_position(self) -> int:
        """Where the id of each request is written; -1 if the content has no place for it."""
        return self.content.find(b"X-Request-ID: " + _NO_ID) + len(b"X-Request-ID: ") if _NO_ID in self.content else -1


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended; times are in seconds from the start of the run.

    Attributes:
        status: The HTTP status, or a key of STATUS_NAMES.
        retry_after: Whether the response has a Retry-After header.
    """

    due_s: float
    done_s: float
    status: int
    correct: bool
    retry_after: bool = False

    @property
    def latency_s(self) -> float:
        """Seconds from the due time to the end."""
        return self.done_s - self.due_s


@dataclass(frozen=True)
class Result:
    """The outcomes of a load.

    Attributes:
        seconds: How long requests were sent. In a closed loop: the period of the counted responses.
        outcomes: One per request.
        started: When the run began, on the clock of ``time.perf_counter``.
    """

    seconds: float
    outcomes: Sequence[Outcome]
    started: float = 0.0

    def goodput(self, slo_s: float = math.inf) -> float:
        """Correct responses per second with a latency of at most ``slo_s``."""
        good = sum(1 for outcome in self.outcomes if outcome.correct and outcome.latency_s <= slo_s)
        return good / self.seconds if self.seconds else 0.0

    def goodput_of_burst(self, load_s: float, slo_s: float) -> float:
        """The goodput of the requests due in the first ``load_s``, over the time until the last of them was answered.

        A backlog that is processed after the load must not count as if it had been processed during the load.
        """
        in_time = [one for one in self.outcomes if one.correct and one.latency_s <= slo_s and one.due_s < load_s]
        return len(in_time) / max([load_s, *(one.done_s for one in in_time)])

    def latency_s(self, quantile: float, status: int = 200) -> float:
        """A quantile of the latency of the responses with one status; NaN if there are none."""
        return quantile_of([outcome.latency_s for outcome in self.outcomes if outcome.status == status], quantile)

    @property
    def wrong(self) -> int:
        """Responses with status 200 and an incorrect body."""
        return sum(1 for outcome in self.outcomes if outcome.status == 200 and not outcome.correct)

    @property
    def statuses(self) -> dict[str, int]:
        """The number of requests by status."""
        counts = Counter(outcome.status for outcome in self.outcomes)
        return {STATUS_NAMES.get(status, str(status)): counts[status] for status in sorted(counts)}

    def failed(self) -> list[Outcome]:
        """All outcomes except correct responses and clients that disconnected on purpose."""
        return [outcome for outcome in self.outcomes if not outcome.correct and outcome.status != CLIENT_LEFT]


def quantile_of(values: Sequence[float], quantile: float) -> float:
    """The smallest value that is at least as large as this share of all values; NaN for an empty sequence."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(quantile * len(ranked)) - 1)] if ranked else math.nan


def http_request(path: str, body: bytes, content_type: str, headers: str = "") -> bytes:
    """A POST request as bytes."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: {_NO_ID.decode()}\r\n"
    return f"{head}Content-Type: {content_type}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def poisson(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Due times of independent clients (a Poisson process)."""
    random_source, due_s, now_s = random.Random(seed), [], 0.0
    while (now_s := now_s + random_source.expovariate(rate)) < seconds:
        due_s.append(now_s)
    return due_s


def closed_loop(
    address: Address, requests: Sequence[Request], *, connections: int, seconds: float, events: Sequence[Event] = ()
) -> Result:
    """Send the next request on each connection as soon as the previous one is answered.

    Throughput is counted from one response to another, after the first third. Responses arrive in batches, so a fixed
    time window would include or miss a whole batch by chance.
    """
    run = _LoadRun(address, requests, events)

    def continue_loop(connection: _Connection | None, status: int) -> None:
        if run.now() >= seconds:
            return
        if status in (LOST, REFUSED, 429, 503):  # reconnect after a delay, as a client would
            run.schedule(run.now() + _RECONNECT_DELAY_S, lambda: reconnect(connection))
        else:
            run.send(run.now(), connection)

    def reconnect(connection: _Connection | None) -> None:
        if run.now() < seconds:
            run.send(run.now(), connection if connection is not None and run.is_open(connection) else None)

    run.on_finished = continue_loop
    for _ in range(min(connections, MAX_CONNECTIONS)):
        run.send(0.0)
    run.run_until(lambda: run.now() >= seconds and not run.num_pending, seconds + _TIMEOUT_S)
    return result_between(run.outcomes, seconds / 3, seconds)


def send_one_by_one(address: Address, requests: Sequence[Request], limit_s: float = 60.0) -> Result:
    """Send each request once, one after the other."""
    run = _LoadRun(address, requests, ())
    run.on_finished = lambda connection, _: (
        run.send(run.now(), connection) if len(run.outcomes) < len(requests) else None
    )
    run.send(run.now())
    run.run_until(lambda: not run.num_pending, limit_s)
    return Result(run.outcomes[-1].done_s, run.outcomes)


def result_between(outcomes: Sequence[Outcome], begin_s: float, end_s: float) -> Result:
    """The outcomes after the last response before ``begin_s``, up to the last response before ``end_s``."""
    begin = max((outcome.done_s for outcome in outcomes if outcome.done_s <= begin_s), default=0.0)
    counted = [outcome for outcome in outcomes if begin < outcome.done_s <= end_s]
    return Result(max((outcome.done_s for outcome in counted), default=begin) - begin, counted)


def open_loop(
    address: Address,
    requests: Sequence[Request],
    due_s: Sequence[float],
    *,
    timeout_s: float = _TIMEOUT_S,
    disconnect_share: float = 0.0,
    events: Sequence[Event] = (),
    stop: threading.Event | None = None,
    max_connections: int = MAX_CONNECTIONS,
    connect_first: bool = False,
    spin_s: float = SPIN_S,
) -> Result:
    """Send requests at given times, independently of the server.

    Args:
        address: Address of the server.
        requests: Sent in turn.
        due_s: Due times in seconds from now, ascending. If all connections are busy, a request waits for one.
        timeout_s: How long to wait for responses after the last due time.
        disconnect_share: Share of the clients that close their connection within 0.05 s, if there is no response yet.
        events: Actions at given times.
        stop: When it is set, no more requests are sent.
        max_connections: Largest number of simultaneous connections.
        connect_first: Open all connections at the start, as the pool of a proxy does, instead of when they are needed.
        spin_s: Duration of the busy loop before a request is due; 0 if another program needs the core.
    """
    run = _LoadRun(address, requests, events, spin_s)
    idle = deque([run.connect() for _ in range(max_connections)] if connect_first else [])
    take_idle = idle.popleft if connect_first else idle.pop  # a pool uses its connections in turn: none stays idle
    waiting: deque[float] = deque()
    to_come = deque(due_s)
    end_s = due_s[-1] if due_s else 0.0
    random_source = random.Random(len(due_s))
    run.on_finished = lambda connection, _: None if connection is None else idle.append(connection)

    def send_due_requests() -> bool:
        nonlocal end_s
        now = run.now()
        if stop is not None and stop.is_set() and (to_come or waiting):
            end_s = now
            to_come.clear()
            waiting.clear()
        while to_come and to_come[0] <= now:
            waiting.append(to_come.popleft())
        while waiting and (idle or len(run.connections) < max_connections):
            unused = take_idle() if idle else None
            if unused is not None and not run.is_open(unused):  # the server closed it meanwhile
                continue
            connection = run.send(waiting.popleft(), unused)
            if disconnect_share and random_source.random() < disconnect_share:
                run.disconnect_at(now + random_source.random() * _DISCONNECT_WITHIN_S, connection)
        run.next_due_s = to_come[0] if to_come else math.inf
        return not (to_come or waiting or run.num_pending)

    run.run_until(send_due_requests, end_s + timeout_s)
    run.outcomes += [Outcome(due, run.now(), UNANSWERED, correct=False) for due in waiting]
    return Result(max(end_s, 1e-9), run.outcomes, run.started)


class Response(NamedTuple):
    """A complete HTTP response."""

    status: int
    head: bytes
    body: bytes

    @property
    def closes(self) -> bool:
        """Whether the server closes the connection after it."""
        return b"\r\nconnection: close" in self.head


def parse_response(received: bytearray) -> Response | None:
    """Parse the response at the start of the received bytes; None if it is not complete yet."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(received[:end]).lower() + b"\r\n"
    status = int(head[9:12])
    if b"\r\ntransfer-encoding: chunked" in head:
        body = _joined_chunks(bytes(received[end + 4 :]))
        return None if body is None else Response(status, head, body)
    _, found, rest = head.partition(b"\r\ncontent-length:")
    size = int(rest[: rest.index(b"\r\n")]) if found else 0
    if len(received) < end + 4 + size:
        return None
    return Response(status, head, bytes(received[end + 4 : end + 4 + size]))


def _joined_chunks(body: bytes) -> bytes | None:
    whole, rest = b"", body
    while rest:
        size, found, rest = rest.partition(b"\r\n")
        if not found:
            return None
        num_bytes = int(size.partition(b";")[0], 16)
        if len(rest) < num_bytes + 2:
            return None
        if num_bytes == 0:
            return whole
        whole, rest = whole + rest[:num_bytes], rest[num_bytes + 2 :]
    return None


@dataclass(eq=False)
class _Connection:
    """A connection, with at most one request on it."""

    sock: socket.socket
    connected: bool = False
    request: Request | None = None
    request_id: bytes = b""
    number: int = 0
    due_s: float = 0.0
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    epoll_mask: int = select.EPOLLIN | select.EPOLLOUT
    received: bytearray = field(default_factory=bytearray)


class _LoadRun:
    """One run of the generator: its connections, its clock and its outcomes.

    Attributes:
        on_finished: Called when a request has ended, with its connection (None if it cannot be reused) and the status.
        next_due_s: When ``run_until`` must check again whether it is finished.
    """

    def __init__(
        self, address: Address, requests: Sequence[Request], events: Sequence[Event], spin_s: float = SPIN_S
    ) -> None:
        if not ipaddress.ip_address(address[0]).is_loopback:
            raise ValueError(f"load is sent to loopback addresses only, not to {address[0]}")
        self.outcomes: list[Outcome] = []
        self.connections: dict[int, _Connection] = {}
        self.num_pending = 0
        self.next_due_s = math.inf
        self.on_finished: Callable[[_Connection | None, int], object] = lambda _connection, _status: None
        self._address, self._requests, self._spin_s = address, requests, spin_s
        self._id_prefix = secrets.token_hex(4)
        self._num_sent = self._num_timers = 0
        self._epoll = select.epoll()
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        for time_s, action in events:
            self.schedule(time_s, action)
        self.started = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.started

    def schedule(self, time_s: float, action: Callable[[], object]) -> None:
        self._num_timers += 1  # keeps the order of timers with equal times
        heapq.heappush(self._timers, (time_s, self._num_timers, action))

    def send(self, due_s: float, connection: _Connection | None = None) -> _Connection:
        connection = connection or self.connect()
        request = self._requests[self._num_sent % len(self._requests)]
        self._num_sent += 1
        self.num_pending += 1
        connection.request, connection.number, connection.due_s = request, self._num_sent, due_s
        content, connection.request_id = bytearray(request.content), b""
        if request.id_position >= 0:
            connection.request_id = f"{self._id_prefix}{self._num_sent % 10**8:08}".encode()
            content[request.id_position : request.id_position + len(_NO_ID)] = connection.request_id
        connection.unsent = memoryview(content)
        if connection.connected:
            self._send(connection)
        return connection

    def disconnect_at(self, time_s: float, connection: _Connection) -> None:
        number = connection.number
        self.schedule(
            time_s,
            lambda: (
                self._finish(connection, CLIENT_LEFT) if connection.request and connection.number == number else None
            ),
        )

    def run_until(self, finished: Callable[[], bool], limit_s: float) -> None:
        """Run until ``finished`` returns true or the time limit is reached; then close every connection."""
        gc_was_enabled = gc.isenabled()
        gc.disable()  # a collection would look like a slow response
        try:
            while not finished() and self.now() < limit_s:
                self._poll_once()
        finally:
            if gc_was_enabled:
                gc.enable()
            self.on_finished = lambda _connection, _status: None
            for connection in list(self.connections.values()):
                self._finish(connection, UNANSWERED)
            self._epoll.close()

    def _poll_once(self) -> None:
        while self._timers and self._timers[0][0] <= self.now():
            heapq.heappop(self._timers)[2]()
        next_event_s = min(self.next_due_s, self._timers[0][0] if self._timers else math.inf)
        for number, mask in self._epoll.poll(max(0.0, min(next_event_s - self.now() - self._spin_s, 0.01))):
            connection = self.connections.get(number)
            if connection is not None and mask & select.EPOLLOUT:
                self._send(connection)
            if connection is not None and mask & ~select.EPOLLOUT and number in self.connections:
                self._receive(connection)

    def is_open(self, connection: _Connection) -> bool:
        return self.connections.get(connection.sock.fileno()) is connection

    def connect(self) -> _Connection:
        sock = socket.socket(socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect_ex(self._address)  # a refused connection is detected when the socket is ready
        connection = self.connections[sock.fileno()] = _Connection(sock)
        self._epoll.register(sock, connection.epoll_mask)
        return connection

    def _send(self, connection: _Connection) -> None:
        if not connection.connected:
            if connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._finish(connection, REFUSED)
                return
            connection.connected = True
        try:
            connection.unsent = (
                connection.unsent[connection.sock.send(connection.unsent) :] if connection.unsent else connection.unsent
            )
        except BlockingIOError:
            pass
        except OSError:  # closed by the server; its response is still to be read
            connection.unsent = memoryview(b"")
        epoll_mask = select.EPOLLIN | select.EPOLLOUT if connection.unsent else select.EPOLLIN
        if epoll_mask != connection.epoll_mask:
            connection.epoll_mask = epoll_mask
            self._epoll.modify(connection.sock, epoll_mask)

    def _receive(self, connection: _Connection) -> None:
        try:
            chunk = connection.sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self._finish(connection, LOST if connection.connected else REFUSED)
            return
        connection.received += chunk
        response = parse_response(connection.received)
        if response is None or connection.request is None:
            return
        is_own = not connection.request_id or _id_of(response) in (b"", connection.request_id)
        correct = response.status == 200 and is_own and connection.request.is_correct(response.body)
        reusable = not response.closes and not connection.unsent
        if not reusable:
            self._close(connection)
        self._record(
            connection,
            Outcome(connection.due_s, self.now(), response.status, correct, b"\r\nretry-after:" in response.head),
        )
        self.on_finished(connection if reusable else None, response.status)

    def _finish(self, connection: _Connection, status: int) -> None:
        self._close(connection)
        if connection.request is not None:
            self._record(connection, Outcome(connection.due_s, self.now(), status, correct=False))
            self.on_finished(None, status)

    def _record(self, connection: _Connection, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.num_pending -= 1
        connection.request = None
        connection.received = bytearray()

    def _close(self, connection: _Connection) -> None:
        self.connections.pop(connection.sock.fileno(), None)
        connection.sock.close()


def _id_of(response: Response) -> bytes:
    """The request id in a response; empty if it has none."""
    return response.head.partition(b"\r\nx-request-id: ")[2].partition(b"\r\n")[0]
