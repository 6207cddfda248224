"""Use a teacher that you trained elsewhere: a function that builds it, and a file with its weights.

Run it with: python examples/custom_teacher.py

The same with commands, run in the folder of this file:
    ltkd train --data PHOTOS --model custom_teacher:small_cnn --weights teacher.pt --recipe adopt --out runs/teacher
    ltkd distill runs/teacher --method ltkd --model resnet8 --out runs/student
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from custom_dataset import waves  # the small data set of another example
from rich.console import Console
from torch import nn

from ltkd.config import DataConfig, Execution, Recipe
from ltkd.data.datasets import Dataset, load_dataset
from ltkd.data.formats import DATASETS
from ltkd.methods.registry import method_config
from ltkd.models.registry import Normalise
from ltkd.recipes import find_recipe
from ltkd.training.run import run_config, train_run


def small_cnn(num_classes: int) -> nn.Module:
    """Your network: it takes normalised images [N, 3, S, S] and returns logits [N, C]."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(4)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(64, num_classes)),
    )


def train_elsewhere(data: Dataset, weights: Path) -> None:
    """Train a teacher without ltkd and save its state dict; this replaces your own training code."""
    network, normalise = small_cnn(len(data.task.class_names)), Normalise(data.task)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    images, labels = torch.from_numpy(data.train_images[:]), torch.from_numpy(data.train_labels)
    for _ in range(6):
        for rows in torch.randperm(len(labels)).split(32):
            loss = F.cross_entropy(network(normalise(images[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.save(network.state_dict(), weights)


def main() -> None:
    """Adopt the teacher without further training, and distil it with LTKD."""
    torch.manual_seed(0)
    DATASETS["waves"] = waves
    config = DataConfig(name="waves", gamma=20)
    data = load_dataset(config)
    recipe = Recipe(name="example", epochs=6, batch_size=32, peak_learning_rate=0.1, schedule="one-cycle", eval_every=6)
    with tempfile.TemporaryDirectory() as name:
        folder, quiet = Path(name), Console(quiet=True)
        train_elsewhere(data, folder / "teacher.pt")
        adopted = run_config(
            config,
            "custom_teacher:small_cnn",
            method_config("ce"),
            find_recipe("adopt"),
            seed=0,
            execution=Execution(),
            weights_from=folder / "teacher.pt",
        )
        teacher = train_run(adopted, data, folder / "teacher", quiet, "teacher")
        distilled = run_config(
            config, "resnet8", method_config("ltkd"), recipe, seed=0, execution=Execution(), teacher=teacher
        )
        student = train_run(distilled, data, folder / "student", quiet, "student")
        for run in (teacher, student):
            accuracy = ", ".join(f"{group} {value:.0%}" for group, value in run.accuracy().items())
            print(f"{run.config.model}: {accuracy} correct")


if __name__ == "__main__":
    main()
