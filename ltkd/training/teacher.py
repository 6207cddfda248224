"""The teacher's side of a training step: frozen, in evaluation mode, at the least cost.

Shape legend: B images in the batch, N images in the set, S pixels a side, C classes.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ltkd.config import ComputePrecision, Execution
from ltkd.contract.records import write_whole
from ltkd.errors import RunError

HALF: dict[ComputePrecision, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}

TeacherOutput = tuple[Tensor, Sequence[Tensor]]


def autocast(device: torch.device, precision: ComputePrecision) -> torch.autocast:
    """The context of a forward pass."""
    return torch.autocast(device.type, HALF.get(precision), enabled=precision in HALF)


class Teacher:
    """Logits, and features where asked, of a network that does not learn.

    Args:
        network: Takes normalised images; it is moved, set to evaluation mode and never updated.
        execution: Where and how it runs; compiled, a convolution and its batch norm are one operation.
        with_features: Whether its feature maps are wanted too; it must then have ``features``.
    """

    def __init__(self, network: nn.Module, execution: Execution, *, with_features: bool = False) -> None:
        self._device, self._precision = torch.device(execution.device), execution.precision
        self._network = network.to(self._device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self._with_features = with_features
        if execution.compiled:
            self._network.compile(options={"freezing": True})

    def start_epoch(self, epoch: int) -> None:
        """Told before the first step of an epoch, or of what is left of it."""

    def end_epoch(self) -> None:
        """Told after the last step of an epoch."""

    def __call__(self, image_B3SS: Tensor, rows_B: Tensor) -> TeacherOutput:
        """What the teacher says of the normalised images at these rows of the training set."""
        # no_grad where compiled: inductor freezes weights only there
        with torch.no_grad(), autocast(self._device, self._precision):
            if not self._with_features:
                return self._network(image_B3SS), ()
            features = self._network.features(image_B3SS)  # type: ignore[operator]
            return self._network.classifier(features[-1]), features  # type: ignore[operator]


class CachedTeacher(Teacher):
    """A teacher whose logits of an epoch are kept, for epochs and students that see the same images again.

    With ``views`` fixed views of every image, epoch e shows view ``e % views``: the teacher runs in the first epoch
    that shows a view and is read from disk after that. It changes what a student sees only where ``views`` is less than
    the number of epochs; students with one seed and batch size share the files.

    Args:
        network: As in ``Teacher``, like ``execution``.
        execution: Where and how it runs.
        folder: Where the logits are kept, one file a view.
        drawn_by: What the views are drawn from; a part of the files' names.
        num_images: N.
        views: Different views of every image.
    """

    def __init__(
        self,
        network: nn.Module,
        execution: Execution,
        folder: Path,
        *,
        drawn_by: str,
        num_images: int,
        views: int,
    ) -> None:
        super().__init__(network, execution)
        self._folder, self._drawn_by, self._num_images, self._views = folder, drawn_by, num_images, views
        self._file = folder
        self._known = False
        self._logits_NC = torch.empty(0)
        self._seen_N = torch.zeros(0, dtype=torch.bool)

    def start_epoch(self, epoch: int) -> None:
        """Read the view of this epoch, or begin to note it.

        Raises:
            RunError: The file of the view is damaged.
        """
        self._file = self._folder / f"{self._drawn_by}-view{epoch % self._views}-{self._precision}.safetensors"
        self._known = self._file.is_file()
        if self._known:
            self._logits_NC = self._read().to(self._device)
        self._seen_N = torch.zeros(self._num_images, dtype=torch.bool)

    def _read(self) -> Tensor:
        try:
            logits_NC = load_file(self._file)["logits"]
        except (SafetensorError, KeyError, OSError) as reason:
            problem = str(reason).splitlines()[0]
        else:
            if len(logits_NC) == self._num_images:
                return logits_NC
            problem = f"{len(logits_NC)} rows for {self._num_images} images"
        raise RunError(f"{self._file} is damaged ({problem}); remove it, and the same command asks the teacher again.")

    def __call__(self, image_B3SS: Tensor, rows_B: Tensor) -> TeacherOutput:
        """The kept logits where the view is known, otherwise the network's."""
        if self._known:
            return self._logits_NC[rows_B.to(self._device)], ()
        logits_BC, _ = super().__call__(image_B3SS, rows_B)
        if not self._seen_N.any():
            self._logits_NC = logits_BC.new_empty((self._num_images, logits_BC.shape[1]))
        self._logits_NC[rows_B.to(self._device)] = logits_BC
        self._seen_N[rows_B] = True
        return logits_BC, ()

    def end_epoch(self) -> None:
        """Keep the view if every image of it was seen; after a training that went on in mid-epoch it was not."""
        if not self._known and self._seen_N.all():
            self._folder.mkdir(exist_ok=True)
            write_whole(self._file, save({"logits": self._logits_NC}))
