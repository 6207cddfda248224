"""Limits and tests on what the images at hand leave open, as pure functions of counts and arrays.

Counts legend: n images, b that went from right to wrong, c from wrong to right.
Shape legend: N images, V values an image, R resamples, B bins, T tests, Q rates of wrong -> right.
"""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import bdtr, betaincinv, gammaln, ndtri, xlog1py, xlogy

CONFIDENCE = 0.95
ECE_BINS = 15

_NUISANCE_SHARE = 0.01
"""Of the permitted error, what is spent on confining the rate of wrong -> right (Berger and Boos)."""
_NUISANCE_POINTS = 25  # some four to a standard deviation of c, on whose scale the chance changes
_RESOLVED = 1e-9  # of a limit; an image in a hundred million
_AT_ONCE = 4_000_000  # random numbers in memory


def clopper_pearson_upper(k: int, n: int, confidence: float = CONFIDENCE) -> float:
    """The largest rate that still agrees with ``k`` events in ``n`` trials (Clopper and Pearson 1934).

    Returns:
        The exact one-sided limit, a fraction; 1 when there are no trials or every trial was an event.
    """
    return 1.0 if k == n else float(betaincinv(k + 1, n - k, confidence))


def clopper_pearson(k: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The rates that agree with ``k`` events in ``n`` trials (Clopper and Pearson 1934).

    Returns:
        The exact two-sided interval, fractions; 0 and 1 when there are no trials.
    """
    error = (1 - confidence) / 2
    low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, error))
    return low, clopper_pearson_upper(k, n, 1 - error)


def tango_upper(b: int, c: int, n: int, confidence: float = CONFIDENCE) -> float:
    """The largest loss of accuracy that still agrees with paired counts, by Tango's score interval.

    The loss is ``(b - c) / n``, estimated on the same images before and after. Unlike the Wald interval the
    limit says something at ``b = c = 0``: there it is ``z^2 / (n + z^2)``. (Tango, Statistics in Medicine 17,
    1998, 891-908.)

    As a score limit it is approximate: its one-sided error stays near 5 % rather than below it, and with hardly
    any disagreement it reaches 7 %, the chance of b = 0 at a loss of z^2 / n. ``loss_upper`` mends that.

    Args:
        b: Images that went from right to wrong.
        c: Images that went from wrong to right.
        n: All images. Without any, nothing is known and the limit is 1.
        confidence: One-sided; 0.95 leaves one chance in twenty that the loss is larger.

    Returns:
        A fraction from -1 to 1. Below zero the accuracy demonstrably rose.
    """
    if n == 0:
        return 1.0
    z = float(ndtri(confidence))
    low, high = (b - c) / n, 1.0
    for _ in range(60):  # halving the interval of at most 2 leaves less than a float64 can resolve
        loss = (low + high) / 2
        agrees = n * loss - (b - c) < z * math.sqrt(n * _variance(loss, b, c, n))
        low, high = (loss, high) if agrees else (low, loss)
    return high


@functools.lru_cache(maxsize=100_000)
def loss_upper(b: int, c: int, n: int, confidence: float = CONFIDENCE) -> float:
    """The largest loss of accuracy that still agrees with paired counts; it errs no more often than it says.

    Tango's limit, raised where it would err more often. Of all limits that put outcomes in the order in which Tango's
    puts them, Buehler's is the smallest exact one: the largest loss at which an outcome as good as this one still has
    a chance of 1 - ``confidence``, whatever the rate q of wrong -> right (Buehler, JASA 52, 1957, 482-493; for paired
    proportions Lloyd and Moldovan, Statistics in Medicine 26, 2007, 3369-3384). Rates that c itself excludes are left
    out and paid for with a hundredth of the error (Berger and Boos, JASA 89, 1994, 1012-1016).

    It costs 11 % more images than Tango's where nothing changes, which no valid limit can avoid, and 1 % or less
    where one image in a hundred does.

    Returns:
        A fraction, never below ``tango_upper``; read the other way round, the smallest margin that these images
        certify.
    """
    tango = tango_upper(b, c, n, confidence)
    if tango >= 1:
        return 1.0
    error = 1 - confidence
    confined = clopper_pearson(c, n, 1 - _NUISANCE_SHARE * error)
    rates_Q = np.linspace(math.sqrt(confined[0]), math.sqrt(confined[1]), _NUISANCE_POINTS) ** 2
    chance = _chance_of_as_good(tango, n, confined, confidence)
    allowed = (1 - _NUISANCE_SHARE) * error
    limit = tango
    while True:  # the limit of one rate after another, each larger, until none has too much of a chance
        chance_Q = chance(limit, rates_Q)
        worst = rates_Q[[chance_Q.argmax()]]
        if chance_Q.max() <= allowed:
            return limit
        excess: Callable[[float], float] = lambda loss, rate_1=worst: float(chance(loss, rate_1)[0]) - allowed  # type: ignore[misc]  # noqa: E731
        step = 1 / n
        while excess(min(limit + step, 1.0)) > 0:
            step *= 2
        limit = float(brentq(excess, limit, min(limit + step, 1.0), xtol=_RESOLVED)) + 2 * _RESOLVED  # past the root


def loss_lower(b: int, c: int, n: int, confidence: float = CONFIDENCE) -> float:
    """The smallest loss of accuracy that still agrees with paired counts: the gain's upper limit, negated."""
    return -loss_upper(c, b, n, confidence)


@functools.lru_cache(maxsize=10_000)
def images_needed(margin: float, discordant: float) -> int:
    """How many images certify a margin, when a share of them changes but as often for the better as for the worse.

    Args:
        margin: The loss of accuracy to be excluded, a fraction > 0.
        discordant: Share of images that only one of the two models gets right.

    Returns:
        Enough, and at most one in two hundred more than that.
    """
    enough = 1
    while not _certifies(tango_upper, enough, margin, discordant):
        enough *= 2
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        certified = _certifies(tango_upper, middle, margin, discordant)
        too_few, enough = (too_few, middle) if certified else (middle, enough)
    while not _certifies(loss_upper, enough, margin, discordant):  # a dozen per cent more at most
        enough += max(1, enough // 200)
    return enough


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p-value of McNemar's test: how likely so uneven a split is if changes go either way alike."""
    return 1.0 if b == c else min(1.0, 2 * float(bdtr(min(b, c), b + c, 0.5)))


def mcnemar_loss(b: int, c: int) -> float:
    """Exact one-sided p-value of McNemar's test against a loss: the chance of b or more of the b + c changes."""
    return 1.0 if b == 0 else float(bdtr(c, b + c, 0.5))


def holm(p_T: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, by Holm: at most ``alpha`` in one family in 1 / alpha by chance alone."""
    p = np.asarray(p_T, dtype=np.float64)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(p_value) for p_value in adjusted]


def benjamini_hochberg(p_T: Sequence[float], rate: float = 0.05) -> list[bool]:
    """Which tests are discoveries, of which at most a share ``rate`` is expected to be false."""
    p = np.asarray(p_T, dtype=np.float64)
    order = np.argsort(p)
    below = np.flatnonzero(p[order] <= rate * np.arange(1, len(p) + 1) / len(p))
    found = np.zeros(len(p), dtype=np.bool_)
    found[order[: below[-1] + 1 if len(below) else 0]] = True
    return [bool(discovery) for discovery in found]


def bootstrap_means(values_NV: NDArray[np.float64], resamples: int = 1_000, seed: int = 0) -> NDArray[np.float64]:
    """95 % intervals of means over images, [2, V]: the quantiles of the means of resampled images (Efron 1979).

    The values of an image are drawn together, so differences of two models on the same images stay paired.
    """
    random = np.random.default_rng(seed)
    num = len(values_NV)
    means_RV = np.empty((resamples, values_NV.shape[1]))
    for resample in range(resamples):  # counting draws and one product take a tenth of gathering every value
        drawn_N = np.bincount(random.integers(0, num, num), minlength=num)
        means_RV[resample] = drawn_N @ values_NV / num
    return np.asarray(np.quantile(means_RV, [0.025, 0.975], axis=0))


def calibration_error(confidence_N: NDArray[np.float64], right_N: NDArray[np.bool_]) -> float:
    """Expected calibration error: mean distance of confidence and accuracy over 15 equal intervals (Guo et al. 2017).

    Args:
        confidence_N: Highest probabilities, at least one.
        right_N: Whether the prediction was right.
    """
    gap_B = np.bincount(_bins(confidence_N), right_N - confidence_N, ECE_BINS)
    return float(np.abs(gap_B).sum() / len(confidence_N))


def calibration_error_null(
    confidence_N: NDArray[np.float64], resamples: int = 1_000, seed: int = 0
) -> tuple[float, float]:
    """What ``calibration_error`` shows of a perfectly calibrated model on so few images: mean and 95 % quantile.

    Simulated: each prediction is right with exactly the probability that its confidence says.
    """
    random = np.random.default_rng(seed)
    by_bin = np.argsort(_bins(confidence_N), kind="stable")
    sorted_N = confidence_N[by_bin]
    starts = np.flatnonzero(np.diff(_bins(sorted_N), prepend=-1))
    at_once = max(1, _AT_ONCE // len(sorted_N))
    errors_R = np.concatenate(
        [
            np.abs(
                np.add.reduceat(
                    (random.random((min(at_once, resamples - start), len(sorted_N))) < sorted_N) - sorted_N,
                    starts,
                    axis=1,
                )
            ).sum(axis=1)
            for start in range(0, resamples, at_once)
        ]
    ) / len(sorted_N)
    return float(errors_R.mean()), float(np.quantile(errors_R, CONFIDENCE))


def _bins(confidence_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """The interval of each confidence; its upper end belongs to it."""
    return np.clip(np.ceil(confidence_N * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)


def _certifies(limit: Callable[[int, int, int], float], n: int, margin: float, discordant: float) -> bool:
    changed_each_way = round(discordant * n / 2)
    return limit(changed_each_way, changed_each_way, n) < margin


def _variance(loss: float, b: float, c: float, n: int) -> float:
    """Variance of one image's change, at the probabilities most likely among those with the given loss.

    Setting the derivative of the log likelihood ``b log(q + loss) + c log q + (n - b - c) log(1 - 2q - loss)``
    to zero gives a quadratic in q, the probability of wrong -> right; its larger root is the valid one.
    """
    linear = loss * (2 * n - b + c) - (b + c)
    constant = -c * loss * (1 - loss)
    q = (math.sqrt(max(linear * linear - 8 * n * constant, 0.0)) - linear) / (4 * n)
    return max(2 * q + loss * (1 - loss), 0.0)


def _chance_of_as_good(
    tango: float, n: int, confined: tuple[float, float], confidence: float
) -> Callable[[float, NDArray[np.float64]], NDArray[np.float64]]:
    """How likely outcomes are whose Tango limit is at most ``tango``.

    Returns:
        A function of the true loss and of rates [Q] of wrong -> right within ``confined``. It falls with the loss: at a
        given rate, a larger loss breaks more images.
    """
    low, high = (n * rate for rate in confined)
    # six standard deviations and a little, so that small counts lose no tail either: 1e-9 is left out
    first, last = math.floor(low - 6 * math.sqrt(low) - 2), math.ceil(high + 6 * math.sqrt(high) + 10)
    c = np.arange(max(first, 0), min(last, n) + 1)
    most_b = _most_b_as_good(tango, c, n, float(ndtri(confidence)))
    c, most_b = c[most_b >= 0], most_b[most_b >= 0].astype(np.float64)
    log_ways = gammaln(n + 1) - gammaln(c + 1) - gammaln(n - c + 1)

    def chance(loss: float, rates_Q: NDArray[np.float64]) -> NDArray[np.float64]:
        q = np.clip(rates_Q, max(0.0, -loss), (1 - loss) / 2)[:, None]
        chance_of_c = np.exp(log_ways + xlogy(c, q) + xlog1py(n - c, -q))
        broken = np.clip((q + loss) / (1 - q), 0.0, 1.0)[:, 0]  # the chance of right -> wrong for all that is not c
        rate, count = np.nonzero(chance_of_c > 1e-12)
        terms = chance_of_c[rate, count] * bdtr(most_b[count], n - c[count], broken[rate])
        return np.asarray(np.bincount(rate, terms, len(q)), dtype=np.float64)

    return chance


def _most_b_as_good(tango: float, c: NDArray[np.int64], n: int, z: float) -> NDArray[np.int64]:
    """For each c the largest b whose Tango limit is at most ``tango``; -1 where none is."""
    enough, too_many = np.full(len(c), -1), n - c + 1
    while (too_many - enough > 1).any():
        b = np.maximum((enough + too_many) // 2, 0)
        linear = tango * (2 * n - b + c) - (b + c)
        q = (np.sqrt(np.maximum(linear * linear + 8 * n * c * tango * (1 - tango), 0)) - linear) / (4 * n)
        spread = z * np.sqrt(n * np.maximum(2 * q + tango * (1 - tango), 0))
        as_good = n * tango - (b - c) >= spread - 1e-9  # the outcome itself lies on the line, up to rounding
        open_ = too_many - enough > 1
        enough, too_many = np.where(open_ & as_good, b, enough), np.where(open_ & ~as_good, b, too_many)
    return enough
