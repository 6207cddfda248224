import io
import statistics
from pathlib import Path

import pytest
from rich.console import Console
from training_toys import RECIPE, toy_data

from ltkd.compare import COMPARISON_FILE, PLOT_FILE, Comparison, compare, comparison_table
from ltkd.config import DataConfig
from ltkd.methods import method_config
from ltkd.records import read_record
from ltkd.runs import RunError

DATA = DataConfig(name="glyphs")
SHORT = RECIPE.model_copy(update={"epochs": 2})


def run_compare(out: Path, methods: tuple[str, ...] = ("ce", "ltkd"), seeds: tuple[int, ...] = (0, 1)) -> Comparison:
    return compare(
        DATA,
        toy_data(),
        SHORT,
        out,
        Console(quiet=True),
        teacher_model="resnet8",
        student_model="resnet8",
        methods=[method_config(name) for name in methods],
        seeds=seeds,
        device="cpu",
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("compare") / "toys"
    return out, run_compare(out)


def test_every_method_and_seed_has_a_row_and_a_run(finished: tuple[Path, Comparison]) -> None:
    out, comparison = finished
    assert [(row.network, row.seed) for row in comparison.rows] == [
        ("teacher", 0), ("ce", 0), ("ltkd", 0), ("teacher", 1), ("ce", 1), ("ltkd", 1),
    ]  # fmt: skip
    assert all((out / row.run / "weights.safetensors").is_file() for row in comparison.rows)
    assert read_record(out / COMPARISON_FILE, Comparison, RunError) == comparison
    assert (out / PLOT_FILE).read_bytes().startswith(b"\x89PNG")


def test_mean_and_spread_are_those_of_the_rows(finished: tuple[Path, Comparison]) -> None:
    _, comparison = finished
    tails = [row.accuracy["all"] for row in comparison.rows if row.network == "ltkd"]
    assert comparison.mean()["ltkd"]["all"] == statistics.fmean(tails)
    assert comparison.deviation()["ltkd"]["all"] == statistics.stdev(tails)


def test_an_interrupted_comparison_gives_the_same_rows_as_one_that_was_not(
    finished: tuple[Path, Comparison], tmp_path: Path
) -> None:
    run_compare(tmp_path / "again", methods=("ce",), seeds=(0,))
    before = (tmp_path / "again" / "seed0" / "teacher" / "weights.safetensors").stat().st_mtime_ns
    assert run_compare(tmp_path / "again").rows == finished[1].rows
    assert (tmp_path / "again" / "seed0" / "teacher" / "weights.safetensors").stat().st_mtime_ns == before


def test_the_table_shows_percent_with_spread_for_every_network(finished: tuple[Path, Comparison]) -> None:
    console = Console(width=140, file=io.StringIO())
    with console.capture() as capture:
        console.print(comparison_table(finished[1]))
    text = capture.get()
    for word in ("head", "medium", "tail", "all", "teacher resnet8", "ce resnet8", "ltkd resnet8", "18 images"):
        assert word in text
    mean, spread = (100 * values["ltkd"]["all"] for values in (finished[1].mean(), finished[1].deviation()))
    assert f"{mean:.1f} ± {spread:.1f}" in text
