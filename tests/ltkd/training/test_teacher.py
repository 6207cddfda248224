import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_toys import CPU, RECIPE, ToyNet, toy_config, toy_data

from ltkd.config import Execution
from ltkd.errors import RunError
from ltkd.models.registry import seeded
from ltkd.training import run as run_module
from ltkd.training import teacher
from ltkd.training.run import LOGITS_FOLDER, train_run
from ltkd.training.run_folder import Run
from ltkd.training.teacher import CachedTeacher, Teacher, TeacherOutput

QUIET = Console(quiet=True)
NUM_IMAGES = len(toy_data().train_labels)


class StoppedError(Exception):
    """Simulates an interruption."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_run(toy_config(), toy_data(), tmp_path_factory.mktemp("runs") / "teacher", QUIET, "toy")


@pytest.fixture
def teacher_run(trained: Run) -> Iterator[Run]:
    yield trained
    shutil.rmtree(trained.path / LOGITS_FOLDER, ignore_errors=True)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images in every forward pass of the teacher's network."""
    counts: list[int] = []
    original = Teacher.__call__

    def counted(self: Teacher, image_B3SS: Tensor, rows_B: Tensor) -> TeacherOutput:
        counts.append(len(rows_B))
        return original(self, image_B3SS, rows_B)

    monkeypatch.setattr(Teacher, "__call__", counted)
    return counts


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cached_logits_equal_those_of_a_fresh_pass_to_the_bit_over_a_whole_run(
    teacher_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    execution = Execution.model_validate({"device": "cpu", "precision": precision})
    config = toy_config("kd", teacher=teacher_run, teacher_views=RECIPE.epochs, execution=execution)
    first = train_run(config, toy_data(), tmp_path / "first", QUIET, "toy")  # runs the teacher
    original, equal = CachedTeacher.__call__, []

    def compared(self: CachedTeacher, image_B3SS: Tensor, rows_B: Tensor) -> TeacherOutput:
        cached_BC, _ = original(self, image_B3SS, rows_B)
        fresh_BC, _ = Teacher.__call__(self, image_B3SS, rows_B)
        equal.append(torch.equal(cached_BC, fresh_BC) and cached_BC.dtype == fresh_BC.dtype)
        return cached_BC, ()

    monkeypatch.setattr(CachedTeacher, "__call__", compared)
    second = train_run(config, toy_data(), tmp_path / "second", QUIET, "toy")  # reads the cached logits
    assert equal == [True] * (RECIPE.epochs * 5)
    assert first.weights_path.read_bytes() == second.weights_path.read_bytes()


def test_the_second_student_of_a_seed_needs_no_teacher_pass(
    teacher_run: Run, tmp_path: Path, passes: list[int]
) -> None:
    for number, method in enumerate(("kd", "ltkd", "dkd")):
        config = toy_config(method, teacher=teacher_run, teacher_views=2)
        train_run(config, toy_data(), tmp_path / method, QUIET, "toy")
        # two views of every image, although the recipe has four epochs; later students add none
        assert sum(passes) == 2 * NUM_IMAGES, f"student {number}"
    train_run(
        toy_config("kd", seed=1, teacher=teacher_run, teacher_views=2), toy_data(), tmp_path / "kd1", QUIET, "toy"
    )
    assert sum(passes) == 4 * NUM_IMAGES  # another seed has other views


def test_every_precision_has_its_own_cached_views(teacher_run: Run, tmp_path: Path, passes: list[int]) -> None:
    for execution in (CPU, Execution(device="cpu", precision="bfloat16")):
        config = toy_config("kd", teacher=teacher_run, teacher_views=1, execution=execution)
        train_run(config, toy_data(), tmp_path / execution.precision, QUIET, "toy")
    assert sum(passes) == 2 * NUM_IMAGES


def test_a_view_is_not_cached_if_the_training_resumed_within_its_epoch(
    teacher_run: Run, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "SAVE_EVERY_S", 0.0)
    config = toy_config("kd", teacher=teacher_run, teacher_views=RECIPE.epochs)
    step, steps = torch.optim.SGD.step, []

    def stop_after_eight(self: torch.optim.SGD) -> None:
        step(self)
        steps.append(1)
        if len(steps) == 8:
            raise StoppedError

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(torch.optim.SGD, "step", stop_after_eight)
        train_run(config, toy_data(), tmp_path / "interrupted", QUIET, "toy")
    resumed = train_run(config, toy_data(), tmp_path / "interrupted", QUIET, "toy")
    cached = sorted(path.name for path in (teacher_run.path / LOGITS_FOLDER).iterdir())
    assert cached == [f"seed0-batch8-view{view}-float32.safetensors" for view in (0, 2, 3)]
    passes.clear()
    whole = train_run(config, toy_data(), tmp_path / "whole", QUIET, "toy")
    assert sum(passes) == NUM_IMAGES  # the second view, which is now cached
    assert len(list((teacher_run.path / LOGITS_FOLDER).iterdir())) == RECIPE.epochs
    assert resumed.weights_path.read_bytes() == whole.weights_path.read_bytes()


@pytest.mark.parametrize("damage", ["truncated", "of other images", "without logits"])
def test_damaged_logits_raise_an_error_of_one_line(teacher_run: Run, tmp_path: Path, damage: str) -> None:
    config = toy_config("kd", teacher=teacher_run, teacher_views=1)
    train_run(config, toy_data(), tmp_path / "first", QUIET, "toy")
    (file,) = (teacher_run.path / LOGITS_FOLDER).iterdir()
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:50])
    elif damage == "of other images":
        save_file({"logits": load_file(file)["logits"][1:].clone()}, file)
    else:
        save_file({"other": torch.zeros(1)}, file)
    with pytest.raises(RunError, match=r"view0-float32.safetensors is damaged \(.+\); remove it and run the same"):
        train_run(config, toy_data(), tmp_path / "second", QUIET, "toy")
    file.unlink()
    train_run(config, toy_data(), tmp_path / "second", QUIET, "toy")


def test_a_teacher_learns_nothing_and_keeps_its_running_statistics() -> None:
    with seeded(0):
        network = ToyNet().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    logits, features = Teacher(network, CPU)(torch.randn(4, 3, 8, 8), torch.arange(4))
    assert not logits.requires_grad and features == ()
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_a_teacher_in_half_precision_returns_half_precision_logits() -> None:
    half = Execution(device="cpu", precision="bfloat16")
    logits, _ = Teacher(ToyNet(), half)(torch.randn(4, 3, 8, 8), torch.arange(4))
    assert logits.dtype == teacher.HALF["bfloat16"]
