"""The import rules of pyproject.toml, and the modules that are loaded when a process starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("ltkd", "export", "serve")
HEAVY = {"torch", "torchvision", "safetensors", "matplotlib", "onnx", "onnxscript", "onnxruntime", "scipy", "fastapi"}
MAX_MODULES, MAX_LINES = 12, 400


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--config", ROOT / "pyproject.toml"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_every_import_follows_the_layers() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("importer", "imported", "contract"),
    [
        ("ltkd/contract/task.py", "torch", "do not import heavy packages"),
        ("ltkd/contract/added.py", "torch", "do not import heavy packages"),  # a new module in the folder
        ("ltkd/data/glyphs.py", "ltkd.training.loop", "ltkd: layers"),
        ("ltkd/training/loop.py", "export.schema", "only the command line of ltkd"),
        ("export/report/plots.py", "export.conversion.fp32", "only on the schema"),
        ("export/report/plots.py", "ltkd.data.glyphs", "only on the schema"),
        ("export/schema.py", "serve.problems", "neither serve nor the command line"),
        ("serve/monitoring/drift.py", "torch", "without torch"),
        ("serve/monitoring/drift.py", "ltkd.data.glyphs", "without torch"),
        ("serve/monitoring/logs.py", "safetensors", "without torch"),
        ("serve/engine/batching.py", "serve.pool.admission", "serve: layers"),
        ("serve/engine/batching.py", "starlette.responses", "no web framework"),
    ],
)
def test_an_import_that_breaks_a_rule_is_found(importer: str, imported: str, contract: str, tmp_path: Path) -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            copied = tmp_path / path.relative_to(ROOT)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(path.read_bytes())
    with (tmp_path / importer).open("a") as file:
        file.write(f"\n\ndef added() -> None:\n    import {imported}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    broken = [line for line in result.stdout.splitlines() if "BROKEN" in line]
    assert any(contract in line for line in broken), result.stdout


def test_folders_and_modules_stay_small_enough_to_read() -> None:
    for package in PACKAGES:
        for folder in {path.parent for path in (ROOT / package).rglob("*.py")}:
            modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
            assert len(modules) <= MAX_MODULES, folder
            for path in modules:
                assert len(path.read_text().splitlines()) <= MAX_LINES, path


def packages_loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in result.stdout.splitlines()[-1].split()}


def test_the_command_line_imports_nothing_heavy_before_a_command_runs() -> None:
    loaded = packages_loaded_by("import ltkd.cli.main\nltkd.cli.main.cli(['--help'], standalone_mode=False)")
    assert not loaded & (HEAVY | {"numpy", "pydantic", "rich", "PIL", "export", "serve"})


def test_the_shared_contract_runs_without_torch() -> None:
    modules = [f"ltkd.contract.{path.stem}" for path in (ROOT / "ltkd" / "contract").glob("[a-z]*.py")]
    assert len(modules) >= 9
    assert (
        not packages_loaded_by("\n".join(f"import {name}" for name in (*modules, "ltkd.config", "ltkd.errors"))) & HEAVY
    )


def test_verifying_a_bundle_needs_no_torch() -> None:
    assert not packages_loaded_by("import export.verify") & {"torch", "torchvision", "matplotlib", "fastapi"}


@pytest.mark.parametrize("module", ["export.conversion.session", "serve.engine.session"])
def test_onnx_runtime_sends_no_telemetry(module: str, tmp_path: Path) -> None:
    # by default its import writes a device id to the home directory, and later sends it with data about the model
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, env=environment)
    assert list(tmp_path.iterdir()) == []


def test_every_invariant_of_the_architecture_names_a_test_that_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    invariants = [line for line in text.partition("## Invariants")[2].splitlines() if line.startswith("- ")]
    assert len(invariants) >= 10
    for line in invariants:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", line)
        assert named, f"no test is named in: {line}"
        for file, test in named:
            assert f"def {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"
