"""Fit the calibration of each class group: temperature, expected accuracy, abstention threshold, prediction sets.

Pure functions of logits and labels. The temperatures must be fitted on other images than the remaining three.
``certify_confidence`` fits all four and measures them on certification images; ``ltkd.contract.calibration`` defines
the records and applies them when a model is served.

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
    calibrated_probabilities,
    confidence_bins,
    least_probabilities,
    softmax,
)
from ltkd.contract.class_groups import ClassGroups
from ltkd.errors import DataError

PRIOR_IMAGES = 50
"""Weight of all images together when the temperature of one group is fitted, in images."""
IMAGES_PER_BIN = 50
"""The minimum of images per bin. With 50 images, the interval of an expected accuracy is already up to 0.29 wide."""
MOST_BINS = 10
ABSTENTION_STEPS = 20


def fit_temperatures(
    logits_NC: NDArray[np.floating], labels_N: NDArray[np.int64], groups: ClassGroups
) -> NDArray[np.float64]:
    """Fit the temperature of each predicted group, float64 [K].

    The temperature minimises the negative log likelihood of the images predicted in the group, plus that of all images
    with a total weight of PRIOR_IMAGES (a power prior; Ibrahim and Chen, Statistical Science 15, 2000). A group without
    images therefore gets the temperature of all images, and a group with many images gets its own. As in Platt scaling
    (1999), one more image with a uniformly random label is added: a model that is correct on all N images gets no more
    confidence than N images support.
    """
    shifted_NC = np.asarray(logits_NC, dtype=np.float64)
    shifted_NC = shifted_NC - shifted_NC.max(axis=1, keepdims=True)
    own_N = shifted_NC[np.arange(len(labels_N)), labels_N]
    target_N = own_N + (shifted_NC.mean(axis=1) - own_N) / (len(labels_N) + 1)
    predicted_N = groups.index[np.asarray(logits_NC).argmax(axis=1)]
    spans_N = -shifted_NC.min(axis=1)
    if not spans_N.any():  # all logits of each image are equal, so the temperature has no effect
        return np.ones(len(groups.names))

    def slope(log_temperature: float, weight_N: NDArray[np.float64]) -> float:
        """Derivative of the loss by 1 / temperature. The loss is convex in 1 / temperature, so there is one root."""
        weight_NC = np.exp(shifted_NC * math.exp(-log_temperature))
        return float(weight_N @ ((weight_NC * shifted_NC).sum(axis=1) / weight_NC.sum(axis=1) - target_N))

    # at a thousandth of the span of its logits an image has confidence 1; at ten times the span, nearly 1 / C
    lowest, highest = math.log(spans_N[spans_N > 0].min() / 1000), math.log(spans_N.max() * 10)
    log_temperatures = []
    for group in range(len(groups.names)):
        weight_N = (predicted_N == group) + PRIOR_IMAGES / len(labels_N)
        if slope(highest, weight_N) >= 0:  # no better than random guesses
            log_temperatures.append(highest)
        elif slope(lowest, weight_N) <= 0:
            log_temperatures.append(lowest)
        else:
            log_temperatures.append(float(brentq(slope, lowest, highest, args=(weight_N,), xtol=1e-9)))
    return np.exp(log_temperatures)


def accuracy_bins(confidence_M: NDArray[np.float64], right_M: NDArray[np.bool_]) -> tuple[ConfidenceBin, ...]:
    """Measure the accuracy of predictions in bins of confidence that cover 0 to 1 without gaps.

    Bins contain about equally many images, at least IMAGES_PER_BIN if there are that many. Equal confidences share a
    bin. If the accuracy falls from one bin to the next, the two are pooled (pool adjacent violators), so a higher
    confidence never has a lower expected accuracy. The accuracy of a pooled bin is as valid, only coarser.
    """
    if not len(confidence_M):
        return ()
    num_bins = min(max(len(confidence_M) // IMAGES_PER_BIN, 1), MOST_BINS)
    value_V, first_V = np.unique(np.sort(confidence_M), return_index=True)
    edges, start = [0.0], 0
    for value, end in zip(value_V[:-1], first_V[1:], strict=True):
        full = end >= len(edges) * len(confidence_M) / num_bins
        if full and min(end - start, len(confidence_M) - end) >= IMAGES_PER_BIN:
            edges.append(float(value))
            start = end
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
    """Find the smallest confidence threshold at which the target precision is proved; None if no threshold is.

    A search among thresholds would select lucky ones. Therefore, as in Learn then Test (Angelopoulos et al., arXiv
    2110.01052), thresholds are tested in an order that does not depend on these images, each by the exact binomial test
    at 5 %. The tests end with the first failure. The probability that a threshold passes although its precision is
    below the target is then at most 5 %, however poor the confidences are. The order comes from the pilot images (as in
    Pareto testing, arXiv 2210.07913): it starts at the threshold with the smallest p-value on them and goes down to
    thresholds that accept more, in steps of 1 / ABSTENTION_STEPS of the pilot predictions.

    Args:
        pilot_confidence_M: Confidences of the pilot images, which determine the order.
        pilot_right_M: Whether their predictions are correct.
        confidence_M: Confidences of the images that test the thresholds.
        right_M: Whether their predictions are correct.
        target_precision: The required share of correct predictions among the accepted ones.
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
    """Fit the least probability that puts a class into a prediction set, and the limits of the resulting coverage.

    With the score 1 - p, the threshold is the ceil((M + 1) target)-th smallest score of the true classes. The code
    compares probabilities instead, because 1 - p rounds small ones away. The coverage of further images follows a beta
    distribution (Vovk, ACML 2012); ties between probabilities can only raise it.

    Args:
        own_M: The probability of the true class, for images of one group.
        target_coverage: The share of further images whose true class should be in the set, on average over fits.

    Returns:
        The least probability, and the lower and the upper limit of the coverage; each limit holds in 95 of 100 fits.
        None, 1 and 1 if there are too few images to exclude any class.
    """
    rank = math.ceil((len(own_M) + 1) * target_coverage - 1e-9)  # 0.9 times 10 may round to more than 9
    if rank > len(own_M):
        return None, 1.0, 1.0
    low, high = betaincinv(rank, len(own_M) + 1 - rank, [1 - CONFIDENCE, CONFIDENCE])
    return float(np.sort(own_M)[-rank]), float(low), float(high)


def proportion(k: int, n: int) -> Proportion:
    """Build the share k / n, for n > 0, with its confidence interval."""
    low, high = clopper_pearson(k, n)
    return Proportion(value=k / n, low=low, high=high, n=n)


def _p_values(
    threshold_T: NDArray[np.float64], confidence_M: NDArray[np.float64], right_M: NDArray[np.bool_], target: float
) -> NDArray[np.float64]:
    """P-value of each threshold: the chance of at least as many correct predictions if precision were the target."""
    accepted_TM = confidence_M >= threshold_T[:, None]
    return np.asarray(binom.sf((accepted_TM & right_M).sum(axis=1) - 1, accepted_TM.sum(axis=1), target))


@dataclass(frozen=True)
class _Predictions:
    """Predictions in one group: their confidence, and whether they are correct."""

    confidence_M: NDArray[np.float64]
    right_M: NDArray[np.bool_]


@dataclass(frozen=True)
class _SplitPredictions:
    """The model's calibrated probabilities and predictions for the images of one split."""

    probability_NC: NDArray[np.float64]
    predicted_N: NDArray[np.int64]
    labels_N: NDArray[np.int64]
    groups: ClassGroups

    def predicted_in(self, group: int) -> _Predictions:
        """Return the predictions whose predicted class belongs to a group."""
        rows = self.groups.index[self.predicted_N] == group
        return _Predictions(
            self.probability_NC[rows].max(axis=1, initial=0), self.predicted_N[rows] == self.labels_N[rows]
        )

    def own_probability(self, group: int) -> NDArray[np.float64]:
        """Return the probability of the true class, for the images whose true class belongs to a group."""
        rows = np.flatnonzero(self.groups.index[self.labels_N] == group)
        return self.probability_NC[rows, self.labels_N[rows]]


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
    """Fit the calibration of every group, and measure it on further images.

    The three sets of images must be disjoint.

    Args:
        temperature_logits_NC: Logits of the images that fit the temperatures. The model must be the one that will be
            served, in the same precision and on the same provider.
        temperature_label_N: True classes of these images.
        threshold_logits_NC: Logits of the images that fit expected accuracy, abstention and prediction sets.
        threshold_label_N: True classes of these images.
        certify_logits_NC: Logits of the images that measure the result.
        certify_label_N: True classes of these images.
        groups: The partition of the C classes.
        target_precision: The required share of correct predictions among those that are accepted.
        target_coverage: The required share of each group's images whose true class is in the prediction set.

    Raises:
        DataError: A set is empty, its labels do not match its logits, or its logits are not finite.
    """
    splits = {
        "temperature": (temperature_logits_NC, temperature_label_N),
        "threshold": (threshold_logits_NC, threshold_label_N),
        "certify": (certify_logits_NC, certify_label_N),
    }
    for name, (logits_NC, labels_N) in splits.items():
        _check(name, logits_NC, labels_N, groups)
    temperature_K = fit_temperatures(temperature_logits_NC, temperature_label_N, groups)
    pilot, fit, certify = (
        _SplitPredictions(
            calibrated_probabilities(logits_NC, groups, temperature_K), logits_NC.argmax(axis=1), labels_N, groups
        )
        for logits_NC, labels_N in splits.values()
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
    uncalibrated = _SplitPredictions(softmax(certify_logits_NC), certify.predicted_N, certify_label_N, groups)
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


def _check(name: str, logits_NC: NDArray[np.floating], labels_N: NDArray[np.int64], groups: ClassGroups) -> None:
    num_classes = len(groups.group_of_class)
    if logits_NC.ndim != 2 or labels_N.shape != logits_NC.shape[:1] or logits_NC.shape[1] != num_classes:
        raise DataError(
            f"the {name} images have logits of shape {logits_NC.shape} and labels of shape {labels_N.shape}; expected "
            f"one row of {num_classes} logits and one label per image. Check that model and data have the same task."
        )
    if not len(labels_N):
        raise DataError(f"there are no {name} images, so confidence cannot be calibrated; add images.")
    if labels_N.min() < 0 or labels_N.max() >= num_classes:
        raise DataError(
            f"the {name} images have labels from {labels_N.min()} to {labels_N.max()}, but the task has "
            f"{num_classes} classes. Check that model and data have the same task."
        )
    if not np.isfinite(logits_NC).all():
        raise DataError(f"the logits of the {name} images are not all finite, so confidence cannot be calibrated.")


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
    any_images = len(after.right_M) > 0
    return GroupReliability(
        group=name,
        num_images=len(after.right_M),
        before=_reliability_bins(before),
        after=_reliability_bins(after),
        ece_before=calibration_error(before.confidence_M, before.right_M) if any_images else None,
        ece_after=calibration_error(after.confidence_M, after.right_M) if any_images else None,
        ece_null=calibration_error_null(after.confidence_M)[0] if any_images else None,
    )


def _reliability_bins(predictions: _Predictions) -> tuple[ReliabilityBin, ...]:
    bin_M = confidence_bins(predictions.confidence_M)
    return tuple(
        ReliabilityBin(
            above=place / HISTOGRAM_BINS,
            up_to=(place + 1) / HISTOGRAM_BINS,
            num_images=int((bin_M == place).sum()),
            mean_confidence=_mean(predictions.confidence_M[bin_M == place]),
            accuracy=_mean(predictions.right_M[bin_M == place]),
        )
        for place in range(HISTOGRAM_BINS)
    )


def _confidence_counts(confidence_M: NDArray[np.float64]) -> tuple[int, ...]:
    return tuple(np.bincount(confidence_bins(confidence_M), minlength=HISTOGRAM_BINS).tolist())


def _mean(values: NDArray[np.float64] | NDArray[np.bool_]) -> float | None:
    return float(values.mean()) if len(values) else None


def _share(true_M: NDArray[np.bool_]) -> Proportion | None:
    return proportion(int(true_M.sum()), len(true_M)) if len(true_M) else None
