"""Hostile and unusual images and requests over real sockets: the response is a 2xx or a helpful 4xx problem."""

import base64
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from serve_toys import blocked_engine, bomb_png, encoded, running, toy_app, toy_pixels

from serve.engine.answers import Answers
from serve.http.api_keys import make_key
from serve.settings import Settings
from tests.ltkd.contract.test_image_decoding import BOMBS, POLYGLOTS, VALID_FILES, damaged
from tests.serve.http.test_bodies import problem

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow; the toy engine is a thread of this process


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with running(toy_app(settings=Settings(max_pixels=1_000_000))) as client:
        yield client
        fine = client.post("/v1/classify", content=encoded(toy_pixels(3)))  # the service still answers after all tests
        assert fine.status_code == 200


def is_answered(response: httpx.Response) -> bool:
    """Whether the images were answered. If not, the problem must say what to do."""
    if response.status_code == 200:
        Answers.model_validate_json(response.content)
        return True
    assert response.status_code in (400, 413, 415, 422)
    detail = problem(response, response.status_code)
    assert len(detail) < 300
    assert any(hint in detail for hint in ("send ", "convert it", "scale it down", "save it again"))
    return False


@pytest.mark.parametrize("name", VALID_FILES)
def test_a_damaged_image_is_answered_or_rejected(client: httpx.Client, name: str) -> None:
    dice = random.Random(name)
    answered = [is_answered(client.post("/v1/classify", content=damaged(VALID_FILES[name], dice))) for _ in range(25)]
    assert not all(answered)


def test_intact_images_among_damaged_ones_are_answered(client: httpx.Client) -> None:
    dice = random.Random(1)
    intact = encoded(toy_pixels(3))
    (alone,) = client.post("/v1/classify", content=intact).json()["results"]
    contents = [
        damaged(VALID_FILES[dice.choice(sorted(VALID_FILES))], dice) if number % 8 else intact for number in range(64)
    ]
    in_json = {"images": [base64.b64encode(content).decode() for content in contents]}
    in_form = [("image", (f"{number}", content)) for number, content in enumerate(contents)]
    for response in (client.post("/v1/classify", json=in_json), client.post("/v1/classify", files=in_form)):
        results = response.json()["results"]
        assert len(results) == 64
        assert any("error" in result for result in results)
        for result in results[::8]:
            assert result["label"] == alone["label"]
            # the order of the 192 float32 terms differs between batch sizes
            assert result["probability"] == pytest.approx(alone["probability"], abs=1e-5)


@pytest.mark.parametrize("name", [*BOMBS, "pixels"])
def test_a_decompression_bomb_is_422(client: httpx.Client, name: str) -> None:
    content = bomb_png() if name == "pixels" else BOMBS[name]
    assert problem(client.post("/v1/classify", content=content), 422)


@pytest.mark.parametrize("name", POLYGLOTS)
def test_a_file_of_two_types_is_answered_or_rejected(client: httpx.Client, name: str) -> None:
    content, accepted = POLYGLOTS[name]
    assert is_answered(client.post("/v1/classify", content=content)) == accepted


@pytest.mark.parametrize("size", [(1, 1), (1, 30_000), (30_000, 1)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_extreme_shapes_are_answered(client: httpx.Client, kind: str, size: tuple[int, int]) -> None:
    if kind == "WEBP":
        size = (min(size[0], 16_383), min(size[1], 16_383))  # the largest side of the format
    response = client.post("/v1/classify", content=encoded(Image.new("RGB", size, (1, 2, 3)), kind))
    assert is_answered(response)


MODES = {
    "CMYK": encoded(Image.new("CMYK", (16, 16), (9, 99, 199, 0)), "JPEG"),
    "16-bit grey": encoded(Image.fromarray(np.full((16, 16), 40_000, np.uint16))),
    "1-bit": encoded(Image.new("1", (16, 16), 1)),
    "palette with transparency": VALID_FILES["palette PNG"],
    "grey with alpha": VALID_FILES["grey PNG with alpha"],
    "animated PNG": VALID_FILES["animated PNG"],
    "animated WebP": VALID_FILES["animated WebP"],
}


@pytest.mark.parametrize("name", MODES)
def test_unusual_pixels_are_answered(client: httpx.Client, name: str) -> None:
    assert is_answered(client.post("/v1/classify", content=MODES[name]))


@pytest.mark.parametrize("media_type", ["image/gif", "image/png", "image/heic", "application/octet-stream"])
def test_the_bytes_determine_the_image_type_and_not_the_content_type(client: httpx.Client, media_type: str) -> None:
    response = client.post("/v1/classify", content=VALID_FILES["JPEG"], headers={"Content-Type": media_type})
    assert is_answered(response)
    response = client.post("/v1/classify", content=b"GIF89a" + bytes(50), headers={"Content-Type": media_type})
    assert "not a JPEG, PNG or WebP" in problem(response, 415)


def connected(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=30)


def raw_response(client: httpx.Client, sent: bytes) -> bytes:
    """Send raw bytes, and read until the service closes the connection."""
    received = b""
    with connected(client) as connection:
        try:
            connection.sendall(sent)
            while chunk := connection.recv(65_536):
                received += chunk
        except (ConnectionResetError, BrokenPipeError):
            pass  # the service may close before all is sent
    return received


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 2**20,
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n" + b"X-Many: y\r\n" * 100_000,
        b"GET /" + b"x" * 2**20,
        b"\x16\x03\x01\x02\x00\x01\x00" + bytes(500),
        b"nonsense\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
    ids=["a long header", "many headers", "a long path", "TLS", "nonsense", "a negative length", "two lengths"],
)
def test_a_malformed_head_is_4xx_and_the_connection_is_closed(client: httpx.Client, head: bytes) -> None:
    response = raw_response(client, head)
    assert response == b"" or response.startswith(b"HTTP/1.1 4")
    assert len(response) < 2000


CHUNKED = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n"
PNG = encoded(toy_pixels(3))


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


def whole_request(content: bytes, headers: bytes = b"Host: x\r\n") -> bytes:
    head = b"POST /v1/classify HTTP/1.1\r\n%bContent-Length: %d\r\n\r\n" % (headers, len(content))
    return head + content


LIVEZ = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "request_bytes",
    [
        whole_request(PNG, b"Host: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"),
        CHUNKED + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + chunk(PNG) + b"0\r\n\r\n",
    ],
    ids=["length", "chunked"],
)
@pytest.mark.parametrize("split_at", [None, 40, 170], ids=["at once", "in the head", "later"])
def test_an_upgrade_is_ignored_and_the_body_is_read(
    client: httpx.Client, request_bytes: bytes, split_at: int | None
) -> None:
    with connected(client) as connection:
        connection.sendall(request_bytes[:split_at])
        while split_at and client.get("/livez").status_code != 200:
            pass  # the first part has been parsed
        connection.sendall((request_bytes[split_at:] if split_at else b"") + LIVEZ)
        received = b""
        while not received.endswith(b'{"status":"alive"}'):
            received += connection.recv(65_536) or pytest.fail(f"closed after {received!r}")
    first, second = received.split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200") and b'"results":[{' in first
    assert second.startswith(b"200")


def test_connect_is_rejected(client: httpx.Client) -> None:
    assert raw_response(client, b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 405")


def test_fields_of_a_trailer_are_not_headers(tmp_path: Path) -> None:
    key, line = make_key("camera", "classify")
    (tmp_path / "keys").write_text(line + "\n")
    trailer = b"0\r\nAuthorization: Bearer " + key.encode() + b"\r\n\r\n"
    with running(toy_app(settings=Settings(key_file=tmp_path / "keys", delay_seconds=0))) as client:
        without_key = CHUNKED + b"Connection: close\r\n\r\n" + chunk(PNG)
        with_key = CHUNKED + b"Connection: close\r\nAuthorization: Bearer " + key.encode() + b"\r\n\r\n" + chunk(PNG)
        assert raw_response(client, without_key + trailer).startswith(b"HTTP/1.1 401")
        assert raw_response(client, with_key + b"0\r\nX-Checksum: 1\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_an_endless_trailer_is_rejected(client: httpx.Client) -> None:
    response = raw_response(client, CHUNKED + b"\r\n" + chunk(PNG) + b"0\r\nX-Long: " + b"x" * 1_000_000)
    assert response.startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize(
    "invalid",
    [
        b"GARBAGE",
        CHUNKED + b"\r\nZZ\r\n",
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    ],
    ids=["bytes after a request", "chunk size", "transfer encoding", "two lengths"],
)
def test_requests_before_invalid_bytes_are_answered_and_then_the_invalid_ones_with_400(invalid: bytes) -> None:
    engine = blocked_engine()
    with running(toy_app(engine)) as client:
        with connected(client) as connection:
            connection.sendall(whole_request(PNG) + whole_request(PNG) + invalid)
            assert engine.begun.wait(30)
            engine.go.set()
            received = b"".join(iter(lambda: connection.recv(65_536), b""))
        assert client.post("/v1/classify", content=PNG).status_code == 200  # nothing else was harmed
    assert [response[:3] for response in received.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"400"]
    assert b"this is not valid HTTP/1.1" in received


def test_invalid_bytes_after_an_early_response_close_the_connection(client: httpx.Client) -> None:
    early = CHUNKED.replace(b"image/png", b"text/plain") + b"\r\n5\r\nhello\r\n"
    with connected(client) as connection:
        connection.sendall(early)
        received = connection.recv(65_536)
        assert received.startswith(b"HTTP/1.1 415")
        connection.sendall(b"ZZ\r\n")
        assert b"HTTP/1.1" not in b"".join(iter(lambda: connection.recv(65_536), b""))


@pytest.mark.parametrize("hosts", [b"", b"Host: x\r\nHost: y\r\n"], ids=["none", "two"])
@pytest.mark.parametrize("path", [b"/v1/classify", b"/livez", b"/nowhere"])
def test_a_request_without_exactly_one_host_is_400(client: httpx.Client, hosts: bytes, path: bytes) -> None:
    response = raw_response(client, b"GET " + path + b" HTTP/1.1\r\n" + hosts + b"\r\n")
    assert response.startswith(b"HTTP/1.1 400") and b"exactly one Host header" in response


def test_http_1_0_needs_no_host(client: httpx.Client) -> None:
    assert raw_response(client, b"GET /livez HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


BAD_URLS = [b"http://x", b"http:///livez", b"http://x:99999/livez", b"http://@/livez", b"http://x?y"]


@pytest.mark.parametrize("upgrade", [b"", b"Connection: Upgrade\r\nUpgrade: h2c\r\n"], ids=["plain", "upgrade"])
@pytest.mark.parametrize("url", BAD_URLS)
def test_a_url_that_cannot_be_parsed_is_400_after_the_requests_before_it(
    client: httpx.Client, url: bytes, upgrade: bytes
) -> None:
    bad = b"GET " + url + b" HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n"
    assert raw_response(client, bad).startswith(b"HTTP/1.1 400")
    received = raw_response(client, whole_request(PNG) + bad)
    assert [response[:3] for response in received.split(b"HTTP/1.1 ")[1:]] == [b"200", b"400"]
    with connected(client) as connection:
        connection.sendall(LIVEZ)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        connection.sendall(bad)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("upgrade", [b"", b"Connection: Upgrade\r\nUpgrade: h2c\r\n"], ids=["plain", "upgrade"])
def test_only_so_many_requests_may_wait_for_their_responses(upgrade: bytes) -> None:
    engine = blocked_engine()
    request = b"GET /livez HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n"
    with running(toy_app(engine)) as client, connected(client) as connection:
        connection.sendall(whole_request(PNG) + request * 3_000)
        assert engine.begun.wait(30)
        engine.go.set()
        received = b"".join(iter(lambda: connection.recv(65_536), b""))
    statuses = [response[:3] for response in received.split(b"HTTP/1.1 ")[1:]]
    assert statuses == 128 * [b"200"] + [b"429"]


@pytest.mark.parametrize("media_type", [b"image/png", b"text/plain"], ids=["read", "answered before"])
def test_a_body_in_tiny_chunks_is_rejected(client: httpx.Client, media_type: bytes) -> None:
    head = CHUNKED.replace(b"image/png", media_type) + b"\r\n"
    response = raw_response(client, head + b"1\r\na\r\n" * 50_000)
    allowed = (b"HTTP/1.1 400",) if media_type == b"image/png" else (b"HTTP/1.1 400", b"HTTP/1.1 415")
    assert response.startswith(allowed) and response.count(b"HTTP/1.1 4") == 1


def test_a_body_in_small_chunks_is_read(client: httpx.Client) -> None:
    content = encoded(toy_pixels(5, 200, 200))
    chunks = b"".join(chunk(content[start : start + 100]) for start in range(0, len(content), 100))
    response = raw_response(client, CHUNKED + b"Connection: close\r\n\r\n" + chunks + b"0\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 200")
