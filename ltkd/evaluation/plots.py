"""The pictures of a comparison. Every function draws from plain numbers, writes a PNG and returns its Figure.

Shape legend: B batches of test images, C classes, K class groups.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ltkd.config import MethodConfig
from ltkd.contract.records import read_record
from ltkd.contract.task import Task
from ltkd.errors import RunError
from ltkd.evaluation.evaluate import EVALUATION_FILE, MASS_BATCH, TEMPERATURE, Evaluation
from ltkd.evaluation.results import PLOT_FILE, TEACHER, Comparison, comparison_title
from ltkd.methods.registry import method_config
from ltkd.training.plots import ALL_COLOUR, group_colours, label_axes, save_figure
from ltkd.training.run_folder import TASK_FILE

# Okabe and Ito's colours (jfly.uni-koeln.de/color), which colour-blind readers tell apart, less black and yellow.
NETWORK_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d31")
LINE_STYLES = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)))  # solid, dashed, dash-dotted
MARKERS = "os^Dv*"
DASH = 4
MAX_COLUMNS = 5
SMOOTHED_FROM = 30  # classes; fewer are read one by one
LOG_FROM = 20  # times the smallest value that the largest of a sweep is, from which its axis is logarithmic

Table = Mapping[str, Mapping[str, float]]


def plot_comparison(mean: Table, deviation: Table, title: str, out: Path) -> Figure:
    """Test accuracy of every network: a panel a group, a bar a network, with one standard deviation.

    Args:
        mean: Network to group to mean accuracy, a fraction.
        deviation: The same of the standard deviations; zeros draw no error bar.
        title: Stands above the picture.
        out: A PNG file.
    """
    percent, spread = _scaled(mean, 100), _scaled(deviation, 100)
    return _bars(percent, spread, "Test accuracy after the last epoch", title, "test accuracy (%)", ".1f", out)


def plot_teacher_kl(mean: Table, deviation: Table, temperature: float, title: str, out: Path) -> Figure:
    """How far every student is from its teacher on the test images of each group (LTKD, figure 4).

    Args:
        mean: Student to true group to mean KL(teacher || student) in nats.
        deviation: The same of the standard deviations; zeros draw no error bar.
        temperature: At which it was measured.
        title: Stands above the picture, below what is shown.
        out: A PNG file.
    """
    shown = f"Divergence from the teacher at temperature {temperature:g}, by the test images' group, last epoch"
    return _bars(mean, deviation, shown, title, "KL(teacher || student) (nats)", ".2f", out)


def plot_teacher_masses(
    masses: Mapping[str, Mapping[str, Sequence[float]]],
    unbiased: Table,
    temperature: float,
    batch_size: int,
    out: Path,
) -> Figure:
    """The probability that a teacher gives each group, batch by batch of test images (LTKD, figure 3).

    Args:
        masses: Panel title to group to the B summed probabilities.
        unbiased: Panel title to group to the sum that an unbiased teacher would have.
        temperature: At which they were measured.
        batch_size: Images in a batch.
        out: A PNG file.
    """
    legend = 0.25 * max(map(len, masses.values()))
    figure = Figure(figsize=(max(8.0, 5.6 * len(masses)), 4.05 + legend), layout="constrained")
    panels = figure.subplots(1, len(masses), sharey=True, squeeze=False)[0]
    for axes, (title, mass) in zip(panels, masses.items(), strict=True):
        for number, (group, mass_B) in enumerate(mass.items()):
            colour = group_colours(len(mass))[number]
            axes.plot(
                np.arange(1, len(mass_B) + 1),
                mass_B,
                color=colour,
                lw=1.2,
                marker=MARKERS[number % len(MARKERS)],
                markevery=max(1, len(mass_B) // 12),
                label=f"{group}: mean {np.mean(mass_B):.1f}, unbiased {unbiased[title][group]:.1f}",
            )
            # dashes that fall into each other's gaps: levels are often equal
            dashes = (DASH * number, (DASH, DASH * (len(mass) - 1)))
            axes.axhline(unbiased[title][group], color=colour, ls=dashes, lw=1.6)
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=9)
        num_batches = max(map(len, mass.values()))
        margin = max(0.5, 0.02 * num_batches)
        axes.set_xlim(1 - margin, num_batches + margin)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        label_axes(axes, x=f"batch of {batch_size} test images", y="")
    panels[0].set_ylabel(f"probability at temperature {temperature:g},\nsummed over {batch_size} images")
    figure.suptitle("Probability that the teacher gives each group of classes, last epoch (dashed: unbiased)")
    save_figure(figure, out)
    return figure


@dataclass(frozen=True)
class Sweep:
    """Contestants that differ in one parameter alone.

    Attributes:
        method: Its name.
        parameter: Which parameter differs.
        fixed: What the other one is, as ``beta = 1``.
        networks: Value to contestant, in rising order.
        base: The value of the method as it is without changes; None where that is no contestant.
    """

    method: str
    parameter: str
    fixed: str
    networks: Mapping[float, str]
    base: float | None


def sweeps_of(methods: Mapping[str, MethodConfig]) -> list[Sweep]:
    """For every method whose contestants differ in alpha or beta, a sweep of it while all else is fixed.

    Of several, as in a grid, the one through the method's own parameters is taken, or else that of most values.
    """
    found: list[Sweep] = []
    for method in dict.fromkeys(method.name for method in methods.values()):
        for parameter, other in (("alpha", "beta"), ("beta", "alpha")):
            families: dict[tuple[object, ...], dict[float, str]] = {}
            for name, config in methods.items():
                if config.name == method and {parameter, other} <= set(config.parameters):
                    rest = tuple(sorted((key, value) for key, value in config.parameters.items() if key != parameter))
                    families.setdefault(rest, {})[float(config.parameters[parameter])] = name
            own = method_config(method).parameters
            candidates = []
            for networks in families.values():
                base = next((value for value, name in networks.items() if methods[name].parameters == own), None)
                fixed = f"{other} = {methods[next(iter(networks.values()))].parameters[other]:g}"
                candidates.append(Sweep(method, parameter, fixed, dict(sorted(networks.items())), base))
            candidates = [sweep for sweep in candidates if len(sweep.networks) > 1]
            if candidates:
                found.append(max(candidates, key=lambda sweep: (sweep.base is not None, len(sweep.networks))))
    return found


def plot_sensitivity(sweeps: Sequence[Sweep], mean: Table, deviation: Table, title: str, out: Path) -> Figure:
    """Accuracy over alpha and over beta, over all classes and of the last group (LTKD, figure 5).

    Args:
        sweeps: A column each; at least one.
        mean: Contestant to group to mean accuracy, a fraction.
        deviation: The same of the standard deviations.
        title: Stands above the picture, below what is shown.
        out: A PNG file.
    """
    groups = [name for name in next(iter(mean.values())) if name != "all"]
    figure = Figure(figsize=(max(6.5, 3.4 * len(sweeps) + 0.8), 6), layout="constrained")
    panels = figure.subplots(2, len(sweeps), sharex="col", sharey="row", squeeze=False)
    for column, sweep in enumerate(sweeps):
        rows = (("all", ALL_COLOUR), (groups[-1], group_colours(len(groups))[-1]))
        for axes, (group, colour) in zip(panels[:, column], rows, strict=True):
            values = list(sweep.networks)
            accuracies = [100 * mean[network][group] for network in sweep.networks.values()]
            spreads = [100 * deviation[network][group] for network in sweep.networks.values()]
            axes.plot(values, accuracies, color=colour, marker="o", ms=5, lw=1.6)
            if any(spreads):
                axes.errorbar(values, accuracies, yerr=spreads, fmt="none", ecolor=colour, capsize=3, lw=1)
            if sweep.base is not None:
                height = accuracies[values.index(sweep.base)]
                axes.plot([sweep.base], [height], "o", ms=13, mfc="none", mec=colour, mew=1.4)
            if min(values) > 0 and max(values) >= LOG_FROM * min(values):
                axes.set_xscale("log")
            axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
            axes.set_xticks([], minor=True)
            axes.margins(x=0.1)
            label_axes(axes, x="", y=f"{group}: test accuracy (%)" if column == 0 else "")
        panels[0, column].set_title(f"{sweep.method}, {sweep.fixed}", fontsize=10)
        panels[1, column].set_xlabel(sweep.parameter)
    ringed = " (ringed: the default)" if any(sweep.base is not None for sweep in sweeps) else ""
    spread = _spread_named(deviation)
    figure.suptitle(f"Test accuracy over the weights of the loss,\nlast epoch{ringed}{spread}\n{title}")
    save_figure(figure, out)
    return figure


def plot_class_accuracy(
    accuracy: Mapping[str, Sequence[float] | NDArray[np.float64]],
    train_counts: Sequence[int],
    group_of_class: Sequence[int],
    group_names: Sequence[str],
    title: str,
    out: Path,
) -> Figure:
    """Test accuracy of every class, the classes with most training images first, above their number.

    Args:
        accuracy: Network to the accuracies of the C classes, fractions; NaN for a class without test images.
        train_counts: Training images of the C classes.
        group_of_class: The group of each of the C classes; classes are ranked within their groups.
        group_names: K names.
        title: Stands above the picture, below what is shown.
        out: A PNG file.
    """
    count_C, group_C = np.array(train_counts), np.array(group_of_class)
    order_C = np.lexsort((-count_C, group_C))  # stable, so the order that the groups were cut in
    rank_C = np.arange(1, len(order_C) + 1)
    columns = int(11 / (0.75 + 0.075 * max(map(len, accuracy))))  # of a legend 11 inches wide, in 10 pt letters
    columns = max(1, min(len(accuracy), columns))
    figure = Figure(figsize=(11, 4.9 + 0.22 * math.ceil(len(accuracy) / columns)), layout="constrained")
    axes = figure.subplots()
    _shade_counts(axes, count_C[order_C])
    window = max(5, len(order_C) // 20 | 1) if len(order_C) >= SMOOTHED_FROM else 1
    for number, (network, fractions) in enumerate(accuracy.items()):
        percent_C = 100 * np.asarray(fractions, dtype=np.float64)[order_C]
        colour = ALL_COLOUR if number == 0 else NETWORK_COLOURS[(number - 1) % len(NETWORK_COLOURS)]
        style = ":" if number == 0 else LINE_STYLES[(number - 1) % len(LINE_STYLES)]
        axes.plot(rank_C, percent_C, ".", color=colour, ms=4 if window > 1 else 8, alpha=0.25 if window > 1 else 1)
        width = 2.4 if network.startswith("ltkd") else 1.5
        axes.plot(rank_C, _rolling_mean(percent_C, window), color=colour, ls=style, lw=width, label=network)
    for group, name in enumerate(group_names):
        members = rank_C[group_C[order_C] == group]
        axes.text(members.mean(), 1.01, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom")
        if group:
            axes.axvline(members[0] - 0.5, color="#777777", lw=1)
    axes.set_xlim(0.5, len(rank_C) + 0.5)
    axes.set_ylim(-1.5, 101.5)  # nothing at 0 or 100 is cut
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    smoothed = f" (dots: every class; lines: rolling mean over {window})" if window > 1 else ""
    label_axes(axes, x=f"rank of the class by training images{smoothed}", y="test accuracy (%)")
    figure.legend(frameon=False, ncols=columns, loc="outside lower center", handlelength=3.2)
    figure.suptitle(f"Test accuracy of every class, last epoch\n{title}")
    save_figure(figure, out)
    return figure


def _shade_counts(axes: Axes, count_C: NDArray[np.int64]) -> None:
    """Training images as a grey area behind, on a logarithmic axis at the right."""
    behind = axes.twinx()
    behind.set_yscale("log")
    behind.yaxis.set_major_formatter("{x:g}")
    behind.set_ylim(0.8, 1.3 * max(count_C.max(), 1))
    edges = np.arange(len(count_C) + 1) + 0.5
    behind.stairs(np.maximum(count_C, 0.8), edges, baseline=0.8, fill=True, color="#eeeeee")
    behind.set_ylabel("training images of the class (grey, logarithmic)")
    behind.spines[["top", "left"]].set_visible(False)
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)


def _rolling_mean(value_C: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean of what is known in a centred window, which is shorter at both ends; NaN where nothing is."""
    known_C = ~np.isnan(value_C)
    kernel = np.ones(window)
    total_C = np.convolve(np.where(known_C, value_C, 0.0), kernel, "full")[window // 2 :][: len(value_C)]
    number_C = np.convolve(known_C.astype(float), kernel, "full")[window // 2 :][: len(value_C)]
    return np.where(number_C > 0, total_C / np.maximum(number_C, 1), np.nan)


def _bars(mean: Table, deviation: Table, shown: str, title: str, unit: str, form: str, out: Path) -> Figure:
    """A panel a group and a bar a network, lying, so that any number of networks of any name can be read."""
    networks = list(mean)
    groups = list(next(iter(mean.values())))
    columns = min(len(groups), MAX_COLUMNS)
    rows = math.ceil(len(groups) / columns)
    tall = max(len(networks), 2)
    size = 1.6 + 2.3 * columns, 1.1 + rows * (0.55 + 0.3 * tall)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    colour_of = dict(zip([name for name in groups if name != "all"], group_colours(len(groups)), strict=False))
    longest = max(mean[network][group] + deviation[network][group] for network in networks for group in groups)
    places = np.arange(len(networks))
    for axes, group in zip(panels, groups, strict=False):
        lengths = np.array([mean[network][group] for network in networks])
        spreads = np.array([deviation[network][group] for network in networks])
        axes.barh(places, lengths, 0.72, color=colour_of.get(group, ALL_COLOUR))
        if spreads.any():
            axes.errorbar(lengths, places, xerr=spreads, fmt="none", ecolor="#777777", capsize=2, lw=1)
        for place, length, spread in zip(places, lengths, spreads, strict=True):
            axes.text(length + spread + 0.02 * longest, place, f"{length:{form}}", va="center", fontsize=8)
        axes.set_title(group, fontsize=10)
        label_axes(axes, x=unit, y="", grid="x")
        axes.tick_params(axis="x", labelbottom=True)
        axes.tick_params(axis="y", length=0)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    panels[0].set_xlim(0, 1.2 * longest or 1)
    panels[0].set_yticks(places, networks)
    panels[0].set_ylim(
        (len(networks) - 1 + tall) / 2 + 0.1, (len(networks) - 1 - tall) / 2 - 0.1
    )  # a single bar is no block
    figure.suptitle(f"{shown}{_spread_named(deviation)}\n{title}")
    save_figure(figure, out)
    return figure


def _spread_named(deviation: Table) -> str:
    """What the whiskers are, where there are any."""
    return ", ± one standard deviation" if any(any(row.values()) for row in deviation.values()) else ""


def _scaled(table: Table, factor: float) -> dict[str, dict[str, float]]:
    return {network: {name: factor * value for name, value in row.items()} for network, row in table.items()}


TEACHER_MASSES_FILE, TEACHER_KL_FILE = "teacher-masses.png", "teacher-kl.png"
SENSITIVITY_FILE, CLASS_ACCURACY_FILE = "sensitivity.png", "class-accuracy.png"


def draw_comparison(comparison: Comparison, test_labels: NDArray[np.int64], out: Path, *, several_tails: bool) -> None:
    """All pictures anew, with the tail in their names where there are several; one with nothing to show is left out."""
    masses, unbiased = {}, {}
    for gamma in comparison.gammas:
        title = comparison_title(comparison, gamma)
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
