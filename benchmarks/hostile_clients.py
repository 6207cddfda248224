"""What all hostile clients share: raw connections, counting of what they get, and a bounded rate.

An attack is a function that makes one attempt with a HostileClient. ``run_attacks`` repeats the attempts at a bounded
rate on a bounded number of connections. The attempts are in hostile_connections.py and hostile_bodies.py, and
attacks.py runs them.
"""

import asyncio
import ipaddress
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from benchmarks.load import Address, http_request, parse_response

WAIT_S = 15.0  # longer than every time limit of the service
GRACE_S = 35.0  # longer than every attempt
NO_ANSWER, CLOSED, REFUSED, LEFT = "no answer", "closed", "refused", "client left"
REJECTED = ("4xx", CLOSED)
_CHUNK = 2**18


@dataclass(frozen=True)
class Target:
    """The service under attack.

    Attributes:
        address: Its address, which must be a loopback address.
        keys: API keys by the name of the client that has them; the names are those of attacks.ROLES.
        model: Name of the model that it serves.
        image: A small image.
        media_type: Media type of that image.
        label: The correct class of that image.
        max_connections: Largest number of connections that it accepts.
    """

    address: Address
    keys: Mapping[str, str]
    model: str
    image: bytes
    media_type: str
    label: str
    max_connections: int

    def key_line(self, name: str = "camera") -> str:
        """The Authorization header line of a client; empty if the service needs no keys."""
        return f"Authorization: Bearer {self.keys[name]}\r\n" if self.keys else ""

    def classify(self, name: str = "camera", headers: str = "") -> bytes:
        """A valid request to classify the small image."""
        return http_request("/v1/classify", self.image, self.media_type, self.key_line(name) + headers)

    def post(self, path: str, body: bytes, media_type: str = "application/json", *, headers: str = "",
        key: str | None = "camera") -> bytes:  # fmt: skip
        """A POST request with the key of a client; None sends no key."""
        return http_request(path, body, media_type, (self.key_line(key) if key else "") + headers)

    def get(self, path: str, key: str | None = "camera") -> bytes:
        """A GET request with the key of a client; None sends no key."""
        return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{self.key_line(key) if key else ''}\r\n".encode()


@dataclass(frozen=True)
class Reply:
    """A response, or how the connection ended without one.

    Attributes:
        status: The HTTP status as text, or one of the constants above.
        head: Status line and headers in lower case.
        body: Body of the response.
    """

    status: str
    head: bytes = b""
    body: bytes = b""


@dataclass
class HostileClient:
    """Sends raw bytes, and counts what comes back.

    Attributes:
        target: The service.
        random: Source of all randomness.
        also_allowed: Statuses that every attempt may get: those of a full server while another attack fills it.
        requests: Number of requests sent.
        statuses: Number of replies by status.
        violations: Replies that were not allowed, with the attempt.
    """

    target: Target
    random: random.Random
    also_allowed: tuple[str, ...] = ()
    requests: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    violations: Counter[str] = field(default_factory=Counter)

    async def connect(self, receive_buffer_bytes: int | None = None) -> socket.socket:
        """Open a connection."""
        sock = socket.socket(socket.AF_INET6 if ":" in self.target.address[0] else socket.AF_INET)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        try:
            await asyncio.get_running_loop().sock_connect(sock, self.target.address)
        except BaseException:
            sock.close()
            raise
        return sock

    async def talk(self, *pieces: bytes, answers: int = 1, wait_s: float = WAIT_S, pause_s: float = 0) -> list[Reply]:
        """Send pieces with pauses between them, and read at the same time.

        Args:
            pieces: Sent one after the other.
            answers: Stop after so many responses.
            wait_s: How long to wait for them.
            pause_s: Time between two pieces.

        Returns:
            The responses; the last one is NO_ANSWER, CLOSED or REFUSED if there were not enough.
        """
        try:
            sock = await self.connect()
        except OSError:
            return [Reply(REFUSED)]
        sending = asyncio.create_task(self.send(sock, pieces, pause_s))
        replies: list[Reply] = []
        try:
            async with asyncio.timeout(wait_s):
                await _read_replies(sock, answers, replies)
        except TimeoutError:
            replies.append(Reply(NO_ANSWER))
        finally:
            sending.cancel()
            await asyncio.wait([sending])
            sock.close()
        return replies

    async def send(self, sock: socket.socket, pieces: Iterable[bytes], pause_s: float = 0) -> None:
        """Send pieces until the server closes the connection."""
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            for piece in pieces:
                await loop.sock_sendall(sock, piece)
                if pause_s:
                    await asyncio.sleep(pause_s)

    async def leave(self, *pieces: bytes, after_s: float) -> None:
        """Send pieces, wait, and reset the connection without reading."""
        try:
            sock = await self.connect(receive_buffer_bytes=4096)
        except OSError:
            self.note("connect", [Reply(REFUSED)])
            return
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(after_s):
                    await self.send(sock, pieces)
                    await asyncio.sleep(after_s)
        finally:
            reset(sock)
        self.note("leave", [Reply(LEFT)], allowed=(LEFT,), requests=len(pieces))

    def note(
        self, what: str, replies: Sequence[Reply], *, allowed: Sequence[str] = REJECTED, requests: int | None = None
    ) -> None:
        """Count replies.

        Args:
            what: The attempt, for the report of a violation.
            replies: What came back.
            allowed: Allowed statuses; ``4xx`` allows all of them.
            requests: Number of requests sent, if it is not the number of replies.
        """
        self.requests += len(replies) if requests is None else requests
        for reply in replies:
            self.statuses[reply.status] += 1
            if not _is_allowed(reply.status, (*allowed, *self.also_allowed)):
                self.violations[f"{what}: {reply.status}"] += 1

    def violated(self, what: str) -> None:
        """Count a violation that is not a status."""
        self.violations[what] += 1


Attempt = Callable[[HostileClient], Awaitable[None]]


@dataclass(frozen=True)
class Attack:
    """An attempt and how often it is repeated.

    Attributes:
        attempt: The attempt; the first line of its docstring describes the attack.
        per_s: Largest number of attempts per second.
        workers: Number of attempts at the same time.
    """

    attempt: Attempt
    per_s: float = 10.0
    workers: int = 4


@dataclass(frozen=True)
class AttackResult:
    """What an attack sent and got."""

    requests: int
    statuses: dict[str, int]
    violations: dict[str, int]


def run_attacks(
    attacks: Mapping[str, Attack], target: Target, seconds: float, tail_s: float = 0.0, seed: int = 0
) -> dict[str, AttackResult]:
    """Run attacks at the same time.

    Args:
        attacks: The attacks by name.
        target: The service.
        seconds: How long attempts begin. Those that are under way then have GRACE_S to end.
        tail_s: How long attempts go on afterwards without counting, instead of ending.
        seed: Determines all random choices.
    """
    if not ipaddress.ip_address(target.address[0]).is_loopback:
        raise ValueError(f"attacks are sent to loopback addresses only, not to {target.address[0]}")
    also_allowed = ("503", "504", CLOSED) if len(attacks) > 1 else ()
    clients = {name: HostileClient(target, random.Random(f"{seed} {name}"), also_allowed) for name in attacks}
    return asyncio.run(_run_all(attacks, clients, seconds, tail_s))


async def _run_all(
    attacks: Mapping[str, Attack], clients: Mapping[str, HostileClient], seconds: float, tail_s: float
) -> dict[str, AttackResult]:
    end = time.monotonic() + seconds + tail_s
    tasks = [asyncio.create_task(_repeat(attack, clients[name], end)) for name, attack in attacks.items()]
    try:
        await _wait(tasks, seconds if tail_s else seconds + GRACE_S)
        results = {
            name: AttackResult(client.requests, dict(client.statuses), dict(client.violations))
            for name, client in clients.items()
        }
        if tail_s:
            await _wait(tasks, tail_s)
        return results
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _wait(tasks: Sequence["asyncio.Task[None]"], seconds: float) -> None:
    """Wait; the first exception of a task, which is an error in an attack, ends the run."""
    if not tasks:
        return
    done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for task in done:
        task.result()


async def _repeat(attack: Attack, client: HostileClient, end: float) -> None:
    interval_s = attack.workers / attack.per_s

    async def work(number: int) -> None:
        await asyncio.sleep(interval_s * number / attack.workers)
        while (begin := time.monotonic()) < end:
            await attack.attempt(client)
            await asyncio.sleep(max(0.0, begin + interval_s - time.monotonic()))

    async with asyncio.TaskGroup() as group:
        for number in range(attack.workers):
            group.create_task(work(number))


async def _read_replies(sock: socket.socket, answers: int, replies: list[Reply]) -> None:
    loop, received = asyncio.get_running_loop(), bytearray()
    while len(replies) < answers:
        try:
            chunk = await loop.sock_recv(sock, _CHUNK)
        except OSError:
            chunk = b""
        received += chunk
        while len(replies) < answers and (reply := _take_reply(received)):
            if not reply.status.startswith("1"):
                replies.append(reply)
        if not chunk:
            if len(replies) < answers:
                replies.append(Reply(CLOSED))
            return


def _take_reply(received: bytearray) -> Reply | None:
    """Remove the first complete response from the received bytes."""
    if received and not b"HTTP/1.1 ".startswith(received[:9]) and not received.startswith(b"HTTP/1.0 "):
        text = bytes(received[:40])
        received.clear()
        return Reply("not HTTP", body=text)
    response = parse_response(received)
    if response is None:
        return None
    is_chunked = b"\r\ntransfer-encoding: chunked" in response.head
    end = received.find(b"\r\n0\r\n\r\n") + 7 if is_chunked else len(response.head) + 2 + len(response.body)
    del received[:end]
    return Reply(str(response.status), response.head, response.body)


def _is_allowed(status: str, allowed: Sequence[str]) -> bool:
    return status in allowed or (status.isdecimal() and f"{status[0]}xx" in allowed)


def reset(sock: socket.socket) -> None:
    """Close a connection with RST, as a client that was killed."""
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
