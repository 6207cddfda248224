import hashlib
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltkd.contract.class_groups import groups_by_share
from ltkd.data.long_tail import long_tailed_counts, long_tailed_indices

CIFAR_LABELS = np.repeat(np.arange(100), 500)  # in label order, so a position modulo 500 is one within its class
CIFAR_COUNTS = [500] * 100


@pytest.mark.parametrize(
    ("gamma", "total", "smallest"), [(10, 19_573, 50), (20, 15_907, 25), (50, 12_608, 10), (100, 10_847, 5)]
)
def test_the_totals_are_those_of_the_published_subsets(gamma: int, total: int, smallest: int) -> None:
    counts = long_tailed_counts(CIFAR_COUNTS, gamma)
    assert (counts[0], counts[-1], sum(counts)) == (500, smallest, total)
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(("gamma", "total"), [(10, 39_072), (20, 31_711), (100, 21_549)])
def test_the_totals_of_tiny_imagenet_are_those_of_the_published_subsets(gamma: int, total: int) -> None:
    assert sum(long_tailed_counts([500] * 200, gamma)) == total


def test_the_groups_of_the_benchmark_have_the_published_numbers_of_images() -> None:
    counts = long_tailed_counts(CIFAR_COUNTS, 100)
    groups = groups_by_share(counts)
    assert [sum(counts[label] for label in groups.members(name)) for name in groups.names] == [8_615, 1_864, 368]


# SHA-256 of all positions within their class, class after class, as little-endian int64, drawn with LDAM-DRW
@pytest.mark.parametrize(
    ("gamma", "sha256"),
    [
        (10, "5906ba7310b91b5ee5a4e0b172d27f9370929d8acacd8026f44e160daa1f4834"),
        (20, "03ac457e9ab1e6bdac3309aaa00275450fbe39ee0c22b12d947c5a8c68fa4a4d"),
        (100, "f123ec136d44ab1b224fe55bb8a73ab03432d25a81975af68f26fb6777d5aca8"),
    ],
)
def test_the_kept_images_are_those_of_the_published_subsets(gamma: int, sha256: str) -> None:
    counts = long_tailed_counts(CIFAR_COUNTS, gamma)
    kept = long_tailed_indices(CIFAR_LABELS, counts)
    within = kept % 500
    assert within[:5].tolist() == [90, 254, 283, 445, 461]
    assert within[-counts[-1] :][:5].tolist() == [348, 153, 363, 361, 299]
    assert hashlib.sha256(within.astype("<i8").tobytes()).hexdigest() == sha256
    assert CIFAR_LABELS[kept].tolist() == np.repeat(np.arange(100), counts).tolist()


@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=12),
    st.floats(1, 200),
    st.floats(1, 200),
    st.randoms(use_true_random=False),
)
def test_a_longer_tail_is_a_subset_of_a_shorter_one(
    available: list[int], one: float, other: float, random: Random
) -> None:
    labels = np.repeat(np.arange(len(available)), available)
    random.shuffle(labels)
    short, long = (long_tailed_counts(available, gamma) for gamma in sorted((one, other)))
    kept = set(long_tailed_indices(labels, short).tolist())
    assert len(kept) == sum(short)
    assert set(long_tailed_indices(labels, long).tolist()) <= kept
    assert all(1 <= count <= size for count, size in zip(long, available, strict=True))


def test_gamma_one_keeps_every_image() -> None:
    labels = np.array([1, 0, 2, 0, 1, 0])
    counts = long_tailed_counts([3, 2, 1], gamma=1)
    assert counts == [3, 2, 1]
    assert sorted(long_tailed_indices(labels, counts).tolist()) == list(range(6))


def test_a_class_with_fewer_images_than_the_profile_keeps_all_of_them() -> None:
    assert long_tailed_counts([100, 4, 100], gamma=4) == [100, 4, 25]


def test_every_class_keeps_at_least_one_image() -> None:
    assert long_tailed_counts([10, 10, 10], gamma=1000) == [10, 1, 1]
