"""What others build on, frozen: a change here is a change for them, and belongs in CHANGELOG.md."""

import click

from ltkd.bundle import Manifest
from ltkd.cli import cli
from ltkd.config import RunConfig
from ltkd.task import Task

DATA = {"--data", "--gamma", "--groups", "--holdout", "--input-px"}
OPTIONS = {
    "train": DATA | {"--model", "--recipe", "--device", "--seed", "--out"},
    "distill": {"--method", "--set", "--model", "--recipe", "--device", "--seed", "--out"},
    "compare": DATA | {"--teacher-model", "--student-model", "--methods", "--seeds", "--recipe", "--device", "--out"},
    "export": {"--out"},
    "verify": set(),
    "serve": {"--host", "--port", "--device", "--max-body-bytes"},
    "classify": {"--top-k", "--json"},
    "pipeline": DATA | {"--teacher-model", "--student-model", "--recipe", "--device", "--seed", "--out"},
}


def test_the_commands_have_these_options_and_no_others() -> None:
    found = {
        name: {flag for parameter in command.params if isinstance(parameter, click.Option) for flag in parameter.opts}
        for name, command in cli.commands.items()
    }
    assert found == OPTIONS


def test_the_files_on_disk_have_these_fields_and_no_others() -> None:
    assert set(Task.model_fields) == {
        "schema_version", "class_names", "train_counts", "groups", "input_px", "mean", "std",
    }  # fmt: skip
    assert set(RunConfig.model_fields) == {
        "schema_version", "data", "model", "method", "recipe", "seed", "device", "teacher", "teacher_weights_sha256",
        "versions",
    }  # fmt: skip
    assert set(Manifest.model_fields) == {
        "schema_version", "name", "task", "precisions", "parity", "golden", "certified_on", "source",
    }  # fmt: skip
    assert {model.model_fields["schema_version"].default for model in (Task, RunConfig, Manifest)} == {1}
