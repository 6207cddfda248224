"""Calibration per class group: the records of the fitted values and the functions that apply them.

``export`` fits the calibration when it certifies a model; ``serve`` applies it to every prediction. The true group is
unknown at inference, so temperature, expected accuracy and abstention depend on the group of the predicted class. A
prediction set compares each class with the threshold of that class's own group (group-Mondrian conformal prediction),
which gives the images of every true group the same coverage. The predicted class is the class with the highest logit;
it does not depend on probabilities, because these can round to the same number.

Shape legend: N images, C classes, K class groups.
"""

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ltkd.contract.class_groups import ClassGroups
from ltkd.contract.records import Record

HISTOGRAM_BINS = 10


class Proportion(Record):
    """An observed proportion with its exact two-sided 95 % confidence interval (Clopper and Pearson)."""

    value: float
    low: float
    high: float
    n: int = Field(ge=1)


class ConfidenceBin(Record):
    """The accuracy of one group's predictions whose confidence lies in one interval.

    Attributes:
        above: Lower end of the interval, exclusive unless it is 0.
        up_to: Upper end of the interval, inclusive.
        accuracy: Proportion of correct predictions.
    """

    above: float = Field(ge=0, le=1)
    up_to: float = Field(ge=0, le=1)
    accuracy: Proportion


class Abstention(Record):
    """The confidence above which predictions of one group are accepted.

    Attributes:
        target_precision: The proportion of accepted predictions that should be correct.
        threshold: The lowest confidence that is accepted. The precision reaches the target in at least 95 % of fits.
            None if the fitting images show this for no threshold.
        coverage: Proportion of the group's predictions that are accepted, on the images that fitted the threshold.
        precision: Proportion of the accepted predictions that are correct, on certification images that were not used
            for fitting.
    """

    target_precision: float = Field(gt=0, lt=1)
    threshold: float | None
    coverage: float = Field(ge=0, le=1)
    precision: Proportion | None


class SetThreshold(Record):
    """Which classes of one group belong to prediction sets.

    Attributes:
        target_coverage: The proportion of the group's images whose true class should be in the set.
        least_probability: A class is in the set if its probability is at least this. None puts every class of the
            group in the set, because there were too few images to fit a threshold.
        num_images: Number of images of the group that were used for fitting.
        low: The coverage of new images is above this value in 95 % of fits on this number of images.
        high: The coverage of new images is below this value in 95 % of fits; it is between both in 90 %.
        coverage: The coverage on certification images that were not used for fitting.
    """

    target_coverage: float = Field(gt=0, lt=1)
    least_probability: float | None
    num_images: int
    low: float
    high: float
    coverage: Proportion | None


class GroupCalibration(Record):
    """The calibration of one group.

    Attributes:
        group: Name of the group.
        temperature: Logits are divided by it if the predicted class is in this group.
        expected_accuracy: Bins of confidence from 0 to 1 without gaps; empty if no prediction is in the group.
        abstention: When a prediction of the group is accepted.
        prediction_set: When a class of the group belongs to a prediction set.
        predicted_share: Proportion of the certification images whose predicted class is in this group.
        confidence_counts: Number of these images in each of HISTOGRAM_BINS equal intervals of confidence.
    """

    group: str
    temperature: float = Field(gt=0)
    expected_accuracy: tuple[ConfidenceBin, ...]
    abstention: Abstention
    prediction_set: SetThreshold
    predicted_share: float = Field(ge=0, le=1)
    confidence_counts: tuple[int, ...] = Field(min_length=HISTOGRAM_BINS, max_length=HISTOGRAM_BINS)


Calibration = tuple[GroupCalibration, ...]
"""One entry per group, in the order of the task's groups."""


def calibrated_probabilities(
    logits_NC: NDArray[np.floating], groups: ClassGroups, temperature_K: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Compute probabilities [N, C] with the temperature of the predicted class's group.

    The most probable class does not change. An image gets bitwise the same probabilities alone and in a batch.
    """
    temperature_N = temperature_K[groups.index[logits_NC.argmax(axis=1)]]
    rows_NC = np.ascontiguousarray(logits_NC, dtype=np.float64)  # the order of summation depends on the memory layout
    return softmax(rows_NC / temperature_N[:, None])


def temperatures(calibration: Calibration) -> NDArray[np.float64]:
    """The temperature of every group, float64 [K]."""
    return np.array([group.temperature for group in calibration])


def expected_accuracy(group: GroupCalibration, confidence: float) -> Proportion | None:
    """The accuracy of the group's predictions in the bin of this confidence; None if there is no such bin."""
    return next((part.accuracy for part in group.expected_accuracy if confidence <= part.up_to), None)


def confidence_bins(confidence_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """The index of each confidence's interval among HISTOGRAM_BINS equal ones; an edge is in the interval below it."""
    edges = np.arange(1, HISTOGRAM_BINS) / HISTOGRAM_BINS
    return np.searchsorted(edges, confidence_N, side="left")


def least_probabilities(calibration: Calibration, groups: ClassGroups) -> NDArray[np.float64]:
    """The minimum probability with which each class belongs to a prediction set, float64 [C]."""
    least_K = [group.prediction_set.least_probability or 0.0 for group in calibration]
    return np.array(least_K)[groups.index]


def softmax(logits_NC: NDArray[np.floating], temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities in float64; finite for any finite logits."""
    scaled = np.asarray(logits_NC, dtype=np.float64) / temperature
    exponential = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(exponential / exponential.sum(axis=1, keepdims=True))
