"""Request bodies: bytes with a bound and a deadline, and the three forms in which images come.

Bytes are counted as they arrive and again as they are unpacked, so a body that is too large is never held, whatever its
Content-Length says and however well it was compressed.
"""

import asyncio
import base64
import binascii
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Protocol

from fastapi import Request
from pydantic import Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ltkd.contract.records import Record
from serve.problems import Content, ProblemError, problem_of

MULTIPART, JSON, ANY_BYTES = "multipart/form-data", "application/json", "application/octet-stream"
BASE64 = "base64-image"  # the format that the description of the API gives to images in JSON
_TAKEN = f"image/jpeg, image/png, image/webp, {ANY_BYTES}, {MULTIPART} and {JSON}"
_STEP_BYTES = 2**18
_GZIP_OR_ZLIB = zlib.MAX_WBITS + 32


class BodyLimits(Protocol):
    """What the settings say of request bodies."""

    @property
    def max_body_bytes(self) -> int:
        """Larger bodies are refused while they arrive, compressed ones while they are unpacked."""

    @property
    def max_images(self) -> int:
        """Images in one request."""

    @property
    def body_seconds(self) -> float:
        """A body must have arrived within this time."""


class ImagesBody(Record):
    """Images in JSON."""

    images: tuple[str, ...] = Field(
        min_length=1,
        description="Files in base64 (RFC 4648, with padding)",
        json_schema_extra={"items": {"type": "string", "format": BASE64}},
    )


async def read_images(request: Request, limits: BodyLimits) -> list[Content]:
    """The images of a request, in order; one that cannot be read is a problem in its own place.

    Raises:
        ProblemError: The body is too large, too slow, malformed, empty or of another type.
    """
    media_type = media_type_of(request)
    if media_type not in (MULTIPART, JSON, ANY_BYTES) and not media_type.startswith("image/"):
        detail = f"the Content-Type is {_shortened(media_type)}, expected one of {_TAKEN}."
        raise ProblemError(problem_of(415, f"{detail} With curl: -H 'Content-Type: image/jpeg' --data-binary @FILE"))
    async with arriving(request, limits) as body:
        if media_type == MULTIPART:
            contents: list[Content] = [*await form_files(request.headers["content-type"], body, limits.max_images)]
        else:
            whole = b"".join([chunk async for chunk in body])
            contents = await asyncio.to_thread(json_images, whole) if media_type == JSON else [whole]
    if len(contents) > limits.max_images:
        raise ProblemError(problem_of(400, too_many_images(limits.max_images)))
    return contents


async def read_whole(request: Request, limits: BodyLimits) -> bytes:
    """A body as one piece, unpacked.

    Raises:
        ProblemError: The body is too large, too slow or cannot be unpacked.
    """
    async with arriving(request, limits) as body:
        return b"".join([chunk async for chunk in body])


def media_type_of(request: Request) -> str:
    """The type of a body, without its parameters; bytes of any kind where nothing is said."""
    return request.headers.get("content-type", ANY_BYTES).partition(";")[0].strip().lower() or ANY_BYTES


@asynccontextmanager
async def arriving(request: Request, limits: BodyLimits) -> AsyncGenerator[AsyncIterator[bytes], None]:
    """The chunks of a body, counted and unpacked, for as long as it may take to arrive.

    Raises:
        ProblemError: The body is too large, too slow or cannot be unpacked.
    """
    try:
        async with (
            asyncio.timeout(limits.body_seconds),
            aclosing(counted(request, limits.max_body_bytes)) as chunks,
            aclosing(unpacked(chunks, request.headers.get("content-encoding", ""), limits.max_body_bytes)) as body,
        ):
            yield body
    except TimeoutError:
        detail = f"the body did not arrive within {limits.body_seconds:g} s; send less, or over a faster line."
        raise ProblemError(problem_of(408, detail), {"Connection": "close"}) from None


async def counted(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body in chunks, cut off when there is more of it than allowed.

    Raises:
        ProblemError: The body is, or says that it is, larger than ``max_bytes``.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    num_bytes = 0
    async with aclosing(request.stream()) as stream:
        async for chunk in stream:
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise _too_large(max_bytes)
            yield chunk


async def unpacked(chunks: AsyncIterator[bytes], encoding: str, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """Chunks as they were before ``Content-Encoding``: gzip and deflate are undone, in steps that stay small.

    Raises:
        ProblemError: They are packed in another way, damaged, or become more than ``max_bytes``.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        async for chunk in chunks:
            yield chunk
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        detail = f"the Content-Encoding is {_shortened(encoding)}, expected gzip, deflate or none."
        raise ProblemError(problem_of(415, detail), {"Accept-Encoding": "gzip, deflate"})
    unpacker = zlib.decompressobj(_GZIP_OR_ZLIB)
    num_bytes = 0
    async for chunk in chunks:
        rest = chunk
        while rest and not unpacker.eof:
            try:
                piece = unpacker.decompress(rest, _STEP_BYTES)
            except zlib.error as reason:
                raise ProblemError(problem_of(400, f"the body is not {encoding} ({reason}); send it whole.")) from None
            rest = unpacker.unconsumed_tail
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                raise _too_large(max_bytes, " when unpacked")
            yield piece
            await asyncio.sleep(0)  # other requests get their turn between two steps
        if rest or unpacker.unused_data:
            raise ProblemError(problem_of(400, f"bytes follow the end of the {encoding} body; send one stream."))
    if not unpacker.eof:
        raise ProblemError(problem_of(400, f"the {encoding} body ends too early; send it whole."))


def json_images(body: bytes) -> list[Content]:
    """The images of a JSON body.

    Raises:
        ProblemError: The body is not JSON of the expected form.
    """
    try:
        parsed = ImagesBody.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        detail = f'{_shortened(where)}: {first["msg"]}; expected {{"images": ["<base64>", ...]}}.'
        raise ProblemError(problem_of(400, detail)) from None
    return [base64_bytes(text) for text in parsed.images]


def base64_bytes(text: str) -> Content:
    """The bytes behind strict base64, or what is wrong with it."""
    if text.startswith("data:"):
        return problem_of(400, "the image is a data URL, expected base64 alone; send what follows its comma.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as reason:
        return problem_of(400, f"the image is not base64 ({reason}); use the standard alphabet with padding.")


def _too_large(max_bytes: int, when: str = "") -> ProblemError:
    return ProblemError(problem_of(413, f"the body is larger than {max_bytes:,} bytes{when}; send fewer or less."))


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


WITH_CURL = "with curl: -F image=@FILE"


async def form_files(content_type: str, body: AsyncIterator[bytes], max_files: int) -> list[bytes]:
    """The files of a form, in order.

    Args:
        content_type: The header that names the boundary.
        body: What arrives; its bytes are counted elsewhere.
        max_files: A form with more is refused.

    Raises:
        ProblemError: The form is malformed, has no file, too many of them, or something else than files.
    """
    form = _Form(max_files)
    try:
        boundary = parse_options_header(content_type.encode("latin-1"))[1].get(b"boundary", b"")
        if not boundary:
            raise ProblemError(problem_of(400, f"the form's Content-Type names no boundary; {WITH_CURL}"))
        callbacks = {name: getattr(form, name) for name in dir(form) if name.startswith("on_")}
        parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type] # they are those that it knows
        async for chunk in body:
            parser.write(chunk)
    except FormParserError as reason:
        raise ProblemError(problem_of(400, f"the form is malformed: {str(reason)[:120]}; {WITH_CURL}")) from None
    if not form.ended:
        raise ProblemError(problem_of(400, "the form ends before its last boundary; send it whole."))
    if not form.files:
        raise ProblemError(problem_of(400, f"the form has no file; {WITH_CURL}"))
    return form.files


def too_many_images(max_images: int) -> str:
    """The sentence for a request with more images than are taken."""
    return f"the request has more than {max_images} images; send them in several requests."


class _Form:
    """What the parser tells of, part by part."""

    def __init__(self, max_files: int) -> None:
        self.files: list[bytes] = []
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
            detail = f"the form has a field that is no file; send files alone, {WITH_CURL}"
            raise ProblemError(problem_of(400, detail))
        if len(self.files) >= self._max_files:
            raise ProblemError(problem_of(400, too_many_images(self._max_files)))

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._chunks.append(data[start:end])

    def on_part_end(self) -> None:
        self.files.append(b"".join(self._chunks))

    def on_end(self) -> None:
        self.ended = True
