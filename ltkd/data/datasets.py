"""Data sets by name: labelled images, optionally long-tailed, with their class groups.

``load_dataset`` finds the images (``formats``), draws the long-tailed subset (``long_tail``), decodes every file once
(``image_files``) and groups the classes. ``batches`` turns the result into training batches.

Shape legend: N images, B of them, S side in pixels, L = 256 levels of a channel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from ltkd.config import DataConfig
from ltkd.contract.class_groups import (
    ClassGroups,
    groups_by_count,
    groups_by_mapping,
    groups_by_quantile,
    groups_by_share,
)
from ltkd.contract.preprocessing import Resizing
from ltkd.contract.task import Task
from ltkd.data.formats import DATASETS, Statistics, is_tiny_imagenet, is_utf8
from ltkd.data.image_files import FileImages, Images, channel_levels, check_files, unreadable_error
from ltkd.data.long_tail import long_tailed_counts, long_tailed_indices
from ltkd.errors import DataError, UsageError

IN_MEMORY_PX = 96
"""Images up to this side are held in memory; larger ones are read from their files whenever they are needed."""
BENCHMARK_GAMMA = 100.0

_MAPPING = TypeAdapter(dict[str, list[str]])


@dataclass(frozen=True)
class Dataset:
    """Images and the task they define.

    Attributes:
        task: Classes, groups and preprocessing.
        train_images: N training images; an array if they are in memory.
        train_labels: int64 [N].
        test_images: The test images, likewise.
        test_labels: int64, one per test image.
        mirror: Whether training may mirror the images.
        train_files: The file of every training image; None if the images are not files.
        skipped: Number of unreadable files left out of both sets.
    """

    task: Task
    train_images: Images
    train_labels: NDArray[np.int64]
    test_images: Images
    test_labels: NDArray[np.int64]
    mirror: bool
    train_files: tuple[Path, ...] | None = None
    skipped: int = 0


def load_dataset(config: DataConfig, on_file: Callable[[int, int], None] = lambda num_checked, total: None) -> Dataset:
    """Load a data set, draw its long-tailed subset, and group its classes by the images that remain.

    Every file that will be used is decoded once here, so damaged files are reported before training starts.

    Args:
        config: The data set and its options.
        on_file: Called after every file with the number of files checked and the number of all files.

    Raises:
        UsageError: The name of the data set or the partition is unknown.
        DataError: The images on disk cannot be used.
    """
    if config.name not in DATASETS:
        raise UsageError(f"unknown data set '{config.name}'; known: {', '.join(DATASETS)}, or the path of a directory.")
    source = DATASETS[config.name](config)
    num_classes = len(source.class_names)
    train_rows, test_rows = np.arange(len(source.train_labels_N)), np.arange(len(source.test_labels_N))
    test_images, test_labels = source.test_images, source.test_labels_N
    if config.holdout:  # the real test set is never read
        train_rows, test_rows = held_out(source.train_labels_N, num_classes, config.holdout)
        test_images, test_labels = source.train_images, source.train_labels_N
    available = np.bincount(source.train_labels_N[train_rows], minlength=num_classes).tolist()
    counts = available if config.gamma is None else long_tailed_counts(available, config.gamma)
    kept = train_rows[long_tailed_indices(source.train_labels_N[train_rows], counts)]

    total = len(kept) + len(test_rows)
    train = _read(
        source.train_images,
        source.train_labels_N,
        kept,
        levels=source.mean_std is None,
        on_file=lambda num_checked: on_file(num_checked, total),
    )
    test = _read(
        test_images,
        test_labels,
        test_rows,
        levels=False,
        on_file=lambda num_checked: on_file(len(kept) + num_checked, total),
    )
    problems = (*train.problems, *test.problems)
    if problems and not config.skip_unreadable:
        raise unreadable_error(problems, total)
    _reject_lost_classes(source.class_names, train=train, test=test)
    counts = np.bincount(train.labels_N, minlength=num_classes).tolist()
    mean, std = source.mean_std or _statistics(train)
    task = Task(
        class_names=source.class_names,
        train_counts=tuple(counts),
        groups=_groups(config.groups, counts, list(source.class_names)),
        input_px=train.images[:1].shape[1],
        mean=mean,
        std=std,
        resizing=config.resizing,
    )
    return Dataset(
        task, train.images, train.labels_N, test.images, test.labels_N, source.mirror, train.files, len(problems)
    )


def held_out(
    labels_N: NDArray[np.int64], num_classes: int, share: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split positions into training images and held-out images that replace the test set, both sorted.

    ``share`` of every class is held out, at least one image if the class has two. Every class keeps at least one.
    """
    generator = np.random.RandomState(0)  # the split is fixed and does not depend on the seed of a training
    parts = []
    for label in range(num_classes):
        positions = np.flatnonzero(labels_N == label)
        generator.shuffle(positions)
        parts.append(positions[: min(math.ceil(share * len(positions)), len(positions) - 1)])
    held = np.sort(np.concatenate(parts))
    return np.setdiff1d(np.arange(len(labels_N)), held), held


def data_config(
    data: str,
    gamma: float | None,
    groups: str,
    input_px: int | None,
    holdout: float = 0.0,
    *,
    skip_unreadable: bool = False,
    train_list: Path | None = None,
    test_list: Path | None = None,
) -> DataConfig:
    """Build the data configuration from the options of a command.

    ``data`` is the name of a data set or the path of a directory: a class-folder tree, an unpacked TinyImageNet
    archive, or the root of the paths in the two lists. Without ``gamma``, the balanced benchmarks get a tail of 100
    and a user's own images are all kept.
    """
    if gamma is not None and not 1 <= gamma < math.inf:
        raise UsageError(f"gamma is the largest class over the smallest, a number >= 1, got {gamma}.")
    if input_px is not None and input_px < 1:
        raise UsageError(f"--input-px is a side in pixels and must be at least 1, got {input_px}.")
    if not 0 <= holdout < 1:
        raise UsageError(f"--holdout is a fraction of the training images, at least 0 and below 1, got {holdout}.")
    if not is_utf8(data):
        raise UsageError(
            f"the path {data!r} is not valid UTF-8, so it cannot be written to the files of a run; rename it."
        )
    if groups not in ("share", "count") and Path(groups).is_file():
        groups = str(Path(groups).resolve())  # a run may be repeated from another directory
    config = DataConfig(
        name=data,
        gamma=gamma,
        holdout=holdout,
        groups=groups,
        input_px=input_px,
        resizing=Resizing(),
        skip_unreadable=skip_unreadable,
    )
    if train_list is not None or test_list is not None:
        return _with_lists(config, train_list, test_list)
    if data in _BY_NAME:
        return config.model_copy(update={"gamma": gamma or BENCHMARK_GAMMA})
    root = _directory(data)
    if is_tiny_imagenet(root):
        return config.model_copy(update={"name": "tinyimagenet", "root": root, "gamma": gamma or BENCHMARK_GAMMA})
    return config.model_copy(update={"name": "folder", "root": root})


def _with_lists(config: DataConfig, train_list: Path | None, test_list: Path | None) -> DataConfig:
    if train_list is None or test_list is None:
        given, missing = ("train", "test") if test_list is None else ("test", "train")
        raise UsageError(f"the {given} list was given without the {missing} list; give both, with paths below --data.")
    lists = {"train_list": train_list.resolve(), "test_list": test_list.resolve()}
    return config.model_copy(update={"name": "lists", "root": _directory(config.name), **lists})


def _directory(data: str) -> Path:
    if not Path(data).is_dir():
        raise UsageError(f"'{data}' is not a data set ({', '.join(_BY_NAME)}) and not a directory.")
    return Path(data).resolve()


_BY_NAME = ("glyphs", "cifar100")  # the others need a path


@dataclass(frozen=True)
class _Read:
    """The readable images of a set, after every file was checked."""

    images: Images
    labels_N: NDArray[np.int64]
    levels_3L: NDArray[np.int64] | None
    files: tuple[Path, ...] | None = None
    problems: tuple[str, ...] = ()
    lost: tuple[int, ...] = ()


def _read(
    images: Images,
    labels_N: NDArray[np.int64],
    rows: NDArray[np.int64],
    *,
    levels: bool,
    on_file: Callable[[int], None],
) -> _Read:
    """The images at ``rows``, in memory if they are small. All files are checked and the unreadable ones left out."""
    if not isinstance(images, FileImages):
        pixels_NSS3 = images[rows]
        levels_3L = sum(map(channel_levels, pixels_NSS3), np.zeros((3, 256), dtype=np.int64)) if levels else None
        return _Read(pixels_NSS3, labels_N[rows], levels_3L)
    files = images.take(rows)
    check = check_files(files, keep=images.size_px <= IN_MEMORY_PX, levels=levels, on_file=on_file)
    readable = np.setdiff1d(np.arange(len(rows)), list(check.problems))
    usable = files.take(readable) if check.problems else files
    kept: Images = usable
    if check.images_NSS3 is not None:
        kept = check.images_NSS3[readable] if check.problems else check.images_NSS3
    return _Read(
        kept,
        labels_N[rows[readable]],
        check.levels_3L,
        usable.paths,
        tuple(check.problems.values()),
        lost=tuple(np.setdiff1d(labels_N[rows], labels_N[rows[readable]]).tolist()),
    )


def _reject_lost_classes(class_names: tuple[str, ...], **splits: _Read) -> None:
    for split, read in splits.items():
        if read.lost:
            names = ", ".join(class_names[label] for label in read.lost[:5])
            raise DataError(f"{len(read.lost)} class(es) have no readable {split} image: {names}; repair the files.")


def _groups(partition: str, counts: list[int], class_names: list[str]) -> ClassGroups:
    if partition == "share":
        return groups_by_share(counts)
    if partition == "count":
        return groups_by_count(counts)
    kind, _, number = partition.partition(":")
    if kind == "quantile" and number.isdecimal() and int(number) >= 2:
        return groups_by_quantile(counts, int(number))
    if Path(partition).is_file():
        try:
            mapping = _MAPPING.validate_json(Path(partition).read_bytes())
        except ValidationError as reason:
            problem = reason.errors()[0]["msg"]
            raise DataError(
                f"{partition} is not a mapping ({problem}); expected {{group: [class, ...], ...}}."
            ) from None
        return groups_by_mapping(class_names, mapping)
    raise UsageError(
        f"unknown groups '{partition}'; known: share, count, quantile:K with K >= 2, or the path of a JSON file."
    )


def _statistics(read: _Read) -> Statistics:
    """Channel means and standard deviations of images scaled to 0..1, rounded to four digits."""
    levels_3L = read.levels_3L
    assert levels_3L is not None, "levels are counted if no statistics are given"
    share_3L, level_L = levels_3L / levels_3L.sum(1, keepdims=True), np.arange(256) / 255
    mean = share_3L @ level_L
    variance = (share_3L * (level_L - mean[:, None]) ** 2).sum(1)
    std = np.maximum(np.sqrt(variance), 1e-3)  # avoids a division by zero for images of one colour
    (m0, m1, m2), (s0, s1, s2) = mean.round(4).tolist(), std.round(4).tolist()
    return (m0, m1, m2), (s0, s1, s2)
