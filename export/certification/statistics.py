"""Confidence limits, hypothesis tests and calibration errors, as pure functions of counts and arrays.

The comparison and calibration modules use them; the gates decide on their results.

Counts legend: n images, b that changed from right to wrong, c from wrong to right.
Shape legend: N images, V values per image, R resamples, B bins, T tests, Q rates of wrong -> right.
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
"""Share of the permitted error that is used to bound the rate of wrong -> right (Berger and Boos)."""
_NUISANCE_POINTS = 25  # about four per standard deviation of c, the scale on which the probability varies
_RESOLUTION = 1e-9  # of a limit; less than one image in a hundred million
_CHUNK_NUMBERS = 4_000_000  # random numbers in memory at a time


def clopper_pearson_upper(k: int, n: int, confidence: float = CONFIDENCE) -> float:
    """Compute the exact one-sided upper limit of a rate from ``k`` events in ``n`` trials (Clopper and Pearson 1934).

    Returns:
        The limit, a fraction; 1 if there are no trials or every trial was an event.
    """
    return 1.0 if k == n else float(betaincinv(k + 1, n - k, confidence))


def clopper_pearson(k: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Compute the exact two-sided confidence interval of a rate from ``k`` events in ``n`` trials.

    Source: Clopper and Pearson (1934).

    Returns:
        The two ends of the interval, fractions; 0 and 1 if there are no trials.
    """
    error = (1 - confidence) / 2
    low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, error))
    return low, clopper_pearson_upper(k, n, 1 - error)


def tango_upper(b: int, c: int, n: int, confidence: float = CONFIDENCE) -> float:
    """Compute the upper confidence limit of the loss of accuracy from paired counts, by Tango's score interval.

    The loss is estimated as ``(b - c) / n``, on the same images before and after. Unlike the Wald interval, the limit
    is informative at ``b = c = 0``, where it is ``z^2 / (n + z^2)``. (Tango, Statistics in Medicine 17, 1998, 891-908.)

    A score limit is approximate: its one-sided error is near 5 % rather than below it. If hardly any image changes, the
    error reaches 7 %, the probability of b = 0 at a loss of z^2 / n. ``loss_upper`` corrects this.

    Args:
        b: Images that changed from right to wrong.
        c: Images that changed from wrong to right.
        n: All images. If there are none, the limit is 1.
        confidence: One-sided; with 0.95, the probability that the loss is larger than the limit is about 5 %.

    Returns:
        A fraction from -1 to 1. A limit below zero shows that the accuracy rose.
    """
    if n == 0:
        return 1.0
    z = float(ndtri(confidence))
    low, high = (b - c) / n, 1.0
    for _ in range(60):  # 60 bisections of an interval of at most 2 reach the resolution of float64
        loss = (low + high) / 2
        compatible = n * loss - (b - c) < z * math.sqrt(n * _variance(loss, b, c, n))
        low, high = (loss, high) if compatible else (low, loss)
    return high


@functools.lru_cache(maxsize=100_000)
def loss_upper(b: int, c: int, n: int, confidence: float = CONFIDENCE) -> float:
    """Compute the upper confidence limit of the loss of accuracy from paired counts; the confidence level is exact.

    This is Tango's limit, raised where its error would exceed 1 - ``confidence``. Of all limits that order outcomes as
    Tango's does, Buehler's is the smallest exact one: the largest loss at which an outcome at least as good as the
    observed one has a probability of 1 - ``confidence``, for the worst rate q of wrong -> right (Buehler, JASA 52,
    1957, 482-493; for paired proportions Lloyd and Moldovan, Statistics in Medicine 26, 2007, 3369-3384). Only rates q
    in a confidence interval from c are considered, which uses a hundredth of the permitted error (Berger and Boos,
    JASA 89, 1994, 1012-1016).

    Compared with Tango's limit, 11 % more images are needed if no image changes, which no valid limit can avoid, and at
    most 1 % more if one image in a hundred changes.

    Args:
        b: Images that changed from right to wrong.
        c: Images that changed from wrong to right.
        n: All images. If there are none, the limit is 1.
        confidence: One-sided; with 0.95, the probability that the loss is larger than the limit is at most 5 %.

    Returns:
        A fraction, at least ``tango_upper``. It is also the smallest margin that these images can certify.
    """
    tango = tango_upper(b, c, n, confidence)
    if tango >= 1:
        return 1.0
    error = 1 - confidence
    rate_bounds = clopper_pearson(c, n, 1 - _NUISANCE_SHARE * error)
    rates_Q = np.linspace(math.sqrt(rate_bounds[0]), math.sqrt(rate_bounds[1]), _NUISANCE_POINTS) ** 2
    probability = _probability_of_as_good(tango, n, rate_bounds, confidence)
    allowed = (1 - _NUISANCE_SHARE) * error
    limit = tango
    while True:  # raise the limit to that of the worst rate, until no rate exceeds the permitted error
        probability_Q = probability(limit, rates_Q)
        worst = rates_Q[[probability_Q.argmax()]]
        if probability_Q.max() <= allowed:
            return limit
        excess: Callable[[float], float] = lambda loss, rate_1=worst: float(probability(loss, rate_1)[0]) - allowed  # type: ignore[misc]  # noqa: E731
        step = 1 / n
        while excess(min(limit + step, 1.0)) > 0:
            step *= 2
        limit = (
            float(brentq(excess, limit, min(limit + step, 1.0), xtol=_RESOLUTION)) + 2 * _RESOLUTION
        )  # beyond the root


def loss_lower(b: int, c: int, n: int, confidence: float = CONFIDENCE) -> float:
    """Compute the lower confidence limit of the loss of accuracy: the negated upper limit of the gain."""
    return -loss_upper(c, b, n, confidence)


@functools.lru_cache(maxsize=10_000)
def images_needed(margin: float, discordant: float) -> int:
    """Compute how many images are needed to certify a margin if the true loss is zero.

    Args:
        margin: The loss of accuracy to be ruled out, a fraction > 0.
        discordant: Share of images that only one of the two models classifies correctly, half of them each.

    Returns:
        A sufficient number, at most 0.5 % larger than the smallest one.
    """
    enough = 1
    while not _certifies(tango_upper, enough, margin, discordant):
        enough *= 2
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        certified = _certifies(tango_upper, middle, margin, discordant)
        too_few, enough = (too_few, middle) if certified else (middle, enough)
    while not _certifies(loss_upper, enough, margin, discordant):  # at most some 12 % more
        enough += max(1, enough // 200)
    return enough


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p-value of McNemar's test that changes in both directions are equally likely."""
    return 1.0 if b == c else min(1.0, 2 * float(bdtr(min(b, c), b + c, 0.5)))


def mcnemar_loss(b: int, c: int) -> float:
    """Exact one-sided p-value of McNemar's test for a loss: the probability of at least b losses in b + c changes."""
    return 1.0 if b == 0 else float(bdtr(c, b + c, 0.5))


def holm(p_T: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple tests by Holm's method, which controls the family-wise error rate."""
    p = np.asarray(p_T, dtype=np.float64)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(p_value) for p_value in adjusted]


def benjamini_hochberg(p_T: Sequence[float], rate: float = 0.05) -> list[bool]:
    """Find the discoveries among several tests, with a false discovery rate of at most ``rate``."""
    p = np.asarray(p_T, dtype=np.float64)
    order = np.argsort(p)
    below = np.flatnonzero(p[order] <= rate * np.arange(1, len(p) + 1) / len(p))
    found = np.zeros(len(p), dtype=np.bool_)
    found[order[: below[-1] + 1 if len(below) else 0]] = True
    return [bool(discovery) for discovery in found]


def bootstrap_means(values_NV: NDArray[np.float64], resamples: int = 1_000, seed: int = 0) -> NDArray[np.float64]:
    """Compute 95 % bootstrap confidence intervals [2, V] of means over images (percentile method; Efron 1979).

    All values of an image are resampled together, so differences of two models on the same images stay paired.
    """
    random = np.random.default_rng(seed)
    num = len(values_NV)
    means_RV = np.empty((resamples, values_NV.shape[1]))
    for resample in range(resamples):  # a product with draw counts takes a tenth of the time of gathering all values
        drawn_N = np.bincount(random.integers(0, num, num), minlength=num)
        means_RV[resample] = drawn_N @ values_NV / num
    return np.asarray(np.quantile(means_RV, [0.025, 0.975], axis=0))


def calibration_error(confidence_N: NDArray[np.float64], right_N: NDArray[np.bool_]) -> float:
    """Compute the expected calibration error over 15 equal intervals of confidence (Guo et al. 2017).

    Args:
        confidence_N: Highest probability of each image; at least one image.
        right_N: Whether the prediction is correct.
    """
    gap_B = np.bincount(_bins(confidence_N), right_N - confidence_N, ECE_BINS)
    return float(np.abs(gap_B).sum() / len(confidence_N))


def calibration_error_null(
    confidence_N: NDArray[np.float64], resamples: int = 1_000, seed: int = 0
) -> tuple[float, float]:
    """Simulate ``calibration_error`` for a perfectly calibrated model with these confidences.

    Each prediction is correct with a probability equal to its confidence.

    Returns:
        The mean and the 95 % quantile of the error, which are above zero because the number of images is finite.
    """
    random = np.random.default_rng(seed)
    by_bin = np.argsort(_bins(confidence_N), kind="stable")
    sorted_N = confidence_N[by_bin]
    starts = np.flatnonzero(np.diff(_bins(sorted_N), prepend=-1))
    chunk = max(1, _CHUNK_NUMBERS // len(sorted_N))
    errors_R = np.concatenate(
        [
            np.abs(
                np.add.reduceat(
                    (random.random((min(chunk, resamples - start), len(sorted_N))) < sorted_N) - sorted_N,
                    starts,
                    axis=1,
                )
            ).sum(axis=1)
            for start in range(0, resamples, chunk)
        ]
    ) / len(sorted_N)
    return float(errors_R.mean()), float(np.quantile(errors_R, CONFIDENCE))


def _bins(confidence_N: NDArray[np.float64]) -> NDArray[np.int64]:
    """Index of the interval of each confidence; intervals include their upper end."""
    return np.clip(np.ceil(confidence_N * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)


def _certifies(limit: Callable[[int, int, int], float], n: int, margin: float, discordant: float) -> bool:
    changed_each_way = round(discordant * n / 2)
    return limit(changed_each_way, changed_each_way, n) < margin


def _variance(loss: float, b: float, c: float, n: int) -> float:
    """Variance of the change of one image, at the maximum likelihood estimate under the given loss.

    Setting the derivative of the log likelihood ``b log(q + loss) + c log q + (n - b - c) log(1 - 2q - loss)``
    to zero gives a quadratic equation in q, the probability of wrong -> right. Its larger root is the valid one.
    """
    linear = loss * (2 * n - b + c) - (b + c)
    constant = -c * loss * (1 - loss)
    q = (math.sqrt(max(linear * linear - 8 * n * constant, 0.0)) - linear) / (4 * n)
    return max(2 * q + loss * (1 - loss), 0.0)


def _probability_of_as_good(
    tango: float, n: int, rate_bounds: tuple[float, float], confidence: float
) -> Callable[[float, NDArray[np.float64]], NDArray[np.float64]]:
    """Return a function that computes the probability of all outcomes whose Tango limit is at most ``tango``.

    Its arguments are the true loss and rates [Q] of wrong -> right within ``rate_bounds``. The probability decreases
    with the loss: at a given rate, a larger loss means more images that change from right to wrong.
    """
    low, high = (n * rate for rate in rate_bounds)
    # six standard deviations, and a few counts more because small counts are skewed: at most 1e-9 is left out
    first, last = math.floor(low - 6 * math.sqrt(low) - 2), math.ceil(high + 6 * math.sqrt(high) + 10)
    c = np.arange(max(first, 0), min(last, n) + 1)
    most_b = _most_b_as_good(tango, c, n, float(ndtri(confidence)))
    c, most_b = c[most_b >= 0], most_b[most_b >= 0].astype(np.float64)
    log_ways = gammaln(n + 1) - gammaln(c + 1) - gammaln(n - c + 1)

    def probability(loss: float, rates_Q: NDArray[np.float64]) -> NDArray[np.float64]:
        q = np.clip(rates_Q, max(0.0, -loss), (1 - loss) / 2)[:, None]
        probability_of_c = np.exp(log_ways + xlogy(c, q) + xlog1py(n - c, -q))
        broken = np.clip((q + loss) / (1 - q), 0.0, 1.0)[:, 0]  # probability of right -> wrong for images not in c
        rate, count = np.nonzero(probability_of_c > 1e-12)
        terms = probability_of_c[rate, count] * bdtr(most_b[count], n - c[count], broken[rate])
        return np.asarray(np.bincount(rate, terms, len(q)), dtype=np.float64)

    return probability


def _most_b_as_good(tango: float, c: NDArray[np.int64], n: int, z: float) -> NDArray[np.int64]:
    """For each c, find the largest b whose Tango limit is at most ``tango``; -1 if there is none."""
    enough, too_many = np.full(len(c), -1), n - c + 1
    while (too_many - enough > 1).any():
        b = np.maximum((enough + too_many) // 2, 0)
        linear = tango * (2 * n - b + c) - (b + c)
        q = (np.sqrt(np.maximum(linear * linear + 8 * n * c * tango * (1 - tango), 0)) - linear) / (4 * n)
        spread = z * np.sqrt(n * np.maximum(2 * q + tango * (1 - tango), 0))
        as_good = n * tango - (b - c) >= spread - 1e-9  # includes the observed outcome, up to rounding
        open_ = too_many - enough > 1
        enough, too_many = np.where(open_ & as_good, b, enough), np.where(open_ & ~as_good, b, too_many)
    return enough
