"""Whether the service's confidence statements hold, per group: prediction sets, abstention and expected accuracy.

    python -m benchmarks.confidence [--worlds 500] [--run RUN ...] [--divisions 50]

In simulated worlds the true class probabilities are known. Each world draws its own images and fits the calibration,
which is then compared with the exact probabilities of 30,000 further images. The logits of the simulated model are
wrong in two ways: by a temperature that differs between groups, and by a preference for frequent classes, which no
temperature corrects. For runs of ltkd, the test images are split at random many times, as ``ltkd export`` splits them
once. Prints two tables and writes docs/benchmarks/confidence.json and .png.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import betabinom

from benchmarks.run_metadata import run_metadata
from export.certification.calibration import certify_confidence
from export.certification.statistics import calibration_error
from export.schema import ConfidenceCertificate
from ltkd.contract.calibration import calibrated_probabilities, least_probabilities, softmax, temperatures
from ltkd.contract.class_groups import ClassGroups
from ltkd.data.datasets import load_dataset
from ltkd.evaluation.evaluate import logits_on_test
from ltkd.training.plots import group_colours, label_axes, save_figure
from ltkd.training.run_folder import open_run

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "benchmarks" / "confidence.json"

TARGET = 0.9  # coverage; in the simulated worlds also precision
RUN_PRECISION = 0.5  # precision for runs; students trained for minutes are too inaccurate to certify 0.9
SIZES = (150, 1000)  # images per part
POOL = 30_000
GROUPS = ClassGroups(names=("head", "medium", "tail"), group_of_class=(0,) * 7 + (1,) * 7 + (2,) * 6)
TEMPERATURES = np.array([1.3, 1.8, 2.5])
PREFERENCE = np.array([0.6, 0.0, -0.6])  # added to the logits of each group
DIVISION = (0.1, 0.2, 0.2, 0.5)  # int8 ranges, temperatures, thresholds, certification

Row = dict[str, str | int | float | None]


@dataclass(frozen=True)
class SimulatedImages:
    """Logits, labels and true class probabilities of simulated images."""

    logits_NC: NDArray[np.float32]
    labels_N: NDArray[np.int64]
    truth_NC: NDArray[np.float64]


def simulate(num: int, rng: np.random.Generator) -> SimulatedImages:
    """Images of a world in which the exact probabilities are known."""
    num_classes = len(GROUPS.group_of_class)
    exact_NC = rng.normal(0, 1.5, (num, num_classes))
    exact_NC[np.arange(num), rng.integers(0, num_classes, num)] += 6
    truth_NC = softmax(exact_NC)
    labels_N = (truth_NC.cumsum(axis=1) > rng.random((num, 1))).argmax(axis=1)
    model_logits_NC = exact_NC + PREFERENCE[GROUPS.index]
    model_logits_NC *= TEMPERATURES[GROUPS.index[model_logits_NC.argmax(axis=1)], None]
    return SimulatedImages(model_logits_NC.astype(np.float32), labels_N, truth_NC)


def simulate_worlds(size: int, num_worlds: int, pool: SimulatedImages) -> list[Row]:
    """Fit in many worlds with ``size`` images per part, and count how often each guarantee holds."""
    facts: list[list[dict[str, float]]] = [[] for _ in GROUPS.names]
    before_N = softmax(pool.logits_NC).max(axis=1)
    for world in range(num_worlds):
        rng = np.random.default_rng([size, world])
        parts = [simulate(size, rng) for _ in range(3)]
        found = fit_and_certify([(part.logits_NC, part.labels_N) for part in parts], GROUPS, TARGET)
        for group, facts_of_group in enumerate(check_guarantees(found, pool, before_N)):
            facts[group].append(facts_of_group)
    rows: list[Row] = []
    for name, of_group in zip(GROUPS.names, facts, strict=True):
        means = {key: _mean([facts_of_group[key] for facts_of_group in of_group]) for key in of_group[0]}
        rows.append({"images a part": size, "group": name, "worlds": num_worlds, **means})
    return rows


def _mean(values: Sequence[float]) -> float | None:
    """The mean of the values that are not NaN; None if all are NaN."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else None


def fit_and_certify(
    parts: Sequence[tuple[NDArray[np.floating], NDArray[np.int64]]], groups: ClassGroups, precision: float
) -> ConfidenceCertificate:
    """Fit on the first two parts and certify on the third."""
    temperature, threshold, certify = parts
    return certify_confidence(*temperature, *threshold, *certify, groups, precision, TARGET)


def check_guarantees(
    found: ConfidenceCertificate, pool: SimulatedImages, before_N: NDArray[np.float64]
) -> list[dict[str, float]]:
    """Check the guarantees of each group; NaN for a guarantee that was not given.

    Args:
        found: The fitted calibration.
        pool: Images that were not used for the fit.
        before_N: The confidence of the model in these images before calibration.
    """
    temperature_K, least_C = temperatures(found.calibration), least_probabilities(found.calibration, GROUPS)
    probability_NC = calibrated_probabilities(pool.logits_NC, GROUPS, temperature_K)
    predicted_N = pool.logits_NC.argmax(axis=1)
    right_N = pool.truth_NC[np.arange(POOL), predicted_N]
    confidence_N = probability_NC.max(axis=1)
    facts = []
    for group, calibration in enumerate(found.calibration):
        columns, rows = GROUPS.index == group, GROUPS.index[predicted_N] == group
        truth_NG = pool.truth_NC[:, columns]
        coverage = (truth_NG * (probability_NC[:, columns] >= least_C[columns])).sum() / truth_NG.sum()
        confidence_M, correct_M = confidence_N[rows], right_N[rows]
        threshold = calibration.abstention.threshold
        accepted_M = confidence_M >= (2 if threshold is None else threshold)
        precision = correct_M[accepted_M].mean() if accepted_M.any() else np.nan
        facts.append(
            {
                "fitted on": calibration.prediction_set.num_images,
                "band low": calibration.prediction_set.low,
                "band high": calibration.prediction_set.high,
                "coverage": coverage,
                "below band": coverage < calibration.prediction_set.low,
                "above band": coverage > calibration.prediction_set.high,
                "intervals hold": np.mean(
                    [
                        part.accuracy.low <= correct_M[inside].mean() <= part.accuracy.high
                        for part in calibration.expected_accuracy
                        if (inside := (confidence_M > part.above) & (confidence_M <= part.up_to)).any()
                    ]
                    or [np.nan]
                ),
                "bins": len(calibration.expected_accuracy),
                "guarantee given": threshold is not None,
                "guarantee broken": bool(precision < TARGET),  # as a share of all worlds; NaN counts as not broken
                "precision": precision,
                "accepted": accepted_M.mean(),
                "temperature": calibration.temperature,
                "ece before": calibration_error(before_N[rows], correct_M),
                "ece after": calibration_error(confidence_M, correct_M),
            }
        )
    return facts


def split_rows(labels_N: NDArray[np.int64], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """The rows of each part of DIVISION, with the same shares of each class."""
    parts: list[list[NDArray[np.int64]]] = [[] for _ in DIVISION]
    for label in np.unique(labels_N):
        rows = rng.permutation(np.flatnonzero(labels_N == label))
        for part, piece in zip(
            parts, np.split(rows, np.round(np.cumsum(DIVISION[:-1]) * len(rows)).astype(int)), strict=True
        ):
            part.append(piece)
    return [np.concatenate(part) for part in parts]


def certify_splits(
    name: str, logits_NC: NDArray[np.floating], labels_N: NDArray[np.int64], groups: ClassGroups, times: int
) -> list[Row]:
    """Split the test images many times, and fit and certify each time."""
    found = []
    for division in range(times):
        _, *parts = split_rows(labels_N, np.random.default_rng(division))
        found.append(fit_and_certify([(logits_NC[rows], labels_N[rows]) for rows in parts], groups, RUN_PRECISION))
    return [_summary(name, group, found, groups) for group in range(len(groups.names))]


def _summary(name: str, group: int, found: Sequence[ConfidenceCertificate], groups: ClassGroups) -> Row:
    calibrations = [certificate.calibration[group] for certificate in found]
    sets = [calibration.prediction_set for calibration in calibrations]
    coverages = [one.coverage for one in sets if one.coverage]
    # the observed coverage on this many certify images varies more than the true coverage
    rank = int(np.ceil((sets[0].num_images + 1) * TARGET - 1e-9))
    distribution = betabinom(coverages[0].n, rank, sets[0].num_images + 1 - rank)
    low, high = (float(distribution.ppf(share)) / coverages[0].n for share in (0.05, 0.95))
    precision = [one.abstention.precision.value for one in calibrations if one.abstention.precision]
    reliability = [certificate.reliability[group] for certificate in found]
    bins = [part for one in calibrations for part in one.expected_accuracy]
    return {
        "run": name,
        "group": groups.names[group],
        "divisions": len(found),
        "fitted on": sets[0].num_images,
        "certified on": coverages[0].n,
        "band low": sets[0].low,
        "band high": sets[0].high,
        "seen band low": low,
        "seen band high": high,
        "coverage": float(np.mean([one.value for one in coverages])),
        "lowest coverage": min(one.value for one in coverages),
        "highest coverage": max(one.value for one in coverages),
        "in seen band": float(np.mean([low <= one.value <= high for one in coverages])),
        "mean set size": float(np.mean([one.mean_set_size for one in found])),
        "bins": len(bins) / len(found),
        "guarantee given": float(np.mean([one.abstention.threshold is not None for one in calibrations])),
        "precision": float(np.mean(precision)) if precision else None,
        "precision below target": float(np.mean([value < RUN_PRECISION for value in precision])) if precision else None,
        "accepted": float(np.mean([one.abstention.coverage for one in calibrations])),
        "temperature": float(np.mean([one.temperature for one in calibrations])),
        "ece before": float(np.mean([one.ece_before for one in reliability if one.ece_before is not None])),
        "ece after": float(np.mean([one.ece_after for one in reliability if one.ece_after is not None])),
        "ece null": float(np.mean([one.ece_null for one in reliability if one.ece_null is not None])),
    }


def certify_runs(paths: Sequence[Path], times: int, console: Console) -> list[Row]:
    """The rows of every run; images that runs share are loaded once."""
    rows: list[Row] = []
    loaded = None
    for path in paths:
        run = open_run(path)
        if loaded is None or loaded[0] != run.config.data:
            loaded = run.config.data, load_dataset(run.config.data)
        console.print(f"[dim]{path}")
        labels = loaded[1].test_labels
        rows += certify_splits(path.as_posix(), logits_on_test(run, loaded[1]), labels, run.task.groups, times)
    return rows


def table_of(rows: Sequence[Row], title: str, columns: Sequence[str]) -> Table:
    """Some columns of the rows as a table."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        values = [row[column] for column in columns]
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values))
    return table


def plot(worlds: Sequence[Row], runs: Sequence[Row], out: Path) -> None:
    """Plot coverage with its expected range, and the calibration error before and after; one marker per group."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    coverage, error = figure.subplots(1, 2)
    shown = runs or worlds
    colours = dict(zip(dict.fromkeys(str(row["group"]) for row in shown), group_colours(6), strict=False))
    for place, row in enumerate(shown):
        _plot_coverage(coverage, place, row, colours[str(row["group"])])
        before, after = float(row["ece before"] or 0), float(row["ece after"] or 0)
        error.plot([place, place], [before, after], color=colours[str(row["group"])], linewidth=1)
        error.plot(place, before, "o", markerfacecolor="white", color=colours[str(row["group"])])
        error.plot(place, after, "o", color=colours[str(row["group"])])
        if runs:
            error.plot([place - 0.3, place + 0.3], [float(row["ece null"] or 0)] * 2, color="grey")
    source = "run" if runs else "images a part"
    names = [f"{Path(str(row[source])).parent.name if runs else row[source]}\n{row['group']}" for row in shown]
    for axes in (coverage, error):
        axes.set_xticks(range(len(shown)), names, fontsize=8)
    coverage.axhline(TARGET, color="grey", linewidth=0.8, linestyle=":")
    label_axes(coverage, "", "coverage of prediction sets")
    label_axes(error, "", "expected calibration error")
    coverage.set_title("Mean coverage, 5-95 % range expected (bar), lowest to highest (line)", fontsize=9)
    error.set_title("Before (open), after (filled), expected by chance alone (grey)", fontsize=9)
    save_figure(figure, out)


def _plot_coverage(axes: Axes, place: int, row: Row, colour: str) -> None:
    low, high = (
        float(row[key] or 0)
        for key in (("seen band low", "seen band high") if "run" in row else ("band low", "band high"))
    )
    axes.bar(place, high - low, bottom=low, width=0.6, color=colour, alpha=0.25)
    if "run" in row:
        axes.plot(
            [place, place], [float(row["lowest coverage"] or 0), float(row["highest coverage"] or 0)], color=colour
        )
    axes.plot(place, float(row["coverage"] or 0), "o", color=colour)


def json_record(worlds: Sequence[Row], runs: Sequence[Row], command: str) -> dict[str, object]:
    """The content of the JSON file."""
    return {
        **run_metadata(command, ("numpy", "scipy", "torch")),
        "targets": {"coverage": TARGET, "precision": TARGET, "precision of runs": RUN_PRECISION},
        "simulated": list(worlds),
        "runs": list(runs),
    }


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.confidence", description=__doc__.partition("\n")[0])
    parser.add_argument("--worlds", type=int, default=500, help="simulated worlds for each number of images")
    parser.add_argument(
        "--run", type=Path, action="append", default=[], help="run whose test images are split; may be repeated"
    )
    parser.add_argument("--divisions", type=int, default=50, help="number of random splits per run")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file; a figure is written next to it")
    arguments = parser.parse_args()
    console = Console(width=190)
    pool = simulate(POOL, np.random.default_rng(0))
    worlds = [row for size in SIZES for row in simulate_worlds(size, arguments.worlds, pool)]
    shown = ["images a part", "group", "fitted on", "coverage", "below band", "above band", "intervals hold"]
    shown += ["guarantee given", "guarantee broken", "accepted", "ece before", "ece after"]
    console.print(table_of(worlds, f"{arguments.worlds} simulated worlds", shown))
    runs = certify_runs(arguments.run, arguments.divisions, console)
    if runs:
        shown = [
            "run",
            "group",
            "fitted on",
            "seen band low",
            "seen band high",
            "coverage",
            "lowest coverage",
            "highest coverage",
        ]
        shown += ["in seen band", "guarantee given", "precision", "precision below target", "accepted"]
        shown += ["ece before", "ece after", "ece null"]
        console.print(table_of(runs, f"{arguments.divisions} splits of the test images", shown))
    flags = [
        f"--worlds {arguments.worlds}",
        *(f"--run {path.as_posix()}" for path in arguments.run),
        f"--divisions {arguments.divisions}",
    ]
    content = json_record(worlds, runs, " ".join(["python -m benchmarks.confidence", *flags]))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=2) + "\n")
    plot(worlds, runs, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
