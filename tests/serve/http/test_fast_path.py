"""The short way and the ordinary way answer alike, and no client can hold the service up."""

import base64
import gc
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping

import httpx
import pytest
from serve_toys import HeldEngine, encoded, held_engine, running, toy_app, toy_pixels, toy_service
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from serve.api.app import create_app
from serve.http.connection import BoundedConnection, Flow
from serve.http.fast_path import Exchange
from serve.pool.engine_process import PendingRequest
from serve.settings import Settings
from tests.serve.http.test_bodies import problem

PNG = encoded(toy_pixels(3))
LARGE = encoded(toy_pixels(5, 300, 300))  # arrives in several pieces
AS_PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with running(toy_app()) as client:
        yield client


def connected(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=30)


def posted(content: bytes, path: str = "/v1/classify", headers: str = "Content-Type: image/png\r\n") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(content)}\r\n\r\n".encode() + content


def read_answer(line: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """One answer with a Content-Length."""
    seen = b""
    while b"\r\n\r\n" not in seen:
        seen += line.recv(1) or pytest.fail(f"the line ended after {seen!r}")
    status, *lines = seen.decode().strip().split("\r\n")
    headers = {name.lower(): value for name, value in (entry.split(": ", 1) for entry in lines)}
    body = line.recv(int(headers["content-length"]), socket.MSG_WAITALL)
    return int(status.split()[1]), headers, body


def read_to_the_end(line: socket.socket) -> bytes:
    return b"".join(iter(lambda: line.recv(65536), b""))


def without_what_differs(headers: Mapping[str, str]) -> dict[str, str]:
    timed = re.sub(r"[\d.]+", "0", headers.get("server-timing", ""))
    return {
        **headers,
        "server-timing": timed,
        "date": "",
        "x-request-id": re.sub("[0-9a-f]{32}", "new", headers["x-request-id"]),
    }


@pytest.mark.parametrize("content", [PNG, LARGE, b"text", b"", PNG[:60]], ids=["png", "large", "text", "empty", "cut"])
@pytest.mark.parametrize("more", [{}, {"X-Request-ID": "mine-1"}, {"Content-Type": "application/octet-stream"}])
def test_the_short_way_and_the_ordinary_way_answer_alike(
    client: httpx.Client, content: bytes, more: dict[str, str]
) -> None:
    headers = AS_PNG | more
    short = [client.post("/v1/classify", content=content, headers=headers) for _ in range(2)]  # judged, then known
    ordinary = client.post("/v1/classify", content=iter([content]), headers=headers)  # chunked: not the usual request
    for response in short:
        assert (response.status_code, response.content) == (ordinary.status_code, ordinary.content)
        assert without_what_differs(response.headers) == without_what_differs(ordinary.headers)


def test_whoever_is_turned_away_is_told_the_same_whichever_way_it_comes() -> None:
    engine = held_engine()
    engine.go.set()
    with running(toy_app(engine, Settings(max_queue_images=1, max_images=1, delay_seconds=0))) as client:
        for _ in range(2):  # judged, then known
            assert client.post("/v1/classify", content=PNG, headers=AS_PNG).status_code == 200
        engine.go.clear()
        engine.begun.clear()
        held = threading.Thread(target=lambda: client.post("/v1/classify", content=PNG, headers=AS_PNG))
        held.start()
        assert engine.begun.wait(30)
        known = client.post("/v1/classify", content=PNG, headers=AS_PNG)
        named = client.post("/v1/classify", content=PNG, headers=AS_PNG | {"X-Request-ID": "mine-1"})
        ordinary = client.post("/v1/classify", content=iter([PNG]), headers=AS_PNG)
        engine.go.set()
        held.join()
        counted = client.get("/metrics").text
        assert client.post("/v1/classify", content=PNG, headers=AS_PNG).status_code == 200
    assert "1 images are in hand" in problem(ordinary, 429)
    assert (ordinary.headers["retry-after"], named.headers["x-request-id"]) == ("1", "mine-1")
    for response in (known, named):
        assert (response.status_code, response.content) == (ordinary.status_code, ordinary.content)
    assert without_what_differs(known.headers) == without_what_differs(ordinary.headers)
    assert 'ltkd_requests_total{route="/v1/classify",status="429"} 3.0' in counted
    assert 'ltkd_rejections_total{reason="full"} 3.0' in counted


def test_raw_form_and_json_give_the_same_bytes(client: httpx.Client) -> None:
    raw = client.post("/v1/classify?top_k=3", content=PNG, headers=AS_PNG)
    form = client.post("/v1/classify?top_k=3", files={"image": ("a.png", PNG, "image/png")})
    text = client.post("/v1/classify?top_k=3", json={"images": [base64.b64encode(PNG).decode()]})
    assert raw.content == form.content == text.content


@pytest.mark.parametrize("query", ["top_k=0", "top_k=x", "top_k=1&top_k=2", "model=nobody", "version=7", "top_k=", "&"])
def test_an_odd_url_is_judged_in_one_place(client: httpx.Client, query: str) -> None:
    short = client.post(f"/v1/classify?{query}", content=PNG, headers=AS_PNG)
    ordinary = client.post(f"/v1/classify?{query}", content=iter([PNG]), headers=AS_PNG)
    assert (short.status_code, short.content) == (ordinary.status_code, ordinary.content)


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "1e3"])
@pytest.mark.parametrize("usual", [True, False])
def test_a_timeout_that_is_no_number_of_seconds_is_400(client: httpx.Client, seconds: str, usual: bool) -> None:
    headers = AS_PNG | {"X-Request-Timeout": seconds}
    response = client.post("/v1/classify", content=PNG if usual else iter([PNG]), headers=headers)
    assert "expected seconds" in problem(response, 400)


@pytest.mark.parametrize("usual", [True, False])
def test_a_request_that_is_not_answered_in_its_time_is_504(usual: bool) -> None:
    engine = held_engine()
    with running(toy_app(engine)) as client:
        headers = AS_PNG | {"X-Request-Timeout": "0.05"}
        response = client.post("/v1/classify", content=PNG if usual else iter([PNG]), headers=headers)
        engine.go.set()
        assert "deadline" in problem(response, 504)
        assert client.post("/v1/classify", content=PNG, headers=headers).status_code in (200, 504)


@pytest.mark.parametrize("headers", ["Content-Type: image/png\r\n", "Content-Type: image/png\r\nExpect: x\r\n"])
def test_what_a_client_that_left_had_asked_is_not_run(headers: str) -> None:
    engine: HeldEngine = held_engine()
    service = toy_service(engine)
    with running(create_app(service)) as client, connected(client) as staying:
        staying.sendall(posted(PNG))
        assert engine.begun.wait(30)
        leaving = connected(client)
        leaving.sendall(posted(LARGE, headers=headers))
        worker = service.models.find().worker
        while worker.num_waiting < 2:  # the limits of client and test bound it
            time.sleep(0.001)
        leaving.close()
        while 'route="/v1/classify",status="499"' not in client.get("/metrics").text:
            pass
        staying.sendall(posted(PNG))
        engine.go.set()
        assert [read_answer(staying)[0] for _ in range(2)] == [200, 200]
    assert engine.sizes == [1, 1]


def test_requests_sent_before_the_answer_are_answered_in_their_order(client: httpx.Client) -> None:
    others = [encoded(toy_pixels(seed)) for seed in (4, 5)]
    expected = [client.post("/v1/classify", content=one, headers=AS_PNG).content for one in (PNG, *others)]
    with connected(client) as line:
        line.sendall(b"".join(posted(one) for one in (PNG, *others)) + b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert [read_answer(line)[2] for _ in range(3)] == expected
        assert json.loads(read_answer(line)[2]) == {"status": "alive"}


def test_a_request_in_single_bytes_is_answered(client: httpx.Client) -> None:
    with connected(client) as line:
        for byte in posted(PNG):
            line.sendall(bytes([byte]))
        assert read_answer(line)[0] == 200


def test_a_known_head_with_another_body_is_another_request(client: httpx.Client) -> None:
    bodies = [PNG, b"text", encoded(toy_pixels(8)), b""]
    with connected(client) as line:
        statuses = []
        for content in bodies * 2:
            line.sendall(posted(content))
            statuses.append(read_answer(line)[0])
    assert statuses == [200, 415, 200, 415] * 2


def test_two_lengths_are_refused(client: httpx.Client) -> None:
    with connected(client) as line:
        line.sendall(posted(PNG, headers="Content-Type: image/png\r\nContent-Length: 5\r\n"))
        assert read_to_the_end(line).startswith(b"HTTP/1.1 400")


def test_connection_close_closes(client: httpx.Client) -> None:
    for _ in range(2):
        with connected(client) as line:
            line.sendall(posted(PNG, headers="Content-Type: image/png\r\nConnection: close\r\n"))
            answer = read_to_the_end(line)
            assert answer.startswith(b"HTTP/1.1 200") and b"connection: close" in answer


@pytest.mark.parametrize(
    "flood",
    [
        b"X-Long: " + b"a" * 1_000_000,
        b"".join(b"X-%d: 1\r\n" % number for number in range(2000)) + b"\r\n",
        b"a" * 1_000_000,
    ],
    ids=["long", "many", "nameless"],
)
def test_a_flood_of_headers_is_431_and_the_line_is_closed(client: httpx.Client, flood: bytes) -> None:
    with connected(client) as line:
        sender = threading.Thread(target=lambda: line.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n" + flood))
        sender.start()
        answer = read_to_the_end(line)
        sender.join()
    assert answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    assert b"application/problem+json" in answer


def test_a_url_of_a_megabyte_is_431(client: httpx.Client) -> None:
    with connected(client) as line:
        line.sendall(b"GET /" + b"a" * 100_000)
        assert read_to_the_end(line).startswith(b"HTTP/1.1 431")


def test_what_is_not_http_is_400(client: httpx.Client) -> None:
    with connected(client) as line:
        line.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = read_to_the_end(line)
    assert answer.startswith(b"HTTP/1.1 400") and b"application/problem+json" in answer


IMPATIENT = Settings(
    header_seconds=0.1, body_seconds=0.1, idle_seconds=0.1, write_seconds=0.1, delay_seconds=0, max_connections=3
)


@pytest.fixture(scope="module")
def impatient() -> Iterator[httpx.Client]:
    with running(toy_app(settings=IMPATIENT)) as client:
        yield client


@pytest.mark.parametrize(
    ("start", "answer"),
    [
        (b"", b""),
        (b"POST /v1/class", b"HTTP/1.1 408"),
        (b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nX-Slow", b"HTTP/1.1 408"),
        (posted(PNG)[:-5], b"HTTP/1.1 408"),
        (posted(PNG, headers="Content-Type: image/png\r\nExpect: x\r\n")[:-5], b"HTTP/1.1 408"),
        (b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx", b"HTTP/1.1 404"),
    ],
    ids=["silent", "line", "headers", "body", "ordinary-body", "answered-body"],
)
def test_a_client_that_is_too_slow_is_told_and_parted_with(
    impatient: httpx.Client, start: bytes, answer: bytes
) -> None:
    with connected(impatient) as line:
        line.sendall(start)
        assert read_to_the_end(line).startswith(answer)  # it ends only when the service closes


def test_a_connection_that_was_answered_and_idles_is_closed(impatient: httpx.Client) -> None:
    with connected(impatient) as line:
        line.sendall(posted(PNG))
        assert read_answer(line)[0] == 200
        assert read_to_the_end(line) == b""


def test_one_connection_too_many_is_503() -> None:
    with running(toy_app(settings=Settings(max_connections=2, delay_seconds=0))) as client:
        first, second, third = (connected(client) for _ in range(3))
        answer = read_to_the_end(third)
        assert answer.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in answer
        first.close()
        second.close()
        third.close()


def test_a_client_that_does_not_read_is_cut_off(impatient: httpx.Client) -> None:
    with connected(impatient) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
        with pytest.raises(OSError):
            while True:
                line.sendall(request * 100)


def test_bodies_in_hand_are_bounded() -> None:
    settings = Settings(max_queue_bytes=100_000, max_body_bytes=90_000, delay_seconds=0)
    with running(toy_app(settings=settings)) as client, connected(client) as first, connected(client) as second:
        first.sendall(posted(bytes(80_000))[:-1])
        with connected(client) as probe:  # the service has read the first when it answers this
            probe.sendall(posted(PNG))
            read_answer(probe)
        second.sendall(posted(bytes(80_000)))
        status, headers, _ = read_answer(second)
        assert (status, headers["connection"], headers["retry-after"]) == (429, "close", "1")
        first.sendall(b"x")
        assert read_answer(first)[0] == 415
        assert client.post("/v1/classify", content=PNG, headers=AS_PNG).status_code == 200


def of_connections() -> Counter[str]:
    of_ours = (BoundedConnection, Exchange, PendingRequest, Flow, RequestResponseCycle)
    kinds = map(type, gc.get_objects())  # isinstance would ask other libraries' objects, and some of them warn
    return Counter(kind.__name__ for kind in kinds if issubclass(kind, of_ours))


def left_over_of(client: httpx.Client, request: bytes) -> Counter[str]:
    """What is still there of connections on which this was asked, without Python's search for cycles."""
    gc.collect()
    gc.disable()
    try:
        before = of_connections()
        for leaves in (False, False, True):
            with connected(client) as line:
                line.sendall(request)
                if not leaves:
                    read_answer(line)
        patience = time.monotonic() + 10
        while (left_over := of_connections() - before) and time.monotonic() < patience:
            time.sleep(0.05)
    finally:
        gc.enable()
    return left_over


def test_a_connection_that_ended_is_freed_without_a_search_for_cycles(client: httpx.Client) -> None:
    form = client.build_request("POST", "/v1/classify", files={"image": PNG})
    asked = {
        "an image": posted(PNG),
        "no image": posted(b"text"),
        "a form": posted(form.read(), headers=f"Content-Type: {form.headers['content-type']}\r\n"),
        "bad JSON": posted(b"{", headers="Content-Type: application/json\r\n"),
        "another path": b"GET /v1/model HTTP/1.1\r\nHost: x\r\n\r\n",
        "no path": b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n",
    }
    assert {what: left_over for what, request in asked.items() if (left_over := left_over_of(client, request))} == {}


def test_so_is_one_whose_request_was_not_answered_in_its_time() -> None:
    engine = held_engine()
    with running(toy_app(engine)) as client:
        late = posted(PNG, headers="Content-Type: image/png\r\nX-Request-Timeout: 0.05\r\n")
        try:
            with connected(client) as first:
                first.sendall(posted(PNG))  # keeps the engine busy
                assert engine.begun.wait(10)
                threading.Timer(1.0, engine.go.set).start()
                assert left_over_of(client, late) == {}
                read_answer(first)
        finally:
            engine.go.set()
