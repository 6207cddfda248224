"""Class groups: which classes count as head, medium and tail, decided once from the training counts.

Shape legend: N images, C classes, K class groups.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from ltkd.contract.records import Record
from ltkd.errors import DataError

SHARE_NAMES = ("head", "medium", "tail")
COUNT_NAMES = ("many", "medium", "few")


class ClassGroups(Record):
    """A partition of the classes into named groups, none of them empty.

    Attributes:
        names: K names, most frequent classes first.
        group_of_class: For each of the C classes the index of its group.
    """

    names: tuple[str, ...]
    group_of_class: tuple[int, ...]

    @model_validator(mode="after")
    def _is_a_partition(self) -> "ClassGroups":
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"group names must differ, got {list(self.names)}")
        if sorted(set(self.group_of_class)) != list(range(len(self.names))):
            raise ValueError("every group needs a class and every class a group")
        return self

    @property
    def index(self) -> NDArray[np.int64]:
        """The group of every class, int64 [C]."""
        return np.array(self.group_of_class, dtype=np.int64)

    def members(self, name: str) -> list[int]:
        """The class indices of one group."""
        wanted = self.names.index(name)
        return [label for label, group in enumerate(self.group_of_class) if group == wanted]

    def mass(self, probability_NC: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probability summed within groups, [N, K]; rows keep their total."""
        mass_NK = np.zeros((len(probability_NC), len(self.names)))
        for group in range(len(self.names)):
            mass_NK[:, group] = probability_NC[:, self.index == group].sum(axis=1)
        return mass_NK


def groups_by_share(
    train_counts: Sequence[int], shares: Sequence[float] = (0.33, 0.34, 0.33), names: Sequence[str] = SHARE_NAMES
) -> ClassGroups:
    """Cut the classes, ranked by training count, at fixed shares of their number.

    The ranking is stable: classes with equal counts keep their order. The default is the partition of
    LTKD (Kim, CVPR 2026): 33 % head, 34 % medium, 33 % tail.

    Raises:
        DataError: There are fewer classes than groups.
    """
    num_classes, num_groups = len(train_counts), len(shares)
    if num_classes < num_groups:
        raise DataError(f"{num_classes} classes cannot fill {num_groups} groups; give a partition with fewer groups.")
    ends = np.round(np.cumsum(shares) / np.sum(shares) * num_classes).astype(int)
    for group in range(num_groups):  # with few classes, rounding must leave every group one class
        ends[group] = np.clip(ends[group], group + 1, num_classes - (num_groups - 1 - group))
    group_of_rank = np.searchsorted(ends, np.arange(num_classes), side="right")
    group_of_class = np.empty(num_classes, dtype=np.int64)
    group_of_class[_ranking(train_counts)] = group_of_rank
    return ClassGroups(names=tuple(names), group_of_class=tuple(group_of_class.tolist()))


def groups_by_quantile(train_counts: Sequence[int], num_groups: int) -> ClassGroups:
    """Cut the ranked classes into ``num_groups`` groups of nearly equal size, named q1 (most frequent) to qK."""
    return groups_by_share(train_counts, [1.0] * num_groups, [f"q{group + 1}" for group in range(num_groups)])


def groups_by_count(train_counts: Sequence[int], more_than: int = 100, fewer_than: int = 20) -> ClassGroups:
    """Many (> 100 training images), medium (20 to 100) and few (< 20), the custom of the long-tail literature.

    Groups without a class are left out.

    Raises:
        DataError: All classes fall into one group.
    """
    group_of_class = [0 if count > more_than else 2 if count < fewer_than else 1 for count in train_counts]
    kept = sorted(set(group_of_class))
    if len(kept) < 2:
        raise DataError(
            f"all {len(train_counts)} classes fall into the group '{COUNT_NAMES[kept[0]]}' "
            f"(> {more_than}, {fewer_than}-{more_than}, < {fewer_than} images); use --groups share instead."
        )
    return ClassGroups(
        names=tuple(COUNT_NAMES[group] for group in kept),
        group_of_class=tuple(kept.index(group) for group in group_of_class),
    )


def groups_by_mapping(class_names: Sequence[str], mapping: Mapping[str, Sequence[str]]) -> ClassGroups:
    """A partition of the user's own: group name to class names.

    Raises:
        DataError: A class is missing, unknown or named twice, or there are fewer than two groups.
    """
    named = [name for members in mapping.values() for name in members]
    unknown = sorted(set(named) - set(class_names))
    missing = sorted(set(class_names) - set(named))
    twice = sorted({name for name in named if named.count(name) > 1})
    for problem, classes in (("unknown", unknown), ("in no group", missing), ("in more than one group", twice)):
        if classes:
            raise DataError(f"the mapping of groups has classes {problem}: {', '.join(classes[:5])}; each class once.")
    if "all" in mapping:
        raise DataError("a group is named 'all', which is the name of all classes together; give it another one.")
    if len(mapping) < 2 or not all(mapping.values()):
        raise DataError(f"a mapping needs at least two groups with a class each, got {list(mapping)}.")
    group_of_name = {name: group for group, members in enumerate(mapping.values()) for name in members}
    return ClassGroups(names=tuple(mapping), group_of_class=tuple(group_of_name[name] for name in class_names))


def _ranking(train_counts: Sequence[int]) -> NDArray[np.int64]:
    """Class indices from the most to the least frequent; ties keep class order."""
    return np.argsort(-np.asarray(train_counts, dtype=np.int64), kind="stable")
