"""Add a data set of your own: a function that returns labels and images, and an entry in DATASETS.

Run it with: python examples/custom_dataset.py

Images in class folders need no code: ltkd train --data PATH (with train/CLASS/* and test/CLASS/*).
"""

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from ltkd.config import DataConfig, Execution, Recipe
from ltkd.data.datasets import load_dataset
from ltkd.data.formats import DATASETS, DatasetSource
from ltkd.methods.registry import method_config
from ltkd.training.run import run_config, train_run

WAVES = ("flat", "wide", "even", "narrow", "fine", "finest")
SIZE_PX = 16


def waves(config: DataConfig) -> DatasetSource:
    """Noisy stripes in six classes of width; your own function may read arrays, files or a database."""

    def images(labels_N: NDArray[np.int64], seed: int) -> NDArray[np.uint8]:
        random = np.random.default_rng(seed)
        phase_N1 = random.uniform(0, 2 * np.pi, (len(labels_N), 1))
        line_NS = np.sin(phase_N1 + 0.5 * labels_N[:, None] * np.arange(SIZE_PX))
        noise_NSS3 = random.normal(0, 60, (len(labels_N), SIZE_PX, SIZE_PX, 3))
        return (128 + 60 * line_NS[:, None, :, None] + noise_NSS3).clip(0, 255).astype(np.uint8)

    train_labels_N, test_labels_N = (np.repeat(np.arange(len(WAVES)), count) for count in (200, 40))
    return DatasetSource(
        class_names=WAVES,
        train_labels_N=train_labels_N,
        test_labels_N=test_labels_N,
        train_images=images(train_labels_N, seed=0),
        test_images=images(test_labels_N, seed=1),
        mirror=True,  # a mirrored image still shows its class
    )


def main() -> None:
    """Train a teacher on the new data, with an imbalance of 20 to 1, and distil it."""
    DATASETS["waves"] = waves
    config = DataConfig(name="waves", gamma=20)
    data = load_dataset(config)
    recipe = Recipe(name="example", epochs=6, batch_size=32, peak_learning_rate=0.1, schedule="one-cycle", eval_every=6)
    print(f"training images per class: {dict(zip(WAVES, data.task.train_counts, strict=True))}")
    with tempfile.TemporaryDirectory() as folder:
        teacher = None
        for name, model, method in (("teacher", "resnet14", "ce"), ("student", "resnet8", "ltkd")):
            run_settings = run_config(
                config, model, method_config(method), recipe, seed=0, execution=Execution(), teacher=teacher
            )
            run = train_run(run_settings, data, Path(folder) / name, Console(quiet=True), name)
            teacher = teacher or run
            print(f"{name}: {', '.join(f'{group} {value:.0%}' for group, value in run.accuracy().items())} correct")


if __name__ == "__main__":
    main()
