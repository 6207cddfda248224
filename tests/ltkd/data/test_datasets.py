import json
import os
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_toys import write_tree

from ltkd.config import DataConfig
from ltkd.contract.image_decoding import decode_image, load_image
from ltkd.contract.preprocessing import FULL_DECODING, Preprocessing, Resizing
from ltkd.data import glyphs
from ltkd.data.batches import make_batches
from ltkd.data.datasets import Dataset, data_config, load_dataset
from ltkd.data.formats import DATASETS, cifar100_source, glyphs_source
from ltkd.data.image_files import FileImages
from ltkd.data.long_tail import long_tailed_counts, long_tailed_indices
from ltkd.errors import DataError, UsageError

COUNTS = {"ant": 6, "bee": 2, "cat": 4}


def make_tree(root: Path, counts: dict[str, int], size_px: tuple[int, int] = (12, 12)) -> Path:
    """Make images whose red level identifies them: 40 times the label plus the number of the image."""
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


def load(data: Path | str, gamma: float | None = None, groups: str = "share", input_px: int | None = None) -> Dataset:
    return load_dataset(data_config(str(data), gamma, groups, input_px))


def levels(data: Dataset) -> list[int]:
    return sorted(data.train_images[:][:, 0, 0, 0].tolist())


def test_a_tree_is_loaded_with_all_its_images(tree: Path) -> None:
    data = load(tree)
    assert data.task.class_names == ("ant", "bee", "cat")
    assert data.task.train_counts == (6, 2, 4)
    assert [data.task.group_name(label) for label in range(3)] == ["head", "tail", "medium"]
    assert data.task.input_px == 12
    assert levels(data) == [0, 1, 2, 3, 4, 5, 40, 41, 80, 81, 82, 83]
    assert np.array_equal(data.train_images[:][:, 0, 0, 0] // 40, data.train_labels)
    assert data.test_images[:].shape == (3, 12, 12, 3)
    assert data.test_labels.tolist() == [0, 1, 2]
    assert data.mirror


def test_gamma_makes_a_tree_long_tailed(tree: Path) -> None:
    data = load(tree, gamma=6)
    assert data.task.train_counts == (6, 2, 1)
    assert data.train_labels.tolist() == [0] * 6 + [1] * 2 + [2]
    assert len(data.test_labels) == 3


def test_channel_statistics_are_computed_from_the_images_that_are_kept(tree: Path) -> None:
    for gamma in (None, 6):
        data = load(tree, gamma=gamma)
        unit = data.train_images[:].reshape(-1, 3) / 255
        assert data.task.mean == pytest.approx(unit.mean(axis=0), abs=5e-5)  # rounded to four digits
        # the lower bound avoids a division by zero for channels of one value
        assert data.task.std == pytest.approx(np.maximum(unit.std(axis=0), 1e-3), abs=5e-5)


def test_images_of_one_square_size_keep_it_and_others_are_resized_to_64(tmp_path: Path) -> None:
    assert load(make_tree(tmp_path / "wide", COUNTS, (20, 12))).task.input_px == 64
    assert load(make_tree(tmp_path / "large", COUNTS, (225, 225))).task.input_px == 64
    tree = make_tree(tmp_path / "mixed", COUNTS)
    Image.new("RGB", (16, 16)).save(tree / "train" / "bee" / "000.png")
    assert load(tree).task.input_px == 64


def test_the_size_can_be_set(tree: Path) -> None:
    data = load(tree, input_px=9)
    assert (data.task.input_px, data.train_images[:].shape) == (9, (12, 9, 9, 3))


@pytest.mark.parametrize("input_px", [None, 12, 128])
def test_every_unreadable_image_of_both_sets_is_counted_and_named(tree: Path, input_px: int | None) -> None:
    for name, content in {"train/ant/001.png": b"text", "train/bee/000.png": b"\x89PNG\r\n\x1a\n"}.items():
        (tree / name).write_bytes(content)
    (tree / "test" / "cat" / "000.png").unlink()
    (tree / "test" / "cat" / "000.png").mkdir()
    expected = (
        r"3 of 15 images are unreadable; .*ant/001\.png: .*not a.*bee/000\.png: .*test/cat/000\.png: .*cannot be read"
    )
    with pytest.raises(DataError, match=expected) as error:
        load(tree, input_px=input_px)
    assert "\n" not in str(error.value)
    for path in tree.glob("train/*/*.png"):
        path.write_bytes(b"text")
    with pytest.raises(DataError, match=r"13 of 15 images are unreadable") as error:
        load(tree, input_px=input_px)
    assert str(error.value).count(".png: ") == 13


@pytest.mark.parametrize("input_px", [12, 128])
def test_unreadable_images_are_left_out_with_skip_unreadable(tree: Path, input_px: int) -> None:
    whole = load(tree, input_px=input_px)
    for name in ("train/ant/001.png", "train/ant/005.png", "train/cat/000.png"):
        (tree / name).write_bytes(b"text")
    data = load_dataset(data_config(str(tree), None, "share", input_px, skip_unreadable=True))
    assert (whole.skipped, data.skipped) == (0, 3)
    assert data.task.train_counts == (4, 2, 3)
    assert data.train_labels.tolist() == [0] * 4 + [1] * 2 + [2] * 3
    assert levels(data) == [0, 2, 3, 4, 40, 41, 81, 82, 83]
    assert data.train_files is not None
    assert whole.train_files is not None
    assert len(data.train_files) == 9
    assert set(whole.train_files) - set(data.train_files) == {
        tree / "train" / "ant" / "001.png", tree / "train" / "ant" / "005.png", tree / "train" / "cat" / "000.png",
    }  # fmt: skip
    unit = data.train_images[:].reshape(-1, 3) / 255
    assert data.task.mean == pytest.approx(unit.mean(axis=0), abs=5e-5)  # rounded to four digits


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_readable_images_is_rejected_even_with_skip_unreadable(tree: Path, split: str) -> None:
    for path in (tree / split / "bee").iterdir():
        path.write_bytes(b"text")
    with pytest.raises(DataError, match=rf"1 class\(es\) have no readable {split} image: bee"):
        load_dataset(data_config(str(tree), None, "share", None, skip_unreadable=True))


def test_images_outside_the_long_tailed_subset_are_not_opened(tree: Path) -> None:
    kept = load(tree, gamma=6)
    assert kept.train_files is not None
    for path in set(tree.glob("train/*/*.png")) - set(kept.train_files):
        path.write_bytes(b"text")
    assert load(tree, gamma=6, input_px=12).task == kept.task


def test_the_files_of_training_images_are_known_by_position(tree: Path) -> None:
    data = load(tree, gamma=3)
    assert data.train_files is not None
    for row, path in enumerate(data.train_files):
        assert np.array_equal(data.train_images[row : row + 1][0], load_image(path, Preprocessing(input_px=12)))


def test_small_images_are_held_in_memory_and_larger_ones_stay_on_disk_with_the_same_pixels(tree: Path) -> None:
    assert isinstance(load(tree, input_px=96).train_images, np.ndarray)
    data = load(tree, input_px=97)
    for images, files in ((data.train_images, data.train_files), (data.test_images, None)):
        assert isinstance(images, FileImages)
        assert files is None or images.paths == files
        np.testing.assert_array_equal(
            images[:], [load_image(path, Preprocessing(input_px=97)) for path in images.paths]
        )
    unit = data.train_images[:].reshape(-1, 3) / 255
    assert data.task.mean == pytest.approx(unit.mean(axis=0), abs=5e-5)  # rounded to four digits


def test_progress_is_reported_after_every_file(tree: Path) -> None:
    calls: list[tuple[int, int]] = []
    load_dataset(data_config(str(tree), None, "share", None), lambda checked, total: calls.append((checked, total)))
    assert calls == [(num_checked, 15) for num_checked in range(1, 16)]


def test_files_that_are_not_images_are_ignored(tree: Path) -> None:
    (tree / "train" / "ant" / "notes.txt").write_text("hello")
    (tree / "train" / ".cache").mkdir()
    (tree / "train" / "README").write_text("hello")
    assert load(tree).task.train_counts == (6, 2, 4)


def test_a_class_without_images_is_rejected(tree: Path) -> None:
    (tree / "train" / "dog").mkdir()
    with pytest.raises(DataError, match=r"classes without images .*: dog; add images or remove"):
        load(tree)


def test_different_classes_in_train_and_test_are_rejected(tree: Path) -> None:
    (tree / "train" / "cat").rename(tree / "train" / "kat")
    with pytest.raises(DataError, match="only in train: kat; only in test: cat"):
        load(tree)


def test_a_directory_without_train_or_test_is_rejected(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train does not exist; the directory needs train/CLASS/ and test/CLASS/"):
        load(tmp_path)
    (tree / "test").rename(tree / "elsewhere")
    with pytest.raises(DataError, match="test does not exist"):
        load(tree)


def test_a_tree_with_val_and_without_test_uses_val_as_the_test_set(tree: Path) -> None:
    (tree / "test").rename(tree / "val")
    data = load(tree)
    assert (data.task.train_counts, data.test_labels.tolist()) == ((6, 2, 4), [0, 1, 2])


def test_tiny_imagenet_is_recognised_by_its_layout(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    wnids = ("n03", "n01", "n02")
    for wnid in wnids:
        (root / "train" / wnid / "images").mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (64, 64), (number, 0, 0)).save(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG")
    (root / "val" / "images").mkdir(parents=True)
    for number in range(3):
        Image.new("L", (64, 64), number).save(root / "val" / "images" / f"val_{number}.JPEG")  # some are grey
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))
    annotations = [f"val_{number}.JPEG\t{wnid}\t0\t0\t63\t63\n" for number, wnid in enumerate(wnids)]
    (root / "val" / "val_annotations.txt").write_text("".join(annotations))
    config = data_config(str(root), None, "share", None)
    assert (config.name, config.gamma, config.root) == ("tinyimagenet", 100, root)
    data = load_dataset(config)
    assert data.task.class_names == ("n01", "n02", "n03")
    assert (data.task.input_px, data.task.train_counts) == (64, (5, 1, 1))
    assert data.test_labels.tolist() == [2, 0, 1]
    assert load(root, gamma=1, input_px=32).task.train_counts == (5, 5, 5)


def test_lists_are_resolved_so_that_another_directory_can_load_them(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "train.txt").write_text(
        "".join(f"train/ant/00{n}.png 2\n" for n in range(5)) + "train/bee/000.png 0\ntrain/cat/001.png 1\n"
    )
    (tree / "test.txt").write_text("test/ant/000.png 2\ntest/bee/000.png 0\ntest/cat/000.png 1\n")
    monkeypatch.chdir(tree)
    config = data_config(".", None, "share", None, train_list=Path("train.txt"), test_list=Path("test.txt"))
    monkeypatch.chdir(tree.parent)
    assert (config.name, config.gamma) == ("lists", None)  # such lists are already long-tailed
    assert DataConfig.model_validate_json(config.model_dump_json()) == config
    data = load_dataset(config)
    assert (data.task.class_names, data.task.train_counts) == (("bee", "cat", "ant"), (1, 1, 5))
    assert levels(data) == [0, 1, 2, 3, 4, 40, 81]
    assert data.test_labels.tolist() == [2, 0, 1]
    held = load_dataset(config.model_copy(update={"holdout": 0.4}))
    assert (held.task.train_counts, held.test_labels.tolist()) == ((1, 1, 3), [2, 2])


def test_one_list_without_the_other_and_lists_without_a_directory_are_rejected(tree: Path) -> None:
    with pytest.raises(UsageError, match="the train list was given without the test list"):
        data_config(str(tree), None, "share", None, train_list=tree / "train.txt")
    with pytest.raises(UsageError, match="the test list was given without the train list"):
        data_config(str(tree), None, "share", None, test_list=tree / "test.txt")
    with pytest.raises(UsageError, match=r"'glyphs' is not a data set .* and not a directory"):
        data_config("glyphs", None, "share", None, train_list=tree / "a", test_list=tree / "b")
    (tree / "one.txt").write_text("train/ant/000.png 0\n")
    one = data_config(str(tree), None, "share", None, train_list=tree / "one.txt", test_list=tree / "one.txt")
    with pytest.raises(DataError, match=r"one\.txt has one class"):
        load_dataset(one)


def test_a_path_that_is_not_utf_8_is_rejected_with_an_error_that_can_be_printed() -> None:
    with pytest.raises(UsageError, match=r"'caf\\udce9' is not valid UTF-8") as error:
        data_config("caf\udce9", None, "share", None)
    str(error.value).encode()


@pytest.mark.parametrize("holdout", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("input_px", [None, 100])
def test_a_small_tree_with_a_class_of_two_images_works_with_and_without_a_holdout(
    tmp_path: Path, holdout: float, input_px: int | None
) -> None:
    root = write_tree(tmp_path, train_counts=(26, 12, 2), num_test=3)
    data = load_dataset(data_config(str(root), None, "share", input_px, holdout))
    assert min(data.task.train_counts) >= 1
    assert min(np.bincount(data.test_labels, minlength=3)) >= 1
    assert data.task.groups.names == ("head", "medium", "tail")
    assert np.bincount(data.train_labels).tolist() == list(data.task.train_counts)
    batches = make_batches(data, batch_size=64, seed=0, device=torch.device("cpu"), workers=0)
    ((pixels, rows),) = batches.epoch(0)
    assert pixels.shape == (len(data.train_labels), *data.train_images[:1].shape[1:])
    assert sorted(rows.tolist()) == list(range(len(data.train_labels)))


def test_one_class_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 1 class folder; a classifier needs at least two"):
        load(make_tree(tmp_path / "photos", {"ant": 3}))


def test_two_classes_need_a_partition_into_two_groups(tmp_path: Path) -> None:
    two = make_tree(tmp_path / "photos", {"ant": 3, "bee": 1})
    with pytest.raises(DataError, match="2 classes cannot fill 3 groups"):
        load(two)
    assert load(two, groups="quantile:2").task.groups.names == ("q1", "q2")


def test_the_error_for_an_unknown_data_set_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'imagenet' is not a data set \(glyphs, cifar100\) and not a directory"):
        data_config("imagenet", None, "share", None)
    with pytest.raises(UsageError, match="unknown data set 'imagenet'; known: glyphs, cifar100"):
        load_dataset(DataConfig(name="imagenet"))


@pytest.mark.parametrize(
    ("gamma", "input_px"), [(0.5, None), (0.0, None), (float("nan"), None), (float("inf"), None), (None, 0), (None, -3)]
)
def test_options_outside_their_range_are_rejected(gamma: float | None, input_px: int | None) -> None:
    with pytest.raises(UsageError, match="got"):
        data_config("glyphs", gamma, "share", input_px)


@pytest.mark.parametrize("groups", ["thirds", "quantile", "quantile:1", "quantile:x", "quantile:-2", ""])
def test_the_error_for_an_unknown_partition_lists_the_known_ones(tree: Path, groups: str) -> None:
    with pytest.raises(UsageError, match=r"unknown groups .*; known: share, count, quantile:K with K >= 2, or"):
        load(tree, groups=groups)


def test_groups_by_count_use_the_counts_after_long_tailed_sampling(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "photos", {"ant": 25, "bee": 25}, size_px=(1, 1))
    with pytest.raises(DataError, match="fall into the group 'medium'"):
        load(tree, groups="count")
    assert load(tree, gamma=5, groups="count").task.groups.names == ("medium", "few")


def test_a_mapping_of_groups_is_resolved_so_that_another_directory_can_load_it(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "groups.json").write_text(json.dumps({"wings": ["bee", "ant"], "tür": ["cat"]}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = data_config("photos", None, "groups.json", None)
    monkeypatch.chdir(tree)
    groups = load_dataset(config).task.groups
    assert (groups.names, groups.group_of_class) == (("wings", "tür"), (0, 0, 1))


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", '{"a": "ant", "b": ["bee", "cat"]}', '{"a": [["ant"]]}', "3"])
def test_a_file_that_is_not_a_mapping_of_groups_is_rejected(tree: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "groups.json").write_text(content)
    with pytest.raises(
        DataError, match=r"groups\.json is not a mapping .*expected \{group: \[class, \.\.\.\]"
    ) as error:
        load(tree, groups=str(tmp_path / "groups.json"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("input_px", [12, 128])
def test_images_are_decoded_as_the_configuration_states_and_full_if_it_states_nothing(
    tmp_path: Path, input_px: int
) -> None:
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8))
    tree = make_tree(tmp_path, {"ant": 1, "bee": 1, "cat": 1}, (12, 12))
    for png in list(tree.rglob("*.png")):
        coarse.resize((1200, 900), Image.Resampling.BICUBIC).save(png.with_suffix(".jpg"), quality=95)
        png.unlink()
    new = data_config(str(tree), None, "share", input_px)
    assert new.resizing == Resizing()
    before = DataConfig.model_validate(new.model_dump(exclude={"resizing"}))
    bicubic = new.model_copy(update={"resizing": Resizing(interpolation="bicubic", crop_ratio=0.5)})
    file = next((tree / "test").rglob("*.jpg"))
    pixels = []
    for config in (new, before, bicubic):
        data = load_dataset(config)
        assert data.task.preprocessing == Preprocessing(input_px=input_px, **dict(config.resizing))
        pixels.append(data.test_images[:1][0])
        assert np.array_equal(pixels[-1], decode_image(file.read_bytes(), data.task.preprocessing).pixels_SS3)
    assert before.resizing == FULL_DECODING
    assert not any(np.array_equal(pixels[a], pixels[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_a_mapping_without_one_of_the_classes_is_rejected(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "groups.json").write_text('{"a": ["ant"], "b": ["bee"]}')
    with pytest.raises(DataError, match="without a group: cat"):
        load(tree, groups=str(tmp_path / "groups.json"))


def test_glyphs_have_47_classes_a_gamma_of_100_and_a_balanced_test_set() -> None:
    config = data_config("glyphs", None, "share", None)
    assert config.gamma == 100
    source = glyphs_source(config)
    counts = long_tailed_counts(np.bincount(source.train_labels_N).tolist(), 100)
    assert (len(counts), max(counts), min(counts)) == (47, 300, 3)
    assert set(np.bincount(source.test_labels_N).tolist()) == {72}
    assert len(source.test_labels_N) >= 3000
    assert not source.mirror


def test_glyphs_have_the_same_bytes_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glyphs, "TRAIN_PER_CLASS", 3)  # the full set takes seconds to render
    monkeypatch.setattr(glyphs, "TEST_PER_CLASS", 1)
    first, again = load("glyphs", gamma=3), load("glyphs", gamma=3)
    assert first.task == again.task
    assert first.train_images[:].tobytes() == again.train_images[:].tobytes()
    assert first.test_images[:].tobytes() == again.test_images[:].tobytes()
    assert (len(first.train_labels), len(first.test_labels)) == (sum(first.task.train_counts), 47)
    distinct = {image.tobytes() for image in np.concatenate([first.train_images[:], first.test_images[:]])}
    assert len(distinct) == len(first.train_labels) + 47  # no test image is a training image
    kept = long_tailed_indices(np.repeat(np.arange(47), 3), first.task.train_counts)[0]
    assert np.array_equal(first.train_images[:][0], glyphs.render_glyphs(np.array([0]), np.array([kept]), split=0)[0])


@pytest.mark.parametrize(("name", "size_px"), [("glyphs", 24), ("cifar100", 32)])
def test_data_sets_of_a_fixed_size_reject_another_size(name: str, size_px: int) -> None:
    with pytest.raises(UsageError, match=f"{size_px} px wide, got --input-px 48; leave the option out"):
        DATASETS[name](DataConfig(name=name, input_px=48))


def test_the_error_for_cifar100_without_a_network_explains_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR100

    with socket.socket() as closed:  # bound and not listening, so connections are refused
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(CIFAR100, "url", f"http://127.0.0.1:{closed.getsockname()[1]}/cifar.tar.gz")
        for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(variable, raising=False)
        with pytest.raises(DataError, match=r"not be downloaded .*Put the directory cifar-100-python") as error:
            cifar100_source(DataConfig(name="cifar100", root=tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


PHOTOGRAPHS = ("apple", "bicycle", "woman")
TAR = Path(__file__).resolve().parents[4] / "shared" / "data" / "cifar100.tar"


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
            members = [member for member in tar if member.isfile() and member.name.split("/")[-2] in PHOTOGRAPHS]
            tar.extractall(root, members, filter="data")
    else:
        pytest.skip("no photographs: set CIFAR100_TREE to a tree of CIFAR-100 with train/CLASS/ and test/CLASS/")
    return root


@pytest.mark.slow
def test_photographs_are_loaded_at_their_own_size_and_with_the_published_subset(photographs: Path) -> None:
    data = load(photographs, gamma=10)
    assert data.task.class_names == PHOTOGRAPHS
    assert (data.task.train_counts, data.task.input_px, len(data.test_labels)) == ((500, 158, 50), 32, 300)
    files = sorted((photographs / "train" / "apple").iterdir())
    for row, position in enumerate([90, 254, 283]):  # the first images of class 0 in the published subsets
        assert np.array_equal(data.train_images[:][row], load_image(files[position], Preprocessing(input_px=32)))
    assert all(0.3 < mean < 0.8 for mean in data.task.mean)
    assert all(0.2 < std < 0.4 for std in data.task.std)


def test_a_holdout_replaces_the_test_set_and_no_image_is_in_both(tmp_path: Path) -> None:
    root = write_tree(tmp_path, train_counts=(20, 10, 2))
    whole = load_dataset(data_config(str(root), None, "share", None))
    held = load_dataset(data_config(str(root), None, "share", None, holdout=0.2))
    assert held.task.train_counts == (1, 8, 16)  # blue, green, red
    assert np.bincount(held.test_labels).tolist() == [1, 2, 4]
    train, test = ({image.tobytes() for image in images} for images in (held.train_images[:], held.test_images[:]))
    assert not train & test
    assert train | test == {image.tobytes() for image in whole.train_images[:]}
