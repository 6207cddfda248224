"""What confidence is worth, learnt group by group: temperature, accuracy, when to abstain, which classes to name.

Pure functions. The images that fit the temperature must not be the ones that the other three are fitted on.

Shape legend: N images, M images of one group, C classes, K class groups, T thresholds, V distinct values, B bins.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betaincinv
from scipy.stats import binom

from export.certification.statistics import CONFIDENCE, calibration_error, calibration_error_null, clopper_pearson
from export.schema import ConfidenceCertificate, GroupReliability, ReliabilityBin
from ltkd.contract.calibration import (
    HISTOGRAM_BINS,
    Abstention,
    ConfidenceBin,
    GroupCalibration,
    Proportion,
    SetThreshold,
    calibrated,
    confidence_bins,
    least_probabilities,
    softmax,
)
from ltkd.contract.class_groups import ClassGroups
from ltkd.errors import DataError

PRIOR_IMAGES = 50
"""What all images together count for in the temperature of one group, in images."""
IMAGES_A_BIN = 50
"""Fewer tell nothing: with 50 the interval of an expected accuracy is up to 0.29 wide."""
MOST_BINS = 10
ABSTENTION_STEPS = 20


def fit_temperatures(
    logits_NC: NDArray[np.floating], label_N: NDArray[np.int64], groups: ClassGroups
) -> NDArray[np.float64]:
    """The temperature of each predicted group, float64 [K].

    It minimises the negative log likelihood of the images predicted in the group, to which all images are added with
    the weight of PRIOR_IMAGES together (a power prior; Ibrahim and Chen, Statistical Science 15, 2000). So a group
    without an image gets the temperature of all, and one with many its own. As in Platt's scaling (1999), one image
    more is imagined, whose label is drawn blindly: a model that is right on all N may not claim more than N show.
    """
    below_NC = np.asarray(logits_NC, dtype=np.float64)
    below_NC = below_NC - below_NC.max(axis=1, keepdims=True)
    own_N = below_NC[np.arange(len(label_N)), label_N]
    target_N = own_N + (below_NC.mean(axis=1) - own_N) / (len(label_N) + 1)
    predicted_N = groups.index[np.asarray(logits_NC).argmax(axis=1)]
    spans_N = -below_NC.min(axis=1)
    if not spans_N.any():  # no logit differs from another, and no temperature makes it
        return np.ones(len(groups.names))

    def slope(log_temperature: float, weight_N: NDArray[np.float64]) -> float:
        """Of the loss, over 1 / temperature, in which it is convex: rising, so it has one root."""
        share_NC = np.exp(below_NC * math.exp(-log_temperature))
        return float(weight_N @ ((share_NC * below_NC).sum(axis=1) / share_NC.sum(axis=1) - target_N))

    # at a thousandth of its span an image is certain, at ten times its span all classes are alike to it
    certain, alike = math.log(spans_N[spans_N > 0].min() / 1000), math.log(spans_N.max() * 10)
    found = []
    for group in range(len(groups.names)):
        weight_N = (predicted_N == group) + PRIOR_IMAGES / len(label_N)
        if slope(alike, weight_N) >= 0:  # no better than blind
            found.append(alike)
        elif slope(certain, weight_N) <= 0:
            found.append(certain)
        else:
            found.append(float(brentq(slope, certain, alike, args=(weight_N,), xtol=1e-9)))
    return np.exp(found)


def accuracy_bins(confidence_M: NDArray[np.float64], right_M: NDArray[np.bool_]) -> tuple[ConfidenceBin, ...]:
    """How often predictions were right, in bins of confidence from 0 to 1 without gaps.

    Bins hold about equally many images, at least IMAGES_A_BIN where there are so many, and equal confidences share a
    bin. Where the share falls from one bin to the next they are pooled (adjacent violators), so that more confidence
    never means less: what is said of the wider bin is as true, only coarser.
    """
    if not len(confidence_M):
        return ()
    num_bins = min(max(len(confidence_M) // IMAGES_A_BIN, 1), MOST_BINS)
    value_V, first_V = np.unique(np.sort(confidence_M), return_index=True)
    edges, begun = [0.0], 0
    for value, ended in zip(value_V[:-1], first_V[1:], strict=True):
        due = ended >= len(edges) * len(confidence_M) / num_bins
        if due and min(ended - begun, len(confidence_M) - ended) >= IMAGES_A_BIN:
            edges.append(float(value))
            begun = ended
    bin_M = np.searchsorted(edges[1:], confidence_M, side="left")
    right_B = np.bincount(bin_M, right_M, len(edges)).astype(np.int64).tolist()
    num_B = np.bincount(bin_M, minlength=len(edges)).tolist()
    bins: list[tuple[float, int, int]] = []
    for upper, right, num in zip([*edges[1:], 1.0], right_B, num_B, strict=True):
        bins.append((upper, right, num))
        while len(bins) > 1 and bins[-2][1] * bins[-1][2] > bins[-1][1] * bins[-2][2]:
            (_, right_before, num_before), (up_to, right_after, num_after) = bins.pop(-2), bins.pop()
            bins.append((up_to, right_before + right_after, num_before + num_after))
    lower_ends = [0.0, *(up_to for up_to, _, _ in bins[:-1])]
    return tuple(
        ConfidenceBin(above=above, up_to=up_to, accuracy=proportion(right, num))
        for above, (up_to, right, num) in zip(lower_ends, bins, strict=True)
    )


def abstention_threshold(
    pilot_confidence_M: NDArray[np.float64],
    pilot_right_M: NDArray[np.bool_],
    confidence_M: NDArray[np.float64],
    right_M: NDArray[np.bool_],
    target_precision: float,
) -> float | None:
    """The smallest confidence from which on the target precision is proved; None where it is for none.

    A search among thresholds finds luck. So, as in Learn then Test (Angelopoulos et al., arXiv 2110.01052), thresholds
    are tested in an order that was fixed before these images were seen, each by the exact binomial test at 5 %, and the
    first that fails ends it: the chance that any threshold passes whose precision lies below the target is at most 5 %,
    whatever the confidences are worth. The order comes from the pilot images (as in Pareto testing, arXiv 2210.07913):
    the threshold that is clearest to them, then down to the ones that accept more, in steps of 1 / ABSTENTION_STEPS of
    the pilot predictions.
    """
    if not len(pilot_confidence_M):
        return None
    shares = np.arange(ABSTENTION_STEPS, 0, -1) / ABSTENTION_STEPS - 1 / ABSTENTION_STEPS
    steps = np.quantile(pilot_confidence_M, shares, method="lower")
    steps[-1] = 0.0  # accepts all
    threshold_T = np.unique(steps)[::-1]
    pilot_p_T = _p_values(threshold_T, pilot_confidence_M, pilot_right_M, target_precision)
    start = int(pilot_p_T.argmin())
    p_T = _p_values(threshold_T, confidence_M, right_M, target_precision)[start:]
    num_proved = int((p_T <= 1 - CONFIDENCE).cumprod().sum())
    return float(threshold_T[start + num_proved - 1]) if num_proved else None


def set_threshold(own_M: NDArray[np.float64], target_coverage: float) -> tuple[float | None, float, float]:
    """The least probability that a class needs to be in a prediction set, and the band of the coverage that this gives.

    With the score 1 - p, this is the ceil((M + 1) target)-th smallest of the true classes' scores. Probabilities are
    compared instead, because 1 - p rounds small ones away. The coverage of further images is beta-distributed (Vovk,
    ACML 2012); between equal probabilities it is only higher.

    Args:
        own_M: The probability of the true class, for images of one group.
        target_coverage: The share of further images whose class shall be in the set, on average over fits.

    Returns:
        None, 1 and 1 where there are too few images to leave any class out; else the probability, and the limits that
        the coverage lies above, and below, in 95 of 100 fits each.
    """
    rank = math.ceil((len(own_M) + 1) * target_coverage - 1e-9)  # 0.9 times 10 may round to more than 9
    if rank > len(own_M):
        return None, 1.0, 1.0
    low, high = betaincinv(rank, len(own_M) + 1 - rank, [1 - CONFIDENCE, CONFIDENCE])
    return float(np.sort(own_M)[-rank]), float(low), float(high)


def proportion(k: int, n: int) -> Proportion:
    """A share of n > 0 with its interval."""
    low, high = clopper_pearson(k, n)
    return Proportion(value=k / n, low=low, high=high, n=n)


def _p_values(
    threshold_T: NDArray[np.float64], confidence_M: NDArray[np.float64], right_M: NDArray[np.bool_], target: float
) -> NDArray[np.float64]:
    """For each threshold, how likely so many right predictions among the accepted were at the target precision."""
    accepted_TM = confidence_M >= threshold_T[:, None]
    return np.asarray(binom.sf((accepted_TM & right_M).sum(axis=1) - 1, accepted_TM.sum(axis=1), target))


@dataclass(frozen=True)
class _Predictions:
    """Predictions of one group: how sure, and whether right."""

    confidence_M: NDArray[np.float64]
    right_M: NDArray[np.bool_]


@dataclass(frozen=True)
class _Part:
    """What the model says of the images of one part."""

    probability_NC: NDArray[np.float64]
    predicted_N: NDArray[np.int64]
    label_N: NDArray[np.int64]
    groups: ClassGroups

    def predicted_in(self, group: int) -> _Predictions:
        """The predictions of a group."""
        rows = self.groups.index[self.predicted_N] == group
        return _Predictions(
            self.probability_NC[rows].max(axis=1, initial=0), self.predicted_N[rows] == self.label_N[rows]
        )

    def own_probability(self, group: int) -> NDArray[np.float64]:
        """The probability of the true class, for the images whose true class is of the group."""
        rows = np.flatnonzero(self.groups.index[self.label_N] == group)
        return self.probability_NC[rows, self.label_N[rows]]


def certify_confidence(
    temperature_logits_NC: NDArray[np.floating],
    temperature_label_N: NDArray[np.int64],
    threshold_logits_NC: NDArray[np.floating],
    threshold_label_N: NDArray[np.int64],
    certify_logits_NC: NDArray[np.floating],
    certify_label_N: NDArray[np.int64],
    groups: ClassGroups,
    target_precision: float = 0.9,
    target_coverage: float = 0.9,
) -> ConfidenceCertificate:
    """Fit what confidence means in every group, and count on further images how it holds.

    Args:
        temperature_logits_NC: Logits of the model as it will be served, in its precision and on its provider.
        temperature_label_N: True classes of these images.
        threshold_logits_NC: Logits of other images.
        threshold_label_N: Their true classes.
        certify_logits_NC: Logits of yet other images.
        certify_label_N: Their true classes.
        groups: The partition of the C classes.
        target_precision: The share of right predictions from which on an answer is to be trusted.
        target_coverage: The share of each group's images whose class shall be in their prediction set.

    Raises:
        DataError: A part is empty, has labels that do not fit its logits, or logits that are not finite.
    """
    parts = {
        "temperature": (temperature_logits_NC, temperature_label_N),
        "threshold": (threshold_logits_NC, threshold_label_N),
        "certify": (certify_logits_NC, certify_label_N),
    }
    for name, (logits_NC, label_N) in parts.items():
        _check(name, logits_NC, label_N, groups)
    temperature_K = fit_temperatures(temperature_logits_NC, temperature_label_N, groups)
    pilot, fit, certify = (
        _Part(calibrated(logits_NC, groups, temperature_K), logits_NC.argmax(axis=1), label_N, groups)
        for logits_NC, label_N in parts.values()
    )
    calibration = tuple(
        GroupCalibration(
            group=name,
            temperature=float(temperature_K[group]),
            expected_accuracy=accuracy_bins(fit.predicted_in(group).confidence_M, fit.predicted_in(group).right_M),
            abstention=_abstention(
                pilot.predicted_in(group), fit.predicted_in(group), certify.predicted_in(group), target_precision
            ),
            prediction_set=_prediction_set(fit.own_probability(group), certify.own_probability(group), target_coverage),
            predicted_share=float((groups.index[certify.predicted_N] == group).mean()),
            confidence_counts=_confidence_counts(certify.predicted_in(group).confidence_M),
        )
        for group, name in enumerate(groups.names)
    )
    uncalibrated = _Part(softmax(certify_logits_NC), certify.predicted_N, certify_label_N, groups)
    size_N = (certify.probability_NC >= least_probabilities(calibration, groups)).sum(axis=1)
    return ConfidenceCertificate(
        calibration=calibration,
        reliability=tuple(
            _reliability(name, uncalibrated.predicted_in(group), certify.predicted_in(group))
            for group, name in enumerate(groups.names)
        ),
        mean_set_size=float(size_N.mean()),
        empty_sets=float((size_N == 0).mean()),
        num_temperature_images=len(temperature_label_N),
        num_threshold_images=len(threshold_label_N),
    )


def _check(name: str, logits_NC: NDArray[np.floating], label_N: NDArray[np.int64], groups: ClassGroups) -> None:
    num_classes = len(groups.group_of_class)
    if logits_NC.ndim != 2 or label_N.shape != logits_NC.shape[:1] or logits_NC.shape[1] != num_classes:
        raise DataError(
            f"the {name} images have logits of shape {logits_NC.shape} and labels of shape {label_N.shape}; expected "
            f"one row of {num_classes} logits and one label an image. Are model and data of the same task?"
        )
    if not len(label_N):
        raise DataError(f"there are no {name} images; without any, nothing can be said of confidence. Give more.")
    if label_N.min() < 0 or label_N.max() >= num_classes:
        raise DataError(
            f"the {name} images have labels from {label_N.min()} to {label_N.max()}, but the task has "
            f"{num_classes} classes. Are model and data of the same task?"
        )
    if not np.isfinite(logits_NC).all():
        raise DataError(f"the logits of the {name} images are not all finite; such a model has no confidence to fit.")


def _abstention(pilot: _Predictions, fit: _Predictions, certify: _Predictions, target_precision: float) -> Abstention:
    threshold = abstention_threshold(pilot.confidence_M, pilot.right_M, fit.confidence_M, fit.right_M, target_precision)
    if threshold is None:
        return Abstention(target_precision=target_precision, threshold=None, coverage=0, precision=None)
    return Abstention(
        target_precision=target_precision,
        threshold=threshold,
        coverage=float((fit.confidence_M >= threshold).mean()),
        precision=_share(certify.right_M[certify.confidence_M >= threshold]),
    )


def _prediction_set(
    own_M: NDArray[np.float64], certify_own_M: NDArray[np.float64], target_coverage: float
) -> SetThreshold:
    least, low, high = set_threshold(own_M, target_coverage)
    return SetThreshold(
        target_coverage=target_coverage,
        least_probability=least,
        num_images=len(own_M),
        low=low,
        high=high,
        coverage=_share(certify_own_M >= (least or 0.0)),
    )


def _reliability(name: str, before: _Predictions, after: _Predictions) -> GroupReliability:
    some = len(after.right_M) > 0
    return GroupReliability(
        group=name,
        num_images=len(after.right_M),
        before=_reliability_bins(before),
        after=_reliability_bins(after),
        ece_before=calibration_error(before.confidence_M, before.right_M) if some else None,
        ece_after=calibration_error(after.confidence_M, after.right_M) if some else None,
        ece_null=calibration_error_null(after.confidence_M)[0] if some else None,
    )


def _reliability_bins(said: _Predictions) -> tuple[ReliabilityBin, ...]:
    bin_M = confidence_bins(said.confidence_M)
    return tuple(
        ReliabilityBin(
            above=place / HISTOGRAM_BINS,
            up_to=(place + 1) / HISTOGRAM_BINS,
            num_images=int((bin_M == place).sum()),
            mean_confidence=_mean(said.confidence_M[bin_M == place]),
            accuracy=_mean(said.right_M[bin_M == place]),
        )
        for place in range(HISTOGRAM_BINS)
    )


def _confidence_counts(confidence_M: NDArray[np.float64]) -> tuple[int, ...]:
    return tuple(np.bincount(confidence_bins(confidence_M), minlength=HISTOGRAM_BINS).tolist())


def _mean(values: NDArray[np.float64] | NDArray[np.bool_]) -> float | None:
    return float(values.mean()) if len(values) else None


def _share(true_M: NDArray[np.bool_]) -> Proportion | None:
    return proportion(int(true_M.sum()), len(true_M)) if len(true_M) else None
