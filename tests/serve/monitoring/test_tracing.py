"""OpenTelemetry's spans of requests: their trace, name and status, and that log and response have the same ids."""

import logging
import logging.handlers
import os
import queue
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from serve_toys import encoded, running, toy_app, toy_engine, toy_pixels

import serve.api.app
from ltkd.errors import UsageError
from serve.monitoring.logs import requests_log
from serve.monitoring.tracing import traces_requested, with_tracing

PNG = encoded(toy_pixels())
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def client(
    spans: InMemorySpanExporter, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[httpx.Client]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(serve.api.app, "with_tracing", partial(with_tracing, provider=provider))
    with running(toy_app(toy_engine(fails=getattr(request, "param", False)))) as client:
        yield client


def only_span(spans: InMemorySpanExporter) -> ReadableSpan:
    (span,) = spans.get_finished_spans()
    return span


def test_a_request_is_a_span_in_the_trace_of_the_client(client: httpx.Client, spans: InMemorySpanExporter) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    assert client.post("/v1/classify?top_k=1", content=PNG, headers=headers).status_code == 200
    span = only_span(spans)
    assert span.context is not None and span.parent is not None and span.attributes is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert (span.name, span.kind) == ("POST /v1/classify", SpanKind.SERVER)
    assert (span.attributes["http.status_code"], span.attributes["http.route"]) == (200, "/v1/classify")


def test_log_line_and_response_have_the_ids_of_the_span(
    client: httpx.Client, spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()  # the line is logged after the response
    caplog.set_level(logging.INFO, "ltkd.requests")
    requests_log.addHandler(handler := logging.handlers.QueueHandler(lines))  # type: ignore[arg-type]
    for headers in ({"traceparent": f"00-{TRACE}-{PARENT}-01"}, {}):
        spans.clear()
        response = client.post("/v1/classify", content=PNG, headers=headers)
        context = only_span(spans).context
        assert context is not None
        trace_id, span_id = f"{context.trace_id:032x}", f"{context.span_id:016x}"
        assert response.headers["traceparent"] == f"00-{trace_id}-{span_id}-01"
        facts = lines.get(timeout=30).facts  # type: ignore[attr-defined]
        assert (facts["trace_id"], facts["span_id"]) == (trace_id, span_id)
    requests_log.removeHandler(handler)


def test_a_trace_that_the_client_does_not_record_is_continued_but_not_recorded(
    client: httpx.Client, spans: InMemorySpanExporter
) -> None:
    response = client.post("/v1/classify", content=PNG, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert response.headers["traceparent"].startswith(f"00-{TRACE}-") and response.headers["traceparent"].endswith(
        "-00"
    )
    assert spans.get_finished_spans() == ()


@pytest.mark.parametrize("client", [True], indirect=True)
def test_an_internal_error_is_an_error_of_the_span(client: httpx.Client, spans: InMemorySpanExporter) -> None:
    assert client.post("/v1/classify", content=PNG).status_code == 500
    span = only_span(spans)
    assert span.attributes is not None
    assert (span.attributes["http.status_code"], span.status.status_code) == (500, StatusCode.ERROR)


def test_the_name_of_a_span_has_the_template_of_the_route_and_never_an_unknown_path(
    client: httpx.Client, spans: InMemorySpanExporter
) -> None:
    for path in ("/v2/models/toy", "/v2/models/none", "/nothing/here"):
        client.get(path)
    assert [span.name for span in spans.get_finished_spans()] == ["GET /v2/models/{model}"] * 2 + ["GET"]


def test_probes_and_metrics_have_no_span(client: httpx.Client, spans: InMemorySpanExporter) -> None:
    for path in ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/metrics"):
        assert client.get(path, headers={"Host": "x/livez"} if path == "/readyz" else {}).status_code == 200
    assert spans.get_finished_spans() == ()
    assert client.get("/v1/model", headers={"Host": "x/livez"}).status_code == 200
    assert only_span(spans).name == "GET /v1/model"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        (ENDPOINT, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, False),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "true"}, False),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "false"}, True),
    ],
)
def test_the_standard_variables_ask_for_traces(variables: dict[str, str], expected: bool) -> None:
    assert traces_requested(variables) == expected


def test_opentelemetry_is_not_imported_unless_traces_are_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_TRACES_EXPORTER", *ENDPOINT):
        monkeypatch.delenv(name, raising=False)
    program = (
        "import sys; from serve_toys import toy_app; toy_app().build_middleware_stack(); "
        "print([name in sys.modules for name in ('opentelemetry.sdk.trace', 'opentelemetry.instrumentation.asgi')])"
    )
    command = [sys.executable, "-c", program]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert subprocess.run(command, capture_output=True, check=True, timeout=60).stdout == b"[False, False]\n"
    for name, value in ENDPOINT.items():
        monkeypatch.setenv(name, value)
    assert subprocess.run(command, capture_output=True, check=True, timeout=60).stdout == b"[True, True]\n"


def test_traces_without_opentelemetry_installed_are_a_warning_and_the_service_works(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in ENDPOINT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with running(toy_app()) as client:
        assert client.post("/v1/classify", content=PNG).status_code == 200
    assert "the environment asks for traces, but OpenTelemetry is missing; install ltkd[otel]" in caplog.text


def test_invalid_variables_of_opentelemetry_are_one_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (ENDPOINT | {"OTEL_BSP_MAX_QUEUE_SIZE": "-1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"OpenTelemetry cannot be set up \(.*\); correct its OTEL_ variables"):
        toy_app()
