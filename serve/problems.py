"""What went wrong, as RFC 9457 problem details.

The status says which kind of problem it is, so ``type`` is ``about:blank`` and ``title`` the HTTP phrase:

    400  the request is malformed            415  not an image of a type that is read
    404  no such path                        422  damaged, truncated or too many pixels
    405  not this method                     429  too many requests in hand
    408  the body took too long              500  a defect of the service
    413  too many bytes                      503  not ready
"""

from collections.abc import Mapping
from http import HTTPStatus

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import Field
from starlette.exceptions import HTTPException

from ltkd.errors import ImageError, ImageTypeError, LtkdError
from ltkd.records import Record

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


def problem_response(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """The HTTP answer that carries a problem."""
    return Response(problem.model_dump_json(), problem.status, headers, MEDIA_TYPE)


async def answer_problem(_: Request, error: ProblemError) -> Response:
    """Answer a request that ends with a problem."""
    return problem_response(error.problem, error.headers)


async def answer_http(request: Request, error: HTTPException) -> Response:
    """Answer what the framework refuses itself, such as 404 and 405."""
    path, headers = request.url.path, error.headers
    detail = {
        404: f"there is no {path} here; /openapi.json lists what there is.",
        405: f"{path} does not take {request.method}, it takes {(headers or {}).get('Allow', 'another method')}.",
    }.get(error.status_code, str(error.detail))
    return problem_response(problem_of(error.status_code, detail), headers)


async def answer_validation(_: Request, error: RequestValidationError) -> Response:
    """Answer a parameter that is not what the API describes."""
    first = error.errors()[0]
    where = " ".join(str(part) for part in first["loc"])
    return problem_response(problem_of(400, f"{where} is {first['input']!r}: {first['msg']}."))
