"""The pictures of training: curves of one run, bars of a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GROUP_COLOURS = ("#1b6ca8", "#5aa469", "#d1603d", "#8d6a9f", "#c9a227", "#5c5c5c")
ALL_COLOUR = "#222222"


def plot_curves(metrics: Sequence[Mapping[str, float]], group_names: Sequence[str], title: str, out: Path) -> None:
    """Loss and test accuracy of every group over the epochs of one run."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    loss_axes.plot([line["epoch"] for line in metrics], [line["loss"] for line in metrics], color=ALL_COLOUR)
    _label(loss_axes, x="epoch", y="loss (mean over the epoch)")
    looks = [line for line in metrics if "accuracy_all" in line]
    for name, colour in zip([*group_names, "all"], [*_colours(len(group_names)), ALL_COLOUR], strict=True):
        accuracies = [100 * line[f"accuracy_{name}"] for line in looks]
        accuracy_axes.plot([line["epoch"] for line in looks], accuracies, color=colour, marker=".", label=name)
    accuracy_axes.set_ylim(0, 100)
    accuracy_axes.set_xlim(*loss_axes.get_xlim())
    _label(accuracy_axes, x="epoch", y="test accuracy (%)")
    accuracy_axes.legend(frameon=False)
    figure.suptitle(title)
    _save(figure, out)


def plot_comparison(
    mean: Mapping[str, Mapping[str, float]], deviation: Mapping[str, Mapping[str, float]], title: str, out: Path
) -> None:
    """Accuracy of every network by group, as bars with one standard deviation.

    Args:
        mean: Network to group to mean accuracy, a fraction.
        deviation: The same of the standard deviations; zeros draw no error bar.
        title: Stands above the picture.
        out: A PNG file.
    """
    networks = list(mean)
    group_names = list(next(iter(mean.values())))
    figure = Figure(figsize=(max(6.5, 1.7 * len(networks)), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(group_names)
    for place, (name, colour) in enumerate(
        zip(group_names, [*_colours(len(group_names) - 1), ALL_COLOUR], strict=True)
    ):
        heights = np.array([100 * mean[network][name] for network in networks])
        spreads = np.array([100 * deviation[network][name] for network in networks])
        left = np.arange(len(networks)) + (place - (len(group_names) - 1) / 2) * width
        axes.bar(left, heights, width * 0.92, color=colour, label=name)
        if spreads.any():
            axes.errorbar(left, heights, yerr=spreads, fmt="none", ecolor="#777777", capsize=2, lw=1)
        for x, height, spread in zip(left, heights, spreads, strict=True):
            axes.text(x, height + spread + 1, f"{height:.0f}", ha="center", fontsize=8)
    axes.set_xticks(np.arange(len(networks)), networks)
    axes.set_ylim(0, 108)
    _label(axes, x="", y="test accuracy (%)")
    figure.legend(frameon=False, ncols=len(group_names), loc="outside lower center")
    axes.set_title(title)
    _save(figure, out)


def _colours(num_groups: int) -> list[str]:
    return [GROUP_COLOURS[group % len(GROUP_COLOURS)] for group in range(num_groups)]


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)


def _save(figure: Figure, out: Path) -> None:
    """Write a PNG, whole or not at all; a Figure made without pyplot needs no display."""
    beside = out.with_name(f".{out.name}.part")
    figure.savefig(beside, format="png", dpi=130)
    beside.replace(out)
