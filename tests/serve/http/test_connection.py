"""A connection has limits and timeouts, so that no client can block the service."""

import base64
import gc
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest
from serve_toys import (
    BlockedEngine,
    blocked_engine,
    encoded,
    running,
    toy_app,
    toy_pixels,
    without_ids,
)
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from serve.http.connection import Connection, Flow
from serve.pool.pending_requests import PendingRequest
from serve.settings import Settings
from tests.serve.http.test_bodies import problem

PNG = encoded(toy_pixels(3))
LARGE = encoded(toy_pixels(5, 200, 200))  # arrives in several pieces, but fits into the socket of the engine process
AS_PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with running(toy_app()) as client:
        yield client


def connected(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=30)


def post_request(content: bytes, path: str = "/v1/classify", headers: str = "Content-Type: image/png\r\n") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(content)}\r\n\r\n".encode() + content


def read_response(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read one response with a Content-Length."""
    head = b""
    while b"\r\n\r\n" not in head:
        head += connection.recv(1) or pytest.fail(f"the connection ended after {head!r}")
    status, *lines = head.decode().strip().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    body = connection.recv(int(headers["content-length"]), socket.MSG_WAITALL)
    return int(status.split()[1]), headers, body


def read_to_the_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


def test_raw_form_and_json_give_the_same_bytes(client: httpx.Client) -> None:
    raw = client.post("/v1/classify?top_k=3", content=PNG, headers=AS_PNG)
    form = client.post("/v1/classify?top_k=3", files={"image": ("a.png", PNG, "image/png")})
    text = client.post("/v1/classify?top_k=3", json={"images": [base64.b64encode(PNG).decode()]})
    assert without_ids(raw.content) == without_ids(form.content) == without_ids(text.content)


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "1e3"])
def test_a_timeout_that_is_not_a_number_of_seconds_is_400(client: httpx.Client, seconds: str) -> None:
    response = client.post("/v1/classify", content=PNG, headers=AS_PNG | {"X-Request-Timeout": seconds})
    assert "expected a positive number of seconds" in problem(response, 400)


def test_a_request_that_is_not_answered_before_its_deadline_is_504() -> None:
    engine = blocked_engine()
    with running(toy_app(engine)) as client:
        headers = AS_PNG | {"X-Request-Timeout": "0.05"}
        response = client.post("/v1/classify", content=PNG, headers=headers)
        engine.go.set()
        assert "deadline" in problem(response, 504)
        assert client.post("/v1/classify", content=PNG, headers=headers).status_code in (200, 504)


@pytest.mark.parametrize("headers", ["Content-Type: image/png\r\n", "Content-Type: image/png\r\nExpect: x\r\n"])
def test_requests_of_a_disconnected_client_are_not_run(headers: str) -> None:
    engine: BlockedEngine = blocked_engine()
    app = toy_app(engine)
    with running(app) as client, connected(client) as staying_client:
        staying_client.sendall(post_request(PNG))
        assert engine.begun.wait(30)
        leaving_client = connected(client)
        leaving_client.sendall(post_request(LARGE, headers=headers))
        pool = app.service.models.find().pool
        while pool.num_waiting < 2:  # the timeout of the test ends this loop
            time.sleep(0.001)
        leaving_client.close()
        while 'route="/v1/classify",status="499"' not in client.get("/metrics").text:
            pass
        client.get("/livez")  # when this is answered, the cancellation has been sent to the engine process
        staying_client.sendall(post_request(PNG))
        engine.go.set()
        assert [read_response(staying_client)[0] for _ in range(2)] == [200, 200]
    assert engine.sizes == [1, 1]


def test_pipelined_requests_are_answered_in_order(client: httpx.Client) -> None:
    others = [encoded(toy_pixels(seed)) for seed in (4, 5)]
    expected = [without_ids(client.post("/v1/classify", content=one, headers=AS_PNG).content) for one in (PNG, *others)]
    with connected(client) as connection:
        connection.sendall(
            b"".join(post_request(one) for one in (PNG, *others)) + b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        assert [without_ids(read_response(connection)[2]) for _ in range(3)] == expected
        assert json.loads(read_response(connection)[2]) == {"status": "alive"}


def test_a_request_that_arrives_byte_by_byte_is_answered(client: httpx.Client) -> None:
    with connected(client) as connection:
        for byte in post_request(PNG):
            connection.sendall(bytes([byte]))
        assert read_response(connection)[0] == 200


def test_two_content_lengths_are_rejected(client: httpx.Client) -> None:
    with connected(client) as connection:
        connection.sendall(post_request(PNG, headers="Content-Type: image/png\r\nContent-Length: 5\r\n"))
        assert read_to_the_end(connection).startswith(b"HTTP/1.1 400")


def test_connection_close_closes_the_connection(client: httpx.Client) -> None:
    for _ in range(2):
        with connected(client) as connection:
            connection.sendall(post_request(PNG, headers="Content-Type: image/png\r\nConnection: close\r\n"))
            response = read_to_the_end(connection)
            assert response.startswith(b"HTTP/1.1 200") and b"connection: close" in response


@pytest.mark.parametrize(
    "flood",
    [
        b"X-Long: " + b"a" * 1_000_000,
        b"".join(b"X-%d: 1\r\n" % number for number in range(2000)) + b"\r\n",
        b"a" * 1_000_000,
    ],
    ids=["long", "many", "nameless"],
)
def test_a_flood_of_headers_is_431_and_the_connection_is_closed(client: httpx.Client, flood: bytes) -> None:
    with connected(client) as connection:
        sender = threading.Thread(
            target=lambda: connection.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n" + flood)
        )
        sender.start()
        response = read_to_the_end(connection)
        sender.join()
    assert response.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    assert b"application/problem+json" in response


def test_a_url_of_a_megabyte_is_431(client: httpx.Client) -> None:
    with connected(client) as connection:
        connection.sendall(b"GET /" + b"a" * 100_000)
        assert read_to_the_end(connection).startswith(b"HTTP/1.1 431")


def test_bytes_that_are_not_http_are_400(client: httpx.Client) -> None:
    with connected(client) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        response = read_to_the_end(connection)
    assert response.startswith(b"HTTP/1.1 400") and b"application/problem+json" in response


SHORT_TIMEOUTS = Settings(
    header_seconds=0.1, body_seconds=0.1, idle_seconds=0.1, write_seconds=0.1, delay_seconds=0, max_connections=3
)


@pytest.fixture(scope="module")
def short_timeouts() -> Iterator[httpx.Client]:
    with running(toy_app(settings=SHORT_TIMEOUTS)) as client:
        yield client


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (b"", b""),
        (b"POST /v1/class", b"HTTP/1.1 408"),
        (b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nX-Slow", b"HTTP/1.1 408"),
        (post_request(PNG)[:-5], b"HTTP/1.1 408"),
        (post_request(PNG, headers="Content-Type: image/png\r\nExpect: x\r\n")[:-5], b"HTTP/1.1 408"),
        (b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx", b"HTTP/1.1 404"),
    ],
    ids=["nothing", "request-line", "headers", "body", "routed-body", "answered-body"],
)
def test_a_client_that_is_too_slow_gets_a_response_and_is_disconnected(
    short_timeouts: httpx.Client, start: bytes, expected: bytes
) -> None:
    with connected(short_timeouts) as connection:
        connection.sendall(start)
        assert read_to_the_end(connection).startswith(expected)  # ends when the service closes the connection


def test_an_idle_connection_is_closed(short_timeouts: httpx.Client) -> None:
    with connected(short_timeouts) as connection:
        connection.sendall(post_request(PNG))
        assert read_response(connection)[0] == 200
        assert read_to_the_end(connection) == b""


def test_a_connection_above_the_limit_replaces_an_idle_one_and_first_those_that_were_never_used() -> None:
    with (
        running(toy_app(settings=Settings(max_connections=2, delay_seconds=0))) as client,
        connected(client) as used,
        connected(client) as unused,
    ):
        used.sendall(post_request(PNG))
        assert read_response(used)[0] == 200
        with connected(client) as newcomer:
            newcomer.sendall(post_request(PNG))
            assert read_to_the_end(newcomer).startswith(b"HTTP/1.1 503")  # the others may be about to send a request
        closed = threading.Event()
        threading.Thread(target=lambda: read_to_the_end(unused) == b"" and closed.set()).start()
        while not closed.is_set():
            with connected(client) as newcomer:
                newcomer.sendall(post_request(PNG))
                status = read_response(newcomer)[0]
        assert status == 200
        used.sendall(post_request(PNG))
        assert read_response(used)[0] == 200


def test_if_all_connections_wait_for_responses_further_ones_are_answered_only_if_they_are_probes() -> None:
    engine = blocked_engine()
    app = toy_app(engine, Settings(max_connections=2, delay_seconds=0))
    with (
        running(app) as client,
        connected(client) as first,
        connected(client) as second,
    ):
        for connection in (first, second):
            connection.sendall(post_request(PNG))
        while app.service.models.find().pool.num_waiting < 2:  # the timeout of the test ends this loop
            time.sleep(0.001)
        for path in ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready"):
            with connected(client) as probe:
                probe.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                assert read_response(probe)[0] == 200
        with connected(client) as third:
            third.sendall(post_request(PNG))
            response = read_to_the_end(third)
            assert response.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in response
        engine.go.set()
        assert [read_response(connection)[0] for connection in (first, second)] == [200, 200]


def test_a_client_that_does_not_read_is_disconnected(short_timeouts: httpx.Client) -> None:
    with connected(short_timeouts) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
        with pytest.raises(OSError):
            while True:
                connection.sendall(request * 100)


def test_bodies_in_memory_are_limited() -> None:
    settings = Settings(max_queue_bytes=100_000, max_body_bytes=90_000, delay_seconds=0)
    with running(toy_app(settings=settings)) as client, connected(client) as first, connected(client) as second:
        first.sendall(post_request(bytes(80_000))[:-1])
        with connected(client) as probe:  # when this is answered, the service has read the first body
            probe.sendall(post_request(PNG))
            read_response(probe)
        second.sendall(post_request(bytes(80_000)))
        status, headers, _ = read_response(second)
        assert (status, headers["retry-after"]) == (429, "1")
        first.sendall(b"x")
        assert read_response(first)[0] == 415
        assert client.post("/v1/classify", content=PNG, headers=AS_PNG).status_code == 200


def count_connection_objects() -> Counter[str]:
    kinds = (Connection, PendingRequest, Flow, RequestResponseCycle)
    types = map(type, gc.get_objects())  # isinstance would call other libraries' objects, and some of them warn
    return Counter(each.__name__ for each in types if issubclass(each, kinds))


def leaked_objects(client: httpx.Client, request: bytes) -> Counter[str]:
    """Count the objects that remain after connections with this request, while garbage collection is disabled."""
    gc.collect()
    gc.disable()
    try:
        before = count_connection_objects()
        for disconnects in (False, False, True):
            with connected(client) as connection:
                connection.sendall(request)
                if not disconnects:
                    read_response(connection)
        give_up_at = time.monotonic() + 10
        while (leaked := count_connection_objects() - before) and time.monotonic() < give_up_at:
            time.sleep(0.05)
    finally:
        gc.enable()
    return leaked


def test_a_closed_connection_is_freed_without_garbage_collection(client: httpx.Client) -> None:
    form = client.build_request("POST", "/v1/classify", files={"image": PNG})
    requests = {
        "an image": post_request(PNG),
        "no image": post_request(b"text"),
        "a form": post_request(form.read(), headers=f"Content-Type: {form.headers['content-type']}\r\n"),
        "bad JSON": post_request(b"{", headers="Content-Type: application/json\r\n"),
        "another path": b"GET /v1/model HTTP/1.1\r\nHost: x\r\n\r\n",
        "no path": b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n",
    }
    found = {name: leaked for name, request in requests.items() if (leaked := leaked_objects(client, request))}
    assert found == {}


def test_a_connection_whose_request_missed_its_deadline_is_freed_without_garbage_collection() -> None:
    engine = blocked_engine()
    with running(toy_app(engine)) as client:
        late = post_request(PNG, headers="Content-Type: image/png\r\nX-Request-Timeout: 0.05\r\n")
        try:
            with connected(client) as first:
                first.sendall(post_request(PNG))  # keeps the engine busy
                assert engine.begun.wait(10)
                threading.Timer(1.0, engine.go.set).start()
                assert leaked_objects(client, late) == {}
                read_response(first)
        finally:
            engine.go.set()
