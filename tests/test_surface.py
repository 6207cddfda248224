"""What others build on, frozen: a change here is a change for them, and belongs in CHANGELOG.md."""

import click

from ltkd.cli.main import cli
from ltkd.config import RunConfig
from ltkd.contract.bundle import Manifest
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
    },
    "key": {"--admin"},
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
        "schema_version", "data", "model", "method", "recipe", "seed", "execution", "weights_from",
        "weights_from_sha256", "teacher", "teacher_weights_sha256", "teacher_views", "versions",
    }  # fmt: skip
    assert set(Manifest.model_fields) == {
        "schema_version", "name", "task", "precisions", "parity", "report", "card", "golden", "certified_on", "source",
    }  # fmt: skip
    assert {model.model_fields["schema_version"].default for model in (Task, RunConfig)} == {1}
    assert Manifest.model_fields["schema_version"].default == 2
