"""Errors of the API as RFC 9457 problem details.

The HTTP status identifies the kind of problem, so ``type`` is ``about:blank`` and ``title`` is the status phrase:

    400  the request is malformed            415  the image type is not supported
    401  the API key is missing or invalid   422  the image is damaged, truncated or has too many pixels
    403  the key does not have the role      429  the queue is full, or the key has sent too many
    404  no such path or model               500  internal error
    405  the method is not allowed           503  the service is not ready
    408  the body arrived too slowly         504  no response within the request's deadline
    413  the body is too large

This module does not depend on an HTTP server, because the engine processes create the problems of images with it.
"""

from collections.abc import Mapping
from functools import cached_property
from http import HTTPStatus

from pydantic import Field

from ltkd.contract.records import Record
from ltkd.errors import ImageError, ImageTypeError, LtkdError

MEDIA_TYPE = "application/problem+json"


class Problem(Record):
    """One problem in the form of RFC 9457.

    Attributes:
        detail: What was seen, what was expected and what to do.
        error: The same text, in the field that clients of the Open Inference Protocol read.
    """

    type: str = "about:blank"
    title: str
    status: int = Field(ge=400, le=599)
    detail: str
    error: str

    @cached_property
    def body(self) -> bytes:
        """The problem as JSON; its media type is MEDIA_TYPE."""
        return self.model_dump_json().encode()


Content = bytes | Problem
"""The bytes of an image file, or the problem that was found before the file was decoded."""


class ProblemError(LtkdError):
    """Raised to answer a request with a problem."""

    def __init__(self, problem: Problem, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.headers = headers


def make_problem(status: int, detail: str) -> Problem:
    """A problem with this HTTP status and this detail."""
    return Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, error=detail)


def image_problem(error: ImageError) -> Problem:
    """The problem of one image: 415 if its type is not supported, 422 if it cannot be decoded."""
    return make_problem(415 if isinstance(error, ImageTypeError) else 422, str(error))
