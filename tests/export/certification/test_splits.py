"""The splits of the test images are disjoint, and their records identify the images."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from training_toys import toy_data, write_tree

import ltkd.data.datasets
from export.certification.accuracy_margins import MARGINS
from export.certification.splits import Subset, find_duplicates, split_test_images
from export.schema import Margins
from ltkd.data.datasets import Dataset, data_config, load_dataset
from ltkd.data.image_files import FileImages, LabelledImages, pixel_hashes
from ltkd.errors import DataError

LOOSE = Margins(overall=0.2, group=0.5)  # 15 images are enough for ``overall``, 5 for each group


def counts(data: Dataset) -> dict[str, list[int]]:
    parts = split_test_images(data, LOOSE).parts
    return {name: np.bincount(part.labels_N, minlength=3).tolist() for name, part in parts.items()}


def hashes(part: LabelledImages) -> list[bytes]:
    return list(pixel_hashes(part.images))


def with_test(data: Dataset, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Dataset:
    return dataclasses.replace(data, test_images=images, test_labels=labels)


def test_each_class_is_divided_into_10_20_20_and_50_percent() -> None:
    assert counts(toy_data(num_test=40)) == {
        "quantisation": [4] * 3, "selection": [8] * 3, "confidence": [8] * 3, "certify": [20] * 3,
    }  # fmt: skip


def test_the_splits_share_no_image_and_contain_every_image() -> None:
    data = toy_data(num_test=37)
    splits = split_test_images(data, LOOSE)
    assigned = [digest for part in splits.parts.values() for digest in hashes(part)]
    assert sorted(assigned) == sorted(pixel_hashes(data.test_images))
    assert (splits.num_views, splits.num_duplicates) == (0, 0)


def test_the_division_does_not_depend_on_the_order_of_the_images() -> None:
    data = toy_data(num_test=20)
    order = np.random.default_rng(0).permutation(60)
    shuffled = split_test_images(with_test(data, np.asarray(data.test_images)[order], data.test_labels[order]), LOOSE)
    for name, part in split_test_images(data, LOOSE).parts.items():
        assert set(hashes(part)) == set(hashes(shuffled.parts[name]))


def test_twelve_images_of_three_classes_give_every_split_one_and_certify_every_class() -> None:
    parts = counts(toy_data(num_test=4))
    assert {name: sum(of_class) for name, of_class in parts.items()} == {
        "quantisation": 1, "selection": 3, "confidence": 2, "certify": 6 + 9,  # nine views make fifteen
    }  # fmt: skip
    assert min(parts["certify"]) >= 2


def test_views_are_made_of_certification_images_only() -> None:
    splits = split_test_images(toy_data(num_test=4), MARGINS["fp32"])
    certify, num_real = splits.certify, len(splits.certify.labels_N) - splits.num_views
    assert num_real == 6
    assert np.bincount(certify.labels_N).tolist() == [601, 601, 601]
    assert len(certify.images) == len(certify.labels_N)
    assert certify.images[-1:].shape == (1, 8, 8, 3)


def test_too_few_images_to_give_every_split_one_are_rejected() -> None:
    data = toy_data(num_test=2)
    assert counts(data)["quantisation"] != [0, 0, 0]  # six are enough
    with pytest.raises(DataError, match=r"^of 5 test images, 5 are distinct .* at least 6 are needed"):
        split_test_images(with_test(data, np.asarray(data.test_images)[:5], data.test_labels[:5]), LOOSE)


def test_the_only_image_of_a_group_goes_to_certify() -> None:
    data = toy_data(num_test=12)
    for only in range(24, 36):  # each image of the tail
        keep = np.append(np.arange(24), only)
        alone = with_test(data, np.asarray(data.test_images)[keep], data.test_labels[keep])
        assert split_test_images(alone, LOOSE).certify.labels_N.max() == 2


def test_duplicate_test_images_are_left_out_and_counted() -> None:
    data = toy_data(num_test=20)
    images, labels = np.asarray(data.test_images), data.test_labels
    twice = with_test(data, np.concatenate([images, images[::4]]), np.concatenate([labels, (labels[::4] + 1) % 3]))
    splits = split_test_images(twice, LOOSE)
    assert splits.num_duplicates == 15
    assigned = [digest for part in splits.parts.values() for digest in hashes(part)]
    assert len(assigned) == len(set(assigned)) == 60


def test_training_images_among_the_test_images_are_left_out_and_counted() -> None:
    data = toy_data(num_test=20)
    images, labels = np.asarray(data.test_images).copy(), data.test_labels
    images[5:9] = np.asarray(data.train_images)[:4]
    splits = split_test_images(with_test(data, images, labels), LOOSE)
    assert splits.num_duplicates == 4
    known = set(pixel_hashes(data.train_images))
    assert not any(known.intersection(hashes(part)) for part in splits.parts.values())


def test_a_test_set_that_is_the_training_set_is_rejected() -> None:
    data = toy_data()
    with pytest.raises(DataError, match=r"^of 37 test images, 0 are distinct and not training images too"):
        split_test_images(with_test(data, np.asarray(data.train_images), data.train_labels), LOOSE)


def test_image_files_are_never_all_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ltkd.data.datasets, "IN_MEMORY_PX", 0)
    data = load_dataset(data_config(str(write_tree(tmp_path / "tree", num_test=200)), None, "share", 8))
    assert isinstance(data.test_images, FileImages)
    batch_sizes: list[int] = []
    read = FileImages.__getitem__

    def read_and_count(images: FileImages, rows: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        pixels = read(images, rows)
        batch_sizes.append(len(pixels))
        return pixels

    monkeypatch.setattr(FileImages, "__getitem__", read_and_count)
    splits = split_test_images(data, LOOSE)
    record = splits.record("some files", data.task.groups)
    assert max(batch_sizes) == 256  # of 600
    assert sum(batch_sizes) == 1200  # every image is read once to divide and once to describe the splits
    in_memory = dataclasses.replace(data, test_images=read(data.test_images, slice(None)))
    assert split_test_images(in_memory, LOOSE).record("some files", data.task.groups) == record


def test_the_record_has_counts_and_hashes_that_can_be_checked() -> None:
    data = toy_data(num_test=4)
    splits = split_test_images(data, MARGINS["fp32"])
    record = splits.record("twelve images", data.task.groups)
    assert [split.name for split in record.splits] == ["quantisation", "selection", "confidence", "certify"]
    assert (record.description, record.num_views, record.num_duplicates) == ("twelve images", 1797, 0)
    for split, part in zip(record.splits, splits.parts.values(), strict=True):
        assert split.num_images == len(part.labels_N) == sum(split.per_group)
        assert split.sha256 == hashlib.sha256(part.images[:].tobytes() + part.labels_N.tobytes()).hexdigest()


def test_images_of_another_size_or_class_are_rejected() -> None:
    data = toy_data(num_test=4)
    splits = split_test_images(data, LOOSE)
    splits.check(data.task)
    with pytest.raises(DataError, match=r"images for quantisation are uint8 \[1, 8, 8, 3\], expected uint8 \[1, 9, 9"):
        splits.check(data.task.model_copy(update={"input_px": 9}))
    with pytest.raises(DataError, match="labels for selection run from 0 to 2, but the task has classes 0 to 1"):
        fewer = data.task.model_copy(update={"class_names": ("red", "green")})
        dataclasses.replace(
            splits, quantisation=LabelledImages(splits.selection.images, splits.selection.labels_N * 0)
        ).check(fewer)
    empty = LabelledImages(np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, np.int64))
    with pytest.raises(DataError, match=r"images for confidence .* at least one"):
        dataclasses.replace(splits, confidence=empty).check(data.task)


def test_a_subset_can_be_indexed_by_slice_and_by_position() -> None:
    images = np.asarray(toy_data(num_test=4).test_images)
    subset = Subset(images, np.array([7, 2, 5]))
    assert len(subset) == 3
    assert np.array_equal(subset[1:], images[[2, 5]])
    assert np.array_equal(subset[np.array([2, 0])], images[[5, 7]])


def test_the_splits_have_no_duplicates_and_views_do_not_count_as_duplicates() -> None:
    splits = split_test_images(toy_data(num_test=4), MARGINS["fp32"])
    others = {name: part.images for name, part in splits.parts.items() if name != "certify"}
    assert find_duplicates(splits.certify.images, splits.num_views, others) == ()
    assert find_duplicates(splits.certify.images, 0, {}) != ()  # crops of such small images can be equal
