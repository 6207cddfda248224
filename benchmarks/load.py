"""A load generator for HTTP/1.1 on this machine: closed loop, open loop, clients that leave and clients that are slow.

One thread, plain sockets and epoll (Linux). Timers of event loops tick in milliseconds; here the last two milliseconds
before a request is due are spun away, so give it a core of its own. Everything is bounded: the number of connections,
the time in which requests are sent and the patience with the last of them. Every answer is looked at.

Latency counts from the time at which a request was *due*, not from when it could at last be sent: a server that stalls
does not make its own stall invisible. On a closed loop the two are the same.
"""

import gc
import heapq
import ipaddress
import math
import random
import select
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

REFUSED, LOST, UNANSWERED, LEFT = -1, -2, -3, -4
ENDS = {
    REFUSED: "connection refused",
    LOST: "connection lost",
    UNANSWERED: "no answer",
    LEFT: "client left",
}
MAX_LINES = 900  # a file descriptor each; 1,024 of them are what a process usually may open
_SPIN_S = 0.002
_PATIENCE_S = 5.0
_COME_BACK_S = 0.02
_CHUNK = 2**18

Address = tuple[str, int]
Event = tuple[float, Callable[[], None]]
"""Seconds from the start of a run, and what happens then."""


@dataclass(frozen=True)
class Question:
    """A request as it goes over the line, and whether the body of a 200 is the right answer to it."""

    request: bytes
    is_right: Callable[[bytes], bool]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request; times in seconds from the start of the run.

    Attributes:
        status: The HTTP status, or one of ENDS.
        retry_after: Whether the answer said when to come again.
    """

    due_s: float
    done_s: float
    status: int
    right: bool
    retry_after: bool = False

    @property
    def latency_s(self) -> float:
        """From when it was due."""
        return self.done_s - self.due_s


@dataclass(frozen=True)
class Result:
    """A run.

    Attributes:
        seconds: How long requests were sent, or, on a closed loop, the time that the counted answers took.
        outcomes: One a request.
        started: When the run began, on the clock of ``time.perf_counter``.
    """

    seconds: float
    outcomes: Sequence[Outcome]
    started: float = 0.0

    def goodput(self, slo_s: float = math.inf) -> float:
        """Right answers a second that came within ``slo_s``."""
        good = sum(1 for outcome in self.outcomes if outcome.right and outcome.latency_s <= slo_s)
        return good / self.seconds if self.seconds else 0.0

    def goodput_of_burst(self, load_s: float, slo_s: float) -> float:
        """The same of requests due in the first ``load_s``, over the time until the last of them was answered.

        A queue that is worked off after the load has ended would else be counted as if it had been done meanwhile.
        """
        in_time = [one for one in self.outcomes if one.right and one.latency_s <= slo_s and one.due_s < load_s]
        return len(in_time) / max([load_s, *(one.done_s for one in in_time)])

    def latency_s(self, quantile: float, status: int = 200) -> float:
        """A quantile of the latency of the answers with one status; NaN if there was none."""
        return quantile_of([outcome.latency_s for outcome in self.outcomes if outcome.status == status], quantile)

    @property
    def wrong(self) -> int:
        """Answers that came with 200 and were not right."""
        return sum(1 for outcome in self.outcomes if outcome.status == 200 and not outcome.right)

    @property
    def statuses(self) -> dict[str, int]:
        """How many requests ended in which way."""
        counts = Counter(outcome.status for outcome in self.outcomes)
        return {ENDS.get(status, str(status)): counts[status] for status in sorted(counts)}

    def failed(self) -> list[Outcome]:
        """Everything but right answers and clients that left on their own."""
        return [outcome for outcome in self.outcomes if not outcome.right and outcome.status != LEFT]


def quantile_of(values: Sequence[float], quantile: float) -> float:
    """The smallest value that at least this share of all values does not exceed; NaN of nothing."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(quantile * len(ranked)) - 1)] if ranked else math.nan


def http_request(path: str, body: bytes, content_type: str, headers: str = "") -> bytes:
    """A POST as it goes over the line."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def uniform(rate: float, seconds: float) -> list[float]:
    """Due times at equal distances."""
    return [number / rate for number in range(round(rate * seconds))]


def poisson(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """Due times of independent clients: a Poisson process."""
    chance, due_s, now_s = random.Random(seed), [], 0.0
    while (now_s := now_s + chance.expovariate(rate)) < seconds:
        due_s.append(now_s)
    return due_s


def closed_loop(
    address: Address, questions: Sequence[Question], *, connections: int, seconds: float, events: Sequence[Event] = ()
) -> Result:
    """Ask on every connection again as soon as it is answered.

    Throughput is counted from an answer to an answer, after the first third: answers that come in batches would else be
    counted with or without a whole batch.
    """
    run = _Run(address, questions, events)

    def again(line: _Line | None, status: int) -> None:
        if run.now() >= seconds:
            return
        if status in (LOST, REFUSED, 429, 503):  # a client comes back, but does not hammer a door that is shut
            run.at(run.now() + _COME_BACK_S, lambda: come_back(line))
        else:
            run.ask(run.now(), line)

    def come_back(line: _Line | None) -> None:
        if run.now() < seconds:
            still_open = line is not None and run.open.get(line.sock.fileno()) is line
            run.ask(run.now(), line if still_open else None)

    run.on_end = again
    for _ in range(min(connections, MAX_LINES)):
        run.ask(0.0)
    run.until(lambda: run.now() >= seconds and not run.busy, seconds + _PATIENCE_S)
    return counted_between(run.outcomes, seconds / 3, seconds)


def one_by_one(address: Address, questions: Sequence[Question], limit_s: float = 60.0) -> Result:
    """Ask every question once, one after the other."""
    run = _Run(address, questions, ())
    run.on_end = lambda line, _: run.ask(run.now(), line) if len(run.outcomes) < len(questions) else None
    run.ask(run.now())
    run.until(lambda: not run.busy, limit_s)
    return Result(run.outcomes[-1].done_s, run.outcomes)


def counted_between(outcomes: Sequence[Outcome], begin_s: float, end_s: float) -> Result:
    """The outcomes after the last answer before ``begin_s`` and up to the last before ``end_s``."""
    begin = max((outcome.done_s for outcome in outcomes if outcome.done_s <= begin_s), default=0.0)
    counted = [outcome for outcome in outcomes if begin < outcome.done_s <= end_s]
    return Result(max((outcome.done_s for outcome in counted), default=begin) - begin, counted)


def open_loop(
    address: Address,
    questions: Sequence[Question],
    due_s: Sequence[float],
    *,
    patience_s: float = _PATIENCE_S,
    leaving: float = 0.0,
    leave_within_s: float = 0.05,
    events: Sequence[Event] = (),
    stop: threading.Event | None = None,
    lines: int = MAX_LINES,
) -> Result:
    """Ask at given times, whatever the server does.

    Args:
        address: Where the server listens.
        questions: Asked in turn.
        due_s: When, ascending, in seconds from now. A request that finds every connection busy waits for one.
        patience_s: How long after the last of them answers are waited for.
        leaving: Share of the clients that close their connection before the answer.
        leave_within_s: They leave at a random time within this one after asking.
        events: What happens meanwhile.
        stop: Once set, nothing more is sent.
        lines: The most connections at one time.
    """
    run = _Run(address, questions, events)
    idle: list[_Line] = []
    waiting: deque[float] = deque()
    to_come = deque(due_s)
    end_s = due_s[-1] if due_s else 0.0
    chance = random.Random(len(due_s))
    run.on_end = lambda line, _: None if line is None else idle.append(line)

    def send_what_is_due() -> bool:
        nonlocal end_s
        now = run.now()
        if stop is not None and stop.is_set() and (to_come or waiting):
            end_s = now
            to_come.clear()
            waiting.clear()
        while to_come and to_come[0] <= now:
            waiting.append(to_come.popleft())
        while waiting and (idle or len(run.open) < lines):
            asked = run.ask(waiting.popleft(), idle.pop() if idle else None)
            if leaving and chance.random() < leaving:
                run.leave_at(now + chance.random() * leave_within_s, asked)
        run.next_due_s = to_come[0] if to_come else math.inf
        return not (to_come or waiting or run.busy)

    run.until(send_what_is_due, end_s + patience_s)
    run.outcomes += [Outcome(due, run.now(), UNANSWERED, right=False) for due in waiting]
    return Result(max(end_s, 1e-9), run.outcomes, run.started)


class Answer(NamedTuple):
    """An HTTP answer that has arrived as a whole."""

    status: int
    head: bytes
    body: bytes

    @property
    def closes(self) -> bool:
        """Whether the server closes the connection after it."""
        return b"\r\nconnection: close" in self.head


def parsed(seen: bytearray) -> Answer | None:
    """The answer at the beginning of what has arrived, or None if it is not whole yet."""
    end = seen.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(seen[:end]).lower() + b"\r\n"
    status = int(head[9:12])
    if b"\r\ntransfer-encoding: chunked" in head:
        body = _joined_chunks(bytes(seen[end + 4 :]))
        return None if body is None else Answer(status, head, body)
    _, found, rest = head.partition(b"\r\ncontent-length:")
    size = int(rest[: rest.index(b"\r\n")]) if found else 0
    if len(seen) < end + 4 + size:
        return None
    return Answer(status, head, bytes(seen[end + 4 : end + 4 + size]))


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
class _Line:
    """A connection, with at most one request on it."""

    sock: socket.socket
    connected: bool = False
    question: Question | None = None
    number: int = 0
    due_s: float = 0.0
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    watched: int = select.EPOLLIN | select.EPOLLOUT
    seen: bytearray = field(default_factory=bytearray)


class _Run:
    """One run of the generator: its connections, its clock, and what became of its requests.

    Attributes:
        on_end: Called when a request has ended, with its connection if that can be used again, and how it ended.
        next_due_s: When ``until`` must look again whether it is done.
    """

    def __init__(self, address: Address, questions: Sequence[Question], events: Sequence[Event]) -> None:
        if not ipaddress.ip_address(address[0]).is_loopback:
            raise ValueError(f"load goes to this machine alone, not to {address[0]}")
        self.outcomes: list[Outcome] = []
        self.open: dict[int, _Line] = {}
        self.busy = 0
        self.next_due_s = math.inf
        self.on_end: Callable[[_Line | None, int], object] = lambda _line, _status: None
        self._address, self._questions = address, questions
        self._num_asked = self._num_timers = 0
        self._epoll = select.epoll()
        self._timers: list[tuple[float, int, Callable[[], object]]] = []
        for when_s, act in events:
            self.at(when_s, act)
        self.started = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.started

    def at(self, when_s: float, act: Callable[[], object]) -> None:
        self._num_timers += 1  # timers of one moment keep their order
        heapq.heappush(self._timers, (when_s, self._num_timers, act))

    def ask(self, due_s: float, line: _Line | None = None) -> _Line:
        line = line or self._connect()
        question = self._questions[self._num_asked % len(self._questions)]
        self._num_asked += 1
        self.busy += 1
        line.question, line.number, line.due_s = question, self._num_asked, due_s
        line.unsent = memoryview(question.request)
        if line.connected:
            self._send(line)
        return line

    def leave_at(self, when_s: float, line: _Line) -> None:
        number = line.number
        self.at(when_s, lambda: self._end(line, LEFT) if line.question and line.number == number else None)

    def until(self, done: Callable[[], bool], limit_s: float) -> None:
        """Run until ``done``, or until the time is up; then every connection is closed."""
        collecting = gc.isenabled()
        gc.disable()  # a collection would be taken for a slow answer
        try:
            while not done() and self.now() < limit_s:
                self._turn()
        finally:
            if collecting:
                gc.enable()
            self.on_end = lambda _line, _status: None
            for line in list(self.open.values()):
                self._end(line, UNANSWERED)
            self._epoll.close()

    def _turn(self) -> None:
        while self._timers and self._timers[0][0] <= self.now():
            heapq.heappop(self._timers)[2]()
        soonest = min(self.next_due_s, self._timers[0][0] if self._timers else math.inf)
        for number, mask in self._epoll.poll(max(0.0, min(soonest - self.now() - _SPIN_S, 0.01))):
            line = self.open.get(number)
            if line is not None and mask & select.EPOLLOUT:
                self._send(line)
            if line is not None and mask & ~select.EPOLLOUT and number in self.open:
                self._receive(line)

    def _connect(self) -> _Line:
        sock = socket.socket(socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect_ex(self._address)  # a refusal shows when the line is ready
        line = self.open[sock.fileno()] = _Line(sock)
        self._epoll.register(sock, line.watched)
        return line

    def _send(self, line: _Line) -> None:
        if not line.connected:
            if line.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._end(line, REFUSED)
                return
            line.connected = True
        try:
            line.unsent = line.unsent[line.sock.send(line.unsent) :] if line.unsent else line.unsent
        except BlockingIOError:
            pass
        except OSError:  # closed; what the server said before that is still to be read
            line.unsent = memoryview(b"")
        watched = select.EPOLLIN | select.EPOLLOUT if line.unsent else select.EPOLLIN
        if watched != line.watched:
            line.watched = watched
            self._epoll.modify(line.sock, watched)

    def _receive(self, line: _Line) -> None:
        try:
            chunk = line.sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self._end(line, LOST if line.connected else REFUSED)
            return
        line.seen += chunk
        answer = parsed(line.seen)
        if answer is None or line.question is None:
            return
        right = answer.status == 200 and line.question.is_right(answer.body)
        reusable = not answer.closes and not line.unsent
        if not reusable:
            self._drop(line)
        self._note(line, Outcome(line.due_s, self.now(), answer.status, right, b"\r\nretry-after:" in answer.head))
        self.on_end(line if reusable else None, answer.status)

    def _end(self, line: _Line, status: int) -> None:
        self._drop(line)
        if line.question is not None:
            self._note(line, Outcome(line.due_s, self.now(), status, right=False))
            self.on_end(None, status)

    def _note(self, line: _Line, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.busy -= 1
        line.question = None
        line.seen = bytearray()

    def _drop(self, line: _Line) -> None:
        self.open.pop(line.sock.fileno(), None)
        line.sock.close()


Stage = Literal["header", "body"]


@contextmanager
def slow_clients(
    address: Address, request: bytes, count: int, stage: Stage, pause_s: float = 0.2
) -> Iterator[list[str]]:
    """Clients that send a byte at a time and never come to an end, for as long as the block lasts.

    Args:
        address: Where the server listens.
        request: A whole request; it is cut in the middle of its head or of its body.
        count: Clients.
        stage: What they are slow with.
        pause_s: Between two bytes of one client.

    Yields:
        What the server said to each that it cut off: the status, or ``closed``.
    """
    head_bytes = request.index(b"\r\n\r\n") + 4
    cut = head_bytes // 2 if stage == "header" else head_bytes + (len(request) - head_bytes) // 2
    ended: list[str] = []
    over = threading.Event()

    def dribble() -> None:
        socks = [socket.create_connection(address, timeout=5) for _ in range(count)]
        for sock in socks:
            sock.sendall(request[:cut])
        position = cut
        while socks and not over.wait(pause_s):
            for sock in list(socks):
                if _is_cut_off(sock, request[position : position + 1], ended):
                    socks.remove(sock)
            position = min(position + 1, len(request) - 2)
        for sock in socks:
            sock.close()

    thread = threading.Thread(target=dribble)
    thread.start()
    try:
        yield ended
    finally:
        over.set()
        thread.join()


def _is_cut_off(sock: socket.socket, byte: bytes, ended: list[str]) -> bool:
    try:
        if not select.select([sock], [], [], 0)[0]:
            sock.sendall(byte)
            return False
        said = bytearray(sock.recv(_CHUNK))
    except OSError:
        said = bytearray()
    answer = parsed(said) if said else None
    ended.append(str(answer.status) if answer else "closed")
    sock.close()
    return True
