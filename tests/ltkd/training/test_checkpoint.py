from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from training_toys import toy_train_state

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


def trained_state(seed: int, network: nn.Module | None = None, scaler_enabled: bool = False) -> TrainState:
    """A training state after one step."""
    torch.manual_seed(seed)
    state = toy_train_state(network)
    state = TrainState(
        state.student, state.optimizer, torch.amp.GradScaler("cpu", init_scale=128.0, enabled=scaler_enabled)
    )
    for parameter in state.student.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()
    return state


def as_tuple(position: Position) -> tuple[int, int, list[float]]:
    return position.epoch, position.step, position.losses.tolist()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint" / "state.safetensors"


def test_without_a_file_load_returns_the_start_and_changes_nothing(path: Path) -> None:
    state = trained_state(0)
    before = {name: tensor.clone() for name, tensor in state.student.state_dict().items()}
    random = torch.get_rng_state()
    assert as_tuple(Checkpoint(path, state).load()) == (0, 0, [])
    assert all(torch.equal(before[name], tensor) for name, tensor in state.student.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_restored_state_is_identical_to_the_bit(path: Path) -> None:
    saved = trained_state(0, scaler_enabled=True)
    saved.scaler.scale(torch.tensor(1.0))
    saved.scaler.update(96.5)
    Checkpoint(path, saved).save(Position(2, 3, torch.tensor([1.5, 0.5, 0.25])))
    next_random = torch.rand(3)

    loaded = trained_state(1, scaler_enabled=True)
    position = Checkpoint(path, loaded).load()
    assert as_tuple(position) == (2, 3, [1.5, 0.5, 0.25])
    assert torch.equal(torch.rand(3), next_random)
    assert loaded.scaler.get_scale() == 96.5
    expected, found = saved.student.state_dict(), loaded.student.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for before, after in zip(saved.student.parameters(), loaded.student.parameters(), strict=True):
        momenta = [saved.optimizer.state[before], loaded.optimizer.state[after]]
        assert torch.equal(momenta[0]["momentum_buffer"], momenta[1]["momentum_buffer"])


def test_a_training_without_momentum_has_a_checkpoint_too(path: Path) -> None:
    state = toy_train_state()
    Checkpoint(path, state).save(Position(1))
    assert as_tuple(Checkpoint(path, toy_train_state()).load()) == (1, 0, [])


@pytest.mark.parametrize("where", ["weight", "running statistic", "momentum", "loss"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_never_saved(path: Path, where: str, value: float) -> None:
    state = trained_state(0)
    checkpoint = Checkpoint(path, state)
    checkpoint.save(Position(1))
    before = path.read_bytes()
    losses = torch.zeros(2)
    network = state.student.network
    with torch.no_grad():
        if where == "weight":
            next(network.parameters())[0] = value
        elif where == "running statistic":
            network.state_dict()["bn.running_var"][0] = value
        elif where == "momentum":
            next(iter(state.optimizer.state.values()))["momentum_buffer"][0] = value
        else:
            losses[1] = value
    checkpoint.save(Position(1, 2, losses))
    assert path.read_bytes() == before


def test_a_state_with_an_infinite_constant_is_saved(path: Path) -> None:
    Checkpoint(path, trained_state(0, Masked())).save(Position(1))
    assert load_file(path)["network.mask"].tolist() == [0.0, -torch.inf]
    assert Checkpoint(path, trained_state(1, Masked())).load().epoch == 1


def test_a_failed_write_leaves_the_previous_checkpoint(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(path, trained_state(0))
    checkpoint.save(Position(1))
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(Position(2))
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_every_kind_of_damage_raises_one_clear_error(path: Path) -> None:
    Checkpoint(path, trained_state(0)).save(Position(1, 1, torch.zeros(1)))
    content = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)

    def assert_rejected() -> None:
        with pytest.raises(RunError, match=r"state.safetensors is damaged \(.+\); remove .* and train again"):
            Checkpoint(path, toy_train_state()).load()

    for size in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert_rejected()
    for name in ("rank0.losses", "rank0.random.cpu", "network.bn.running_mean"):
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, path, header)
        assert_rejected()
    save_file(tensors | {"network.more": torch.zeros(1)}, path, header)
    assert_rejected()
    save_file(tensors | {"rank0.random.cpu": torch.zeros(3, dtype=torch.uint8)}, path, header)
    assert_rejected()
    for changed in (None, {"epoch": "1"}, header | {"step": "many"}, header | {"scaler": "{"}):
        save_file(tensors, path, changed)
        assert_rejected()
