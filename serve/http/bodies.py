"""Read request bodies, with limits on size and time, and extract images from raw, multipart and JSON bodies.

Bytes are counted while they arrive and again while they are decompressed. A body that is too large is therefore never
held in memory, even if its Content-Length is wrong or its compression ratio is high.
"""

import asyncio
import base64
import binascii
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Protocol, TypeVar

from fastapi import Request
from pydantic import Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ltkd.contract.records import Record
from serve.problems import Content, ProblemError, make_problem

MULTIPART, JSON, ANY_BYTES = "multipart/form-data", "application/json", "application/octet-stream"
BASE64 = "base64-image"  # the OpenAPI format of images in JSON
_SUPPORTED_TYPES = f"image/jpeg, image/png, image/webp, {ANY_BYTES}, {MULTIPART} and {JSON}"
_STEP_BYTES = 2**18
_MAX_RECORD_BYTES = 4096
_GZIP_OR_ZLIB = zlib.MAX_WBITS + 32


AnyRecord = TypeVar("AnyRecord", bound=Record)


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

    images: tuple[str, ...] = Field(
        min_length=1,
        description="Files in base64 (RFC 4648, with padding)",
        json_schema_extra={"items": {"type": "string", "format": BASE64}},
    )


async def read_images(request: Request, limits: BodyLimits) -> list[Content]:
    """Read the images of a request, in order. An image in JSON that is not base64 becomes a Problem in its place.

    Raises:
        ProblemError: The body is too large, too slow or malformed, or its type is not supported.
    """
    media_type = media_type_of(request)
    if media_type not in (MULTIPART, JSON, ANY_BYTES) and not media_type.startswith("image/"):
        detail = f"the Content-Type is {_shortened(media_type)}, expected one of {_SUPPORTED_TYPES}."
        raise ProblemError(make_problem(415, f"{detail} With curl: -H 'Content-Type: image/jpeg' --data-binary @FILE"))
    async with decoded_chunks(request, limits) as body:
        if media_type == MULTIPART:
            contents: list[Content] = [*await form_files(request.headers["content-type"], body, limits.max_images)]
        else:
            whole = b"".join([chunk async for chunk in body])
            contents = [whole]
            if media_type == JSON:
                _check_size_of_list(whole, limits.max_images)
                contents = await asyncio.to_thread(json_images, whole)
    if len(contents) > limits.max_images:
        raise ProblemError(make_problem(400, too_many_images(limits.max_images)))
    return contents


async def read_record(request: Request, kind: type[AnyRecord], limits: BodyLimits) -> AnyRecord:
    """Read a small JSON body.

    A route calls this instead of declaring the body to FastAPI, which would read it before the API key is checked, and
    without a limit on its size.

    Raises:
        ProblemError: 400 malformed, 408 too slow, 413 larger than 4 KiB.
    """
    async with decoded_chunks(request, limits, _MAX_RECORD_BYTES) as body:
        whole = b"".join([chunk async for chunk in body])
    return _parsed(kind, whole, f"a JSON object with the fields {', '.join(kind.model_fields)}")


async def read_whole(request: Request, limits: BodyLimits) -> bytes:
    """Read a whole body and decompress it.

    Raises:
        ProblemError: The body is too large, too slow or cannot be decompressed.
    """
    async with decoded_chunks(request, limits) as body:
        return b"".join([chunk async for chunk in body])


def media_type_of(request: Request) -> str:
    """The media type of a body without its parameters; ``application/octet-stream`` if the request has none."""
    return request.headers.get("content-type", ANY_BYTES).partition(";")[0].strip().lower() or ANY_BYTES


@asynccontextmanager
async def decoded_chunks(
    request: Request, limits: BodyLimits, max_bytes: int | None = None
) -> AsyncGenerator[AsyncIterator[bytes], None]:
    """Give the decompressed chunks of a body, and enforce the limits on time and size (``max_bytes``, if given).

    Raises:
        ProblemError: The body is too large, too slow or cannot be decompressed.
    """
    max_bytes = max_bytes or limits.max_body_bytes
    try:
        async with (
            asyncio.timeout(limits.body_seconds),
            aclosing(limited(request, max_bytes)) as chunks,
            aclosing(decompressed(chunks, request.headers.get("content-encoding", ""), max_bytes)) as body,
        ):
            yield body
    except TimeoutError:
        detail = (
            f"the body did not arrive within {limits.body_seconds:g} s; send a smaller body or use a faster connection."
        )
        raise ProblemError(make_problem(408, detail), {"Connection": "close"}) from None


async def limited(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """Give the chunks of a body as they arrive.

    Raises:
        ProblemError: The body, or its Content-Length, is larger than ``max_bytes``.
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


async def decompressed(chunks: AsyncIterator[bytes], encoding: str, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """Undo the ``Content-Encoding`` gzip or deflate, in small steps.

    Raises:
        ProblemError: The encoding is not supported, or the data is damaged or larger than ``max_bytes``.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        async for chunk in chunks:
            yield chunk
        return
    if encoding not in ("gzip", "x-gzip", "deflate"):
        detail = f"the Content-Encoding is {_shortened(encoding)}, expected gzip, deflate or none."
        raise ProblemError(make_problem(415, detail), {"Accept-Encoding": "gzip, deflate"})
    decompressor = zlib.decompressobj(_GZIP_OR_ZLIB)
    num_bytes = 0
    async for chunk in chunks:
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
            yield piece
            await asyncio.sleep(0)  # let other requests run between two steps
        if rest or decompressor.unused_data:
            detail = f"there are bytes after the end of the {encoding} stream; send exactly one stream."
            raise ProblemError(make_problem(400, detail))
    if not decompressor.eof:
        raise ProblemError(make_problem(400, f"the {encoding} stream is incomplete; send all of it."))


def _check_size_of_list(body: bytes, max_images: int) -> None:
    """Reject a JSON body with more values than images are allowed, before it is parsed.

    Parsing needs some hundred bytes of memory per value, so that millions of tiny ones would fill it. Base64 contains
    no commas; a data URL, which is rejected later, has one.

    Raises:
        ProblemError: 400, there are too many values.
    """
    if body.count(b",") > 2 * max_images:
        raise ProblemError(make_problem(400, too_many_images(max_images)))


def json_images(body: bytes) -> list[Content]:
    """Extract the images of a JSON body.

    Raises:
        ProblemError: The body is not JSON of the expected form.
    """
    parsed = _parsed(ImagesBody, body, '{"images": ["<base64>", ...]}')
    return [base64_bytes(text) for text in parsed.images]


def _parsed(kind: type[AnyRecord], body: bytes, expected: str) -> AnyRecord:
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
    advice = "send a smaller one, for example with fewer or smaller images."
    return ProblemError(make_problem(413, f"the body is larger than {max_bytes:,} bytes{when}; {advice}"))


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


WITH_CURL = "with curl: -F image=@FILE"


async def form_files(content_type: str, body: AsyncIterator[bytes], max_files: int) -> list[bytes]:
    """Extract the files of a multipart form, in order.

    Args:
        content_type: The Content-Type header, which has the boundary.
        body: The chunks of the body; the caller limits their size.
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
        async for chunk in body:
            parser.write(chunk)
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
