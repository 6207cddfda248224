"""The training loop, for teachers and students alike.

Shape legend: B images in the batch, N images in the set, S pixels a side, C classes.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ltkd.config import Recipe
from ltkd.data import ImageData
from ltkd.errors import DeviceError, TrainingError
from ltkd.losses import GroupIndex
from ltkd.methods import AnyMethod, Batch
from ltkd.metrics import accuracy_by_group
from ltkd.networks import Normalise

EVAL_BATCH = 256


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
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: ImageData,
    method: AnyMethod,
    recipe: Recipe,
    *,
    teacher: nn.Module | None,
    seed: int,
    device: torch.device,
    epochs_done: int = 0,
    on_step: Callable[[int], None] = lambda num_images: None,
) -> Iterator[EpochReport]:
    """Train a network in place and report after every epoch.

    Order and augmentation of an epoch depend on (seed, epoch) alone, so a training that goes on from a checkpoint
    ends where one that was never interrupted ends.

    Args:
        network: What is trained; its parameters are those of ``optimizer``.
        optimizer: Its learning rate is set before every step.
        data: Training and test images.
        method: What is minimised.
        recipe: How long and how fast.
        teacher: Gives logits where the method needs them; never updated.
        seed: Seed of order and augmentation.
        device: Where everything happens.
        epochs_done: Epochs that a checkpoint already has.
        on_step: Told the number of images of every step.

    Raises:
        TrainingError: The loss is no longer finite.
    """
    images_NSS3 = torch.from_numpy(data.train_images).to(device)
    labels_N = torch.from_numpy(data.train_labels).to(device)
    groups = GroupIndex(data.task.groups).to(device)
    normalise = Normalise(data.task).to(device)
    network.to(device).to(memory_format=torch.channels_last)
    if teacher is not None:
        teacher.to(device).to(memory_format=torch.channels_last).eval()
    steps_per_epoch = math.ceil(len(labels_N) / recipe.batch_size)
    num_steps = recipe.epochs * steps_per_epoch

    for epoch in range(epochs_done, recipe.epochs):
        network.train()
        random = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order_N = torch.randperm(len(labels_N), generator=random).to(device)
        loss_sum = torch.zeros((), device=device)
        start = time.perf_counter()
        for step, rows_B in enumerate(torch.split(order_N, recipe.batch_size), start=epoch * steps_per_epoch):
            image_B3SS = normalise(augment(images_NSS3[rows_B], data.mirror, random))
            with torch.no_grad():
                teacher_BC = teacher(image_B3SS) if teacher is not None else None
            student_BC = network(image_B3SS)
            loss = method(Batch(student_BC, teacher_BC, labels_N[rows_B], groups, progress=step / num_steps))
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate(recipe, step, steps_per_epoch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss_sum += loss.detach()
            on_step(len(rows_B))
        mean_loss = float(loss_sum) / steps_per_epoch  # the one wait for the device in an epoch
        if not math.isfinite(mean_loss):
            raise TrainingError(
                f"the loss became {mean_loss} in epoch {epoch + 1}, at learning rate "
                f"{optimizer.param_groups[0]['lr']:.3g}; lower the recipe's peak learning rate or check the images."
            )
        images_per_s = len(labels_N) / (time.perf_counter() - start)
        look = (epoch + 1) % recipe.eval_every == 0 or epoch + 1 == recipe.epochs
        yield EpochReport(
            epoch=epoch + 1,
            loss=mean_loss,
            learning_rate=optimizer.param_groups[0]["lr"],
            images_per_s=images_per_s,
            accuracy=evaluate(network, data, device) if look else None,
        )


def evaluate(network: nn.Module, data: ImageData, device: torch.device) -> dict[str, float]:
    """Accuracy on the test set by group and over all."""
    logits_NC = predict(nn.Sequential(Normalise(data.task), network).to(device), data.test_images)
    return accuracy_by_group(logits_NC.argmax(1), data.test_labels, data.task.groups)


@torch.inference_mode()
def predict(network: nn.Module, images_NSS3: NDArray[np.uint8]) -> NDArray[np.floating]:
    """Logits [N, C] of a network that takes uint8 pixels, in evaluation mode; its mode is restored."""
    was_training = network.training
    network.eval()
    device = next(network.parameters()).device
    logits = [
        network(torch.from_numpy(images_NSS3[start : start + EVAL_BATCH]).to(device)).cpu()
        for start in range(0, len(images_NSS3), EVAL_BATCH)
    ]
    network.train(was_training)
    return np.asarray(torch.cat(logits).numpy())


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """The rate of one step, a function of the step alone."""
    peak = recipe.peak_learning_rate
    if recipe.schedule == "steps":
        return peak * 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in recipe.milestones)
    num_steps = recipe.epochs * steps_per_epoch
    rise = num_steps / 4
    if step < rise:
        return peak * (step + 1) / (rise + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (num_steps - rise)))


def augment(pixels_BSS3: Tensor, mirror: bool, random: torch.Generator) -> Tensor:
    """Crop at random from a border of S / 8 black pixels and, where allowed, mirror half of the images.

    Args:
        pixels_BSS3: uint8 images.
        mirror: Whether mirrored images still show their class.
        random: A generator on the CPU, so that every device sees the same images.
    """
    batch, size_px = pixels_BSS3.shape[:2]
    border = size_px // 8
    top_B, left_B = torch.randint(0, 2 * border + 1, (2, batch), generator=random)
    along = torch.arange(size_px)
    rows_BS, columns_BS = top_B[:, None] + along, left_B[:, None] + along
    if mirror:
        mirrored_B1 = torch.rand((batch, 1), generator=random) < 0.5
        columns_BS = torch.where(mirrored_B1, columns_BS.flip(1), columns_BS)
    device = pixels_BSS3.device
    padded = nn.functional.pad(pixels_BSS3, (0, 0, border, border, border, border))
    image_B11 = torch.arange(batch, device=device)[:, None, None]
    return padded[image_B11, rows_BS.to(device)[:, :, None], columns_BS.to(device)[:, None, :]]


def device_of(asked: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` stands for.

    Raises:
        DeviceError: CUDA was asked for and is not there.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked == "cuda" and not torch.cuda.is_available():
        raise DeviceError("asked for cuda, but torch sees no CUDA device; give --device cpu to train on the CPU.")
    return torch.device(asked)
