"""What a person sees on the terminal while a network trains."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ltkd.training import EpochReport


class TrainingDisplay:
    """A progress bar over all steps and, above it, a line for every look at the test set.

    Args:
        console: Where to print.
        title: What is trained.
        epochs: Epochs of the recipe.
        images_per_epoch: Training images.
        epochs_done: Epochs that a checkpoint already has.
    """

    def __init__(self, console: Console, title: str, epochs: int, images_per_epoch: int, epochs_done: int) -> None:
        self._title, self._epochs = title, epochs
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("images, {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._bar = self._progress.add_task(
            title, total=epochs * images_per_epoch, completed=epochs_done * images_per_epoch, rate=""
        )
        if epochs_done:
            self._progress.console.print(f"{title}: going on after epoch {epochs_done} of {epochs}")

    def __enter__(self) -> "TrainingDisplay":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, num_images: int) -> None:
        """Move the bar on by one step's images."""
        self._progress.advance(self._bar, num_images)

    def epoch(self, report: EpochReport) -> None:
        """Note an epoch; print its accuracies when the test set was looked at."""
        rate = f"epoch {report.epoch}/{self._epochs}, {report.images_per_s:,.0f} images/s"
        self._progress.update(self._bar, rate=rate)
        if report.accuracy is not None:
            by_group = "  ".join(f"{name} {100 * value:5.1f}" for name, value in report.accuracy.items())
            self._progress.console.print(
                f"{self._title:<16} epoch {report.epoch:>3}/{self._epochs}  loss {report.loss:6.3f}  {by_group}",
                highlight=False,
                soft_wrap=True,
            )
