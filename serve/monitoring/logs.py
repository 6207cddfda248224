"""Logging: plain text or one JSON object per line, with request ids and traces.

A line has the event, the request id and the route. It never contains a body, a header or a key.
"""

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TextIO

from pydantic import SecretStr

from serve.settings import PREFIX, Settings

LogFormat = Literal["plain", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogValue = str | int | float | bool | None | list[str]

requests_log = logging.getLogger("ltkd.requests")
"""One line per answered request, at level info. Check ``isEnabledFor`` before building the values for it."""

start_log = logging.getLogger("ltkd.start")
"""The settings at the start of the service; logged at every log level."""

_DEFAULT = "(default)"
_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True)
class Trace:
    """This request's span in a client's trace (W3C Trace Context).

    Attributes:
        trace_id: The client's trace id, 32 hexadecimal digits.
        span_id: The span id that was created for this request, 16 hexadecimal digits.
        sampled: Whether the client records the trace.
    """

    trace_id: str
    span_id: str
    sampled: bool

    @property
    def header(self) -> str:
        """The ``traceparent`` header with this span."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


def trace_of(traceparent: str) -> Trace | None:
    """Continue the trace of a ``traceparent`` header; None if it is absent or not valid, as the standard requires.

    Later versions of the header may have more fields; their first four are read as in version 00.
    """
    parts = _TRACEPARENT.fullmatch(traceparent.strip(" \t"))
    if not parts:
        return None
    version, trace_id, parent_id, flags, extra = parts.groups()
    if version == "ff" or (version == "00" and extra) or not int(trace_id, 16) or not int(parent_id, 16):
        return None
    return Trace(trace_id, os.urandom(8).hex(), bool(int(flags, 16) & 1))


def request_id_of(incoming: str) -> str:
    """The client's request id if it is short and safe to log, else a new one."""
    return incoming if _SAFE_ID.fullmatch(incoming) else os.urandom(16).hex()


def log_request(
    route: str, status: int, seconds: float, request_id: str, trace: Trace | None, more: Mapping[str, LogValue]
) -> None:
    """Log one answered request.

    Args:
        route: The template of the route. The path is not logged, because it is text from the client.
        status: Of the response; 499 if the client disconnected.
        seconds: From the first byte of the request to the last byte of the response.
        request_id: The ``X-Request-ID`` of the response.
        trace: The client's trace, if it sent one.
        more: Further values, such as ``model``, ``key`` (the name of the key) and ``groups`` of the predicted classes.
    """
    facts: dict[str, LogValue] = {
        "route": route, "status": status, "seconds": round(seconds, 6), "request_id": request_id
    }  # fmt: skip
    if trace:
        facts |= {"trace_id": trace.trace_id, "span_id": trace.span_id}
    requests_log.info("answered", extra={"facts": facts | dict(more)})


class PlainFormatter(logging.Formatter):
    """``time LEVEL message key=value ...``; control characters are escaped, so an entry stays on one line."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time_of(record)} {record.levelname} {_visible(record.getMessage())}"
        line += "".join(f" {name}={_visible(str(value))}" for name, value in _facts_of(record).items())
        cause = _cause_of(record)
        return f"{line}\n{cause}" if cause else line


class JsonFormatter(logging.Formatter):
    """One JSON object per line, including a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, LogValue] = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _facts_of(record)
        cause = _cause_of(record)
        if cause:
            line["exception"] = cause
        return json.dumps(line, ensure_ascii=False, default=str)


FORMATTERS: dict[LogFormat, type[logging.Formatter]] = {"plain": PlainFormatter, "json": JsonFormatter}


def set_up_logging(log_format: LogFormat, level: LogLevel, stream: TextIO | None = None) -> None:
    """Send all log messages of this process to stderr, in one format."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(FORMATTERS[log_format]())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    start_log.setLevel(logging.INFO)


def log_settings(settings: Settings, given: Mapping[str, object], show_all: bool) -> None:
    """Log the settings of the service that are not the default, or all of them."""
    for line in settings_lines(settings, given):
        if show_all or not line.endswith(_DEFAULT):
            start_log.info("setting %s", line)


def settings_lines(settings: Settings, given: Mapping[str, object]) -> list[str]:
    """Every setting with its value and its source; secrets are hidden.

    Args:
        settings: The settings in use.
        given: The options of the command line; None means that an option was not given.
    """
    environment = {name.upper() for name in os.environ}
    lines = []
    for name in type(settings).model_fields:
        source = "default"
        if given.get(name) is not None:
            source = "flag"
        elif PREFIX + name.upper() in environment:
            source = "environment"
        value = getattr(settings, name)
        shown = "(hidden)" if isinstance(value, SecretStr) else value
        lines.append(f"{name} = {shown} ({source})")
    return lines


def _time_of(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _facts_of(record: logging.LogRecord) -> dict[str, LogValue]:
    facts = getattr(record, "facts", {})
    return facts if isinstance(facts, dict) else {}


def _cause_of(record: logging.LogRecord) -> str:
    return "".join(traceback.format_exception(*record.exc_info)).rstrip() if record.exc_info else ""


def _visible(text: str) -> str:
    """The text on one line, with control characters escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
