"""Checks of the Dockerfile that do not need a container engine to build the image."""

import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from serve_toys import running, toy_app

from serve.settings import Settings, read_settings

ROOT = Path(__file__).parents[2]


def instructions(name: str) -> list[str]:
    """The arguments of every instruction with this name."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    return [line.partition(" ")[2] for line in lines if line.partition(" ")[0] == name]


def environment() -> dict[str, str]:
    return dict(entry.split("=", 1) for line in instructions("ENV") for entry in shlex.split(line))


def test_it_does_not_run_as_root() -> None:
    (user,) = instructions("USER")
    assert int(user.partition(":")[0]) > 0
    text = (ROOT / "Dockerfile").read_text()
    assert text.index("\nUSER") > text.rindex("\nFROM"), "a user of the build stage does not count"


def test_the_extra_it_installs_does_not_depend_on_torch() -> None:
    (install,) = instructions("RUN")
    assert install.endswith('install --no-cache-dir -c constraints.txt ".[serve]"')
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = " ".join(project["dependencies"] + project["optional-dependencies"]["serve"])
    assert "torch" not in installed
    assert "ltkd[" not in installed


def test_everything_it_copies_exists_and_is_not_ignored() -> None:
    included = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [source for line in instructions("COPY") if "--from" not in line for source in shlex.split(line)[:-1]]
    assert len(sources) >= 7
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in included, f".dockerignore excludes {source}"


def test_the_command_is_in_exec_form_so_that_it_receives_sigterm() -> None:
    (command,) = instructions("CMD")
    assert json.loads(command) == ["ltkd", "serve", "/bundle"]
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    assert Settings().delay_seconds + Settings().drain_seconds < 10, "docker stop waits 10 s"


def test_its_variables_are_settings_and_listen_on_all_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        if name.startswith("LTKD_"):
            monkeypatch.setenv(name, value)
    settings = read_settings({})
    assert (settings.host, settings.port) == ("0.0.0.0", 8000)
    assert instructions("EXPOSE") == [str(settings.port)]


def test_the_health_check_uses_readiness() -> None:
    (check,) = instructions("HEALTHCHECK")
    program = json.loads(check.partition(" CMD ")[2])
    assert program[0] == "python"

    def status(lifespan: str) -> int:
        with running(toy_app(), lifespan) as client:
            variables = {**os.environ, "LTKD_PORT": str(client.base_url.port)}
            return subprocess.run([sys.executable, *program[1:]], env=variables, check=False).returncode

    assert status("on") == 0
    assert status("off") == 1  # not ready
