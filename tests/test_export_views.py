import numpy as np
import pytest
from training_toys import toy_data

from export.gates import FP32_MARGINS, Margins
from export.views import WithViews, topped_up

LOOSE = Margins(overall=0.1, group=0.1)


def test_enough_test_images_are_left_alone() -> None:
    data = toy_data(num_test=60)
    images, labels, num_views = topped_up(data, LOOSE)
    assert images is data.test_images and labels is data.test_labels and num_views == 0


def test_every_group_gets_what_its_margin_takes_and_all_together_what_theirs_takes() -> None:
    data = toy_data(num_test=4)
    images, labels, num_views = topped_up(data, FP32_MARGINS)
    assert np.bincount(labels).tolist() == [539, 539, 539]  # the published number for 0.5 pp without a flip
    assert len(images) == len(labels) == 12 + num_views
    _, labels, _ = topped_up(data, Margins(overall=0.001, group=0.005))
    assert len(labels) == pytest.approx(2705, abs=3)  # z**2 / 0.001


def test_the_images_come_first_and_a_view_is_the_same_however_it_is_asked_for() -> None:
    data = toy_data(num_test=4)
    images, labels, _ = topped_up(data, FP32_MARGINS)
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
    _, labels, _ = topped_up(data, FP32_MARGINS)
    assert np.bincount(labels, minlength=3)[2] == 0
    assert np.bincount(labels)[0] >= 539
