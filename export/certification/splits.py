"""Divide the test images into disjoint splits, stratified by class, each with one purpose.

    quantisation  10 %   measures the range of every activation for int8
    selection     20 %   selects the int8 configuration and fits the temperatures
    confidence    20 %   fits expected accuracy, abstention thresholds and prediction sets
    certify       50 %   influences no choice, so results on it are valid

The division depends on the images but not on their order: the images of each class are sorted by a hash of their pixels
and assigned to the splits in turn. Equal images have equal hashes, so no image is in two splits. Duplicates are left
out. A test image that occurs twice is used once, because otherwise one observation would be counted twice. A test image
that is also a training image is not used at all, because the network was trained on it.

Shape legend: N images, B of them, S side in pixels.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from export.certification.views import add_views
from export.schema import DataRecord, Margins, SplitRecord
from ltkd.contract.class_groups import ClassGroups
from ltkd.contract.task import Task
from ltkd.data.datasets import Dataset
from ltkd.data.image_files import Images, LabelledImages, iterate_batches, pixel_hashes
from ltkd.errors import DataError

SplitName = Literal["quantisation", "selection", "confidence", "certify"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
_TURNS: tuple[SplitName, ...] = (
    "certify", "selection", "certify", "confidence", "certify",
    "quantisation", "certify", "selection", "certify", "confidence",
)  # fmt: skip
"""The order in which images are assigned. Every second image goes to certify, so each class with two images is
certified. Six images are enough to give every split one."""
_MIN_IMAGES = _TURNS.index("quantisation") + 1


@dataclass(frozen=True)
class Splits:
    """The splits of the test images.

    Attributes:
        num_views: Number of random augmented views among the certify images; they come last.
        num_duplicates: Number of test images left out because they are duplicates.
    """

    quantisation: LabelledImages
    selection: LabelledImages
    confidence: LabelledImages
    certify: LabelledImages
    num_views: int
    num_duplicates: int

    @property
    def parts(self) -> dict[SplitName, LabelledImages]:
        """The splits by name, in the order of SPLITS."""
        return {
            "quantisation": self.quantisation,
            "selection": self.selection,
            "confidence": self.confidence,
            "certify": self.certify,
        }

    def record(self, description: str, groups: ClassGroups) -> DataRecord:
        """Describe the splits, with hashes that identify their images.

        Args:
            description: Describes the images in words.
            groups: The class groups of the task, by which the images are counted.
        """
        return DataRecord(
            description=description,
            splits=tuple(split_record(name, part, groups) for name, part in self.parts.items()),
            num_views=self.num_views,
            num_duplicates=self.num_duplicates,
        )

    def check(self, task: Task) -> None:
        """Check that images and labels fit the task.

        Raises:
            DataError: A split is empty, its images have another type or size, or a label is not a class of the task.
        """
        for name, part in self.parts.items():
            expected = (len(part.labels_N), task.input_px, task.input_px, 3)
            first = part.images[:1]
            shape = (len(part.images), *first.shape[1:])
            if not len(part.labels_N) or first.dtype != np.uint8 or shape != expected:
                raise DataError(
                    f"the images for {name} are {first.dtype} {list(shape)}, expected uint8 {list(expected)} and at "
                    "least one image; resize them to the task's size with ltkd.contract.image_decoding."
                )
            if part.labels_N.min() < 0 or part.labels_N.max() >= len(task.class_names):
                raise DataError(
                    f"the labels for {name} run from {part.labels_N.min()} to {part.labels_N.max()}, but the task has "
                    f"classes 0 to {len(task.class_names) - 1}; use the data set that belongs to the task."
                )


class Subset:
    """A subset of images, selected by position. Images are read when they are indexed.

    Args:
        images: The images to select from.
        rows_N: Positions of the selected images.
    """

    def __init__(self, images: Images, rows_N: NDArray[np.int64]) -> None:
        self._images, self._rows_N = images, rows_N

    def __len__(self) -> int:
        return len(self._rows_N)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        return self._images[self._rows_N[rows]]


def split_test_images(data: Dataset, margins: Margins) -> Splits:
    """Divide the test images, and add augmented views to the certify split if the margins need more images.

    The shares hold for all images together and, up to rounding, within each class. If a group has only one image, the
    image goes to certify, unless another split would become empty.

    Args:
        data: Test images that have not influenced the model, and the training images, to exclude duplicates. Image
            files are read once.
        margins: The smallest margins that will be tested.

    Raises:
        DataError: There are too few distinct images to give every split one.
    """
    rows_N, num_duplicates = _distinct_rows(data)
    if len(rows_N) < _MIN_IMAGES:
        raise DataError(
            f"of {len(data.test_labels)} test images, {len(rows_N)} are distinct and not training images too; at least "
            f"{_MIN_IMAGES} are needed, because selection and certification use separate images. Add test images."
        )
    labels_N, groups = data.test_labels[rows_N], data.task.groups
    turn_N = np.empty(len(rows_N), dtype=np.int64)
    turn_N[np.argsort(labels_N, kind="stable")] = np.resize([SPLITS.index(name) for name in _TURNS], len(rows_N))
    _move_single_images_to_certify(turn_N, groups.index[labels_N])
    parts: dict[SplitName, LabelledImages] = {}
    for turn, name in enumerate(SPLITS):
        rows = np.sort(rows_N[turn_N == turn])
        parts[name] = LabelledImages(Subset(data.test_images, rows), data.test_labels[rows])
    certify = parts["certify"]
    images, labels, num_views = add_views(certify.images, certify.labels_N, groups, margins, mirror=data.mirror)
    parts["certify"] = LabelledImages(images, labels)
    return Splits(**parts, num_views=num_views, num_duplicates=num_duplicates)


def unsplit_test_images(data: Dataset) -> tuple[LabelledImages, int]:
    """Return all distinct test images, to certify a model that none of them influenced.

    Returns:
        The images, and the number of duplicates left out.

    Raises:
        DataError: Every test image is also a training image.
    """
    rows_N, num_duplicates = _distinct_rows(data)
    if not len(rows_N):
        raise DataError(
            f"all {len(data.test_labels)} test images are training images too, so nothing can be certified; "
            "use test images that the model was not trained on."
        )
    rows_N = np.sort(rows_N)
    return LabelledImages(Subset(data.test_images, rows_N), data.test_labels[rows_N]), num_duplicates


def split_record(name: SplitName, part: LabelledImages, groups: ClassGroups) -> SplitRecord:
    """Describe a split: the number of images of each group, and a hash of images and labels."""
    return SplitRecord(
        name=name,
        num_images=len(part.labels_N),
        per_group=tuple(np.bincount(groups.index[part.labels_N], minlength=len(groups.names)).tolist()),
        sha256=_sha256_of(part),
    )


def _distinct_rows(data: Dataset) -> tuple[NDArray[np.int64], int]:
    """Return the positions of the test images without duplicates, sorted by hash, and the number of duplicates."""
    row_of: dict[bytes, int] = {}
    for row, digest in enumerate(pixel_hashes(data.test_images)):
        row_of.setdefault(digest, row)
    if isinstance(data.train_images, np.ndarray):  # image files are not checked: all would have to be decoded again
        for digest in pixel_hashes(data.train_images):
            row_of.pop(digest, None)
    rows_N = np.array([row_of[digest] for digest in sorted(row_of)], dtype=np.int64)
    return rows_N, len(data.test_labels) - len(rows_N)


def _move_single_images_to_certify(turn_N: NDArray[np.int64], group_N: NDArray[np.int64]) -> None:
    """If certify has no image of a group, move one there, unless it is the only image of its split."""
    certify = SPLITS.index("certify")
    for group in np.setdiff1d(group_N, group_N[turn_N == certify]):
        first = int(np.flatnonzero(group_N == group)[0])
        if (turn_N == turn_N[first]).sum() > 1:
            turn_N[first] = certify


def _sha256_of(part: LabelledImages) -> str:
    digest = hashlib.sha256()
    for images_BSS3 in iterate_batches(part.images):
        digest.update(images_BSS3.data)
    digest.update(np.ascontiguousarray(part.labels_N).data)
    return digest.hexdigest()


def find_duplicates(certify: Images, num_views: int, others: Mapping[str, Images]) -> tuple[str, ...]:
    """Find images of the certify split that occur twice or are also in another split.

    Args:
        certify: The images of the certify split.
        num_views: Number of augmented views at the end of ``certify``. Views may be equal to each other.
        others: The images of the other splits, by name.

    Returns:
        A sentence for each kind of duplicate; empty if there are none.
    """
    certify_digests = pixel_hashes(certify)
    real = [next(certify_digests) for _ in range(len(certify) - num_views)]
    known = set(real)
    findings = []
    if len(known) < len(real):
        findings.append(
            f"{len(real) - len(known)} certification images are duplicates, but would count as independent images."
        )
    for name, images in others.items():
        shared = known.intersection(pixel_hashes(images))
        if shared:
            findings.append(
                f"{len(shared)} certification images are also in the {name} split, so they influenced the candidate."
            )
    return tuple(findings)
