"""Tests of the calibration records and of the functions that apply them in export and serving."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltkd.contract.calibration import (
    HISTOGRAM_BINS,
    Abstention,
    ConfidenceBin,
    GroupCalibration,
    Proportion,
    SetThreshold,
    calibrated_probabilities,
    confidence_bins,
    expected_accuracy,
    least_probabilities,
    softmax,
    temperatures,
)
from ltkd.contract.class_groups import ClassGroups

GROUPS = ClassGroups(names=("head", "tail"), group_of_class=(0, 0, 1))


def calibration_of(group: str, temperature: float, least_probability: float | None) -> GroupCalibration:
    proportion = Proportion(value=0.5, low=0.4, high=0.6, n=100)
    return GroupCalibration(
        group=group,
        temperature=temperature,
        expected_accuracy=(
            ConfidenceBin(above=0, up_to=0.3, accuracy=proportion.model_copy(update={"value": 0.2})),
            ConfidenceBin(above=0.3, up_to=1, accuracy=proportion.model_copy(update={"value": 0.8})),
        ),
        abstention=Abstention(target_precision=0.9, threshold=None, coverage=0, precision=None),
        prediction_set=SetThreshold(
            target_coverage=0.9, least_probability=least_probability, num_images=9, low=0.7, high=1, coverage=None
        ),
        predicted_share=0.5,
        confidence_counts=(1,) * HISTOGRAM_BINS,
    )


def logits(num: int, num_classes: int = 3, seed: int = 0, scale: float = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, scale, (num, num_classes)).astype(np.float32)


def test_the_logits_of_an_image_are_divided_by_the_temperature_of_its_predicted_group() -> None:
    probability_NC = calibrated_probabilities(
        np.array([[3, 0, 0], [0, 0, 3]], np.float32), GROUPS, np.array([1.0, 3.0])
    )
    expected_NC = np.vstack([softmax(np.array([[3, 0, 0]])), softmax(np.array([[0, 0, 1]]))])
    np.testing.assert_array_equal(probability_NC, expected_NC)


@given(st.integers(0, 1000), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_the_predicted_class_has_the_highest_probability_at_any_temperatures(
    seed: int, head: float, tail: float
) -> None:
    logits_NC = logits(50, seed=seed)
    probability_NC = calibrated_probabilities(logits_NC, GROUPS, np.array([head, tail]))
    predicted_N = probability_NC[np.arange(50), logits_NC.argmax(axis=1)]
    np.testing.assert_array_equal(predicted_N, probability_NC.max(axis=1))


@pytest.mark.parametrize("num_classes", [2, 3, 7, 8, 9, 100, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_image_gets_bitwise_the_same_probabilities_alone_and_in_a_batch(num_classes: int, dtype: type) -> None:
    groups = ClassGroups(names=("head", "tail"), group_of_class=(0,) * (num_classes - 1) + (1,))
    logits_NC = logits(37, num_classes).astype(dtype)
    temperature_K = np.array([1.3, 0.7])
    batch_NC = calibrated_probabilities(logits_NC, groups, temperature_K)
    alone_NC = np.vstack(
        [calibrated_probabilities(logits_NC[row : row + 1], groups, temperature_K) for row in range(37)]
    )
    np.testing.assert_array_equal(alone_NC, batch_NC)
    np.testing.assert_array_equal(
        calibrated_probabilities(np.asfortranarray(logits_NC), groups, temperature_K), batch_NC
    )


def test_very_large_and_equal_logits_give_finite_probabilities() -> None:
    logits_NC = np.array([[3e38, -3e38, 0], [0, 0, 0]], np.float32)
    probability_NC = calibrated_probabilities(logits_NC, GROUPS, np.array([1e-3, 1e-3]))
    np.testing.assert_array_equal(probability_NC, [[1, 0, 0], [1 / 3] * 3])


def test_the_bins_of_expected_accuracy_include_their_upper_end() -> None:
    group = calibration_of("head", 1, None)
    accuracies = [expected_accuracy(group, confidence) for confidence in (0, 0.3, np.nextafter(0.3, 1), 1)]
    assert [accuracy and accuracy.value for accuracy in accuracies] == [0.2, 0.2, 0.8, 0.8]
    assert expected_accuracy(group.model_copy(update={"expected_accuracy": ()}), 0.5) is None


def test_the_intervals_of_the_confidence_histogram_include_their_upper_end() -> None:
    edges = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    np.testing.assert_array_equal(confidence_bins(edges), np.arange(10))
    np.testing.assert_array_equal(confidence_bins(np.nextafter(edges[:-1], 1)), np.arange(1, 10))
    np.testing.assert_array_equal(confidence_bins(np.array([0.0])), [0])


def test_all_classes_of_a_group_with_too_few_images_are_in_every_prediction_set() -> None:
    calibration = (calibration_of("head", 1.5, 0.2), calibration_of("tail", 0.5, None))
    np.testing.assert_array_equal(least_probabilities(calibration, GROUPS), [0.2, 0.2, 0])
    np.testing.assert_array_equal(temperatures(calibration), [1.5, 0.5])
