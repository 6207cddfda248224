"""Log formats, request traces and the log of the settings."""

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest
from pydantic import Field, SecretStr

from serve.monitoring.logs import (
    LogFormat,
    log_request,
    log_settings,
    requests_log,
    set_up_logging,
    settings_lines,
    trace_of,
)
from serve.settings import Settings

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def restore_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def log_stream(log_format: LogFormat) -> io.StringIO:
    stream = io.StringIO()
    set_up_logging(log_format, "info", stream)
    return stream


def test_each_request_is_one_json_object_on_one_line() -> None:
    stream = log_stream("json")
    trace = trace_of(TRACEPARENT)
    log_request("/v1/classify", 200, 0.0123456789, "abc-1", trace, {"model": "toy", "groups": ["tail", "head"]})
    log_request("/livez", 200, 0.001, "abc-2", None, {})
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert trace is not None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("time"))
    assert first == {
        "level": "info",
        "logger": "ltkd.requests",
        "message": "answered",
        "route": "/v1/classify",
        "status": 200,
        "seconds": 0.012346,
        "request_id": "abc-1",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "span_id": trace.span_id,
        "model": "toy",
        "groups": ["tail", "head"],
    }
    assert "trace_id" not in second


@pytest.mark.parametrize("log_format", ["plain", "json"])
def test_text_from_a_client_cannot_forge_a_log_line(log_format: LogFormat) -> None:
    stream = log_stream(log_format)
    logging.getLogger("a").warning("could not read %s", "x\n2026-01-01 INFO all is well\x1b[2J")
    assert len(stream.getvalue().splitlines()) == 1
    assert "\x1b" not in stream.getvalue()


def test_a_traceback_is_part_of_the_json_line() -> None:
    stream = log_stream("json")
    try:
        raise RuntimeError("broken")
    except RuntimeError:
        logging.getLogger("a").exception("request %s ended in a defect", "abc")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["message"] == "request abc ended in a defect"
    assert json.loads(line)["exception"].endswith("RuntimeError: broken")


def test_a_plain_line_has_the_values_of_the_request() -> None:
    stream = log_stream("plain")
    log_request("/v1/classify", 429, 0.001, "abc", None, {})
    assert stream.getvalue().endswith(" INFO answered route=/v1/classify status=429 seconds=0.001 request_id=abc\n")


def test_requests_are_not_logged_at_level_warning() -> None:
    stream = io.StringIO()
    set_up_logging("json", "warning", stream)
    assert not requests_log.isEnabledFor(logging.INFO)
    log_request("/v1/classify", 200, 0.001, "abc", None, {})
    logging.getLogger("a").warning("this is")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["this is"]


def test_a_trace_is_continued_with_a_new_span() -> None:
    first, second = trace_of(TRACEPARENT), trace_of(TRACEPARENT)
    assert first is not None
    assert second is not None
    assert first.trace_id == "0af7651916cd43dd8448eb211c80319c"
    assert len({first.span_id, second.span_id, "b7ad6b7169203331"}) == 3
    assert first.header == f"00-{first.trace_id}-{first.span_id}-01"
    assert trace_of(first.header) is not None


def test_only_the_sampled_flag_is_passed_on() -> None:
    for flags, passed in (("00", "00"), ("01", "01"), ("ff", "01"), ("02", "00")):
        trace = trace_of(TRACEPARENT[:-2] + flags)
        assert trace is not None
        assert trace.header.endswith(f"-{passed}")


@pytest.mark.parametrize(
    "later", ["01" + TRACEPARENT[2:], "cc" + TRACEPARENT[2:] + "-what-the-future-brings", f" {TRACEPARENT}\t"]
)
def test_a_later_version_of_the_header_is_read_as_version_00(later: str) -> None:
    assert trace_of(later) is not None


@pytest.mark.parametrize(
    "invalid",
    [
        "",
        "garbage",
        TRACEPARENT.upper(),
        "ff" + TRACEPARENT[2:],
        TRACEPARENT + "-more",
        TRACEPARENT + ".",
        "cc" + TRACEPARENT[2:] + ".more",
        "00-" + "0" * 32 + TRACEPARENT[35:],
        TRACEPARENT[:36] + "0" * 16 + "-01",
        TRACEPARENT.replace("-", "_"),
        TRACEPARENT[:-1],
        TRACEPARENT.replace("b7", "g7"),
    ],
)
def test_an_invalid_header_is_ignored(invalid: str) -> None:
    assert trace_of(invalid) is None


class SettingsWithSecret(Settings):
    token: SecretStr = Field(default=SecretStr("hunter2"))


def test_each_setting_is_listed_with_its_source_and_secrets_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LTKD_TOP_K", "LTKD_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LTKD_PORT", "9000")
    monkeypatch.setenv("ltkd_host", "::1")
    settings = SettingsWithSecret(top_k=3, port=9000, host="::1")
    lines = settings_lines(settings, {"top_k": 3, "device": None})
    assert len(lines) == len(SettingsWithSecret.model_fields)
    assert {"port = 9000 (environment)", "top_k = 3 (flag)", "device = auto (default)"} <= set(lines)
    assert "host = ::1 (environment)" in lines
    assert "token = (hidden) (default)" in lines
    assert not any("hunter2" in line for line in lines)


def test_settings_that_are_not_the_default_or_all_are_logged_in_the_log_format_at_every_level() -> None:
    def logged(show_all: bool) -> list[str]:
        stream = io.StringIO()
        set_up_logging("json", "error", stream)
        log_settings(Settings(port=9000), {"port": 9000}, show_all)
        return [json.loads(line)["message"] for line in stream.getvalue().splitlines()]

    assert logged(False) == ["setting port = 9000 (flag)"]
    assert len(logged(True)) == len(Settings.model_fields)
    assert all(line.startswith("setting ") for line in logged(True))
