"""The whole workflow as a user runs it: real commands in real processes, from image files to a response over HTTP."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from training_toys import NAMES, write_tree

from ltkd.contract.records import sha256_of
from ltkd.training.run_folder import open_run

# Tests that a shell runs in the background ignore Ctrl-C, and so do their child processes; restore the handler.
LTKD = [
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from ltkd.cli.main import main; main()",
]


def ltkd(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LTKD, *map(str, arguments)], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with images; the test images suffice to certify a margin of 0.5 percentage points per group."""
    folder = tmp_path_factory.mktemp("journey")
    write_tree(folder / "photos", num_test=560)
    return folder


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    """A certified bundle, made by training a teacher, distilling a student and exporting it."""
    steps = (
        ("train", "--data", "photos", "--model", "resnet8", "--recipe", "demo", "--out", "runs/teacher"),
        ("distill", "runs/teacher", "--set", "alpha=3", "--recipe", "demo", "--out", "runs/student"),
        ("export", "runs/student", "--out", "bundles/student"),
    )
    for arguments in steps:
        result = ltkd(*arguments, folder=folder)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder / "bundles" / "student"


@pytest.fixture(scope="module")
def service(bundle: Path) -> Iterator[str]:
    """The address of the running service."""
    command = [*LTKD, "serve", str(bundle), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = next(word for word in process.stdout.readline().split() if word.startswith("http://"))
        with httpx.Client(base_url=address, transport=httpx.HTTPTransport(retries=20)) as client:
            assert client.get("/readyz").status_code == 200
        yield address
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_every_step_writes_what_the_next_step_needs(bundle: Path, folder: Path) -> None:
    student = open_run(folder / "runs" / "student")
    assert student.config.teacher == Path("runs/teacher")
    assert student.config.method.parameters["alpha"] == 3.0
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["task"]["class_names"] == sorted(NAMES)
    assert manifest["source"] == manifest["source"] | {"run": "student", "model": "resnet8", "method": "ltkd"}
    assert json.loads((bundle / "parity.json").read_text())["verdict"] == "PASS"
    assert ltkd("verify", bundle, folder=folder).returncode == 0


def test_the_service_and_the_command_give_the_same_answer(service: str, bundle: Path, folder: Path) -> None:
    image = next((folder / "photos" / "test" / "blue").iterdir())
    headers = {"Content-Type": "image/png"}
    answer = httpx.post(f"{service}/v1/classify", content=image.read_bytes(), headers=headers).json()["results"][0]
    result = ltkd("classify", bundle, image, "--json", folder=folder)
    assert json.loads(result.stdout) | {"answer_id": answer["answer_id"]} == answer
    assert sum(answer["group_confidence"].values()) == pytest.approx(1)
    assert answer["group"] == {"red": "head", "green": "medium", "blue": "tail"}[answer["label"]]


def test_the_service_has_the_accuracy_that_the_run_records(service: str, folder: Path) -> None:
    run = open_run(folder / "runs" / "student")
    right = total = 0
    for name in NAMES:
        files = sorted((folder / "photos" / "test" / name).iterdir())[:50]
        parts = [("file", (file.name, file.read_bytes(), "image/png")) for file in files]
        results = httpx.post(f"{service}/v1/classify", files=parts, timeout=60).json()["results"]
        right += sum(result["label"] == name for result in results)
        total += len(results)
    assert total == 150
    # a sample of 150 of 1,680 images: three standard deviations of its accuracy are at most 12 percentage points
    assert abs(right / total - run.accuracy()["all"]) < 0.12


def test_a_rejected_image_gives_exit_code_1_and_the_reason(bundle: Path, folder: Path) -> None:
    (folder / "note.png").write_text("dear reader")
    result = ltkd("classify", bundle, "note.png", folder=folder)
    assert result.returncode == 1
    assert "note.png: rejected: the file is not a JPEG, PNG or WebP image" in result.stdout


def test_a_bundle_with_one_flipped_byte_is_not_served(bundle: Path, folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in bundle.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    content = bytearray((damaged / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / "model.onnx").write_bytes(content)
    for command in ("serve", "verify"):
        result = ltkd(command, damaged, folder=folder)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ") and "was changed after export" in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("signal_", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_an_interrupted_training_cannot_be_exported_until_the_same_command_completes_it(
    folder: Path, tmp_path: Path, signal_: signal.Signals, code: int
) -> None:
    arguments = ("train", "--data", folder / "photos", "--model", "resnet8", "--recipe", "short", "--out")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [*LTKD, *map(str, arguments), "interrupted"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert "epoch   4/12" in process.stdout.readline()
        process.send_signal(signal_)
        assert process.wait(timeout=60) == code
        errors = process.stderr.read()
    if signal_ is signal.SIGINT:
        assert re.fullmatch(
            r"stopped in interrupted after .* steps; a checkpoint was saved\. "
            r"Run the same command again to resume\.\s*",
            errors,
        )
    result = ltkd("export", "interrupted", "--out", "bundle", folder=tmp_path)
    assert result.returncode == 2 and "its training stopped after" in result.stderr
    assert "resuming after" in ltkd(*arguments, "interrupted", folder=tmp_path).stdout
    assert ltkd(*arguments, "whole", folder=tmp_path).returncode == 0
    weights = [sha256_of(tmp_path / name / "weights.safetensors") for name in ("interrupted", "whole")]
    assert weights[0] == weights[1]
