import json
from pathlib import Path

import numpy as np
import pytest

from ltkd.data.formats import class_folders, index_lists, is_tiny_imagenet, is_utf8, tiny_imagenet
from ltkd.data.long_tail import long_tailed_counts
from ltkd.errors import DataError


def touch(root: Path, *names: str) -> None:
    """Create empty files, since the tested functions do not open images."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def names_of(root: Path, files: tuple[Path, ...]) -> list[str]:
    return [path.relative_to(root).as_posix() for path in files]


def test_classes_and_files_of_a_tree_are_sorted_by_name(tmp_path: Path) -> None:
    touch(
        tmp_path, "train/b/2.jpg", "train/b/10.JPEG", "train/a/x.webp", "test/a/0.png", "test/b/0.png", "test/b/n.txt"
    )
    listing = class_folders(tmp_path)
    assert listing.class_names == ("a", "b")
    assert names_of(tmp_path, listing.train.files) == ["train/a/x.webp", "train/b/10.JPEG", "train/b/2.jpg"]
    assert listing.train.labels_N.tolist() == [0, 1, 1]
    assert names_of(tmp_path, listing.test.files) == ["test/a/0.png", "test/b/0.png"]


def test_val_is_the_test_set_of_a_tree_without_test(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/0.png", "train/b/0.png", "val/a/v.png", "val/b/v.png")
    assert names_of(tmp_path, class_folders(tmp_path).test.files) == ["val/a/v.png", "val/b/v.png"]
    touch(tmp_path, "test/a/t.png", "test/b/t.png")
    assert names_of(tmp_path, class_folders(tmp_path).test.files) == ["test/a/t.png", "test/b/t.png"]


@pytest.mark.parametrize("name", ["two words", "Käfer", "蝶", "🐝", "👩‍🌾", "a'b\"c", "[red]", "-x", "%s{}"])
def test_a_class_name_may_be_any_printable_text(tmp_path: Path, name: str) -> None:
    touch(tmp_path, f"train/{name}/0.png", "train/z/0.png", f"test/{name}/0.png", "test/z/0.png")
    names = class_folders(tmp_path).class_names
    assert name in names
    assert json.loads(json.dumps(names)) == list(names)


@pytest.mark.parametrize(
    ("name", "escaped"), [("caf\udce9", r"caf\\udce9"), ("a\nb", r"a\\nb"), ("a\x1b[31m", r"a\\x1b\[31m")]
)
def test_a_class_name_that_cannot_be_printed_is_rejected_with_an_error_that_can(
    tmp_path: Path, name: str, escaped: str
) -> None:
    try:
        touch(tmp_path, f"train/{name}/0.png", "test/z/0.png")
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system does not allow such a name")
    with pytest.raises(
        DataError, match=f"class whose name is not printable UTF-8: {escaped}; rename the folder"
    ) as error:
        class_folders(tmp_path)
    assert "\n" not in str(error.value)
    str(error.value).encode()


def test_file_names_that_are_not_utf_8_are_recognised() -> None:
    assert is_utf8("käfer 🐝")
    assert not is_utf8("caf\udce9")


def tiny(root: Path) -> Path:
    """TinyImageNet's layout with three classes of two images."""
    for wnid in ("n03", "n01", "n02"):
        touch(root, *(f"train/{wnid}/images/{wnid}_{number}.JPEG" for number in range(2)))
        write(root / "train" / wnid / f"{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t0\t9\t9")
    touch(root, *(f"val/images/val_{number}.JPEG" for number in range(3)), "test/images/test_0.JPEG")
    write(root / "wnids.txt", "n03", "n01", "n02")
    write(root / "words.txt", "n01\tgoldfish, Carassius auratus", "n02\tcat", "n03\tdog")
    lines = ("val_0.JPEG\tn02\t0\t32\t44\t62", "val_1.JPEG\tn01\t1\t2\t3\t4", "val_2.JPEG\tn02\t1\t2\t3\t4")
    write(root / "val" / "val_annotations.txt", *lines)
    return root


def test_tiny_imagenet_is_recognised_and_tested_on_its_validation_images(tmp_path: Path) -> None:
    assert not is_tiny_imagenet(tmp_path)
    root = tiny(tmp_path)
    assert is_tiny_imagenet(root)
    listing = tiny_imagenet(root)
    assert listing.class_names == ("n01", "n02", "n03")
    assert listing.train.labels_N.tolist() == [0, 0, 1, 1, 2, 2]
    assert names_of(root, listing.train.files)[:2] == ["train/n01/images/n01_0.JPEG", "train/n01/images/n01_1.JPEG"]
    assert names_of(root, listing.test.files) == [f"val/images/val_{number}.JPEG" for number in range(3)]
    assert listing.test.labels_N.tolist() == [1, 0, 1]


def test_a_damaged_tiny_imagenet_is_rejected(tmp_path: Path) -> None:
    root = tiny(tmp_path)
    write(root / "val" / "val_annotations.txt", "val_0.JPEG\tn02\t0\t0\t1\t1", "val_1.JPEG n01")
    with pytest.raises(DataError, match=r"val_annotations\.txt, line 2: expected FILE, tab, WNID .* got 'val_1"):
        tiny_imagenet(root)
    for path in (root / "train" / "n02" / "images").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"no images of 1 of the 3 classes in wnids\.txt \(n02\)"):
        tiny_imagenet(root)


def test_the_long_tails_of_tiny_imagenet_have_the_published_totals() -> None:
    totals = [sum(long_tailed_counts([500] * 200, gamma)) for gamma in (10, 20, 100)]
    assert totals == [39_072, 31_711, 21_549]


def lists(
    root: Path, train: tuple[str, ...], test: tuple[str, ...] = ("val/0.jpg 0", "val/1.jpg 1")
) -> tuple[Path, Path]:
    touch(root, *(line.rpartition(" ")[0] for line in (*train, *test) if " " in line))
    return write(root / "train.txt", *train), write(root / "test.txt", *test)


def test_lists_of_paths_with_labels_are_read_in_order(tmp_path: Path) -> None:
    train = ("train/n02/b.JPEG 1", "train/n01/with space.JPEG 0", "", "train/n02/a.JPEG 1")
    listing = index_lists(tmp_path, *lists(tmp_path, train))
    assert listing.class_names == ("n01", "n02")
    assert names_of(tmp_path, listing.train.files) == [
        "train/n02/b.JPEG", "train/n01/with space.JPEG", "train/n02/a.JPEG",
    ]  # fmt: skip
    assert (listing.train.labels_N.tolist(), listing.test.labels_N.tolist()) == ([1, 0, 1], [0, 1])
    assert listing.train.labels_N.dtype == np.int64


def test_a_class_of_a_list_without_a_folder_of_its_own_is_named_after_its_label(tmp_path: Path) -> None:
    several_folders = ("x/a/0.jpg 0", "x/b/1.jpg 0", "x/c/2.jpg 1")
    assert index_lists(tmp_path, *lists(tmp_path, several_folders)).class_names == ("0", "c")
    one_folder = ("all/0.jpg 0", "all/1.jpg 1")
    assert index_lists(tmp_path, *lists(tmp_path, one_folder)).class_names == ("0", "1")
    no_folder = ("0.jpg 0", "1.jpg 1")
    assert index_lists(tmp_path, *lists(tmp_path, no_folder)).class_names == ("0", "1")


@pytest.mark.parametrize(
    "line",
    ["a.jpg", "a.jpg -1", "a.jpg 1.5", "a.jpg one", "a.jpg ²", " 3", "/etc/a.jpg 0", "../a.jpg 0", "a.jpg 9999999999"],
)
def test_the_error_for_a_malformed_line_names_the_line_number(tmp_path: Path, line: str) -> None:
    train, test = lists(tmp_path, ("a/0.jpg 0", "b/0.jpg 1"))
    write(train, "a/0.jpg 0", "b/0.jpg 1", line)
    with pytest.raises(DataError, match=r"train\.txt, line 3: expected 'PATH LABEL'") as error:
        index_lists(tmp_path, train, test)
    assert "\n" not in str(error.value)


def test_a_list_that_is_missing_empty_or_not_text_is_rejected(tmp_path: Path) -> None:
    train, test = lists(tmp_path, ("a/0.jpg 0", "b/0.jpg 1"))
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read .*'PATH LABEL' lines"):
        index_lists(tmp_path, train, tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"lists no images"):
        index_lists(tmp_path, write(tmp_path / "empty.txt", "", " "), test)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe a 0")
    with pytest.raises(DataError, match=r"bytes\.txt cannot be read"):
        index_lists(tmp_path, tmp_path / "bytes.txt", test)


def test_labels_with_a_gap_and_labels_that_are_only_in_the_test_list_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="labels up to 3 but no image of 1; number the classes from 0"):
        index_lists(tmp_path, *lists(tmp_path, ("a/0.jpg 0", "b/0.jpg 2", "c/0.jpg 3")))
    with pytest.raises(DataError, match=r"test\.txt has labels that are not in .*train\.txt \(1, 7\)"):
        index_lists(tmp_path, *lists(tmp_path, ("a/0.jpg 0",), ("v/0.jpg 1", "v/1.jpg 7", "v/2.jpg 0")))


def test_listed_images_that_do_not_exist_are_counted_and_the_first_are_named(tmp_path: Path) -> None:
    train, test = lists(tmp_path, (*(f"a/{number:02}.jpg 0" for number in range(14)), "b/0.jpg 1"))
    for number in range(2, 14):
        (tmp_path / "a" / f"{number:02}.jpg").unlink()
    with pytest.raises(
        DataError, match=r"^12 of the images in the lists do not exist .*: a/02\.jpg, .*, a/11\.jpg \(and 2 more\)"
    ):
        index_lists(tmp_path, train, test)
