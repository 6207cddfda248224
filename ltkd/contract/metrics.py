"""Accuracy per class and per class group.

Shape legend: N images, C classes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ltkd.contract.class_groups import ClassGroups


def accuracy_by_group(
    predicted_N: NDArray[np.int64], label_N: NDArray[np.int64], groups: ClassGroups
) -> dict[str, float]:
    """Accuracy (a fraction) on the images of each group, and on ``all``.

    An image belongs to the group of its *true* class. The accuracy of a group without images is NaN.
    """
    right_N = predicted_N == label_N
    group_N = groups.index[label_N]
    by_group = {
        name: float(right_N[group_N == group].mean()) if (group_N == group).any() else float("nan")
        for group, name in enumerate(groups.names)
    }
    return {**by_group, "all": float(right_N.mean())}


def class_accuracy(
    predicted_N: NDArray[np.int64], label_N: NDArray[np.int64], num_classes: int
) -> tuple[float | None, ...]:
    """Accuracy, a fraction, of each class's images; None for a class without one."""
    total_C = np.bincount(label_N, minlength=num_classes)
    right_C = np.bincount(label_N[predicted_N == label_N], minlength=num_classes)
    return tuple(float(right) / int(total) if total else None for right, total in zip(right_C, total_C, strict=True))


def group_means(
    class_accuracy: Sequence[float | None],
    images_per_class: NDArray[np.int64],
    names: Sequence[str],
    group_of_class: Sequence[int],
) -> dict[str, float]:
    """Class accuracies averaged over each group and over ``all``, a class weighted by its number of images."""
    right_C = images_per_class * np.array([accuracy or 0.0 for accuracy in class_accuracy])
    group_C = np.array(group_of_class)
    parts = {name: group_C == group for group, name in enumerate(names)} | {"all": group_C >= 0}
    return {name: float(right_C[part].sum() / max(1, images_per_class[part].sum())) for name, part in parts.items()}
