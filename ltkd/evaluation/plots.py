"""The plots of a comparison.

Every ``plot_`` function takes plain numbers, writes a PNG and returns its Figure. ``draw_comparison`` reads the numbers
of a comparison and draws all plots.

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

# Okabe and Ito's palette for colour-blind readers (jfly.uni-koeln.de/color), without black and yellow
NETWORK_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d31")
LINE_STYLES = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)))  # solid, dashed, dash-dotted
MARKERS = "os^Dv*"
DASH = 4
MAX_COLUMNS = 5
SMOOTHED_FROM = 30  # classes; with fewer classes the accuracies are not smoothed
LOG_FROM = 20  # ratio of the largest to the smallest value of a sweep from which its axis is logarithmic

Table = Mapping[str, Mapping[str, float]]


def plot_comparison(mean: Table, deviation: Table, title: str, out: Path) -> Figure:
    """Plot the test accuracy: one panel per group, one bar per network, error bars of one standard deviation.

    Args:
        mean: Network to group to mean accuracy, a fraction.
        deviation: The same for the standard deviations; there are no error bars if all are zero.
        title: Last line of the figure's title.
        out: A PNG file.
    """
    mean, deviation = _scaled(mean, 100), _scaled(deviation, 100)
    return _bars(mean, deviation, "Test accuracy after the last epoch", title, "test accuracy (%)", ".1f", out)


def plot_teacher_kl(mean: Table, deviation: Table, temperature: float, title: str, out: Path) -> Figure:
    """Plot the KL divergence of every student from its teacher on the test images of each group (LTKD, figure 4).

    Args:
        mean: Student to true group to mean KL(teacher || student) in nats.
        deviation: The same for the standard deviations; there are no error bars if all are zero.
        temperature: Temperature of the divergence.
        title: Last line of the figure's title.
        out: A PNG file.
    """
    subject = f"Divergence from the teacher at temperature {temperature:g}, by group of the test images, last epoch"
    return _bars(mean, deviation, subject, title, "KL(teacher || student) (nats)", ".2f", out)


def plot_teacher_masses(
    masses: Mapping[str, Mapping[str, Sequence[float]]],
    unbiased: Table,
    temperature: float,
    batch_size: int,
    out: Path,
) -> Figure:
    """Plot the probability that a teacher assigns to each group, per batch of test images (LTKD, figure 3).

    Args:
        masses: Panel title to group to the B summed probabilities.
        unbiased: Panel title to group to the sum that an unbiased teacher would have.
        temperature: Temperature of the probabilities.
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
            # each dash lies in the gaps of the others, because levels are often equal
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
    figure.suptitle("Probability that the teacher assigns to each group of classes, last epoch (dashed: unbiased)")
    save_figure(figure, out)
    return figure


@dataclass(frozen=True)
class Sweep:
    """Networks of one method that differ in one parameter only.

    Attributes:
        method: Name of the method.
        parameter: Name of the parameter that differs, ``alpha`` or ``beta``.
        fixed: Name and value of the other one, such as ``beta = 1``.
        networks: Value to network, in ascending order.
        base: The default value of the method; None if the network with all defaults is not in the sweep.
    """

    method: str
    parameter: str
    fixed: str
    networks: Mapping[float, str]
    base: float | None


def sweeps_of(methods: Mapping[str, MethodConfig]) -> list[Sweep]:
    """Find the sweeps: for every method, networks that differ only in alpha or only in beta.

    If there are several candidates, as in a grid, the sweep through the method's defaults is used, otherwise the one
    with the most values.
    """
    found: list[Sweep] = []
    for method in dict.fromkeys(method.name for method in methods.values()):
        for parameter, other in (("alpha", "beta"), ("beta", "alpha")):
            families: dict[tuple[object, ...], dict[float, str]] = {}
            for name, config in methods.items():
                if config.name == method and {parameter, other} <= set(config.parameters):
                    rest = tuple(sorted((key, value) for key, value in config.parameters.items() if key != parameter))
                    families.setdefault(rest, {})[float(config.parameters[parameter])] = name
            defaults = method_config(method).parameters
            candidates = []
            for networks in families.values():
                base = next((value for value, name in networks.items() if methods[name].parameters == defaults), None)
                fixed = f"{other} = {methods[next(iter(networks.values()))].parameters[other]:g}"
                candidates.append(Sweep(method, parameter, fixed, dict(sorted(networks.items())), base))
            candidates = [sweep for sweep in candidates if len(sweep.networks) > 1]
            if candidates:
                found.append(max(candidates, key=lambda sweep: (sweep.base is not None, len(sweep.networks))))
    return found


def plot_sensitivity(sweeps: Sequence[Sweep], mean: Table, deviation: Table, title: str, out: Path) -> Figure:
    """Plot the accuracy over alpha and over beta, for all classes and for the last group (LTKD, figure 5).

    Args:
        sweeps: One column per sweep; at least one.
        mean: Network to group to mean accuracy, a fraction.
        deviation: The same for the standard deviations.
        title: Last line of the figure's title.
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
    ringed = " (circled: the default)" if any(sweep.base is not None for sweep in sweeps) else ""
    note = _error_bar_note(deviation)
    figure.suptitle(f"Test accuracy over the weights of the loss,\nlast epoch{ringed}{note}\n{title}")
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
    """Plot the test accuracy of every class, ranked by training images, with their number in the background.

    Args:
        accuracy: Network to the accuracies of the C classes, fractions; NaN for a class without test images.
        train_counts: Training images of the C classes.
        group_of_class: The group of each of the C classes; classes are ranked within their groups.
        group_names: K names.
        title: Last line of the figure's title.
        out: A PNG file.
    """
    count_C, group_C = np.array(train_counts), np.array(group_of_class)
    order_C = np.lexsort((-count_C, group_C))  # stable, so it is the order in which the groups were cut
    rank_C = np.arange(1, len(order_C) + 1)
    # as many as fit a legend 11 inches wide in 10 pt letters
    columns = int(11 / (0.75 + 0.075 * max(map(len, accuracy))))
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
    axes.set_ylim(-1.5, 101.5)  # so that markers at 0 and 100 are not clipped
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    smoothed = f" (dots: every class; lines: rolling mean over {window})" if window > 1 else ""
    label_axes(axes, x=f"rank of the class by training images{smoothed}", y="test accuracy (%)")
    figure.legend(frameon=False, ncols=columns, loc="outside lower center", handlelength=3.2)
    figure.suptitle(f"Test accuracy of every class, last epoch\n{title}")
    save_figure(figure, out)
    return figure


def _shade_counts(axes: Axes, count_C: NDArray[np.int64]) -> None:
    """Draw the training images per class as a grey area in the background, on a logarithmic axis at the right."""
    background = axes.twinx()
    background.set_yscale("log")
    background.yaxis.set_major_formatter("{x:g}")
    background.set_ylim(0.8, 1.3 * max(count_C.max(), 1))
    edges = np.arange(len(count_C) + 1) + 0.5
    background.stairs(np.maximum(count_C, 0.8), edges, baseline=0.8, fill=True, color="#eeeeee")
    background.set_ylabel("training images of the class (grey, logarithmic)")
    background.spines[["top", "left"]].set_visible(False)
    axes.set_zorder(background.get_zorder() + 1)
    axes.patch.set_visible(False)


def _rolling_mean(value_C: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean of the values that are not NaN in a centred window, shorter at both ends; NaN if there are none."""
    known_C = ~np.isnan(value_C)
    kernel = np.ones(window)
    total_C = np.convolve(np.where(known_C, value_C, 0.0), kernel, "full")[window // 2 :][: len(value_C)]
    number_C = np.convolve(known_C.astype(float), kernel, "full")[window // 2 :][: len(value_C)]
    return np.where(number_C > 0, total_C / np.maximum(number_C, 1), np.nan)


def _bars(mean: Table, deviation: Table, subject: str, title: str, unit: str, number_format: str, out: Path) -> Figure:
    """Draw one panel per group and one horizontal bar per network, so that many and long names stay readable."""
    networks = list(mean)
    groups = list(next(iter(mean.values())))
    columns = min(len(groups), MAX_COLUMNS)
    rows = math.ceil(len(groups) / columns)
    num_bars = max(len(networks), 2)  # a single bar would fill the panel
    size = 1.6 + 2.3 * columns, 1.1 + rows * (0.55 + 0.3 * num_bars)
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
            axes.text(length + spread + 0.02 * longest, place, f"{length:{number_format}}", va="center", fontsize=8)
        axes.set_title(group, fontsize=10)
        label_axes(axes, x=unit, y="", grid="x")
        axes.tick_params(axis="x", labelbottom=True)
        axes.tick_params(axis="y", length=0)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    panels[0].set_xlim(0, 1.2 * longest or 1)
    panels[0].set_yticks(places, networks)
    panels[0].set_ylim((len(networks) - 1 + num_bars) / 2 + 0.1, (len(networks) - 1 - num_bars) / 2 - 0.1)
    figure.suptitle(f"{subject}{_error_bar_note(deviation)}\n{title}")
    save_figure(figure, out)
    return figure


def _error_bar_note(deviation: Table) -> str:
    """The part of a title that explains the error bars; empty without error bars."""
    return ", ± one standard deviation" if any(any(row.values()) for row in deviation.values()) else ""


def _scaled(table: Table, factor: float) -> dict[str, dict[str, float]]:
    return {network: {name: factor * value for name, value in row.items()} for network, row in table.items()}


TEACHER_MASSES_FILE, TEACHER_KL_FILE = "teacher-masses.png", "teacher-kl.png"
SENSITIVITY_FILE, CLASS_ACCURACY_FILE = "sensitivity.png", "class-accuracy.png"


def draw_comparison(comparison: Comparison, test_labels: NDArray[np.int64], out: Path, *, several_gammas: bool) -> None:
    """Draw all plots, with gamma in the file names if there are several; plots without data are left out."""
    masses, unbiased = {}, {}
    for gamma in comparison.gammas:
        title = comparison_title(comparison, gamma)
        _draw_gamma(comparison, gamma, title, out, f"-gamma{gamma:g}" if several_gammas else "")
        mass_KB, unbiased_K, names = _teacher_masses(comparison, gamma, test_labels, out)
        if mass_KB.size:
            masses[title] = dict(zip(names, mass_KB.tolist(), strict=True))
            unbiased[title] = dict(zip(names, unbiased_K.tolist(), strict=True))
    if masses:
        plot_teacher_masses(masses, unbiased, TEMPERATURE, MASS_BATCH, out / TEACHER_MASSES_FILE)


def _draw_gamma(comparison: Comparison, gamma: float | None, title: str, out: Path, suffix: str) -> None:
    def path(file: str) -> Path:
        return out / f"{Path(file).stem}{suffix}.png"

    mean, deviation = comparison.mean(gamma), comparison.deviation(gamma)
    plot_comparison(mean, deviation, title, path(PLOT_FILE))
    divergence = comparison.mean(gamma, "teacher_kl")
    if divergence:
        spread = comparison.deviation(gamma, "teacher_kl")
        plot_teacher_kl(divergence, spread, TEMPERATURE, title, path(TEACHER_KL_FILE))
    sweeps = sweeps_of(comparison.methods)
    if sweeps:
        plot_sensitivity(sweeps, mean, deviation, title, path(SENSITIVITY_FILE))
    task = _task(comparison, gamma, out)
    class_accuracy = {}
    for network in mean:
        rows = [row.class_accuracy for row in comparison.rows_of(network, gamma)]
        # None, of a class without test images, becomes NaN
        class_accuracy[network] = np.array(rows, dtype=np.float64).mean(axis=0)
    plot_class_accuracy(
        class_accuracy,
        task.train_counts,
        task.groups.group_of_class,
        task.groups.names,
        title,
        path(CLASS_ACCURACY_FILE),
    )


def _teacher_masses(
    comparison: Comparison, gamma: float | None, test_labels: NDArray[np.int64], out: Path
) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[str, ...]]:
    """The group masses of every batch, averaged over the seeds' teachers; the unbiased masses; the group names."""
    groups = _task(comparison, gamma, out).groups
    teachers = [out / row.run / EVALUATION_FILE for row in comparison.rows_of(TEACHER, gamma)]
    masses = [read_record(path, Evaluation, RunError).batch_masses for path in teachers]
    count_K = np.bincount(groups.index[test_labels], minlength=len(groups.names))
    return np.mean(masses, axis=0).T, MASS_BATCH * count_K / count_K.sum(), groups.names


def _task(comparison: Comparison, gamma: float | None, out: Path) -> Task:
    """The classes and groups of one gamma, read from the run of its first teacher."""
    return read_record(out / comparison.rows_of(TEACHER, gamma)[0].run / TASK_FILE, Task, RunError)
