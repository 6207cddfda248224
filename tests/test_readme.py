"""The README is correct: its commands run in order, and its tree of folders is the one on disk."""

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

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
SHELL_BLOCKS = [text for language, text in BLOCKS if language == "sh"]
TREE = BLOCKS[-1][1]
ANSWER = next(json.loads(text) for language, text in BLOCKS if language == "json")
PACKAGES = {"ltkd", "export", "serve"}


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so the files of the project are unknown")
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_tree_lists_the_folders_on_disk() -> None:
    listed, package = {}, ""
    for line in TREE.splitlines():
        name, purpose = line.split(maxsplit=1)
        package = package if line.startswith(" ") else name
        listed[f"{package}{name}" if line.startswith(" ") else name] = purpose
    folders = {Path(path).parent for path in tracked() if "/" in path}
    expected = {f"{folder.parts[0]}/" for folder in folders if not folder.parts[0].startswith(".")}
    expected |= {f"{folder}/" for folder in folders if len(folder.parts) == 2 and folder.parts[0] in PACKAGES}
    assert listed.keys() == expected
    assert all(listed.values())


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
    assert ANSWER.keys() <= result.keys()
    assert all(ANSWER[name].keys() <= result[name].keys() for name in ("expected_accuracy", "prediction_set"))
    assert ANSWER["group_confidence"].keys() == result["group_confidence"].keys()

    inspected = run_shell(inspect, checkout, environment)
    assert "is complete and unchanged. It was certified (fp32" in inspected
    assert f"runs/demo/tail.png: {result['label']} ({result['group']})" in inspected
    assert "step  80  loss" in run_shell(example, checkout, environment)
