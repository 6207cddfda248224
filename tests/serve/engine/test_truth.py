"""What answers promise is true of images that fitted nothing: counted over many fits, where the truth is known.

The images are synthetic: each comes with the true probability of every class, so that what is promised can be held
against the truth itself, and not against another sample. The network is over-confident, and most of all in the head.

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

FITS = 24
NUM_HELD_OUT = 4000
BIAS_C = np.array([1.5, 1.2, 0.3, 0.1, -0.8, -1.0])
SHARPNESS_C = np.array([2.0, 2.0, 1.6, 1.6, 1.3, 1.3])


def drawn(dice: np.random.Generator, num: int) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float64]]:
    """Logits [N, C], labels [N] and the true probabilities [N, C] from which the labels were drawn."""
    truth_NC = dice.normal(0, 4.0, (num, 6)) + BIAS_C
    true_probability_NC = softmax(truth_NC)
    label_N = (true_probability_NC.cumsum(axis=1) < dice.random((num, 1))).sum(axis=1)
    return (truth_NC * SHARPNESS_C).astype(np.float32), label_N, true_probability_NC


class Held(NamedTuple):
    """Answers to held-out images with the truth about these."""

    calibration: Calibration
    answers: list[dict[str, Any]]
    true_probability_NC: NDArray[np.float64]


@pytest.fixture(scope="module")
def fits() -> list[Held]:
    calibrate = pytest.importorskip("export.certification.calibration")

    def made() -> Iterator[Held]:
        for seed in range(FITS):
            dice = np.random.default_rng(seed)
            parts = [drawn(dice, num)[:2] for num in (1000, 3000, 1500)]
            calibration = calibrate.certify_confidence(*parts[0], *parts[1], *parts[2], GROUPS).calibration
            logits_NC, _, true_probability_NC = drawn(dice, NUM_HELD_OUT)
            answerer = AnswerBuilder(manifest(calibration), "fp32")
            texts = answerer.json(answerer.judge(logits_NC), [1] * NUM_HELD_OUT, [()] * NUM_HELD_OUT)
            yield Held(calibration, [json.loads(text) for text in texts], true_probability_NC)

    return list(made())


def assert_rarely_false(kept: list[bool], nominal: float) -> None:
    """Promises may fail as often as they say; more often than 999 of 1000 times that is no chance."""
    assert len(kept) >= FITS / 2  # else nothing would have been promised
    assert kept.count(False) <= binom.ppf(0.999, len(kept), nominal), f"{kept.count(False)} of {len(kept)} are false"


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS.names)
def test_the_accuracy_of_every_confidence_lies_in_the_published_interval(fits: list[Held], group: str) -> None:
    kept = []
    for held in fits:
        by_interval: dict[tuple[float, float], list[float]] = {}
        for answer, true_probability_C in zip(held.answers, held.true_probability_NC, strict=True):
            if answer["group"] == group and (expected := answer["expected_accuracy"]):
                right = true_probability_C[answer["class_index"]]
                by_interval.setdefault((expected["low"], expected["high"]), []).append(right)
        kept += [low <= np.mean(rights) <= high for (low, high), rights in by_interval.items() if len(rights) >= 100]
    assert_rarely_false(kept, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS.names)
def test_prediction_sets_cover_each_group_as_stated(fits: list[Held], group: str) -> None:
    members, kept = GROUPS.members(group), []
    names = manifest().task.class_names
    for held in fits:
        stated = next(one.prediction_set for one in held.calibration if one.group == group)
        sets = [[names.index(label) for label in answer["prediction_set"]["labels"]] for answer in held.answers]
        covered = sum(
            true_C[[index for index in indices if index in members]].sum()
            for indices, true_C in zip(sets, held.true_probability_NC, strict=True)
        )
        coverage = covered / held.true_probability_NC[:, members].sum()
        kept.append(stated.low <= coverage <= stated.high)
        assert all(answer["prediction_set"]["target_coverage"] == stated.target_coverage for answer in held.answers)
    assert_rarely_false(kept, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS.names)
def test_accepted_answers_are_right_as_often_as_they_shall_be(fits: list[Held], group: str) -> None:
    kept = []
    for held in fits:
        rights = [
            true_C[answer["class_index"]]
            for answer, true_C in zip(held.answers, held.true_probability_NC, strict=True)
            if answer["group"] == group and answer["decision"] == "accept"
        ]
        if rights:
            kept.append(bool(np.mean(rights) >= held.answers[0]["target_precision"]))
    assert_rarely_false(kept, 0.05)


@pytest.mark.slow
def test_confidence_that_is_not_calibrated_would_be_found(fits: list[Held]) -> None:
    """The fault that the first test is to find, planted: every temperature is one."""
    held = fits[0]
    raw = tuple(group.model_copy(update={"temperature": 1.0}) for group in held.calibration)
    dice = np.random.default_rng(99)
    logits_NC, _, true_probability_NC = drawn(dice, NUM_HELD_OUT)
    answerer = AnswerBuilder(manifest(raw), "fp32")
    judged = answerer.judge(logits_NC)
    rights: dict[tuple[float, float], list[float]] = {}
    for row, text in enumerate(answerer.json(judged, [1] * NUM_HELD_OUT, [()] * NUM_HELD_OUT)):
        expected = json.loads(text)["expected_accuracy"]
        interval = (expected["low"], expected["high"])
        rights.setdefault(interval, []).append(true_probability_NC[row, judged.labels[row]])
    kept = [low <= np.mean(seen) <= high for (low, high), seen in rights.items() if len(seen) >= 100]
    assert kept.count(False) > binom.ppf(0.999, len(kept), 0.05)
