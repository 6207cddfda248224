import io
import statistics
from pathlib import Path

import pytest
from rich.console import Console
from training_toys import CPU, RECIPE, toy_data

from ltkd.config import DataConfig
from ltkd.contract.class_groups import groups_by_share
from ltkd.contract.records import read_record
from ltkd.data.datasets import Dataset
from ltkd.errors import RunError, UsageError
from ltkd.evaluation.compare import Experiment, MethodSpec, compare, parse_method
from ltkd.evaluation.evaluate import MASS_BATCH
from ltkd.evaluation.plots import CLASS_ACCURACY_FILE, SENSITIVITY_FILE, TEACHER_KL_FILE, TEACHER_MASSES_FILE
from ltkd.evaluation.results import COMPARISON_FILE, PLOT_FILE, Comparison, RunResult, comparison_tables
from ltkd.methods.registry import method_config

DATA = DataConfig(name="glyphs")
SHORT = RECIPE.model_copy(update={"epochs": 2})
EVERY_PICTURE = {PLOT_FILE, TEACHER_KL_FILE, TEACHER_MASSES_FILE, CLASS_ACCURACY_FILE}
NUM_TEST = 30  # of each of three classes: enough for a batch of group masses


def toys(config: DataConfig, console: Console) -> Dataset:
    """The colours, with a longer tail where one is asked for."""
    return toy_data((24, 10, 3) if config.gamma is None else (20, 8, int(20 / config.gamma)), NUM_TEST)


def run_compare(
    out: Path,
    methods: tuple[str, ...] = ("ce", "ltkd"),
    seeds: tuple[int, ...] = (0, 1),
    gammas: tuple[float | None, ...] = (None,),
) -> Comparison:
    experiment = Experiment(
        data=DATA,
        recipe=SHORT,
        teacher_model="resnet8",
        student_model="resnet8",
        methods=[parse_method(text) for text in methods],
        seeds=seeds,
        gammas=gammas,
        execution=CPU,
    )
    return compare(experiment, out, Console(quiet=True), load=toys)


def pictures(out: Path) -> set[str]:
    """Every PNG, and everything else that saving one could have left."""
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    return {path.name for path in out.iterdir() if path.is_file()} - {COMPARISON_FILE}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("compare") / "toys"
    return out, run_compare(out)


@pytest.fixture(scope="module")
def tails(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("compare") / "tails"
    return out, run_compare(out, ("ltkd", "ltkd:alpha=3"), (0,), (2.0, 10.0))


def test_every_method_and_seed_has_a_row_and_a_run(finished: tuple[Path, Comparison]) -> None:
    out, comparison = finished
    assert [(row.network, row.seed) for row in comparison.rows] == [
        ("teacher", 0), ("ce", 0), ("ltkd", 0), ("teacher", 1), ("ce", 1), ("ltkd", 1),
    ]  # fmt: skip
    assert all((out / row.run / "weights.safetensors").is_file() for row in comparison.rows)
    assert read_record(out / COMPARISON_FILE, Comparison, RunError) == comparison


def test_a_comparison_leaves_every_picture_that_has_something_to_show_and_nothing_half_written(
    finished: tuple[Path, Comparison],
) -> None:
    assert pictures(finished[0]) == EVERY_PICTURE


def test_without_a_distilled_student_there_is_no_picture_of_divergence(tmp_path: Path) -> None:
    run_compare(tmp_path / "ce", methods=("ce",), seeds=(0,))
    assert pictures(tmp_path / "ce") == EVERY_PICTURE - {TEACHER_KL_FILE}


def test_several_tails_have_pictures_and_runs_of_their_own_but_share_one_of_the_masses(
    tails: tuple[Path, Comparison],
) -> None:
    out, comparison = tails
    each = {Path(name).stem for name in (PLOT_FILE, TEACHER_KL_FILE, CLASS_ACCURACY_FILE, SENSITIVITY_FILE)}
    assert pictures(out) == {f"{stem}-gamma{gamma}.png" for stem in each for gamma in (2, 10)} | {TEACHER_MASSES_FILE}
    assert comparison.gammas == [2.0, 10.0]
    assert comparison.train_counts == ((20, 8, 10), (20, 8, 2))
    assert all(row.run == f"gamma{row.gamma:g}/seed0/{row.network.replace(':', '-')}" for row in comparison.rows)


def test_tails_may_group_the_classes_differently(tails: tuple[Path, Comparison]) -> None:
    # at gamma 2 the last class is not the rarest, so the pictures must take each tail's own groups
    groups = [groups_by_share(counts).group_of_class for counts in tails[1].train_counts]
    assert groups == [(0, 2, 1), (0, 1, 2)]
    for row in tails[1].rows:
        of_class = dict(zip(groups[tails[1].gammas.index(row.gamma)], row.class_accuracy, strict=True))
        assert [of_class[group] for group in range(3)] == [row.accuracy[name] for name in tails[1].group_names]


def test_only_students_with_a_teacher_have_a_divergence(finished: tuple[Path, Comparison]) -> None:
    assert {row.network for row in finished[1].rows if row.teacher_kl is not None} == {"ltkd"}
    assert set(finished[1].mean(None, "teacher_kl")) == {"ltkd"}


def test_the_accuracy_of_classes_and_groups_agree(finished: tuple[Path, Comparison]) -> None:
    def close(row: RunResult) -> bool:  # every class has as many test images
        return row.accuracy["all"] == pytest.approx(statistics.fmean(each or 0.0 for each in row.class_accuracy))

    assert all(close(row) for row in finished[1].rows)


def test_mean_and_spread_are_those_of_the_rows(finished: tuple[Path, Comparison]) -> None:
    _, comparison = finished
    accuracies = [row.accuracy["all"] for row in comparison.rows if row.network == "ltkd"]
    assert comparison.mean(None)["ltkd"]["all"] == statistics.fmean(accuracies)
    assert comparison.deviation(None)["ltkd"]["all"] == statistics.stdev(accuracies)


def test_an_interrupted_comparison_gives_the_same_rows_as_one_that_was_not(
    finished: tuple[Path, Comparison], tmp_path: Path
) -> None:
    run_compare(tmp_path / "again", methods=("ce",), seeds=(0,))
    before = (tmp_path / "again" / "seed0" / "teacher" / "weights.safetensors").stat().st_mtime_ns
    assert run_compare(tmp_path / "again").rows == finished[1].rows
    assert (tmp_path / "again" / "seed0" / "teacher" / "weights.safetensors").stat().st_mtime_ns == before


def test_the_table_shows_percent_with_spread_for_every_network(finished: tuple[Path, Comparison]) -> None:
    text = printed(finished[1])
    for word in (
        "head",
        "medium",
        "tail",
        "all",
        "teacher resnet8",
        "ce resnet8",
        "ltkd resnet8",
        "90 images",
        "2 seeds",
    ):
        assert word in text
    mean, spread = (100 * values["ltkd"]["all"] for values in (finished[1].mean(None), finished[1].deviation(None)))
    assert f"{mean:.1f}±{spread:.1f}" in text


def test_every_tail_has_a_table(tails: tuple[Path, Comparison]) -> None:
    assert len(comparison_tables(tails[1])) == 2
    for title in ("gamma 2, recipe toy, 1 seed", "gamma 10, recipe toy, 1 seed"):
        assert title in printed(tails[1])


def printed(comparison: Comparison) -> str:
    console = Console(width=160, file=io.StringIO())
    with console.capture() as capture:
        for table in comparison_tables(comparison):
            console.print(table)
    return capture.get()


def test_a_contestant_is_a_method_with_what_is_changed() -> None:
    changed = parse_method("ltkd:alpha=3:beta=2")
    assert (changed.name, changed.folder, changed.method.name) == ("ltkd:alpha=3:beta=2", "ltkd-alpha=3-beta=2", "ltkd")
    assert (changed.method.parameters["alpha"], changed.method.parameters["beta"]) == (3.0, 2.0)
    assert parse_method("ce") == MethodSpec("ce", method_config("ce"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [("magic", "unknown method 'magic'"), ("ltkd:gamma=3", "no parameter 'gamma'"), ("ltkd:alpha", "NAME=VALUE")],
)
def test_a_contestant_that_is_none_is_refused(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_method(text)


def test_a_method_named_twice_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="named twice"):
        run_compare(tmp_path / "twice", methods=("ce", "ce"))
    assert list(tmp_path.iterdir()) == []


def test_the_toys_fill_a_batch_of_masses() -> None:
    assert MASS_BATCH <= 3 * NUM_TEST < 2 * MASS_BATCH
