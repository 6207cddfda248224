from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from training_toys import toy_learner

from ltkd.errors import RunError
from ltkd.training.checkpoint import Checkpoint
from ltkd.training.loop import Position, TrainState


class Masked(nn.Module):
    """A convolution, and a constant buffer that is infinite from the start."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 2, 3)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))


def learned(seed: int, network: nn.Module | None = None, scaler_enabled: bool = False) -> TrainState:
    """A learner that has made a step."""
    torch.manual_seed(seed)
    learner = toy_learner(network)
    learner = TrainState(
        learner.student, learner.optimizer, torch.amp.GradScaler("cpu", init_scale=128.0, enabled=scaler_enabled)
    )
    for parameter in learner.student.parameters():
        parameter.grad = torch.randn_like(parameter)
    learner.optimizer.step()
    return learner


def stands(progress: Position) -> tuple[int, int, list[float]]:
    return progress.epoch, progress.step, progress.losses.tolist()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint" / "state.safetensors"


def test_without_a_file_the_training_starts_and_nothing_changes(path: Path) -> None:
    learner = learned(0)
    before = {name: tensor.clone() for name, tensor in learner.student.state_dict().items()}
    random = torch.get_rng_state()
    assert stands(Checkpoint(path, learner).load()) == (0, 0, [])
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.student.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_everything_comes_back_to_the_bit(path: Path) -> None:
    saved = learned(0, scaler_enabled=True)
    saved.scaler.scale(torch.tensor(1.0))
    saved.scaler.update(96.5)
    Checkpoint(path, saved).save(Position(2, 3, torch.tensor([1.5, 0.5, 0.25])))
    drawn = torch.rand(3)

    found = learned(1, scaler_enabled=True)
    progress = Checkpoint(path, found).load()
    assert stands(progress) == (2, 3, [1.5, 0.5, 0.25])
    assert torch.equal(torch.rand(3), drawn)
    assert found.scaler.get_scale() == 96.5
    expected, state = saved.student.state_dict(), found.student.state_dict()
    assert all(torch.equal(expected[name], state[name]) for name in expected)
    for before, after in zip(saved.student.parameters(), found.student.parameters(), strict=True):
        momenta = [saved.optimizer.state[before], found.optimizer.state[after]]
        assert torch.equal(momenta[0]["momentum_buffer"], momenta[1]["momentum_buffer"])


def test_a_training_without_momentum_has_a_checkpoint_too(path: Path) -> None:
    learner = toy_learner()
    Checkpoint(path, learner).save(Position(1))
    assert stands(Checkpoint(path, toy_learner()).load()) == (1, 0, [])


@pytest.mark.parametrize("where", ["weight", "running statistic", "momentum", "loss"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_written(path: Path, where: str, value: float) -> None:
    learner = learned(0)
    checkpoint = Checkpoint(path, learner)
    checkpoint.save(Position(1))
    before = path.read_bytes()
    losses = torch.zeros(2)
    network = learner.student.network
    with torch.no_grad():
        if where == "weight":
            next(network.parameters())[0] = value
        elif where == "running statistic":
            network.state_dict()["bn.running_var"][0] = value
        elif where == "momentum":
            next(iter(learner.optimizer.state.values()))["momentum_buffer"][0] = value
        else:
            losses[1] = value
    checkpoint.save(Position(1, 2, losses))
    assert path.read_bytes() == before


def test_a_constant_that_is_infinite_is_written(path: Path) -> None:
    Checkpoint(path, learned(0, Masked())).save(Position(1))
    assert load_file(path)["network.mask"].tolist() == [0.0, -torch.inf]
    assert Checkpoint(path, learned(1, Masked())).load().epoch == 1


def test_a_file_that_cannot_be_written_whole_leaves_the_one_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(path, learned(0))
    checkpoint.save(Position(1))
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(Position(2))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_every_kind_of_damage_is_one_clear_error(path: Path) -> None:
    Checkpoint(path, learned(0)).save(Position(1, 1, torch.zeros(1)))
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)

    def refused() -> None:
        with pytest.raises(RunError, match=r"state.safetensors is damaged \(.+\); remove .* and train again"):
            Checkpoint(path, toy_learner()).load()

    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused()
    for name in ("rank0.losses", "rank0.random.cpu", "network.bn.running_mean"):
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, path, header)
        refused()
    save_file(tensors | {"network.more": torch.zeros(1)}, path, header)
    refused()
    save_file(tensors | {"rank0.random.cpu": torch.zeros(3, dtype=torch.uint8)}, path, header)
    refused()
    for changed in (None, {"epoch": "1"}, header | {"step": "many"}, header | {"scaler": "{"}):
        save_file(tensors, path, changed)
        refused()
