import math

import numpy as np
import pytest

from ltkd.contract.calibration import softmax
from ltkd.contract.class_groups import ClassGroups
from ltkd.contract.metrics import accuracy_by_group

GROUPS = ClassGroups(names=("head", "tail"), group_of_class=(0, 0, 1))


def test_an_image_counts_for_the_group_of_its_true_class() -> None:
    predicted, label = np.array([0, 2, 2, 0, 0]), np.array([0, 1, 2, 2, 2])
    assert accuracy_by_group(predicted, label, GROUPS) == pytest.approx({"head": 1 / 2, "tail": 1 / 3, "all": 2 / 5})


def test_the_overall_accuracy_weights_images_equally_and_not_groups() -> None:
    label = np.array([0] * 9 + [2])
    assert accuracy_by_group(np.zeros(10, np.int64), label, GROUPS) == {"head": 1.0, "tail": 0.0, "all": 0.9}


def test_the_accuracy_of_a_group_without_images_is_nan_and_not_zero() -> None:
    accuracy = accuracy_by_group(np.array([0]), np.array([0]), GROUPS)
    assert math.isnan(accuracy["tail"])
    assert accuracy["all"] == 1


def test_softmax_matches_its_definition() -> None:
    logits = np.log(np.array([[1.0, 2.0, 5.0]]))
    np.testing.assert_allclose(softmax(logits), [[1 / 8, 2 / 8, 5 / 8]], rtol=1e-12)  # float64 rounding
    squares = np.array([[1, 4, 25]]) / 30
    np.testing.assert_allclose(softmax(logits, temperature=0.5), squares, rtol=1e-12)


def test_softmax_is_finite_for_any_finite_logits() -> None:
    limit = float(np.finfo(np.float32).max)
    probability = softmax(np.array([[limit, -limit, 0], [-limit, -limit, -limit]], dtype=np.float32))
    np.testing.assert_allclose(probability, [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-12)
    assert probability.dtype == np.float64
