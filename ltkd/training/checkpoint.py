"""The checkpoint: everything a training needs to go on as if it had never stopped.

One safetensors file: the student's tensors, the optimiser's momentum and, of every rank, the random state and the
losses of the running epoch; where the training stands and the gradient scale are in its header. The learning rate and
the order and augmentation of the images depend on the step and the seed alone, so they need no place here.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from ltkd.contract.records import write_whole
from ltkd.errors import RunError
from ltkd.training.distributed import Distributed
from ltkd.training.loop import Position, TrainState


class Checkpoint:
    """One training's place to save itself.

    Args:
        path: The file; its folder is made when it is needed.
        learner: What is trained, by SGD with momentum.
        ranks: The processes that share every batch; rank 0 writes, all read.
    """

    def __init__(self, path: Path, learner: TrainState, ranks: Distributed | None = None) -> None:
        self._path, self._ranks = path, ranks or Distributed()
        self._student, self._optimizer, self._scaler = learner.student, learner.optimizer, learner.scaler

    def save(self, progress: Position) -> None:
        """Write the file whole, or leave the one before; every rank must call it.

        Weights that are no longer finite are not written: the training is about to stop, and what is on disk is good.

        Raises:
            OSError: It cannot be written.
        """
        mine = {"losses": progress.losses.cpu(), "random.cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            mine["random.cuda"] = torch.cuda.get_rng_state()
        of_ranks = self._ranks.all_gather(mine)
        if not self._ranks.is_main:
            return
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._student.named_parameters():
            momentum = self._optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{name}"] = momentum
        for number, rank in enumerate(of_ranks):
            tensors |= {f"rank{number}.{name}": tensor for name, tensor in rank.items()}
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()) or not self._student.is_finite():
            return
        tensors |= self._student.state_dict()
        header = {
            "epoch": str(progress.epoch),
            "step": str(progress.step),
            "scaler": json.dumps(self._scaler.state_dict()),
        }
        self._path.parent.mkdir(exist_ok=True)
        write_whole(self._path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, header))

    def load(self) -> Position:
        """Put everything where the file has it; without a file nothing changes and the training starts.

        Raises:
            RunError: The file is damaged or of another training.
        """
        if not self._path.is_file():
            return Position()
        try:
            with safe_open(self._path, framework="pt") as file:
                header = file.metadata()
            tensors = load_file(self._path)
            momentum = _taken_out("momentum.", tensors)
            mine = [_taken_out(f"rank{number}.", tensors) for number in range(self._ranks.size)][self._ranks.rank]
            self._student.load_state_dict(tensors)
            for name, parameter in self._student.named_parameters():
                if name in momentum:
                    state = momentum[name].to(parameter.device)
                    if state.dim() == 4:
                        state = state.to(memory_format=torch.channels_last)
                    self._optimizer.state[parameter]["momentum_buffer"] = state
            self._scaler.load_state_dict(json.loads(header["scaler"]))
            progress = Position(int(header["epoch"]), int(header["step"]), mine["losses"])
            torch.set_rng_state(mine["random.cpu"])
            if "random.cuda" in mine and torch.cuda.is_available():
                torch.cuda.set_rng_state(mine["random.cuda"])
        except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError, OSError) as reason:
            problem = str(reason).splitlines()[0]
            run = self._path.parent.parent
            raise RunError(f"{self._path} is damaged ({problem}); remove {run} and train again.") from None
        return progress


def _taken_out(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, without the prefix; they are no longer in ``tensors``."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}
