"""Long-tailed subsets of balanced data sets, with exactly the images of the published LDAM-DRW subsets."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def long_tailed_counts(available: Sequence[int], gamma: float) -> list[int]:
    """The number of images that each class keeps, on an exponential profile.

    Class c of C keeps ``int(n_max * (1 / gamma) ** (c / (C - 1)))`` images, where n_max is the size of the largest
    class, but no more than it has and at least one. Source: Cao et al., arXiv 1906.07413.

    Args:
        available: Number of images of each class, in label order.
        gamma: Size of the largest class over the smallest, >= 1; 1 keeps everything.
    """
    n_max, last = max(available), len(available) - 1
    return [
        min(size, max(1, int(n_max * (1 / gamma) ** (label / float(last))))) for label, size in enumerate(available)
    ]


def long_tailed_indices(labels_N: NDArray[np.int64], counts: Sequence[int], seed: int = 0) -> NDArray[np.int64]:
    """Choose the images that each class keeps: positions in ``labels_N``, class after class.

    One legacy generator shuffles the positions of class 0, then of class 1, and so on. The first positions of each
    class are kept, so the subset of a longer tail is contained in that of a shorter one.
    """
    generator = np.random.RandomState(seed)  # the published subsets were drawn with this generator
    kept = []
    for label, count in enumerate(counts):
        positions = np.flatnonzero(labels_N == label)
        generator.shuffle(positions)
        kept.append(positions[:count])
    return np.concatenate(kept)
