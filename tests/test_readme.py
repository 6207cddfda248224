"""The README is correct: its commands run in order, and its file tree matches the files on disk."""

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from ltkd.cli.main import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SHELL_BLOCKS = [text for language, text in BLOCKS if language == "sh"]
TREE = BLOCKS[-1][1]
NOT_LISTED = {".ci/run", ".dockerignore", ".gitignore", "py.typed"}


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so the files of the project are unknown")
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_file_tree_is_the_one_on_disk() -> None:
    listed, folder = set(), ""
    for line in TREE.splitlines():
        name, purpose = line.split(maxsplit=1) if len(line.split()) > 1 else (line.strip(), "")
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        path = name if not line.startswith(" ") else folder + name
        assert purpose or path in ("benchmarks/", "examples/", "docs/"), f"{path} has no purpose"
        listed.add(path)
    whole_folders = ("tests/", "docs/benchmarks/", "benchmarks/peers/")
    expected = set()
    for path in tracked():
        within = next((folder for folder in whole_folders if path.startswith(folder)), None)
        if path in NOT_LISTED or Path(path).name in NOT_LISTED:
            continue
        expected.add(within or path)
    files = {path for path in listed if not path.endswith("/") or path in whole_folders}
    assert files == expected


def test_every_command_shown_exists() -> None:
    shown = set(re.findall(r"(?:^|[\s/`])ltkd ([a-z]+)", README))
    assert shown >= {"train", "distill", "compare", "export", "verify", "serve", "classify"}
    assert shown - {"trains", "distils"} <= set(cli.commands), "the README shows a command that does not exist"


def test_the_target_of_every_link_exists() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://arxiv.org/") or (ROOT / target).exists(), target


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files, as in a fresh clone, with a link to the existing environment."""
    if not (ROOT / ".venv" / ".installed").exists():
        pytest.skip("there is no environment of `make install`")
    folder = tmp_path_factory.mktemp("readme") / "ltkd"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def run_shell(block: str, folder: Path, environment: dict[str, str]) -> str:
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@contextmanager
def serving(block: str, folder: Path, environment: dict[str, str], port: int) -> Iterator[None]:
    with subprocess.Popen(block.split(), cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "serving demo" in process.stdout.readline()
        try:
            with httpx.Client(transport=httpx.HTTPTransport(retries=20)) as client:
                assert client.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
            yield
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_commands_of_the_readme_work_in_order(checkout: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MAKEFLAGS")}
    environment |= {"LTKD_PORT": str(port), "COLUMNS": "100"}
    demo, serve, classify, inspect, example, tests = SHELL_BLOCKS
    assert tests == "make check test\n"  # the run that contains this test

    table = run_shell(demo, checkout, environment)
    for expected in (
        "teacher resnet20",
        "ce resnet8",
        "kd resnet8",
        "ltkd resnet8",
        "head",
        "medium",
        "tail",
        "3,384 images",
    ):
        assert expected in table
    assert "PASS" in table and re.search(r"Serve it:   (\.venv/bin/)?ltkd serve bundles/demo", table)
    assert re.search(r"runs/demo/tail.png: \w+ \((head|medium|tail)\) with", table)

    with serving(serve, checkout, environment, port):
        answer = json.loads(run_shell(classify.replace(":8000", f":{port}"), checkout, environment))
    (result,) = answer["results"]
    assert sum(result["group_confidence"].values()) == pytest.approx(1)
    assert len(result["top_k"]) == 5

    inspected = run_shell(inspect, checkout, environment)
    assert "is complete and unchanged. It was certified (fp32" in inspected
    assert f"runs/demo/tail.png: {result['label']} ({result['group']})" in inspected
    assert "step  80  loss" in run_shell(example, checkout, environment)
