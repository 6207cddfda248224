import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.special import gammaln, xlogy
from scipy.stats import binom, binomtest, false_discovery_control, norm
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from export.certification.statistics import (
    benjamini_hochberg,
    bootstrap_means,
    calibration_error,
    calibration_error_null,
    clopper_pearson,
    clopper_pearson_upper,
    holm,
    images_needed,
    loss_lower,
    loss_upper,
    mcnemar,
    mcnemar_loss,
    tango_upper,
)


def brute_force_tango_upper(b: int, c: int, n: int) -> float:
    """Compute Tango's limit without the closed form: the constrained likelihood is maximised numerically."""

    def score(loss: float) -> float:
        low, high = max(0.0, -loss), (1 - loss) / 2
        minus_log_likelihood = lambda q: -(xlogy(b, q + loss) + xlogy(c, q) + xlogy(n - b - c, 1 - 2 * q - loss))  # noqa: E731
        q = minimize_scalar(minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
        return float((b - c - n * loss) / math.sqrt(n * (2 * q + loss - loss * loss)) + norm.ppf(0.95))

    return float(brentq(score, (b - c) / n + 1e-6, 1 - 1e-6))


@pytest.mark.parametrize(
    ("b", "c", "n"), [(1, 0, 50), (0, 1, 50), (5, 2, 60), (2, 9, 60), (40, 35, 200), (9, 0, 10), (3, 3, 1000)]
)
def test_tangos_limit_agrees_with_a_numerically_maximised_likelihood(b: int, c: int, n: int) -> None:
    # the bounded search finds q to about 1e-8, within which the likelihood is constant in float64
    assert tango_upper(b, c, n) == pytest.approx(brute_force_tango_upper(b, c, n), abs=1e-5)


@given(n=st.integers(1, 100_000), confidence=st.floats(0.6, 0.999))
def test_without_any_disagreement_the_limit_has_a_closed_form(n: int, confidence: float) -> None:
    z = norm.ppf(confidence)
    # the same quantile computed in two ways; float64 rounding only
    assert tango_upper(0, 0, n, confidence) == pytest.approx(z * z / (n + z * z), rel=1e-9)


@settings(deadline=None)
@given(st.data())
def test_the_limits_enclose_the_loss_and_lie_between_minus_1_and_1(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 2000))
    b = data.draw(st.integers(0, n))
    c = data.draw(st.integers(0, n - b))
    # bisection ends above the root by less than float64 resolves near 1
    assert -1 <= loss_lower(b, c, n) <= (b - c) / n + 1e-12
    assert (b - c) / n - 1e-12 <= tango_upper(b, c, n) <= loss_upper(b, c, n) <= 1


@settings(deadline=None)
@given(st.data())
def test_one_more_broken_image_never_lowers_a_limit(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 500))
    b = data.draw(st.integers(0, n - 1))
    c = data.draw(st.integers(0, n - 1 - b))
    assert tango_upper(b + 1, c, n) >= tango_upper(b, c, n)
    assert loss_upper(b + 1, c, n) >= loss_upper(b, c, n) - 2e-6  # tolerance of the root search


@pytest.mark.parametrize(
    ("b", "c", "n"), [(3445, 0, 4346), (0, 3445, 4346), (4346, 0, 4346), (0, 4346, 4346), (2000, 2346, 4346)]
)
def test_the_limits_exist_even_if_nearly_every_prediction_changed(b: int, c: int, n: int) -> None:
    for confidence in (0.95, 0.9875):
        assert tango_upper(b, c, n, confidence) <= loss_upper(b, c, n, confidence) <= 1
        # with thousands of changes Tango's limit is nearly exact
        assert loss_upper(b, c, n, confidence) == pytest.approx(tango_upper(b, c, n, confidence), abs=2e-3)


def test_without_images_every_loss_is_possible() -> None:
    assert (loss_lower(0, 0, 0), tango_upper(0, 0, 0), loss_upper(0, 0, 0)) == (-1, 1, 1)


@pytest.mark.parametrize("loss", [0.005, 0.01, 0.03, 0.1, 0.3])
def test_the_true_loss_exceeds_tangos_limit_in_about_one_case_of_twenty(loss: float) -> None:
    n = 80  # small enough to enumerate every outcome
    b, c = np.array([(b, c) for b in range(n + 1) for c in range(n + 1 - b)]).T
    limit = np.array([tango_upper(int(b_), int(c_), n) for b_, c_ in zip(b, c, strict=True)])
    ways = gammaln(n + 1) - gammaln(b + 1) - gammaln(c + 1) - gammaln(n - b - c + 1)
    for p_c in np.linspace(0, 0.3, 13):
        p_b = p_c + loss
        probability = np.exp(ways + xlogy(b, p_b) + xlogy(c, p_c) + xlogy(n - b - c, 1 - p_b - p_c))
        # a score limit is approximate: the worst case is a loss of z^2 / n, with P(b = 0) = exp(-z^2) = 6.7 %
        assert probability[limit < loss].sum() < 0.068


def probability_that(condition: Callable[[int, int], bool], n: int, p_b: float, p_c: float) -> float:
    """Enumerate the probability of a condition on (b, c) that, for each c, holds up to some b and not above."""
    probability = 0.0
    c_most, b_most = (int(binom.isf(1e-12, n, p)) for p in (p_c, p_b))
    for c in range(min(c_most, n) + 1):
        b = -1  # the largest b for which the condition holds
        for step in (64, 16, 4, 1):
            while b + step <= min(b_most + 1, n - c) and condition(b + step, c):
                b += step
        probability += float(binom.pmf(c, n, p_c) * binom.cdf(b, n - c, p_b / (1 - p_c)))
    return probability


# cases in which the error of Tango's limit is largest: the smallest n that certifies the margin for 0, 1, 2... broken
# images
WORST = [
    (539, 0.005), (268, 0.01), (133, 0.02), (895, 0.005), (1207, 0.005), (447, 0.01), (602, 0.01), (301, 0.02),
]  # fmt: skip


@pytest.mark.parametrize(
    ("n", "margin"), [*WORST[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in WORST[2:])]
)
def test_a_loss_at_the_margin_passes_in_at_most_one_case_of_twenty(n: int, margin: float) -> None:
    """The guarantee of the gate is exact, for any share of images that change from wrong to right."""
    for p_c in (0, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 0.015, 0.03):
        passes = probability_that(lambda b, c: loss_upper(b, c, n) < margin, n, p_c + margin, p_c)
        assert passes <= 0.05


def test_tangos_limit_alone_would_pass_more_often() -> None:
    passes = [probability_that(lambda b, c, n=n, m=m: tango_upper(b, c, n) < m, n, m, 0.0) for n, m in WORST]  # type: ignore[misc]
    assert max(passes) == pytest.approx(math.exp(-(norm.ppf(0.95) ** 2)), abs=2e-3)  # (1 - z^2 / n)^n
    assert sum(probability > 0.055 for probability in passes) >= 6


@pytest.mark.slow
@pytest.mark.parametrize(("n", "loss"), [(40, 0.05), (80, 0.03), (80, 0.1), (150, -0.02), (150, 0.0)])
def test_the_guarantee_holds_for_small_samples_and_any_discordance(n: int, loss: float) -> None:
    for p_c in np.linspace(max(0, -loss), min(0.4, (1 - loss) / 2), 15):
        p_b = max(p_c + loss, 0.0)  # rounding may leave -1e-18
        assert probability_that(lambda b, c: loss_upper(b, c, n) < loss, n, p_b, p_c) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("b", "c", "n"), [(0, 0, 600), (6, 6, 1270), (3, 0, 200), (4, 9, 300)])
def test_at_the_limit_an_outcome_as_good_has_a_probability_of_5_percent(b: int, c: int, n: int) -> None:
    """Buehler's limit by brute force: every outcome is ordered by Tango's limit, and q is scanned in small steps."""
    tango, limit = tango_upper(b, c, n), loss_upper(b, c, n)
    low, high = clopper_pearson(c, n, 1 - 0.01 * 0.05)
    as_good = lambda b_, c_: tango_upper(b_, c_, n) <= tango + 1e-12  # noqa: E731

    def worst(loss: float) -> float:
        return max(probability_that(as_good, n, q + loss, q) for q in np.linspace(low, high, 30) if q + loss >= 0)

    # 25 points of q are compared with 30 others: the probability differs by less than 1e-4 between neighbours
    assert worst(limit) <= 0.0495 + 1e-4
    assert limit == tango or worst(limit - 1e-5) > 0.0495 - 3e-4


@pytest.mark.parametrize(
    ("margin", "discordant", "n"),
    [
        (0.005, 0, 539), (0.005, 0.01, 1259), (0.005, 0.03, 3332),
        (0.01, 0, 268), (0.01, 0.01, 424), (0.01, 0.03, 879),
        (0.02, 0, 133), (0.02, 0.01, 176), (0.02, 0.03, 267),
    ],
)  # fmt: skip
def test_tangos_limit_needs_this_number_of_images_and_no_fewer(margin: float, discordant: float, n: int) -> None:
    changed_each_way = round(discordant * n / 2)
    assert tango_upper(changed_each_way, changed_each_way, n) < margin
    assert tango_upper(changed_each_way, changed_each_way, n - 1) >= margin


@pytest.mark.parametrize(
    ("margin", "discordant", "n"),
    [
        (0.005, 0, 600), (0.005, 0.01, 1271), (0.005, 0.03, 3340),
        (0.01, 0, 300), (0.01, 0.01, 424), (0.01, 0.03, 886),
        (0.02, 0, 149), (0.02, 0.01, 178), (0.02, 0.03, 268),
    ],
)  # fmt: skip
def test_certifying_a_margin_needs_this_number_of_images_and_no_fewer(margin: float, discordant: float, n: int) -> None:
    changed_each_way = round(discordant * n / 2)
    assert loss_upper(changed_each_way, changed_each_way, n) < margin
    assert loss_upper(changed_each_way, changed_each_way, n - 1) >= margin
    assert n <= images_needed(margin, discordant) <= 1.005 * n + 1
    if not discordant:  # no valid rule can need fewer images: the probability of no change must be below 5 %
        assert n - math.log(0.05) / math.log(1 - margin) == pytest.approx(0, abs=0.01 * n)


@pytest.mark.parametrize(("k", "n"), [(0, 20), (1, 20), (7, 300), (299, 300)])
def test_at_the_upper_rate_so_few_events_have_a_probability_of_5_percent(k: int, n: int) -> None:
    # both sides come from SciPy's special functions, good to about 1e-12
    assert binom.cdf(k, n, clopper_pearson_upper(k, n)) == pytest.approx(0.05, rel=1e-9)


def test_if_all_trials_are_events_or_there_are_none_any_rate_is_possible() -> None:
    assert clopper_pearson_upper(5, 5) == clopper_pearson_upper(0, 0) == 1


@pytest.mark.parametrize(("k", "n"), [(0, 20), (1, 20), (7, 300), (299, 300), (20, 20)])
def test_the_two_sided_interval_agrees_with_statsmodels(k: int, n: int) -> None:
    # both sides come from SciPy's special functions, good to about 1e-12
    assert clopper_pearson(k, n) == pytest.approx(proportion_confint(k, n, 0.05, "beta"), rel=1e-9)
    assert clopper_pearson(0, 0) == (0, 1)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (12, 3), (3, 12), (7, 7), (40, 20)])
def test_mcnemars_test_agrees_with_scipy_and_statsmodels(b: int, c: int) -> None:
    # sums of at most 60 float64 terms
    assert mcnemar(b, c) == pytest.approx(statsmodels_mcnemar([[5, b], [c, 5]], exact=True).pvalue, rel=1e-9)
    assert mcnemar_loss(b, c) == pytest.approx(
        binomtest(b, b + c, alternative="greater").pvalue if b + c else 1.0, rel=1e-9
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_and_benjamini_hochberg_agree_with_scipy_and_statsmodels(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist(), rel=1e-12)
    adjusted = false_discovery_control(p_values)
    found = benjamini_hochberg(p_values)
    # if the two sides of <= differ only by rounding, either result is correct
    assert all(is_found == (p <= 0.05) or abs(p - 0.05) < 1e-12 for is_found, p in zip(found, adjusted, strict=True))


def test_the_bootstrap_interval_is_the_normal_one_if_the_mean_is_nearly_normal() -> None:
    values = np.random.default_rng(1).normal(2, 3, (5000, 1))
    values = np.concatenate([values, -values], axis=1)
    low, high = bootstrap_means(values)
    half = 1.96 * values[:, 0].std() / math.sqrt(5000)
    # quantiles of 1,000 resamples scatter by some 0.07 standard errors: four times that
    assert low[0] == pytest.approx(values[:, 0].mean() - half, abs=0.15 * half)
    assert high[0] == pytest.approx(values[:, 0].mean() + half, abs=0.15 * half)
    assert np.allclose(low, -high[::-1])  # one image is drawn for both columns


def test_the_bootstrap_interval_of_a_single_image_is_its_value() -> None:
    assert bootstrap_means(np.array([[0.25]])).tolist() == [[0.25], [0.25]]


def test_the_calibration_error_is_the_weighted_mean_gap_over_the_intervals() -> None:
    confidence = np.array([0.1, 0.1, 0.95, 0.95, 1.0])
    right = np.array([True, False, True, True, False])
    # by hand: |1 - 0.2| in one interval, |2 - 2.9| in the last
    assert calibration_error(confidence, right) == pytest.approx((0.8 + 0.9) / 5)


def test_the_null_of_the_calibration_error_is_that_of_calibrated_models() -> None:
    random = np.random.default_rng(3)
    confidence = random.uniform(0.2, 1, 60)
    errors = [calibration_error(confidence, random.random(60) < confidence) for _ in range(2000)]
    mean, upper = calibration_error_null(confidence)
    # the spread of one draw is about 0.03: four standard errors of the two means are 0.005
    assert mean == pytest.approx(np.mean(errors), abs=0.005)
    assert upper == pytest.approx(np.quantile(errors, 0.95), abs=0.012)
    assert mean > 0.1  # so large that the error of sixty images must not decide a gate


def test_a_model_that_is_always_certain_has_no_error_by_chance() -> None:
    assert calibration_error_null(np.ones(10)) == (0, 0)
