"""What confidence means: the records and their application, which the service shares with the fit."""

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
    calibrated,
    confidence_bins,
    expected_accuracy,
    least_probabilities,
    softmax,
    temperatures,
)
from ltkd.contract.class_groups import ClassGroups

GROUPS = ClassGroups(names=("head", "tail"), group_of_class=(0, 0, 1))


def calibration_of(group: str, temperature: float, least_probability: float | None) -> GroupCalibration:
    share = Proportion(value=0.5, low=0.4, high=0.6, n=100)
    return GroupCalibration(
        group=group,
        temperature=temperature,
        expected_accuracy=(
            ConfidenceBin(above=0, up_to=0.3, accuracy=share.model_copy(update={"value": 0.2})),
            ConfidenceBin(above=0.3, up_to=1, accuracy=share.model_copy(update={"value": 0.8})),
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


def test_each_image_is_cooled_by_the_temperature_of_its_predicted_group() -> None:
    found = calibrated(np.array([[3, 0, 0], [0, 0, 3]], np.float32), GROUPS, np.array([1.0, 3.0]))
    np.testing.assert_array_equal(found, np.vstack([softmax(np.array([[3, 0, 0]])), softmax(np.array([[0, 0, 1]]))]))


@given(st.integers(0, 1000), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_the_predicted_class_has_the_highest_probability_at_any_temperatures(
    seed: int, head: float, tail: float
) -> None:
    logits_NC = logits(50, seed=seed)
    probability_NC = calibrated(logits_NC, GROUPS, np.array([head, tail]))
    chosen_N = probability_NC[np.arange(50), logits_NC.argmax(axis=1)]
    np.testing.assert_array_equal(chosen_N, probability_NC.max(axis=1))


@pytest.mark.parametrize("num_classes", [2, 3, 7, 8, 9, 100, 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_image_gets_the_same_probabilities_to_the_last_bit_alone_and_among_others(
    num_classes: int, dtype: type
) -> None:
    groups = ClassGroups(names=("head", "tail"), group_of_class=(0,) * (num_classes - 1) + (1,))
    logits_NC = logits(37, num_classes).astype(dtype)
    temperature_K = np.array([1.3, 0.7])
    together_NC = calibrated(logits_NC, groups, temperature_K)
    alone_NC = np.vstack([calibrated(logits_NC[row : row + 1], groups, temperature_K) for row in range(37)])
    np.testing.assert_array_equal(alone_NC, together_NC)
    np.testing.assert_array_equal(calibrated(np.asfortranarray(logits_NC), groups, temperature_K), together_NC)


def test_huge_and_equal_logits_give_probabilities() -> None:
    huge_NC = np.array([[3e38, -3e38, 0], [0, 0, 0]], np.float32)
    found = calibrated(huge_NC, GROUPS, np.array([1e-3, 1e-3]))
    np.testing.assert_array_equal(found, [[1, 0, 0], [1 / 3] * 3])


def test_expected_accuracy_is_that_of_the_bin_whose_upper_end_belongs_to_it() -> None:
    group = calibration_of("head", 1, None)
    said = {confidence: expected_accuracy(group, confidence) for confidence in (0, 0.3, np.nextafter(0.3, 1), 1)}
    assert [share and share.value for share in said.values()] == [0.2, 0.2, 0.8, 0.8]
    assert expected_accuracy(group.model_copy(update={"expected_accuracy": ()}), 0.5) is None


def test_confidence_is_counted_in_intervals_that_hold_their_upper_end() -> None:
    edges = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    np.testing.assert_array_equal(confidence_bins(edges), np.arange(10))
    np.testing.assert_array_equal(confidence_bins(np.nextafter(edges[:-1], 1)), np.arange(1, 10))
    np.testing.assert_array_equal(confidence_bins(np.array([0.0])), [0])


def test_a_group_with_too_few_images_has_all_its_classes_in_every_set() -> None:
    calibration = (calibration_of("head", 1.5, 0.2), calibration_of("tail", 0.5, None))
    np.testing.assert_array_equal(least_probabilities(calibration, GROUPS), [0.2, 0.2, 0])
    np.testing.assert_array_equal(temperatures(calibration), [1.5, 0.5])
