"""The training loop of teachers and students, on one device or distributed, and the evaluation on the test set.

``run`` calls it and writes the run folder.

Shape legend: B images in the batch, N images in the set, S side in pixels, C classes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ltkd.config import Execution, Recipe
from ltkd.contract.metrics import accuracy_by_group
from ltkd.data.batches import Batches
from ltkd.data.datasets import Dataset
from ltkd.data.image_files import Images
from ltkd.errors import TrainingError
from ltkd.methods.registry import ClassStatistics, LossInputs, Method
from ltkd.methods.reviewkd import ReviewFusion
from ltkd.models.registry import Normalise
from ltkd.training.distributed import Distributed
from ltkd.training.schedules import learning_rate
from ltkd.training.teacher import Teacher, autocast

EVAL_BATCH = 256
CHECK_EVERY = 200  # steps between two checks that the losses are finite; each check waits for the device


class Student(nn.Module):
    """A network in training, with the layers that its method adds during the training.

    Args:
        network: Takes normalised images and returns logits.
        fusion: Converts the feature maps to the teacher's shapes, for methods that compare features.
    """

    def __init__(self, network: nn.Module, fusion: ReviewFusion | None = None) -> None:
        super().__init__()
        self.network, self.fusion = network, fusion

    def forward(self, image: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Logits [N, C] and, if there is a fusion, the fused feature maps."""
        if self.fusion is None:
            return self.network(image), ()
        features = self.network.features(image)  # type: ignore[operator]
        return self.network.classifier(features[-1]), self.fusion(features)  # type: ignore[operator]

    def is_finite(self) -> bool:
        """Whether every weight and running statistic is finite; other buffers, such as masks, may be infinite."""
        statistics = [buffer for name, buffer in self.named_buffers() if name.endswith(("running_mean", "running_var"))]
        return all(bool(tensor.isfinite().all()) for tensor in (*self.parameters(), *statistics))


@dataclass(frozen=True)
class TrainState:
    """A student and what updates it.

    Attributes:
        student: The network that is trained.
        optimizer: Over the student's parameters; its learning rate is set before every step.
        scaler: Scales the gradients of float16; disabled for other precisions.
    """

    student: Student
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


@dataclass
class Position:
    """How far a training has come; part of every checkpoint.

    Attributes:
        epoch: Complete epochs.
        step: Complete steps of the current epoch.
        losses: The losses of those steps.
    """

    epoch: int = 0
    step: int = 0
    losses: Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass(frozen=True)
class EpochReport:
    """The results of one epoch.

    Attributes:
        epoch: Number of the epoch, counted from 1.
        loss: Mean of the method's loss over the epoch's steps.
        learning_rate: Learning rate of the epoch's last step.
        images_per_s: Training throughput, without the evaluation.
        accuracy: Test accuracy, a fraction, by group and over all; None if the recipe skips the evaluation.
    """

    epoch: int
    loss: float
    learning_rate: float
    images_per_s: float
    accuracy: dict[str, float] | None

    def as_flat(self) -> dict[str, float | int]:
        """One flat JSON object, the form of a line in metrics.jsonl."""
        flat: dict[str, float | int] = {
            "epoch": self.epoch,
            "loss": self.loss,
            "learning_rate": self.learning_rate,
            "images_per_s": round(self.images_per_s, 1),
        }
        return {**flat, **{f"accuracy_{name}": value for name, value in (self.accuracy or {}).items()}}


def train(
    state: TrainState,
    data: Dataset,
    batches: Batches,
    method: Method,
    recipe: Recipe,
    *,
    teacher: Teacher | None,
    execution: Execution,
    distributed: Distributed | None = None,
    start: Position | None = None,
    on_step: Callable[[Position, int], None] = lambda position, num_images: None,
) -> Iterator[EpochReport]:
    """Train a student in place and report after every epoch.

    Args:
        state: The student and its optimiser. The student is already on the device.
        data: Labels, groups and the test images.
        batches: Training images. The images of an epoch depend on its number alone, so a resumed training has the same
            result as one that was never interrupted.
        method: Computes the loss.
        recipe: Number of epochs and learning rates.
        teacher: Computes the teacher's logits, for methods that need them.
        execution: Device, and precision of the forward passes.
        distributed: This process's place in distributed training; None for one process.
        start: Position of the checkpoint to resume from.
        on_step: Called after every step with the position and the number of images in the step.

    Raises:
        TrainingError: The loss is no longer finite.
    """
    distributed = distributed or Distributed()
    device = torch.device(execution.device)
    student, optimizer, scaler = state.student, state.optimizer, state.scaler
    labels_N = torch.from_numpy(data.train_labels).to(device)
    classes = ClassStatistics(data.task).to(device)
    normalise = Normalise(data.task).to(device)
    parallel = distributed.parallel(student, device)
    steps_per_epoch = batches.steps_per_epoch
    num_steps = recipe.epochs * steps_per_epoch
    start = start or Position()
    previous_losses = start.losses

    for epoch in range(start.epoch, recipe.epochs):
        student.train()
        first_step = len(previous_losses)
        losses = torch.zeros(steps_per_epoch, device=device)
        losses[:first_step] = previous_losses.to(device)
        previous_losses = torch.zeros(0)
        if teacher is not None:
            teacher.start_epoch(epoch)
        rows_of_step: dict[int, Tensor] = {}
        num_images, started_at = 0, time.perf_counter()
        for step, (pixels_BSS3, rows_B) in enumerate(batches.epoch(epoch, first_step), start=first_step):
            steps_done = epoch * steps_per_epoch + step
            image_B3SS = normalise(pixels_BSS3)
            teacher_BC, teacher_features = teacher(image_B3SS, rows_B) if teacher is not None else (None, ())
            with autocast(device, execution.precision):
                logits_BC, features = parallel(image_B3SS)
            loss = method(
                LossInputs(
                    logits_BC,
                    teacher_BC,
                    labels_N[rows_B.to(device, non_blocking=True)],
                    classes,
                    progress=steps_done / num_steps,
                    student_features=features,
                    teacher_features=teacher_features,
                )
            )
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate(recipe, steps_done, steps_per_epoch)
            optimizer.zero_grad()
            loss = distributed.scale_loss(loss, len(rows_B))
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            losses[step] = loss.detach()
            rows_of_step[step] = rows_B
            num_images += len(rows_B)
            if (step + 1) % CHECK_EVERY == 0:
                error = _non_finite_loss(losses[: step + 1], epoch, rows_of_step, data, optimizer)
                distributed.raise_on_all(error)
            if step + 1 < steps_per_epoch:  # for the last step, on_step follows the report of the epoch
                on_step(Position(epoch, step + 1, losses[: step + 1]), distributed.size * len(rows_B))
        distributed.raise_on_all(_non_finite_loss(losses, epoch, rows_of_step, data, optimizer))
        if not student.is_finite():
            raise TrainingError(
                f"the weights are no longer finite after epoch {epoch + 1}, although its losses were: the learning "
                "rate is too high; lower the recipe's peak learning rate."
            )
        if teacher is not None:
            teacher.end_epoch()
        images_per_s = distributed.size * num_images / (time.perf_counter() - started_at)
        evaluation_due = (epoch + 1) % recipe.eval_every == 0 or epoch + 1 == recipe.epochs
        yield EpochReport(
            epoch=epoch + 1,
            loss=distributed.all_reduce_mean(losses.mean()),
            learning_rate=optimizer.param_groups[0]["lr"],
            images_per_s=images_per_s,
            accuracy=evaluate(student.network, data, device, distributed) if evaluation_due else None,
        )
        on_step(Position(epoch + 1), distributed.size * len(rows_B))


def _non_finite_loss(
    losses: Tensor, epoch: int, rows_of_step: dict[int, Tensor], data: Dataset, optimizer: torch.optim.Optimizer
) -> TrainingError | None:
    """The error for the first loss that is not finite, with its most likely cause; None if all losses are finite.

    ``rows_of_step`` has the training rows of every step of this epoch since the training was started or resumed.
    """
    bad_steps = (~losses.isfinite()).nonzero()
    if not len(bad_steps):
        return None
    step = int(bad_steps[0])
    before = losses[max(0, step - 20) : step].tolist()
    rows = rows_of_step[step]
    images = [str(data.train_files[row]) if data.train_files else f"number {row}" for row in rows[:3].tolist()]
    if epoch == 0 and step == 0:
        cause = "it is the first loss: the weights of teacher or student are damaged, or a parameter is far too large"
    elif before and before[-1] > 2 * min(before):
        cause = "the loss was rising before: the learning rate is too high; lower the recipe's peak learning rate"
    else:
        cause = "it happened suddenly: check the images, and the precision if it is not float32"
    return TrainingError(
        f"the loss became {float(losses[step])} in epoch {epoch + 1}, step {step + 1}, at "
        f"learning rate {optimizer.param_groups[0]['lr']:.3g}, on a batch of {len(rows)} training images (the first: "
        f"{', '.join(images)}). Losses before it: {', '.join(f'{loss:.3g}' for loss in before[-5:]) or 'none'}. "
        f"Likely cause: {cause}."
    )


def evaluate(
    network: nn.Module, data: Dataset, device: torch.device, distributed: Distributed | None = None
) -> dict[str, float]:
    """Accuracy on the test set by group and over all; in distributed training each rank evaluates a part."""
    distributed = distributed or Distributed()
    distributed.broadcast_buffers(network)
    whole = nn.Sequential(Normalise(data.task), network).to(device)
    rows_N = np.arange(distributed.rank, len(data.test_labels), distributed.size)
    predicted_N = distributed.gather_interleaved(predict(whole, data.test_images, rows_N).argmax(1))
    return accuracy_by_group(predicted_N, data.test_labels, data.task.groups)


@torch.inference_mode()
def predict(network: nn.Module, images: Images, rows_N: NDArray[np.int64] | None = None) -> NDArray[np.floating]:
    """Compute the logits [N, C] of images in evaluation mode; the network's mode is restored afterwards.

    Args:
        network: Takes uint8 [B, S, S, 3].
        images: The images.
        rows_N: Rows of the images to evaluate; None means all.
    """
    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    starts = range(0, len(images) if rows_N is None else len(rows_N), EVAL_BATCH)
    logits = []
    for start in starts:
        batch = slice(start, start + EVAL_BATCH) if rows_N is None else rows_N[start : start + EVAL_BATCH]
        logits.append(network(torch.from_numpy(images[batch]).to(device)).float().cpu())
    network.train(was_training)
    return np.asarray(torch.cat(logits).numpy())
