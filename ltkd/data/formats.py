"""The data sets that can be loaded by name, and the layouts of image files on disk.

A layout is a tree of class folders, TinyImageNet's own, or lists of files with labels. The first half of the module
finds the files of a layout and their classes, without opening an image. The second half makes a ``DatasetSource`` of
each data set; ``DATASETS`` maps names to them, and ``datasets`` loads from there.
"""

import contextlib
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from ltkd.config import DataConfig
from ltkd.contract.image_decoding import SUFFIXES, image_size_px
from ltkd.contract.preprocessing import Preprocessing
from ltkd.data import glyphs
from ltkd.data.image_files import FileImages, Images
from ltkd.errors import DataError, ImageError, UsageError

NAMED = 10


@dataclass(frozen=True)
class Split:
    """Image files and their classes.

    Attributes:
        files: N paths.
        labels_N: Their classes.
    """

    files: tuple[Path, ...]
    labels_N: NDArray[np.int64]


@dataclass(frozen=True)
class FileListing:
    """The image files of a data set.

    Attributes:
        class_names: C names, in label order.
        train: Training images.
        test: Test images.
    """

    class_names: tuple[str, ...]
    train: Split
    test: Split


def class_folders(root: Path) -> FileListing:
    """List a tree of ``train/CLASS/*`` and ``test/CLASS/*``; the classes are the sorted names of the folders.

    If the tree has ``val/`` and no ``test/``, as is common for torchvision's ImageFolder, ``val/`` is the test set.

    Raises:
        DataError: The tree does not have this layout.
    """
    val = not (root / "test").is_dir() and (root / "val").is_dir()
    train, test = _class_folders(root / "train"), _class_folders(root / ("val" if val else "test"))
    if train.keys() != test.keys():
        only = {"train": sorted(train.keys() - test.keys()), "test": sorted(test.keys() - train.keys())}
        differences = "; ".join(f"only in {split}: {', '.join(names[:5])}" for split, names in only.items() if names)
        raise DataError(f"{root}: train and test have different classes ({differences}); give both the same folders.")
    return FileListing(tuple(train), _split(list(train.values())), _split(list(test.values())))


def is_tiny_imagenet(root: Path) -> bool:
    """Whether a directory is an unpacked TinyImageNet archive."""
    return (root / "wnids.txt").is_file() and (root / "val" / "val_annotations.txt").is_file()


def tiny_imagenet(root: Path) -> FileListing:
    """List ``train/WNID/images/*.JPEG`` and ``val/images/*.JPEG``, labelled by ``val/val_annotations.txt``.

    Classes are the sorted wnids, numbered as by ImageFolder. The archive's own ``test/`` has no labels, so the 10,000
    images of ``val/`` are the test set, as is customary.

    Raises:
        DataError: A class or a label is missing.
    """
    wnids = sorted((root / "wnids.txt").read_text(encoding="utf-8").split())
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    train = [_image_files(root / "train" / wnid / "images") for wnid in wnids]
    missing = [wnid for wnid, files in zip(wnids, train, strict=True) if not files]
    if missing:
        raise DataError(
            f"{root / 'train'} has no images of {len(missing)} of the {len(wnids)} classes in wnids.txt "
            f"({', '.join(missing[:5])}); unpack the archive again."
        )
    annotations = root / "val" / "val_annotations.txt"
    files, labels = [], []
    for number, line in enumerate(annotations.read_text(encoding="utf-8").splitlines(), start=1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in label_of:
            raise DataError(f"{annotations}, line {number}: expected FILE, tab, WNID of wnids.txt, got {line[:80]!r}.")
        files.append(root / "val" / "images" / name)
        labels.append(label_of[wnid])
    return FileListing(tuple(wnids), _split(train), Split(tuple(files), np.array(labels, dtype=np.int64)))


def index_lists(root: Path, train_list: Path, test_list: Path) -> FileListing:
    """List the images of two files of ``path label`` lines, the published form of ImageNet-LT.

    The paths are relative to ``root``. A class is named after the folder that holds all its training images, or after
    its label if they are in several folders. If two names would be equal, all classes are named after their labels.

    Raises:
        DataError: A list is missing or malformed, its labels do not run from 0 without a gap, or images are missing.
    """
    train, test = _read_list(root, train_list), _read_list(root, test_list)
    labels = np.unique(train.labels_N)
    num_classes = len(labels)
    if labels[-1] != num_classes - 1:
        gap = next(expected for expected, label in enumerate(labels.tolist()) if expected != label)
        raise DataError(
            f"{train_list} has labels up to {labels[-1]} but no image of {gap}; number the classes from 0 without gaps."
        )
    unknown = np.setdiff1d(test.labels_N, labels)
    if len(unknown):
        raise DataError(
            f"{test_list} has labels that are not in {train_list} ({', '.join(map(str, unknown[:5].tolist()))}); "
            "both lists must have the same classes."
        )
    absent = [path for split in (train, test) for path in split.files if not path.is_file()]
    if absent:
        more = f" (and {len(absent) - NAMED:,} more)" if len(absent) > NAMED else ""
        raise DataError(
            f"{len(absent):,} of the images in the lists do not exist below {root}: "
            f"{', '.join(str(path.relative_to(root)) for path in absent[:NAMED])}{more}; check the root directory."
        )
    return FileListing(checked_names(_names(root, train, num_classes), train_list), train, test)


def checked_names(names: Sequence[str], where: Path) -> tuple[str, ...]:
    """Check that class names can be printed and written to JSON, and return them.

    Raises:
        DataError: A name is not valid UTF-8 or has control characters.
    """
    for name in names:
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
            escaped = name.encode("unicode_escape", "surrogatepass").decode("ascii")
            raise DataError(f"{where} has a class whose name is not printable UTF-8: {escaped}; rename the folder.")
    return tuple(names)


def is_utf8(name: str) -> bool:
    """Whether a file name is valid UTF-8. If not, Python represents its bytes as lone surrogates."""
    return not any(unicodedata.category(character) == "Cs" for character in name)


def _class_folders(split: Path) -> dict[str, list[Path]]:
    """Class name to image files, both sorted."""
    if not split.is_dir():
        raise DataError(f"{split} does not exist; the directory needs train/CLASS/ and test/CLASS/ folders of images.")
    folders = sorted(path for path in split.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = checked_names([folder.name for folder in folders], split)
    classes = {name: _image_files(folder) for name, folder in zip(names, folders, strict=True)}
    empty = [name for name, files in classes.items() if not files]
    if empty:
        raise DataError(
            f"{split} has classes without images ({', '.join(SUFFIXES)}): {', '.join(empty[:5])}; "
            "add images or remove the folders."
        )
    return classes


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _split(files_by_class: Sequence[Sequence[Path]]) -> Split:
    counts = [len(files) for files in files_by_class]
    return Split(tuple(path for files in files_by_class for path in files), np.repeat(np.arange(len(counts)), counts))


def _read_list(root: Path, path: Path) -> Split:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as reason:
        raise DataError(f"{path} cannot be read ({reason}); expected a text file of 'PATH LABEL' lines.") from None
    files, labels = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, label = _name_and_label(line)
        if not name or label is None:
            raise DataError(
                f"{path}, line {number}: expected 'PATH LABEL' with a path below {root} and a label >= 0, "
                f"got {line[:80]!r}."
            )
        files.append(root / name)
        labels.append(label)
    if not files:
        raise DataError(f"{path} lists no images; expected 'PATH LABEL' lines.")
    return Split(tuple(files), np.array(labels, dtype=np.int64))


def _name_and_label(line: str) -> tuple[str, int | None]:
    """The path and label of a line; the path is empty or the label None if it is not valid."""
    name, _, label = line.strip().replace("\t", " ").rpartition(" ")
    path = PurePosixPath(name.strip())
    is_below_root = not path.is_absolute() and ".." not in path.parts
    is_number = label.isascii() and label.isdecimal() and len(label) < 10
    return str(path) if name and is_below_root else "", int(label) if is_number else None


def _names(root: Path, train: Split, num_classes: int) -> tuple[str, ...]:
    folders: list[set[str]] = [set() for _ in range(num_classes)]
    for path, label in zip(train.files, train.labels_N.tolist(), strict=True):
        folders[label].add(path.parent.name if path.parent != root else str(label))
    names = [next(iter(parents)) if len(parents) == 1 else str(label) for label, parents in enumerate(folders)]
    return tuple(names) if len(set(names)) == num_classes else tuple(map(str, range(num_classes)))


FALLBACK_INPUT_PX = 64

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]


@dataclass(frozen=True)
class DatasetSource:
    """A whole data set: labels in memory, images that are rendered or read on access.

    Attributes:
        class_names: C names, in label order.
        train_labels_N: Class of every training image.
        test_labels_N: Class of every test image.
        train_images: All training images, by position.
        test_images: All test images, by position.
        mirror: Whether a mirrored image still shows its class.
        mean_std: The customary channel statistics; None computes them from the training images that are kept.
    """

    class_names: tuple[str, ...]
    train_labels_N: NDArray[np.int64]
    test_labels_N: NDArray[np.int64]
    train_images: Images
    test_images: Images
    mirror: bool
    mean_std: Statistics | None = None


def glyphs_source(config: DataConfig) -> DatasetSource:
    """The built-in default data set: 47 classes of rendered characters, 24 x 24."""
    if config.input_px not in (None, glyphs.SIZE_PX):
        raise UsageError(
            f"glyphs are {glyphs.SIZE_PX} px wide, got --input-px {config.input_px}; leave the option out."
        )
    class_names = tuple(glyphs.class_names())

    def labels(per_class: int) -> NDArray[np.int64]:
        return np.repeat(np.arange(len(class_names)), per_class)

    return DatasetSource(
        class_names,
        labels(glyphs.TRAIN_PER_CLASS),
        labels(glyphs.TEST_PER_CLASS),
        train_images=_Glyphs(len(class_names), glyphs.TRAIN_PER_CLASS, split=0),
        test_images=_Glyphs(len(class_names), glyphs.TEST_PER_CLASS, split=1),
        mirror=False,
    )


@dataclass(frozen=True)
class _Glyphs:
    """Glyphs by position, class after class, rendered on access."""

    num_classes: int
    per_class: int
    split: int

    def __len__(self) -> int:
        return self.num_classes * self.per_class

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        positions_N = np.arange(len(self))[rows]
        return glyphs.render_glyphs(positions_N // self.per_class, positions_N % self.per_class, self.split)


def cifar100_source(config: DataConfig) -> DatasetSource:
    """CIFAR-100 through torchvision, which downloads it into ``data/`` if it is not there."""
    from torchvision.datasets import CIFAR100  # noqa: PLC0415  # only this data set needs torchvision

    if config.input_px not in (None, 32):
        raise UsageError(f"CIFAR-100 is 32 px wide, got --input-px {config.input_px}; leave the option out.")
    root = config.root or Path("data")
    try:
        train, test = (CIFAR100(str(root), train=is_train, download=True) for is_train in (True, False))
    except (OSError, RuntimeError) as reason:
        raise DataError(
            f"CIFAR-100 is not in {root} and could not be downloaded ({reason}). Put the directory "
            f"cifar-100-python there, or pass --data the path of a directory with train/CLASS/ and test/CLASS/."
        ) from None
    return DatasetSource(
        tuple(train.classes),
        np.array(train.targets),
        np.array(test.targets),
        train_images=np.asarray(train.data),
        test_images=np.asarray(test.data),
        mirror=True,
        mean_std=((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    )


def folder_source(config: DataConfig) -> DatasetSource:
    """A tree with ``train/CLASS/*`` and ``test/CLASS/*`` (or ``val/``); images are resized to one square size.

    The size is ``input_px``. Without it, the size is that of the first image of every class if they all have the same
    square size of at most 224, otherwise 64.
    """
    assert config.root is not None, "data_config sets the root of a tree"
    listing = class_folders(config.root)
    if len(listing.class_names) < 2:
        raise DataError(
            f"{config.root / 'train'} has {len(listing.class_names)} class folder; a classifier needs at least two."
        )
    return _files_source(listing, config, config.input_px or _own_size_px(listing))


def tiny_imagenet_source(config: DataConfig) -> DatasetSource:
    """TinyImageNet: 200 classes of 500 images, 64 x 64; its 10,000 validation images are the test set."""
    assert config.root is not None, "data_config sets the root"
    return _files_source(tiny_imagenet(config.root), config, config.input_px or 64)


def lists_source(config: DataConfig) -> DatasetSource:
    """The images of two lists of ``path label`` lines, as for ImageNet-LT; the size is chosen as for a tree."""
    assert config.root and config.train_list and config.test_list, "data_config sets root and lists"
    listing = index_lists(config.root, config.train_list, config.test_list)
    if len(listing.class_names) < 2:
        raise DataError(f"{config.train_list} has one class; a classifier needs at least two.")
    return _files_source(listing, config, config.input_px or _own_size_px(listing))


def _files_source(listing: FileListing, config: DataConfig, input_px: int) -> DatasetSource:
    preprocessing = Preprocessing(input_px=input_px, **dict(config.resizing))
    return DatasetSource(
        listing.class_names,
        listing.train.labels_N,
        listing.test.labels_N,
        FileImages(listing.train.files, preprocessing),
        FileImages(listing.test.files, preprocessing),
        mirror=True,
    )


def _own_size_px(listing: FileListing) -> int:
    """The size of the first image of every class if it is the same; unreadable files are skipped."""
    _, first_of_class = np.unique(listing.train.labels_N, return_index=True)
    sizes = set()
    for row in first_of_class.tolist():
        with contextlib.suppress(ImageError):  # reported with all other unreadable files when the files are checked
            sizes.add(image_size_px(listing.train.files[row]))
    if len(sizes) == 1:
        width, height = sizes.pop()
        if width == height <= 224:
            return width
    return FALLBACK_INPUT_PX


DATASETS: dict[str, Callable[[DataConfig], DatasetSource]] = {
    "glyphs": glyphs_source,
    "cifar100": cifar100_source,
    "folder": folder_source,
    "tinyimagenet": tiny_imagenet_source,
    "lists": lists_source,
}
