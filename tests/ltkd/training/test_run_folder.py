import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from training_toys import RECIPE, toy_config, toy_data

from ltkd.config import Execution
from ltkd.contract.records import sha256_of
from ltkd.errors import RunError, TrainingError, UsageError
from ltkd.methods.registry import method_config
from ltkd.training import run as run_module
from ltkd.training.checkpoint import Checkpoint
from ltkd.training.loop import Position, evaluate
from ltkd.training.run import CHECKPOINT_FILE, train_run
from ltkd.training.run_folder import METRICS_FILE, WEIGHTS_FILE, Run, open_run

QUIET = Console(quiet=True)


class StoppedError(Exception):
    """Simulates an interruption at a chosen moment."""


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_run(toy_config(), toy_data(), tmp_path_factory.mktemp("runs") / "teacher", QUIET, "toy")


def interrupt_after(epochs: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and stop directly after the checkpoint of an epoch."""
    save = Checkpoint.save

    def save_then_stop(self: Checkpoint, position: Position) -> None:
        save(self, position)
        if position.epoch == epochs:
            raise StoppedError

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(Checkpoint, "save", save_then_stop)
        train_run(toy_config(), toy_data(), out, QUIET, "toy")


def test_a_complete_run_has_every_file_and_opens(complete: Run) -> None:
    assert {path.name for path in complete.path.iterdir()} == {
        "config.json",
        "task.json",
        "metrics.jsonl",
        "weights.safetensors",
        "curves.png",
    }
    assert open_run(complete.path) == complete
    assert complete.task == toy_data().task
    assert len(complete.metrics) == RECIPE.epochs
    assert all(not isinstance(value, dict | list) for line in complete.metrics for value in line.values())
    assert set(complete.accuracy()) == {"head", "medium", "tail", "all"}
    assert complete.best_accuracy() >= complete.accuracy()["all"]


def test_the_loaded_network_has_the_recorded_accuracy(complete: Run) -> None:
    network = complete.load_network()
    assert not network.training
    assert evaluate(network, toy_data(), torch.device("cpu")) == complete.accuracy()


def test_training_a_complete_run_again_only_opens_it(complete: Run) -> None:
    before = (complete.path / WEIGHTS_FILE).stat().st_mtime_ns
    assert train_run(toy_config(), toy_data(), complete.path, QUIET, "toy") == complete
    assert (complete.path / WEIGHTS_FILE).stat().st_mtime_ns == before


def test_an_interrupted_run_resumes_to_the_same_bits(
    complete: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(1, tmp_path / "run", monkeypatch)
    resumed = train_run(toy_config(), toy_data(), tmp_path / "run", QUIET, "toy")
    expected, found = complete.load_network().state_dict(), resumed.load_network().state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    losses = [[line["loss"] for line in run.metrics] for run in (complete, resumed)]
    assert losses[0] == losses[1]


def test_an_interrupted_run_is_not_opened_as_a_complete_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(2, tmp_path / "run", monkeypatch)
    with pytest.raises(RunError, match=r"no weights.safetensors: its training stopped after 2 of 4 epochs. Run the"):
        open_run(tmp_path / "run")


def test_a_failed_write_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(2, tmp_path / "run", monkeypatch)
    checkpoint = (tmp_path / "run" / CHECKPOINT_FILE).read_bytes()

    def full_disk(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"could not be written \(No space left on"):
        patch.setattr(Path, "replace", full_disk)
        train_run(toy_config(), toy_data(), tmp_path / "run", QUIET, "toy")
    assert (tmp_path / "run" / CHECKPOINT_FILE).read_bytes() == checkpoint
    assert len((tmp_path / "run" / METRICS_FILE).read_text().splitlines()) == 2
    assert not list((tmp_path / "run").rglob("*.part"))


def test_metrics_after_the_checkpoint_are_not_recorded_twice(
    complete: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(2, tmp_path / "run", monkeypatch)
    metrics = tmp_path / "run" / METRICS_FILE
    metrics.write_text(metrics.read_text() + json.dumps({"epoch": 3, "loss": 9.0}) + "\n")
    resumed = train_run(toy_config(), toy_data(), tmp_path / "run", QUIET, "toy")
    assert [line["epoch"] for line in resumed.metrics] == [1, 2, 3, 4]


def test_the_error_for_a_damaged_checkpoint_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(1, tmp_path / "run", monkeypatch)
    (tmp_path / "run" / CHECKPOINT_FILE).write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    with pytest.raises(RunError, match=r"state.safetensors is damaged .*; remove .* and train again"):
        train_run(toy_config(), toy_data(), tmp_path / "run", QUIET, "toy")


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 5}, "seed is 0, requested 5"),
        ({"recipe": RECIPE.model_copy(update={"epochs": 9})}, "recipe.epochs is 4, requested 9"),
        ({"execution": Execution(precision="bfloat16")}, "execution.precision is float32, requested bfloat16"),
        ({"execution": Execution(num_devices=2)}, "execution.num_devices is 1, requested 2"),
        ({"teacher_views": 3}, "teacher_views is None, requested 3"),
        (
            {"method": method_config("ce", {"logit_adjustment": 1})},
            "method.parameters.logit_adjustment is 0.0, requested",
        ),
        ({"method": method_config("kd")}, "method is ce, requested kd"),
    ],
)
def test_the_error_for_another_configuration_names_the_field(
    complete: Run, changes: dict[str, object], difference: str
) -> None:
    requested = toy_config().model_copy(update=changes)
    with pytest.raises(RunError, match=rf"another configuration \({re.escape(difference)}[^;]*\); give another --out"):
        train_run(requested, toy_data(), complete.path, QUIET, "toy")


def test_a_parameter_that_an_older_version_did_not_write_is_not_a_difference(complete: Run, tmp_path: Path) -> None:
    shutil.copytree(complete.path, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config["method"]["parameters"]["reweight_after"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert train_run(toy_config(), toy_data(), tmp_path / "run", QUIET, "toy").metrics == complete.metrics


def test_other_images_raise_an_error(complete: Run) -> None:
    with pytest.raises(RunError, match="was trained on other images"):
        train_run(toy_config(), toy_data(train_counts=(20, 10, 3)), complete.path, QUIET, "toy")


def test_a_folder_with_other_files_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(RunError, match="is not empty and not a run folder; give another --out"):
        train_run(toy_config(), toy_data(), tmp_path, QUIET, "toy")
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_a_file_in_place_of_the_folder_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("dear")
    with pytest.raises(RunError, match="run is a file, not a folder; give another --out"):
        train_run(toy_config(), toy_data(), tmp_path / "run", QUIET, "toy")


@pytest.mark.parametrize("left", [["task.json"], [".task.json.7.part"], ["task.json", ".config.json.7.part"]])
def test_the_partial_folder_of_a_killed_process_is_used_and_cleaned(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        (tmp_path / name).write_text("{")
    done = train_run(toy_config(), toy_data(), tmp_path, QUIET, "toy")
    assert done.task == toy_data().task
    assert not list(tmp_path.rglob("*.part"))


def test_parts_and_a_checkpoint_that_a_kill_left_are_removed(
    complete: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    interrupt_after(1, run, monkeypatch)
    (run / ".metrics.jsonl.7.part").write_text("{")
    (run / "checkpoint" / ".state.safetensors.7.part").write_text("{")
    interrupt_after(2, run, monkeypatch)
    assert not list(run.rglob("*.part"))
    shutil.copyfile(complete.weights_path, run / WEIGHTS_FILE)  # as if killed before the checkpoint was removed
    (run / METRICS_FILE).write_bytes((complete.path / METRICS_FILE).read_bytes())
    train_run(toy_config(), toy_data(), run, QUIET, "toy")
    assert not (run / "checkpoint").exists()


def test_a_folder_in_which_another_process_trains_raises_an_error(tmp_path: Path, complete: Run) -> None:
    out, checkpoint_existed = tmp_path / "run", []
    config, data = toy_config(), toy_data()

    class SecondTraining(Console):
        """Starts the same training in the same folder while the first one is running."""

        def print(self, *objects: object, **options: object) -> None:
            with pytest.raises(
                RunError, match=r"another process is training in .*; wait for it, or give another --out"
            ):
                train_run(config, data, out, QUIET, "toy")
            checkpoint_existed.append((out / CHECKPOINT_FILE).exists())

    run = train_run(config, data, out, SecondTraining(quiet=True), "toy")
    assert checkpoint_existed
    assert run.weights_path.read_bytes() == complete.weights_path.read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in complete.path.iterdir())


def test_a_read_only_disk_raises_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", "/mnt")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(RunError, match=r"/mnt could not be written \(Read-only file system\); earlier files"):
        train_run(toy_config(), toy_data(), tmp_path / "run", QUIET, "toy")


def test_other_os_errors_are_raised_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ConnectionResetError(104, "reset")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(ConnectionResetError):
        train_run(toy_config(), toy_data(), tmp_path / "run", QUIET, "toy")


def test_a_training_that_diverges_leaves_the_last_good_checkpoint_and_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a checkpoint is due after every step, so also after the step that diverges
    monkeypatch.setattr(run_module, "SAVE_EVERY_S", 0.0)
    recipe = RECIPE.model_copy(update={"peak_learning_rate": 1e6})
    for _ in range(2):  # resuming from the good checkpoint ends in the same way
        with pytest.raises(TrainingError, match=r"the loss became nan .* the loss was rising|no longer finite"):
            train_run(toy_config(recipe=recipe), toy_data(), tmp_path / "run", QUIET, "toy")
        assert not (tmp_path / "run" / WEIGHTS_FILE).exists()
        tensors = load_file(tmp_path / "run" / CHECKPOINT_FILE)
        assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_opening_a_folder_that_does_not_exist_raises_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no such directory\. Create one with: ltkd train"):
        open_run(tmp_path / "nothing")


def test_weights_of_another_network_raise_an_error(complete: Run, tmp_path: Path) -> None:
    config = json.loads((complete.path / "config.json").read_text())
    for file in complete.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model": "resnet14"}))
    with pytest.raises(RunError, match=r"weights.safetensors does not have the weights of resnet14 .*; train again"):
        open_run(tmp_path).load_network()


def test_a_student_learns_from_the_teachers_run_and_records_its_weights(complete: Run, tmp_path: Path) -> None:
    config = toy_config("ltkd", teacher=complete)
    student = train_run(config, toy_data(), tmp_path / "student", QUIET, "toy")
    assert student.config.teacher == complete.path
    assert student.config.teacher_weights_sha256 == sha256_of(complete.weights_path)
    plain = train_run(toy_config(), toy_data(), tmp_path / "plain", QUIET, "toy")
    assert student.metrics[-1]["loss"] != plain.metrics[-1]["loss"]


def test_a_teacher_of_another_task_raises_an_error(complete: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="was trained on other images or groups"):
        train_run(toy_config("kd", teacher=complete), toy_data((9, 6, 3)), tmp_path / "student", QUIET, "toy")
    assert not (tmp_path / "student").exists()


def test_a_method_that_needs_a_teacher_raises_an_error_without_one() -> None:
    with pytest.raises(UsageError, match="method 'ltkd' needs a teacher; use: ltkd distill TEACHER --method ltkd"):
        toy_config("ltkd")


def test_tensorboard_has_the_values_of_metrics_jsonl(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train_run(toy_config(), toy_data(), tmp_path / "run", QUIET, "toy", tensorboard=True)
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == pytest.approx({int(line["epoch"]): line["loss"] for line in run.metrics})
    assert {"accuracy_tail", "accuracy_all", "learning_rate", "images_per_s"} <= set(events.Tags()["scalars"])
