"""How often gate G3 errs, measured on simulated candidates with a known true loss.

    python -m benchmarks.gates [--quick] [--out FILE]

Prints a table and writes docs/benchmarks/gates.json. Each certification calls ``compare`` and ``task_accuracy`` with
three groups of equal size. There are three kinds of candidates: one loses nothing, one loses exactly the margin in one
group, and one loses exactly the overall margin in every group. A false alarm is a FAIL of the first kind. A false pass
is a PASS of the other kinds. The nominal probability of each is 5 %. INCONCLUSIVE is not an error, because it
certifies nothing.

The table also has the exact probability that the damaged row alone passes, by enumeration, with Tango's upper limit and
with the upper limit that the gate uses.

Shape legend: N images, C classes.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import binom

from benchmarks.run_metadata import run_metadata
from export.certification.accuracy_margins import MARGINS
from export.certification.comparison import compare
from export.certification.gates import task_accuracy
from export.certification.statistics import clopper_pearson, images_needed, loss_upper, tango_upper
from export.schema import ALL, Verdict
from ltkd.contract.bundle import Precision
from ltkd.contract.class_groups import ClassGroups

OUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "gates.json"
CERTIFICATIONS = 500
NOMINAL = 0.05
GROUPS = ClassGroups(names=("head", "medium", "tail"), group_of_class=(0, 1, 2))
Loss = Literal["nothing", "the margin in the tail", "the overall margin everywhere"]
REFERENCE_ACCURACY = 0.7


@dataclass(frozen=True)
class Setting:
    """One kind of simulated certification.

    Attributes:
        precision: The precision whose margins are used.
        images: Images per group.
        discordant: Share of images that only one of the two models classifies correctly, before any loss.
        loss: True loss of the candidate.
    """

    precision: Precision
    images: int
    discordant: float
    loss: Loss

    def probabilities(self, group: str) -> tuple[float, float]:
        """The probabilities that an image of a group changes from correct to wrong, and from wrong to correct."""
        margins = MARGINS[self.precision]
        damaged = {
            "nothing": 0.0,
            "the margin in the tail": margins.of("tail") if group == "tail" else 0.0,
            "the overall margin everywhere": margins.of(ALL),
        }
        return self.discordant / 2 + damaged[self.loss], self.discordant / 2


# few and many images; from no disagreement to far more than int8 causes; fewer and more images than certify a margin
CONDITIONS: tuple[tuple[Precision, int, float], ...] = (
    ("fp32", 600, 0.0),
    ("fp32", 1_667, 0.002),
    ("fp32", 300, 0.05),
    ("int8", 150, 0.0),
    ("int8", 300, 0.01),
    ("int8", 1_667, 0.03),
    ("int8", 300, 0.08),
)


def settings() -> list[Setting]:
    """All simulated settings."""
    return [Setting(*condition, loss) for condition in CONDITIONS for loss in get_args(Loss)]


def certify(setting: Setting, random: np.random.Generator) -> Verdict:
    """Simulate one certification and return its verdict."""
    reference_NC, candidate_NC, labels_N = simulate(setting, random)
    return task_accuracy(compare(reference_NC, candidate_NC, labels_N, GROUPS, MARGINS[setting.precision])).verdict


def simulate(
    setting: Setting, random: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Logits of reference and candidate, and the labels; the images are drawn independently."""
    labels_N = np.repeat(np.arange(len(GROUPS.names)), setting.images)
    broken_N, improved_N = np.array([setting.probabilities(name) for name in GROUPS.names])[labels_N].T
    drawn_N = random.random(len(labels_N))
    is_broken_N = drawn_N < broken_N
    is_improved_N = ~is_broken_N & (drawn_N < broken_N + improved_N)
    right_N = random.random(len(labels_N)) < REFERENCE_ACCURACY
    was_right_N, is_right_N = (right_N & ~is_improved_N) | is_broken_N, (right_N & ~is_broken_N) | is_improved_N
    reference_NC, candidate_NC = (
        np.eye(len(GROUPS.names), dtype=np.float32)[np.where(is_right, labels_N, (labels_N + 1) % len(GROUPS.names))]
        for is_right in (was_right_N, is_right_N)
    )
    return reference_NC, candidate_NC, labels_N


def exact_probability(passes: Callable[[int, int], bool], n: int, p_b: float, p_c: float) -> float:
    """The exact probability of a pass, by enumeration.

    Args:
        passes: Whether b images correct -> wrong and c images wrong -> correct pass; a larger b never helps.
        n: Images.
        p_b: Probability of correct -> wrong.
        p_c: Probability of wrong -> correct.
    """
    probability, b = 0.0, -1
    for c in range(int(binom.isf(1e-12, n, p_c)) + 1):
        while b < n - c and passes(b + 1, c):  # the largest passing b never falls when c grows
            b += 1
        probability += float(binom.pmf(c, n, p_c) * binom.cdf(b, n - c, p_b / (1 - p_c)))
    return probability


def row_passes_exactly(setting: Setting) -> dict[str, float] | None:
    """The exact probability that the damaged row alone passes, for each limit; None if nothing is damaged."""
    if setting.loss == "nothing":
        return None
    margins, group = MARGINS[setting.precision], "tail" if setting.loss == "the margin in the tail" else ALL
    n = setting.images * (1 if group == "tail" else len(GROUPS.names))
    limits = {"tango": tango_upper, "gate": loss_upper}
    return {
        name: exact_probability(
            lambda b, c, limit=limit: limit(b, c, n) < margins.of(group),  # type: ignore[misc]
            n,
            *setting.probabilities("tail"),
        )
        for name, limit in limits.items()
    }


@dataclass(frozen=True)
class Rate:
    """A share of certifications, with its exact 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """The results of one setting.

    Attributes:
        setting: The setting.
        verdicts: Number of certifications by verdict.
        error: The kind of error that is possible in this setting.
        rate: How often it occurred.
        row_passes: Exact probability that the damaged row alone passes, with Tango's limit and with the gate's; None if
            nothing is damaged.
    """

    setting: Setting
    verdicts: dict[Verdict, int]
    error: Literal["false alarm", "false pass"]
    rate: Rate
    row_passes: dict[str, float] | None

    @property
    def errs_too_often(self) -> bool:
        """Whether the confidence interval of the observed rate, or the exact probability, is above the nominal rate."""
        return self.rate.low > NOMINAL or (self.row_passes or {"gate": 0.0})["gate"] > NOMINAL


def measure(setting: Setting, certifications: int, seed: int) -> Measured:
    """Simulate the certifications of one setting."""
    random = np.random.default_rng(seed)
    verdicts = [certify(setting, random) for _ in range(certifications)]
    wrong: Verdict = "FAIL" if setting.loss == "nothing" else "PASS"
    return Measured(
        setting=setting,
        verdicts={verdict: verdicts.count(verdict) for verdict in get_args(Verdict)},
        error="false alarm" if setting.loss == "nothing" else "false pass",
        rate=rate_of(verdicts.count(wrong), certifications),
        row_passes=row_passes_exactly(setting),
    )


def rate_of(k: int, n: int) -> Rate:
    """A share with its confidence interval."""
    return Rate(k / n, *clopper_pearson(k, n))


def images_table() -> list[dict[str, float | int]]:
    """The number of images needed to certify a margin, with Tango's limit and with the gate's."""
    return [
        {
            "margin": margin,
            "discordant": discordant,
            "tango": _needed_by_tango(margin, discordant),
            "gate": images_needed(margin, discordant),
        }
        for margin in (0.005, 0.01, 0.02)
        for discordant in (0.0, 0.01, 0.03)
    ]


@functools.cache
def _needed_by_tango(margin: float, discordant: float) -> int:
    n = 1
    while tango_upper(round(discordant * n / 2), round(discordant * n / 2), n) >= margin:
        n += 1
    return n


def main() -> None:
    """Simulate and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few certifications of few images, as a smoke test")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file")
    arguments = parser.parse_args()
    certifications = 20 if arguments.quick else CERTIFICATIONS
    begin = time.perf_counter()
    chosen = [setting for setting in settings() if setting.images <= 300 or not arguments.quick]
    found = [measure(setting, certifications, seed) for seed, setting in enumerate(chosen)]
    together = {error: pooled_rate(found, error, certifications) for error in ("false alarm", "false pass")}
    console = Console(width=140)
    console.print(_table(found, certifications))
    for error, rate in together.items():
        console.print(f"{error} in all: {_percent(rate.value)} ({_percent(rate.low)} to {_percent(rate.high)})")
    command = "python -m benchmarks.gates" + (" --quick" if arguments.quick else "")
    content = {
        **run_metadata(command, ("ltkd", "numpy", "scipy")),
        "seconds": round(time.perf_counter() - begin, 1),
        "nominal": NOMINAL,
        "certifications": certifications,
        "rows": [asdict(row) for row in found],
        "together": {error: asdict(rate) for error, rate in together.items()},
        "images_needed": images_table(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=2) + "\n")
    if any(row.errs_too_often for row in found):
        sys.exit(f"the error rate of a setting is above {_percent(NOMINAL)}; see the table.")


def pooled_rate(found: Sequence[Measured], error: str, certifications: int) -> Rate:
    """The rate of one error over all settings in which it is possible."""
    rows = [row for row in found if row.error == error]
    return rate_of(round(sum(row.rate.value for row in rows) * certifications), len(rows) * certifications)


def _table(found: Sequence[Measured], certifications: int) -> Table:
    table = Table(title=f"{certifications} certifications per setting; nominal error rate {_percent(NOMINAL)}")
    for column in (
        "margins",
        "n",
        "discordant",
        "true loss",
        "PASS/FAIL/neither",
        "error",
        "95 % interval",
        "row: Tango",
        "gate",
    ):
        table.add_column(column, justify="left" if column in ("margins", "true loss") else "right", no_wrap=True)
    for row in found:
        exact = row.row_passes or {}
        table.add_row(
            row.setting.precision,
            f"{row.setting.images:,}",
            _percent(row.setting.discordant),
            row.setting.loss,
            "/".join(str(count) for count in row.verdicts.values()),
            _percent(row.rate.value),
            f"{_percent(row.rate.low)} to {_percent(row.rate.high)}",
            *(_percent(exact[limit]) if limit in exact else "" for limit in ("tango", "gate")),
        )
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()
