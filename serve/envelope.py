"""What every answer carries: a request id and the active provider; and what a defect looks like from outside."""

import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.problems import problem_of, problem_response
from serve.telemetry import Telemetry

CLIENT_LEFT = 499  # nginx's number, for the metrics alone: nobody reads an answer
_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_log = logging.getLogger(__name__)


class Envelope:
    """Middleware around every route: headers, the request count, and 500 without a stack trace."""

    def __init__(self, app: ASGIApp, provider: str, telemetry: Telemetry) -> None:
        self._app = app
        self._provider = provider
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(Headers(scope=scope).get("x-request-id", ""))
        status = 0

        async def send_in_envelope(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = request_id
                headers["X-Ltkd-Provider"] = self._provider
            await send(message)

        try:
            await self._app(scope, receive, send_in_envelope)
        except ClientDisconnect:
            status = CLIENT_LEFT
        except Exception:
            _log.exception("request %s ended in a defect", request_id)
            if status:  # half an answer is out; the server closes the connection
                raise
            detail = f"the service has a defect; its log has the cause under request {request_id}."
            await problem_response(problem_of(500, detail))(scope, receive, send_in_envelope)
        finally:
            self._telemetry.count_request(getattr(scope.get("route"), "path", "none"), status)


def request_id_of(incoming: str) -> str:
    """The caller's request id where it is short and plain, else a new one."""
    return incoming if _SANE_ID.fullmatch(incoming) else uuid.uuid4().hex
