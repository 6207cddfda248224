"""What confidence means in each group of classes: fitted when a model is certified, applied wherever it answers.

Only the predicted group is known when a model answers, so temperature, expected accuracy and abstention go by the group
of the predicted class. A prediction set takes each class by the threshold of that class's own group (group-Mondrian
conformal prediction), which covers the images of every true group alike. The predicted class is the one with the
highest logit: probabilities that round to the same number do not decide.

Shape legend: N images, C classes, K class groups.
"""

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ltkd.contract.class_groups import ClassGroups
from ltkd.contract.records import Record

HISTOGRAM_BINS = 10


class Proportion(Record):
    """A share that was counted, with its exact two-sided 95 % interval (Clopper and Pearson)."""

    value: float
    low: float
    high: float
    n: int = Field(ge=1)


class ConfidenceBin(Record):
    """How often predictions of one group were right whose confidence lay in one interval.

    Attributes:
        above: Lower end of the interval, not in it but for 0.
        up_to: Upper end, in it.
        accuracy: Share of right predictions.
    """

    above: float = Field(ge=0, le=1)
    up_to: float = Field(ge=0, le=1)
    accuracy: Proportion


class Abstention(Record):
    """From which confidence on predictions of one group are right often enough.

    Attributes:
        target_precision: The share of right predictions that is wanted.
        threshold: Confidence from which on it is had: proved, but for one fit in twenty in which the truth lies below
            the target. None where the images at hand prove it for no threshold.
        coverage: Share of the group's predictions that are accepted, on the images that fitted the threshold.
        precision: Share of the accepted predictions that were right, on certification images that fitted nothing.
    """

    target_precision: float = Field(gt=0, lt=1)
    threshold: float | None
    coverage: float = Field(ge=0, le=1)
    precision: Proportion | None


class SetThreshold(Record):
    """Which classes of one group are taken into prediction sets.

    Attributes:
        target_coverage: The share of the group's images whose class shall be in the set.
        least_probability: A class is in the set if its probability is at least this; None takes every class of
            the group, because there were too few images to leave one out.
        num_images: Images of the group that fitted it.
        low: The coverage of further images lies above this in 95 of 100 fits on so many images ...
        high: ... and below this in 95 of 100; between the two in 90.
        coverage: What was seen on certification images that fitted nothing.
    """

    target_coverage: float = Field(gt=0, lt=1)
    least_probability: float | None
    num_images: int
    low: float
    high: float
    coverage: Proportion | None


class GroupCalibration(Record):
    """What confidence means in one group.

    Attributes:
        group: Its name.
        temperature: Logits are divided by it when the predicted class is of this group.
        expected_accuracy: Bins of confidence without gaps from 0 to 1; empty where nothing was predicted in the group.
        abstention: When to trust a prediction of the group.
        prediction_set: When a class of the group belongs to a prediction set.
        predicted_share: Share of the certification images whose predicted class is of this group.
        confidence_counts: Of these images, how many have a confidence in each of HISTOGRAM_BINS equal intervals.
    """

    group: str
    temperature: float = Field(gt=0)
    expected_accuracy: tuple[ConfidenceBin, ...]
    abstention: Abstention
    prediction_set: SetThreshold
    predicted_share: float = Field(ge=0, le=1)
    confidence_counts: tuple[int, ...] = Field(min_length=HISTOGRAM_BINS, max_length=HISTOGRAM_BINS)


Calibration = tuple[GroupCalibration, ...]
"""One entry a group, in the order of the task's groups."""


def calibrated(
    logits_NC: NDArray[np.floating], groups: ClassGroups, temperature_K: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Probabilities [N, C] at the temperature of the predicted class's group; the most probable class stays.

    An image gets the same probabilities to the last bit alone and among others.
    """
    temperature_N = temperature_K[groups.index[logits_NC.argmax(axis=1)]]
    rows_NC = np.ascontiguousarray(logits_NC, dtype=np.float64)  # the order of sums follows the layout
    return softmax(rows_NC / temperature_N[:, None])


def temperatures(calibration: Calibration) -> NDArray[np.float64]:
    """The temperature of every group, float64 [K]."""
    return np.array([group.temperature for group in calibration])


def expected_accuracy(group: GroupCalibration, confidence: float) -> Proportion | None:
    """How often predictions of the group with such a confidence were right; None where nothing is known."""
    return next((part.accuracy for part in group.expected_accuracy if confidence <= part.up_to), None)


def confidence_bins(confidence_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which of HISTOGRAM_BINS equal intervals each confidence lies in; an edge belongs to the interval below it."""
    edges = np.arange(1, HISTOGRAM_BINS) / HISTOGRAM_BINS
    return np.searchsorted(edges, confidence_N, side="left")


def least_probabilities(calibration: Calibration, groups: ClassGroups) -> NDArray[np.float64]:
    """For each class the probability from which on it belongs to a prediction set, float64 [C]."""
    least_K = [group.prediction_set.least_probability or 0.0 for group in calibration]
    return np.array(least_K)[groups.index]


def softmax(logits_NC: NDArray[np.floating], temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities in float64; finite for any finite logits."""
    scaled = np.asarray(logits_NC, dtype=np.float64) / temperature
    exponential = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(exponential / exponential.sum(axis=1, keepdims=True))
