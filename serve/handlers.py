"""Problems as HTTP answers, whether a route, the framework or a parameter raised them."""

from collections.abc import Mapping

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from serve.problems import MEDIA_TYPE, Problem, ProblemError, problem_of


def problem_response(
    problem: Problem, headers: Mapping[str, str] | None = None, media_type: str = MEDIA_TYPE
) -> Response:
    """The HTTP answer that carries a problem."""
    return Response(problem.model_dump_json(), problem.status, headers, media_type)


def validation_problem(error: RequestValidationError) -> Problem:
    """The problem of a parameter that is not what the API describes."""
    first = error.errors()[0]
    where = " ".join(str(part) for part in first["loc"])
    return problem_of(400, f"{where} is {repr(first['input'])[:80]}: {first['msg']}.")


async def answer_problem(_: Request, error: ProblemError) -> Response:
    """Answer a request that ends with a problem."""
    return problem_response(error.problem, error.headers)


async def answer_http(request: Request, error: HTTPException) -> Response:
    """Answer what the framework refuses itself, such as 404 and 405."""
    path, headers = request.url.path[:80], error.headers
    detail = {
        404: f"there is no {path} here; /openapi.json lists what there is.",
        405: f"{path} does not take {request.method}, it takes {(headers or {}).get('Allow', 'another method')}.",
    }.get(error.status_code, str(error.detail))
    return problem_response(problem_of(error.status_code, detail), headers)


async def answer_validation(_: Request, error: RequestValidationError) -> Response:
    """Answer a parameter that is not what the API describes."""
    return problem_response(validation_problem(error))
