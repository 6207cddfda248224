"""The exact binomial statistics against SciPy, which is not a dependency of the service."""

import pytest
from scipy.stats import beta, binom

from serve.monitoring.binomial import at_most, lower_limit, proportion, upper_limit

CASES = [(0, 1), (1, 1), (0, 40), (7, 40), (39, 40), (40, 40), (3, 1000), (500, 1000), (9999, 10_000), (123, 100_000)]


@pytest.mark.parametrize(("k", "n"), CASES)
@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.5, 0.9, 1.0])
def test_the_tail_probability_equals_scipys(k: int, n: int, p: float) -> None:
    # logarithms of factorials of 100,000 carry an error of some 1e-10; a wrong term would change 1e-3
    assert at_most(k, n, p) == pytest.approx(binom.cdf(k, n, p), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(("k", "n"), CASES)
@pytest.mark.parametrize("confidence", [0.95, 0.975, 0.999])
def test_the_limits_equal_those_of_clopper_and_pearson(k: int, n: int, confidence: float) -> None:
    upper = 1.0 if k == n else beta.ppf(confidence, k + 1, n - k)
    lower = 0.0 if k == 0 else beta.ppf(1 - confidence, k, n - k + 1)
    # forty bisections leave 1e-12 of the unit interval
    assert upper_limit(k, n, confidence) == pytest.approx(upper, abs=1e-9)
    assert lower_limit(k, n, confidence) == pytest.approx(lower, abs=1e-9)


def test_a_proportion_lies_in_its_confidence_interval_and_is_none_without_trials() -> None:
    share = proportion(3, 12)
    assert share is not None
    assert (share.value, share.n) == (0.25, 12)
    assert share.low < 0.25 < share.high
    assert proportion(0, 0) is None


def test_without_trials_the_limits_are_0_and_1() -> None:
    assert (lower_limit(0, 0, 0.95), upper_limit(0, 0, 0.95)) == (0.0, 1.0)
