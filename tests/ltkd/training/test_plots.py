from pathlib import Path

import pytest
from matplotlib.figure import Figure

from ltkd.training.plots import plot_curves, save_figure

METRICS = [
    {"epoch": 1, "loss": 2.0},
    {"epoch": 2, "loss": 1.5, "accuracy_head": 0.5, "accuracy_tail": 0.1, "accuracy_all": 0.3},
]


def test_the_curves_show_the_losses_and_the_accuracies_in_percent(tmp_path: Path) -> None:
    figure = plot_curves(METRICS, ["head", "tail"], "a run", tmp_path / "curves.png")
    loss, accuracy = figure.axes
    assert loss.lines[0].get_xydata().tolist() == [[1, 2.0], [2, 1.5]]
    drawn = {str(line.get_label()): line.get_xydata().tolist() for line in accuracy.lines}
    assert drawn == {"head": [[2, 50]], "tail": [[2, 10]], "all": [[2, 30]]}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_that_cannot_be_drawn_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "plot.png").write_bytes(b"old")
    figure = Figure()
    figure.suptitle("$not \\mathematics{$")  # fails when it is drawn
    with pytest.raises(ValueError, match="not"):
        save_figure(figure, tmp_path / "plot.png")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    assert (tmp_path / "plot.png").read_bytes() == b"old"


def test_a_figure_that_cannot_be_written_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_figure(Figure(), tmp_path / "plot.png")
    assert list(tmp_path.iterdir()) == []
