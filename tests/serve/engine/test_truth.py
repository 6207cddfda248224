"""The statistical guarantees of answers hold for held-out images, over many independent calibrations.

The images are synthetic and each has the true probability of every class, so the guarantees are compared with the truth
itself and not with another sample. The simulated network is over-confident, most of all in the head.

Shape legend: N images, C classes.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom
from serve_toys import GROUPS

from ltkd.contract.calibration import Calibration, softmax
from serve.engine.answers import AnswerBuilder
from tests.serve.engine.test_answers import manifest

NUM_FITS = 24
NUM_HELD_OUT = 4000
BIAS_C = np.array([1.5, 1.2, 0.3, 0.1, -0.8, -1.0])
SHARPNESS_C = np.array([2.0, 2.0, 1.6, 1.6, 1.3, 1.3])


def draw(rng: np.random.Generator, num: int) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]:
    """Logits [N, C], labels [N] and the true probabilities [N, C] from which the labels were drawn."""
    true_logits_NC = rng.normal(0, 4.0, (num, 6)) + BIAS_C
    true_probability_NC = softmax(true_logits_NC)
    labels_N = (true_probability_NC.cumsum(axis=1) < rng.random((num, 1))).sum(axis=1)
    return (true_logits_NC * SHARPNESS_C).astype(np.float32), labels_N, true_probability_NC


class HeldOut(NamedTuple):
    """Answers for held-out images, with the true probabilities of their classes."""

    calibration: Calibration
    answers: list[dict[str, Any]]
    true_probability_NC: NDArray[np.float64]


@pytest.fixture(scope="module")
def fits() -> list[HeldOut]:
    certification = pytest.importorskip("export.certification.calibration")

    def calibrations() -> Iterator[HeldOut]:
        for seed in range(NUM_FITS):
            rng = np.random.default_rng(seed)
            samples = [draw(rng, num)[:2] for num in (1000, 3000, 1500)]
            calibration = certification.certify_confidence(*samples[0], *samples[1], *samples[2], GROUPS).calibration
            logits_NC, _, true_probability_NC = draw(rng, NUM_HELD_OUT)
            builder = AnswerBuilder(manifest(calibration), "fp32")
            texts = builder.json(builder.predict(logits_NC), [1] * NUM_HELD_OUT, [()] * NUM_HELD_OUT)
            yield HeldOut(calibration, [json.loads(text) for text in texts], true_probability_NC)

    return list(calibrations())


def assert_rarely_false(kept: list[bool], nominal: float) -> None:
    """Guarantees may fail at their nominal rate; the bound is exceeded by chance once in 1000 runs of a test."""
    assert len(kept) >= NUM_FITS / 2  # otherwise there were hardly any guarantees to check
    assert kept.count(False) <= binom.ppf(0.999, len(kept), nominal), f"{kept.count(False)} of {len(kept)} are false"


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS.names)
def test_the_accuracy_at_every_confidence_lies_in_the_published_interval(fits: list[HeldOut], group: str) -> None:
    kept = []
    for held_out in fits:
        by_interval: dict[tuple[float, float], list[float]] = {}
        for answer, true_probability_C in zip(held_out.answers, held_out.true_probability_NC, strict=True):
            if answer["group"] == group and (expected := answer["expected_accuracy"]):
                right = true_probability_C[answer["class_index"]]
                by_interval.setdefault((expected["low"], expected["high"]), []).append(right)
        kept += [low <= np.mean(rights) <= high for (low, high), rights in by_interval.items() if len(rights) >= 100]
    assert_rarely_false(kept, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS.names)
def test_prediction_sets_cover_each_group_as_stated(fits: list[HeldOut], group: str) -> None:
    members, kept = GROUPS.members(group), []
    names = manifest().task.class_names
    for held_out in fits:
        stated = next(one.prediction_set for one in held_out.calibration if one.group == group)
        sets = [[names.index(label) for label in answer["prediction_set"]["labels"]] for answer in held_out.answers]
        covered = sum(
            true_C[[index for index in inrngs if index in members]].sum()
            for inrngs, true_C in zip(sets, held_out.true_probability_NC, strict=True)
        )
        coverage = covered / held_out.true_probability_NC[:, members].sum()
        kept.append(stated.low <= coverage <= stated.high)
        assert all(answer["prediction_set"]["target_coverage"] == stated.target_coverage for answer in held_out.answers)
    assert_rarely_false(kept, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS.names)
def test_accepted_answers_have_the_target_precision(fits: list[HeldOut], group: str) -> None:
    kept = []
    for held_out in fits:
        rights = [
            true_C[answer["class_index"]]
            for answer, true_C in zip(held_out.answers, held_out.true_probability_NC, strict=True)
            if answer["group"] == group and answer["decision"] == "accept"
        ]
        if rights:
            kept.append(bool(np.mean(rights) >= held_out.answers[0]["target_precision"]))
    assert_rarely_false(kept, 0.05)


@pytest.mark.slow
def test_uncalibrated_confidence_is_detected(fits: list[HeldOut]) -> None:
    """The fault that the first test should find is planted: every temperature is one."""
    held_out = fits[0]
    uncalibrated = tuple(group.model_copy(update={"temperature": 1.0}) for group in held_out.calibration)
    rng = np.random.default_rng(99)
    logits_NC, _, true_probability_NC = draw(rng, NUM_HELD_OUT)
    builder = AnswerBuilder(manifest(uncalibrated), "fp32")
    predictions = builder.predict(logits_NC)
    rights: dict[tuple[float, float], list[float]] = {}
    for row, text in enumerate(builder.json(predictions, [1] * NUM_HELD_OUT, [()] * NUM_HELD_OUT)):
        expected = json.loads(text)["expected_accuracy"]
        interval = (expected["low"], expected["high"])
        rights.setdefault(interval, []).append(true_probability_NC[row, predictions.labels[row]])
    kept = [low <= np.mean(right) <= high for (low, high), right in rights.items() if len(right) >= 100]
    assert kept.count(False) > binom.ppf(0.999, len(kept), 0.05)
