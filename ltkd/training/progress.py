"""Progress of loading and training, shown on the terminal and written for TensorBoard."""

import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from ltkd.config import DataConfig
from ltkd.data.datasets import Dataset, load_dataset
from ltkd.training.loop import EpochReport, Position
from ltkd.training.run_folder import Metrics


def load_with_progress(config: DataConfig, console: Console) -> Dataset:
    """Load a data set, show a progress bar over its files and print how many files were skipped."""
    columns = (TextColumn("reading images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # when the output is a file, the bar is not drawn but would still print an empty line
    with ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        data = load_dataset(config, lambda completed, total: bar.update(task, completed=completed, total=total))
    if data.skipped:
        console.print(f"skipped {data.skipped:,} unreadable images", highlight=False)
    return data


class TrainingDisplay:
    """A progress bar over all steps and, above it, a line per evaluation on the test set.

    Args:
        console: Where to print.
        title: Short description of the training.
        epochs: Epochs of the recipe.
        steps_per_epoch: Steps per epoch.
        start: Position from which the training starts or resumes.
    """

    def __init__(self, console: Console, title: str, epochs: int, steps_per_epoch: int, start: Position) -> None:
        self._title, self._epochs, self._steps_per_epoch = title, epochs, steps_per_epoch
        self._bar = ProgressBar(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("epoch {task.fields[epoch]}, step {task.fields[step]}, {task.fields[rate]:,.0f} images/s, left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            title,
            total=epochs * steps_per_epoch,
            completed=self._steps(start),
            epoch=f"{start.epoch + 1}/{epochs}",
            step=f"{start.step}/{steps_per_epoch}",
            rate=0.0,
        )
        self._epoch_started_at, self._images = time.perf_counter(), 0
        if self._steps(start):
            self._bar.console.print(f"{title}: resuming after {self._steps(start):,} steps")

    def __enter__(self) -> "TrainingDisplay":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, position: Position, num_images: int) -> None:
        """Move the bar to the position; the rate is the mean over the current epoch."""
        self._images += num_images
        elapsed = max(time.perf_counter() - self._epoch_started_at, 1e-9)
        self._bar.update(
            self._task,
            completed=self._steps(position),
            epoch=f"{min(position.epoch + 1, self._epochs)}/{self._epochs}",
            step=f"{position.step}/{self._steps_per_epoch}",
            rate=self._images / elapsed,
        )
        if position.step == 0:
            self._epoch_started_at, self._images = time.perf_counter(), 0

    def epoch(self, report: EpochReport) -> None:
        """Print the accuracies of an epoch that was evaluated."""
        if report.accuracy is not None:
            by_group = "  ".join(f"{name} {100 * value:5.1f}" for name, value in report.accuracy.items())
            self._bar.console.print(
                f"{self._title:<16} epoch {report.epoch:>3}/{self._epochs}  loss {report.loss:6.3f}  {by_group}",
                highlight=False,
                soft_wrap=True,
            )

    def _steps(self, position: Position) -> int:
        return position.epoch * self._steps_per_epoch + position.step


class TensorBoardWriter:
    """Writes the metrics as TensorBoard scalars; without a folder it does nothing."""

    def __init__(self, folder: Path | None) -> None:
        self._writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an optional dependency

            self._writer = SummaryWriter(str(folder))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, line: Metrics) -> None:
        """Write one epoch's metrics."""
        if self._writer is not None:
            for name, value in line.items():
                if name != "epoch":
                    self._writer.add_scalar(name, value, int(line["epoch"]))
