"""The teacher's forward pass in a training step: frozen weights, evaluation mode, optionally with cached logits.

Shape legend: B images in the batch, N images in the set, S side in pixels, C classes.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ltkd.config import ComputePrecision, Execution
from ltkd.contract.records import write_atomically
from ltkd.errors import RunError

HALF: dict[ComputePrecision, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}

TeacherOutput = tuple[Tensor, Sequence[Tensor]]


def autocast(device: torch.device, precision: ComputePrecision) -> torch.autocast:
    """The context of a forward pass in the given precision."""
    return torch.autocast(device.type, HALF.get(precision), enabled=precision in HALF)


class Teacher:
    """Computes a teacher's logits and, if requested, its feature maps.

    Args:
        network: Takes normalised images. It is moved to the device, set to evaluation mode and never updated.
        execution: Device, precision and whether to compile; compiling fuses each convolution with its batch norm.
        with_features: Whether to return feature maps too; the network must then have ``features`` and ``classifier``.
    """

    def __init__(self, network: nn.Module, execution: Execution, *, with_features: bool = False) -> None:
        self._device, self._precision = torch.device(execution.device), execution.precision
        self._network = network.to(self._device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self._with_features = with_features
        if execution.compiled:
            self._network.compile(options={"freezing": True})

    def start_epoch(self, epoch: int) -> None:
        """Prepare for an epoch; called before its first step, or before the first step after resuming in it."""

    def end_epoch(self) -> None:
        """Finish an epoch; called after its last step."""

    def __call__(self, image_B3SS: Tensor, rows_B: Tensor) -> TeacherOutput:
        """The teacher's logits and features for normalised images, which are these rows of the training set."""
        # no_grad also when compiled, because inductor freezes weights only under no_grad
        with torch.no_grad(), autocast(self._device, self._precision):
            if not self._with_features:
                return self._network(image_B3SS), ()
            features = self._network.features(image_B3SS)  # type: ignore[operator]
            return self._network.classifier(features[-1]), features  # type: ignore[operator]


class CachedTeacher(Teacher):
    """A teacher whose logits are cached on disk, for later epochs and students that use the same augmented views.

    Every image has ``views`` fixed views, and epoch e uses view ``e % views``. The teacher's network runs in the first
    epoch that uses a view; later epochs read the logits from disk. The student's images differ from those without a
    cache only if ``views`` is less than the number of epochs. Students with one seed and batch size share the files.

    Args:
        network: As in ``Teacher``.
        execution: As in ``Teacher``.
        folder: Folder of the cached logits, one file per view.
        drawn_by: Identifies the random draws of the views (seed and batch size); part of the file names.
        num_images: N.
        views: Number of views per image.
    """

    def __init__(
        self,
        network: nn.Module,
        execution: Execution,
        folder: Path,
        *,
        view_source: str,
        num_images: int,
        views: int,
    ) -> None:
        super().__init__(network, execution)
        self._folder, self._drawn_by, self._num_images, self._views = folder, view_source, num_images, views
        self._file = folder
        self._is_cached = False
        self._logits_NC = torch.empty(0)
        self._has_logits_N = torch.zeros(0, dtype=torch.bool)

    def start_epoch(self, epoch: int) -> None:
        """Read the cached logits of this epoch's view, or prepare to collect them.

        Raises:
            RunError: The file of the view is damaged.
        """
        self._file = self._folder / f"{self._drawn_by}-view{epoch % self._views}-{self._precision}.safetensors"
        self._is_cached = self._file.is_file()
        if self._is_cached:
            self._logits_NC = self._read().to(self._device)
        self._has_logits_N = torch.zeros(self._num_images, dtype=torch.bool)

    def _read(self) -> Tensor:
        try:
            logits_NC = load_file(self._file)["logits"]
        except (SafetensorError, KeyError, OSError) as reason:
            problem = str(reason).splitlines()[0]
        else:
            if len(logits_NC) == self._num_images:
                return logits_NC
            problem = f"{len(logits_NC)} rows for {self._num_images} images"
        raise RunError(f"{self._file} is damaged ({problem}); remove it and run the same command again.")

    def __call__(self, image_B3SS: Tensor, rows_B: Tensor) -> TeacherOutput:
        """The cached logits if the view has a file, otherwise the network's logits."""
        if self._is_cached:
            return self._logits_NC[rows_B.to(self._device)], ()
        logits_BC, _ = super().__call__(image_B3SS, rows_B)
        if not self._has_logits_N.any():
            self._logits_NC = logits_BC.new_empty((self._num_images, logits_BC.shape[1]))
        self._logits_NC[rows_B.to(self._device)] = logits_BC
        self._has_logits_N[rows_B] = True
        return logits_BC, ()

    def end_epoch(self) -> None:
        """Save the view's logits if they are complete; they are not if the training was resumed within this epoch."""
        if not self._is_cached and self._has_logits_N.all():
            self._folder.mkdir(exist_ok=True)
            write_atomically(self._file, save({"logits": self._logits_NC}))
