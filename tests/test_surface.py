"""The public interface: Python names, command options and file fields. A change here belongs in CHANGELOG.md."""

import subprocess
import sys

import click
import pytest

import ltkd
from ltkd.cli.main import cli
from ltkd.config import RunConfig
from ltkd.contract.bundle import Manifest
from ltkd.contract.preprocessing import Preprocessing
from ltkd.contract.task import Task

DATA = {
    "--data", "--gamma", "--groups", "--holdout", "--input-px", "--skip-unreadable", "--train-list", "--test-list",
}  # fmt: skip
TRAINING = {"--recipe", "--device", "--precision", "--compile"}
RUN = {"--seed", "--tensorboard", "--out"}
OPTIONS = {
    "train": DATA | TRAINING | RUN | {"--model", "--weights", "--set"},
    "distill": TRAINING | RUN | {"--method", "--set", "--model", "--teacher-views"},
    "compare": DATA | TRAINING | {"--teacher-model", "--student-model", "--methods", "--seeds", "--gammas", "--out"},
    "export": {"--out", "--precisions", "--margin", "--target-precision", "--target-coverage", "--triton"},
    "parity": DATA | {"--margin", "--out"},
    "verify": set(),
    "inspect": set(),
    "serve": {
        "--host",
        "--port",
        "--device",
        "--precision",
        "--processes",
        "--max-body-bytes",
        "--default-model",
        "--key-file",
        "--log-format",
        "--log-level",
        "--show-settings",
    },
    "key": {"--role", "--limit"},
    "classify": {"--top-k", "--json"},
    "pipeline": DATA | {"--teacher-model", "--student-model", "--recipe", "--device", "--seed", "--out"},
}


def test_the_python_api_has_these_names_and_its_import_is_light() -> None:
    assert set(ltkd.__all__) == {
        "ClassGroups", "GroupIndex", "LTKDLoss", "groups_by_count", "groups_by_mapping", "groups_by_share", "ltkd_loss",
    }  # fmt: skip
    assert {name for names in ltkd._MODULES.values() for name in names} == set(ltkd.__all__) <= set(dir(ltkd))
    assert all(getattr(ltkd, name).__name__ == name for name in ltkd.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'kd_los'; it has: .*ltkd_loss"):
        _ = ltkd.kd_los
    program = "import sys, ltkd; print(sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)), ltkd.ltkd_loss)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("[] <function ltkd_loss")


def test_the_commands_have_these_options_and_no_others() -> None:
    found = {
        name: {flag for parameter in command.params if isinstance(parameter, click.Option) for flag in parameter.opts}
        for name, command in cli.commands.items()
    }
    assert found == OPTIONS


def test_the_files_on_disk_have_these_fields_and_no_others() -> None:
    assert set(Task.model_fields) == {
        "schema_version", "class_names", "train_counts", "groups", "input_px", "mean", "std", "resizing",
    }  # fmt: skip
    assert set(RunConfig.model_fields) == {
        "schema_version", "data", "model", "method", "recipe", "seed", "execution", "weights_from",
        "weights_from_sha256", "teacher", "teacher_weights_sha256", "teacher_views", "versions",
    }  # fmt: skip
    assert set(Manifest.model_fields) == {
        "schema_version", "name", "task", "precisions", "parity", "report", "card", "golden", "certified_on", "source",
    }  # fmt: skip
    assert set(Preprocessing.model_fields) == {"input_px", "interpolation", "crop_ratio", "jpeg_scaling"}
    versions = {model: model.model_fields["schema_version"].default for model in (Task, RunConfig, Manifest)}
    assert versions == {Task: 1, RunConfig: 2, Manifest: 3}
