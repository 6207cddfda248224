"""Accuracy per class group, and the probabilities that every room computes alike.

Shape legend: N images, C classes.
"""

import numpy as np
from numpy.typing import NDArray

from ltkd.groups import ClassGroups


def accuracy_by_group(
    predicted_N: NDArray[np.int64], label_N: NDArray[np.int64], groups: ClassGroups
) -> dict[str, float]:
    """Accuracy, a fraction, of each group's images and of ``all``.

    A group counts the images whose *true* class belongs to it. A group without an image is NaN.
    """
    right_N = predicted_N == label_N
    group_N = groups.index[label_N]
    by_group = {
        name: float(right_N[group_N == group].mean()) if (group_N == group).any() else float("nan")
        for group, name in enumerate(groups.names)
    }
    return {**by_group, "all": float(right_N.mean())}


def softmax(logits_NC: NDArray[np.floating], temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities in float64; finite for any finite logits."""
    scaled = np.asarray(logits_NC, dtype=np.float64) / temperature
    exponential = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(exponential / exponential.sum(axis=1, keepdims=True))
