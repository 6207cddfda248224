"""Traces of requests with OpenTelemetry: the extra ``ltkd[otel]``, used if the environment asks for traces.

OpenTelemetry's standard variables configure it, such as ``OTEL_EXPORTER_OTLP_ENDPOINT`` and ``OTEL_SERVICE_NAME``.
"""

import atexit
import importlib.util
import logging
import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ltkd.errors import UsageError
from serve.monitoring.logs import Trace

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_POLLED = r"/(livez|readyz|metrics|v2/health/(live|ready))$"
_FLUSH_SECONDS = 1.0  # a collector that does not answer must not delay the end of the process for long

_log = logging.getLogger(__name__)


def traces_requested(environment: Mapping[str, str]) -> bool:
    """Whether the standard variables ask for traces."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = environment.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    return exporter != "none" if exporter else any(environment.get(name) for name in _ENDPOINTS)


def with_tracing(app: ASGIApp, provider: "TracerProvider | None" = None) -> ASGIApp:
    """Trace the requests of an application, except health checks and metrics, if the environment asks for it.

    Args:
        app: An application with all its other middleware.
        provider: Where spans go, whatever the environment says; by default to an OTLP collector over HTTP.
    """
    if provider is None:
        if not traces_requested(os.environ):
            return app
        if importlib.util.find_spec("opentelemetry.instrumentation") is None:
            _log.warning("the environment asks for traces, but OpenTelemetry is missing; install ltkd[otel].")
            return app
        try:
            provider = _otlp_provider()
        except Exception as reason:  # its packages raise many kinds for invalid variables
            raise UsageError(f"OpenTelemetry cannot be set up ({reason}); correct its OTEL_ variables.") from None
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware  # noqa: PLC0415 - optional and slow

    traced: ASGIApp = OpenTelemetryMiddleware(
        SpanMiddleware(app),
        tracer_provider=provider,
        excluded_urls=_POLLED,
        exclude_spans=["receive", "send"],  # a span for every chunk of a body
        default_span_details=lambda scope: (scope["method"], {}),
    )
    return traced


def _otlp_provider() -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    resource = Resource.create()
    if str(resource.attributes["service.name"]).startswith("unknown_service"):  # the variables do not name it
        resource = resource.merge(Resource({"service.name": "ltkd"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    processor = BatchSpanProcessor(OTLPSpanExporter())
    provider.add_span_processor(processor)
    _send_the_rest_at_exit(processor)
    return provider


def _send_the_rest_at_exit(processor: "BatchSpanProcessor") -> None:
    """Send the last spans when the process ends, for a limited time. The thread is started now: then it is too late."""
    ending, sent = threading.Event(), threading.Event()

    def send() -> None:
        ending.wait()
        processor.shutdown()  # type: ignore[no-untyped-call]
        sent.set()

    threading.Thread(target=send, name="send-spans", daemon=True).start()
    atexit.register(sent.wait, _FLUSH_SECONDS)
    atexit.register(ending.set)  # called first


class SpanMiddleware:
    """Gives the span of a request the route as its name, and the request the ids of the span.

    ``serve.http.middleware`` finds them as ``trace`` in the state of the request, logs and returns them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        from opentelemetry.trace import get_current_span  # noqa: PLC0415 - optional

        span = get_current_span()
        ids = span.get_span_context()
        if scope["type"] != "http" or not ids.is_valid:
            await self._app(scope, receive, send)
            return
        state: dict[str, Any] = scope.setdefault("state", {})
        state["trace"] = Trace(f"{ids.trace_id:032x}", f"{ids.span_id:016x}", ids.trace_flags.sampled)

        async def send_and_name_the_span(message: Message) -> None:
            if message["type"] == "http.response.start" and (route := getattr(scope.get("route"), "path", None)):
                span.update_name(f"{scope['method']} {route}")  # the path is text from the client
                span.set_attribute("http.route", route)
            await send(message)

        await self._app(scope, receive, send_and_name_the_span)
