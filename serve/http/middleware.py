"""Middleware around all routes: add response headers, count requests and turn errors into problems.

When a client disconnects, its request is cancelled, so that no work is done for it.
"""

import asyncio
import logging
from collections.abc import Mapping

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.service import CLIENT_CLOSED_REQUEST, RequestContext, Service
from serve.problems import MEDIA_TYPE, Problem, ProblemError, make_problem

_WRONG_HOST = make_problem(400, "a request has exactly one Host header; send the name of the service in it.")
_STOPPED = make_problem(503, "the service stopped before the request was answered; try again.")
_log = logging.getLogger(__name__)


class RequestMiddleware:
    """Adds response headers, counts requests and body bytes, and answers 500 without a stack trace."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        context = self._service.request_context(headers.get("x-request-id", ""), headers.get("traceparent", ""))
        state = scope.setdefault("state", {})
        state["context"] = context
        context.trace = state.get("trace", context.trace)  # serve/monitoring/tracing.py
        request = RequestScope(context, self._service, receive, send)
        try:
            if scope["http_version"] == "1.1" and len(headers.getlist("host")) != 1:
                await problem_response(_WRONG_HOST, {"Connection": "close"})(scope, receive, request.send)
            else:
                await self._app(scope, request.receive, request.send)
        except ClientDisconnect:
            request.status = CLIENT_CLOSED_REQUEST
        except asyncio.CancelledError:
            if not request.suppress_cancellation():
                if request.status or not self._service.stopping:
                    raise
                await problem_response(_STOPPED, {"Retry-After": "1"})(scope, receive, request.send)
        except Exception:
            _log.exception("request %s ended with an unexpected error", context.request_id)
            if not request.status:
                await internal_error(context)(scope, receive, request.send)
            elif not request.answered:
                raise  # part of the response has been sent; the server closes the connection
        finally:
            request.close()
            route = scope.get("route")  # set by the router
            self._service.count(context, getattr(route, "path", "none"), request.status)


class Shortcut:
    """Passes the requests of one route to its handler directly: FastAPI's layers around it take 0.1 ms.

    Args:
        app: Answers all other requests.
        router: Has the route.
    """

    def __init__(self, app: ASGIApp, router: APIRouter) -> None:
        (route,) = router.routes
        assert isinstance(route, APIRoute) and route.methods == {"POST"}
        self._app = app
        self._route = route
        self._handle = route.get_route_handler()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        route = self._route
        if scope["type"] != "http" or scope["path"] != route.path or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        request = Request(scope, receive)
        try:
            response = await self._handle(request)
        except ProblemError as error:
            response = await answer_problem(request, error)
        except RequestValidationError as error:
            response = await answer_validation(request, error)
        await response(scope, receive, send)


class RequestScope:
    """Wraps the ``receive`` and ``send`` channels of one ASGI request.

    Attributes:
        status: Status of the response once it has begun, else 0; CLIENT_CLOSED_REQUEST if the client disconnected.
        answered: Whether the response is complete.
    """

    def __init__(self, context: RequestContext, service: Service, receive: Receive, send: Send) -> None:
        self.status = 0
        self._context = context
        self._service = service
        self._receive = receive
        self._send = send
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None
        self.answered = False

    async def receive(self) -> Message:
        """Receive a message and count its bytes. After the whole body, start to watch for a disconnect."""
        message = await self._receive()
        if message["type"] == "http.request":
            if body := message.get("body"):
                self._context.hold(len(body))
            if not message.get("more_body") and not self._watcher:
                self._watcher = asyncio.create_task(self._cancel_on_disconnect())
        return message

    async def send(self, message: Message) -> None:
        """Send a message; add the headers that every response has."""
        self.answered = self.answered or not message.get("more_body", True)
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self._context.request_id
            if provider := self._service.provider():
                headers.setdefault("X-Ltkd-Provider", provider)
            if self._context.trace:
                headers["traceparent"] = self._context.trace.header
            if self._service.stopping:
                headers["Connection"] = "close"
        await self._send(message)

    def suppress_cancellation(self) -> bool:
        """Undo the cancellation of this task if the client's disconnect caused it; return whether it did."""
        if self.status != CLIENT_CLOSED_REQUEST or self._task is None:
            return False
        self._task.uncancel()
        return True

    def close(self) -> None:
        """Stop watching, and release the counted bytes."""
        if self._watcher:
            self._watcher.cancel()
            self._watcher = None  # its last frame refers to this object
        self._service.body_memory.release(self._context.held_bytes)

    async def _cancel_on_disconnect(self) -> None:
        await self._receive()  # after the body only http.disconnect follows, also when the response is complete
        if not self.answered and self._task:
            self.status = CLIENT_CLOSED_REQUEST
            self._task.cancel()


def problem_response(
    problem: Problem, headers: Mapping[str, str] | None = None, media_type: str = MEDIA_TYPE
) -> Response:
    """Build the HTTP response for a problem."""
    return Response(problem.model_dump_json(), problem.status, headers, media_type)


def validation_problem(error: RequestValidationError) -> Problem:
    """Build the problem for an invalid parameter."""
    first = error.errors()[0]
    where = " ".join(str(part) for part in first["loc"])
    return make_problem(400, f"{where} is {repr(first['input'])[:80]}: {first['msg']}.")


async def answer_problem(_: Request, error: ProblemError) -> Response:
    """Handle a ProblemError."""
    return problem_response(error.problem, error.headers)


def internal_error(context: RequestContext) -> Response:
    """Build the response for an unexpected exception."""
    where = f"the log of the service has the cause under request id {context.request_id}"
    return problem_response(make_problem(500, f"an internal error occurred; {where}."))


async def answer_error(request: Request, _: Exception) -> Response:
    """Handle an unexpected exception. FastAPI raises it again, and RequestMiddleware logs it."""
    return internal_error(request.state.context)


async def answer_http(request: Request, error: HTTPException) -> Response:
    """Handle errors of the framework itself, such as 404 and 405."""
    path, headers = request.url.path[:80], error.headers
    detail = {
        404: f"there is no path {path}; /openapi.json lists the available paths.",
        405: f"{path} does not allow {request.method}; it allows {(headers or {}).get('Allow', 'another method')}.",
    }.get(error.status_code, str(error.detail))
    return problem_response(make_problem(error.status_code, detail), headers)


async def answer_validation(_: Request, error: RequestValidationError) -> Response:
    """Handle an invalid parameter."""
    return problem_response(validation_problem(error))
