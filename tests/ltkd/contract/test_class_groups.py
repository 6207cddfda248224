import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ltkd.contract.class_groups import (
    ClassGroups,
    groups_by_count,
    groups_by_mapping,
    groups_by_quantile,
    groups_by_share,
)
from ltkd.errors import DataError

COUNTS = st.lists(st.integers(0, 30), min_size=3, max_size=60)  # few different values, so that ties occur


def sizes(groups: ClassGroups) -> list[int]:
    return [len(groups.members(name)) for name in groups.names]


def test_a_hundred_classes_are_divided_as_in_the_paper() -> None:
    groups = groups_by_share(range(100, 0, -1))
    assert groups.names == ("head", "medium", "tail")
    assert groups.members("head") == list(range(33))
    assert groups.members("medium") == list(range(33, 67))
    assert groups.members("tail") == list(range(67, 100))


@pytest.mark.parametrize(
    ("num_classes", "expected"),
    [(200, [66, 68, 66]), (47, [16, 15, 16]), (10, [3, 4, 3]), (5, [2, 1, 2]), (4, [1, 2, 1]), (3, [1, 1, 1])],
)
def test_group_sizes_are_close_to_the_shares_for_any_number_of_classes(num_classes: int, expected: list[int]) -> None:
    assert sizes(groups_by_share([1] * num_classes)) == expected


def test_no_group_is_empty_with_extreme_shares() -> None:
    assert sizes(groups_by_share([1] * 4, shares=(0.98, 0.01, 0.01))) == [2, 1, 1]
    assert sizes(groups_by_share([1] * 4, shares=(0.01, 0.01, 0.98))) == [1, 1, 2]


def test_fewer_classes_than_groups_are_an_error() -> None:
    with pytest.raises(DataError, match="2 classes cannot fill 3 groups"):
        groups_by_share([5, 4])


@given(COUNTS, st.integers(2, 8))
def test_a_ranked_partition_has_every_class_once_and_keeps_ties_in_class_order(counts: list[int], k: int) -> None:
    partitions = [groups_by_share(counts)] + ([groups_by_quantile(counts, k)] if k <= len(counts) else [])
    for groups in partitions:
        assert sorted(label for name in groups.names for label in groups.members(name)) == list(range(len(counts)))
        assert min(sizes(groups)) >= 1
        ranked = sorted(range(len(counts)), key=lambda label: (-counts[label], label))
        assert [groups.group_of_class[label] for label in ranked] == sorted(groups.group_of_class)


@given(COUNTS, st.integers(2, 8))
def test_the_sizes_of_quantile_groups_differ_by_at_most_one_class(counts: list[int], k: int) -> None:
    if k > len(counts):
        with pytest.raises(DataError, match="fewer groups"):
            groups_by_quantile(counts, k)
    else:
        groups = groups_by_quantile(counts, k)
        assert groups.names == tuple(f"q{number}" for number in range(1, k + 1))
        assert max(sizes(groups)) - min(sizes(groups)) <= 1


def test_the_limits_of_groups_by_count_belong_to_the_medium_group() -> None:
    groups = groups_by_count([19, 101, 100, 20])
    assert {name: groups.members(name) for name in groups.names} == {"many": [1], "medium": [2, 3], "few": [0]}


def test_groups_by_count_omit_groups_without_a_class() -> None:
    groups = groups_by_count([5, 500])
    assert (groups.names, groups.group_of_class) == (("many", "few"), (1, 0))


def test_groups_by_count_with_all_classes_in_one_group_are_an_error() -> None:
    with pytest.raises(DataError, match=r"all 2 classes fall into the group 'medium'.*use --groups share"):
        groups_by_count([50, 60])


def test_groups_from_a_mapping_keep_the_order_of_the_mapping() -> None:
    groups = groups_by_mapping(["ant", "bee", "cat"], {"rare": ["cat"], "common": ["bee", "ant"]})
    assert (groups.names, groups.group_of_class) == (("rare", "common"), (1, 1, 0))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"a": ["ant"], "b": ["bee"]}, "without a group: cat"),
        ({"a": ["ant", "bee"], "b": ["cat", "dog"]}, "that the data set does not have: dog"),
        ({"a": ["ant", "bee"], "b": ["cat", "ant"]}, "in more than one group: ant"),
        ({"a": ["ant", "bee", "cat"]}, "at least two groups"),
        ({"a": ["ant", "bee", "cat"], "b": []}, "at least two groups, none of them empty"),
        ({"all": ["ant", "bee"], "rare": ["cat"]}, "named 'all'"),
    ],
)
def test_a_mapping_that_is_not_a_partition_is_an_error(mapping: dict[str, list[str]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        groups_by_mapping(["ant", "bee", "cat"], mapping)


@pytest.mark.parametrize(
    ("names", "group_of_class"),
    [(("a", "a"), (0, 1)), (("a", "b"), (0, 0)), (("a", "b"), (0, 1, 2)), (("a", "b"), (-1, 0, 1))],
)
def test_groups_that_are_not_a_partition_cannot_be_created(
    names: tuple[str, ...], group_of_class: tuple[int, ...]
) -> None:
    with pytest.raises(ValidationError):
        ClassGroups(names=names, group_of_class=group_of_class)


def test_the_probability_mass_of_a_group_is_the_sum_over_its_classes() -> None:
    groups = ClassGroups(names=("a", "b"), group_of_class=(1, 0, 1, 1))
    probability = np.random.default_rng(0).dirichlet(np.ones(4), size=50)
    mass = groups.mass(probability)
    # float64 sums of four terms
    np.testing.assert_allclose(mass[:, 0], probability[:, 1], rtol=1e-12)
    np.testing.assert_allclose(mass.sum(axis=1), 1, rtol=1e-12)
