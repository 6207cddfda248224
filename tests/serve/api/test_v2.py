"""The Open Inference Protocol: tensors, malformed requests, and the routes over real sockets."""

import base64
import gzip
import json
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx
import numpy as np
import pytest
from fastapi import Depends, FastAPI, Request, params
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pydantic import ValidationError
from serve_toys import CLASS_NAMES, SIZE_PX, TASK, encoded, expected_logits, running, toy_engine, toy_pixels
from starlette.types import ASGIApp, Receive, Scope, Send

from ltkd.contract.bundle import Manifest
from ltkd.contract.image_decoding import decode_image
from ltkd.errors import ImageError
from serve.api.openapi import describe
from serve.api.v2 import JSON_LENGTH, open_inference
from serve.api.v2_metadata import ModelConfig, ModelMetadata
from serve.api.v2_tensors import (
    MAX_JSON_BYTES,
    InferBody,
    InferReply,
    InferRequest,
    build_response,
    pack_bytes,
    parse_request,
)
from serve.engine.messages import OutputKind
from serve.http.bodies import BodyMemory
from serve.http.middleware import answer_http
from serve.http.service import RequestContext
from serve.pool.pending_requests import RequestResult
from serve.problems import Content, Problem, ProblemError, image_problem, make_problem
from serve.settings import Settings

PIXELS_NSS3 = np.stack([toy_pixels(seed) for seed in range(3)])
PNG = encoded(toy_pixels(0))
SHAPE = [3, SIZE_PX, SIZE_PX, 3]


def request_of(tensor: dict[str, object], **rest: object) -> bytes:
    return json.dumps({"inputs": [tensor], **rest}).encode()


def pixels_in_json(data: object, shape: Sequence[int] = SHAPE) -> bytes:
    return request_of({"name": "image", "datatype": "UINT8", "shape": list(shape), "data": data})


def pixels_after_json(raw: bytes, shape: Sequence[int] = SHAPE, **rest: object) -> tuple[bytes, int]:
    size = {"binary_data_size": len(raw)}
    head = request_of({"name": "image", "datatype": "UINT8", "shape": list(shape), "parameters": size}, **rest)
    return head + raw, len(head)


def files_after_json(raw: bytes, shape: Sequence[int] = (1,)) -> tuple[bytes, int]:
    size = {"binary_data_size": len(raw)}
    head = request_of({"name": "image_bytes", "datatype": "BYTES", "shape": list(shape), "parameters": size})
    return head + raw, len(head)


def parsed(body: bytes, json_bytes: int | None = None) -> InferRequest:
    return parse_request(body, json_bytes, TASK, 4)


@pytest.mark.parametrize(
    "data", [PIXELS_NSS3.tolist(), PIXELS_NSS3.ravel().tolist(), PIXELS_NSS3.reshape(3, -1).tolist()]
)
def test_pixels_in_json_may_be_flat_or_nested(data: object) -> None:
    request = parsed(pixels_in_json(data))
    assert isinstance(request.images, np.ndarray)
    np.testing.assert_array_equal(request.images, PIXELS_NSS3)
    assert (request.binary, request.num_best, request.timeout_seconds, request.id) == (False, 0, None, "")


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 4), *map(st.just, (SIZE_PX, SIZE_PX, 3)))))
def test_pixels_are_the_same_inside_and_after_the_json(pixels_NSS3: NDArray[np.uint8]) -> None:
    shape = pixels_NSS3.shape
    for request in (
        parsed(pixels_in_json(pixels_NSS3.tolist(), shape)),
        parsed(*pixels_after_json(pixels_NSS3.tobytes(), shape)),
    ):
        assert isinstance(request.images, np.ndarray)
        np.testing.assert_array_equal(request.images, pixels_NSS3)


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=4))
def test_files_are_the_same_inside_and_after_the_json(files: list[bytes]) -> None:
    in_base64 = [base64.b64encode(file).decode() for file in files]
    for shape in ([len(files)], [len(files), 1]):
        tensor = {"name": "image_bytes", "datatype": "BYTES", "shape": shape}
        assert parsed(request_of({**tensor, "data": in_base64})).images == files
        assert parsed(*files_after_json(b"".join(pack_bytes(files)), shape)).images == files


def test_the_options_of_a_request_are_parsed() -> None:
    outputs = [{"name": "logits", "parameters": {"classification": 99, "binary_data": True}}]
    body, json_bytes = pixels_after_json(
        PIXELS_NSS3.tobytes(), id="mine", parameters={"timeout": 1500, "sequence_id": 3}, outputs=outputs
    )
    request = parsed(body, json_bytes)
    assert (request.id, request.binary, request.num_best, request.timeout_seconds) == (
        "mine",
        True,
        len(CLASS_NAMES),
        0.0015,
    )


@pytest.mark.parametrize(
    ("request_option", "output_option", "binary"),
    [(True, None, True), (True, False, False), (False, True, True), (None, None, False)],
)
def test_the_option_of_an_output_overrides_that_of_the_request(
    request_option: object, output_option: object, binary: bool
) -> None:
    outputs = [{"name": "logits", "parameters": {} if output_option is None else {"binary_data": output_option}}]
    parameters = {} if request_option is None else {"binary_data_output": request_option}
    body, json_bytes = pixels_after_json(PIXELS_NSS3.tobytes(), parameters=parameters, outputs=outputs)
    assert parsed(body, json_bytes).binary is binary


IMAGE = {"name": "image", "datatype": "UINT8", "shape": SHAPE}
FILES = {"name": "image_bytes", "datatype": "BYTES", "shape": [1]}
FLAT = PIXELS_NSS3.ravel().tolist()
MALFORMED: dict[str, tuple[bytes, int | None, str]] = {
    "no JSON": (b"hello", None, "Invalid JSON"),
    "too deep": (b"[" * 100_000, None, "Invalid JSON"),
    "nothing": (b"", None, "Invalid JSON"),
    "no inputs": (b'{"inputs": []}', None, "inputs"),
    "two inputs": (json.dumps({"inputs": [IMAGE, FILES]}).encode(), None, "inputs"),
    "another input": (request_of({**IMAGE, "name": "pixels"}), None, "inputs.0.name"),
    "another output": (request_of({**IMAGE, "data": FLAT}, outputs=[{"name": "loss"}]), None, "outputs.0.name"),
    "another type": (request_of({**IMAGE, "datatype": "FP32", "data": FLAT}), None, "inputs.0.datatype"),
    "types exchanged": (request_of({**IMAGE, "datatype": "BYTES", "data": FLAT}), None, "expected UINT8 [N, 8, 8, 3]"),
    "another size": (pixels_in_json([0] * 192, [1, 192]), None, "expected UINT8 [N, 8, 8, 3]"),
    "no image": (pixels_in_json([], [0, 8, 8, 3]), None, "N of at least 1"),
    "a negative number": (pixels_in_json([], [-1, 8, 8, 3]), None, "N of at least 1"),
    "too many": (pixels_in_json([0] * 960, [5, 8, 8, 3]), None, "more than 4 images"),
    "a huge shape": (pixels_in_json([0], [10**30, 8, 8, 3]), None, "more than 4 images"),
    "no data": (request_of(IMAGE), None, "either data or binary_data_size"),
    "too few values": (pixels_in_json(FLAT[1:]), None, "has 575 values, but its shape says 576"),
    "a value too large": (pixels_in_json([256, *FLAT[1:]]), None, "whole numbers from 0 to 255"),
    "fractions": (pixels_in_json([0.5, *FLAT[1:]]), None, "whole numbers from 0 to 255"),
    "words": (pixels_in_json(["1", *FLAT[1:]]), None, "whole numbers from 0 to 255"),
    "uneven": (pixels_in_json([[1, 2], 3]), None, "nested evenly"),
    "nothing after the JSON": (request_of({**IMAGE, "parameters": {"binary_data_size": 576}}), None, "576 bytes after"),
    "JSON longer than the body": (b"{}", 3, "body has 2 bytes"),
    "too few bytes after the JSON": (*pixels_after_json(bytes(575)), "has 575 values"),
    "shared memory": (
        request_of({**IMAGE, "parameters": {"shared_memory_region": "a"}}), None, "shared memory",
    ),
    "a long id": (request_of({**IMAGE, "data": FLAT}, id="x" * 300), None, "id"),
    "no base64": (request_of({**FILES, "data": ["***"]}), None, "not base64"),
    "a number for a file": (request_of({**FILES, "data": [7]}), None, "in base64, or binary data"),
    "one file too many": (request_of({**FILES, "data": ["aGk=", "aGk="]}), None, "has 2 elements"),
    "a length cut off": (*files_after_json(b"\x05\0"), "has 0 elements, but its shape says 1"),
    "a file cut off": (*files_after_json(struct.pack("<I", 9) + b"123"), "declares 9 bytes, but only 3 follow"),
    "extra bytes": (*files_after_json(struct.pack("<I", 1) + b"123"), "2 extra bytes follow the 1 elements"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_400_with_the_reason(name: str) -> None:
    body, json_bytes, expected = MALFORMED[name]
    with pytest.raises(ProblemError) as raised:
        parsed(body, json_bytes)
    assert raised.value.problem.status == 400
    assert expected in str(raised.value)
    assert len(str(raised.value)) < 400


def test_a_tensor_too_large_for_json_is_413_and_suggests_binary_data() -> None:
    with pytest.raises(ProblemError, match="send the tensors as binary data") as raised:
        parsed(b" " * (MAX_JSON_BYTES + 1))
    assert raised.value.problem.status == 413


@given(st.binary(max_size=80), st.none() | st.integers(0, 90), st.sampled_from(sorted(MALFORMED)), st.integers(0, 5000))
def test_arbitrary_bytes_are_parsed_or_rejected(junk: bytes, json_bytes: int | None, name: str, cut: int) -> None:
    whole, length, _ = MALFORMED[name]
    for body in (junk, whole[:cut] + junk + whole[cut:]):
        for declared in (json_bytes, length):
            try:
                request = parsed(body, declared)
            except ProblemError as error:
                assert error.problem.status in (400, 413)
            else:
                assert len(request.images) <= 4


def built(request: InferRequest, logits_NC: NDArray[np.float32]) -> tuple[InferReply, bytes]:
    response = build_response(request, logits_NC, ("a1", "b2"), TASK, "toy", "2")
    end = len(response.body) if response.json_bytes is None else response.json_bytes
    return InferReply.model_validate_json(response.body[:end]), response.body[end:]


def infer_request(*, binary: bool, num_best: int = 0) -> InferRequest:
    return InferRequest("mine", PIXELS_NSS3, binary, num_best, None)


@given(hnp.arrays(np.float32, (2, 6), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_logits_are_bit_identical_inside_and_after_the_json(logits_NC: NDArray[np.float32]) -> None:
    reply, raw = built(infer_request(binary=False), logits_NC)
    (output,) = reply.outputs
    assert (reply.model_name, reply.model_version, reply.id, raw) == ("toy", "2", "mine", b"")
    assert reply.parameters.answer_ids == "a1,b2"
    assert np.array(output.data, np.float32).tobytes() == logits_NC.tobytes()
    reply, raw = built(infer_request(binary=True), logits_NC)
    (output,) = reply.outputs
    assert output.parameters is not None and output.parameters.binary_data_size == len(raw)
    assert (output.datatype, output.shape, raw) == ("FP32", (2, 6), logits_NC.tobytes())


def test_classification_lists_the_best_classes_with_value_index_and_label() -> None:
    logits_NC = np.array([[0.0, 1.5, -2.0, 1.5, 9.0, 0.25], [3.0, 0, 0, 0, 0, 0]], np.float32)
    expected = ("9.000000:4:elk", "1.500000:1:bee", "3.000000:0:ant", "0.000000:1:bee")
    (output,) = built(infer_request(binary=False, num_best=2), logits_NC)[0].outputs
    assert (output.datatype, output.shape, output.data) == ("BYTES", (2, 2), expected)
    reply, raw = built(infer_request(binary=True, num_best=2), logits_NC)
    assert raw == b"".join(struct.pack("<I", len(text)) + text.encode() for text in expected)
    assert reply.outputs[0].data is None


class ToyKey(NamedTuple):
    name: str
    version: str


@dataclass
class ToyPool:
    """Computes the logits of the toy network, and records the deadlines of requests."""

    manifest: Manifest = field(default_factory=lambda: toy_engine().manifest)
    seconds_left: list[float] = field(default_factory=list)
    alive: bool = True
    reason: str = ""

    async def infer(
        self, contents: Sequence[Content], output: OutputKind, top_k: int, deadline: float
    ) -> RequestResult:
        self.seconds_left.append(deadline - time.monotonic())
        if output == OutputKind.LOGITS_OF_PIXELS:
            images_NSS3 = np.frombuffer(b"".join(map(_bytes, contents)), np.uint8).reshape(-1, SIZE_PX, SIZE_PX, 3)
            return _result([row_C.tobytes() for row_C in expected_logits(images_NSS3)])
        return _result([_logits_of_file(_bytes(content)) for content in contents])


def _bytes(content: Content) -> bytes:
    assert isinstance(content, bytes)
    return content


def _logits_of_file(file: bytes) -> bytes | Problem:
    try:
        return expected_logits(decode_image(file, TASK.preprocessing).pixels_SS3[None])[0].tobytes()
    except ImageError as error:
        return image_problem(error)


def _result(results: list[bytes | Problem]) -> RequestResult:
    return RequestResult(results, [None] * len(results), {}, len(results))


@dataclass
class ToyServed:
    key: ToyKey
    pool: ToyPool = field(default_factory=ToyPool)

    def in_use(self) -> AbstractContextManager[None]:
        return nullcontext()


class ToyModels:
    """Versions 1 and 2 of one model."""

    def __init__(self) -> None:
        self.served = [ToyServed(ToyKey("toy", version)) for version in ("1", "2")]

    def all(self) -> list[ToyServed]:
        return self.served

    def find(self, name: str | None = None, version: str | None = None) -> ToyServed:
        for served in reversed(self.served):
            if name in (None, served.key.name) and version in (None, served.key.version):
                return served
        raise ProblemError(make_problem(404, f"there is no model {name} {version}."))


MODELS = ToyModels()
LIMITS = Settings(max_body_bytes=200_000, max_images=4)


def reject_without_key() -> None:
    raise ProblemError(make_problem(401, "the request has no key."))


def app(ready: bool = True, guards: Sequence[params.Depends] = ()) -> FastAPI:
    def require_ready() -> None:
        if not ready:
            raise ProblemError(make_problem(503, "the service is not ready; try again."), {"Retry-After": "1"})

    application = FastAPI(docs_url=None, redoc_url=None, exception_handlers={404: answer_http})

    def on_result(request: Request, served: ToyServed, result: RequestResult) -> list[str]:
        """Records nothing; tests/serve/api/test_app.py tests what the service records."""
        return ["id"] * len(result.results)

    application.include_router(
        open_inference(MODELS, LIMITS, require_ready, require_ready, lambda _: time.monotonic() + 10, on_result, guards)
    )
    describe(application)
    application.add_middleware(WithContext)
    return application


class WithContext:
    """Gives each request the context that serve/http/middleware.py gives it in the service."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["context"] = RequestContext("", None, 0.0, BodyMemory(2**30))
        await self._app(scope, receive, send)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with running(app()) as client:
        yield client


def rejection(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"  # the media type that the kserve client expects
    body = response.json()
    assert (body["status"], body["error"]) == (status, body["detail"])
    return str(body["error"])


INFER = "/v2/models/toy/infer"


def test_pixels_in_json_are_answered_in_json(client: httpx.Client) -> None:
    response = client.post(INFER, content=pixels_in_json(PIXELS_NSS3.tolist()))
    assert JSON_LENGTH not in response.headers
    (output,) = InferReply.model_validate_json(response.content).outputs
    np.testing.assert_array_equal(np.array(output.data, np.float32).reshape(3, 6), expected_logits(PIXELS_NSS3))
    assert response.json()["model_version"] == "2"
    assert response.json()["parameters"] == {"answer_ids": "id,id,id"}


def test_pixels_after_the_json_are_answered_after_the_json(client: httpx.Client) -> None:
    body, json_bytes = pixels_after_json(PIXELS_NSS3.tobytes(), parameters={"binary_data_output": True})
    path = "/v2/models/toy/versions/1/infer"
    response = client.post(path, content=body, headers={JSON_LENGTH: str(json_bytes)})
    head = int(response.headers[JSON_LENGTH])
    assert json.loads(response.content[:head])["model_version"] == "1"
    assert json.loads(response.content[:head])["parameters"] == {"answer_ids": "id,id,id"}
    assert response.content[head:] == expected_logits(PIXELS_NSS3).tobytes()


def test_files_are_decoded_and_a_bad_file_is_named(client: httpx.Client) -> None:
    body, json_bytes = files_after_json(b"".join(pack_bytes([PNG, PNG])), [2])
    response = client.post(INFER, content=body, headers={JSON_LENGTH: str(json_bytes)})
    logits_NC = np.array(response.json()["outputs"][0]["data"], np.float32).reshape(2, 6)
    # the order of the 192 float32 terms differs between one row and two rows
    np.testing.assert_allclose(logits_NC, expected_logits(PIXELS_NSS3[[0, 0]]), atol=1e-5)
    body, json_bytes = files_after_json(b"".join(pack_bytes([PNG, b"text"])), [2])
    response = client.post(INFER, content=body, headers={JSON_LENGTH: str(json_bytes)})
    assert rejection(response, 415).startswith("image 2 of 2: the file is not a JPEG")
    body, json_bytes = files_after_json(b"".join(pack_bytes([PNG[:60]])), [1])
    response = client.post(INFER, content=body, headers={JSON_LENGTH: str(json_bytes)})
    assert rejection(response, 422).startswith("the image is damaged")


@pytest.mark.parametrize(
    ("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress), ("identity", bytes)]
)
def test_a_compressed_request_is_decompressed(client: httpx.Client, encoding: str, compress: type[bytes]) -> None:
    body, json_bytes = pixels_after_json(PIXELS_NSS3.tobytes())
    headers = {JSON_LENGTH: str(json_bytes), "Content-Encoding": encoding}
    response = client.post(INFER, content=compress(body), headers=headers)
    assert response.json()["outputs"][0]["shape"] == [3, 6]


def test_the_timeout_of_a_request_can_shorten_the_deadline_but_not_extend_it(client: httpx.Client) -> None:
    seconds_left = MODELS.served[1].pool.seconds_left
    for microseconds, longest in ((500_000, 0.5), (10**12, LIMITS.timeout_seconds)):
        body, json_bytes = pixels_after_json(PIXELS_NSS3.tobytes(), parameters={"timeout": microseconds})
        assert client.post(INFER, content=body, headers={JSON_LENGTH: str(json_bytes)}).status_code == 200
        assert seconds_left[-1] <= longest


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "99999999999999999999999"])
def test_an_invalid_json_length_is_400(client: httpx.Client, length: str) -> None:
    assert "Content-Length" in rejection(client.post(INFER, content=b"{}", headers={JSON_LENGTH: length}), 400)


@pytest.mark.parametrize("path", ["", "/ready", "/config", "/infer", "/versions/1/infer"])
def test_an_unknown_model_is_404(client: httpx.Client, path: str) -> None:
    method = "POST" if path.endswith("infer") else "GET"
    assert "no model other" in rejection(client.request(method, f"/v2/models/other{path}"), 404)


def test_the_server_and_its_models_are_described(client: httpx.Client) -> None:
    assert client.get("/v2").json()["name"] == "ltkd"
    assert {"binary_tensor_data", "classification"} <= set(client.get("/v2").json()["extensions"])
    assert (client.get("/v2/health/live").json(), client.get("/v2/health/ready").json()) == (
        {"live": True},
        {"ready": True},
    )
    index = client.post("/v2/repository/index").json()
    assert [(entry["name"], entry["version"], entry["state"]) for entry in index] == [
        ("toy", "1", "READY"),
        ("toy", "2", "READY"),
    ]
    metadata = ModelMetadata.model_validate_json(client.get("/v2/models/toy").content)
    assert metadata.versions == ("1", "2")
    assert [(tensor.name, tensor.datatype, tensor.shape) for tensor in (*metadata.inputs, *metadata.outputs)] == [
        ("image", "UINT8", (-1, 8, 8, 3)),
        ("image_bytes", "BYTES", (-1,)),
        ("logits", "FP32", (-1, 6)),
    ]
    config = ModelConfig.model_validate_json(client.get("/v2/models/toy/config").content)
    assert (config.max_batch_size, config.input[0].dims, config.output[0].dims) == (4, (8, 8, 3), (6,))


def test_a_service_that_is_not_ready_rejects_requests() -> None:
    with running(app(ready=False)) as client:
        assert "not ready" in rejection(client.get("/v2/health/ready"), 503)
        response = client.post(INFER, content=pixels_in_json(PIXELS_NSS3.tolist()))
        assert "not ready" in rejection(response, 503)
        assert response.headers["retry-after"] == "1"
        assert client.get("/v2/health/live").status_code == 200


def test_guards_protect_every_route_except_the_health_checks() -> None:
    with running(app(guards=[Depends(reject_without_key)])) as client:
        for method, path in (
            ("GET", "/v2"),
            ("GET", "/v2/models/toy"),
            ("POST", "/v2/repository/index"),
            ("POST", INFER),
        ):
            assert "no key" in rejection(client.request(method, path), 401)
        assert [client.get(f"/v2/health/{check}").status_code for check in ("live", "ready")] == [200, 200]


def test_a_body_above_the_limit_is_413(client: httpx.Client) -> None:
    assert "200,000 bytes" in rejection(client.post(INFER, content=bytes(200_001)), 413)
    bomb = gzip.compress(bytes(10**7))
    assert len(bomb) < 200_000
    response = client.post(INFER, content=bomb, headers={"Content-Encoding": "gzip"})
    assert "200,000 bytes after decompression" in rejection(response, 413)


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs":[' + b"{}," * 300_000 + b"{}]}",
        b'{"inputs":[{"name":"image_bytes","datatype":"BYTES","shape":[1],"data":["a"]}],"outputs":['
        + b"1," * 300_000
        + b"1]}",
        b'{"inputs":[{"name":"image_bytes","datatype":"BYTES","shape":[' + b'"x",' * 300_000 + b'1],"data":["a"]}]}',
    ],
    ids=["inputs", "outputs", "shape"],
)
def test_of_many_invalid_elements_only_the_first_is_looked_at(body: bytes) -> None:
    with pytest.raises(ValidationError) as caught:
        InferBody.model_validate_json(body)
    assert caught.value.error_count() <= 4  # the fields of one element; each error takes a kilobyte


def test_a_timeout_that_is_too_large_for_a_float_is_400(client: httpx.Client) -> None:
    tensor = {"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [""]}
    response = client.post("/v2/models/toy/infer", json={"inputs": [tensor], "parameters": {"timeout": 10**310}})
    assert response.status_code == 400
