"""The training curves of one run, and the style that all plots share."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ltkd.contract.records import write_atomically

GROUP_COLOURS = ("#1b6ca8", "#5aa469", "#d1603d", "#8d6a9f", "#c9a227", "#5c5c5c")
ALL_COLOUR = "#222222"


def plot_curves(metrics: Sequence[Mapping[str, float]], group_names: Sequence[str], title: str, out: Path) -> Figure:
    """Loss and test accuracy of every group over the epochs of one run."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    loss_axes.plot([line["epoch"] for line in metrics], [line["loss"] for line in metrics], color=ALL_COLOUR)
    label_axes(loss_axes, x="epoch", y="loss (mean over the epoch)")
    evaluated = [line for line in metrics if "accuracy_all" in line]
    for name, colour in zip([*group_names, "all"], [*group_colours(len(group_names)), ALL_COLOUR], strict=True):
        accuracies = [100 * line[f"accuracy_{name}"] for line in evaluated]
        accuracy_axes.plot([line["epoch"] for line in evaluated], accuracies, color=colour, marker=".", label=name)
    accuracy_axes.set_ylim(0, 100)
    accuracy_axes.set_xlim(*loss_axes.get_xlim())
    label_axes(accuracy_axes, x="epoch", y="test accuracy (%)")
    accuracy_axes.legend(frameon=False)
    figure.suptitle(title)
    save_figure(figure, out)
    return figure


def group_colours(num_groups: int) -> list[str]:
    """A colour for every group; the colours repeat after six."""
    return [GROUP_COLOURS[group % len(GROUP_COLOURS)] for group in range(num_groups)]


def label_axes(axes: Axes, x: str, y: str, grid: Literal["x", "y"] = "y") -> None:
    """Label both axes, remove the upper and right spines and add grid lines.

    Args:
        axes: The axes to style.
        x: Label with unit.
        y: Label with unit.
        grid: The axis that gets grid lines.
    """
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)


def save_figure(figure: Figure, out: Path) -> None:
    """Write a PNG file atomically; a Figure made without pyplot needs no display."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    write_atomically(out, content.getvalue())
