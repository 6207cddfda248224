"""The three forms of request bodies and their limits, over real sockets."""

import base64
import gzip
import io
import json
import socket
import zlib
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from PIL import Image
from serve_toys import encoded, expected_logits, running, toy_app, toy_pixels, without_ids

from ltkd.contract.image_decoding import decode_image
from ltkd.contract.preprocessing import Preprocessing
from serve.http import bodies
from serve.http.api_keys import make_key
from serve.settings import Settings

LIMITS = Settings(max_body_bytes=200_000, max_images=4, max_pixels=1_000_000)
PNG = {"Content-Type": "image/png"}
JPEG = encoded(toy_pixels(1, 64, 64), "JPEG")


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with running(toy_app(settings=LIMITS)) as client:
        yield client


def json_body(*contents: bytes) -> dict[str, list[str]]:
    return {"images": [base64.b64encode(content).decode() for content in contents]}


def problem(response: httpx.Response, status: int) -> str:
    """Check that a response is a well-formed problem, and return its detail."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert set(body) == {"type", "title", "status", "detail", "error"}
    assert (body["status"], body["error"]) == (status, body["detail"])
    return str(body["detail"])


def test_raw_bytes_form_and_json_give_the_same_answer(client: httpx.Client) -> None:
    content = encoded(toy_pixels(3))
    raw = client.post("/v1/classify", content=content, headers=PNG)
    octets = client.post("/v1/classify", content=content)
    form = client.post("/v1/classify", files={"image": ("a.png", content, "image/png")})
    text = client.post("/v1/classify", json=json_body(content))
    assert raw.status_code == 200
    assert len({without_ids(response.content) for response in (raw, octets, form, text)}) == 1
    (result,) = raw.json()["results"]
    logits_C = expected_logits(toy_pixels(3)[None])[0].astype(float)
    probability_C = np.exp(logits_C) / np.exp(logits_C).sum()
    assert result["class_index"] == int(logits_C.argmax())
    # 1e-5 is above the rounding of one float32 product of 192 terms in another batch
    assert result["probability"] == pytest.approx(probability_C.max(), abs=1e-5)


def test_many_images_are_answered_in_order(client: httpx.Client) -> None:
    contents = [encoded(toy_pixels(seed)) for seed in (4, 5, 6)]
    alone = [client.post("/v1/classify", content=content).json()["results"][0] for content in contents]
    form = client.post("/v1/classify", files=[("image", (f"{n}.png", c)) for n, c in enumerate(contents)])
    text = client.post("/v1/classify", json=json_body(*contents))
    for response in (form, text):
        assert [result["label"] for result in response.json()["results"]] == [result["label"] for result in alone]


def test_one_bad_image_among_many_is_an_error_in_its_place(client: httpx.Client) -> None:
    good = base64.b64encode(encoded(toy_pixels(4))).decode()
    texts = [good, base64.b64encode(b"no image").decode(), "***", good]
    response = client.post("/v1/classify", json={"images": texts})
    ids = [result.get("answer_id") for result in response.json()["results"]]
    assert (ids[1], ids[2], len(set(ids))) == (None, None, 3)
    results = json.loads(without_ids(response.content))["results"]
    assert [result.get("label") is not None for result in results] == [True, False, False, True]
    assert [results[1]["error"]["status"], results[2]["error"]["status"]] == [415, 400]
    assert results[0] == results[3]


def test_a_request_with_only_bad_images_is_one_problem(client: httpx.Client) -> None:
    detail = problem(client.post("/v1/classify", json=json_body(b"no image", JPEG[:300])), 415)
    assert "none of the 2 images" in detail


def test_text_posted_as_png_is_415(client: httpx.Client) -> None:
    assert "not a JPEG, PNG or WebP" in problem(client.post("/v1/classify", content=b"hello", headers=PNG), 415)


def test_a_truncated_jpeg_is_422(client: httpx.Client) -> None:
    assert "truncated" in problem(client.post("/v1/classify", content=JPEG[: len(JPEG) // 2]), 422)


def test_an_image_with_too_many_pixels_is_422(client: httpx.Client) -> None:
    large = encoded(Image.new("1", (1001, 1000)))
    assert "1001 x 1000" in problem(client.post("/v1/classify", content=large), 422)


def test_an_empty_body_is_rejected(client: httpx.Client) -> None:
    assert "empty" in problem(client.post("/v1/classify", headers=PNG), 415)


def test_the_default_content_type_of_curl_gets_a_hint(client: httpx.Client) -> None:
    response = client.post("/v1/classify", content=JPEG, headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert "-H 'Content-Type: image/jpeg'" in problem(response, 415)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{", "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON"),
        (b"[]", "expected"),
        (b'{"images": []}', "images"),
        (b'{"images": [1]}', "images.0"),
        (b'{"images": ["aGk="], "model": "x"}', "model"),
        (b'\xff\xfe{"images": 1}', "the body"),
    ],
)
def test_json_of_another_form_is_400(client: httpx.Client, body: bytes, expected: str) -> None:
    response = client.post("/v1/classify", content=body, headers={"Content-Type": "application/json; charset=utf-8"})
    assert expected in problem(response, 400)


def test_a_data_url_is_rejected_with_a_hint(client: httpx.Client) -> None:
    response = client.post("/v1/classify", json={"images": ["data:image/png;base64,aGk="]})
    assert "send the part after the comma" in problem(response, 400)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"--b\r\nContent-Disposition: form-data; name=\"k\"\r\n\r\n5\r\n--b--\r\n", "a field that is not a file"),
        (b"--b--\r\n", "no file"),
        (b"garbage", "malformed"),
        (b"", "ends before"),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\n5\r\n--b--\r\n", "malformed"),
    ],
)  # fmt: skip
def test_a_form_without_files_is_400(client: httpx.Client, content: bytes, expected: str) -> None:
    response = client.post("/v1/classify", content=content, headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert expected in problem(response, 400)


def test_a_form_without_a_boundary_is_400(client: httpx.Client) -> None:
    response = client.post("/v1/classify", content=b"x", headers={"Content-Type": "multipart/form-data"})
    assert "boundary" in problem(response, 400)


def test_too_many_images_are_400_in_every_form(client: httpx.Client) -> None:
    content = encoded(toy_pixels(4))
    form = client.post("/v1/classify", files=[("image", ("a.png", content))] * 5)
    assert "more than 4 images" in problem(form, 400)
    assert "more than 4 images" in problem(client.post("/v1/classify", json=json_body(*[content] * 5)), 400)


@pytest.mark.parametrize("media_type", ["image/png", "application/json", "multipart/form-data; boundary=b"])
def test_a_body_above_the_limit_is_413_in_every_form(client: httpx.Client, media_type: str) -> None:
    start = b'--b\r\nContent-Disposition: form-data; name="i"; filename="i"\r\n\r\n' if "form" in media_type else b""
    body = start + bytes(LIMITS.max_body_bytes + 1)
    headers = {"Content-Type": media_type}
    assert "200,000 bytes" in problem(client.post("/v1/classify", content=body, headers=headers), 413)
    assert "200,000 bytes" in problem(client.post("/v1/classify", content=iter([body]), headers=headers), 413)


COMPRESSORS = {
    "gzip": gzip.compress,
    "x-gzip": gzip.compress,
    "deflate": zlib.compress,
    "identity": bytes,
    "GZIP": gzip.compress,
}


@pytest.mark.parametrize("encoding", COMPRESSORS)
@pytest.mark.parametrize("form", ["image/png", "application/json", "multipart/form-data; boundary=b"])
def test_a_compressed_body_is_decompressed_in_every_form(client: httpx.Client, form: str, encoding: str) -> None:
    content = encoded(toy_pixels(3))
    bodies = {
        "image/png": content,
        "application/json": json.dumps(json_body(content)).encode(),
        "multipart/form-data; boundary=b": form_body([content]),
    }
    headers = {"Content-Type": form, "Content-Encoding": encoding}
    compressed = client.post("/v1/classify", content=COMPRESSORS[encoding](bodies[form]), headers=headers)
    assert without_ids(compressed.content) == without_ids(client.post("/v1/classify", content=content).content)


@pytest.mark.parametrize("form", ["image/png", "application/json", "multipart/form-data; boundary=b"])
def test_a_body_above_the_limit_after_decompression_is_413_in_every_form(client: httpx.Client, form: str) -> None:
    bomb = gzip.compress(form_body([bytes(10**7)]))
    assert len(bomb) < LIMITS.max_body_bytes
    response = client.post("/v1/classify", content=bomb, headers={"Content-Type": form, "Content-Encoding": "gzip"})
    assert "200,000 bytes after decompression" in problem(response, 413)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"hello", "not valid gzip data"),
        (gzip.compress(b"hello", mtime=0)[:-4], "is incomplete"),
        (gzip.compress(b"hello", mtime=0) + b"x", "bytes after the end"),
        (gzip.compress(b"hello", mtime=0) * 2, "bytes after the end"),
        (b"", "is incomplete"),
    ],
)
def test_a_body_that_does_not_match_its_content_encoding_is_400(
    client: httpx.Client, body: bytes, expected: str
) -> None:
    response = client.post("/v1/classify", content=body, headers={**PNG, "Content-Encoding": "gzip"})
    assert expected in problem(response, 400)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "x" * 5000])
def test_an_unsupported_content_encoding_is_415_and_the_supported_ones_are_listed(
    client: httpx.Client, encoding: str
) -> None:
    response = client.post("/v1/classify", content=b"x", headers={**PNG, "Content-Encoding": encoding})
    assert len(problem(response, 415)) < 300
    assert response.headers["accept-encoding"] == "gzip, deflate"


def form_body(files: list[bytes]) -> bytes:
    """A multipart body with the boundary b."""
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    return b"".join(head + file + b"\r\n" for file in files) + b"--b--\r\n"


FORM = {"Content-Type": "multipart/form-data; boundary=b"}
FIELD = b'--b\r\nContent-Disposition: form-data; name="k"\r\n\r\nv\r\n'
HOSTILE_FORMS = {
    "thousands of files": form_body([b""] * 2000),
    "thousands of fields": FIELD * 3000 + b"--b--\r\n",
    "a header without end": b"--b\r\nContent-Disposition: form-data; " + b"x" * 190_000,
    "thousands of headers": b"--b\r\n" + b"A: b\r\n" * 30_000 + b"\r\nx\r\n--b--\r\n",
    "a long name": b'--b\r\nContent-Disposition: form-data; name="' + b"n" * 190_000 + b'"\r\n\r\nv\r\n--b--\r\n',
    "boundaries alone": b"--b\r\n" * 30_000,
    "empty lines": b"\r\n" * 90_000,
    "nothing": b"",
    "a file that does not end": form_body([b"x"])[:-9],
}


@pytest.mark.parametrize("name", HOSTILE_FORMS)
def test_a_hostile_form_is_a_problem(client: httpx.Client, name: str) -> None:
    response = client.post("/v1/classify", content=HOSTILE_FORMS[name], headers=FORM)
    assert len(problem(response, response.status_code)) < 300
    assert response.status_code in (400, 415)


def test_a_truncated_form_is_rejected_as_a_whole(client: httpx.Client) -> None:
    whole = form_body([encoded(toy_pixels(4)), encoded(toy_pixels(5))])
    assert len(client.post("/v1/classify", content=whole, headers=FORM).json()["results"]) == 2
    for missing in (6, 8, 40, 300):
        assert "ends before" in problem(client.post("/v1/classify", content=whole[:-missing], headers=FORM), 400)


@pytest.mark.parametrize(
    "media_type",
    [
        "text/plain", "video/mp4", "application/xml", "image", "/", ";", "x" * 5000, "multipart/mixed; boundary=b",
        "multipart/form-data; boundary=" + "b" * 5000, 'multipart/form-data; boundary="',
        "multipart/form-data; boundary=\xe4",
        "application/json; charset=utf-7", "APPLICATION/JSON",
    ],
)  # fmt: skip
def test_a_wrong_content_type_is_a_problem(client: httpx.Client, media_type: str) -> None:
    response = client.post("/v1/classify", content=b"x", headers={b"Content-Type": media_type.encode("latin-1")})
    assert len(problem(response, response.status_code)) < 300
    assert response.status_code in (400, 415)


@pytest.mark.parametrize(
    "text", ["aGk", "aGk=\n", " aGk=", "aGk=aGk=", "a-_b", "====", "ä", "\u0000", "aGk=" * 3 + "!", "data:,x", ""]
)
def test_malformed_base64_is_a_problem_in_its_place(client: httpx.Client, text: str) -> None:
    good = base64.b64encode(encoded(toy_pixels(4))).decode()
    response = client.post("/v1/classify", json={"images": [text, good]})
    rejected, answered = response.json()["results"]
    assert rejected["error"]["status"] in (400, 415)
    assert answered["label"]


def test_a_json_list_that_is_too_long_is_rejected_before_it_is_parsed(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(_: bytes, __: int) -> None:
        raise AssertionError("parsed")

    monkeypatch.setattr(bodies, "json_images", parse)
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    for value in ('"a"', "1", "[]", "{}", '{"a": 1}'):
        body = f'{{"images": [{",".join([value] * 20_000)}]}}'.encode()
        response = client.post("/v1/classify", content=gzip.compress(body), headers=headers)
        assert "more than 4 images" in problem(response, 400)


def test_a_content_length_above_the_limit_is_rejected_before_the_body_is_sent(client: httpx.Client) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
            b"Content-Length: 100000000\r\nExpect: 100-continue\r\n\r\n"
        )
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_a_body_that_does_not_arrive_is_408_and_the_connection_is_closed() -> None:
    with (
        running(toy_app(settings=Settings(body_seconds=0.05))) as client,
        socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=30) as connection,
    ):
        connection.sendall(
            b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\nx"
        )
        response = b"".join(iter(lambda: connection.recv(4096), b""))  # ends when the service closes the connection
    assert response.startswith(b"HTTP/1.1 408")
    assert b"within 0.05 s" in response


INVERSE_TRANSPOSE = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", INVERSE_TRANSPOSE)
def test_every_exif_orientation_gives_the_same_answer(client: httpx.Client, orientation: int) -> None:
    upright = Image.fromarray(toy_pixels(9, 24, 16))
    inverse = INVERSE_TRANSPOSE[orientation]
    stored = upright if inverse is None else upright.transpose(inverse)
    exif = Image.Exif()
    exif[0x0112] = orientation
    results = [
        json.loads(without_ids(client.post("/v1/classify", content=content).content))["results"]
        for content in (encoded(stored, exif=exif), encoded(upright))
    ]
    (result,), (expected,) = results
    assert result.pop("warnings") == ([] if orientation == 1 else ["the EXIF orientation was applied"])
    assert result == {key: value for key, value in expected.items() if key != "warnings"}
    if inverse is not None:  # otherwise a network that ignores orientation would pass
        (rotated,) = client.post("/v1/classify", content=encoded(stored)).json()["results"]
        assert rotated["probability"] != expected["probability"]


def animated() -> bytes:
    file = io.BytesIO()
    first, second = (Image.fromarray(toy_pixels(seed)) for seed in (1, 2))
    first.save(file, "WEBP", save_all=True, append_images=[second], lossless=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 10))), "transparent pixels were blended with white"),
        (encoded(Image.fromarray(np.full((8, 8), 40_000, np.uint16))), "16-bit grey was scaled to 8 bit"),
        (animated(), "the image is animated; only the first frame was used"),
    ],
)
def test_changes_to_an_image_are_listed_as_warnings(client: httpx.Client, content: bytes, expected: str) -> None:
    response = client.post("/v1/classify", content=content)
    (result,) = response.json()["results"]
    assert result["warnings"] == [expected]
    pixels = decode_image(content, Preprocessing(input_px=8)).pixels_SS3[None]
    assert result["class_index"] == int(expected_logits(pixels).argmax())


def test_decompressed_bytes_count_as_memory_and_are_released() -> None:
    app = toy_app(settings=Settings(max_queue_bytes=1_000_000, max_body_bytes=900_000, delay_seconds=0))
    memory = app.service.body_memory
    bomb = gzip.compress(bytes(800_000))
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 500000\r\n\r\n"
    with (
        running(app) as client,
        socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=30) as slow_client,
    ):
        assert problem(client.post("/v1/classify", content=bomb, headers=PNG | {"Content-Encoding": "gzip"}), 415)
        slow_client.sendall(head + bytes(499_999))
        while memory.num_bytes < 499_999:  # the timeout of the test ends this loop
            assert client.get("/livez").status_code == 200
        response = client.post("/v1/classify", content=bomb, headers=PNG | {"Content-Encoding": "gzip"})
        assert "request bodies in memory" in problem(response, 429)
        assert response.headers["retry-after"] == "1"
        slow_client.sendall(b"x")
        assert slow_client.recv(12) == b"HTTP/1.1 415"
        while memory.num_bytes:
            assert client.get("/livez").status_code == 200


PROBES = ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/openapi.json")
OPERATIONS = [
    (method.upper(), path.format(model="toy", version="1"))
    for path, methods in toy_app().openapi()["paths"].items()
    for method in methods
]


@pytest.mark.parametrize("key", [b"", b"Authorization: Bearer ltkd_wrong\r\n"], ids=["no key", "wrong key"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_a_request_without_a_valid_key_is_rejected_before_its_body_arrives(
    client_with_key: httpx.Client, method: str, path: str, key: bytes
) -> None:
    address = (client_with_key.base_url.host, client_with_key.base_url.port or 0)
    with socket.create_connection(address, timeout=30) as connection:
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10000000\r\n"
        connection.sendall(head.encode() + key + b"\r\n{")
        assert connection.recv(12) == (b"HTTP/1.1 200" if path in PROBES else b"HTTP/1.1 401")


@pytest.fixture(scope="module")
def client_with_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    key_file = tmp_path_factory.mktemp("keys") / "keys"
    key_file.write_text(make_key("tester", "classify")[1] + "\n")
    with running(toy_app(settings=Settings(key_file=key_file, delay_seconds=0))) as client:
        yield client


def test_small_bodies_are_accepted_while_large_ones_use_all_of_the_memory() -> None:
    app = toy_app(settings=Settings(max_queue_bytes=190_500, max_body_bytes=190_000, delay_seconds=0))
    head = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 190000\r\n\r\n"
    with (
        running(app) as client,
        socket.create_connection((client.base_url.host, client.base_url.port or 0), timeout=30) as slow_client,
    ):
        slow_client.sendall(head + bytes(189_999))
        while app.service.body_memory.num_bytes < 189_999:  # the timeout of the test ends this loop
            assert client.get("/livez").status_code == 200
        assert problem(client.post("/v1/classify", content=bytes(100_000), headers=PNG), 429)
        assert len(JPEG) > 501
        assert client.post("/v1/classify", content=JPEG).status_code == 200
