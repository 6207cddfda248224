"""What the service will say of confidence: fitted group by group, and held against images that fitted none of it.

    temperature          of each predicted group, by likelihood, drawn towards that of all images where they are few
    expected accuracy    of each predicted group, counted in bins of calibrated confidence
    abstention           of each predicted group: the confidence from which on a precision is proved
    prediction sets      by group-Mondrian conformal prediction: each true group is covered

The temperature images fit the first, and say in which order abstention thresholds are tried; the threshold images fit
the other three: what is counted must not have chosen the scale it is counted on. The certify images choose nothing.
All of them have to be drawn like those of the deployment; where its groups come in other shares, what is said of a
*predicted* group changes, and the sets keep their coverage.

Shape legend: N images, M images of one group, C classes, K class groups.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.confidence import abstention_threshold, accuracy_bins, fit_temperatures, proportion, set_threshold
from export.parity import ConfidenceCertificate, GroupReliability, ReliabilityBin
from export.statistics import calibration_error, calibration_error_null
from ltkd.calibration import (
    HISTOGRAM_BINS,
    Abstention,
    GroupCalibration,
    Proportion,
    SetThreshold,
    calibrated,
    confidence_bins,
    least_probabilities,
)
from ltkd.errors import DataError
from ltkd.groups import ClassGroups
from ltkd.metrics import softmax


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
