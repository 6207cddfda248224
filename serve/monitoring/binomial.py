"""Exact binomial statistics: the tail probability and the Clopper-Pearson confidence interval.

SciPy is not a dependency of the service, so they are implemented here.

Counts legend: k events in n trials, each with probability p.
"""

import math

from ltkd.contract.calibration import Proportion

CONFIDENCE = 0.95
_BISECTIONS = 40  # of the unit interval; the limit is then known to 1e-12


def at_most(k: int, n: int, p: float) -> float:
    """The probability of ``k`` events or fewer in ``n`` trials: the exact sum of the binomial terms."""
    if k < 0 or k >= n:
        return float(k >= n)
    if p <= 0 or p >= 1:
        return float(p <= 0)
    if k > n * p:  # sum the smaller tail, from its largest term outwards
        return 1 - _tail(n - k - 1, n, 1 - p)
    return _tail(k, n, p)


def lower_limit(k: int, n: int, confidence: float) -> float:
    """The lower confidence limit of a probability after ``k`` events in ``n`` trials (Clopper and Pearson 1934).

    Args:
        k: Events.
        n: Trials; the limit is 0 without trials.
        confidence: One-sided: with 0.95, the limit is above the true probability in at most 5 % of cases.
    """
    return 1 - upper_limit(n - k, n, confidence)


def upper_limit(k: int, n: int, confidence: float) -> float:
    """The upper confidence limit of a probability after ``k`` events in ``n`` trials; see ``lower_limit``."""
    if k == n:
        return 1.0
    low, high = k / n, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if at_most(k, n, middle) > 1 - confidence else (low, middle)
    return high


def proportion(k: int, n: int) -> Proportion | None:
    """The share k / n with its exact two-sided 95 % confidence interval; None without trials."""
    if n == 0:
        return None
    one_sided = (1 + CONFIDENCE) / 2
    return Proportion(value=k / n, low=lower_limit(k, n, one_sided), high=upper_limit(k, n, one_sided), n=n)


def _tail(k: int, n: int, p: float) -> float:
    """The sum of the terms 0 to k, which must decrease from k downwards."""
    log_choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    term = math.exp(log_choose + k * math.log(p) + (n - k) * math.log1p(-p))
    total, odds = 0.0, (1 - p) / p
    while term > total * 1e-17:  # smaller terms do not change a float64 sum
        total += term
        term *= k / (n - k + 1) * odds
        k -= 1
    return min(total, 1.0)
