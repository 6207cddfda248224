"""The three forms of a request body: the bytes of one image, a multipart form with files, JSON with base64.

Bytes are counted as they arrive, so a body that is too large is never held, whatever its Content-Length says.
"""

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Request
from pydantic import Field, ValidationError
from starlette.formparsers import MultiPartException, MultiPartParser

from ltkd.records import Record
from serve.classifier import Content
from serve.problems import Problem, ProblemError, problem_of
from serve.settings import Settings

MULTIPART, JSON, ANY_BYTES = "multipart/form-data", "application/json", "application/octet-stream"
_TAKEN = f"image/jpeg, image/png, image/webp, {ANY_BYTES}, {MULTIPART} and {JSON}"


class ImagesBody(Record):
    """Images in JSON."""

    images: tuple[str, ...] = Field(min_length=1, description="Files in base64 (RFC 4648, with padding)")


async def read_images(request: Request, settings: Settings) -> list[Content]:
    """The images of a request, in order; one that cannot be read is a problem in its own place.

    Raises:
        ProblemError: The body is too large, too slow, malformed, empty or of another type.
    """
    media_type = request.headers.get("content-type", ANY_BYTES).partition(";")[0].strip().lower()
    if media_type not in (MULTIPART, JSON, ANY_BYTES) and not media_type.startswith("image/"):
        detail = f"the Content-Type is {media_type}, expected one of {_TAKEN}."
        raise ProblemError(problem_of(415, f"{detail} With curl: -H 'Content-Type: image/jpeg' --data-binary @FILE"))
    try:
        async with asyncio.timeout(settings.body_seconds), aclosing(counted(request, settings.max_body_bytes)) as body:
            if media_type == MULTIPART:
                contents = await _form_files(request, body, settings)
            else:
                whole = b"".join([chunk async for chunk in body])
                contents = await asyncio.to_thread(json_images, whole) if media_type == JSON else [whole]
    except TimeoutError:
        detail = f"the body did not arrive within {settings.body_seconds:g} s; send less, or over a faster line."
        raise ProblemError(problem_of(408, detail), {"Connection": "close"}) from None
    if len(contents) > settings.max_images:
        raise ProblemError(problem_of(400, _too_many(settings.max_images)))
    return contents


async def counted(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body in chunks, cut off when there is more of it than allowed.

    Raises:
        ProblemError: The body is, or says that it is, larger than ``max_bytes``.
    """
    too_large = ProblemError(problem_of(413, f"the body is larger than {max_bytes:,} bytes; send fewer or less."))
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    num_bytes = 0
    async with aclosing(request.stream()) as stream:
        async for chunk in stream:
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise too_large
            yield chunk


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
        detail = f'{where}: {first["msg"]}; expected {{"images": ["<base64>", ...]}}.'
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


async def _form_files(request: Request, body: AsyncGenerator[bytes, None], settings: Settings) -> list[Content]:
    parser = MultiPartParser(request.headers, body, max_files=settings.max_images, max_fields=0)
    parser.spool_max_size = settings.max_body_bytes + 1  # stay in memory: a read-only container has no place for files
    try:
        form = await parser.parse()
    except MultiPartException as reason:
        raise ProblemError(_form_problem(reason, settings.max_images)) from None
    contents: list[Content] = []
    for _, upload in form.multi_items():
        assert not isinstance(upload, str)  # fields without a file are refused by max_fields
        contents.append(await upload.read())
    await form.close()
    if not contents:
        raise ProblemError(problem_of(400, "the form has no file; with curl: -F image=@FILE"))
    return contents


def _form_problem(reason: MultiPartException, max_images: int) -> Problem:
    if "Too many files" in reason.message:
        return problem_of(400, _too_many(max_images))
    if "Too many fields" in reason.message:
        return problem_of(400, "the form has a field that is no file; send files alone, with curl: -F image=@FILE")
    return problem_of(400, f"the form is malformed: {reason.message}")


def _too_many(max_images: int) -> str:
    return f"the request has more than {max_images} images; send them in several requests."
