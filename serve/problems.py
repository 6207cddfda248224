"""What went wrong, as RFC 9457 problem details.

The status says which kind of problem it is, so ``type`` is ``about:blank`` and ``title`` the HTTP phrase:

    400  the request is malformed            415  not an image of a type that is read
    401  no key, or one that is not known    422  damaged, truncated or too many pixels
    404  no such path or model               429  too many requests in hand
    405  not this method                     500  a defect of the service
    408  the body took too long              503  not ready
    413  too many bytes                      504  no answer within the request's deadline

Nothing here knows of HTTP servers: the engine's process says what is wrong with an image in the same words.
"""

from collections.abc import Mapping
from functools import cached_property
from http import HTTPStatus

from pydantic import Field

from ltkd.contract.records import Record
from ltkd.errors import ImageError, ImageTypeError, LtkdError

MEDIA_TYPE = "application/problem+json"


class Problem(Record):
    """A problem as RFC 9457 has it.

    Attributes:
        detail: What was seen, what was expected and what to do.
        error: The same again, where clients of the Open Inference Protocol look for it.
    """

    type: str = "about:blank"
    title: str
    status: int = Field(ge=400, le=599)
    detail: str
    error: str

    @cached_property
    def body(self) -> bytes:
        """The problem in JSON, of type MEDIA_TYPE."""
        return self.model_dump_json().encode()


Content = bytes | Problem
"""The file of an image as it came, or what was wrong with it before anybody looked inside."""


class ProblemError(LtkdError):
    """A request that ends with a problem."""

    def __init__(self, problem: Problem, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.headers = headers


def problem_of(status: int, detail: str) -> Problem:
    """The problem that a status and a sentence make."""
    return Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, error=detail)


def image_problem(error: ImageError) -> Problem:
    """The problem of one image: 415 for bytes of no known type, 422 for an image that cannot be decoded."""
    return problem_of(415 if isinstance(error, ImageTypeError) else 422, str(error))
