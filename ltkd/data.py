"""Data sets by name: labelled images in memory, long-tailed where asked, with their class groups.

Shape legend: N images, S pixels a side.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from ltkd import glyphs
from ltkd.config import DataConfig
from ltkd.errors import DataError, ImageError, UsageError
from ltkd.groups import ClassGroups, groups_by_count, groups_by_mapping, groups_by_quantile, groups_by_share
from ltkd.images import SUFFIXES, image_size_px, load_image
from ltkd.longtail import long_tailed_counts, long_tailed_indices
from ltkd.task import Task

LoadImages = Callable[[NDArray[np.int64]], NDArray[np.uint8]]
FALLBACK_INPUT_PX = 64

_MAPPING = TypeAdapter(dict[str, list[str]])


@dataclass(frozen=True)
class Source:
    """A data set whose labels are known and whose images are made or read when asked for.

    Attributes:
        class_names: C names, in label order.
        train_labels_N: Class of every training image there is.
        test_labels_N: Class of every test image.
        load_train: Positions to images, uint8 [N, S, S, 3].
        load_test: The same of the test set.
        mirror: Whether a mirrored image still shows its class.
        mean_std: Channel statistics by custom; None computes them from the training images that are kept.
    """

    class_names: list[str]
    train_labels_N: NDArray[np.int64]
    test_labels_N: NDArray[np.int64]
    load_train: LoadImages
    load_test: LoadImages
    mirror: bool
    mean_std: tuple[tuple[float, float, float], tuple[float, float, float]] | None = None


@dataclass(frozen=True)
class ImageData:
    """Images in memory and the task they define.

    Attributes:
        task: Classes, groups and preprocessing.
        train_images: uint8 [N, S, S, 3].
        train_labels: int64 [N].
        test_images: uint8 [N, S, S, 3].
        test_labels: int64 [N].
        mirror: Whether training may mirror the images.
    """

    task: Task
    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    mirror: bool


def load_data(config: DataConfig) -> ImageData:
    """Load a data set, cut its tail as asked, and group its classes by what is left.

    Raises:
        UsageError: The data set or the partition is not known.
        DataError: The images on disk are not usable.
    """
    if config.name not in DATASETS:
        raise UsageError(f"unknown data set '{config.name}'; known: {', '.join(DATASETS)}, or the path of a directory.")
    source = DATASETS[config.name](config)
    if config.holdout:
        source = with_holdout(source, config.holdout)
    available = np.bincount(source.train_labels_N, minlength=len(source.class_names)).tolist()
    counts = available if config.gamma is None else long_tailed_counts(available, config.gamma)
    kept = long_tailed_indices(source.train_labels_N, counts)
    train_images = source.load_train(kept)
    mean, std = source.mean_std or _channel_statistics(train_images)
    task = Task(
        class_names=tuple(source.class_names),
        train_counts=tuple(counts),
        groups=_groups(config.groups, counts, source.class_names),
        input_px=train_images.shape[1],
        mean=mean,
        std=std,
    )
    test_images = source.load_test(np.arange(len(source.test_labels_N)))
    return ImageData(task, train_images, source.train_labels_N[kept], test_images, source.test_labels_N, source.mirror)


def with_holdout(source: Source, share: float) -> Source:
    """The same training images with a share of every class as the test set; the real test set is never read.

    Every class keeps at least one image, and gives at least one where it has two.
    """
    generator = np.random.RandomState(0)  # one fixed split, whatever the seed of a training
    held_out = []
    for label in range(len(source.class_names)):
        positions = np.flatnonzero(source.train_labels_N == label)
        generator.shuffle(positions)
        held_out.append(positions[: min(math.ceil(share * len(positions)), len(positions) - 1)])
    held = np.sort(np.concatenate(held_out))
    kept = np.setdiff1d(np.arange(len(source.train_labels_N)), held)
    return replace(
        source,
        train_labels_N=source.train_labels_N[kept],
        test_labels_N=source.train_labels_N[held],
        load_train=lambda positions_N: source.load_train(kept[positions_N]),
        load_test=lambda positions_N: source.load_train(held[positions_N]),
    )


def data_config(data: str, gamma: float | None, groups: str, input_px: int | None, holdout: float = 0.0) -> DataConfig:
    """The configuration that a command's options stand for.

    ``data`` is the name of a data set or the path of a class-folder tree. Without ``gamma``, the balanced
    benchmarks are given a tail of 100 and a tree of the user's own is left as it is.
    """
    if gamma is not None and not 1 <= gamma < math.inf:
        raise UsageError(f"gamma is the largest over the smallest class, a number >= 1, got {gamma}.")
    if input_px is not None and input_px < 1:
        raise UsageError(f"--input-px is a side in pixels, at least 1, got {input_px}.")
    if not 0 <= holdout < 1:
        raise UsageError(f"--holdout is a share of the training images, at least 0 and below 1, got {holdout}.")
    if groups not in ("share", "count") and Path(groups).is_file():
        groups = str(Path(groups).resolve())  # a run is repeated from other directories, too
    if data in DATASETS and data != "folder":
        return DataConfig(name=data, gamma=gamma or 100.0, holdout=holdout, groups=groups, input_px=input_px)
    if not Path(data).is_dir():
        raise UsageError(
            f"'{data}' is no data set ({', '.join(n for n in DATASETS if n != 'folder')}) and no directory."
        )
    root = Path(data).resolve()
    return DataConfig(name="folder", root=root, gamma=gamma, holdout=holdout, groups=groups, input_px=input_px)


def glyphs_source(config: DataConfig) -> Source:
    """The embedded default: 47 classes of rendered characters, 24 x 24."""
    if config.input_px not in (None, glyphs.SIZE_PX):
        raise UsageError(
            f"glyphs are {glyphs.SIZE_PX} px wide, got --input-px {config.input_px}; leave the option out."
        )
    class_names = glyphs.class_names()

    def labels(per_class: int) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(class_names)), per_class)

    def load(positions_N: NDArray[np.int64], per_class: int, split: int) -> NDArray[np.uint8]:
        return glyphs.render_glyphs(positions_N // per_class, positions_N % per_class, split)

    return Source(
        class_names,
        labels(glyphs.TRAIN_PER_CLASS),
        labels(glyphs.TEST_PER_CLASS),
        load_train=lambda positions_N: load(positions_N, glyphs.TRAIN_PER_CLASS, split=0),
        load_test=lambda positions_N: load(positions_N, glyphs.TEST_PER_CLASS, split=1),
        mirror=False,
    )


def cifar100_source(config: DataConfig) -> Source:
    """CIFAR-100 through torchvision; downloaded into ``data/`` where a network allows it."""
    from torchvision.datasets import CIFAR100  # noqa: PLC0415  # only this data set needs torchvision

    if config.input_px not in (None, 32):
        raise UsageError(f"CIFAR-100 is 32 px wide, got --input-px {config.input_px}; leave the option out.")
    root = config.root or Path("data")
    try:
        train, test = (CIFAR100(str(root), train=is_train, download=True) for is_train in (True, False))
    except (OSError, RuntimeError) as reason:
        raise DataError(
            f"CIFAR-100 is not in {root} and could not be downloaded ({reason}). Put the directory "
            f"cifar-100-python there, or give --data the path of a tree with train/CLASS/ and test/CLASS/."
        ) from None
    return Source(
        list(train.classes),
        np.array(train.targets),
        np.array(test.targets),
        load_train=lambda positions_N: np.asarray(train.data[positions_N]),
        load_test=lambda positions_N: np.asarray(test.data[positions_N]),
        mirror=True,
        mean_std=((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    )


def folder_source(config: DataConfig) -> Source:
    """A tree with ``train/CLASS/*`` and ``test/CLASS/*``; images are brought to one square size.

    The size is ``input_px``; without it the images' own where the first of every class agree on a square of at
    most 224, otherwise 64.
    """
    assert config.root is not None, "data_config sets the root of a tree"
    train, test = _class_folders(config.root / "train"), _class_folders(config.root / "test")
    if train.keys() != test.keys():
        only = {"train": sorted(train.keys() - test.keys()), "test": sorted(test.keys() - train.keys())}
        seen = "; ".join(f"only in {split}: {', '.join(names[:5])}" for split, names in only.items() if names)
        raise DataError(f"{config.root}: train and test have different classes ({seen}); give both the same folders.")
    if len(train) < 2:
        raise DataError(f"{config.root / 'train'} has {len(train)} class folder; a classifier needs at least two.")
    size_px = config.input_px or _own_size_px([files[0] for files in train.values()])
    train_files, test_files = ([path for files in split.values() for path in files] for split in (train, test))
    return Source(
        list(train),
        np.repeat(np.arange(len(train)), [len(files) for files in train.values()]),
        np.repeat(np.arange(len(test)), [len(files) for files in test.values()]),
        load_train=lambda positions_N: _load_files([train_files[p] for p in positions_N], size_px),
        load_test=lambda positions_N: _load_files([test_files[p] for p in positions_N], size_px),
        mirror=True,
    )


DATASETS: dict[str, Callable[[DataConfig], Source]] = {
    "glyphs": glyphs_source,
    "cifar100": cifar100_source,
    "folder": folder_source,
}


def _class_folders(split: Path) -> dict[str, list[Path]]:
    """Class name to image files, both sorted."""
    if not split.is_dir():
        raise DataError(f"{split} does not exist; a tree needs train/CLASS/ and test/CLASS/ folders of images.")
    folders = sorted(path for path in split.iterdir() if path.is_dir() and not path.name.startswith("."))
    classes = {
        folder.name: sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES) for folder in folders
    }
    empty = [name for name, files in classes.items() if not files]
    if empty:
        raise DataError(
            f"{split} has classes without a single image ({', '.join(SUFFIXES)}): {', '.join(empty[:5])}; "
            "add images or remove the folders."
        )
    return classes


def _own_size_px(samples: list[Path]) -> int:
    sizes = {image_size_px(path) for path in samples}
    if len(sizes) == 1:
        width, height = sizes.pop()
        if width == height <= 224:
            return width
    return FALLBACK_INPUT_PX


def _load_files(paths: list[Path], size_px: int) -> NDArray[np.uint8]:
    """Decode files; every unreadable one is found before the error names them."""
    images_NSS3 = np.empty((len(paths), size_px, size_px, 3), dtype=np.uint8)
    problems = []
    for place, path in enumerate(paths):
        try:
            images_NSS3[place] = load_image(path, size_px)
        except ImageError as error:
            problems.append(str(error))
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise DataError(f"{len(problems)} unreadable image(s); repair or remove: {' | '.join(problems[:3])}{more}")
    return images_NSS3


def _groups(asked: str, counts: list[int], class_names: list[str]) -> ClassGroups:
    if asked == "share":
        return groups_by_share(counts)
    if asked == "count":
        return groups_by_count(counts)
    kind, _, number = asked.partition(":")
    if kind == "quantile" and number.isdecimal() and int(number) >= 2:
        return groups_by_quantile(counts, int(number))
    if Path(asked).is_file():
        try:
            mapping = _MAPPING.validate_json(Path(asked).read_bytes())
        except ValidationError as reason:
            problem = reason.errors()[0]["msg"]
            raise DataError(f"{asked} is no mapping ({problem}); expected {{group: [class, ...], ...}}.") from None
        return groups_by_mapping(class_names, mapping)
    raise UsageError(
        f"unknown groups '{asked}'; known: share, count, quantile:K with K >= 2, or the path of a JSON file."
    )


def _channel_statistics(
    images_NSS3: NDArray[np.uint8],
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Channel means and standard deviations of images scaled to 0..1, rounded to four digits."""
    histogram_3L = np.zeros((3, 256))  # not the pixels as floats, which take 8 times the memory of the images
    for image_SS3 in images_NSS3:
        histogram_3L += [np.bincount(image_SS3[..., channel].ravel(), minlength=256) for channel in range(3)]
    share_3L, level_L = histogram_3L / histogram_3L.sum(1, keepdims=True), np.arange(256) / 255
    mean = share_3L @ level_L
    variance = (share_3L * (level_L - mean[:, None]) ** 2).sum(1)
    std = np.maximum(np.sqrt(variance), 1e-3)  # images of one colour must not divide by zero
    (m0, m1, m2), (s0, s1, s2) = mean.round(4).tolist(), std.round(4).tolist()
    return (m0, m1, m2), (s0, s1, s2)
