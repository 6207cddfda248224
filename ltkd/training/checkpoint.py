"""The checkpoint: everything needed to resume a training with the same result as without the interruption.

It is one safetensors file. The tensors are the student's weights and buffers, the optimiser's momentum and, for every
rank, the random state and the losses of the current epoch. The header has the position in the training and the gradient
scale. The learning rate and the order and augmentation of the images depend on the step and the seed alone, so they are
not stored.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ltkd.contract.records import write_atomically
from ltkd.errors import RunError
from ltkd.training.distributed import Distributed
from ltkd.training.loop import Position, TrainState


class Checkpoint:
    """Saves and restores the state of one training.

    Args:
        path: The file; its folder is created when the first checkpoint is saved.
        state: The student, its optimiser (SGD with momentum) and the gradient scaler.
        distributed: This process's place in distributed training; rank 0 writes the file, all ranks read it.
    """

    def __init__(self, path: Path, state: TrainState, distributed: Distributed | None = None) -> None:
        self._path, self._distributed = path, distributed or Distributed()
        self._student, self._optimizer, self._scaler = state.student, state.optimizer, state.scaler

    def save(self, position: Position) -> None:
        """Save a checkpoint, replacing the previous one; every rank must call this method.

        The file is replaced atomically. Weights that are no longer finite are not saved, so the last good checkpoint
        remains; the training is about to stop with an error.

        Raises:
            OSError: The file cannot be written.
        """
        this_rank = {"losses": position.losses.cpu(), "random.cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            this_rank["random.cuda"] = torch.cuda.get_rng_state()
        all_ranks = self._distributed.all_gather(this_rank)
        if not self._distributed.is_main:
            return
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._student.named_parameters():
            momentum = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{name}"] = momentum
        for number, rank in enumerate(all_ranks):
            tensors |= {f"rank{number}.{name}": tensor for name, tensor in rank.items()}
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()) or not self._student.is_finite():
            return
        tensors |= self._student.state_dict()
        header = {
            "epoch": str(position.epoch),
            "step": str(position.step),
            "scaler": json.dumps(self._scaler.state_dict()),
        }
        self._path.parent.mkdir(exist_ok=True)
        write_atomically(self._path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, header))

    def load(self) -> Position:
        """Restore the saved state and return the position; without a file, return the start and change nothing.

        Raises:
            RunError: The file is damaged or belongs to another training.
        """
        if not self._path.is_file():
            return Position()
        try:
            with safe_open(self._path, framework="pt") as file:
                header = file.metadata()
            tensors = load_file(self._path)
            momentum = _pop_prefix("momentum.", tensors)
            all_ranks = [_pop_prefix(f"rank{number}.", tensors) for number in range(self._distributed.size)]
            this_rank = all_ranks[self._distributed.rank]
            self._student.load_state_dict(tensors)
            for name, parameter in self._student.named_parameters():
                if name in momentum:
                    buffer = momentum[name].to(parameter.device)
                    if buffer.dim() == 4:
                        buffer = buffer.to(memory_format=torch.channels_last)
                    self._optimizer.state[parameter]["momentum_buffer"] = buffer
            self._scaler.load_state_dict(json.loads(header["scaler"]))
            position = Position(int(header["epoch"]), int(header["step"]), this_rank["losses"])
            torch.set_rng_state(this_rank["random.cpu"])
            if "random.cuda" in this_rank and torch.cuda.is_available():
                torch.cuda.set_rng_state(this_rank["random.cuda"])
        except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError, OSError) as reason:
            problem = str(reason).splitlines()[0]
            run = self._path.parent.parent
            raise RunError(f"{self._path} is damaged ({problem}); remove {run} and train again.") from None
        return position


def _pop_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the tensors whose names start with the prefix, and return them without it."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}
