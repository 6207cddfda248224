"""The results of a comparison: a record per trained network, means over seeds, and tables."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from ltkd.config import DataConfig, Execution, MethodConfig, Recipe
from ltkd.contract.class_groups import ClassGroups, groups_by_count
from ltkd.contract.metrics import group_means
from ltkd.contract.records import Record, VersionedRecord, sha256_of
from ltkd.data.datasets import Dataset
from ltkd.errors import DataError
from ltkd.evaluation.evaluate import Evaluation
from ltkd.training.run_folder import Run

COMPARISON_FILE, PLOT_FILE = "compare.json", "compare.png"
TEACHER = "teacher"


class RunResult(Record):
    """The results of one trained network.

    Attributes:
        network: ``teacher``, or the student's method as given to the comparison.
        gamma: Imbalance ratio of the training images; None if all training images were used.
        run: Run folder, relative to the folder of the comparison.
        accuracy: Test accuracy after the last epoch, a fraction, by group and over all.
        accuracy_by_count: The same by many / medium / few (> 100, 20-100, < 20 training images).
        class_accuracy: The same by class.
        adjusted_accuracy: ``accuracy`` after post-hoc logit adjustment of strength 1.
        best: The highest overall accuracy of any evaluated epoch; chosen on the test set, so never a result.
        teacher_kl: Divergence from the teacher by true group, in nats; None without a teacher.
        weights_sha256: Hash of the weights file.
    """

    network: str
    model: str
    gamma: float | None
    seed: int
    run: str
    accuracy: dict[str, float]
    accuracy_by_count: dict[str, float]
    class_accuracy: tuple[float | None, ...]
    adjusted_accuracy: dict[str, float]
    best: float
    teacher_kl: dict[str, float] | None
    weights_sha256: str


class Comparison(VersionedRecord):
    """The results of all networks of a comparison, with everything needed to repeat it.

    Attributes:
        data: The images; ``gamma`` is the first one of the comparison.
        train_counts: For every gamma, in the order of the rows, the number of training images of each class.
        hardware: The device of the trainings.
        date: UTC date on which the last row was added.
        rows: One result per trained network.
    """

    schema_version: int = 2
    data: DataConfig
    recipe: Recipe
    methods: dict[str, MethodConfig]
    execution: Execution
    versions: dict[str, str]
    hardware: str
    date: str
    num_test: int
    train_counts: tuple[tuple[int, ...], ...]
    group_names: tuple[str, ...]
    rows: tuple[RunResult, ...]

    @property
    def gammas(self) -> list[float | None]:
        """The gammas, in the order of the rows."""
        return list(dict.fromkeys(row.gamma for row in self.rows))

    def rows_of(self, network: str, gamma: float | None) -> list[RunResult]:
        """The rows of one network, one per seed."""
        return [row for row in self.rows if row.network == network and row.gamma == gamma]

    def mean(self, gamma: float | None, field: str = "accuracy") -> dict[str, dict[str, float]]:
        """Network to group to the mean over the seeds of a field; networks that have None there are left out."""
        return self._over_seeds(statistics.fmean, gamma, field)

    def deviation(self, gamma: float | None, field: str = "accuracy") -> dict[str, dict[str, float]]:
        """The standard deviation over the seeds, in the form of ``mean``; 0 for a single seed."""
        return self._over_seeds(lambda values: statistics.stdev(values) if len(values) > 1 else 0.0, gamma, field)

    def _over_seeds(
        self, statistic: Callable[[list[float]], float], gamma: float | None, field: str
    ) -> dict[str, dict[str, float]]:
        networks = dict.fromkeys(row.network for row in self.rows if row.gamma == gamma)
        table = {}
        for network in networks:
            values = [getattr(row, field) for row in self.rows_of(network, gamma)]
            if values[0] is not None:
                table[network] = {name: statistic([by_group[name] for by_group in values]) for name in values[0]}
        return table


def run_result(network: str, run: Run, evaluation: Evaluation, data: Dataset, out: Path) -> RunResult:
    """The result of one trained network."""
    return RunResult(
        network=network,
        model=run.config.model,
        gamma=run.config.data.gamma,
        seed=run.config.seed,
        run=str(run.path.relative_to(out)),
        accuracy=run.accuracy(),
        accuracy_by_count=_by_count(evaluation, data),
        class_accuracy=evaluation.class_accuracy,
        adjusted_accuracy=_grouped(evaluation.adjusted_class_accuracy, data, data.task.groups),
        best=run.best_accuracy(),
        teacher_kl=evaluation.teacher_kl,
        weights_sha256=sha256_of(run.weights_path),
    )


def _by_count(evaluation: Evaluation, data: Dataset) -> dict[str, float]:
    """Accuracy by many / medium / few; empty if all classes belong to one of them."""
    try:
        groups = groups_by_count(data.task.train_counts)
    except DataError:
        return {}
    return _grouped(evaluation.class_accuracy, data, groups)


def _grouped(class_accuracy: Sequence[float | None], data: Dataset, groups: ClassGroups) -> dict[str, float]:
    images_per_class = np.bincount(data.test_labels, minlength=len(class_accuracy))
    return group_means(class_accuracy, images_per_class, groups.names, groups.group_of_class)


def comparison_title(comparison: Comparison, gamma: float | None) -> str:
    """Data set, gamma, recipe and number of seeds, for tables and plots."""
    imbalance = f"gamma {gamma:g}" if gamma else "all training images"
    return f"{comparison.data.name}, {imbalance}, recipe {comparison.recipe.name}, {_num_seeds(comparison, gamma)}"


def comparison_tables(comparison: Comparison) -> list[Table]:
    """A table per gamma: accuracy in percent by group; for several seeds the mean and one standard deviation."""
    return [_table(comparison, gamma) for gamma in comparison.gammas]


def _table(comparison: Comparison, gamma: float | None) -> Table:
    by_group, by_count = comparison.mean(gamma), comparison.mean(gamma, "accuracy_by_count")
    adjusted = comparison.mean(gamma, "adjusted_accuracy")
    several_seeds = len({row.seed for row in comparison.rows}) > 1
    deviations = comparison.deviation(gamma), comparison.deviation(gamma, "accuracy_by_count")
    count_names = [name for name in by_count[TEACHER] if name != "all"]
    table = Table(
        title=f"Test accuracy (%), last epoch, {comparison.num_test:,} images, {comparison_title(comparison, gamma)}",
        caption="all, LA: after post-hoc logit adjustment.  * best epoch, chosen on the test set: not a result",
        box=SIMPLE_HEAD,
    )
    table.add_column("network", overflow="fold")  # in a narrow terminal the name is folded, not the numbers
    for name in by_group[TEACHER]:
        table.add_column(name, justify="right", no_wrap=True)
    for name in count_names:
        table.add_column("mid" if name == "medium" else name, justify="right", style="dim", no_wrap=True)
    table.add_column("all, LA", justify="right", style="dim")
    table.add_column("best*", justify="right", style="dim")
    for network in by_group:
        rows = comparison.rows_of(network, gamma)

        def cell(mean: dict[str, float], deviation: dict[str, float], name: str) -> str:
            return f"{100 * mean[name]:.1f}" + (f"±{100 * deviation[name]:.1f}" if several_seeds else "")

        table.add_row(
            f"{network} {rows[0].model}",
            *(cell(by_group[network], deviations[0][network], name) for name in by_group[network]),
            *(cell(by_count[network], deviations[1][network], name) for name in count_names),
            f"{100 * adjusted[network]['all']:.1f}",
            f"{100 * statistics.fmean(row.best for row in rows):.1f}",
            style="bold" if network.startswith("ltkd") else None,
        )
    return table


def _num_seeds(comparison: Comparison, gamma: float | None) -> str:
    number = len({row.seed for row in comparison.rows if row.gamma == gamma})
    return "1 seed" if number == 1 else f"{number} seeds"
