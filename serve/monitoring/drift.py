"""Drift detection: recent predictions, in a rolling window, are compared with certification in each class group.

Drift is the population stability index of two histograms, ``PSI = sum (q - p) ln(q / p)``. If both are samples of one
population, PSI is distributed as ``(1/n + 1/m)`` times a chi-square variable with one degree of freedom fewer than
there are bins (Yurdakul and Naranjo 2020), so small windows show large values by chance. Here PSI raises an alarm only
if it is above what chance explains *and* above what is usually called a shift. A group is reported as vanishing only
if an exact binomial test rejects the hypothesis that it still has half of its certified share.

``serve.monitoring.prometheus`` adds the predictions and exports the report.

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
"""For images like those of certification, the upper bound on the share of windows with any warning about a model."""
NOTABLE_PSI = 0.1
"""Below it a shift counts as minor by convention in credit scoring, where PSI comes from (from 0.25 on as major)."""
VANISHING_FACTOR = 0.5
"""A group is vanishing if its share is significantly below this fraction of its certified share."""
_SMOOTHING = 0.5  # added to each bin of both histograms, because an empty bin has no logarithm
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Drift(Record):
    """How far a histogram is from its certified one.

    Attributes:
        psi: Population stability index.
        alarm_level: The upper bound of what chance explains in a window of this size, and at least 0.1.
        drifted: Whether ``psi`` is above it.
    """

    psi: float
    alarm_level: float
    drifted: bool


class Quantiles(Record):
    """The confidences below which 5, 25, 50, 75 and 95 % of the predictions lie."""

    p05: float
    p25: float
    p50: float
    p75: float
    p95: float


class GroupReport(Record):
    """The recent predictions of one group.

    Attributes:
        group: The name of the group.
        predictions: Images in the window whose predicted class is in this group.
        share: Their share of the window; None while the window is empty.
        certified_share: Their share of the certification images.
        vanishing: Whether the share is significantly below half of the certified one.
        confidence: Quantiles of their confidence; None without predictions.
        confidence_drift: Their confidence compared with the certification images; None if either is missing.
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
    """The predictions in the rolling window.

    Attributes:
        num_images: Predictions in the window.
        max_images: The size of the window; in a full window, each new prediction replaces the oldest one.
        since: Time of the oldest prediction in the window, UTC. The window is empty after a start of the process and
            for a new bundle; it is not stored on disk.
        groups: One entry per group, in the order of the model's groups.
        share_drift: The groups' shares compared with the certified ones; None while the window is empty.
        warnings: Deviations from certification, in sentences. For images like those of certification, at most one
            window in a hundred has any.
    """

    num_images: int
    max_images: int
    since: datetime | None
    groups: tuple[GroupReport, ...]
    share_drift: Drift | None
    warnings: tuple[str, ...]


class Window:
    """The most recent predictions of one served model, in a buffer of fixed size.

    Args:
        calibration: The certified calibration of each group, which is the baseline.
        max_images: The size of the window, in predictions.
    """

    def __init__(self, calibration: Calibration, max_images: int) -> None:
        self._calibration = calibration
        self._counts_KB = np.array([group.confidence_counts for group in calibration], dtype=np.float64)
        num_certified = int(self._counts_KB.sum())
        # the certified share is an estimate too, so the comparison uses its lower confidence limit
        self._lower_share_K = [
            lower_limit(round(group.predicted_share * num_certified), num_certified, 1 - self._alpha)
            for group in calibration
        ]
        self._max_images = max_images
        self._group = array("H", bytes(2 * max_images))
        self._confidence = array("d", bytes(8 * max_images))
        self._abstained = bytearray(max_images)
        self._time = array("d", bytes(8 * max_images))
        self._num_added = 0

    def add(self, group: int, confidence: float, abstained: bool, now: float) -> None:
        """Add one prediction; ``now`` is on the clock of ``time.time``."""
        slot = self._num_added % self._max_images
        self._group[slot] = group
        self._confidence[slot] = confidence
        self._abstained[slot] = abstained
        self._time[slot] = now
        self._num_added += 1

    def report(self) -> WindowReport:
        """Compare the predictions now in the window with certification."""
        num = min(self._num_added, self._max_images)
        group_W = np.array(self._group[:num], dtype=np.int64)
        confidence_W = np.array(self._confidence[:num])
        abstained_W = np.frombuffer(bytes(self._abstained[:num]), dtype=np.uint8)
        groups = [
            self._group_report(group, confidence_W[group_W == group], int(abstained_W[group_W == group].sum()), num)
            for group in range(len(self._calibration))
        ]
        share_drift = self._share_drift(np.bincount(group_W, minlength=len(groups)).astype(np.float64))
        oldest = self._time[self._num_added % self._max_images if num == self._max_images else 0]
        return WindowReport(
            num_images=num,
            max_images=self._max_images,
            since=datetime.fromtimestamp(oldest, UTC) if num else None,
            groups=tuple(groups),
            share_drift=share_drift,
            warnings=warnings_of(groups, share_drift, num),
        )

    @property
    def _alpha(self) -> float:
        """The significance level of one test; there are K tests of confidence, K of vanishing and one of the shares."""
        return FALSE_ALARMS / (2 * len(self._calibration) + 1)

    def _group_report(self, group: int, confidence: NDArray[np.float64], abstentions: int, num: int) -> GroupReport:
        certified = self._calibration[group]
        counts_B = confidence_histogram(confidence)
        return GroupReport(
            group=certified.group,
            predictions=len(confidence),
            share=len(confidence) / num if num else None,
            certified_share=certified.predicted_share,
            vanishing=self._vanishing(group, len(confidence), num),
            confidence=_quantiles(confidence),
            confidence_drift=drift(counts_B, self._counts_KB[group], self._alpha),
            abstentions=abstentions,
        )

    def _vanishing(self, group: int, predictions: int, num: int) -> bool:
        return num > 0 and at_most(predictions, num, VANISHING_FACTOR * self._lower_share_K[group]) < self._alpha

    def _share_drift(self, predictions_K: NDArray[np.float64]) -> Drift | None:
        certified_K = np.array([group.predicted_share for group in self._calibration]) * self._counts_KB.sum()
        return drift(predictions_K, certified_K, self._alpha)


def _quantiles(confidence: NDArray[np.float64]) -> Quantiles | None:
    if not len(confidence):
        return None
    p05, p25, p50, p75, p95 = (round(float(value), 6) for value in np.quantile(confidence, _QUANTILES))
    return Quantiles(p05=p05, p25=p25, p50=p50, p75=p75, p95=p95)


def confidence_histogram(confidence: NDArray[np.float64]) -> NDArray[np.float64]:
    """Confidences per bin, float64 [B]. The bins have equal widths; each excludes its lower end, except 0."""
    bins = np.clip(np.ceil(confidence * HISTOGRAM_BINS).astype(np.int64) - 1, 0, HISTOGRAM_BINS - 1)
    return np.bincount(bins, minlength=HISTOGRAM_BINS).astype(np.float64)


def drift(observed_B: NDArray[np.float64], certified_B: NDArray[np.float64], false_alarms: float) -> Drift | None:
    """Compare two histograms; None if either is empty or there is only one bin.

    Args:
        observed_B: Counts in the window.
        certified_B: Counts at certification.
        false_alarms: The probability with which two samples of one population may be reported as drifted.
    """
    if observed_B.sum() == 0 or certified_B.sum() == 0 or len(observed_B) < 2:
        return None
    psi = population_stability_index(observed_B, certified_B)
    level = max(NOTABLE_PSI, chance_psi(len(observed_B), observed_B.sum(), certified_B.sum(), false_alarms))
    return Drift(psi=psi, alarm_level=level, drifted=psi > level)


def population_stability_index(observed_B: NDArray[np.float64], certified_B: NDArray[np.float64]) -> float:
    """The PSI of two histograms of counts, after adding half a count to each bin."""
    observed, certified = observed_B + _SMOOTHING, certified_B + _SMOOTHING
    q, p = observed / observed.sum(), certified / certified.sum()
    return float(((q - p) * np.log(q / p)).sum())


def chance_psi(num_bins: int, num_observed: float, num_certified: float, false_alarms: float) -> float:
    """The PSI that two samples of one population exceed with probability ``false_alarms``.

    The chi-square quantile is Wilson and Hilferty's approximation (1931). Here it is at most 4 % too high, which makes
    alarms slightly rarer.
    """
    degrees = num_bins - 1
    z = NormalDist().inv_cdf(1 - false_alarms)
    spread = 2 / (9 * degrees)
    return float(degrees * (1 - spread + z * math.sqrt(spread)) ** 3 * (1 / num_observed + 1 / num_certified))


def warnings_of(groups: list[GroupReport], share_drift: Drift | None, num_images: int) -> tuple[str, ...]:
    """Deviations from certification, in sentences."""
    warnings = [
        f"{group.group} is vanishing: {100 * (group.share or 0):.1f} % of the last {num_images:,} predictions, "
        f"certified {100 * group.certified_share:.1f} %. Either fewer such images arrive than in certification, or the "
        "model no longer recognises them; feedback with true labels shows which."
        for group in groups
        if group.vanishing
    ]
    warnings += [
        f"confidence in {group.group} has drifted: PSI {group.confidence_drift.psi:.2f}; up to "
        f"{group.confidence_drift.alarm_level:.2f} would be chance or minor. The group's expected accuracy may no "
        "longer hold."
        for group in groups
        if group.confidence_drift and group.confidence_drift.drifted
    ]
    if share_drift and share_drift.drifted:
        warnings.append(
            f"the groups' shares have drifted: PSI {share_drift.psi:.2f}; up to {share_drift.alarm_level:.2f} would be "
            "chance or minor."
        )
    return tuple(warnings)
