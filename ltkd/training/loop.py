"""The training loop, for teachers and students alike, on one device or as one of several ranks.

Shape legend: B images in the batch, N images in the set, S pixels a side, C classes.
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
LOOK_EVERY = 200  # steps between two looks at the losses; each one waits for the device


class Student(nn.Module):
    """A network that learns, with the layers that its method adds for the time of the training.

    Args:
        network: Takes normalised images and gives logits.
        fusion: Brings its feature maps to the teacher's shapes, for methods that compare features.
    """

    def __init__(self, network: nn.Module, fusion: ReviewFusion | None = None) -> None:
        super().__init__()
        self.network, self.fusion = network, fusion

    def forward(self, image: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Logits [N, C] and, where there is a fusion, the fused feature maps."""
        if self.fusion is None:
            return self.network(image), ()
        features = self.network.features(image)  # type: ignore[operator]
        return self.network.classifier(features[-1]), self.fusion(features)  # type: ignore[operator]

    def is_finite(self) -> bool:
        """Whether every weight and running statistic is finite; other buffers, such as masks, may be infinite."""
        running = [buffer for name, buffer in self.named_buffers() if name.endswith(("running_mean", "running_var"))]
        return all(bool(tensor.isfinite().all()) for tensor in (*self.parameters(), *running))


@dataclass(frozen=True)
class TrainState:
    """A student and what moves it.

    Attributes:
        student: What is trained.
        optimizer: Over the student's parameters; its learning rate is set before every step.
        scaler: Scales the gradients of float16; disabled for other precisions.
    """

    student: Student
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


@dataclass
class Position:
    """Where a training stands; a checkpoint has it.

    Attributes:
        epoch: Whole epochs done.
        step: Steps done of the next one.
        losses: Of those steps.
    """

    epoch: int = 0
    step: int = 0
    losses: Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass(frozen=True)
class EpochReport:
    """What is known after an epoch.

    Attributes:
        epoch: Epochs done, counted from 1.
        loss: Mean over the epoch's steps of what the method minimises.
        learning_rate: Of the epoch's last step.
        images_per_s: Training throughput, without the look at the test set.
        accuracy: Fraction right on the test set by group and over all; None where the recipe skips the look.
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
    learner: TrainState,
    data: Dataset,
    batches: Batches,
    method: Method,
    recipe: Recipe,
    *,
    teacher: Teacher | None,
    execution: Execution,
    ranks: Distributed | None = None,
    start: Position | None = None,
    on_step: Callable[[Position, int], None] = lambda progress, num_images: None,
) -> Iterator[EpochReport]:
    """Train a student in place and report after every epoch.

    Args:
        learner: What is trained. It is on the device already.
        data: Labels, groups and the test images.
        batches: Training images. What an epoch shows depends on its number alone, so a training that goes on from
            a checkpoint ends where one that was never interrupted ends.
        method: What is minimised.
        recipe: How long and how fast.
        teacher: Gives logits where the method needs them.
        execution: Where everything happens, and in which precision the forward passes are made.
        ranks: The processes that share every batch; None where there is one.
        start: Where a checkpoint stands.
        on_step: Told after every step where the training stands and how many images the step had.

    Raises:
        TrainingError: The loss is no longer finite.
    """
    ranks = ranks or Distributed()
    device = torch.device(execution.device)
    student, optimizer, scaler = learner.student, learner.optimizer, learner.scaler
    labels_N = torch.from_numpy(data.train_labels).to(device)
    classes = ClassStatistics(data.task).to(device)
    normalise = Normalise(data.task).to(device)
    parallel = ranks.parallel(student, device)
    steps_per_epoch = batches.steps_per_epoch
    num_steps = recipe.epochs * steps_per_epoch
    start = start or Position()
    loss_so_far = start.losses

    for epoch in range(start.epoch, recipe.epochs):
        student.train()
        first_step = len(loss_so_far)
        losses = torch.zeros(steps_per_epoch, device=device)
        losses[:first_step] = loss_so_far.to(device)
        loss_so_far = torch.zeros(0)
        if teacher is not None:
            teacher.start_epoch(epoch)
        shown: dict[int, Tensor] = {}
        num_images, begin = 0, time.perf_counter()
        for step, (pixels_BSS3, rows_B) in enumerate(batches.epoch(epoch, first_step), start=first_step):
            steps_done = epoch * steps_per_epoch + step
            image_B3SS = normalise(pixels_BSS3)
            taught_BC, taught_features = teacher(image_B3SS, rows_B) if teacher is not None else (None, ())
            with autocast(device, execution.precision):
                logits_BC, features = parallel(image_B3SS)
            loss = method(
                LossInputs(
                    logits_BC,
                    taught_BC,
                    labels_N[rows_B.to(device, non_blocking=True)],
                    classes,
                    progress=steps_done / num_steps,
                    student_features=features,
                    teacher_features=taught_features,
                )
            )
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate(recipe, steps_done, steps_per_epoch)
            optimizer.zero_grad()
            loss = ranks.scale_loss(loss, len(rows_B))
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            losses[step] = loss.detach()
            shown[step] = rows_B
            num_images += len(rows_B)
            if (step + 1) % LOOK_EVERY == 0:
                ranks.raise_on_all(_not_finite(losses[: step + 1], epoch, shown, data, optimizer))
            if step + 1 < steps_per_epoch:  # the report of an epoch is part of its last step
                on_step(Position(epoch, step + 1, losses[: step + 1]), ranks.size * len(rows_B))
        ranks.raise_on_all(_not_finite(losses, epoch, shown, data, optimizer))
        if not student.is_finite():
            raise TrainingError(
                f"the weights are no longer finite after epoch {epoch + 1}, though its losses were: the learning rate "
                "is too high; lower the recipe's peak."
            )
        if teacher is not None:
            teacher.end_epoch()
        images_per_s = ranks.size * num_images / (time.perf_counter() - begin)
        look = (epoch + 1) % recipe.eval_every == 0 or epoch + 1 == recipe.epochs
        yield EpochReport(
            epoch=epoch + 1,
            loss=ranks.all_reduce_mean(losses.mean()),
            learning_rate=optimizer.param_groups[0]["lr"],
            images_per_s=images_per_s,
            accuracy=evaluate(student.network, data, device, ranks) if look else None,
        )
        on_step(Position(epoch + 1), ranks.size * len(rows_B))


def _not_finite(
    losses: Tensor, epoch: int, shown: dict[int, Tensor], data: Dataset, optimizer: torch.optim.Optimizer
) -> TrainingError | None:
    """What is most likely wrong at the first step whose loss is not finite; None where all are.

    ``shown`` has the rows of every step since the training was started or went on.
    """
    bad = (~losses.isfinite()).nonzero()
    if not len(bad):
        return None
    step = int(bad[0])
    before = losses[max(0, step - 20) : step].tolist()
    rows = shown[step]
    images = [str(data.train_files[row]) if data.train_files else f"number {row}" for row in rows[:3].tolist()]
    if epoch == 0 and step == 0:
        cause = "it is the first of all: the weights of teacher or student are damaged, or a parameter is huge"
    elif before and before[-1] > 2 * min(before):
        cause = "the loss was rising before it: the learning rate is too high; lower the recipe's peak"
    else:
        cause = "it came without warning: look at the images, and at the precision if it is not float32"
    return TrainingError(
        f"the loss became {float(losses[step])} in epoch {epoch + 1}, step {step + 1}, at "
        f"learning rate {optimizer.param_groups[0]['lr']:.3g}, on a batch of {len(rows)} training images (the first: "
        f"{', '.join(images)}). Losses before it: {', '.join(f'{loss:.3g}' for loss in before[-5:]) or 'none'}. "
        f"Likely cause: {cause}."
    )


def evaluate(
    network: nn.Module, data: Dataset, device: torch.device, ranks: Distributed | None = None
) -> dict[str, float]:
    """Accuracy on the test set by group and over all; several ranks share the images."""
    ranks = ranks or Distributed()
    ranks.broadcast_buffers(network)
    whole = nn.Sequential(Normalise(data.task), network).to(device)
    rows_N = np.arange(ranks.rank, len(data.test_labels), ranks.size)
    predicted_N = ranks.interleaved(predict(whole, data.test_images, rows_N).argmax(1))
    return accuracy_by_group(predicted_N, data.test_labels, data.task.groups)


@torch.inference_mode()
def predict(network: nn.Module, images: Images, rows_N: NDArray[np.int64] | None = None) -> NDArray[np.floating]:
    """Logits [N, C] of a network that takes uint8 pixels, in evaluation mode; its mode is restored.

    Args:
        network: Takes uint8 [B, S, S, 3].
        images: Those to look at.
        rows_N: Which of them; None is all.
    """
    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    starts = range(0, len(images) if rows_N is None else len(rows_N), EVAL_BATCH)
    logits = []
    for start in starts:
        chosen = slice(start, start + EVAL_BATCH) if rows_N is None else rows_N[start : start + EVAL_BATCH]
        logits.append(network(torch.from_numpy(images[chosen]).to(device)).float().cpu())
    network.train(was_training)
    return np.asarray(torch.cat(logits).numpy())
