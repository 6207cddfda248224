from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ltkd.contract.image_decoding import load_image
from ltkd.contract.preprocessing import Preprocessing
from ltkd.data import image_files as files_module
from ltkd.data.image_files import FileImages, channel_levels, check_files, unreadable_error
from ltkd.errors import ImageError


@pytest.fixture
def photographs(tmp_path: Path) -> FileImages:
    """Seven files of several types and sizes."""
    paths = []
    for number in range(7):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{number}{('.png', '.jpg', '.webp')[number % 3]}")
        Image.fromarray(pixels).save(paths[-1])
    return FileImages(tuple(paths), Preprocessing(input_px=16))


def test_files_are_decoded_by_position_with_the_shared_decoder(photographs: FileImages) -> None:
    whole = np.stack([load_image(path, Preprocessing(input_px=16)) for path in photographs.paths])
    assert len(photographs) == 7
    for rows in (slice(None), slice(2, 5), slice(6, 99), slice(None, None, 3), np.array([5, 0, 5]), np.array([], int)):
        np.testing.assert_array_equal(photographs[rows], whole[rows])
    assert photographs[2:3].flags.writeable  # torch warns about arrays that are not writeable


def test_files_are_selected_without_reading_them(photographs: FileImages) -> None:
    for path in photographs.paths:
        path.unlink()
    selected = photographs.take(np.array([3, 1]))
    assert selected == FileImages((photographs.paths[3], photographs.paths[1]), Preprocessing(input_px=16))
    with pytest.raises(ImageError, match=r"1\.jpg: the file cannot be read"):
        selected[1:2]


@pytest.mark.parametrize("keep", [True, False])
def test_the_check_finds_every_unreadable_file_and_counts_the_levels_of_the_others(
    photographs: FileImages, keep: bool
) -> None:
    photographs.paths[0].write_bytes(b"text")
    whole = photographs.paths[4].read_bytes()
    photographs.paths[4].write_bytes(whole[: len(whole) // 2])
    num_checked: list[int] = []
    check = check_files(photographs, keep=keep, on_file=num_checked.append)
    assert num_checked == list(range(1, 8))
    assert list(check.problems) == [0, 4]
    assert "0.png: the file is not a JPEG" in check.problems[0]
    assert "4.jpg: the image is damaged or truncated" in check.problems[4]
    readable = [load_image(photographs.paths[position], Preprocessing(input_px=16)) for position in (1, 2, 3, 5, 6)]
    # the images are smaller than twice the result, so draft mode decodes them at full size
    np.testing.assert_array_equal(check.levels_3L, sum(map(channel_levels, readable)))
    if keep:
        assert check.images_NSS3 is not None
        np.testing.assert_array_equal(check.images_NSS3[[1, 2, 3, 5, 6]], readable)
    else:
        assert check.images_NSS3 is None


def test_all_files_are_read_if_there_are_more_than_fit_in_the_pending_tasks(
    photographs: FileImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "_TASK", 2)
    monkeypatch.setattr(files_module, "_TASKS", 2)
    expected = np.stack([load_image(path, Preprocessing(input_px=16)) for path in photographs.paths])
    np.testing.assert_array_equal(check_files(photographs, keep=True).images_NSS3, expected)
    photographs.paths[5].write_bytes(b"")
    assert list(check_files(photographs, keep=True).problems) == [5]
    photographs = photographs.take(np.array([0, 1, 2, 3, 4, 6]))
    np.testing.assert_array_equal(photographs[:], expected[[0, 1, 2, 3, 4, 6]])


def test_the_levels_of_a_channel_are_counted() -> None:
    levels = channel_levels(np.array([[[0, 1, 255], [0, 2, 255]]], dtype=np.uint8))
    assert (levels[0, 0], levels[1, 1], levels[1, 2], levels[2, 255]) == (2, 1, 1, 2)
    assert levels.sum() == 6


def test_up_to_three_unreadable_files_are_named_in_one_line_and_more_with_a_line_each() -> None:
    problems = [f"{number}.png: damaged" for number in range(14)]
    assert "\n" not in str(unreadable_error(problems[:3], 50))
    assert str(unreadable_error(problems[:1], 1234)).startswith(
        "1 of 1,234 images are unreadable; repair or remove them"
    )
    assert str(unreadable_error(problems, 50)).splitlines()[1:] == [f"  {problem}" for problem in problems]
