"""Read request bodies, with limits on size and time, and extract images from raw, multipart and JSON bodies.

Bytes are counted while they arrive and again while they are decompressed. A body that is too large is therefore never
held in memory, even if its Content-Length is wrong or its compression ratio is high. The limits are enforced here and
not in the server, so that they hold under every ASGI server.
"""

import asyncio
import base64
import binascii
import zlib
from collections.abc import Callable, Sequence
from typing import Annotated, Protocol, TypeVar

from fastapi import Request
from pydantic import FailFast, Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ltkd.contract.records import Record
from serve.problems import Content, ProblemError, make_problem

MULTIPART, JSON, ANY_BYTES = "multipart/form-data", "application/json", "application/octet-stream"
BASE64 = "base64-image"  # the OpenAPI format of images in JSON
_SUPPORTED_TYPES = f"image/jpeg, image/png, image/webp, {ANY_BYTES}, {MULTIPART} and {JSON}"
_STEP_BYTES = 2**18
_MAX_RECORD_BYTES = 4096
_SMALL_BYTES = 2**16  # a body that is parsed within a millisecond
_GZIP_OR_ZLIB = zlib.MAX_WBITS + 32


AnyRecord = TypeVar("AnyRecord", bound=Record)
Parsed = TypeVar("Parsed")


class BodyLimits(Protocol):
    """The settings that limit request bodies."""

    @property
    def max_body_bytes(self) -> int:
        """Larger bodies are rejected while they arrive or while they are decompressed."""

    @property
    def max_images(self) -> int:
        """Maximum number of images per request."""

    @property
    def body_seconds(self) -> float:
        """A body must arrive within this time."""


class ImagesBody(Record):
    """A JSON body with images."""

    images: Annotated[tuple[str, ...], FailFast()] = Field(
        min_length=1,
        description="Files in base64 (RFC 4648, with padding)",
        json_schema_extra={"items": {"type": "string", "format": BASE64}},
    )


class BodyMemory:
    """Counts the bytes of request bodies in memory, of all requests together.

    Attributes:
        max_bytes: A request is rejected if more would be held.
        num_bytes: The bytes that are held now.
        parsing: Locked while a large body is parsed: parsing needs several times its size, so one is parsed at a time.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.parsing = asyncio.Lock()

    def hold(self, num_bytes: int, num_held: int) -> None:
        """Count more bytes of a request that holds ``num_held`` bytes with them.

        Requests with small bodies are not rejected: clients with large ones must not keep them out.

        Raises:
            ProblemError: 429, too many are held. They are counted all the same, until they are released.
        """
        self.num_bytes += num_bytes
        if self.num_bytes > self.max_bytes and num_held > _SMALL_BYTES:
            detail = f"the request bodies in memory have reached the limit of {self.max_bytes:,} bytes; try again."
            raise ProblemError(make_problem(429, detail), {"Retry-After": "1"})

    def release(self, num_bytes: int) -> None:
        """Count bytes as released."""
        self.num_bytes -= num_bytes


async def read_images(request: Request, limits: BodyLimits) -> list[Content]:
    """Read the images of a request, in order. An image in JSON that is not base64 becomes a Problem in its place.

    Raises:
        ProblemError: The body is too large, too slow or malformed, or its type is not supported.
    """
    content_type = request.headers.get("content-type", ANY_BYTES)
    media_type = content_type.partition(";")[0].strip().lower() or ANY_BYTES
    if media_type not in (MULTIPART, JSON, ANY_BYTES) and not media_type.startswith("image/"):
        detail = f"the Content-Type is {_shortened(media_type)}, expected one of {_SUPPORTED_TYPES}."
        raise ProblemError(make_problem(415, f"{detail} With curl: -H 'Content-Type: image/jpeg' --data-binary @FILE"))
    body = await read_body(request, limits)
    if media_type == MULTIPART:
        return await parsed(request, body, lambda: form_files(content_type, body, limits.max_images))
    if media_type == JSON:
        _check_size_of_list(body, limits.max_images)
        return await parsed(request, body, lambda: json_images(body, limits.max_images))
    return [body]


async def read_record(request: Request, kind: type[AnyRecord], limits: BodyLimits) -> AnyRecord:
    """Read a small JSON body.

    A route calls this instead of declaring the body to FastAPI, which would read it before the API key is checked, and
    without a limit on its size.

    Raises:
        ProblemError: 400 malformed, 408 too slow, 413 larger than 4 KiB.
    """
    body = await read_body(request, limits, _MAX_RECORD_BYTES)
    return _record(kind, body, f"a JSON object with the fields {', '.join(kind.model_fields)}")


async def read_body(request: Request, limits: BodyLimits, max_bytes: int | None = None) -> bytes:
    """Read a whole body and decompress it.

    Args:
        request: The request.
        limits: The limits on size and time.
        max_bytes: Another limit on the size.

    Raises:
        ProblemError: 408 too slow, 413 too large, 429 too many bytes of all requests are in memory, 400 or 415 it
            cannot be decompressed.
    """
    max_bytes = max_bytes or limits.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise _too_large(max_bytes)
                chunks.append(chunk)
    except TimeoutError:
        waited = f"the body did not arrive within {limits.body_seconds:g} s"
        detail = f"{waited}; send a smaller body or use a faster connection."
        raise ProblemError(make_problem(408, detail), {"Connection": "close"}) from None
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        chunks = await _decompressed(request, chunks, encoding, max_bytes)
    return b"".join(chunks)


async def parsed(request: Request, body: bytes, parse: Callable[[], Parsed]) -> Parsed:
    """Parse a body: a large one in another thread, and only one of these at a time."""
    if len(body) <= _SMALL_BYTES:
        return parse()
    async with request.state.context.memory.parsing:
        return await asyncio.to_thread(parse)


async def _decompressed(request: Request, chunks: Sequence[bytes], encoding: str, max_bytes: int) -> list[bytes]:
    """Undo the ``Content-Encoding`` gzip or deflate, in small steps.

    Raises:
        ProblemError: The encoding is not supported, or the data is damaged or larger than ``max_bytes``.
    """
    if encoding not in ("gzip", "x-gzip", "deflate"):
        detail = f"the Content-Encoding is {_shortened(encoding)}, expected gzip, deflate or none."
        raise ProblemError(make_problem(415, detail), {"Accept-Encoding": "gzip, deflate"})
    decompressor = zlib.decompressobj(_GZIP_OR_ZLIB)
    pieces: list[bytes] = []
    num_bytes = 0
    for chunk in chunks:
        rest = chunk
        while rest and not decompressor.eof:
            try:
                piece = decompressor.decompress(rest, _STEP_BYTES)
            except zlib.error as reason:
                detail = f"the body is not valid {encoding} data ({reason}); compress it again and send all of it."
                raise ProblemError(make_problem(400, detail)) from None
            rest = decompressor.unconsumed_tail
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                raise _too_large(max_bytes, " after decompression")
            request.state.context.hold(len(piece))
            pieces.append(piece)
            await asyncio.sleep(0)  # let other requests run between two steps
        if rest or decompressor.unused_data:
            detail = f"there are bytes after the end of the {encoding} stream; send exactly one stream."
            raise ProblemError(make_problem(400, detail))
    if not decompressor.eof:
        raise ProblemError(make_problem(400, f"the {encoding} stream is incomplete; send all of it."))
    return pieces


def _check_size_of_list(body: bytes, max_images: int) -> None:
    """Reject a JSON body with more values than images are allowed, before it is parsed.

    Parsing needs some hundred bytes of memory per value, so that millions of tiny ones would fill it. Base64 contains
    no commas; a data URL, which is rejected later, has one.

    Raises:
        ProblemError: 400, there are too many values.
    """
    if body.count(b",") > 2 * max_images:
        raise ProblemError(make_problem(400, too_many_images(max_images)))


def json_images(body: bytes, max_images: int) -> list[Content]:
    """Extract the images of a JSON body.

    Raises:
        ProblemError: The body is not JSON of the expected form, or has too many images.
    """
    images = _record(ImagesBody, body, '{"images": ["<base64>", ...]}').images
    if len(images) > max_images:
        raise ProblemError(make_problem(400, too_many_images(max_images)))
    return [base64_bytes(text) for text in images]


def _record(kind: type[AnyRecord], body: bytes, expected: str) -> AnyRecord:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        detail = f"{_shortened(where)}: {first['msg']}; expected {expected}."
        raise ProblemError(make_problem(400, detail)) from None


def base64_bytes(text: str) -> Content:
    """Decode strict base64, or return the problem with it."""
    if text.startswith("data:"):
        return make_problem(400, "the image is a data URL, expected only base64; send the part after the comma.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as reason:
        return make_problem(400, f"the image is not base64 ({reason}); use the standard alphabet with padding.")


def _too_large(max_bytes: int, when: str = "") -> ProblemError:
    advice = "send a smaller one."
    return ProblemError(make_problem(413, f"the body is larger than {max_bytes:,} bytes{when}; {advice}"))


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


WITH_CURL = "with curl: -F image=@FILE"


def form_files(content_type: str, body: bytes, max_files: int) -> list[Content]:
    """Extract the files of a multipart form, in order.

    Args:
        content_type: The Content-Type header, which has the boundary.
        body: The whole body.
        max_files: A form with more files is rejected.

    Raises:
        ProblemError: The form is malformed, has no file, too many files or a field that is not a file.
    """
    form = _Form(max_files)
    try:
        boundary = parse_options_header(content_type.encode("latin-1"))[1].get(b"boundary", b"")
        if not boundary:
            raise ProblemError(make_problem(400, f"the form's Content-Type has no boundary parameter; {WITH_CURL}"))
        callbacks = {name: getattr(form, name) for name in dir(form) if name.startswith("on_")}
        parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type] # a plain dict of its callbacks
        parser.write(body)
    except FormParserError as reason:
        raise ProblemError(make_problem(400, f"the form is malformed: {str(reason)[:120]}; {WITH_CURL}")) from None
    if not form.ended:
        raise ProblemError(make_problem(400, "the form ends before its last boundary; send all of it."))
    if not form.files:
        raise ProblemError(make_problem(400, f"the form has no file; {WITH_CURL}"))
    return form.files


def too_many_images(max_images: int) -> str:
    """The error text for a request with too many images."""
    return f"the request has more than {max_images} images; send them in several requests."


class _Form:
    """Callbacks for the multipart parser; collects the files."""

    def __init__(self, max_files: int) -> None:
        self.files: list[Content] = []
        self.ended = False
        self._max_files = max_files
        self._name = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._chunks: list[bytes] = []

    def on_part_begin(self) -> None:
        self._disposition = b""
        self._chunks = []

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise FormParserError("a part has no name in its Content-Disposition")
        if b"filename" not in options:
            detail = f"the form has a field that is not a file; send only files, {WITH_CURL}"
            raise ProblemError(make_problem(400, detail))
        if len(self.files) >= self._max_files:
            raise ProblemError(make_problem(400, too_many_images(self._max_files)))

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._chunks.append(data[start:end])

    def on_part_end(self) -> None:
        self.files.append(b"".join(self._chunks))

    def on_end(self) -> None:
        self.ended = True
