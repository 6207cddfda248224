"""Methods against each other: teachers and students over several seeds, as one table, one JSON and one plot."""

import platform
import statistics
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ltkd.config import DataConfig, MethodConfig, Recipe
from ltkd.data import ImageData
from ltkd.methods import method_config, method_of
from ltkd.plots import plot_comparison
from ltkd.records import Record, VersionedRecord, write_record
from ltkd.runs import Run, run_config, train_run

COMPARISON_FILE, PLOT_FILE = "compare.json", "compare.png"
TEACHER = "teacher"


class Row(Record):
    """One trained network.

    Attributes:
        network: ``teacher`` or the student's method.
        run: Its run folder below the comparison's.
        accuracy: After the last epoch, a fraction, by group and over all.
        best: The highest overall accuracy of any epoch looked at; chosen on the test set, so never a result.
    """

    network: str
    model: str
    seed: int
    run: str
    accuracy: dict[str, float]
    best: float


class Comparison(VersionedRecord):
    """Everything needed to repeat every row, and the rows.

    Attributes:
        hardware: What it ran on.
        date: UTC day on which the last row was ready.
    """

    data: DataConfig
    recipe: Recipe
    methods: dict[str, MethodConfig]
    versions: dict[str, str]
    hardware: str
    date: str
    num_test: int
    rows: tuple[Row, ...]

    def mean(self) -> dict[str, dict[str, float]]:
        """Network to group to the mean accuracy over the seeds."""
        return self._over_seeds(statistics.fmean)

    def deviation(self) -> dict[str, dict[str, float]]:
        """Network to group to the standard deviation over the seeds; 0 where there is one seed."""
        return self._over_seeds(lambda values: statistics.stdev(values) if len(values) > 1 else 0.0)

    def _over_seeds(self, statistic: Callable[[list[float]], float]) -> dict[str, dict[str, float]]:
        networks = dict.fromkeys(row.network for row in self.rows)
        return {
            network: {
                name: statistic([row.accuracy[name] for row in self.rows if row.network == network])
                for name in self.rows[0].accuracy
            }
            for network in networks
        }


def compare(
    data_config: DataConfig,
    data: ImageData,
    recipe: Recipe,
    out: Path,
    console: Console,
    *,
    teacher_model: str,
    student_model: str,
    methods: Sequence[MethodConfig],
    seeds: Sequence[int],
    device: str,
) -> Comparison:
    """Train a teacher and a student by every method, for every seed, in folders below ``out``.

    Runs that are complete are taken as they are, so an interrupted comparison goes on where it stopped. The
    comparison's files are renewed after every run.
    """
    method_configs = {method.name: method for method in methods}
    rows: list[Row] = []

    def note(network: str, run: Run) -> Comparison:
        rows.append(
            Row(
                network=network,
                model=run.config.model,
                seed=run.config.seed,
                run=str(run.path.relative_to(out)),
                accuracy=run.accuracy(),
                best=run.best_accuracy(),
            )
        )
        comparison = Comparison(
            data=data_config,
            recipe=recipe,
            methods=method_configs,
            versions=run.config.versions,
            hardware=f"{platform.machine()}, {run.config.device}",
            date=f"{datetime.now(UTC):%Y-%m-%d}",
            num_test=len(data.test_labels),
            rows=tuple(rows),
        )
        write_record(out / COMPARISON_FILE, comparison)
        tail = f"gamma {data_config.gamma:g}" if data_config.gamma else "as it is"
        title = f"{data_config.name}, {tail}, recipe {recipe.name}, {_seeds(len({row.seed for row in rows}))}"
        plot_comparison(comparison.mean(), comparison.deviation(), title, out / PLOT_FILE)
        return comparison

    for seed in seeds:
        folder = out / f"seed{seed}"
        ce = method_config("ce")
        config = run_config(data_config, teacher_model, ce, recipe, seed=seed, device=device, teacher=None)
        teacher = train_run(config, data, folder / TEACHER, console, f"teacher, seed {seed}")
        comparison = note(TEACHER, teacher)
        for name, method in method_configs.items():
            by = teacher if method_of(method).needs_teacher else None
            config = run_config(data_config, student_model, method, recipe, seed=seed, device=device, teacher=by)
            run = train_run(config, data, folder / name, console, f"{name}, seed {seed}")
            comparison = note(name, run)
    return comparison


def comparison_table(comparison: Comparison) -> Table:
    """Accuracy in percent by group; with several seeds the mean and one standard deviation."""
    mean, deviation = comparison.mean(), comparison.deviation()
    num_seeds = len({row.seed for row in comparison.rows})
    table = Table(
        title=f"Test accuracy (%), last epoch, {comparison.num_test:,} images, {_seeds(num_seeds)}",
        caption="* best epoch, chosen on the test set: not a result",
        box=SIMPLE_HEAD,
    )
    table.add_column("network", no_wrap=True)
    for name in mean[TEACHER]:
        table.add_column(name, justify="right")
    table.add_column("best*", justify="right", style="dim")
    for network, accuracy in mean.items():
        model = next(row.model for row in comparison.rows if row.network == network)
        spread = deviation[network]
        cells = [
            f"{100 * value:.1f}" + (f" ± {100 * spread[name]:.1f}" if num_seeds > 1 else "")
            for name, value in accuracy.items()
        ]
        best = statistics.fmean(row.best for row in comparison.rows if row.network == network)
        style = "bold" if network == "ltkd" else None
        table.add_row(f"{network} {model}", *cells, f"{100 * best:.1f}", style=style)
    return table


def _seeds(number: int) -> str:
    return "1 seed" if number == 1 else f"{number} seeds"
