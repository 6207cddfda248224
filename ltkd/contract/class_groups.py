"""Class groups: the partition of the classes into head, medium and tail by their numbers of training images.

A run computes the groups once from its training set. Evaluation, export and serving read them from the task.

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
    """A partition of the classes into named, non-empty groups.

    Attributes:
        names: K names; the group with the most frequent classes is first.
        group_of_class: The index of the group of each of the C classes.
    """

    names: tuple[str, ...]
    group_of_class: tuple[int, ...]

    @model_validator(mode="after")
    def _is_a_partition(self) -> "ClassGroups":
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"group names must differ, got {list(self.names)}")
        if sorted(set(self.group_of_class)) != list(range(len(self.names))):
            raise ValueError("every group must have at least one class, and every class must have a group")
        return self

    @property
    def index(self) -> NDArray[np.int64]:
        """The group of every class, int64 [C]."""
        return np.array(self.group_of_class, dtype=np.int64)

    def members(self, name: str) -> list[int]:
        """The class indices of one group."""
        index = self.names.index(name)
        return [label for label, group in enumerate(self.group_of_class) if group == index]

    def mass(self, probability_NC: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sum of probabilities within each group, [N, K]; the sum of a row does not change."""
        mass_NK = np.zeros((len(probability_NC), len(self.names)))
        for group in range(len(self.names)):
            mass_NK[:, group] = probability_NC[:, self.index == group].sum(axis=1)
        return mass_NK


def groups_by_share(
    train_counts: Sequence[int], shares: Sequence[float] = (0.33, 0.34, 0.33), names: Sequence[str] = SHARE_NAMES
) -> ClassGroups:
    """Rank the classes by training count and divide them into groups by fixed shares of the number of classes.

    The ranking is stable: classes with equal counts keep their order. The default is the partition of
    LTKD (Kim, CVPR 2026): 33 % head, 34 % medium, 33 % tail.

    Raises:
        DataError: There are fewer classes than groups.
    """
    num_classes, num_groups = len(train_counts), len(shares)
    if num_classes < num_groups:
        raise DataError(f"{num_classes} classes cannot fill {num_groups} groups; use a partition with fewer groups.")
    ends = np.round(np.cumsum(shares) / np.sum(shares) * num_classes).astype(int)
    for group in range(num_groups):  # with few classes, rounding must not leave a group empty
        ends[group] = np.clip(ends[group], group + 1, num_classes - (num_groups - 1 - group))
    group_of_rank = np.searchsorted(ends, np.arange(num_classes), side="right")
    group_of_class = np.empty(num_classes, dtype=np.int64)
    group_of_class[_ranking(train_counts)] = group_of_rank
    return ClassGroups(names=tuple(names), group_of_class=tuple(group_of_class.tolist()))


def groups_by_quantile(train_counts: Sequence[int], num_groups: int) -> ClassGroups:
    """Divide the ranked classes into ``num_groups`` groups of nearly equal size, named q1 (most frequent) to qK."""
    return groups_by_share(train_counts, [1.0] * num_groups, [f"q{group + 1}" for group in range(num_groups)])


def groups_by_count(train_counts: Sequence[int], more_than: int = 100, fewer_than: int = 20) -> ClassGroups:
    """Divide the classes into many (> 100 training images), medium (20 to 100) and few (< 20).

    This is the usual partition in the long-tail literature. Groups without a class are omitted.

    Raises:
        DataError: All classes are in one group.
    """
    group_of_class = [0 if count > more_than else 2 if count < fewer_than else 1 for count in train_counts]
    kept = sorted(set(group_of_class))
    if len(kept) < 2:
        raise DataError(
            f"all {len(train_counts)} classes fall into the group '{COUNT_NAMES[kept[0]]}', but at least two groups "
            f"are needed (the groups have > {more_than}, {fewer_than}-{more_than} and < {fewer_than} images); "
            "use --groups share instead."
        )
    return ClassGroups(
        names=tuple(COUNT_NAMES[group] for group in kept),
        group_of_class=tuple(kept.index(group) for group in group_of_class),
    )


def groups_by_mapping(class_names: Sequence[str], mapping: Mapping[str, Sequence[str]]) -> ClassGroups:
    """Make groups from a mapping that the user gives: group name to class names.

    Raises:
        DataError: A class is missing, unknown or listed twice, a group is named ``all``, or there are fewer than two
            non-empty groups.
    """
    listed = [name for members in mapping.values() for name in members]
    unknown = sorted(set(listed) - set(class_names))
    missing = sorted(set(class_names) - set(listed))
    repeated = sorted({name for name in listed if listed.count(name) > 1})
    problems = (
        ("that the data set does not have", unknown),
        ("without a group", missing),
        ("in more than one group", repeated),
    )
    for problem, classes in problems:
        if classes:
            raise DataError(f"the group mapping has classes {problem}: {', '.join(classes[:5])}; list each class once.")
    if "all" in mapping:
        raise DataError("a group is named 'all', but this name is reserved for all classes together; rename the group.")
    if len(mapping) < 2 or not all(mapping.values()):
        raise DataError(f"the group mapping needs at least two groups, none of them empty, got {list(mapping)}.")
    group_of_name = {name: group for group, members in enumerate(mapping.values()) for name in members}
    return ClassGroups(names=tuple(mapping), group_of_class=tuple(group_of_name[name] for name in class_names))


def _ranking(train_counts: Sequence[int]) -> NDArray[np.int64]:
    """Class indices from the most to the least frequent; ties keep class order."""
    return np.argsort(-np.asarray(train_counts, dtype=np.int64), kind="stable")
