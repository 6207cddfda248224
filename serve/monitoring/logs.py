"""What the service writes down: plain lines, or one JSON object a line; and what ties a line to a request.

A line says what happened, to which request, on which route. It never holds a body, a header or a key.
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
"""One line an answered request, at level info; ask ``isEnabledFor`` before anything is put together for it."""

start_log = logging.getLogger("ltkd.start")
"""What is always told, whatever the level: how the service was started."""

_SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True)
class Trace:
    """Our place in a caller's trace (W3C Trace Context).

    Attributes:
        trace_id: The caller's, 32 hexadecimal digits.
        span_id: Ours, made for this request.
        sampled: Whether the caller records the trace.
    """

    trace_id: str
    span_id: str
    sampled: bool

    @property
    def header(self) -> str:
        """``traceparent`` as we pass it on."""
        return f"00-{self.trace_id}-{self.span_id}-{int(self.sampled):02x}"


def trace_of(traceparent: str) -> Trace | None:
    """Continue the trace of a ``traceparent`` header; None where it is absent or not valid, as the standard asks.

    Later versions of the header may have more fields; the first four are read as in version 00.
    """
    parts = _TRACEPARENT.fullmatch(traceparent.strip(" \t"))
    if not parts:
        return None
    version, trace_id, parent_id, flags, more = parts.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or not int(parent_id, 16):
        return None
    return Trace(trace_id, os.urandom(8).hex(), bool(int(flags, 16) & 1))


def request_id_of(incoming: str) -> str:
    """The caller's request id where it is short and plain, else a new one."""
    return incoming if _SANE_ID.fullmatch(incoming) else os.urandom(16).hex()


def log_request(
    route: str, status: int, seconds: float, request_id: str, trace: Trace | None, more: Mapping[str, LogValue]
) -> None:
    """Write down one answered request.

    Args:
        route: The route's template, not the path: a path is the caller's text.
        status: Of the answer; 499 when the client left.
        seconds: From the first byte to the last.
        request_id: Of the answer.
        trace: The caller's trace, if it sent one.
        more: What else is known, such as ``model``, ``key`` (its name) and ``groups`` of the predicted classes.
    """
    facts: dict[str, LogValue] = {
        "route": route, "status": status, "seconds": round(seconds, 6), "request_id": request_id
    }  # fmt: skip
    if trace:
        facts |= {"trace_id": trace.trace_id, "span_id": trace.span_id}
    requests_log.info("answered", extra={"facts": facts | dict(more)})


class PlainFormatter(logging.Formatter):
    """``time LEVEL message key=value ...``; what could break the line or the terminal is escaped."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time_of(record)} {record.levelname} {_visible(record.getMessage())}"
        line += "".join(f" {name}={_visible(str(value))}" for name, value in _facts_of(record).items())
        cause = _cause_of(record)
        return f"{line}\n{cause}" if cause else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line, a traceback included."""

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


def set_up_logging(form: LogFormat, level: LogLevel, stream: TextIO | None = None) -> None:
    """Send everything that is logged in this process to stderr, in one form."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(FORMATTERS[form]())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    start_log.setLevel(logging.INFO)


def log_settings(settings: Settings, given: Mapping[str, object]) -> None:
    """Write down how the service was started; see ``settings_lines``."""
    for line in settings_lines(settings, given):
        start_log.info("setting %s", line)


def settings_lines(settings: Settings, given: Mapping[str, object]) -> list[str]:
    """Every setting with its value and where it is from; secrets are hidden.

    Args:
        settings: As read.
        given: What the command line gave, None meaning not given.
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
    """The text on one line, control characters as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
