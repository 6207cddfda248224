"""Attacks by how requests are sent: malformed HTTP, slow clients, clients that leave, pipelining, idle connections.

Each function makes one attempt; hostile_clients.py repeats it.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress

from benchmarks.hostile_bodies import large_png
from benchmarks.hostile_clients import CLOSED, LEFT, REJECTED, HostileClient, Reply, Target, reset

SLOW = ("408", CLOSED)
ANSWERED = ("200", "429")
UPGRADE_IGNORED_OR_REFUSED = ("200", "429", "400", "426", "501")  # 415 and 422 would mean that the body was dropped
LARGE = 2**15  # the response to a larger head may be lost, because the service closes while the client sends


def _chunked(target: Target, chunks: bytes, coding: str = "chunked", headers: str = "") -> bytes:
    head = f"POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n{target.key_line()}{headers}"
    return f"{head}Transfer-Encoding: {coding}\r\n\r\n".encode() + chunks


def _with_headers(target: Target, headers: str, body: bytes = b"") -> bytes:
    line = f"POST /v1/classify HTTP/1.1\r\nContent-Type: image/png\r\n{target.key_line()}"
    return f"{line}{headers}\r\n".encode("latin-1") + body


HOST = "Host: localhost\r\n"
MALFORMED: Mapping[str, Callable[[Target], bytes]] = {
    "a chunk size that is not a number": lambda to: _chunked(to, b"zz\r\nabc\r\n0\r\n\r\n"),
    "a chunk size beyond 64 bits": lambda to: _chunked(to, b"fffffffffffffffff\r\nabc"),
    "a negative chunk size": lambda to: _chunked(to, b"-5\r\nabc\r\n0\r\n\r\n"),
    "a chunk longer than its size": lambda to: _chunked(to, b"3\r\nabcdef\r\n0\r\n\r\n"),
    "an unknown transfer-encoding": lambda to: _chunked(to, b"0\r\n\r\n", "xchunked"),
    "chunked is not the last transfer-encoding": lambda to: _chunked(to, b"0\r\n\r\n", "chunked, identity"),
    "two different lengths": lambda to: _with_headers(
        to, f"{HOST}Content-Length: 5\r\nContent-Length: 6\r\n", b"12345"
    ),
    "a length and chunks": lambda to: _chunked(to, b"0\r\n\r\nGET /", headers="Content-Length: 3\r\n"),
    "a negative length": lambda to: _with_headers(to, f"{HOST}Content-Length: -1\r\n"),
    "a length with a sign": lambda to: _with_headers(to, f"{HOST}Content-Length: +5\r\n", b"12345"),
    "a length of 30 digits": lambda to: _with_headers(to, f"{HOST}Content-Length: {'9' * 30}\r\n"),
    "no Host": lambda to: _with_headers(to, "Content-Length: 0\r\n"),
    "two Hosts": lambda to: _with_headers(to, f"{HOST}Host: elsewhere\r\nContent-Length: 0\r\n"),
    "a path with a slash and another Host": lambda to: (
        to.classify().replace(b"/v1/classify ", b"/v1/classify/ ").replace(b"Host: localhost", b"Host: elsewhere")
    ),
    "5,000 headers": lambda to: _with_headers(to, HOST + "".join(f"X-{n}: {n}\r\n" for n in range(5000))),
    "a header of 1 MB": lambda to: _with_headers(to, f"{HOST}X-Long: {'a' * 2**20}\r\n"),
    "a URL of 1 MB": lambda to: to.get(f"/v1/model?{'a' * 2**20}"),
    "a TLS hello": lambda _: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2,
    "NUL bytes": lambda _: bytes(4096),
    "a NUL in a header": lambda to: _with_headers(to, f"{HOST}X-Nul: a\0b\r\nContent-Length: 0\r\n"),
    "a space before the colon": lambda to: _with_headers(to, f"{HOST}Content-Length : 5\r\n", b"12345"),
    "a line without a colon": lambda to: _with_headers(to, f"{HOST}nothing\r\n"),
    "an HTTP version that does not exist": lambda _: b"GET /livez HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "the preface of HTTP/2": lambda _: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64),
    "CONNECT": lambda _: b"CONNECT localhost:22 HTTP/1.1\r\nHost: localhost:22\r\n\r\n",
    "a method that does not exist": lambda _: b"BREW /v1/classify HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


async def malformed_http(client: HostileClient) -> None:
    """Malformed HTTP: lengths, chunks, transfer-encodings, Host, floods of headers, TLS, NUL bytes."""
    what = client.random.choice(sorted(MALFORMED))
    content = MALFORMED[what](client.target)
    replies = await client.talk(content)
    if replies[0].status.startswith("3"):
        client.violated(f"{what}: redirected to {replies[0].head.partition(b'location: ')[2][:40]!r}")
    client.note(what, replies, allowed=REJECTED if len(content) > LARGE else ("4xx",))


async def bytes_after_request(client: HostileClient) -> None:
    """Garbage after a complete request: the request is answered, then 400."""
    garbage = client.random.choice([b"\0" * 64, b"garbage\r\n\r\n", b"GET / HTTP/7\r\n\r\n"])
    first, *rest = await client.talk(client.target.classify() + garbage, answers=2)
    client.note("the request before the garbage", [first], allowed=ANSWERED)
    client.note("the garbage", rest)


async def upgrade(client: HostileClient) -> None:
    """Upgrade: h2c with a body, as Java's HttpClient sends it; the body looks like a second request."""
    headers = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
    smuggled = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    replies = await client.talk(
        client.target.post("/v1/classify", smuggled, "image/png", headers=headers), answers=2, wait_s=5
    )
    client.note("upgrade with a smuggled request", replies[:1])
    if any(reply.status == "200" for reply in replies):
        client.violated("upgrade: the body was taken for a request")
    (reply,) = await client.talk(client.target.classify(headers=headers))
    _check_answer(client, "upgrade with an image", reply, allowed=UPGRADE_IGNORED_OR_REFUSED)


async def key_in_trailer(client: HostileClient) -> None:
    """A valid key in the trailer of a chunked request without a key."""
    image = client.target.image
    body = f"{len(image):x}\r\n".encode() + image + f"\r\n0\r\n{client.target.key_line()}\r\n".encode()
    head = "POST /v1/classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n"
    client.note("a key in the trailer", await client.talk(f"{head}\r\n".encode() + body))


async def slow_header(client: HostileClient) -> None:
    """The header arrives byte by byte and is never complete."""
    content = client.target.classify()
    start = content[: content.index(b"\r\n\r\n") + 2]
    pieces = [start[:20], *(start[place : place + 1] for place in range(20, len(start)))]
    client.note("slow header", await client.talk(*pieces, pause_s=0.1), allowed=SLOW)


async def slow_body(client: HostileClient) -> None:
    """The body arrives byte by byte and is never complete."""
    content = client.target.classify()
    start = content.index(b"\r\n\r\n") + 4
    pieces = [content[:start], *(content[place : place + 1] for place in range(start, len(content) - 1))]
    client.note("slow body", await client.talk(*pieces, pause_s=0.1), allowed=SLOW)


async def body_never_continued(client: HostileClient) -> None:
    """Expect: 100-continue, and then no body."""
    content = client.target.classify(headers="Expect: 100-continue\r\n")
    client.note("no body", await client.talk(content[: content.index(b"\r\n\r\n") + 4]), allowed=REJECTED)


async def never_reads(client: HostileClient) -> None:
    """Pipelined requests for the largest response, which is never read."""
    await client.leave(*[client.target.get("/v1/model")] * 200, after_s=4.0)


async def leaves(client: HostileClient) -> None:
    """Leaves with RST: in the middle of the body, while queued, or while an image of 25 MP is decoded."""
    stage = client.random.randrange(3)
    if stage == 0:
        content = client.target.classify()
        await client.leave(content[: len(content) - len(client.target.image) // 2], after_s=0.01)
    elif stage == 1:
        await client.leave(client.target.classify(), after_s=0.001 * client.random.randrange(10))
    else:
        await client.leave(client.target.post("/v1/classify", large_png(), "image/png"), after_s=0.05)


async def pipelines(client: HostileClient) -> None:
    """A hundred pipelined requests; each is answered, in order."""
    replies = await client.talk(client.target.classify() * 100, answers=100)
    for reply in replies:
        _check_answer(client, "a pipelined request", reply, allowed=ANSWERED)


async def pipelined_body_never_ends(client: HostileClient) -> None:
    """A valid request, and behind it one whose body never ends: the 408 belongs to the second."""
    content = client.target.classify()
    first, *rest = await client.talk(content + content[:-1], answers=2)
    _check_answer(client, "the request before an endless body", first, allowed=ANSWERED)
    client.note("an endless body", rest, allowed=SLOW)


async def pipelined_large_bodies(client: HostileClient) -> None:
    """Pipelined bodies of 1 MB without reading the responses."""
    body = client.target.image + bytes(2**20)
    await client.leave(*[client.target.post("/v1/classify", body, client.target.media_type)] * 8, after_s=1.0)


async def idle_connections(client: HostileClient) -> None:
    """All connections that the service accepts, idle for 3 s; the probes must still be answered."""
    opened = []
    try:
        for _ in range(client.target.max_connections + 20):
            with suppress(OSError):
                opened.append(await client.connect())
        await asyncio.sleep(3.0)
    finally:
        for sock in opened:
            reset(sock)
    client.note("idle", [Reply(LEFT)], allowed=(LEFT,), requests=len(opened))


def _check_answer(client: HostileClient, what: str, reply: Reply, *, allowed: tuple[str, ...]) -> None:
    """Count a reply to a valid request; a 200 must have the right class."""
    client.note(what, [reply], allowed=allowed)
    if reply.status == "200" and f'"label":"{client.target.label}"'.encode() not in reply.body.replace(b'": "', b'":"'):
        client.violated(f"{what}: a wrong answer")
