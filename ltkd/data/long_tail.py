"""Long-tailed sampling: the exponential profile of LDAM-DRW's public builder, to the index."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def long_tailed_counts(available: Sequence[int], gamma: float) -> list[int]:
    """How many images each class keeps.

    Class c of C keeps ``int(n_max * (1 / gamma) ** (c / (C - 1)))``, n_max being the largest class, and never more
    than it has. Source: Cao et al., arXiv 1906.07413.

    Args:
        available: Images of each class, in label order.
        gamma: Largest over smallest class, >= 1; 1 keeps everything.
    """
    n_max, last = max(available), len(available) - 1
    return [min(has, max(1, int(n_max * (1 / gamma) ** (label / float(last))))) for label, has in enumerate(available)]


def long_tailed_indices(labels_N: NDArray[np.int64], counts: Sequence[int], seed: int = 0) -> NDArray[np.int64]:
    """Which images each class keeps: positions in ``labels_N``, class after class.

    One legacy generator shuffles the positions of class 0, then class 1 and so on; the first of each are kept, so
    a longer tail gives a subset of a shorter one.
    """
    generator = np.random.RandomState(seed)  # the published subsets were drawn with it
    kept = []
    for label, count in enumerate(counts):
        positions = np.flatnonzero(labels_N == label)
        generator.shuffle(positions)
        kept.append(positions[:count])
    return np.concatenate(kept)
