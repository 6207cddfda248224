import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.special import gammaln, xlogy
from scipy.stats import binom, norm

from export.statistics import clopper_pearson_upper, images_needed, tango_lower, tango_upper


def brute_force_tango_upper(b: int, c: int, n: int) -> float:
    """Tango's limit without his algebra: the constrained likelihood is maximised by a search."""

    def score(loss: float) -> float:
        low, high = max(0.0, -loss), (1 - loss) / 2
        minus_log_likelihood = lambda q: -(xlogy(b, q + loss) + xlogy(c, q) + xlogy(n - b - c, 1 - 2 * q - loss))  # noqa: E731
        q = minimize_scalar(minus_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
        return float((b - c - n * loss) / math.sqrt(n * (2 * q + loss - loss * loss)) + norm.ppf(0.95))

    return float(brentq(score, (b - c) / n + 1e-6, 1 - 1e-6))


@pytest.mark.parametrize(
    ("b", "c", "n"), [(1, 0, 50), (0, 1, 50), (5, 2, 60), (2, 9, 60), (40, 35, 200), (9, 0, 10), (3, 3, 1000)]
)
def test_tangos_limit_is_that_of_a_likelihood_maximised_by_search(b: int, c: int, n: int) -> None:
    # the bounded search resolves q to about 1e-8, where the likelihood is flat in float64
    assert tango_upper(b, c, n) == pytest.approx(brute_force_tango_upper(b, c, n), abs=1e-5)


@given(n=st.integers(1, 100_000), confidence=st.floats(0.6, 0.999))
def test_without_any_disagreement_the_limit_has_a_closed_form(n: int, confidence: float) -> None:
    z = norm.ppf(confidence)
    # two routes to the same quantile; float64 rounding only
    assert tango_upper(0, 0, n, confidence) == pytest.approx(z * z / (n + z * z), rel=1e-9)


@given(st.data())
def test_the_limits_enclose_the_loss_and_stay_within_reach(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 2000))
    b = data.draw(st.integers(0, n))
    c = data.draw(st.integers(0, n - b))
    # bisection ends above the root by less than float64 resolves near 1
    assert -1 <= tango_lower(b, c, n) <= (b - c) / n + 1e-12
    assert (b - c) / n - 1e-12 <= tango_upper(b, c, n) <= 1


@given(st.data())
def test_one_more_broken_image_never_lowers_the_limit(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 500))
    b = data.draw(st.integers(0, n - 1))
    c = data.draw(st.integers(0, n - 1 - b))
    assert tango_upper(b + 1, c, n) >= tango_upper(b, c, n)


def test_without_images_every_loss_is_possible() -> None:
    assert (tango_lower(0, 0, 0), tango_upper(0, 0, 0)) == (-1, 1)


@pytest.mark.parametrize("loss", [0.005, 0.01, 0.03, 0.1, 0.3])
def test_the_true_loss_exceeds_the_limit_in_about_one_case_of_twenty(loss: float) -> None:
    n = 80  # every outcome is enumerated
    b, c = np.array([(b, c) for b in range(n + 1) for c in range(n + 1 - b)]).T
    limit = np.array([tango_upper(int(b_), int(c_), n) for b_, c_ in zip(b, c, strict=True)])
    ways = gammaln(n + 1) - gammaln(b + 1) - gammaln(c + 1) - gammaln(n - b - c + 1)
    for p_c in np.linspace(0, 0.3, 13):
        p_b = p_c + loss
        chance = np.exp(ways + xlogy(b, p_b) + xlogy(c, p_c) + xlogy(n - b - c, 1 - p_b - p_c))
        # a score limit is approximate: its worst case is that of z^2 / n at b = 0, exp(-z^2) = 6.7 %
        assert chance[limit < loss].sum() < 0.068


@pytest.mark.parametrize(
    ("margin", "discordant", "n"),
    [
        (0.005, 0, 539), (0.005, 0.01, 1259), (0.005, 0.03, 3332),
        (0.01, 0, 268), (0.01, 0.01, 424), (0.01, 0.03, 879),
        (0.02, 0, 133), (0.02, 0.01, 176), (0.02, 0.03, 267),
    ],
)  # fmt: skip
def test_so_many_images_and_no_fewer_certify_a_margin(margin: float, discordant: float, n: int) -> None:
    changed_each_way = round(discordant * n / 2)
    assert tango_upper(changed_each_way, changed_each_way, n) < margin
    assert tango_upper(changed_each_way, changed_each_way, n - 1) >= margin
    # the planner does not round to whole images, which moves small counts by some per cent
    assert images_needed(margin, discordant) == pytest.approx(n, rel=0.04)


def test_the_planner_names_the_first_number_that_certifies() -> None:
    n = images_needed(0.005, 0.01)
    assert tango_upper(0.005 * n, 0.005 * n, n) < 0.005 <= tango_upper(0.005 * (n - 1), 0.005 * (n - 1), n - 1)


@pytest.mark.parametrize(("k", "n"), [(0, 20), (1, 20), (7, 300), (299, 300)])
def test_the_upper_rate_is_where_so_few_events_have_a_chance_of_one_in_twenty(k: int, n: int) -> None:
    # both sides come from SciPy's special functions, good to about 1e-12
    assert binom.cdf(k, n, clopper_pearson_upper(k, n)) == pytest.approx(0.05, rel=1e-9)


def test_when_all_were_events_or_none_was_tried_any_rate_is_possible() -> None:
    assert clopper_pearson_upper(5, 5) == clopper_pearson_upper(0, 0) == 1
