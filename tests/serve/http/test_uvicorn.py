"""serve/http/connection.py uses the inside of uvicorn; this file fails if a new version of uvicorn changes it.

If a test here fails after an update: read uvicorn/protocols/http/httptools_impl.py of the new version, adapt
serve/http/connection.py to it, adapt the lists below, and run tests/serve/http and ``python -m benchmarks.attacks``.
Then raise the version in pyproject.toml. No other module may use these names (see the last test).
"""

import ast
import inspect
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

ROOT = Path(__file__).parents[3]
OVERRIDDEN = {
    "connection_made", "connection_lost", "data_received", "pause_writing", "resume_writing", "on_message_begin",
    "on_header", "on_headers_complete", "on_body", "on_message_complete", "on_response_complete",
}  # fmt: skip
ATTRIBUTES = {
    "url",
    "headers",
    "parser",
    "cycle",
    "pipeline",
    "flow",
    "transport",
    "connections",
    "timeout_keep_alive_task",
}
CYCLE_ATTRIBUTES = {"response_started", "response_complete", "disconnected", "message_event"}
CYCLE_CALLS_ON_RESPONSE = "self.on_response()"


def test_uvicorn_has_the_version_that_the_connection_was_written_for() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["serve"]
    (requirement,) = [each for each in declared if each.startswith("uvicorn")]
    minor = ".".join(metadata.version("uvicorn").split(".")[:2])
    assert requirement == f"uvicorn=={minor}.*"


@pytest.mark.parametrize("name", sorted(OVERRIDDEN))
def test_the_protocol_class_has_every_method_that_is_overridden(name: str) -> None:
    assert inspect.isfunction(vars(HttpToolsProtocol)[name])


def test_the_protocol_class_and_the_request_cycle_set_every_attribute_that_is_used() -> None:
    for source, names in (
        (inspect.getsource(HttpToolsProtocol), ATTRIBUTES),
        (inspect.getsource(RequestResponseCycle), CYCLE_ATTRIBUTES),
    ):
        assert names <= set(re.findall(r"self\.(\w+)", source))
    assert CYCLE_CALLS_ON_RESPONSE in inspect.getsource(RequestResponseCycle)


def test_flow_control_resumes_reading_through_the_method_that_is_overridden() -> None:
    assert inspect.isfunction(FlowControl.resume_reading)
    assert "flow.resume_reading()" in inspect.getsource(HttpToolsProtocol.on_response_complete)


def test_the_server_has_the_hooks_that_are_overridden() -> None:
    assert inspect.iscoroutinefunction(uvicorn.Server.on_tick)
    assert {"connections"} <= set(re.findall(r"self\.(\w+) *[:=]", inspect.getsource(uvicorn.server.ServerState)))
    assert inspect.isfunction(uvicorn.Server.handle_exit)


def private_names(path: Path) -> set[str]:
    """Names with an underscore that a module takes from other objects than its own (``self``, ``cls``)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            owner = node.value
            if not (isinstance(owner, ast.Name) and owner.id in ("self", "cls")):
                found.add(node.attr)
    return found


def test_no_other_module_uses_protocol_classes_or_private_names_of_uvicorn_and_starlette() -> None:
    inside = {name for kind in (HttpToolsProtocol, RequestResponseCycle, uvicorn.Server) for name in dir(kind)}
    for path in (ROOT / "serve").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if path.name != "connection.py":
            assert "uvicorn.protocols" not in source, path
            assert "starlette._" not in source and "fastapi._" not in source, path
        assert not private_names(path) & inside, path
