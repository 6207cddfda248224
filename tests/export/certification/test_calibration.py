"""Confidence per group: the fits agree with independent computations, and what they promise holds in simulation."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax
from scipy.stats import beta, binom
from statsmodels.stats.proportion import proportion_confint

from export.certification.calibration import (
    IMAGES_A_BIN,
    MOST_BINS,
    PRIOR_IMAGES,
    abstention_threshold,
    accuracy_bins,
    certify_confidence,
    fit_temperatures,
    set_threshold,
)
from export.schema import ConfidenceCertificate
from ltkd.contract.calibration import calibrated, expected_accuracy, least_probabilities, softmax, temperatures
from ltkd.contract.class_groups import ClassGroups
from ltkd.errors import DataError

GROUPS = ClassGroups(names=("head", "medium", "tail"), group_of_class=(0, 0, 0, 0, 1, 1, 1, 2, 2, 2))
TEMPERATURES = np.array([1.5, 2.0, 3.0])
WORLDS = 2000


def tolerance(probability: float, worlds: int = WORLDS) -> float:
    """Four standard errors of a share counted in simulated worlds: exceeded by chance once in 30,000 tests."""
    return 4 * math.sqrt(probability * (1 - probability) / worlds)


def images(num: int, seed: int, temperature_K: NDArray[np.float64] = TEMPERATURES) -> tuple[NDArray, NDArray]:
    """Logits that would be right about their own confidence at the given temperature of the predicted group."""
    rng = np.random.default_rng(seed)
    exact_NC = rng.normal(0, 2, (num, 10))
    exact_NC[np.arange(num), rng.integers(0, 10, num)] += 4
    label_N = (softmax(exact_NC).cumsum(axis=1) > rng.random((num, 1))).argmax(axis=1)
    return (exact_NC * temperature_K[GROUPS.index[exact_NC.argmax(axis=1)], None]).astype(np.float32), label_N


def certificate(seed: int = 0, num: int = 600) -> ConfidenceCertificate:
    return certify_confidence(*images(num, seed), *images(num, seed + 1), *images(2000, seed + 2), GROUPS)


# temperature


def test_the_temperatures_agree_with_a_minimisation_written_apart() -> None:
    logits_NC, label_N = images(700, seed=3)
    predicted_N = GROUPS.index[logits_NC.argmax(axis=1)]

    def objective(log_temperature: NDArray[np.float64], group: int) -> float:
        log_NC = log_softmax(logits_NC.astype(np.float64) / np.exp(log_temperature[0]), axis=1)
        nll_N = -log_NC[np.arange(700), label_N]
        blind_N = -log_NC.mean(axis=1)
        nll_N = nll_N + (blind_N - nll_N) / 701
        return float(nll_N[predicted_N == group].sum() + PRIOR_IMAGES * nll_N.mean())

    apart = [math.exp(minimize(objective, [0.0], args=(group,), tol=1e-10).x[0]) for group in range(3)]
    # BFGS with numerical gradients ends where they vanish in rounding, some 1e-6 away
    np.testing.assert_allclose(fit_temperatures(logits_NC, label_N, GROUPS), apart, rtol=1e-5)


def test_with_many_images_the_temperatures_are_those_of_plain_likelihood_by_torch() -> None:
    logits_NC, label_N = images(10_000, seed=4)
    predicted_N = GROUPS.index[logits_NC.argmax(axis=1)]
    plain = []
    for group in range(3):
        rows = predicted_N == group
        logits, labels = torch.from_numpy(logits_NC[rows]).double(), torch.from_numpy(label_N[rows])
        log_temperature = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([log_temperature], max_iter=50, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = torch.nn.functional.cross_entropy(logits / log_temperature.exp(), labels)  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)
        plain.append(math.exp(log_temperature.item()))
    found = fit_temperatures(logits_NC, label_N, GROUPS)
    # all images weigh 50 against some 3,000 of the group, and their temperature is up to half off: 0.8 %
    np.testing.assert_allclose(found, plain, rtol=1e-2)
    np.testing.assert_allclose(found, TEMPERATURES, rtol=0.08)  # four standard errors


def test_a_group_without_predictions_takes_the_temperature_of_all_and_one_with_few_leans_to_it() -> None:
    logits_NC, label_N = images(3000, seed=5)
    predicted_N = GROUPS.index[logits_NC.argmax(axis=1)]
    only_two = predicted_N < 2
    few = only_two | (np.cumsum(predicted_N == 2) <= 20)
    together = ClassGroups(names=("all",), group_of_class=(0,) * 10)

    (of_all,) = fit_temperatures(logits_NC[only_two], label_N[only_two], together)
    # it is fitted to the same images, only with another weight: equal up to where the search ends
    assert fit_temperatures(logits_NC[only_two], label_N[only_two], GROUPS)[2] == pytest.approx(of_all, rel=1e-6)
    own = fit_temperatures(logits_NC, label_N, GROUPS)[2]
    assert of_all < fit_temperatures(logits_NC[few], label_N[few], GROUPS)[2] < own


@pytest.mark.parametrize("num", [1, 10, 500])
def test_a_model_that_is_always_right_claims_no_more_than_so_many_images_show(num: int) -> None:
    groups = ClassGroups(names=("a", "b"), group_of_class=(0, 1))
    logits_NC = np.tile(np.array([[5.0, -5.0]], np.float32), (num, 1))
    temperature_K = fit_temperatures(logits_NC, np.zeros(num, np.int64), groups)
    # as if one image more had come whose label a coin had drawn
    np.testing.assert_allclose(calibrated(logits_NC, groups, temperature_K)[:, 1], 0.5 / (num + 1), rtol=1e-6)


def test_a_model_that_is_always_wrong_is_left_with_hardly_any_confidence() -> None:
    logits_NC, _ = images(200, seed=6)
    label_N = (logits_NC.argmax(axis=1) + 1) % 10
    temperature_K = fit_temperatures(logits_NC, logits_NC.argmin(axis=1), GROUPS)
    assert calibrated(logits_NC, GROUPS, temperature_K).max() < 0.12  # blind is 0.1
    assert (fit_temperatures(logits_NC, label_N, GROUPS) > TEMPERATURES).all()


def test_the_temperature_scales_with_the_logits_from_tiny_to_huge() -> None:
    logits_NC, label_N = images(300, seed=7)
    plain = fit_temperatures(logits_NC, label_N, GROUPS)
    for scale in (2.0**-60, 2.0**60):  # powers of two change no rounding of float32
        np.testing.assert_allclose(fit_temperatures(logits_NC * np.float32(scale), label_N, GROUPS), plain * scale)
    logits_NC[0] *= 1e6  # one image beside itself does not drag the search away
    assert (fit_temperatures(logits_NC[1:], label_N[1:], GROUPS) == pytest.approx(plain, rel=0.2)) and np.isfinite(
        fit_temperatures(logits_NC, label_N, GROUPS)
    ).all()


def test_equal_logits_keep_the_temperature_at_one() -> None:
    np.testing.assert_array_equal(fit_temperatures(np.full((5, 10), 7.0), np.arange(5), GROUPS), 1)


# expected accuracy


@given(
    st.integers(1, 1200),
    st.sampled_from([2, 3, 10, 1000, 10**9]),
    st.integers(0, 10**6),
)
def test_bins_have_no_gaps_share_the_images_and_never_fall(num: int, num_values: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    confidence_M = rng.integers(1, num_values + 1, num) / num_values
    right_M = rng.random(num) < rng.random()
    bins = accuracy_bins(confidence_M, right_M)
    assert bins[0].above == 0 and bins[-1].up_to == 1 and len(bins) <= MOST_BINS
    assert all(low.up_to == high.above for low, high in pairwise(bins))
    assert all(low.accuracy.value <= high.accuracy.value for low, high in pairwise(bins))
    for number, part in enumerate(bins):
        inside = (confidence_M > part.above) & (confidence_M <= part.up_to)
        assert part.accuracy.n == inside.sum() >= (IMAGES_A_BIN if len(bins) > 1 else 1)
        assert part.accuracy.value == right_M[inside].mean(), number


def test_bins_hold_equally_many_images_and_have_the_exact_interval() -> None:
    confidence_M = np.random.default_rng(0).permutation(np.linspace(0.1, 1, 330))
    bins = accuracy_bins(confidence_M, confidence_M > 0.5)
    assert [part.accuracy.n for part in bins] == [55] * 6
    for part in bins:
        right = round(part.accuracy.value * 55)
        oracle = proportion_confint(right, 55, method="beta")
        assert (part.accuracy.low, part.accuracy.high) == pytest.approx(oracle, abs=1e-12)


def test_nothing_is_expected_of_a_group_in_which_nothing_was_predicted() -> None:
    assert accuracy_bins(np.array([]), np.array([], bool)) == ()
    (one,) = accuracy_bins(np.array([0.7]), np.array([True]))
    assert (one.above, one.up_to, one.accuracy.value, one.accuracy.low) == (0, 1, 1, pytest.approx(0.025))


@pytest.mark.slow
def test_the_intervals_hold_the_true_accuracy_in_95_of_100_bins_although_falling_bins_are_pooled() -> None:
    held = []
    for world in range(WORLDS):
        rng = np.random.default_rng(world)
        confidence_M = rng.random(300)
        for part in accuracy_bins(confidence_M, rng.random(300) < 0.4 + 0.2 * confidence_M):
            truth = 0.4 + 0.2 * (part.above + part.up_to) / 2  # confidence is spread evenly
            held.append(part.accuracy.low <= truth <= part.accuracy.high)
    assert np.mean(held) >= 0.95 - tolerance(0.95)


# abstention


def guarantees(
    precision_of: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    target: float = 0.9,
    num: int = 300,
    worlds: int = WORLDS,
) -> tuple[NDArray, NDArray]:
    """Thresholds found in many worlds, NaN for none, and those of a search that takes the best pointwise p-value."""
    found, naive = np.full(worlds, np.nan), np.full(worlds, np.nan)
    for world in range(worlds):
        rng = np.random.default_rng(world)
        pilot_M, fit_M = rng.random(num), rng.random(num)
        right_M = rng.random(num) < precision_of(fit_M)
        threshold = abstention_threshold(pilot_M, rng.random(num) < precision_of(pilot_M), fit_M, right_M, target)
        found[world] = np.nan if threshold is None else threshold
        order = np.argsort(-fit_M)
        p_M = binom.sf(np.cumsum(right_M[order]) - 1, np.arange(1, num + 1), target)
        naive[world] = fit_M[order][p_M <= 0.05].min(initial=2)
    return found, np.where(naive < 2, naive, np.nan)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [0.85, 0.89, 0.9])
def test_no_guarantee_is_given_in_more_than_5_of_100_worlds_where_precision_misses_the_target(precision: float) -> None:
    found, naive = guarantees(lambda confidence_M: np.full(len(confidence_M), precision))
    assert np.isfinite(found).mean() <= 0.05 + tolerance(0.05)
    if precision == 0.9:
        assert np.isfinite(naive).mean() > 0.15  # what a search among thresholds would have promised


@pytest.mark.slow
def test_a_threshold_that_is_given_has_the_precision_in_95_of_100_worlds_even_if_confidence_misleads() -> None:
    def rising(confidence_M: NDArray[np.float64]) -> NDArray[np.float64]:
        return 0.6 + 0.4 * confidence_M  # the precision from t on is 0.8 + 0.2 t: the target is met from 0.5 on

    def misleading(confidence_M: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(confidence_M > 0.8, 0.7, 0.95)  # 0.9 is met by all images together and below, never above 0.8

    found, _ = guarantees(rising)
    assert (found < 0.5).mean() <= 0.05 + tolerance(0.05)
    # and it is not bought by never promising anything: to who knew the best threshold, some 45 of 100 worlds prove it
    assert np.isfinite(found).mean() > 0.3
    found, _ = guarantees(misleading)
    grid = np.linspace(0, 1, 2001)[:-1]
    true_precision = np.array([misleading(np.linspace(t, 1, 4001)).mean() for t in grid])
    wrong = np.interp(found[np.isfinite(found)], grid, true_precision) < 0.9
    assert wrong.sum() / WORLDS <= 0.05 + tolerance(0.05)


def test_the_smallest_threshold_that_is_proved_is_given() -> None:
    confidence_M = np.linspace(0, 1, 400)
    always = np.ones(400, bool)
    assert abstention_threshold(confidence_M, always, confidence_M, always, 0.9) == 0
    above = confidence_M > 0.5
    threshold = abstention_threshold(confidence_M, above, confidence_M, above, 0.9)
    # a step is 20 images; 200 right and 20 wrong would not do: p = 0.38. Some 8 wrong would
    assert threshold == pytest.approx(0.5, abs=1 / 400)


def test_29_right_predictions_prove_nine_tenths_and_28_do_not() -> None:
    pilot, right = np.array([0.5]), np.array([True])
    assert abstention_threshold(pilot, right, np.full(29, 0.6), np.ones(29, bool), 0.9) == 0
    assert abstention_threshold(pilot, right, np.full(28, 0.6), np.ones(28, bool), 0.9) is None


def test_without_pilot_or_other_images_there_is_no_guarantee() -> None:
    nothing, none = np.array([]), np.array([], bool)
    some, right = np.linspace(0.5, 1, 100), np.ones(100, bool)
    assert abstention_threshold(nothing, none, some, right, 0.9) is None
    assert abstention_threshold(some, right, nothing, none, 0.9) is None
    assert abstention_threshold(some, right, some, ~right, 0.9) is None


# prediction sets


@pytest.mark.parametrize("num", [1, 8, 9, 10, 19, 33, 50, 199])
@pytest.mark.parametrize("target", [0.8, 0.9, 0.95])
def test_sets_agree_with_crepes(num: int, target: float) -> None:
    from crepes import ConformalClassifier

    rng = np.random.default_rng(num)
    own_M, probability_NC = rng.random(num), rng.random((40, 5))
    probability_NC[:10, 0] = rng.choice(own_M, 10)  # ties with calibration images
    least, _, _ = set_threshold(own_M, target)
    oracle = ConformalClassifier()
    oracle.fit(-own_M)  # the order of 1 - p, without its rounding
    p_NC = oracle.predict_p(-probability_NC, smoothing=False)
    # the textbook's set holds p > alpha; 1e-9 keeps a p-value that equals alpha out in spite of rounding
    np.testing.assert_array_equal(probability_NC >= (least or 0.0), p_NC > 1 - target + 1e-9)
    if abs((num + 1) * (1 - target) % 1 - 0.5) < 0.49:  # crepes keeps p = alpha in, which is one rank more there
        own_set = oracle.predict_set(-probability_NC, confidence=target, smoothing=False)
        np.testing.assert_array_equal(probability_NC >= (least or 0.0), own_set)


def test_group_sets_agree_with_crepes_for_every_true_group() -> None:
    from crepes import ConformalClassifier

    found = certificate()
    temperature_K = temperatures(found.calibration)
    (fit_NC, fit_N), (certify_NC, _) = images(600, 1), images(2000, 2)
    own_N = calibrated(fit_NC, GROUPS, temperature_K)[np.arange(600), fit_N]
    probability_NC = calibrated(certify_NC[:100], GROUPS, temperature_K)
    ours = probability_NC >= least_probabilities(found.calibration, GROUPS)
    for group in range(3):
        oracle = ConformalClassifier()
        oracle.fit(-own_N, bins=GROUPS.index[fit_N])
        columns = GROUPS.index == group
        p_NC = oracle.predict_p(-probability_NC[:, columns], bins=np.full(100, group), smoothing=False)
        np.testing.assert_array_equal(ours[:, columns], p_NC > 0.1 + 1e-9)


def test_the_band_is_that_of_the_order_statistic() -> None:
    own_M = np.linspace(0, 1, 50)
    least, low, high = set_threshold(own_M, 0.9)
    assert least == np.sort(own_M)[::-1][45]  # ceil(51 * 0.9) = 46th largest
    assert (round(low, 2), round(high, 2)) == (0.83, 0.96)
    assert (low, high) == pytest.approx(beta(46, 5).ppf([0.05, 0.95]))


def test_eight_images_leave_no_class_out_and_nine_do() -> None:
    own_M = np.linspace(0.2, 1, 9)
    assert set_threshold(own_M[:8], 0.9) == (None, 1, 1)
    assert set_threshold(own_M, 0.9)[0] == 0.2
    assert set_threshold(own_M[:0], 0.9) == (None, 1, 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 120), st.floats(0.5, 0.99), st.sampled_from([2, 5, 50, 10**9]), st.integers(0, 10**6))
def test_exchangeable_images_are_covered_whatever_their_number_and_ties(
    num: int, target: float, num_values: int, seed: int
) -> None:
    drawn_WM = np.random.default_rng(seed).integers(0, num_values, (WORLDS, num + 1)) / num_values
    least_W = np.array([set_threshold(drawn_M[:-1], target)[0] or 0.0 for drawn_M in drawn_WM])
    assert (drawn_WM[:, -1] >= least_W).mean() >= target - tolerance(target)


@pytest.mark.parametrize("num", [9, 50, 400])
def test_the_coverage_lies_above_and_below_its_limits_in_95_of_100_worlds_each(num: int) -> None:
    draws_WM = np.random.default_rng(num).random((WORLDS, num))
    found = [set_threshold(draws_M, 0.9) for draws_M in draws_WM]
    coverage_W = np.array([1 - (least or 0.0) for least, _, _ in found])  # probabilities are spread evenly
    _, low, high = found[0]
    assert (coverage_W >= low).mean() == pytest.approx(0.95, abs=tolerance(0.95))
    assert (coverage_W <= high).mean() == pytest.approx(0.95, abs=tolerance(0.95))


# the whole certificate


def test_the_certificate_says_what_its_calibration_does_even_after_a_round_trip_through_json() -> None:
    found = certificate()
    again = ConfidenceCertificate.model_validate_json(found.model_dump_json())
    assert again == found
    certify_NC, certify_N = images(2000, 2)
    temperature_K, least_C = temperatures(again.calibration), least_probabilities(again.calibration, GROUPS)
    probability_NC = np.vstack([calibrated(row_C[None], GROUPS, temperature_K) for row_C in certify_NC])  # one by one
    set_NC = probability_NC >= least_C
    predicted_N = certify_NC.argmax(axis=1)
    right_N, confidence_N = predicted_N == certify_N, probability_NC.max(axis=1)
    assert found.mean_set_size == set_NC.sum(axis=1).mean()
    assert found.empty_sets == (~set_NC.any(axis=1)).mean()
    for group, said in enumerate(again.calibration):
        true, predicted = GROUPS.index[certify_N] == group, GROUPS.index[predicted_N] == group
        assert said.prediction_set.coverage is not None
        assert said.prediction_set.coverage.value == set_NC[true, certify_N[true]].mean()
        assert said.prediction_set.coverage.n == true.sum()
        assert said.predicted_share == predicted.mean()
        assert sum(said.confidence_counts) == predicted.sum() == found.reliability[group].num_images
        if said.abstention.threshold is not None:
            accepted = predicted & (confidence_N >= said.abstention.threshold)
            assert said.abstention.precision and said.abstention.precision.value == right_N[accepted].mean()
    assert any(said.abstention.threshold is not None for said in again.calibration)
    assert sum(said.predicted_share for said in again.calibration) == pytest.approx(1)


def test_the_image_that_sets_a_threshold_is_in_its_own_set_when_it_is_served_alone() -> None:
    found = ConfidenceCertificate.model_validate_json(certificate().model_dump_json())
    fit_NC, fit_N = images(600, 1)
    temperature_K, least_C = temperatures(found.calibration), least_probabilities(found.calibration, GROUPS)
    own_N = np.array(
        [calibrated(row_C[None], GROUPS, temperature_K)[0, label] for row_C, label in zip(fit_NC, fit_N, strict=True)]
    )
    for group in range(3):
        of_group = GROUPS.index[fit_N] == group
        num, least = int(of_group.sum()), least_C[GROUPS.index == group][0]
        assert (own_N[of_group] == least).sum() == 1
        assert (own_N[of_group] >= least).sum() == math.ceil((num + 1) * 0.9)


def test_the_certify_images_choose_nothing_and_the_threshold_images_no_temperature() -> None:
    one = certify_confidence(*images(500, 0), *images(500, 1), *images(900, 2), GROUPS)
    other = certify_confidence(*images(500, 0), *images(500, 1), *images(900, 9), GROUPS)
    for a, b in zip(one.calibration, other.calibration, strict=True):
        assert a.expected_accuracy == b.expected_accuracy
        assert (a.abstention.threshold, a.abstention.coverage) == (b.abstention.threshold, b.abstention.coverage)
        assert a.prediction_set.model_copy(update={"coverage": None}) == b.prediction_set.model_copy(
            update={"coverage": None}
        )
    third = certify_confidence(*images(500, 0), *images(500, 8), *images(900, 2), GROUPS)
    np.testing.assert_array_equal(temperatures(third.calibration), temperatures(one.calibration))


def test_calibration_brings_the_error_of_every_group_down_to_what_chance_shows() -> None:
    for group in certificate(num=3000).reliability:
        assert group.ece_before and group.ece_after and group.ece_null
        assert group.ece_before > 2 * group.ece_null
        assert group.ece_after < 1.5 * group.ece_null  # some 1.4 is the 95 % quantile of chance
        for bins in (group.before, group.after):
            assert sum(part.num_images for part in bins) == group.num_images
            assert bins[0].above == 0 and bins[-1].up_to == 1


def test_a_group_that_is_never_predicted_promises_nothing_and_still_has_sets() -> None:
    def without_tail(num: int, seed: int) -> tuple[NDArray, NDArray]:
        logits_NC, label_N = images(num, seed)
        logits_NC[:, GROUPS.index == 2] -= 100
        return logits_NC, label_N

    found = certify_confidence(*without_tail(300, 0), *without_tail(300, 1), *without_tail(300, 2), GROUPS)
    tail, reliability = found.calibration[2], found.reliability[2]
    assert tail.expected_accuracy == () and expected_accuracy(tail, 0.9) is None
    assert (tail.abstention.threshold, tail.abstention.coverage, tail.abstention.precision) == (None, 0, None)
    assert tail.predicted_share == 0 and sum(tail.confidence_counts) == 0
    assert tail.prediction_set.num_images > 50 and tail.prediction_set.coverage is not None
    assert (reliability.num_images, reliability.ece_before, reliability.ece_null) == (0, None, None)
    assert {part.accuracy for part in reliability.after} == {None}


def test_a_group_without_any_image_takes_all_its_classes_into_every_set() -> None:
    def no_tail(num: int, seed: int) -> tuple[NDArray, NDArray]:
        logits_NC, label_N = images(num, seed)
        kept = GROUPS.index[label_N] < 2
        return logits_NC[kept], label_N[kept]

    found = certify_confidence(*no_tail(300, 0), *no_tail(300, 1), *no_tail(300, 2), GROUPS)
    tail = found.calibration[2].prediction_set
    assert (tail.least_probability, tail.num_images, tail.low, tail.high, tail.coverage) == (None, 0, 1, 1, None)
    assert found.mean_set_size >= 3


@pytest.mark.parametrize("right", [True, False])
def test_one_image_a_part_two_classes_and_saturated_logits_make_a_certificate(right: bool) -> None:
    groups = ClassGroups(names=("head", "tail"), group_of_class=(0, 1))
    part = (np.array([[1e6, -1e6]], np.float32), np.array([0 if right else 1]))
    found = certify_confidence(*part, *part, *part, groups)
    head = found.calibration[0]
    assert 0 < head.temperature < math.inf
    assert [share.accuracy.value for share in head.expected_accuracy] == [float(right)]
    assert head.abstention.threshold is None
    assert found.mean_set_size == 2  # too few images to leave a class out
    assert ConfidenceCertificate.model_validate_json(found.model_dump_json()) == found


def test_equal_logits_make_a_certificate_in_which_every_class_is_in_every_set() -> None:
    part = (np.zeros((100, 10), np.float32), np.arange(100) % 10)
    found = certify_confidence(*part, *part, *part, GROUPS)
    assert (found.mean_set_size, found.empty_sets) == (10, 0)
    assert [share.accuracy.value for share in found.calibration[0].expected_accuracy] == [0.1]


@pytest.mark.parametrize(
    ("logits_NC", "label_N", "says"),
    [
        (np.zeros((5, 9)), np.zeros(5, int), "shape \\(5, 9\\).*expected one row of 10 logits"),
        (np.zeros((5, 10)), np.zeros(4, int), "labels of shape \\(4,\\)"),
        (np.zeros(10), np.zeros(10, int), "shape \\(10,\\)"),
        (np.zeros((0, 10)), np.zeros(0, int), "there are no threshold images"),
        (np.zeros((5, 10)), np.full(5, 10), "labels from 10 to 10, but the task has 10 classes"),
        (np.full((5, 10), np.nan), np.zeros(5, int), "not all finite"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(logits_NC: NDArray, label_N: NDArray, says: str) -> None:
    with pytest.raises(DataError, match=f"threshold.*{says}|{says}"):
        certify_confidence(*images(20, 0), logits_NC, label_N, *images(20, 2), GROUPS)
