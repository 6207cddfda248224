"""Limits on what the images at hand leave open, as pure functions of counts.

Counts legend: n images, b that went from right to wrong, c from wrong to right.
"""

import math

from scipy.special import ndtri
from scipy.stats import beta

CONFIDENCE = 0.95


def clopper_pearson_upper(k: int, n: int, confidence: float = CONFIDENCE) -> float:
    """The largest rate that still agrees with ``k`` events in ``n`` trials (Clopper and Pearson 1934).

    Returns:
        The exact one-sided limit, a fraction; 1 when there are no trials or every trial was an event.
    """
    return 1.0 if k == n else float(beta.ppf(confidence, k + 1, n - k))


def tango_upper(b: float, c: float, n: int, confidence: float = CONFIDENCE) -> float:
    """The largest loss of accuracy that still agrees with paired counts, by Tango's score interval.

    The loss is ``(b - c) / n``, estimated on the same images before and after. Unlike the Wald interval the
    limit says something at ``b = c = 0``: there it is ``z^2 / (n + z^2)``. Read the other way round, it is the
    smallest margin that these images certify. (Tango, Statistics in Medicine 17, 1998, 891-908.)

    As a score limit it is approximate: its one-sided error stays near 5 % rather than below it, and with hardly
    any disagreement it reaches 7 %, the chance of b = 0 at a loss of z^2 / n.

    Args:
        b: Images that went from right to wrong. Fractions are allowed, for planning.
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


def tango_lower(b: float, c: float, n: int, confidence: float = CONFIDENCE) -> float:
    """The smallest loss of accuracy that still agrees with paired counts: the gain's upper limit, negated."""
    return -tango_upper(c, b, n, confidence)


def images_needed(margin: float, discordant: float, confidence: float = CONFIDENCE) -> int:
    """How many images certify a margin, when a share of them changes but as often for the better as for the worse.

    Args:
        margin: The loss of accuracy to be excluded, a fraction > 0.
        discordant: Share of images that only one of the two models gets right.
        confidence: As in tango_upper.
    """
    enough = 1
    while not _certifies(enough, margin, discordant, confidence):
        enough *= 2
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        certified = _certifies(middle, margin, discordant, confidence)
        too_few, enough = (too_few, middle) if certified else (middle, enough)
    return enough


def _certifies(n: int, margin: float, discordant: float, confidence: float) -> bool:
    return tango_upper(discordant * n / 2, discordant * n / 2, n, confidence) < margin


def _variance(loss: float, b: float, c: float, n: int) -> float:
    """Variance of one image's change, at the probabilities most likely among those with the given loss.

    Setting the derivative of the log likelihood ``b log(q + loss) + c log q + (n - b - c) log(1 - 2q - loss)``
    to zero gives a quadratic in q, the probability of wrong -> right; its larger root is the valid one.
    """
    linear = loss * (2 * n - b + c) - (b + c)
    constant = -c * loss * (1 - loss)
    q = (math.sqrt(max(linear * linear - 8 * n * constant, 0.0)) - linear) / (4 * n)
    return max(2 * q + loss * (1 - loss), 0.0)
