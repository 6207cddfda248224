import json
import os
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_toys import write_tree

from ltkd import glyphs
from ltkd.config import DataConfig
from ltkd.data import DATASETS, ImageData, cifar100_source, data_config, glyphs_source, load_data
from ltkd.errors import DataError, UsageError
from ltkd.images import load_image
from ltkd.longtail import long_tailed_counts, long_tailed_indices

COUNTS = {"ant": 6, "bee": 2, "cat": 4}


def make_tree(root: Path, counts: dict[str, int], size_px: tuple[int, int] = (12, 12)) -> Path:
    """Images whose level says which they are: 40 a class, and one more for each further image."""
    for split in ("train", "test"):
        for label, (name, count) in enumerate(counts.items()):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count if split == "train" else 1):
                Image.new("RGB", size_px, (40 * label + number, 0, 255)).save(folder / f"{number:03}.png")
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "photos", COUNTS)


def load(data: Path | str, gamma: float | None = None, groups: str = "share", input_px: int | None = None) -> ImageData:
    return load_data(data_config(str(data), gamma, groups, input_px))


def levels(data: ImageData) -> list[int]:
    return sorted(data.train_images[:, 0, 0, 0].tolist())


def test_a_tree_is_loaded_as_it_is(tree: Path) -> None:
    data = load(tree)
    assert data.task.class_names == ("ant", "bee", "cat")
    assert data.task.train_counts == (6, 2, 4)
    assert [data.task.group_name(label) for label in range(3)] == ["head", "tail", "medium"]
    assert data.task.input_px == 12
    assert levels(data) == [0, 1, 2, 3, 4, 5, 40, 41, 80, 81, 82, 83]
    assert np.array_equal(data.train_images[:, 0, 0, 0] // 40, data.train_labels)
    assert data.test_images.shape == (3, 12, 12, 3)
    assert data.test_labels.tolist() == [0, 1, 2]
    assert data.mirror


def test_a_tree_is_given_a_tail_when_asked(tree: Path) -> None:
    data = load(tree, gamma=6)
    assert data.task.train_counts == (6, 2, 1)
    assert data.train_labels.tolist() == [0] * 6 + [1] * 2 + [2]
    assert len(data.test_labels) == 3


def test_the_statistics_of_the_channels_are_those_of_the_images_that_are_kept(tree: Path) -> None:
    for gamma in (None, 6):
        data = load(tree, gamma=gamma)
        unit = data.train_images.reshape(-1, 3) / 255
        assert data.task.mean == pytest.approx(unit.mean(axis=0), abs=5e-5)  # rounded to four digits
        # channels of one value must not divide by zero
        assert data.task.std == pytest.approx(np.maximum(unit.std(axis=0), 1e-3), abs=5e-5)


def test_images_of_one_square_size_keep_it_and_others_are_brought_to_64(tmp_path: Path) -> None:
    assert load(make_tree(tmp_path / "wide", COUNTS, (20, 12))).task.input_px == 64
    assert load(make_tree(tmp_path / "large", COUNTS, (225, 225))).task.input_px == 64
    mixed = make_tree(tmp_path / "mixed", COUNTS)
    Image.new("RGB", (16, 16)).save(mixed / "train" / "bee" / "000.png")
    assert load(mixed).task.input_px == 64


def test_the_size_can_be_asked_for(tree: Path) -> None:
    data = load(tree, input_px=9)
    assert (data.task.input_px, data.train_images.shape) == (9, (12, 9, 9, 3))


def test_every_unreadable_image_is_counted_and_the_first_are_named(tree: Path) -> None:
    for name, content in {"ant/001.png": b"text", "bee/000.png": b"\x89PNG\r\n\x1a\n"}.items():
        (tree / "train" / name).write_bytes(content)
    with pytest.raises(DataError, match=r"no readable .* header"):  # the first of a class decides on the size
        load(tree)
    with pytest.raises(DataError, match=r"2 unreadable image\(s\); .*ant/001\.png: not a.*bee/000\.png: the"):
        load(tree, input_px=12)
    for number in range(6):
        (tree / "train" / "ant" / f"{number:03}.png").write_bytes(b"text")
    with pytest.raises(DataError, match=r"7 unreadable image\(s\).*\(and 4 more\)"):
        load(tree, input_px=12)


def test_an_unreadable_test_image_and_a_folder_named_like_an_image_are_found_too(tree: Path) -> None:
    (tree / "test" / "cat" / "000.png").unlink()
    (tree / "test" / "cat" / "000.png").mkdir()
    with pytest.raises(DataError, match=r"1 unreadable image.*test/cat/000\.png: cannot be read"):
        load(tree)


def test_files_that_are_no_images_are_passed_over(tree: Path) -> None:
    (tree / "train" / "ant" / "notes.txt").write_text("hello")
    (tree / "train" / ".cache").mkdir()
    (tree / "train" / "README").write_text("hello")
    assert load(tree).task.train_counts == (6, 2, 4)


def test_a_class_without_images_is_refused(tree: Path) -> None:
    (tree / "train" / "dog").mkdir()
    with pytest.raises(DataError, match=r"classes without a single image .*: dog; add images or remove"):
        load(tree)


def test_different_classes_in_train_and_test_are_refused(tree: Path) -> None:
    (tree / "train" / "cat").rename(tree / "train" / "kat")
    with pytest.raises(DataError, match="only in train: kat; only in test: cat"):
        load(tree)


def test_a_directory_without_train_or_test_is_refused(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train does not exist; a tree needs train/CLASS/ and test/CLASS/"):
        load(tmp_path)
    (tree / "test").rename(tree / "val")
    with pytest.raises(DataError, match="test does not exist"):
        load(tree)


def test_one_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 1 class folder; a classifier needs at least two"):
        load(make_tree(tmp_path / "photos", {"ant": 3}))


def test_two_classes_need_a_partition_into_two(tmp_path: Path) -> None:
    two = make_tree(tmp_path / "photos", {"ant": 3, "bee": 1})
    with pytest.raises(DataError, match="2 classes cannot fill 3 groups"):
        load(two)
    assert load(two, groups="quantile:2").task.groups.names == ("q1", "q2")


def test_an_unknown_data_set_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'imagenet' is no data set \(glyphs, cifar100\) and no directory"):
        data_config("imagenet", None, "share", None)
    with pytest.raises(UsageError, match="unknown data set 'imagenet'; known: glyphs, cifar100"):
        load_data(DataConfig(name="imagenet"))


@pytest.mark.parametrize(
    ("gamma", "input_px"), [(0.5, None), (0.0, None), (float("nan"), None), (float("inf"), None), (None, 0), (None, -3)]
)
def test_options_outside_their_range_are_refused(gamma: float | None, input_px: int | None) -> None:
    with pytest.raises(UsageError, match="got"):
        data_config("glyphs", gamma, "share", input_px)


@pytest.mark.parametrize("groups", ["thirds", "quantile", "quantile:1", "quantile:x", "quantile:-2", ""])
def test_an_unknown_partition_lists_the_known_ones(tree: Path, groups: str) -> None:
    with pytest.raises(UsageError, match=r"unknown groups .*; known: share, count, quantile:K with K >= 2, or"):
        load(tree, groups=groups)


def test_groups_by_count_are_taken_from_what_is_left(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "photos", {"ant": 25, "bee": 25}, size_px=(1, 1))
    with pytest.raises(DataError, match="fall into the group 'medium'"):
        load(tree, groups="count")
    assert load(tree, gamma=5, groups="count").task.groups.names == ("medium", "few")


def test_a_mapping_of_groups_is_found_again_from_another_directory(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "groups.json").write_text(json.dumps({"wings": ["bee", "ant"], "tür": ["cat"]}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = data_config("photos", None, "groups.json", None)
    monkeypatch.chdir(tree)
    groups = load_data(config).task.groups
    assert (groups.names, groups.group_of_class) == (("wings", "tür"), (0, 0, 1))


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"a": "ant", "b": ["bee", "cat"]}', '{"a": [["ant"]]}', "3"])
def test_a_file_that_is_no_mapping_of_groups_is_refused(tree: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "groups.json").write_text(content)
    with pytest.raises(DataError, match=r"groups\.json is no mapping .*expected \{group: \[class, \.\.\.\]") as error:
        load(tree, groups=str(tmp_path / "groups.json"))
    assert "\n" not in str(error.value)


def test_a_mapping_without_one_of_the_classes_is_refused(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "groups.json").write_text('{"a": ["ant"], "b": ["bee"]}')
    with pytest.raises(DataError, match="in no group: cat"):
        load(tree, groups=str(tmp_path / "groups.json"))


def test_glyphs_are_47_classes_with_a_tail_of_100_and_a_balanced_test_set() -> None:
    config = data_config("glyphs", None, "share", None)
    assert config.gamma == 100
    source = glyphs_source(config)
    counts = long_tailed_counts(np.bincount(source.train_labels_N).tolist(), 100)
    assert (len(counts), max(counts), min(counts)) == (47, 300, 3)
    assert set(np.bincount(source.test_labels_N).tolist()) == {72}
    assert len(source.test_labels_N) >= 3000
    assert not source.mirror


def test_glyphs_are_loaded_to_the_same_bytes_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "TRAIN_PER_CLASS", 3)  # the full set takes seconds to render
    monkeypatch.setattr(glyphs, "TEST_PER_CLASS", 1)
    first, again = load("glyphs", gamma=3), load("glyphs", gamma=3)
    assert first.task == again.task
    assert first.train_images.tobytes() == again.train_images.tobytes()
    assert first.test_images.tobytes() == again.test_images.tobytes()
    assert (len(first.train_labels), len(first.test_labels)) == (sum(first.task.train_counts), 47)
    shown = {image.tobytes() for image in np.concatenate([first.train_images, first.test_images])}
    assert len(shown) == len(first.train_labels) + 47  # no test image was trained on
    kept = long_tailed_indices(np.repeat(np.arange(47), 3), first.task.train_counts)[0]
    assert np.array_equal(first.train_images[0], glyphs.render_glyphs(np.array([0]), np.array([kept]), split=0)[0])


@pytest.mark.parametrize(("name", "size_px"), [("glyphs", 24), ("cifar100", 32)])
def test_data_sets_of_one_size_take_no_other(name: str, size_px: int) -> None:
    with pytest.raises(UsageError, match=f"{size_px} px wide, got --input-px 48; leave the option out"):
        DATASETS[name](DataConfig(name=name, input_px=48))


def test_cifar100_without_a_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR100

    with socket.socket() as closed:  # bound and not listening: a connection is refused, now and while we hold it
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{closed.getsockname()[1]}/cifar.tar.gz")
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        with pytest.raises(DataError, match=r"not be downloaded .*Put the directory cifar-100-python") as error:
            cifar100_source(DataConfig(name="cifar100", root=tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


PHOTOGRAPHS = ("apple", "bicycle", "woman")
TAR = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "cifar100.tar"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of CIFAR-100 as a tree."""
    root = tmp_path_factory.mktemp("cifar100")
    whole = os.environ.get("CIFAR100_TREE")
    if whole:
        for split in ("train", "test"):
            (root / split).mkdir()
            for name in PHOTOGRAPHS:
                (root / split / name).symlink_to(Path(whole).resolve() / split / name)
    elif TAR.is_file():
        with tarfile.open(TAR) as tar:
            wanted = [member for member in tar if member.isfile() and member.name.split("/")[-2] in PHOTOGRAPHS]
            tar.extractall(root, wanted, filter="data")
    else:
        pytest.skip("no photographs: set CIFAR100_TREE to a tree of CIFAR-100 with train/CLASS/ and test/CLASS/")
    return root


@pytest.mark.slow
def test_photographs_are_loaded_at_their_own_size_and_with_the_published_tail(photographs: Path) -> None:
    data = load(photographs, gamma=10)
    assert data.task.class_names == PHOTOGRAPHS
    assert (data.task.train_counts, data.task.input_px, len(data.test_labels)) == ((500, 158, 50), 32, 300)
    files = sorted((photographs / "train" / "apple").iterdir())
    for place, position in enumerate([90, 254, 283]):  # where the published subsets of class 0 begin
        assert np.array_equal(data.train_images[place], load_image(files[position], 32))
    assert all(0.3 < mean < 0.8 for mean in data.task.mean)
    assert all(0.2 < std < 0.4 for std in data.task.std)


def test_a_holdout_stands_in_for_the_test_set_and_no_image_is_in_both(tmp_path: Path) -> None:
    root = write_tree(tmp_path, train_counts=(20, 10, 2))
    whole = load_data(data_config(str(root), None, "share", None))
    held = load_data(data_config(str(root), None, "share", None, holdout=0.2))
    assert held.task.train_counts == (1, 8, 16)  # blue, green, red
    assert np.bincount(held.test_labels).tolist() == [1, 2, 4]
    train, test = ({image.tobytes() for image in images} for images in (held.train_images, held.test_images))
    assert not train & test
    assert train | test == {image.tobytes() for image in whole.train_images}
