import numpy as np
import pytest
from numpy.typing import NDArray
from training_toys import toy_data

from export.certification.margins import MARGINS
from export.certification.views import WithViews, topped_up
from export.schema import Margins
from ltkd.data.datasets import Dataset
from ltkd.data.image_files import Images

LOOSE = Margins(overall=0.1, group=0.1)
FP32 = MARGINS["fp32"]


def topped_up_test(data: Dataset, margins: Margins) -> tuple[Images, NDArray[np.int64], int]:
    return topped_up(data.test_images, data.test_labels, data.task.groups, margins, mirror=data.mirror)


def test_enough_test_images_are_left_alone() -> None:
    data = toy_data(num_test=60)
    images, labels, num_views = topped_up_test(data, LOOSE)
    assert images is data.test_images and labels is data.test_labels and num_views == 0


def test_every_group_gets_what_its_margin_takes_and_all_together_what_theirs_takes() -> None:
    data = toy_data(num_test=4)
    images, labels, num_views = topped_up_test(data, FP32)
    assert np.bincount(labels).tolist() == [601, 601, 601]  # 0.5 pp without a flip
    assert len(images) == len(labels) == 12 + num_views
    _, labels, _ = topped_up_test(data, Margins(overall=0.001, group=0.005))
    assert len(labels) == pytest.approx(3004, rel=0.006)  # log(0.0495) / log(1 - 0.001), and what the search adds


def test_the_images_come_first_and_a_view_is_the_same_however_it_is_asked_for() -> None:
    data = toy_data(num_test=4)
    images, labels, _ = topped_up_test(data, FP32)
    assert np.array_equal(images[:12], data.test_images)
    by_slice, by_rows = images[10:20], images[np.arange(10, 20)]
    assert np.array_equal(by_slice, by_rows)
    assert np.array_equal(images[15:16][0], by_slice[5])
    assert labels[:12].tolist() == data.test_labels.tolist()


def test_a_view_shows_its_own_image_cropped_and_mirrored_only_where_allowed() -> None:
    pixels = np.arange(2 * 16 * 16 * 3, dtype=np.uint8).reshape(2, 16, 16, 3)
    rows = np.ones(60, dtype=np.int64)
    padded = np.pad(pixels[1], ((2, 2), (2, 2), (0, 0)))
    crops = {padded[top : top + 16, left : left + 16].tobytes() for top in range(5) for left in range(5)}
    views = WithViews(pixels, rows, mirror=False)[2:]
    assert {view.tobytes() for view in views} <= crops
    mirrored = WithViews(pixels, rows, mirror=True)[2:]
    plain = sum(view.tobytes() in crops for view in mirrored)
    assert 10 <= plain <= 50  # 60 fair coins: five standard deviations are 19
    assert all(view.tobytes() in crops or view[:, ::-1].tobytes() in crops for view in mirrored)


def test_a_group_without_a_test_image_stays_without_one() -> None:
    data = toy_data(num_test=4)
    keep = data.test_labels != 2
    data = type(data)(
        data.task, data.train_images, data.train_labels, data.test_images[keep], data.test_labels[keep], True
    )
    _, labels, _ = topped_up_test(data, FP32)
    assert np.bincount(labels, minlength=3)[2] == 0
    assert np.bincount(labels)[0] >= 601


def test_a_group_with_a_margin_of_its_own_gets_what_that_one_takes() -> None:
    margins = Margins(overall=0.5, group=0.02, groups={"tail": 0.01})
    _, labels, _ = topped_up_test(toy_data(num_test=4), margins)
    assert np.bincount(labels).tolist() == [149, 149, 300]
