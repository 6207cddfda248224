"""The messages between the server process and an engine process, over a stream socket.

``serve.pool.engine_process`` is the server process's end of the socket, ``serve.engine.message_loop`` the other one. An
``EngineConfig`` is passed on the command line. Every message has a length, a kind and a content, all little-endian:

    server to engine   REQUEST   an EngineRequest: number, deadline, output kind, top_k, lengths and bytes of images
                       CANCEL    the number of a request whose results are no longer needed
                       (end of stream: finish the requests received so far, then exit)
    engine to server   READY     an EngineReady, in JSON
                       FAILED    a Failed, in JSON: why the engine cannot start
                       LOG       the traceback of an unexpected exception, as text
                       RESPONSE  an EngineResponse: number, stage seconds; per image its facts and its answer or problem
                       ALIVE     no content: an image was decoded or a batch was run, and there may be more to do

Deadlines are on the clock of ``time.monotonic``, which all processes of a machine share.
"""

import socket
import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from ltkd.contract.bundle import Manifest, Precision
from ltkd.contract.node_assignment import NodeAssignment
from ltkd.contract.records import Record
from serve.engine.answers import DECISIONS, Decision


class EngineConfig(Record):
    """The configuration of an engine process, passed on its command line.

    Attributes:
        bundle: The bundle's directory.
        device: ``cpu``, ``cuda:INDEX`` or ``auto:INDEX``, as ``serve.engine.session.open_engine`` takes it.
        precision: One of the bundle's precisions; None uses the fastest certified one for the device.
        max_batch: The largest batch size.
        max_wait_ms: How long an image may wait for more images; None uses the default of the device.
        max_pixels: Images with more decoded pixels are rejected from their header.
        max_request_pixels: So are the images of a request that have more decoded pixels together.
        processes: How many engine processes share the cores.
    """

    bundle: Path
    device: str
    precision: Precision | None
    max_batch: int
    max_wait_ms: float | None
    max_pixels: int
    max_request_pixels: int
    processes: int = 1


class EngineReady(Record):
    """The message of an engine process that is ready to serve requests.

    Attributes:
        manifest: The manifest of the bundle it opened.
        precision: Which of the bundle's models runs.
        provider: The execution provider that really runs it, by ONNX Runtime's name.
        nodes: How many of the model's nodes run on which provider.
        seconds_of: The batch sizes that are run, and how long each takes.
    """

    manifest: Manifest
    precision: Precision
    provider: str
    nodes: NodeAssignment
    seconds_of: dict[int, float]


class Failed(Record):
    """Why an engine process did not become ready.

    Attributes:
        error: The name of an error class of ltkd/errors.py.
        message: The message of the error.
    """

    error: str
    message: str


class Kind(IntEnum):
    """The kind of a message."""

    REQUEST = 1  # EngineRequest
    CANCEL = 2
    READY = 3  # EngineReady
    FAILED = 4
    RESPONSE = 5  # EngineResponse
    LOG = 6
    ALIVE = 7  # no content


class OutputKind(IntEnum):
    """The kind of output that a request asks for."""

    ANSWERS = 1  # answers in JSON, from encoded images
    LOGITS = 2  # float32 [C], from encoded images
    LOGITS_OF_PIXELS = 3  # float32 [C], from uint8 [S, S, 3]


class EngineRequest(NamedTuple):
    """A request to an engine process.

    Attributes:
        number: Identifies the request; the response carries it too.
        deadline: On the clock of ``time.monotonic``.
        output_kind: What to return for each image.
        top_k: How many classes to list in an answer.
        contents: The images: encoded, or raw pixels, depending on ``output_kind``.
    """

    number: int
    deadline: float
    output_kind: OutputKind
    top_k: int
    contents: list[bytes]


class PredictionFacts(NamedTuple):
    """What telemetry records of one classified image, with indices in place of names.

    Attributes:
        group: Index of the predicted class's group.
        label: Index of the predicted class.
        confidence: Its calibrated probability.
        decision: The decision of the group's threshold.
        set_size: How many classes the prediction set has.
    """

    group: int
    label: int
    confidence: float
    decision: Decision
    set_size: int


class ImageResult(NamedTuple):
    """The result of one image.

    Attributes:
        status: 0 for an answer, else the HTTP status of the problem.
        payload: The answer or the logits, else the detail of the problem.
        facts: The facts of an answer or of logits; None for a problem and for logits that are not finite.
    """

    status: int
    payload: bytes
    facts: PredictionFacts | None = None


class EngineResponse(NamedTuple):
    """The response to a request.

    Attributes:
        number: The number of the request.
        decode_seconds: From its arrival in the engine process until its last image was decoded.
        queue_seconds: From then until its last batch began.
        infer_seconds: How long that batch ran.
        batch_size: How many images were in that batch; 0 if nothing ran.
        results: One per image, in order; empty for a request that was cancelled.
    """

    number: int
    decode_seconds: float
    queue_seconds: float
    infer_seconds: float
    batch_size: int
    results: list[ImageResult]


_WORK_KIND, _DONE_KIND = (
    int(Kind.REQUEST),
    int(Kind.RESPONSE),
)  # an enumeration member costs a lookup, an integer does not
_OUTPUT_KINDS = {int(kind): kind for kind in OutputKind}
_HEAD = struct.Struct("<IB")
_WORK = struct.Struct("<IBQdBIH")
_LENGTH = struct.Struct("<I")
_CANCEL = struct.Struct("<IBQ")
_DONE = struct.Struct("<IBQdddHH")
_RESULT = struct.Struct("<HHIdBII")
_NUMBER_OF_DECISION = {decision: number for number, decision in enumerate(DECISIONS, 1)}  # 0 means no facts


def pack_request(request: EngineRequest) -> bytes:
    """A REQUEST message."""
    number, deadline, output_kind, top_k, contents = request
    lengths = b"".join([_LENGTH.pack(len(content)) for content in contents])
    size = _WORK.size - 4 + len(lengths) + sum(map(len, contents))
    head = _WORK.pack(size, _WORK_KIND, number, deadline, output_kind, top_k, len(contents))
    return b"".join((head, lengths, *contents))


def unpack_request(message: memoryview) -> EngineRequest:
    """The request in a REQUEST message."""
    _, _, number, deadline, output_kind, top_k, num = _WORK.unpack_from(message)
    start = _WORK.size + 4 * num
    contents = []
    for length in struct.unpack_from(f"<{num}I", message, _WORK.size):
        contents.append(bytes(message[start : start + length]))
        start += length
    return EngineRequest(number, deadline, _OUTPUT_KINDS[output_kind], top_k, contents)


def pack_cancel(number: int) -> bytes:
    """A CANCEL message."""
    return _CANCEL.pack(_CANCEL.size - 4, Kind.CANCEL, number)


def pack_text(kind: Kind, text: str) -> bytes:
    """A READY, FAILED or LOG message."""
    content = text.encode()
    return _HEAD.pack(1 + len(content), kind) + content


def unpack_text(message: memoryview) -> str:
    """The content of a READY, FAILED or LOG message."""
    return bytes(message[_HEAD.size :]).decode()


def pack_response(response: EngineResponse) -> bytes:
    """A RESPONSE message."""
    *head, results = response
    parts = [b""]
    for status, payload, facts in results:
        if facts is None:
            parts += (_RESULT.pack(status, 0, 0, 0.0, 0, 0, len(payload)), payload)
        else:
            group, label, confidence, decision, set_size = facts
            number = _NUMBER_OF_DECISION[decision]
            parts += (_RESULT.pack(status, group, label, confidence, number, set_size, len(payload)), payload)
    size = _DONE.size - 4 + sum(map(len, parts))
    parts[0] = _DONE.pack(size, _DONE_KIND, *head, len(results))
    return b"".join(parts)


def unpack_number(message: memoryview) -> int:
    """The number of the request that a RESPONSE or CANCEL message is about."""
    number: int = _CANCEL.unpack_from(message)[2]
    return number


def unpack_response(message: memoryview) -> EngineResponse:
    """The response in a RESPONSE message."""
    _, _, number, decode, queue, infer, batch_size, num = _DONE.unpack_from(message)
    start = _DONE.size
    results = []
    for _ in range(num):
        status, group, label, confidence, decision, set_size, length = _RESULT.unpack_from(message, start)
        start += _RESULT.size
        facts = PredictionFacts(group, label, confidence, DECISIONS[decision - 1], set_size) if decision else None
        results.append(ImageResult(status, bytes(message[start : start + length]), facts))
        start += length
    return EngineResponse(number, decode, queue, infer, batch_size, results)


ALIVE = _HEAD.pack(1, Kind.ALIVE)
"""An ALIVE message."""


class MessageReader:
    """Splits a stream of bytes into messages."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._missing = 0  # bytes until the incomplete message is complete

    def feed(self, data: bytes) -> Iterator[tuple[int, memoryview]]:
        """Add bytes that were read, and yield the kind and the bytes of every message that is now complete."""
        if self._parts:
            self._parts.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return
            data = b"".join(self._parts)
            self._parts = []
        view = memoryview(data)
        start, end = 0, len(data)
        after = start
        while end - start >= _HEAD.size:
            size, kind = _HEAD.unpack_from(data, start)
            after = start + 4 + size
            if after > end:
                break
            yield kind, view[start:after]
            start = after
        if start < end:
            self._parts = [data[start:]]
            self._missing = max(1, after - end)


def read_some(connection: socket.socket, num_bytes: int = 2**18, *, wait: bool = True) -> bytes | None:
    """Read available bytes: empty at the end of the stream; None if there are none and ``wait`` is false."""
    try:
        return connection.recv(num_bytes, 0 if wait else socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    except (ConnectionResetError, BrokenPipeError):
        return b""


def send_all(connection: socket.socket, messages: Sequence[bytes]) -> None:
    """Send messages with as few calls as possible."""
    connection.sendall(messages[0] if len(messages) == 1 else b"".join(messages))
