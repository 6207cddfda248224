"""What every answer of the framework carries, what is counted of it, and what a defect looks like from outside.

When a client leaves, its request is cancelled wherever it is, so nothing is computed for nobody.
"""

import asyncio
import logging
from collections.abc import Mapping

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.service import CLIENT_LEFT, RequestContext, Service
from serve.problems import MEDIA_TYPE, Problem, ProblemError, problem_of

_log = logging.getLogger(__name__)


class RequestMiddleware:
    """Middleware around every route: headers, counts, bytes in hand, and 500 without a stack trace."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        this = self._service.asked(headers.get("x-request-id", ""), headers.get("traceparent", ""))
        scope.setdefault("state", {})["asked"] = this
        letter = RequestScope(this, self._service, receive, send)
        try:
            await self._app(scope, letter.receive, letter.send)
        except ClientDisconnect:
            letter.status = CLIENT_LEFT
        except asyncio.CancelledError:
            if not letter.forget_cancellation():
                raise
        except Exception:
            _log.exception("request %s ended in a defect", this.request_id)
            if letter.status:  # half an answer is out; the server closes the connection
                raise
            detail = f"the service has a defect; its log has the cause under request {this.request_id}."
            await problem_response(problem_of(500, detail))(scope, receive, letter.send)
        finally:
            letter.close()
            self._service.count(this, getattr(scope.get("route"), "path", "none"), letter.status)


class RequestScope:
    """One request on its way through the framework.

    Attributes:
        status: Of the answer, once it has begun; CLIENT_LEFT if nobody reads it.
    """

    def __init__(self, this: RequestContext, service: Service, receive: Receive, send: Send) -> None:
        self.status = 0
        self._asked = this
        self._service = service
        self._receive = receive
        self._send = send
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None
        self._held_bytes = 0
        self._answered = False

    async def receive(self) -> Message:
        """What the client sends, counted; once that is all, its leaving is watched for."""
        message = await self._receive()
        num_bytes = len(message.get("body", b""))
        self._held_bytes += num_bytes
        self._service.hold_bytes(num_bytes)
        if message["type"] == "http.request" and not message.get("more_body") and not self._watcher:
            self._watcher = asyncio.create_task(self._watch())
        return message

    async def send(self, message: Message) -> None:
        """What the client gets, with the headers that every answer has."""
        self._answered = self._answered or not message.get("more_body", True)
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._asked.request_id
            if provider := self._service.provider():
                headers.setdefault("X-Ltkd-Provider", provider)
            if self._asked.trace:
                headers["traceparent"] = self._asked.trace.header
            if self._service.leaving:
                headers["Connection"] = "close"
        await self._send(message)

    def forget_cancellation(self) -> bool:
        """Whether the request was cancelled because its client left, which is nobody else's business."""
        if self.status != CLIENT_LEFT or self._task is None:
            return False
        self._task.uncancel()
        return True

    def close(self) -> None:
        """Let go of what was held."""
        if self._watcher:
            self._watcher.cancel()
            self._watcher = None  # its last frame has this letter
        self._service.hold_bytes(-self._held_bytes)

    async def _watch(self) -> None:
        await self._receive()  # after the body there is only one message: that the client left, or has its answer
        if not self._answered and self._task:
            self.status = CLIENT_LEFT
            self._task.cancel()


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
