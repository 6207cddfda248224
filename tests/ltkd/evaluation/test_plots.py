from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ltkd.config import MethodConfig
from ltkd.evaluation.plots import (
    Sweep,
    plot_class_accuracy,
    plot_comparison,
    plot_sensitivity,
    plot_teacher_kl,
    plot_teacher_masses,
    sweeps_of,
)
from ltkd.methods.registry import method_config
from ltkd.training.plots import ALL_COLOUR, GROUP_COLOURS

MEAN = {
    "teacher": {"head": 0.6, "tail": 0.1, "all": 0.35},
    "ltkd": {"head": 0.55, "tail": 0.25, "all": 0.4},
    "ltkd:alpha=3": {"head": 0.5, "tail": 0.2, "all": 0.35},
}
DEVIATION = {name: dict.fromkeys(row, 0.01) for name, row in MEAN.items()}
NO_DEVIATION = {name: dict.fromkeys(row, 0.0) for name, row in MEAN.items()}
LTKD_SWEEP = Sweep("ltkd", "alpha", "beta = 1", {3.0: "ltkd:alpha=3", 6.0: "ltkd"}, 6.0)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "plot.png"


def methods(*texts: str) -> dict[str, MethodConfig]:
    """Names such as ``ltkd:alpha=3`` to their configurations, as in a comparison."""
    parts = {text: text.split(":") for text in texts}
    return {
        text: method_config(name, dict(change.split("=") for change in changes))
        for text, (name, *changes) in parts.items()
    }


def title_of(figure: Figure) -> str:
    return figure.get_suptitle()


def test_the_comparison_has_a_panel_per_group_and_a_bar_per_network(out: Path) -> None:
    figure = plot_comparison(MEAN, DEVIATION, "glyphs, gamma 100, recipe toy, 3 seeds", out)
    assert [axes.get_title() for axes in figure.axes] == ["head", "tail", "all"]
    for axes in figure.axes:
        group = axes.get_title()
        assert [bar.get_width() for bar in axes.patches] == [100 * row[group] for row in MEAN.values()]
        assert [text.get_text() for text in axes.texts] == [f"{100 * row[group]:.1f}" for row in MEAN.values()]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(MEAN)
    assert "last epoch" in title_of(figure)
    assert "glyphs, gamma 100, recipe toy, 3 seeds" in title_of(figure)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_groups_have_the_group_colours_and_all_has_its_own(out: Path) -> None:
    figure = plot_comparison(MEAN, DEVIATION, "", out)
    colours = [to_hex(axes.patches[0].get_facecolor()) for axes in figure.axes]
    assert colours == [GROUP_COLOURS[0], GROUP_COLOURS[1], ALL_COLOUR]


def test_error_bars_are_drawn_and_explained_only_if_seeds_differ(out: Path) -> None:
    with_bars, without_bars = plot_comparison(MEAN, DEVIATION, "", out), plot_comparison(MEAN, NO_DEVIATION, "", out)
    ends = with_bars.axes[0].collections[0].get_paths()[0].vertices[:, 0]
    assert ends.tolist() == pytest.approx([59, 61])
    assert "standard deviation" in title_of(with_bars)
    assert not without_bars.axes[0].collections
    assert "standard deviation" not in title_of(without_bars)


def test_many_long_names_of_networks_do_not_overlap(out: Path) -> None:
    names = [f"ltkd_plus:alpha={number}:beta=2:num_groups=10" for number in range(12)]
    figure = plot_comparison(dict.fromkeys(names, MEAN["ltkd"]), dict.fromkeys(names, NO_DEVIATION["ltkd"]), "", out)
    figure.draw_without_rendering()  # the file was drawn with other dots per inch
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))
    assert min(box.x0 for box in boxes) >= 0


def test_groups_that_do_not_fit_into_a_row_are_in_the_next_row(out: Path) -> None:
    row = {f"q{number}": 0.1 * number for number in range(1, 8)} | {"all": 0.4}
    figure = plot_comparison({"ce": row}, {"ce": dict.fromkeys(row, 0.0)}, "", out)
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == list(row)


def test_the_divergence_is_drawn_in_nats(out: Path) -> None:
    mean = {"kd": {"head": 0.3, "tail": 0.1, "all": 0.2}, "ltkd": {"head": 1.3, "tail": 0.7, "all": 1.0}}
    figure = plot_teacher_kl(mean, {name: dict.fromkeys(row, 0.0) for name, row in mean.items()}, 4.0, "glyphs", out)
    for axes in figure.axes:
        assert [bar.get_width() for bar in axes.patches] == [row[axes.get_title()] for row in mean.values()]
        assert "nats" in axes.get_xlabel()
    assert "temperature 4" in title_of(figure)


def test_group_masses_are_drawn_per_batch_with_their_mean_and_the_unbiased_level(out: Path) -> None:
    masses = {
        "gamma 10": {"head": [30.0, 34.0, 32.0], "tail": [34.0, 30.0, 32.0]},
        "gamma 100": {"x": [1.0], "y": [2.0]},
    }
    unbiased = {"gamma 10": {"head": 32.0, "tail": 32.0}, "gamma 100": {"x": 0.5, "y": 2.5}}
    figure = plot_teacher_masses(masses, unbiased, 4.0, 64, out)
    assert [axes.get_title() for axes in figure.axes] == list(masses)
    for axes in figure.axes:
        panel = axes.get_title()
        curves, levels = axes.lines[0::2], axes.lines[1::2]
        assert [list(line.get_ydata()) for line in curves] == list(masses[panel].values())
        assert list(curves[0].get_xdata()) == list(range(1, len(curves[0].get_ydata()) + 1))
        assert [line.get_ydata()[0] for line in levels] == list(unbiased[panel].values())
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert legend.get_texts()[0].get_text() == "head: mean 32.0, unbiased 32.0"


def test_methods_that_differ_in_neither_alpha_nor_beta_are_not_a_sweep() -> None:
    assert sweeps_of(methods("ce", "kd", "bkd", "dkd:beta=2", "ltkd", "ltkd_plus", "ltkd:within_weight=0.5")) == []


def test_methods_that_differ_in_both_parameters_are_not_a_sweep() -> None:
    assert sweeps_of(methods("ltkd:alpha=3:beta=2", "ltkd")) == []


def test_a_sweep_has_one_method_in_ascending_order_with_all_other_parameters_fixed() -> None:
    found = sweeps_of(
        methods("ltkd:alpha=8", "ltkd", "ltkd:alpha=3", "ltkd:beta=2", "ltkd:alpha=1:temperature=2", "dkd")
    )
    assert found == [
        Sweep("ltkd", "alpha", "beta = 1", {3.0: "ltkd:alpha=3", 6.0: "ltkd", 8.0: "ltkd:alpha=8"}, 6.0),
        Sweep("ltkd", "beta", "alpha = 6", {1.0: "ltkd", 2.0: "ltkd:beta=2"}, 1.0),
    ]


def test_a_sweep_without_the_defaults_has_no_base() -> None:
    found = sweeps_of(methods("ltkd:alpha=3:beta=2", "ltkd:alpha=8:beta=2"))
    assert [(sweep.fixed, list(sweep.networks), sweep.base) for sweep in found] == [("beta = 2", [3.0, 8.0], None)]


def test_a_sweep_is_drawn_for_all_classes_and_the_last_group_with_the_default_circled(out: Path) -> None:
    figure = plot_sensitivity([LTKD_SWEEP], MEAN, DEVIATION, "glyphs", out)
    whole, tail = figure.axes
    np.testing.assert_allclose(whole.lines[0].get_xydata(), [[3, 35], [6, 40]])
    np.testing.assert_allclose(tail.lines[0].get_xydata(), [[3, 20], [6, 25]])
    np.testing.assert_allclose(tail.lines[-1].get_xydata(), [[6, 25]])
    assert tail.lines[-1].get_markerfacecolor() == "none"
    assert (tail.get_xlabel(), tail.get_ylabel()) == ("alpha", "tail: test accuracy (%)")
    assert "circled: the default" in title_of(figure)


def test_classes_are_drawn_in_the_order_of_groups_and_training_images(out: Path) -> None:
    counts, accuracy = [5, 500, 50, 60], [0.1, 0.9, float("nan"), 0.5]
    figure = plot_class_accuracy({"teacher": accuracy}, counts, [1, 0, 1, 0], ["head", "tail"], "glyphs", out)
    axes, background = figure.axes
    for line in axes.lines[:2]:  # dots and line have the same values, because few classes are not smoothed
        assert list(line.get_xdata()) == [1, 2, 3, 4]
        np.testing.assert_allclose(line.get_ydata(), [90, 50, np.nan, 10])
    assert [text.get_text() for text in axes.texts] == ["head", "tail"]
    assert list(axes.lines[2].get_xdata()) == [2.5, 2.5]  # the border between the groups
    assert background.patches[0].get_data().values.tolist() == [500, 60, 50, 5]
    assert background.get_yscale() == "log"


def test_the_line_of_many_classes_is_a_rolling_mean_without_nan(out: Path) -> None:
    accuracy = np.linspace(0.9, 0.1, 40)
    accuracy[20] = np.nan
    figure = plot_class_accuracy({"ce": accuracy}, list(range(40, 0, -1)), [0] * 20 + [1] * 20, ["a", "b"], "", out)
    drawn = np.asarray(figure.axes[0].lines[1].get_ydata())
    expected = [100 * np.nanmean(accuracy[max(0, place - 2) : place + 3]) for place in range(40)]
    np.testing.assert_allclose(drawn, expected)
    assert "rolling mean over 5" in figure.axes[0].get_xlabel()


def test_every_network_has_its_own_line_style(out: Path) -> None:
    names = [f"network{number}" for number in range(15)]
    figure = plot_class_accuracy({name: [0.5, 0.2] for name in names}, [9, 1], [0, 1], ["head", "tail"], "", out)
    lines = [line for line in figure.axes[0].lines if line.get_label() in names]
    styles = {(line.get_color(), str(line._dash_pattern)) for line in lines}
    assert len(styles) == len(names)
