"""Methods against each other: teachers and students over several tails and seeds, as tables, one JSON and pictures."""

import functools
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ltkd.config import DataConfig, Execution, MethodConfig, Parameter, Recipe
from ltkd.data import ImageData
from ltkd.display import shown_loading
from ltkd.errors import DataError, RunError, UsageError
from ltkd.evaluation import (
    EVALUATION_FILE,
    MASS_BATCH,
    TEMPERATURE,
    Evaluation,
    TestLogits,
    evaluation_of,
    logits_on_test,
)
from ltkd.figures import (
    plot_class_accuracy,
    plot_comparison,
    plot_sensitivity,
    plot_teacher_kl,
    plot_teacher_masses,
    sweeps_of,
)
from ltkd.groups import groups_by_count
from ltkd.methods import method_config, method_of
from ltkd.networks import model_of
from ltkd.records import Record, VersionedRecord, read_record, sha256_of, write_record
from ltkd.runs import TASK_FILE, Run, run_config, train_run
from ltkd.task import Task

COMPARISON_FILE, PLOT_FILE = "compare.json", "compare.png"
TEACHER_MASSES_FILE, TEACHER_KL_FILE = "teacher-masses.png", "teacher-kl.png"
SENSITIVITY_FILE, CLASS_ACCURACY_FILE = "sensitivity.png", "class-accuracy.png"
TEACHER = "teacher"

# Teacher logits of one seed are kept for all its students up to this size; beyond it every student asks the teacher.
KEPT_LOGITS_BYTES = 2**30


@dataclass(frozen=True)
class Contestant:
    """A method as the comparison names it: ``ltkd`` or ``ltkd:alpha=3:beta=2``."""

    name: str
    method: MethodConfig

    @property
    def folder(self) -> str:
        """The name of its runs' folders."""
        return self.name.replace(":", "-")


def contestant(text: str) -> Contestant:
    """Read ``NAME`` or ``NAME:PARAMETER=VALUE:...``.

    Raises:
        UsageError: The method or a parameter does not exist, or a value is missing.
    """
    name, *changes = text.split(":")
    parameters: dict[str, Parameter] = {}
    for change in changes:
        parameter, equals, value = change.partition("=")
        if not equals:
            raise UsageError(f"'{text}' is no method: a parameter is NAME=VALUE, got '{change}'; say ltkd:alpha=3.")
        parameters[parameter] = value
    return Contestant(text, method_config(name, parameters))


class Row(Record):
    """One trained network.

    Attributes:
        network: ``teacher``, or the student's method as it was asked for.
        gamma: Of its training images; None for a set as it is.
        run: Its run folder below the comparison's.
        accuracy: After the last epoch, a fraction, by group and over all.
        accuracy_by_count: The same by many / medium / few (> 100, 20-100, < 20 training images).
        class_accuracy: The same of every class.
        adjusted_accuracy: ``accuracy`` after post-hoc logit adjustment of strength 1.
        best: The highest overall accuracy of any epoch looked at; chosen on the test set, so never a result.
        teacher_kl: Divergence from the teacher by true group, in nats; None without a teacher.
        weights_sha256: Which weights these are.
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
    """Everything needed to repeat every row, and the rows.

    Attributes:
        data: The images; ``gamma`` is that of the first tail.
        train_counts: For every tail, in the order of the rows, the training images of each class.
        hardware: What it ran on.
        date: UTC day on which the last row was ready.
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
    rows: tuple[Row, ...]

    @property
    def gammas(self) -> list[float | None]:
        """The tails, in the order of the rows."""
        return list(dict.fromkeys(row.gamma for row in self.rows))

    def rows_of(self, network: str, gamma: float | None) -> list[Row]:
        """The rows of one network over the seeds."""
        return [row for row in self.rows if row.network == network and row.gamma == gamma]

    def mean(self, gamma: float | None, field: str = "accuracy") -> dict[str, dict[str, float]]:
        """Network to group to the mean over the seeds of a field that has numbers by group, where it is not None."""
        return self._over_seeds(statistics.fmean, gamma, field)

    def deviation(self, gamma: float | None, field: str = "accuracy") -> dict[str, dict[str, float]]:
        """The same of the standard deviation; 0 where there is one seed."""
        return self._over_seeds(lambda values: statistics.stdev(values) if len(values) > 1 else 0.0, gamma, field)

    def _over_seeds(
        self, statistic: Callable[[list[float]], float], gamma: float | None, field: str
    ) -> dict[str, dict[str, float]]:
        networks = dict.fromkeys(row.network for row in self.rows if row.gamma == gamma)
        table = {}
        for network in networks:
            accuracies = [getattr(row, field) for row in self.rows_of(network, gamma)]
            if accuracies[0] is not None:
                table[network] = {name: statistic([each[name] for each in accuracies]) for name in accuracies[0]}
        return table


@dataclass(frozen=True)
class Experiment:
    """What is compared: every contestant for every tail and seed.

    Attributes:
        data: The images; its own gamma is not used.
        gammas: The tails; None leaves a set as it is.
    """

    data: DataConfig
    recipe: Recipe
    teacher_model: str
    student_model: str
    contestants: Sequence[Contestant]
    seeds: Sequence[int]
    gammas: Sequence[float | None]
    execution: Execution


def compare(
    experiment: Experiment,
    out: Path,
    console: Console,
    *,
    load: Callable[[DataConfig, Console], ImageData] = shown_loading,
) -> Comparison:
    """Train a teacher and a student by every method, for every tail and seed, in folders below ``out``.

    Runs that are complete are taken as they are, so an interrupted comparison goes on where it stopped. The
    comparison's files are renewed after every run. Students of one seed share their teacher's logits: every epoch
    is a view of its own, so nothing of what they see changes.

    Raises:
        UsageError: A model, a method or a parameter does not exist, or two contestants are the same.
    """
    for model in (experiment.teacher_model, experiment.student_model):
        model_of(model)  # before the images are loaded, which may take long
    recipe, gammas, contestants = experiment.recipe, experiment.gammas, experiment.contestants
    names = [each.name for each in contestants]
    if len(set(names)) != len(names):
        raise UsageError(f"a method is named twice: {', '.join(names)}; name each once.")
    rows: list[Row] = []
    train_counts: list[tuple[int, ...]] = []

    def note(network: str, run: Run, data: ImageData, teacher_logits: TestLogits) -> Comparison:
        rows.append(_row(network, run, evaluation_of(run, data, teacher_logits), data, out))
        comparison = Comparison(
            data=experiment.data.model_copy(update={"gamma": gammas[0]}),
            recipe=recipe,
            methods={each.name: each.method for each in contestants},
            execution=experiment.execution,
            versions=run.config.versions,
            hardware=_hardware(run.config.execution.device),
            date=f"{datetime.now(UTC):%Y-%m-%d}",
            num_test=len(data.test_labels),
            train_counts=tuple(train_counts),
            group_names=data.task.groups.names,
            rows=tuple(rows),
        )
        write_record(out / COMPARISON_FILE, comparison)
        return comparison

    for gamma in gammas:
        tailed = experiment.data.model_copy(update={"gamma": gamma})
        data = load(tailed, console)
        train_counts.append(data.task.train_counts)
        views = _views(recipe, data, contestants)
        for seed in experiment.seeds:
            folder = out / f"seed{seed}" if len(gammas) == 1 else out / f"gamma{gamma:g}" / f"seed{seed}"
            title = f"seed {seed}" if len(gammas) == 1 else f"gamma {gamma:g}, seed {seed}"
            config = run_config(
                tailed,
                experiment.teacher_model,
                method_config("ce"),
                recipe,
                seed=seed,
                execution=experiment.execution,
            )
            teacher = train_run(config, data, folder / TEACHER, console, f"teacher, {title}")
            teacher_logits = functools.cache(functools.partial(logits_on_test, teacher, data))
            comparison = note(TEACHER, teacher, data, teacher_logits)
            for each in contestants:
                taught = method_of(each.method).needs_teacher
                config = run_config(
                    tailed,
                    experiment.student_model,
                    each.method,
                    recipe,
                    seed=seed,
                    execution=experiment.execution,
                    teacher=teacher if taught else None,
                    teacher_views=views if taught and not method_of(each.method).needs_features else None,
                )
                run = train_run(config, data, folder / each.folder, console, f"{each.name}, {title}")
                comparison = note(each.name, run, data, teacher_logits)
            _draw(comparison, data.test_labels, out, several_tails=len(gammas) > 1)
    return comparison


def _hardware(device: str) -> str:
    return (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )


def _views(recipe: Recipe, data: ImageData, contestants: Sequence[Contestant]) -> int | None:
    """As many views as epochs, where several students can share the teacher's logits and these are not too large."""
    num_taught = sum(method_of(each.method).needs_teacher for each in contestants)
    logits_bytes = 4 * recipe.epochs * len(data.train_labels) * len(data.task.class_names)
    in_memory = isinstance(data.train_images, np.ndarray)
    return recipe.epochs if num_taught > 1 and in_memory and logits_bytes <= KEPT_LOGITS_BYTES else None


def _row(network: str, run: Run, evaluation: Evaluation, data: ImageData, out: Path) -> Row:
    return Row(
        network=network,
        model=run.config.model,
        gamma=run.config.data.gamma,
        seed=run.config.seed,
        run=str(run.path.relative_to(out)),
        accuracy=run.accuracy(),
        accuracy_by_count=_by_count(evaluation, data),
        class_accuracy=evaluation.class_accuracy,
        adjusted_accuracy=_by_group(evaluation, data),
        best=run.best_accuracy(),
        teacher_kl=evaluation.teacher_kl,
        weights_sha256=sha256_of(run.weights_path),
    )


def _by_count(evaluation: Evaluation, data: ImageData) -> dict[str, float]:
    """Accuracy by many / medium / few; empty where all classes are of one of them."""
    try:
        groups = groups_by_count(data.task.train_counts)
    except DataError:
        return {}
    return _weighted(evaluation.class_accuracy, data, groups.names, groups.group_of_class)


def _by_group(evaluation: Evaluation, data: ImageData) -> dict[str, float]:
    groups = data.task.groups
    return _weighted(evaluation.adjusted_class_accuracy, data, groups.names, groups.group_of_class)


def _weighted(
    class_accuracy: Sequence[float | None], data: ImageData, names: Sequence[str], group_of_class: Sequence[int]
) -> dict[str, float]:
    """Class accuracies to those of groups and of all, each class weighing as many images as it has."""
    total_C = np.bincount(data.test_labels, minlength=len(class_accuracy))
    right_C = total_C * np.array([accuracy or 0.0 for accuracy in class_accuracy])
    group_C = np.array(group_of_class)
    parts = {name: group_C == group for group, name in enumerate(names)} | {"all": group_C >= 0}
    return {name: float(right_C[part].sum() / max(1, total_C[part].sum())) for name, part in parts.items()}


def _draw(comparison: Comparison, test_labels: NDArray[np.int64], out: Path, *, several_tails: bool) -> None:
    """All pictures anew, with the tail in their names where there are several; one with nothing to show is left out."""
    masses, unbiased = {}, {}
    for gamma in comparison.gammas:
        title = _title(comparison, gamma)
        _draw_tail(comparison, gamma, title, out, f"-gamma{gamma:g}" if several_tails else "")
        mass_KB, unbiased_K, names = _teacher_masses(comparison, gamma, test_labels, out)
        if mass_KB.size:
            masses[title] = dict(zip(names, mass_KB.tolist(), strict=True))
            unbiased[title] = dict(zip(names, unbiased_K.tolist(), strict=True))
    if masses:
        plot_teacher_masses(masses, unbiased, TEMPERATURE, MASS_BATCH, out / TEACHER_MASSES_FILE)


def _draw_tail(comparison: Comparison, gamma: float | None, title: str, out: Path, suffix: str) -> None:
    def picture(file: str) -> Path:
        return out / f"{Path(file).stem}{suffix}.png"

    mean, deviation = comparison.mean(gamma), comparison.deviation(gamma)
    plot_comparison(mean, deviation, title, picture(PLOT_FILE))
    divergence = comparison.mean(gamma, "teacher_kl")
    if divergence:
        spread = comparison.deviation(gamma, "teacher_kl")
        plot_teacher_kl(divergence, spread, TEMPERATURE, title, picture(TEACHER_KL_FILE))
    sweeps = sweeps_of(comparison.methods)
    if sweeps:
        plot_sensitivity(sweeps, mean, deviation, title, picture(SENSITIVITY_FILE))
    task = _task(comparison, gamma, out)
    class_accuracy = {}
    for network in mean:
        rows = [row.class_accuracy for row in comparison.rows_of(network, gamma)]
        class_accuracy[network] = np.array(rows, dtype=np.float64).mean(axis=0)  # None, without images, is NaN
    plot_class_accuracy(
        class_accuracy,
        task.train_counts,
        task.groups.group_of_class,
        task.groups.names,
        title,
        picture(CLASS_ACCURACY_FILE),
    )


def _teacher_masses(
    comparison: Comparison, gamma: float | None, test_labels: NDArray[np.int64], out: Path
) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[str, ...]]:
    """Summed group masses of every batch, the mean of the seeds' teachers; those of no bias; the groups' names."""
    groups = _task(comparison, gamma, out).groups
    teachers = [out / row.run / EVALUATION_FILE for row in comparison.rows_of(TEACHER, gamma)]
    masses = [read_record(path, Evaluation, RunError).batch_masses for path in teachers]
    count_K = np.bincount(groups.index[test_labels], minlength=len(groups.names))
    return np.mean(masses, axis=0).T, MASS_BATCH * count_K / count_K.sum(), groups.names


def _task(comparison: Comparison, gamma: float | None, out: Path) -> Task:
    """The classes and groups of one tail, as its runs keep them."""
    return read_record(out / comparison.rows_of(TEACHER, gamma)[0].run / TASK_FILE, Task, RunError)


def _title(comparison: Comparison, gamma: float | None) -> str:
    tail = f"gamma {gamma:g}" if gamma else "as it is"
    return f"{comparison.data.name}, {tail}, recipe {comparison.recipe.name}, {_num_seeds(comparison, gamma)}"


def comparison_tables(comparison: Comparison) -> list[Table]:
    """For every tail, accuracy in percent by group; with several seeds the mean and one standard deviation."""
    return [_table(comparison, gamma) for gamma in comparison.gammas]


def _table(comparison: Comparison, gamma: float | None) -> Table:
    by_group, by_count = comparison.mean(gamma), comparison.mean(gamma, "accuracy_by_count")
    adjusted = comparison.mean(gamma, "adjusted_accuracy")
    several = len({row.seed for row in comparison.rows}) > 1
    spreads = comparison.deviation(gamma), comparison.deviation(gamma, "accuracy_by_count")
    count_names = [name for name in by_count[TEACHER] if name != "all"]
    table = Table(
        title=f"Test accuracy (%), last epoch, {comparison.num_test:,} images, {_title(comparison, gamma)}",
        caption="all, LA: after post-hoc logit adjustment.  * best epoch, chosen on the test set: not a result",
        box=SIMPLE_HEAD,
    )
    table.add_column("network", overflow="fold")  # in a narrow terminal the name gives way, not the figures
    for name in by_group[TEACHER]:
        table.add_column(name, justify="right", no_wrap=True)
    for name in count_names:
        table.add_column("mid" if name == "medium" else name, justify="right", style="dim", no_wrap=True)
    table.add_column("all, LA", justify="right", style="dim")
    table.add_column("best*", justify="right", style="dim")
    for network in by_group:
        rows = comparison.rows_of(network, gamma)

        def cell(mean: dict[str, float], spread: dict[str, float], name: str) -> str:
            return f"{100 * mean[name]:.1f}" + (f"±{100 * spread[name]:.1f}" if several else "")

        table.add_row(
            f"{network} {rows[0].model}",
            *(cell(by_group[network], spreads[0][network], name) for name in by_group[network]),
            *(cell(by_count[network], spreads[1][network], name) for name in count_names),
            f"{100 * adjusted[network]['all']:.1f}",
            f"{100 * statistics.fmean(row.best for row in rows):.1f}",
            style="bold" if network.startswith("ltkd") else None,
        )
    return table


def _num_seeds(comparison: Comparison, gamma: float | None) -> str:
    number = len({row.seed for row in comparison.rows if row.gamma == gamma})
    return "1 seed" if number == 1 else f"{number} seeds"
