import numpy as np
import pytest
from numpy.typing import NDArray
from training_toys import toy_data

from export.certification.accuracy_margins import MARGINS
from export.certification.views import ImagesWithViews, add_views
from export.schema import Margins
from ltkd.data.datasets import Dataset
from ltkd.data.image_files import Images

LOOSE = Margins(overall=0.1, group=0.1)
FP32 = MARGINS["fp32"]


def add_views_to_test_images(data: Dataset, margins: Margins) -> tuple[Images, NDArray[np.int64], int]:
    return add_views(data.test_images, data.test_labels, data.task.groups, margins, mirror=data.mirror)


def test_no_views_are_added_if_there_are_enough_images() -> None:
    data = toy_data(num_test=60)
    images, labels, num_views = add_views_to_test_images(data, LOOSE)
    assert images is data.test_images and labels is data.test_labels and num_views == 0


def test_every_group_and_all_groups_together_get_as_many_images_as_their_margins_need() -> None:
    data = toy_data(num_test=4)
    images, labels, num_views = add_views_to_test_images(data, FP32)
    assert np.bincount(labels).tolist() == [601, 601, 601]  # for 0.5 pp if no image changes class
    assert len(images) == len(labels) == 12 + num_views
    _, labels, _ = add_views_to_test_images(data, Margins(overall=0.001, group=0.005))
    assert len(labels) == pytest.approx(
        3004, rel=0.006
    )  # log(0.0495) / log(1 - 0.001), and at most 0.5 % from the search


def test_the_images_come_first_and_a_view_is_the_same_for_every_kind_of_index() -> None:
    data = toy_data(num_test=4)
    images, labels, _ = add_views_to_test_images(data, FP32)
    assert np.array_equal(images[:12], data.test_images)
    by_slice, by_rows = images[10:20], images[np.arange(10, 20)]
    assert np.array_equal(by_slice, by_rows)
    assert np.array_equal(images[15:16][0], by_slice[5])
    assert labels[:12].tolist() == data.test_labels.tolist()


def test_a_view_is_a_crop_of_its_image_and_is_mirrored_only_if_allowed() -> None:
    pixels = np.arange(2 * 16 * 16 * 3, dtype=np.uint8).reshape(2, 16, 16, 3)
    rows = np.ones(60, dtype=np.int64)
    padded = np.pad(pixels[1], ((2, 2), (2, 2), (0, 0)))
    crops = {padded[top : top + 16, left : left + 16].tobytes() for top in range(5) for left in range(5)}
    views = ImagesWithViews(pixels, rows, mirror=False)[2:]
    assert {view.tobytes() for view in views} <= crops
    mirrored = ImagesWithViews(pixels, rows, mirror=True)[2:]
    plain = sum(view.tobytes() in crops for view in mirrored)
    assert 10 <= plain <= 50  # 60 fair coins: five standard deviations are 19
    assert all(view.tobytes() in crops or view[:, ::-1].tobytes() in crops for view in mirrored)


def test_a_group_without_test_images_gets_no_views() -> None:
    data = toy_data(num_test=4)
    keep = data.test_labels != 2
    data = type(data)(
        data.task, data.train_images, data.train_labels, data.test_images[keep], data.test_labels[keep], True
    )
    _, labels, _ = add_views_to_test_images(data, FP32)
    assert np.bincount(labels, minlength=3)[2] == 0
    assert np.bincount(labels)[0] >= 601


def test_a_group_with_its_own_margin_gets_as_many_images_as_that_margin_needs() -> None:
    margins = Margins(overall=0.5, group=0.02, groups={"tail": 0.01})
    _, labels, _ = add_views_to_test_images(toy_data(num_test=4), margins)
    assert np.bincount(labels).tolist() == [149, 149, 300]
