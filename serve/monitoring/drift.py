"""Whether what is predicted now still looks like what was certified, group by group, over a rolling window.

Drift is the population stability index of two histograms, ``PSI = sum (q - p) ln(q / p)``. When both are samples of one
population, PSI is distributed as ``(1/n + 1/m)`` times a chi-square variable with one degree of freedom fewer than
bins (Yurdakul and Naranjo 2020), so small windows show large values by chance. Here PSI raises an alarm only above
what chance explains *and* above what is usually called a shift; and a group is said to vanish only if an exact
binomial test excludes that it still has half of its certified share.

Shape legend: K class groups, B bins of confidence, W predictions in the window.
"""

import math
from array import array
from datetime import UTC, datetime
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ltkd.contract.calibration import HISTOGRAM_BINS, Calibration
from ltkd.contract.records import Record
from serve.monitoring.binomial import at_most, lower_limit

FALSE_ALARMS = 0.01
"""In this share of windows, at most, a stream like the certification images raises any warning of a model."""
NOTABLE_PSI = 0.1
"""Below it a shift is held to be minor, by the custom of credit scoring where PSI comes from (0.25 is a major one)."""
VANISHING_FACTOR = 0.5
"""A group vanishes when its share is demonstrably below this part of its certified share."""
_SMOOTHING = 0.5  # added to each bin of both histograms, so that an empty one has a logarithm
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Drift(Record):
    """How far a histogram is from its certified one.

    Attributes:
        psi: Population stability index.
        alarm_level: Drift is called from here on: what chance explains in a window of this size, and at least 0.1.
        drifted: Whether ``psi`` is above it.
    """

    psi: float
    alarm_level: float
    drifted: bool


class Quantiles(Record):
    """Confidence below which 5, 25, 50, 75 and 95 % of the predictions lie."""

    p05: float
    p25: float
    p50: float
    p75: float
    p95: float


class GroupSeen(Record):
    """The recent predictions of one group.

    Attributes:
        group: Its name.
        predictions: Images in the window whose predicted class is of this group.
        share: Their share of the window; None while it is empty.
        certified_share: The same among the certification images.
        vanishing: Whether the share is demonstrably below half of the certified one.
        confidence: Quantiles of their confidence; None without predictions.
        confidence_drift: Their confidence against that of the certification images; None where either is missing.
        abstentions: How many of them were below the group's threshold.
    """

    group: str
    predictions: int = Field(ge=0)
    share: float | None
    certified_share: float
    vanishing: bool
    confidence: Quantiles | None
    confidence_drift: Drift | None
    abstentions: int = Field(ge=0)


class WindowReport(Record):
    """What was predicted in the rolling window.

    Attributes:
        num_images: Predictions in it.
        max_images: From this many on, each new prediction pushes out the oldest.
        since: Time of the oldest prediction in it, UTC; the window starts empty with the process and with a new
            bundle, nothing is kept on disk.
        groups: One entry a group, in the order of the model's groups.
        share_drift: The groups' shares against the certified ones; None while the window is empty.
        warnings: What deserves a look, in sentences; a stream like the certification images has some in one window of
            a hundred, at most.
    """

    num_images: int
    max_images: int
    since: datetime | None
    groups: tuple[GroupSeen, ...]
    share_drift: Drift | None
    warnings: tuple[str, ...]


class Window:
    """The most recent predictions of one served model, in memory of a fixed size.

    Args:
        calibration: What was certified of each group, the baseline.
        max_images: Predictions it holds.
    """

    def __init__(self, calibration: Calibration, max_images: int) -> None:
        self._calibration = calibration
        self._counts_KB = np.array([group.confidence_counts for group in calibration], dtype=np.float64)
        num_certified = int(self._counts_KB.sum())
        # the certified share is an estimate too: what is compared is the least it can have been
        self._least_share_K = [
            lower_limit(round(group.predicted_share * num_certified), num_certified, 1 - self._alpha)
            for group in calibration
        ]
        self._max_images = max_images
        self._group = array("H", bytes(2 * max_images))
        self._confidence = array("d", bytes(8 * max_images))
        self._abstained = bytearray(max_images)
        self._time = array("d", bytes(8 * max_images))
        self._num_seen = 0

    def add(self, group: int, confidence: float, abstained: bool, now: float) -> None:
        """Take in one prediction; ``now`` on the clock of ``time.time``."""
        place = self._num_seen % self._max_images
        self._group[place] = group
        self._confidence[place] = confidence
        self._abstained[place] = abstained
        self._time[place] = now
        self._num_seen += 1

    def report(self) -> WindowReport:
        """What the window shows now."""
        num = min(self._num_seen, self._max_images)
        group_W = np.array(self._group[:num], dtype=np.int64)
        confidence_W = np.array(self._confidence[:num])
        abstained_W = np.frombuffer(bytes(self._abstained[:num]), dtype=np.uint8)
        seen = [
            self._group_seen(group, confidence_W[group_W == group], int(abstained_W[group_W == group].sum()), num)
            for group in range(len(self._calibration))
        ]
        share_drift = self._share_drift(np.bincount(group_W, minlength=len(seen)).astype(np.float64))
        oldest = self._time[self._num_seen % self._max_images if num == self._max_images else 0]
        return WindowReport(
            num_images=num,
            max_images=self._max_images,
            since=datetime.fromtimestamp(oldest, UTC) if num else None,
            groups=tuple(seen),
            share_drift=share_drift,
            warnings=warnings_of(seen, share_drift, num),
        )

    @property
    def _alpha(self) -> float:
        """The false alarms of one test: K of confidence, K of vanishing and one of the shares divide them."""
        return FALSE_ALARMS / (2 * len(self._calibration) + 1)

    def _group_seen(self, group: int, confidence: NDArray[np.float64], abstentions: int, num: int) -> GroupSeen:
        certified = self._calibration[group]
        counts_B = confidence_histogram(confidence)
        cut = [round(float(value), 6) for value in np.quantile(confidence, _QUANTILES)] if len(confidence) else None
        return GroupSeen(
            group=certified.group,
            predictions=len(confidence),
            share=len(confidence) / num if num else None,
            certified_share=certified.predicted_share,
            vanishing=self._vanishing(group, len(confidence), num),
            confidence=Quantiles(p05=cut[0], p25=cut[1], p50=cut[2], p75=cut[3], p95=cut[4]) if cut else None,
            confidence_drift=drift(counts_B, self._counts_KB[group], self._alpha),
            abstentions=abstentions,
        )

    def _vanishing(self, group: int, predictions: int, num: int) -> bool:
        return num > 0 and at_most(predictions, num, VANISHING_FACTOR * self._least_share_K[group]) < self._alpha

    def _share_drift(self, predictions_K: NDArray[np.float64]) -> Drift | None:
        certified_K = np.array([group.predicted_share for group in self._calibration]) * self._counts_KB.sum()
        return drift(predictions_K, certified_K, self._alpha)


def confidence_histogram(confidence: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many confidences lie in each of the equal intervals, lower ends not in them but for 0, float64 [B]."""
    bins = np.clip(np.ceil(confidence * HISTOGRAM_BINS).astype(np.int64) - 1, 0, HISTOGRAM_BINS - 1)
    return np.bincount(bins, minlength=HISTOGRAM_BINS).astype(np.float64)


def drift(seen_B: NDArray[np.float64], certified_B: NDArray[np.float64], false_alarms: float) -> Drift | None:
    """Hold one histogram against another; None where either is empty, or there is but one bin.

    Args:
        seen_B: Counts now.
        certified_B: Counts at certification.
        false_alarms: How often two samples of one population may be called drifted.
    """
    if seen_B.sum() == 0 or certified_B.sum() == 0 or len(seen_B) < 2:
        return None
    psi = population_stability_index(seen_B, certified_B)
    level = max(NOTABLE_PSI, chance_psi(len(seen_B), seen_B.sum(), certified_B.sum(), false_alarms))
    return Drift(psi=psi, alarm_level=level, drifted=psi > level)


def population_stability_index(seen_B: NDArray[np.float64], certified_B: NDArray[np.float64]) -> float:
    """The index of two histograms of counts, each bin half a count fuller than it is."""
    seen, certified = seen_B + _SMOOTHING, certified_B + _SMOOTHING
    q, p = seen / seen.sum(), certified / certified.sum()
    return float(((q - p) * np.log(q / p)).sum())


def chance_psi(num_bins: int, num_seen: float, num_certified: float, false_alarms: float) -> float:
    """The index that two samples of one population exceed with probability ``false_alarms``.

    The chi-square quantile is Wilson and Hilferty's approximation (1931): here at most 4 % too high, so it errs towards
    silence.
    """
    degrees = num_bins - 1
    z = NormalDist().inv_cdf(1 - false_alarms)
    spread = 2 / (9 * degrees)
    return float(degrees * (1 - spread + z * math.sqrt(spread)) ** 3 * (1 / num_seen + 1 / num_certified))


def warnings_of(groups: list[GroupSeen], share_drift: Drift | None, num_images: int) -> tuple[str, ...]:
    """What deserves a look, in sentences."""
    said = [
        f"{seen.group} is vanishing: {100 * (seen.share or 0):.1f} % of the last {num_images:,} predictions, "
        f"certified {100 * seen.certified_share:.1f} %. Either fewer such images arrive than in certification or the "
        "model no longer sees them; feedback with true labels tells which."
        for seen in groups
        if seen.vanishing
    ]
    said += [
        f"confidence in {seen.group} has drifted: PSI {seen.confidence_drift.psi:.2f}, up to "
        f"{seen.confidence_drift.alarm_level:.2f} would be chance or minor; its expected accuracy may no longer hold."
        for seen in groups
        if seen.confidence_drift and seen.confidence_drift.drifted
    ]
    if share_drift and share_drift.drifted:
        said.append(
            f"the groups' shares have drifted: PSI {share_drift.psi:.2f}, up to {share_drift.alarm_level:.2f} would be "
            "chance or minor."
        )
    return tuple(said)
