"""Calibration per group: the fits agree with independent computations, and their guarantees hold in simulations."""

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
    IMAGES_PER_BIN,
    MOST_BINS,
    PRIOR_IMAGES,
    abstention_threshold,
    accuracy_bins,
    certify_confidence,
    fit_temperatures,
    set_threshold,
)
from export.schema import ConfidenceCertificate
from ltkd.contract.calibration import (
    calibrated_probabilities,
    expected_accuracy,
    least_probabilities,
    softmax,
    temperatures,
)
from ltkd.contract.class_groups import ClassGroups
from ltkd.errors import DataError

GROUPS = ClassGroups(names=("head", "medium", "tail"), group_of_class=(0, 0, 0, 0, 1, 1, 1, 2, 2, 2))
TEMPERATURES = np.array([1.5, 2.0, 3.0])
SIMULATIONS = 2000


def tolerance(probability: float, simulations: int = SIMULATIONS) -> float:
    """Four standard errors of a share counted in simulations: exceeded by chance once in 30,000 tests."""
    return 4 * math.sqrt(probability * (1 - probability) / simulations)


def images(num: int, seed: int, temperature_K: NDArray[np.float64] = TEMPERATURES) -> tuple[NDArray, NDArray]:
    """Draw logits and labels that are perfectly calibrated at the given temperature of the predicted group."""
    rng = np.random.default_rng(seed)
    exact_NC = rng.normal(0, 2, (num, 10))
    exact_NC[np.arange(num), rng.integers(0, 10, num)] += 4
    labels_N = (softmax(exact_NC).cumsum(axis=1) > rng.random((num, 1))).argmax(axis=1)
    return (exact_NC * temperature_K[GROUPS.index[exact_NC.argmax(axis=1)], None]).astype(np.float32), labels_N


def certificate(seed: int = 0, num: int = 600) -> ConfidenceCertificate:
    return certify_confidence(*images(num, seed), *images(num, seed + 1), *images(2000, seed + 2), GROUPS)


# temperature


def test_the_temperatures_agree_with_an_independent_minimisation() -> None:
    logits_NC, labels_N = images(700, seed=3)
    predicted_N = GROUPS.index[logits_NC.argmax(axis=1)]

    def objective(log_temperature: NDArray[np.float64], group: int) -> float:
        log_NC = log_softmax(logits_NC.astype(np.float64) / np.exp(log_temperature[0]), axis=1)
        nll_N = -log_NC[np.arange(700), labels_N]
        random_label_N = -log_NC.mean(axis=1)
        nll_N = nll_N + (random_label_N - nll_N) / 701
        return float(nll_N[predicted_N == group].sum() + PRIOR_IMAGES * nll_N.mean())

    expected = [math.exp(minimize(objective, [0.0], args=(group,), tol=1e-10).x[0]) for group in range(3)]
    # BFGS with numerical gradients stops some 1e-6 from the minimum, where they vanish in rounding
    np.testing.assert_allclose(fit_temperatures(logits_NC, labels_N, GROUPS), expected, rtol=1e-5)


def test_with_many_images_the_temperatures_are_the_maximum_likelihood_estimates_by_torch() -> None:
    logits_NC, labels_N = images(10_000, seed=4)
    predicted_N = GROUPS.index[logits_NC.argmax(axis=1)]
    plain = []
    for group in range(3):
        rows = predicted_N == group
        logits, labels = torch.from_numpy(logits_NC[rows]).double(), torch.from_numpy(labels_N[rows])
        log_temperature = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([log_temperature], max_iter=50, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = torch.nn.functional.cross_entropy(logits / log_temperature.exp(), labels)  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)
        plain.append(math.exp(log_temperature.item()))
    found = fit_temperatures(logits_NC, labels_N, GROUPS)
    # all images have a weight of 50 against some 3,000 of the group, and their temperature differs by up to half: 0.8 %
    np.testing.assert_allclose(found, plain, rtol=1e-2)
    np.testing.assert_allclose(found, TEMPERATURES, rtol=0.08)  # four standard errors


def test_a_group_without_predictions_gets_the_temperature_of_all_and_one_with_few_is_close_to_it() -> None:
    logits_NC, labels_N = images(3000, seed=5)
    predicted_N = GROUPS.index[logits_NC.argmax(axis=1)]
    only_two = predicted_N < 2
    few = only_two | (np.cumsum(predicted_N == 2) <= 20)
    together = ClassGroups(names=("all",), group_of_class=(0,) * 10)

    (of_all,) = fit_temperatures(logits_NC[only_two], labels_N[only_two], together)
    # both are fitted to the same images with another weight, so they are equal up to the tolerance of the search
    assert fit_temperatures(logits_NC[only_two], labels_N[only_two], GROUPS)[2] == pytest.approx(of_all, rel=1e-6)
    own = fit_temperatures(logits_NC, labels_N, GROUPS)[2]
    assert of_all < fit_temperatures(logits_NC[few], labels_N[few], GROUPS)[2] < own


@pytest.mark.parametrize("num", [1, 10, 500])
def test_a_model_that_is_always_correct_gets_no_more_confidence_than_its_images_support(num: int) -> None:
    groups = ClassGroups(names=("a", "b"), group_of_class=(0, 1))
    logits_NC = np.tile(np.array([[5.0, -5.0]], np.float32), (num, 1))
    temperature_K = fit_temperatures(logits_NC, np.zeros(num, np.int64), groups)
    # as if there were one more image with a random label of the two classes
    np.testing.assert_allclose(
        calibrated_probabilities(logits_NC, groups, temperature_K)[:, 1], 0.5 / (num + 1), rtol=1e-6
    )


def test_a_model_that_is_always_wrong_gets_hardly_any_confidence() -> None:
    logits_NC, _ = images(200, seed=6)
    labels_N = (logits_NC.argmax(axis=1) + 1) % 10
    temperature_K = fit_temperatures(logits_NC, logits_NC.argmin(axis=1), GROUPS)
    assert calibrated_probabilities(logits_NC, GROUPS, temperature_K).max() < 0.12  # random guesses have 0.1
    assert (fit_temperatures(logits_NC, labels_N, GROUPS) > TEMPERATURES).all()


def test_the_temperature_scales_with_the_logits_from_tiny_to_huge() -> None:
    logits_NC, labels_N = images(300, seed=7)
    plain = fit_temperatures(logits_NC, labels_N, GROUPS)
    for scale in (2.0**-60, 2.0**60):  # powers of two do not change the rounding of float32
        np.testing.assert_allclose(fit_temperatures(logits_NC * np.float32(scale), labels_N, GROUPS), plain * scale)
    logits_NC[0] *= 1e6  # one extreme image does not disturb the search
    assert (fit_temperatures(logits_NC[1:], labels_N[1:], GROUPS) == pytest.approx(plain, rel=0.2)) and np.isfinite(
        fit_temperatures(logits_NC, labels_N, GROUPS)
    ).all()


def test_equal_logits_keep_the_temperature_at_one() -> None:
    np.testing.assert_array_equal(fit_temperatures(np.full((5, 10), 7.0), np.arange(5), GROUPS), 1)


# expected accuracy


@given(
    st.integers(1, 1200),
    st.sampled_from([2, 3, 10, 1000, 10**9]),
    st.integers(0, 10**6),
)
def test_bins_have_no_gaps_contain_every_image_once_and_never_decrease(num: int, num_values: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    confidence_M = rng.integers(1, num_values + 1, num) / num_values
    right_M = rng.random(num) < rng.random()
    bins = accuracy_bins(confidence_M, right_M)
    assert bins[0].above == 0 and bins[-1].up_to == 1 and len(bins) <= MOST_BINS
    assert all(low.up_to == high.above for low, high in pairwise(bins))
    assert all(low.accuracy.value <= high.accuracy.value for low, high in pairwise(bins))
    for number, bin_ in enumerate(bins):
        inside = (confidence_M > bin_.above) & (confidence_M <= bin_.up_to)
        assert bin_.accuracy.n == inside.sum() >= (IMAGES_PER_BIN if len(bins) > 1 else 1)
        assert bin_.accuracy.value == right_M[inside].mean(), number


def test_bins_contain_equally_many_images_and_have_the_exact_interval() -> None:
    confidence_M = np.random.default_rng(0).permutation(np.linspace(0.1, 1, 330))
    bins = accuracy_bins(confidence_M, confidence_M > 0.5)
    assert [bin_.accuracy.n for bin_ in bins] == [55] * 6
    for bin_ in bins:
        right = round(bin_.accuracy.value * 55)
        oracle = proportion_confint(right, 55, method="beta")
        assert (bin_.accuracy.low, bin_.accuracy.high) == pytest.approx(oracle, abs=1e-12)


def test_a_group_without_predictions_has_no_expected_accuracy() -> None:
    assert accuracy_bins(np.array([]), np.array([], bool)) == ()
    (one,) = accuracy_bins(np.array([0.7]), np.array([True]))
    assert (one.above, one.up_to, one.accuracy.value, one.accuracy.low) == (0, 1, 1, pytest.approx(0.025))


@pytest.mark.slow
def test_the_intervals_contain_the_true_accuracy_in_95_of_100_bins_although_bins_are_pooled() -> None:
    contained = []
    for simulation in range(SIMULATIONS):
        rng = np.random.default_rng(simulation)
        confidence_M = rng.random(300)
        for bin_ in accuracy_bins(confidence_M, rng.random(300) < 0.4 + 0.2 * confidence_M):
            truth = 0.4 + 0.2 * (bin_.above + bin_.up_to) / 2  # confidence is spread evenly
            contained.append(bin_.accuracy.low <= truth <= bin_.accuracy.high)
    assert np.mean(contained) >= 0.95 - tolerance(0.95)


# abstention


def simulate_thresholds(
    precision_of: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    target: float = 0.9,
    num: int = 300,
    simulations: int = SIMULATIONS,
) -> tuple[NDArray, NDArray]:
    """Find thresholds in many simulations, and those of a naive search by pointwise p-value. NaN stands for none."""
    found, naive = np.full(simulations, np.nan), np.full(simulations, np.nan)
    for simulation in range(simulations):
        rng = np.random.default_rng(simulation)
        pilot_M, fit_M = rng.random(num), rng.random(num)
        right_M = rng.random(num) < precision_of(fit_M)
        threshold = abstention_threshold(pilot_M, rng.random(num) < precision_of(pilot_M), fit_M, right_M, target)
        found[simulation] = np.nan if threshold is None else threshold
        order = np.argsort(-fit_M)
        p_M = binom.sf(np.cumsum(right_M[order]) - 1, np.arange(1, num + 1), target)
        naive[simulation] = fit_M[order][p_M <= 0.05].min(initial=2)
    return found, np.where(naive < 2, naive, np.nan)


@pytest.mark.slow
@pytest.mark.parametrize("precision", [0.85, 0.89, 0.9])
def test_if_precision_misses_the_target_a_threshold_is_given_in_at_most_5_of_100_simulations(precision: float) -> None:
    found, naive = simulate_thresholds(lambda confidence_M: np.full(len(confidence_M), precision))
    assert np.isfinite(found).mean() <= 0.05 + tolerance(0.05)
    if precision == 0.9:
        assert np.isfinite(naive).mean() > 0.15  # a naive search gives a false guarantee more often


@pytest.mark.slow
def test_a_threshold_has_the_target_precision_in_95_of_100_simulations_even_if_confidence_misleads() -> None:
    def rising(confidence_M: NDArray[np.float64]) -> NDArray[np.float64]:
        return 0.6 + 0.4 * confidence_M  # the precision above t is 0.8 + 0.2 t, which meets the target for t >= 0.5

    def misleading(confidence_M: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(confidence_M > 0.8, 0.7, 0.95)  # a low threshold meets 0.9, one above 0.8 does not

    found, _ = simulate_thresholds(rising)
    assert (found < 0.5).mean() <= 0.05 + tolerance(0.05)
    # the test is not trivially cautious: with the best threshold known, some 45 of 100 simulations would prove it
    assert np.isfinite(found).mean() > 0.3
    found, _ = simulate_thresholds(misleading)
    grid = np.linspace(0, 1, 2001)[:-1]
    true_precision = np.array([misleading(np.linspace(t, 1, 4001)).mean() for t in grid])
    wrong = np.interp(found[np.isfinite(found)], grid, true_precision) < 0.9
    assert wrong.sum() / SIMULATIONS <= 0.05 + tolerance(0.05)


def test_the_smallest_proved_threshold_is_returned() -> None:
    confidence_M = np.linspace(0, 1, 400)
    always = np.ones(400, bool)
    assert abstention_threshold(confidence_M, always, confidence_M, always, 0.9) == 0
    above = confidence_M > 0.5
    threshold = abstention_threshold(confidence_M, above, confidence_M, above, 0.9)
    # a step is 20 images; 200 correct and 20 wrong predictions are not enough (p = 0.38), about 8 wrong would be
    assert threshold == pytest.approx(0.5, abs=1 / 400)


def test_29_correct_predictions_prove_a_precision_of_90_percent_and_28_do_not() -> None:
    pilot, right = np.array([0.5]), np.array([True])
    assert abstention_threshold(pilot, right, np.full(29, 0.6), np.ones(29, bool), 0.9) == 0
    assert abstention_threshold(pilot, right, np.full(28, 0.6), np.ones(28, bool), 0.9) is None


def test_without_pilot_images_or_test_images_there_is_no_threshold() -> None:
    no_confidence_M, no_right_M = np.array([]), np.array([], bool)
    confidence_M, right_M = np.linspace(0.5, 1, 100), np.ones(100, bool)
    assert abstention_threshold(no_confidence_M, no_right_M, confidence_M, right_M, 0.9) is None
    assert abstention_threshold(confidence_M, right_M, no_confidence_M, no_right_M, 0.9) is None
    assert abstention_threshold(confidence_M, right_M, confidence_M, ~right_M, 0.9) is None


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
    # by definition the set contains classes with p > alpha; 1e-9 excludes p-values equal to alpha despite rounding
    np.testing.assert_array_equal(probability_NC >= (least or 0.0), p_NC > 1 - target + 1e-9)
    if abs((num + 1) * (1 - target) % 1 - 0.5) < 0.49:  # crepes includes p = alpha, one rank more
        own_set = oracle.predict_set(-probability_NC, confidence=target, smoothing=False)
        np.testing.assert_array_equal(probability_NC >= (least or 0.0), own_set)


def test_group_sets_agree_with_crepes_for_every_true_group() -> None:
    from crepes import ConformalClassifier

    found = certificate()
    temperature_K = temperatures(found.calibration)
    (fit_NC, fit_N), (certify_NC, _) = images(600, 1), images(2000, 2)
    own_N = calibrated_probabilities(fit_NC, GROUPS, temperature_K)[np.arange(600), fit_N]
    probability_NC = calibrated_probabilities(certify_NC[:100], GROUPS, temperature_K)
    ours = probability_NC >= least_probabilities(found.calibration, GROUPS)
    for group in range(3):
        oracle = ConformalClassifier()
        oracle.fit(-own_N, bins=GROUPS.index[fit_N])
        columns = GROUPS.index == group
        p_NC = oracle.predict_p(-probability_NC[:, columns], bins=np.full(100, group), smoothing=False)
        np.testing.assert_array_equal(ours[:, columns], p_NC > 0.1 + 1e-9)


def test_the_coverage_limits_are_those_of_the_order_statistic() -> None:
    own_M = np.linspace(0, 1, 50)
    least, low, high = set_threshold(own_M, 0.9)
    assert least == np.sort(own_M)[::-1][45]  # ceil(51 * 0.9) = 46th largest
    assert (round(low, 2), round(high, 2)) == (0.83, 0.96)
    assert (low, high) == pytest.approx(beta(46, 5).ppf([0.05, 0.95]))


def test_eight_images_exclude_no_class_and_nine_do() -> None:
    own_M = np.linspace(0.2, 1, 9)
    assert set_threshold(own_M[:8], 0.9) == (None, 1, 1)
    assert set_threshold(own_M, 0.9)[0] == 0.2
    assert set_threshold(own_M[:0], 0.9) == (None, 1, 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 120), st.floats(0.5, 0.99), st.sampled_from([2, 5, 50, 10**9]), st.integers(0, 10**6))
def test_exchangeable_images_are_covered_for_any_number_of_images_and_ties(
    num: int, target: float, num_values: int, seed: int
) -> None:
    drawn_SM = np.random.default_rng(seed).integers(0, num_values, (SIMULATIONS, num + 1)) / num_values
    least_S = np.array([set_threshold(drawn_M[:-1], target)[0] or 0.0 for drawn_M in drawn_SM])
    assert (drawn_SM[:, -1] >= least_S).mean() >= target - tolerance(target)


@pytest.mark.parametrize("num", [9, 50, 400])
def test_each_coverage_limit_holds_in_95_of_100_simulations(num: int) -> None:
    draws_SM = np.random.default_rng(num).random((SIMULATIONS, num))
    found = [set_threshold(draws_M, 0.9) for draws_M in draws_SM]
    coverage_S = np.array([1 - (least or 0.0) for least, _, _ in found])  # probabilities are uniform
    _, low, high = found[0]
    assert (coverage_S >= low).mean() == pytest.approx(0.95, abs=tolerance(0.95))
    assert (coverage_S <= high).mean() == pytest.approx(0.95, abs=tolerance(0.95))


# the whole certificate


def test_the_certificate_describes_its_calibration_even_after_a_round_trip_through_json() -> None:
    found = certificate()
    again = ConfidenceCertificate.model_validate_json(found.model_dump_json())
    assert again == found
    certify_NC, certify_N = images(2000, 2)
    temperature_K, least_C = temperatures(again.calibration), least_probabilities(again.calibration, GROUPS)
    probability_NC = np.vstack(
        [calibrated_probabilities(row_C[None], GROUPS, temperature_K) for row_C in certify_NC]
    )  # one by one
    set_NC = probability_NC >= least_C
    predicted_N = certify_NC.argmax(axis=1)
    right_N, confidence_N = predicted_N == certify_N, probability_NC.max(axis=1)
    assert found.mean_set_size == set_NC.sum(axis=1).mean()
    assert found.empty_sets == (~set_NC.any(axis=1)).mean()
    for group, group_calibration in enumerate(again.calibration):
        true, predicted = GROUPS.index[certify_N] == group, GROUPS.index[predicted_N] == group
        assert group_calibration.prediction_set.coverage is not None
        assert group_calibration.prediction_set.coverage.value == set_NC[true, certify_N[true]].mean()
        assert group_calibration.prediction_set.coverage.n == true.sum()
        assert group_calibration.predicted_share == predicted.mean()
        assert sum(group_calibration.confidence_counts) == predicted.sum() == found.reliability[group].num_images
        if group_calibration.abstention.threshold is not None:
            accepted = predicted & (confidence_N >= group_calibration.abstention.threshold)
            assert (
                group_calibration.abstention.precision
                and group_calibration.abstention.precision.value == right_N[accepted].mean()
            )
    assert any(group_calibration.abstention.threshold is not None for group_calibration in again.calibration)
    assert sum(group_calibration.predicted_share for group_calibration in again.calibration) == pytest.approx(1)


def test_the_true_class_of_the_image_that_sets_a_threshold_is_in_its_set_if_run_alone() -> None:
    found = ConfidenceCertificate.model_validate_json(certificate().model_dump_json())
    fit_NC, fit_N = images(600, 1)
    temperature_K, least_C = temperatures(found.calibration), least_probabilities(found.calibration, GROUPS)
    own_N = np.array(
        [
            calibrated_probabilities(row_C[None], GROUPS, temperature_K)[0, label]
            for row_C, label in zip(fit_NC, fit_N, strict=True)
        ]
    )
    for group in range(3):
        of_group = GROUPS.index[fit_N] == group
        num, least = int(of_group.sum()), least_C[GROUPS.index == group][0]
        assert (own_N[of_group] == least).sum() == 1
        assert (own_N[of_group] >= least).sum() == math.ceil((num + 1) * 0.9)


def test_certification_images_do_not_affect_the_calibration_nor_threshold_images_the_temperatures() -> None:
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


def test_calibration_reduces_the_error_of_every_group_to_the_level_of_chance() -> None:
    for group in certificate(num=3000).reliability:
        assert group.ece_before and group.ece_after and group.ece_null
        assert group.ece_before > 2 * group.ece_null
        assert group.ece_after < 1.5 * group.ece_null  # some 1.4 is the 95 % quantile of chance
        for bins in (group.before, group.after):
            assert sum(bin_.num_images for bin_ in bins) == group.num_images
            assert bins[0].above == 0 and bins[-1].up_to == 1


def test_a_group_that_is_never_predicted_has_no_threshold_but_has_prediction_sets() -> None:
    def without_tail(num: int, seed: int) -> tuple[NDArray, NDArray]:
        logits_NC, labels_N = images(num, seed)
        logits_NC[:, GROUPS.index == 2] -= 100
        return logits_NC, labels_N

    found = certify_confidence(*without_tail(300, 0), *without_tail(300, 1), *without_tail(300, 2), GROUPS)
    tail, reliability = found.calibration[2], found.reliability[2]
    assert tail.expected_accuracy == () and expected_accuracy(tail, 0.9) is None
    assert (tail.abstention.threshold, tail.abstention.coverage, tail.abstention.precision) == (None, 0, None)
    assert tail.predicted_share == 0 and sum(tail.confidence_counts) == 0
    assert tail.prediction_set.num_images > 50 and tail.prediction_set.coverage is not None
    assert (reliability.num_images, reliability.ece_before, reliability.ece_null) == (0, None, None)
    assert {bin_.accuracy for bin_ in reliability.after} == {None}


def test_if_a_group_has_no_images_all_its_classes_are_in_every_set() -> None:
    def no_tail(num: int, seed: int) -> tuple[NDArray, NDArray]:
        logits_NC, labels_N = images(num, seed)
        kept = GROUPS.index[labels_N] < 2
        return logits_NC[kept], labels_N[kept]

    found = certify_confidence(*no_tail(300, 0), *no_tail(300, 1), *no_tail(300, 2), GROUPS)
    tail = found.calibration[2].prediction_set
    assert (tail.least_probability, tail.num_images, tail.low, tail.high, tail.coverage) == (None, 0, 1, 1, None)
    assert found.mean_set_size >= 3


@pytest.mark.parametrize("right", [True, False])
def test_one_image_per_split_two_classes_and_saturated_logits_give_a_certificate(right: bool) -> None:
    groups = ClassGroups(names=("head", "tail"), group_of_class=(0, 1))
    part = (np.array([[1e6, -1e6]], np.float32), np.array([0 if right else 1]))
    found = certify_confidence(*part, *part, *part, groups)
    head = found.calibration[0]
    assert 0 < head.temperature < math.inf
    assert [share.accuracy.value for share in head.expected_accuracy] == [float(right)]
    assert head.abstention.threshold is None
    assert found.mean_set_size == 2  # too few images to exclude a class
    assert ConfidenceCertificate.model_validate_json(found.model_dump_json()) == found


def test_with_equal_logits_every_class_is_in_every_set() -> None:
    part = (np.zeros((100, 10), np.float32), np.arange(100) % 10)
    found = certify_confidence(*part, *part, *part, GROUPS)
    assert (found.mean_set_size, found.empty_sets) == (10, 0)
    assert [share.accuracy.value for share in found.calibration[0].expected_accuracy] == [0.1]


@pytest.mark.parametrize(
    ("logits_NC", "labels_N", "message"),
    [
        (np.zeros((5, 9)), np.zeros(5, int), "shape \\(5, 9\\).*expected one row of 10 logits"),
        (np.zeros((5, 10)), np.zeros(4, int), "labels of shape \\(4,\\)"),
        (np.zeros(10), np.zeros(10, int), "shape \\(10,\\)"),
        (np.zeros((0, 10)), np.zeros(0, int), "there are no threshold images"),
        (np.zeros((5, 10)), np.full(5, 10), "labels from 10 to 10, but the task has 10 classes"),
        (np.full((5, 10), np.nan), np.zeros(5, int), "not all finite"),
    ],
)
def test_the_error_names_the_split_that_does_not_fit(logits_NC: NDArray, labels_N: NDArray, message: str) -> None:
    with pytest.raises(DataError, match=f"threshold.*{message}|{message}"):
        certify_confidence(*images(20, 0), logits_NC, labels_N, *images(20, 2), GROUPS)
