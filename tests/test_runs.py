import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from training_toys import RECIPE, toy_config, toy_data

from ltkd import runs
from ltkd.errors import RunError, UsageError
from ltkd.runs import CHECKPOINT_FILE, METRICS_FILE, WEIGHTS_FILE, Run, open_run, train_run
from ltkd.training import evaluate

QUIET = Console(quiet=True)


class StoppedError(Exception):
    """Stands for Ctrl-C, a full disk or a crash, at a chosen moment."""


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_run(toy_config(), toy_data(), tmp_path_factory.mktemp("runs") / "teacher", QUIET, "toy")


def interrupt_after(epochs: int, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and stop right after the checkpoint of an epoch."""
    save = runs._save_checkpoint

    def save_then_stop(folder: Path, network: torch.nn.Module, optimizer: torch.optim.Optimizer, done: int) -> None:
        save(folder, network, optimizer, done)
        if done == epochs:
            raise StoppedError

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(runs, "_save_checkpoint", save_then_stop)
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


def test_the_loaded_network_gives_the_accuracy_that_was_noted(complete: Run) -> None:
    network = complete.load_network()
    assert not network.training
    assert evaluate(network, toy_data(), torch.device("cpu")) == complete.accuracy()


def test_training_a_complete_run_again_opens_it(complete: Run) -> None:
    before = (complete.path / WEIGHTS_FILE).stat().st_mtime_ns
    assert train_run(toy_config(), toy_data(), complete.path, QUIET, "toy") == complete
    assert (complete.path / WEIGHTS_FILE).stat().st_mtime_ns == before


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(
    complete: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(1, tmp_path / "run", monkeypatch)
    resumed = train_run(toy_config(), toy_data(), tmp_path / "run", QUIET, "toy")
    expected, found = complete.load_network().state_dict(), resumed.load_network().state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    losses = [[line["loss"] for line in run.metrics] for run in (complete, resumed)]
    assert losses[0] == losses[1]


def test_an_interrupted_run_is_not_taken_for_a_complete_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(2, tmp_path / "run", monkeypatch)
    with pytest.raises(RunError, match=r"no weights.safetensors: its training stopped after 2 of 4 epochs. Give the"):
        open_run(tmp_path / "run")


def test_a_crash_while_a_file_is_written_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(2, tmp_path / "run", monkeypatch)
    checkpoint = (tmp_path / "run" / CHECKPOINT_FILE).read_bytes()

    def full_disk(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "replace", full_disk)
        train_run(toy_config(), toy_data(), tmp_path / "run", QUIET, "toy")
    assert (tmp_path / "run" / CHECKPOINT_FILE).read_bytes() == checkpoint
    assert len((tmp_path / "run" / METRICS_FILE).read_text().splitlines()) == 2
    assert not list((tmp_path / "run").rglob("*.part"))


def test_metrics_that_are_ahead_of_the_checkpoint_are_not_kept_twice(
    complete: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(2, tmp_path / "run", monkeypatch)
    metrics = tmp_path / "run" / METRICS_FILE
    metrics.write_text(metrics.read_text() + json.dumps({"epoch": 3, "loss": 9.0}) + "\n")
    resumed = train_run(toy_config(), toy_data(), tmp_path / "run", QUIET, "toy")
    assert [line["epoch"] for line in resumed.metrics] == [1, 2, 3, 4]


def test_a_damaged_checkpoint_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(1, tmp_path / "run", monkeypatch)
    (tmp_path / "run" / CHECKPOINT_FILE).write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    with pytest.raises(RunError, match=r"state.safetensors is damaged .*; remove .* and train again"):
        train_run(toy_config(), toy_data(), tmp_path / "run", QUIET, "toy")


def test_another_configuration_is_refused_by_field(complete: Run) -> None:
    with pytest.raises(RunError, match=r"another configuration \(seed is 0, asked for 5\); give another --out"):
        train_run(toy_config(seed=5), toy_data(), complete.path, QUIET, "toy")


def test_other_images_are_refused(complete: Run) -> None:
    with pytest.raises(RunError, match="was trained on other images"):
        train_run(toy_config(), toy_data(train_counts=(20, 10, 3)), complete.path, QUIET, "toy")


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(RunError, match="is not empty and no run folder; give another --out"):
        train_run(toy_config(), toy_data(), tmp_path, QUIET, "toy")
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_a_folder_that_does_not_exist_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no such directory\. Make one with: ltkd train"):
        open_run(tmp_path / "nothing")


def test_weights_of_another_network_are_refused(complete: Run, tmp_path: Path) -> None:
    config = json.loads((complete.path / "config.json").read_text())
    for file in complete.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model": "resnet14"}))
    with pytest.raises(RunError, match=r"weights.safetensors is no resnet14 .*; train again"):
        open_run(tmp_path).load_network()


def test_a_student_learns_from_the_teachers_run_and_notes_its_weights(complete: Run, tmp_path: Path) -> None:
    config = toy_config("ltkd", teacher=complete)
    student = train_run(config, toy_data(), tmp_path / "student", QUIET, "toy")
    assert student.config.teacher == complete.path
    assert student.config.teacher_weights_sha256 == runs.sha256_of(complete.weights_path)
    plain = train_run(toy_config(), toy_data(), tmp_path / "plain", QUIET, "toy")
    assert student.metrics[-1]["loss"] != plain.metrics[-1]["loss"]


def test_a_teacher_of_another_task_is_refused(complete: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="was trained on other images or groups"):
        train_run(toy_config("kd", teacher=complete), toy_data((9, 6, 3)), tmp_path / "student", QUIET, "toy")
    assert not (tmp_path / "student").exists()


def test_a_method_that_needs_a_teacher_is_refused_without_one() -> None:
    with pytest.raises(UsageError, match="method 'ltkd' needs a teacher; use: ltkd distill TEACHER --method ltkd"):
        toy_config("ltkd")
