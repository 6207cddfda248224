"""Shares that were counted: the exact binomial tail and the exact interval, without SciPy, which is not served.

Counts legend: k events in n trials, each with probability p.
"""

import math

from ltkd.contract.calibration import Proportion

CONFIDENCE = 0.95
_HALVINGS = 40  # of the unit interval; the limit is then known to 1e-12


def at_most(k: int, n: int, p: float) -> float:
    """The probability of ``k`` events or fewer in ``n`` trials: the exact sum of the binomial's terms."""
    if k < 0 or k >= n:
        return float(k >= n)
    if p <= 0 or p >= 1:
        return float(p <= 0)
    if k > n * p:  # the smaller tail is summed, from its largest term outwards
        return 1 - _tail(n - k - 1, n, 1 - p)
    return _tail(k, n, p)


def lower_limit(k: int, n: int, confidence: float) -> float:
    """The smallest probability that still agrees with ``k`` events in ``n`` trials (Clopper and Pearson 1934).

    Args:
        k: Events.
        n: Trials; without any nothing is known, and the limit is 0.
        confidence: One-sided: with 0.95 the limit is too high once in twenty times, at most.
    """
    return 1 - upper_limit(n - k, n, confidence)


def upper_limit(k: int, n: int, confidence: float) -> float:
    """The largest probability that still agrees with ``k`` events in ``n`` trials; see ``lower_limit``."""
    if k == n:
        return 1.0
    low, high = k / n, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if at_most(k, n, middle) > 1 - confidence else (low, middle)
    return high


def proportion(k: int, n: int) -> Proportion | None:
    """A counted share with its exact two-sided 95 % interval, as certification states its own; None without trials."""
    if n == 0:
        return None
    one_sided = (1 + CONFIDENCE) / 2
    return Proportion(value=k / n, low=lower_limit(k, n, one_sided), high=upper_limit(k, n, one_sided), n=n)


def _tail(k: int, n: int, p: float) -> float:
    """The sum of the terms 0 to k, where they shrink from k down."""
    log_choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    term = math.exp(log_choose + k * math.log(p) + (n - k) * math.log1p(-p))
    total, odds = 0.0, (1 - p) / p
    while term > total * 1e-17:  # what is left is below what a float64 can add
        total += term
        term *= k / (n - k + 1) * odds
        k -= 1
    return min(total, 1.0)
