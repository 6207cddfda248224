"""How often the gate of G3 errs: certifications of simulated candidates whose true loss is known.

    python -m benchmarks.gates [--quick] [--out FILE]

Prints a table and writes docs/benchmarks/gates.json. Each certification goes through compare and task_accuracy with
three groups of equal size. Three kinds of candidates: one that loses nothing, one that loses exactly the margin in one
group, and one that loses exactly the overall margin, everywhere alike. A false alarm is a FAIL of the first, a false
pass is a PASS of the others; each may happen in one case of twenty. INCONCLUSIVE is neither: it certifies nothing.

Beside the rates stands the exact chance that the damaged row alone passes, by enumeration, with Tango's limit and with
the one that the gate uses.

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

from benchmarks.circumstances import circumstances
from export.certification.comparison import compare
from export.certification.gates import task_accuracy
from export.certification.margins import MARGINS
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
        precision: Whose margins hold.
        images: Of each group.
        discordant: Share of images that only one of the two models gets right, before any loss.
        loss: What the candidate truly loses.
    """

    precision: Precision
    images: int
    discordant: float
    loss: Loss

    def chances(self, group: str) -> tuple[float, float]:
        """The chance of an image of a group to go from right to wrong, and from wrong to right."""
        margins = MARGINS[self.precision]
        damaged = {
            "nothing": 0.0,
            "the margin in the tail": margins.of("tail") if group == "tail" else 0.0,
            "the overall margin everywhere": margins.of(ALL),
        }
        return self.discordant / 2 + damaged[self.loss], self.discordant / 2


# few images and many, no disagreement to far more than int8 brings, fewer images than certify and more
PLACES: tuple[tuple[Precision, int, float], ...] = (
    ("fp32", 600, 0.0),
    ("fp32", 1_667, 0.002),
    ("fp32", 300, 0.05),
    ("int8", 150, 0.0),
    ("int8", 300, 0.01),
    ("int8", 1_667, 0.03),
    ("int8", 300, 0.08),
)


def settings() -> list[Setting]:
    """Everything that is simulated."""
    return [Setting(*place, loss) for place in PLACES for loss in get_args(Loss)]


def certified(setting: Setting, random: np.random.Generator) -> Verdict:
    """The verdict of one certification."""
    reference_NC, candidate_NC, label_N = simulated(setting, random)
    return task_accuracy(compare(reference_NC, candidate_NC, label_N, GROUPS, MARGINS[setting.precision])).verdict


def simulated(
    setting: Setting, random: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Logits of reference and candidate, and the labels; each image is drawn independently of the others."""
    label_N = np.repeat(np.arange(len(GROUPS.names)), setting.images)
    broken_N, mended_N = np.array([setting.chances(name) for name in GROUPS.names])[label_N].T
    drawn_N = random.random(len(label_N))
    is_broken_N = drawn_N < broken_N
    is_mended_N = ~is_broken_N & (drawn_N < broken_N + mended_N)
    right_N = random.random(len(label_N)) < REFERENCE_ACCURACY
    was_right_N, is_right_N = (right_N & ~is_mended_N) | is_broken_N, (right_N & ~is_broken_N) | is_mended_N
    reference_NC, candidate_NC = (
        np.eye(len(GROUPS.names), dtype=np.float32)[np.where(is_right, label_N, (label_N + 1) % len(GROUPS.names))]
        for is_right in (was_right_N, is_right_N)
    )
    return reference_NC, candidate_NC, label_N


def exact_chance(passes: Callable[[int, int], bool], n: int, p_b: float, p_c: float) -> float:
    """The chance of a pass, by enumeration.

    Args:
        passes: Whether b right -> wrong and c wrong -> right pass; more of b never help.
        n: Images.
        p_b: Chance of right -> wrong.
        p_c: Chance of wrong -> right.
    """
    chance, b = 0.0, -1
    for c in range(int(binom.isf(1e-12, n, p_c)) + 1):
        while b < n - c and passes(b + 1, c):  # one more mended image never lowers the b that still passes
            b += 1
        chance += float(binom.pmf(c, n, p_c) * binom.cdf(b, n - c, p_b / (1 - p_c)))
    return chance


def row_passes_exactly(setting: Setting) -> dict[str, float] | None:
    """How often the damaged row alone passes with each limit; None where nothing is damaged."""
    if setting.loss == "nothing":
        return None
    margins, group = MARGINS[setting.precision], "tail" if setting.loss == "the margin in the tail" else ALL
    n = setting.images * (1 if group == "tail" else len(GROUPS.names))
    limits = {"tango": tango_upper, "gate": loss_upper}
    return {
        name: exact_chance(
            lambda b, c, limit=limit: limit(b, c, n) < margins.of(group),  # type: ignore[misc]
            n,
            *setting.chances("tail"),
        )
        for name, limit in limits.items()
    }


@dataclass(frozen=True)
class Rate:
    """A share of certifications, with its exact 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured:
    """What came of one setting.

    Attributes:
        setting: Which.
        verdicts: How many certifications ended with each.
        error: Which of them is wrong here.
        rate: How often that was said.
        row_passes: How often the damaged row alone passes, by enumeration, with Tango's limit and with the gate's; None
            where nothing is damaged.
    """

    setting: Setting
    verdicts: dict[Verdict, int]
    error: Literal["false alarm", "false pass"]
    rate: Rate
    row_passes: dict[str, float] | None

    @property
    def errs_too_often(self) -> bool:
        """Whether a promise is broken; a rate that is seen scatters, and contradicts it by its whole interval only."""
        return self.rate.low > NOMINAL or (self.row_passes or {"gate": 0.0})["gate"] > NOMINAL


def measured(setting: Setting, certifications: int, seed: int) -> Measured:
    """The rates of one setting."""
    random = np.random.default_rng(seed)
    seen = [certified(setting, random) for _ in range(certifications)]
    wrong: Verdict = "FAIL" if setting.loss == "nothing" else "PASS"
    return Measured(
        setting=setting,
        verdicts={verdict: seen.count(verdict) for verdict in get_args(Verdict)},
        error="false alarm" if setting.loss == "nothing" else "false pass",
        rate=rate_of(seen.count(wrong), certifications),
        row_passes=row_passes_exactly(setting),
    )


def rate_of(k: int, n: int) -> Rate:
    """A share with its interval."""
    return Rate(k / n, *clopper_pearson(k, n))


def images_table() -> list[dict[str, float | int]]:
    """Images that certify a margin, with Tango's limit and with the gate's."""
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
    """Simulate and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few certifications of few images, to see that it runs")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    certifications = 20 if given.quick else CERTIFICATIONS
    begin = time.perf_counter()
    chosen = [setting for setting in settings() if setting.images <= 300 or not given.quick]
    found = [measured(setting, certifications, seed) for seed, setting in enumerate(chosen)]
    together = {error: pooled(found, error, certifications) for error in ("false alarm", "false pass")}
    console = Console(width=140)
    console.print(_table(found, certifications))
    for error, rate in together.items():
        console.print(f"{error} in all: {_percent(rate.value)} ({_percent(rate.low)} to {_percent(rate.high)})")
    command = "python -m benchmarks.gates" + (" --quick" if given.quick else "")
    content = {
        **circumstances(command, ("ltkd", "numpy", "scipy")),
        "seconds": round(time.perf_counter() - begin, 1),
        "nominal": NOMINAL,
        "certifications": certifications,
        "rows": [asdict(row) for row in found],
        "together": {error: asdict(rate) for error, rate in together.items()},
        "images_needed": images_table(),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(content, indent=2) + "\n")
    if any(row.errs_too_often for row in found):
        sys.exit("a setting errs more often than it may.")


def pooled(found: Sequence[Measured], error: str, certifications: int) -> Rate:
    """The share of one error in all settings where it can be made."""
    of_it = [row for row in found if row.error == error]
    return rate_of(round(sum(row.rate.value for row in of_it) * certifications), len(of_it) * certifications)


def _table(found: Sequence[Measured], certifications: int) -> Table:
    table = Table(title=f"{certifications} certifications each; an error may happen in {_percent(NOMINAL)}")
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
        of_row = row.row_passes or {}
        table.add_row(
            row.setting.precision,
            f"{row.setting.images:,}",
            _percent(row.setting.discordant),
            row.setting.loss,
            "/".join(str(count) for count in row.verdicts.values()),
            _percent(row.rate.value),
            f"{_percent(row.rate.low)} to {_percent(row.rate.high)}",
            *(_percent(of_row[limit]) if limit in of_row else "" for limit in ("tango", "gate")),
        )
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()
