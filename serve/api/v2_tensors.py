"""Tensors of the Open Inference Protocol: parse the bytes of a request and build the bytes of a response.

The routes are in serve/api/v2.py; this module does not depend on HTTP. A request or response is JSON, or JSON followed
by the bytes of its tensors (the binary tensor data extension). A model has two alternative inputs and one output:

    image         UINT8 [N, S, S, 3]   pixels at the input size of the network, RGB
    image_bytes   BYTES [N]            JPEG, PNG or WebP files; in base64 if they are inside the JSON
    logits        FP32 [N, C]          or, with the classification extension, BYTES [N, k], "value:index:label"

Shape legend: N images, S side in pixels, C classes.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import to_json

from ltkd.contract.records import Record
from ltkd.contract.task import Task
from serve.http.bodies import base64_bytes, too_many_images
from serve.problems import Content, Problem, ProblemError, make_problem

PIXELS, FILES, LOGITS = "image", "image_bytes", "logits"
MAX_JSON_BYTES = 4 * 2**20  # parsing a tensor in JSON takes about thirty times its size in memory
_PREFIX = struct.Struct("<I")  # the length before each element of BYTES


class Parameters(BaseModel):
    """Parameters of a request or tensor. Unknown parameters are ignored, as the protocol requires."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    binary_data_size: int | None = Field(default=None, ge=0, description="Size of this input's data after the JSON")
    binary_data: bool | None = Field(default=None, description="Whether this output follows the JSON as binary data")
    binary_data_output: bool | None = Field(default=None, description="The same for all outputs")
    classification: int | None = Field(
        default=None, ge=1, description="Number of best classes to return instead of logits"
    )
    timeout: int | None = Field(
        default=None, gt=0, le=10**12, description="Microseconds after which the client no longer needs the response"
    )
    shared_memory_region: str | None = Field(default=None, description="Not supported")


class InputTensor(BaseModel):
    """One tensor of a request."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Literal["image", "image_bytes"]
    datatype: Literal["UINT8", "BYTES"]
    shape: Annotated[tuple[int, ...], FailFast()] = Field(min_length=1, max_length=4)
    parameters: Parameters = Parameters()
    data: list[object] | None = Field(default=None, description="Row by row, flat or nested")


class RequestedOutput(BaseModel):
    """One tensor that a request asks for."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Literal["logits"]
    parameters: Parameters = Parameters()


class InferBody(BaseModel):
    """An inference request."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str = Field(default="", max_length=256)
    parameters: Parameters = Parameters()
    # a body of a few kilobytes can have millions of invalid elements, and each error takes a kilobyte
    inputs: Annotated[tuple[InputTensor, ...], FailFast()] = Field(min_length=1, max_length=1)
    outputs: Annotated[tuple[RequestedOutput, ...], FailFast()] = Field(default=(), max_length=1)


class OutputParameters(Record):
    """Parameters of an output that follows the JSON as binary data."""

    binary_data_size: int = Field(ge=0)


class OutputTensor(Record):
    """One tensor of a response."""

    name: Literal["logits"]
    datatype: Literal["FP32", "BYTES"]
    shape: tuple[int, int]
    data: tuple[float, ...] | tuple[str, ...] | None = Field(default=None, description="Row by row, flat")
    parameters: OutputParameters | None = None


class ReplyParameters(Record):
    """Parameters of a response. Values of the protocol are strings, numbers or booleans, so the ids are one string."""

    answer_ids: str = Field(
        description="The ids that name the answers in feedback: one per image, in order, separated by commas; an id is "
        "empty if the logits of the image are not finite"
    )


class InferReply(Record):
    """The JSON of an inference response. build_response writes it directly; a test compares the two."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: ReplyParameters
    outputs: tuple[OutputTensor]


@dataclass(frozen=True)
class InferRequest:
    """A parsed inference request.

    Attributes:
        id: The client's id for the request; the response repeats it.
        images: Pixels, uint8 [N, S, S, 3], or the N files.
        binary: Whether the output follows the JSON as binary data.
        num_best: Number of classes to list instead of logits; 0 for logits.
        timeout_seconds: Time after which the client no longer needs the response; None if it sets no limit.
    """

    id: str
    images: NDArray[np.uint8] | list[Content]
    binary: bool
    num_best: int
    timeout_seconds: float | None


def parse_request(body: bytes, json_bytes: int | None, task: Task, max_images: int) -> InferRequest:
    """Read an inference request.

    Args:
        body: The JSON, followed by the bytes of the tensors.
        json_bytes: Number of bytes of JSON at the start of the body; None for all of it.
        task: The task of the requested model.
        max_images: Requests with more images are rejected.

    Raises:
        ProblemError: The request is malformed, or its tensors are not those of the model.
    """
    json_bytes = len(body) if json_bytes is None else json_bytes
    if json_bytes > len(body):
        raise _malformed(f"Inference-Header-Content-Length is {json_bytes}, but the body has {len(body)} bytes.")
    if json_bytes > MAX_JSON_BYTES:
        detail = f"the request has {json_bytes:,} bytes of JSON, but at most {MAX_JSON_BYTES:,} are accepted"
        raise ProblemError(make_problem(413, f"{detail}; send the tensors as binary data."))
    try:
        parsed = InferBody.model_validate_json(body[:json_bytes])
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:80] or "the body"
        raise _malformed(f"{where}: {first['msg']}; expected an inference request in JSON.") from None
    (tensor,) = parsed.inputs
    binary, num_best = _output_format(parsed, len(task.class_names))
    timeout = parsed.parameters.timeout
    return InferRequest(
        id=parsed.id,
        images=_images(tensor, body[json_bytes:], task.input_px, max_images),
        binary=binary,
        num_best=num_best,
        timeout_seconds=None if timeout is None else timeout / 1e6,
    )


@dataclass(frozen=True)
class InferResponse:
    """The body of an inference response.

    Attributes:
        body: JSON, followed by the bytes of the output if the request asked for binary data.
        json_bytes: Number of bytes of JSON at the start of the body; None if all of it is JSON.
    """

    body: bytes
    json_bytes: int | None


def build_response(
    request: InferRequest,
    logits_NC: NDArray[np.float32],
    answer_ids: Sequence[str],
    task: Task,
    model_name: str,
    model_version: str,
) -> InferResponse:
    """Build the body of an inference response.

    Args:
        request: The request.
        logits_NC: The logits of its images.
        answer_ids: The N ids of the answers.
        task: The task of the model, with its class names.
        model_name: Name of the model.
        model_version: Version of the model.
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
    head["parameters"] = {"answer_ids": ",".join(answer_ids)}
    json_part = to_json({**head, "outputs": [output]})
    return InferResponse(json_part + raw, len(json_part) if request.binary else None)


def best_classes(logits_NC: NDArray[np.float32], class_names: Sequence[str], num_best: int) -> list[str]:
    """List the most probable classes of each image as "value:index:label", one image after another."""
    order_NC = np.argsort(-logits_NC, axis=1, kind="stable")[:, :num_best]
    return [
        f"{float(logits_C[index]):f}:{index}:{class_names[index]}"
        for logits_C, order_C in zip(logits_NC, order_NC.tolist(), strict=True)
        for index in order_C
    ]


def pack_bytes(elements: Sequence[bytes]) -> Iterator[bytes]:
    """Encode elements of BYTES as binary data: each element follows its length."""
    return chain.from_iterable((_PREFIX.pack(len(element)), element) for element in elements)


def unpack_bytes(raw: bytes, num: int) -> list[bytes]:
    """Decode ``num`` elements of BYTES from binary data.

    Raises:
        ProblemError: There are more or fewer elements, or one of them is truncated.
    """
    elements: list[bytes] = []
    start = 0
    while len(elements) < num:
        end = start + _PREFIX.size
        if end > len(raw):
            raise _malformed(f"the input {FILES} has {len(elements)} elements, but its shape says {num}.")
        (length,) = _PREFIX.unpack_from(raw, start)
        start = end + length
        if start > len(raw):
            detail = f"element {len(elements)} of {FILES} declares {length} bytes, but only {len(raw) - end} follow."
            raise _malformed(detail)
        elements.append(raw[end:start])
    if start < len(raw):
        raise _malformed(
            f"{len(raw) - start} extra bytes follow the {num} elements of {FILES}; send as many as its shape says."
        )
    return elements


def _output_format(body: InferBody, num_classes: int) -> tuple[bool, int]:
    """Whether the output follows the JSON as binary data, and the number of classes to list instead of logits."""
    binary = body.parameters.binary_data_output
    if not body.outputs:
        return bool(binary), 0
    (output,) = body.outputs
    if output.parameters.shared_memory_region is not None:
        raise _malformed("shared memory is not supported; request the output in the response.")
    own = output.parameters.binary_data
    return bool(binary if own is None else own), min(output.parameters.classification or 0, num_classes)


def _images(tensor: InputTensor, raw: bytes, size_px: int, max_images: int) -> NDArray[np.uint8] | list[Content]:
    num, *image_shape = tensor.shape
    if tensor.name == PIXELS:
        expected, fits = f"UINT8 [N, {size_px}, {size_px}, 3]", image_shape == [size_px, size_px, 3]
    else:
        expected, fits = "BYTES [N]", image_shape in ([], [1])
    if not fits or num < 1 or not expected.startswith(tensor.datatype):
        detail = f"the input {tensor.name} is {tensor.datatype} {list(tensor.shape)}, expected {expected}"
        raise _malformed(f"{detail} with N of at least 1.")
    if num > max_images:
        raise _malformed(too_many_images(max_images))
    if tensor.parameters.shared_memory_region is not None:
        raise _malformed("shared memory is not supported; send the tensor in the request.")
    size = tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is None):
        raise _malformed(f"the input {tensor.name} needs either data or binary_data_size.")
    if (size or 0) != len(raw):
        raise _malformed(
            f"the input {tensor.name} declares {size or 0} bytes after the JSON, but {len(raw)} bytes follow it."
        )
    if tensor.name == FILES:
        return _files(tensor.data, num) if tensor.data is not None else list[Content](unpack_bytes(raw, num))
    pixels = raw if tensor.data is None else _flat_pixels(tensor.data)
    if len(pixels) != prod(tensor.shape):
        raise _malformed(f"the input {PIXELS} has {len(pixels)} values, but its shape says {prod(tensor.shape)}.")
    return np.frombuffer(pixels, np.uint8).reshape(tensor.shape)


def _flat_pixels(data: list[object]) -> bytes:
    for _ in range(3):  # rows, columns, channels
        if not (data and isinstance(data[0], list)):
            break
        try:
            data = list(chain.from_iterable(data))  # type: ignore[arg-type] # TypeError is handled
        except TypeError:
            raise _malformed(f"the data of {PIXELS} is not nested evenly; send it row by row.") from None
    try:
        return bytes(data)  # type: ignore[arg-type] # likewise
    except (TypeError, ValueError):
        raise _malformed(f"the data of {PIXELS} must be whole numbers from 0 to 255.") from None


def _files(data: list[object], num: int) -> list[Content]:
    texts = [text for row in data for text in (row if isinstance(row, list) else [row])]
    if len(texts) != num:
        raise _malformed(f"the input {FILES} has {len(texts)} elements, but its shape says {num}.")
    contents = [base64_bytes(text) if isinstance(text, str) else make_problem(400, _NO_BASE64) for text in texts]
    for content in contents:
        if isinstance(content, Problem):
            raise ProblemError(content)
    return contents


_NO_BASE64 = f"the data of {FILES} must be files in base64, or binary data."


def _malformed(detail: str) -> ProblemError:
    return ProblemError(make_problem(400, detail))
