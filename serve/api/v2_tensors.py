"""Tensors of the Open Inference Protocol: a request's bytes in, a response's bytes out, nothing of HTTP.

A request is JSON, or JSON with the tensors' bytes behind it (the binary tensor data extension); a response likewise. A
model takes its images as one of two inputs, and gives one output:

    image         UINT8 [N, S, S, 3]   pixels as the network sees them, RGB
    image_bytes   BYTES [N]            JPEG, PNG or WebP files; in JSON, where bytes cannot stand, in base64
    logits        FP32 [N, C]          or with the classification extension BYTES [N, k], "value:index:label"

Shape legend: N images, S side in pixels, C classes.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from ltkd.contract.records import Record
from ltkd.contract.task import Task
from serve.http.bodies import base64_bytes, too_many_images
from serve.problems import Content, Problem, ProblemError, problem_of

PIXELS, FILES, LOGITS = "image", "image_bytes", "logits"
MAX_JSON_BYTES = 4 * 2**20  # a tensor in JSON takes some thirty times its size while it is read
_PREFIX = struct.Struct("<I")  # in front of each element of BYTES


class Parameters(BaseModel):
    """What can be said beside a tensor or a request; what is not known here is left alone, as the protocol has it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    binary_data_size: int | None = Field(default=None, ge=0, description="Bytes of this input behind the JSON")
    binary_data: bool | None = Field(default=None, description="Whether this output comes behind the JSON")
    binary_data_output: bool | None = Field(default=None, description="The same for all outputs")
    classification: int | None = Field(default=None, ge=1, description="Instead of logits, so many best classes")
    timeout: int | None = Field(default=None, gt=0, description="Microseconds after which nobody needs the answer")
    shared_memory_region: str | None = Field(default=None, description="Not taken")


class InputTensor(BaseModel):
    """One tensor of a request."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Literal["image", "image_bytes"]
    datatype: Literal["UINT8", "BYTES"]
    shape: tuple[int, ...] = Field(min_length=1, max_length=4)
    parameters: Parameters = Parameters()
    data: list[object] | None = Field(default=None, description="Row by row, flat or nested")


class WantedOutput(BaseModel):
    """One tensor that a request wants to have."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Literal["logits"]
    parameters: Parameters = Parameters()


class InferBody(BaseModel):
    """An inference request."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str = Field(default="", max_length=256)
    parameters: Parameters = Parameters()
    inputs: tuple[InputTensor, ...] = Field(min_length=1, max_length=1)
    outputs: tuple[WantedOutput, ...] = Field(default=(), max_length=1)


class OutputParameters(Record):
    """What is said beside an output that comes behind the JSON."""

    binary_data_size: int = Field(ge=0)


class OutputTensor(Record):
    """One tensor of a response."""

    name: Literal["logits"]
    datatype: Literal["FP32", "BYTES"]
    shape: tuple[int, int]
    data: tuple[float, ...] | tuple[str, ...] | None = Field(default=None, description="Row by row, flat")
    parameters: OutputParameters | None = None


class InferReply(Record):
    """The JSON of an inference response; it is written by hand, and a test holds it against this."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: tuple[OutputTensor]


@dataclass(frozen=True)
class InferRequest:
    """What a request asks for.

    Attributes:
        id: The caller's own name for it, given back.
        images: Pixels, uint8 [N, S, S, 3], or the N files.
        binary: Whether the output comes behind the JSON.
        num_best: Classes to list instead of logits; 0 for logits.
        timeout_seconds: After which nobody needs the answer, where the caller says so.
    """

    id: str
    images: NDArray[np.uint8] | list[Content]
    binary: bool
    num_best: int
    timeout_seconds: float | None


def parse_request(body: bytes, json_bytes: int | None, task: Task, max_images: int) -> InferRequest:
    """Read an inference request.

    Args:
        body: The JSON, with the tensors' bytes behind it.
        json_bytes: How much of the body is JSON; None for all of it.
        task: Of the model that is asked.
        max_images: Requests with more images are refused.

    Raises:
        ProblemError: The request is malformed, or asks for what the model does not have.
    """
    json_bytes = len(body) if json_bytes is None else json_bytes
    if json_bytes > len(body):
        raise _malformed(f"Inference-Header-Content-Length is {json_bytes}, but the body has {len(body)} bytes.")
    if json_bytes > MAX_JSON_BYTES:
        detail = f"the request has {json_bytes:,} bytes of JSON, at most {MAX_JSON_BYTES:,} are taken"
        raise ProblemError(problem_of(413, f"{detail}; send tensors as binary data."))
    try:
        asked = InferBody.model_validate_json(body[:json_bytes])
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:80] or "the body"
        raise _malformed(f"{where}: {first['msg']}; expected an inference request in JSON.") from None
    (tensor,) = asked.inputs
    binary, num_best = _wanted(asked, len(task.class_names))
    timeout = asked.parameters.timeout
    return InferRequest(
        id=asked.id,
        images=_images(tensor, body[json_bytes:], task.input_px, max_images),
        binary=binary,
        num_best=num_best,
        timeout_seconds=None if timeout is None else timeout / 1e6,
    )


@dataclass(frozen=True)
class InferResponse:
    """A response on its way out.

    Attributes:
        body: JSON, with the output's bytes behind it if that was wanted.
        json_bytes: How much of it is JSON, where there is more.
    """

    body: bytes
    json_bytes: int | None


def build_response(
    request: InferRequest, logits_NC: NDArray[np.float32], task: Task, model_name: str, model_version: str
) -> InferResponse:
    """Write an inference response.

    Args:
        request: What was asked.
        logits_NC: The model's answer.
        task: Its classes.
        model_name: Which model answered.
        model_version: And which of its versions.
    """
    output: dict[str, object]
    if request.num_best:
        texts = best_classes(logits_NC, task.class_names, request.num_best)
        shape = [len(logits_NC), min(request.num_best, len(task.class_names))]
        output = {"name": LOGITS, "datatype": "BYTES", "shape": shape}
        data: object = texts
        raw = b"".join(pack_bytes([text.encode() for text in texts])) if request.binary else b""
    else:
        output = {"name": LOGITS, "datatype": "FP32", "shape": list(logits_NC.shape)}
        data = None if request.binary else logits_NC.ravel().tolist()
        raw = logits_NC.astype("<f4", copy=False).tobytes() if request.binary else b""
    if request.binary:
        output["parameters"] = {"binary_data_size": len(raw)}
    else:
        output["data"] = data
    head: dict[str, object] = {"model_name": model_name, "model_version": model_version}
    if request.id:
        head["id"] = request.id
    written = to_json({**head, "outputs": [output]})
    return InferResponse(written + raw, len(written) if request.binary else None)


def best_classes(logits_NC: NDArray[np.float32], class_names: Sequence[str], num_best: int) -> list[str]:
    """The most probable classes of each image, "value:index:label", image after image."""
    order_NC = np.argsort(-logits_NC, axis=1, kind="stable")[:, :num_best]
    return [
        f"{float(logits_C[index]):f}:{index}:{class_names[index]}"
        for logits_C, order_C in zip(logits_NC, order_NC.tolist(), strict=True)
        for index in order_C
    ]


def pack_bytes(elements: Sequence[bytes]) -> Iterator[bytes]:
    """Elements of BYTES as they stand behind the JSON, each with its length in front."""
    return chain.from_iterable((_PREFIX.pack(len(element)), element) for element in elements)


def unpack_bytes(raw: bytes, num: int) -> list[bytes]:
    """The ``num`` elements of BYTES behind the JSON.

    Raises:
        ProblemError: There are more, fewer, or one does not end.
    """
    elements: list[bytes] = []
    start = 0
    while len(elements) < num:
        end = start + _PREFIX.size
        if end > len(raw):
            raise _malformed(f"the input {FILES} has {len(elements)} elements, its shape says {num}.")
        (length,) = _PREFIX.unpack_from(raw, start)
        start = end + length
        if start > len(raw):
            raise _malformed(f"element {len(elements)} of {FILES} says it has {length} bytes, {len(raw) - end} follow.")
        elements.append(raw[end:start])
    if start < len(raw):
        raise _malformed(f"{len(raw) - start} bytes follow the {num} elements that the shape of {FILES} promises.")
    return elements


def _wanted(asked: InferBody, num_classes: int) -> tuple[bool, int]:
    """Whether the output comes behind the JSON, and how many classes are listed instead of logits."""
    binary = asked.parameters.binary_data_output
    if not asked.outputs:
        return bool(binary), 0
    (output,) = asked.outputs
    if output.parameters.shared_memory_region is not None:
        raise _malformed("shared memory is not taken; have the output in the response.")
    own = output.parameters.binary_data
    return bool(binary if own is None else own), min(output.parameters.classification or 0, num_classes)


def _images(tensor: InputTensor, raw: bytes, size_px: int, max_images: int) -> NDArray[np.uint8] | list[Content]:
    num, *one = tensor.shape
    if tensor.name == PIXELS:
        expected, fits = f"UINT8 [N, {size_px}, {size_px}, 3]", one == [size_px, size_px, 3]
    else:
        expected, fits = "BYTES [N]", one in ([], [1])
    if not fits or num < 1 or not expected.startswith(tensor.datatype):
        detail = f"the input {tensor.name} is {tensor.datatype} {list(tensor.shape)}, expected {expected}"
        raise _malformed(f"{detail} with N from 1 on.")
    if num > max_images:
        raise _malformed(too_many_images(max_images))
    if tensor.parameters.shared_memory_region is not None:
        raise _malformed("shared memory is not taken; send the tensor in the request.")
    size = tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is None):
        raise _malformed(f"the input {tensor.name} needs either data or binary_data_size.")
    if (size or 0) != len(raw):
        raise _malformed(
            f"the input {tensor.name} says it has {size or 0} bytes behind the JSON, {len(raw)} are there."
        )
    if tensor.name == FILES:
        return _files(tensor.data, num) if tensor.data is not None else list[Content](unpack_bytes(raw, num))
    pixels = raw if tensor.data is None else _flat_pixels(tensor.data)
    if len(pixels) != prod(tensor.shape):
        raise _malformed(f"the input {PIXELS} has {len(pixels)} values, its shape says {prod(tensor.shape)}.")
    return np.frombuffer(pixels, np.uint8).reshape(tensor.shape)


def _flat_pixels(data: list[object]) -> bytes:
    for _ in range(3):  # rows, columns, channels
        if not (data and isinstance(data[0], list)):
            break
        try:
            data = list(chain.from_iterable(data))  # type: ignore[arg-type] # TypeError is the answer
        except TypeError:
            raise _malformed(f"the data of {PIXELS} is not nested evenly; send it row by row.") from None
    try:
        return bytes(data)  # type: ignore[arg-type] # likewise
    except (TypeError, ValueError):
        raise _malformed(f"the data of {PIXELS} must be whole numbers from 0 to 255.") from None


def _files(data: list[object], num: int) -> list[Content]:
    texts = [text for row in data for text in (row if isinstance(row, list) else [row])]
    if len(texts) != num:
        raise _malformed(f"the input {FILES} has {len(texts)} elements, its shape says {num}.")
    contents = [base64_bytes(text) if isinstance(text, str) else problem_of(400, _NO_BASE64) for text in texts]
    for content in contents:
        if isinstance(content, Problem):
            raise ProblemError(content)
    return contents


_NO_BASE64 = f"the data of {FILES} must be files in base64, or binary data."


def _malformed(detail: str) -> ProblemError:
    return ProblemError(problem_of(400, detail))
