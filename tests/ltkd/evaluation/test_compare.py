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
ALL_PLOTS = {PLOT_FILE, TEACHER_KL_FILE, TEACHER_MASSES_FILE, CLASS_ACCURACY_FILE}
NUM_TEST = 30  # per class, of three classes: enough for a batch of group masses


def load_toys(config: DataConfig, console: Console) -> Dataset:
    """The toy images, with other training counts if there is a gamma."""
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
    return compare(experiment, out, Console(quiet=True), load=load_toys)


def plot_files(out: Path) -> set[str]:
    """The names of all files except compare.json, so of plots and of files that a failed write would leave."""
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    return {path.name for path in out.iterdir() if path.is_file()} - {COMPARISON_FILE}


@pytest.fixture(scope="module")
def seeds_comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("compare") / "toys"
    return out, run_compare(out)


@pytest.fixture(scope="module")
def gammas_comparison(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    out = tmp_path_factory.mktemp("compare") / "gammas"
    return out, run_compare(out, ("ltkd", "ltkd:alpha=3"), (0,), (2.0, 10.0))


def test_every_method_and_seed_has_a_row_and_a_run(seeds_comparison: tuple[Path, Comparison]) -> None:
    out, comparison = seeds_comparison
    assert [(row.network, row.seed) for row in comparison.rows] == [
        ("teacher", 0), ("ce", 0), ("ltkd", 0), ("teacher", 1), ("ce", 1), ("ltkd", 1),
    ]  # fmt: skip
    assert all((out / row.run / "weights.safetensors").is_file() for row in comparison.rows)
    assert read_record(out / COMPARISON_FILE, Comparison, RunError) == comparison


def test_a_comparison_writes_every_plot_that_has_data_and_no_partial_files(
    seeds_comparison: tuple[Path, Comparison],
) -> None:
    assert plot_files(seeds_comparison[0]) == ALL_PLOTS


def test_without_a_distilled_student_there_is_no_plot_of_the_divergence(tmp_path: Path) -> None:
    run_compare(tmp_path / "ce", methods=("ce",), seeds=(0,))
    assert plot_files(tmp_path / "ce") == ALL_PLOTS - {TEACHER_KL_FILE}


def test_every_gamma_has_its_own_plots_and_runs_but_the_plot_of_the_masses_is_shared(
    gammas_comparison: tuple[Path, Comparison],
) -> None:
    out, comparison = gammas_comparison
    stems = {Path(name).stem for name in (PLOT_FILE, TEACHER_KL_FILE, CLASS_ACCURACY_FILE, SENSITIVITY_FILE)}
    assert plot_files(out) == {f"{stem}-gamma{gamma}.png" for stem in stems for gamma in (2, 10)} | {
        TEACHER_MASSES_FILE
    }
    assert comparison.gammas == [2.0, 10.0]
    assert comparison.train_counts == ((20, 8, 10), (20, 8, 2))
    assert all(row.run == f"gamma{row.gamma:g}/seed0/{row.network.replace(':', '-')}" for row in comparison.rows)


def test_every_gamma_has_its_own_class_groups(gammas_comparison: tuple[Path, Comparison]) -> None:
    # at gamma 2 the last class is not the rarest, so the plots must use the groups of each gamma
    groups = [groups_by_share(counts).group_of_class for counts in gammas_comparison[1].train_counts]
    assert groups == [(0, 2, 1), (0, 1, 2)]
    for row in gammas_comparison[1].rows:
        of_class = dict(zip(groups[gammas_comparison[1].gammas.index(row.gamma)], row.class_accuracy, strict=True))
        assert [of_class[group] for group in range(3)] == [
            row.accuracy[name] for name in gammas_comparison[1].group_names
        ]


def test_only_distilled_students_have_a_divergence(seeds_comparison: tuple[Path, Comparison]) -> None:
    assert {row.network for row in seeds_comparison[1].rows if row.teacher_kl is not None} == {"ltkd"}
    assert set(seeds_comparison[1].mean(None, "teacher_kl")) == {"ltkd"}


def test_the_accuracy_of_classes_and_groups_agree(seeds_comparison: tuple[Path, Comparison]) -> None:
    def agrees(row: RunResult) -> bool:  # all classes have the same number of test images
        return row.accuracy["all"] == pytest.approx(statistics.fmean(value or 0.0 for value in row.class_accuracy))

    assert all(agrees(row) for row in seeds_comparison[1].rows)


def test_mean_and_deviation_are_computed_from_the_rows(seeds_comparison: tuple[Path, Comparison]) -> None:
    _, comparison = seeds_comparison
    accuracies = [row.accuracy["all"] for row in comparison.rows if row.network == "ltkd"]
    assert comparison.mean(None)["ltkd"]["all"] == statistics.fmean(accuracies)
    assert comparison.deviation(None)["ltkd"]["all"] == statistics.stdev(accuracies)


def test_an_interrupted_comparison_gives_the_same_rows_as_an_uninterrupted_one(
    seeds_comparison: tuple[Path, Comparison], tmp_path: Path
) -> None:
    run_compare(tmp_path / "again", methods=("ce",), seeds=(0,))
    before = (tmp_path / "again" / "seed0" / "teacher" / "weights.safetensors").stat().st_mtime_ns
    assert run_compare(tmp_path / "again").rows == seeds_comparison[1].rows
    assert (tmp_path / "again" / "seed0" / "teacher" / "weights.safetensors").stat().st_mtime_ns == before


def test_the_table_has_percent_and_deviation_for_every_network(seeds_comparison: tuple[Path, Comparison]) -> None:
    text = printed(seeds_comparison[1])
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
    mean, deviation = (
        100 * values["ltkd"]["all"] for values in (seeds_comparison[1].mean(None), seeds_comparison[1].deviation(None))
    )
    assert f"{mean:.1f}±{deviation:.1f}" in text


def test_every_gamma_has_a_table(gammas_comparison: tuple[Path, Comparison]) -> None:
    assert len(comparison_tables(gammas_comparison[1])) == 2
    for title in ("gamma 2, recipe toy, 1 seed", "gamma 10, recipe toy, 1 seed"):
        assert title in printed(gammas_comparison[1])


def printed(comparison: Comparison) -> str:
    console = Console(width=160, file=io.StringIO())
    with console.capture() as capture:
        for table in comparison_tables(comparison):
            console.print(table)
    return capture.get()


def test_a_method_is_parsed_with_its_parameters() -> None:
    spec = parse_method("ltkd:alpha=3:beta=2")
    assert (spec.name, spec.folder, spec.method.name) == ("ltkd:alpha=3:beta=2", "ltkd-alpha=3-beta=2", "ltkd")
    assert (spec.method.parameters["alpha"], spec.method.parameters["beta"]) == (3.0, 2.0)
    assert parse_method("ce") == MethodSpec("ce", method_config("ce"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [("magic", "unknown method 'magic'"), ("ltkd:gamma=3", "no parameter 'gamma'"), ("ltkd:alpha", "NAME=VALUE")],
)
def test_an_invalid_method_raises_an_error(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_method(text)


def test_a_method_given_twice_raises_an_error_before_training(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="given twice"):
        run_compare(tmp_path / "twice", methods=("ce", "ce"))
    assert list(tmp_path.iterdir()) == []


def test_the_test_images_fill_exactly_one_batch_of_masses() -> None:
    assert MASS_BATCH <= 3 * NUM_TEST < 2 * MASS_BATCH
