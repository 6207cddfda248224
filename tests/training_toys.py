"""Data sets and networks that are small enough to train in a test."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ltkd.config import DataConfig, Execution, Recipe, RunConfig
from ltkd.contract.class_groups import groups_by_share
from ltkd.contract.image_decoding import save_image
from ltkd.contract.task import Task
from ltkd.data.batches import make_batches
from ltkd.data.datasets import Dataset
from ltkd.methods.registry import Method, method_config
from ltkd.training.loop import EpochReport, Student, TrainState, train
from ltkd.training.run import run_config
from ltkd.training.run_folder import Run
from ltkd.training.teacher import Teacher

CPU = Execution(device="cpu")
RECIPE = Recipe(name="toy", epochs=4, batch_size=8, peak_learning_rate=0.05, schedule="one-cycle", eval_every=2)
COLOURS = ((220, 40, 40), (40, 200, 60), (50, 70, 230))
NAMES = ("red", "green", "blue")


def coloured(label: int, number: int, size_px: int = 8) -> NDArray[np.uint8]:
    """An image in the colour of its class, with noise."""
    noise = np.random.default_rng((label, number)).normal(0, 40, size=(size_px, size_px, 3))
    return (np.array(COLOURS[label]) + noise).clip(0, 255).astype(np.uint8)


def toy_data(train_counts: tuple[int, int, int] = (24, 10, 3), num_test: int = 6) -> Dataset:
    """A data set of three classes, one colour each; the last class is rare."""

    def make_images(counts: tuple[int, ...], first: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        labels = np.repeat(np.arange(3), counts)
        numbers = np.concatenate([first + np.arange(count) for count in counts])
        pixels = [coloured(label, number) for label, number in zip(labels, numbers, strict=True)]
        return np.stack(pixels), labels

    task = Task(
        class_names=NAMES,
        train_counts=train_counts,
        groups=groups_by_share(train_counts),
        input_px=8,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    return Dataset(task, *make_images(train_counts, 0), *make_images((num_test,) * 3, 1000), mirror=True)


def write_tree(root: Path, train_counts: tuple[int, int, int] = (24, 10, 3), num_test: int = 6) -> Path:
    """Write the same images as a tree of PNG files."""
    for split, counts, first in (("train", train_counts, 0), ("test", (num_test,) * 3, 1000)):
        for label, count in enumerate(counts):
            folder = root / split / NAMES[label]
            folder.mkdir(parents=True)
            for number in range(first, first + count):
                save_image(coloured(label, number), folder / f"{number}.png")
    return root


class ToyNet(nn.Module):
    """A network from the mean colour to three logits, with one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.bn, self.classifier = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.bn(self.hidden(image.mean((2, 3)))).relu())


def toy_config(
    method: str = "ce",
    *,
    seed: int = 0,
    recipe: Recipe = RECIPE,
    teacher: Run | None = None,
    teacher_views: int | None = None,
    execution: Execution = CPU,
) -> RunConfig:
    """A run configuration of the smallest network of ltkd."""
    return run_config(
        DataConfig(name="glyphs"),
        "resnet8",
        method_config(method),
        recipe,
        seed=seed,
        execution=execution,
        teacher=teacher,
        teacher_views=teacher_views,
    )


def toy_train_state(network: nn.Module | None = None) -> TrainState:
    """A network, by default ``ToyNet``, with an SGD optimiser."""
    student = Student(network or ToyNet())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    return TrainState(student, optimizer, torch.amp.GradScaler("cpu", enabled=False))


def toy_training(
    state: TrainState,
    method: Method,
    *,
    data: Dataset | None = None,
    recipe: Recipe = RECIPE,
    seed: int = 0,
    teacher: nn.Module | None = None,
    execution: Execution = CPU,
) -> list[EpochReport]:
    """Train to the last epoch, by default on the toy data."""
    data = data or toy_data()
    batches = make_batches(data, batch_size=recipe.batch_size, seed=seed, device=torch.device("cpu"))
    wrapped_teacher = None if teacher is None else Teacher(teacher, execution)
    return list(train(state, data, batches, method, recipe, teacher=wrapped_teacher, execution=execution))
