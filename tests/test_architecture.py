"""Who may import whom: the arrows of ARCHITECTURE.md, read from the source."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FRONT_DOOR = {"cli", "__main__"}
GROUND_FLOOR = {
    "errors", "records", "groups", "task", "metrics", "images", "config", "cores", "calibration", "staging", "bundle",
}  # fmt: skip
HEAVY = {"torch", "torchvision", "safetensors", "matplotlib", "onnx", "onnxscript", "onnxruntime", "scipy", "fastapi"}
MODULES = sorted(path for room in ("ltkd", "export", "serve") for path in (ROOT / room).glob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too, but not for types alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def rooms(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def modules_of_ltkd(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("ltkd.") and name != "ltkd.__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_module_keeps_to_its_arrows(path: Path) -> None:
    room, name = path.parent.name, path.stem
    if room == "ltkd" and name in GROUND_FLOOR:
        assert not rooms(path) & (HEAVY | {"export", "serve"})
        assert modules_of_ltkd(path) <= GROUND_FLOOR
    elif room == "ltkd" and name not in FRONT_DOOR:
        assert not rooms(path) & {"export", "serve", "onnx", "onnxruntime", "fastapi"}
        assert "cli" not in modules_of_ltkd(path)
    elif room == "export":
        assert not rooms(path) & {"serve", "fastapi"}
        assert "cli" not in modules_of_ltkd(path)
    elif room == "serve":
        assert not rooms(path) & {"export", "torch", "torchvision", "onnx", "matplotlib"}
        assert modules_of_ltkd(path) <= GROUND_FLOOR


def test_a_forbidden_import_would_be_seen(tmp_path: Path) -> None:
    culprit = tmp_path / "culprit.py"
    culprit.write_text("def hidden() -> None:\n    from torch import nn\n    import export.gates\n")
    assert rooms(culprit) == {"torch", "export"}


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_the_front_door_imports_nothing_heavy_before_a_command_runs() -> None:
    loaded = loaded_by("import ltkd.cli\nltkd.cli.cli(['--help'], standalone_mode=False)")
    assert not loaded & (HEAVY | {"numpy", "pydantic", "rich", "PIL", "export", "serve"})


def test_the_ground_floor_runs_without_torch() -> None:
    code = "\n".join(f"import ltkd.{name}" for name in sorted(GROUND_FLOOR))
    assert not loaded_by(code) & HEAVY


def test_verifying_a_bundle_needs_no_torch() -> None:
    assert not loaded_by("import export.verify") & {"torch", "torchvision", "matplotlib", "fastapi"}


@pytest.mark.parametrize("module", ["export.candidate", "serve.engine"])
def test_onnx_runtime_reports_nothing_to_its_makers(module: str, tmp_path: Path) -> None:
    # imported by itself it writes a device id below the home directory, and later sends it with facts about the model
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, env=environment)
    assert list(tmp_path.iterdir()) == []


def test_every_invariant_of_the_architecture_names_a_test_that_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    invariants = [line for line in text.partition("## Invariants")[2].splitlines() if line.startswith("- ")]
    assert len(invariants) >= 10
    tests = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    for line in invariants:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", line)
        assert named, f"names no test: {line}"
        for file, test in named:
            assert f"def {test}(" in tests[file], f"{file} has no {test}"
