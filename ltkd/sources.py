"""Where labelled images come from: rendered, downloaded, or files on disk.

Shape legend: N images, S pixels a side.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ltkd import glyphs
from ltkd.config import DataConfig
from ltkd.errors import DataError, ImageError, UsageError
from ltkd.files import FileImages, Images
from ltkd.folders import Listing, class_folders, index_lists, tiny_imagenet
from ltkd.images import image_size_px

FALLBACK_INPUT_PX = 64

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]


@dataclass(frozen=True)
class Source:
    """A data set whose labels are known and whose images are made or read when asked for.

    Attributes:
        class_names: C names, in label order.
        train_labels_N: Class of every training image there is.
        test_labels_N: Class of every test image.
        train_images: All of them, by position.
        test_images: The same of the test set.
        mirror: Whether a mirrored image still shows its class.
        mean_std: Channel statistics by custom; None computes them from the training images that are kept.
    """

    class_names: tuple[str, ...]
    train_labels_N: NDArray[np.int64]
    test_labels_N: NDArray[np.int64]
    train_images: Images
    test_images: Images
    mirror: bool
    mean_std: Statistics | None = None


def glyphs_source(config: DataConfig) -> Source:
    """The embedded default: 47 classes of rendered characters, 24 x 24."""
    if config.input_px not in (None, glyphs.SIZE_PX):
        raise UsageError(
            f"glyphs are {glyphs.SIZE_PX} px wide, got --input-px {config.input_px}; leave the option out."
        )
    class_names = tuple(glyphs.class_names())

    def labels(per_class: int) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(class_names)), per_class)

    return Source(
        class_names,
        labels(glyphs.TRAIN_PER_CLASS),
        labels(glyphs.TEST_PER_CLASS),
        train_images=_Glyphs(len(class_names), glyphs.TRAIN_PER_CLASS, split=0),
        test_images=_Glyphs(len(class_names), glyphs.TEST_PER_CLASS, split=1),
        mirror=False,
    )


@dataclass(frozen=True)
class _Glyphs:
    """Glyphs by position, class after class, rendered when asked for."""

    num_classes: int
    per_class: int
    split: int

    def __len__(self) -> int:
        return self.num_classes * self.per_class

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        positions_N = np.arange(len(self))[rows]
        return glyphs.render_glyphs(positions_N // self.per_class, positions_N % self.per_class, self.split)


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
        tuple(train.classes),
        np.array(train.targets),
        np.array(test.targets),
        train_images=np.asarray(train.data),
        test_images=np.asarray(test.data),
        mirror=True,
        mean_std=((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    )


def folder_source(config: DataConfig) -> Source:
    """A tree with ``train/CLASS/*`` and ``test/CLASS/*`` (or ``val/``); images are brought to one square size.

    The size is ``input_px``; without it the images' own where the first of every class agree on a square of at
    most 224, otherwise 64.
    """
    assert config.root is not None, "data_config sets the root of a tree"
    listing = class_folders(config.root)
    if len(listing.class_names) < 2:
        raise DataError(
            f"{config.root / 'train'} has {len(listing.class_names)} class folder; a classifier needs at least two."
        )
    return _files_source(listing, config.input_px or _own_size_px(listing))


def tiny_imagenet_source(config: DataConfig) -> Source:
    """TinyImageNet as its archive unpacks: 200 classes of 500, tested on its 10,000 validation images, 64 x 64."""
    assert config.root is not None, "data_config sets the root"
    return _files_source(tiny_imagenet(config.root), config.input_px or 64)


def lists_source(config: DataConfig) -> Source:
    """Images that two lists of ``path label`` lines name, as ImageNet-LT is published; sizes as for a tree."""
    assert config.root and config.train_list and config.test_list, "data_config sets root and lists"
    listing = index_lists(config.root, config.train_list, config.test_list)
    if len(listing.class_names) < 2:
        raise DataError(f"{config.train_list} has one class; a classifier needs at least two.")
    return _files_source(listing, config.input_px or _own_size_px(listing))


def _files_source(listing: Listing, size_px: int) -> Source:
    return Source(
        listing.class_names,
        listing.train.labels_N,
        listing.test.labels_N,
        FileImages(listing.train.files, size_px),
        FileImages(listing.test.files, size_px),
        mirror=True,
    )


def _own_size_px(listing: Listing) -> int:
    """The size of the first image of every class where they agree; unreadable ones have no say."""
    _, first_of_class = np.unique(listing.train.labels_N, return_index=True)
    sizes = set()
    for row in first_of_class.tolist():
        with contextlib.suppress(ImageError):  # it is told with all the others when every file is looked at
            sizes.add(image_size_px(listing.train.files[row]))
    if len(sizes) == 1:
        width, height = sizes.pop()
        if width == height <= 224:
            return width
    return FALLBACK_INPUT_PX
