"""The messages between the front and an engine process, over a stream socket.

Every message is its length, its kind and its content, little-endian:

    front to engine    WORK    number, deadline, what is wanted, top_k, the images' lengths and bytes
                       CANCEL  number: nobody waits for it any more
                       (end of stream: finish what was taken, then exit)
    engine to front    HELLO   JSON: ready, and what runs
                       FAILED  JSON: why not
                       LOG     text: what went wrong inside
                       DONE    number, stage seconds, and of each image its facts and its answer or problem

Deadlines are on the clock of ``time.monotonic``, which all processes of a machine share.
"""

import socket
import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Literal, NamedTuple

from ltkd.contract.bundle import Manifest, Precision
from ltkd.contract.records import Record
from serve.engine.answers import DECISIONS, Decision

Device = Literal["auto", "cpu", "cuda"]


class EngineConfig(Record):
    """What an engine process is told when it starts.

    Attributes:
        bundle: The bundle's directory.
        device: ``cuda`` runs on CUDA or not at all; ``auto`` takes CUDA where it works, else the CPU.
        precision: One of the bundle's; None takes the fastest that is certified, of those for the device.
        max_batch: The largest batch.
        max_wait_ms: How long an image may wait for others; None decides by the device.
        max_pixels: Images with more pixels are refused from their header.
        processes: How many engine processes share the cores.
    """

    bundle: Path
    device: Device
    precision: Precision | None
    max_batch: int
    max_wait_ms: float | None
    max_pixels: int
    processes: int = 1


class EngineReady(Record):
    """What an engine process says when it is ready.

    Attributes:
        manifest: The manifest of the bundle it opened.
        precision: Which of the bundle's models runs.
        provider: The execution provider that really runs it, as ONNX Runtime names it.
        seconds_of: The batch sizes that are run, and how long each takes.
    """

    manifest: Manifest
    precision: Precision
    provider: str
    seconds_of: dict[int, float]


class Failed(Record):
    """Why an engine process did not become ready.

    Attributes:
        error: The name of an error of ltkd/errors.py.
        message: What it says.
    """

    error: str
    message: str


class Kind(IntEnum):
    """What a message is."""

    WORK = 1
    CANCEL = 2
    HELLO = 3
    FAILED = 4
    DONE = 5
    LOG = 6


class OutputKind(IntEnum):
    """What is to be made of the images of a request."""

    ANSWERS = 1  # of encoded images: answers as JSON
    LOGITS = 2  # of encoded images: float32 [C]
    LOGITS_OF_PIXELS = 3  # of uint8 [S, S, 3]: float32 [C]


class EngineRequest(NamedTuple):
    """A request as the engine process takes it."""

    number: int
    deadline: float
    wanted: OutputKind
    top_k: int
    contents: list[bytes]


class PredictionFacts(NamedTuple):
    """What telemetry needs to know of one answered image: indices, no names.

    Attributes:
        group: Index of the predicted class's group.
        label: Index of the predicted class.
        confidence: Its calibrated probability.
        decision: What the group's threshold makes of that.
        set_size: How many classes the prediction set has.
    """

    group: int
    label: int
    confidence: float
    decision: Decision
    set_size: int


class ImageResult(NamedTuple):
    """What became of one image.

    Attributes:
        status: 0 for an answer, else the HTTP status of the problem.
        payload: The answer, or the problem's sentence.
        seen: The facts of an answer, of logits too; None for a problem and for logits that are no numbers.
    """

    status: int
    payload: bytes
    seen: PredictionFacts | None = None


class EngineResponse(NamedTuple):
    """A request's outcomes.

    Attributes:
        number: The request.
        decode_seconds: From its arrival in the engine process until its last image was decoded.
        queue_seconds: From there until its last batch began.
        infer_seconds: How long that batch ran.
        batch_size: How many images were in it; 0 if nothing ran.
        outcomes: One an image, in order; empty for a request that was cancelled.
    """

    number: int
    decode_seconds: float
    queue_seconds: float
    infer_seconds: float
    batch_size: int
    outcomes: list[ImageResult]


_WORK_KIND, _DONE_KIND = int(Kind.WORK), int(Kind.DONE)  # an enumeration costs a lookup, a number does not
_WANTED = {int(wanted): wanted for wanted in OutputKind}
_HEAD = struct.Struct("<IB")
_WORK = struct.Struct("<IBQdBIH")
_LENGTH = struct.Struct("<I")
_CANCEL = struct.Struct("<IBQ")
_DONE = struct.Struct("<IBQdddHH")
_OUTCOME = struct.Struct("<HHIdBII")
_NUMBER_OF_DECISION = {decision: number for number, decision in enumerate(DECISIONS, 1)}  # 0: no facts


def pack_request(work: EngineRequest) -> bytes:
    """A request as one buffer."""
    number, deadline, wanted, top_k, contents = work
    lengths = b"".join([_LENGTH.pack(len(content)) for content in contents])
    size = _WORK.size - 4 + len(lengths) + sum(map(len, contents))
    return b"".join((_WORK.pack(size, _WORK_KIND, number, deadline, wanted, top_k, len(contents)), lengths, *contents))


def unpack_request(message: memoryview) -> EngineRequest:
    """The request in a message."""
    _, _, number, deadline, wanted, top_k, num = _WORK.unpack_from(message)
    start = _WORK.size + 4 * num
    contents = []
    for length in struct.unpack_from(f"<{num}I", message, _WORK.size):
        contents.append(bytes(message[start : start + length]))
        start += length
    return EngineRequest(number, deadline, _WANTED[wanted], top_k, contents)


def pack_cancel(number: int) -> bytes:
    """Word that nobody waits for a request any more."""
    return _CANCEL.pack(_CANCEL.size - 4, Kind.CANCEL, number)


def unpack_cancel(message: memoryview) -> int:
    """The number of the request that is cancelled."""
    number: int = _CANCEL.unpack_from(message)[2]
    return number


def pack_text(kind: Kind, text: str) -> bytes:
    """A HELLO, FAILED or LOG message."""
    content = text.encode()
    return _HEAD.pack(1 + len(content), kind) + content


def unpack_text(message: memoryview) -> str:
    """The content of a HELLO, FAILED or LOG message."""
    return bytes(message[_HEAD.size :]).decode()


def pack_response(done: EngineResponse) -> bytes:
    """What became of a request, as one buffer."""
    *facts_of_all, outcomes = done
    parts = [b""]
    for status, payload, seen in outcomes:
        if seen is None:
            parts += (_OUTCOME.pack(status, 0, 0, 0.0, 0, 0, len(payload)), payload)
        else:
            group, label, confidence, decision, set_size = seen
            number = _NUMBER_OF_DECISION[decision]
            parts += (_OUTCOME.pack(status, group, label, confidence, number, set_size, len(payload)), payload)
    size = _DONE.size - 4 + sum(map(len, parts))
    parts[0] = _DONE.pack(size, _DONE_KIND, *facts_of_all, len(outcomes))
    return b"".join(parts)


def unpack_response(message: memoryview) -> EngineResponse:
    """What became of a request."""
    _, _, number, decode, queue, infer, batch_size, num = _DONE.unpack_from(message)
    start = _DONE.size
    outcomes = []
    for _ in range(num):
        status, group, label, confidence, decision, set_size, length = _OUTCOME.unpack_from(message, start)
        start += _OUTCOME.size
        seen = PredictionFacts(group, label, confidence, DECISIONS[decision - 1], set_size) if decision else None
        outcomes.append(ImageResult(status, bytes(message[start : start + length]), seen))
        start += length
    return EngineResponse(number, decode, queue, infer, batch_size, outcomes)


class MessageReader:
    """Messages out of a stream of bytes, many of them from one read where there is a backlog."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._missing = 0  # bytes until the message that has begun is whole

    def feed(self, data: bytes) -> Iterator[tuple[int, memoryview]]:
        """Take what was read; every message that is whole now, with its kind."""
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


def read_some(line: socket.socket, num_bytes: int = 2**18, *, wait: bool = True) -> bytes | None:
    """What has arrived: empty at the end of the stream; None if nothing has and ``wait`` is false."""
    try:
        return line.recv(num_bytes, 0 if wait else socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    except (ConnectionResetError, BrokenPipeError):
        return b""


def send_all(line: socket.socket, messages: Sequence[bytes]) -> None:
    """Send messages with as few calls as possible."""
    line.sendall(messages[0] if len(messages) == 1 else b"".join(messages))
