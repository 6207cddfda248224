"""The test images, divided by class into parts that share no image, each with one purpose.

    quantisation  10 %   shows int8 the range of every activation
    selection     20 %   chooses the int8 configuration, and fits the temperatures
    confidence    20 %   fits what confidence means
    certify       50 %   chooses nothing, so what it says holds

The division depends on the images alone, not on their order: within a class they are sorted by a hash of their pixels
and dealt out in turn. Equal images have one hash, so they never fall into two parts. Copies are left out: of a test
image the second one, because it would count one observation twice, and what is also a training image altogether,
because the network knows it by heart.

Shape legend: N images, B of them, S pixels a side.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from export.certification.views import topped_up
from export.schema import DataRecord, Margins, SplitRecord
from ltkd.contract.class_groups import ClassGroups
from ltkd.contract.task import Task
from ltkd.data.datasets import Dataset
from ltkd.data.image_files import Images, LabelledImages, digests, in_batches
from ltkd.errors import DataError

SplitName = Literal["quantisation", "selection", "confidence", "certify"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
_TURNS: tuple[SplitName, ...] = (
    "certify", "selection", "certify", "confidence", "certify",
    "quantisation", "certify", "selection", "certify", "confidence",
)  # fmt: skip
"""Every second image certifies, so every class with two images does; six images give every part one."""
_FEWEST = _TURNS.index("quantisation") + 1


@dataclass(frozen=True)
class Splits:
    """All parts of the test images.

    Attributes:
        num_views: So many of the certify images, the last ones, are random views of the others.
        num_duplicates: Test images left out because they are copies.
    """

    quantisation: LabelledImages
    selection: LabelledImages
    confidence: LabelledImages
    certify: LabelledImages
    num_views: int
    num_duplicates: int

    @property
    def parts(self) -> dict[SplitName, LabelledImages]:
        """The parts by name, in the order of SPLITS."""
        return {
            "quantisation": self.quantisation,
            "selection": self.selection,
            "confidence": self.confidence,
            "certify": self.certify,
        }

    def record(self, description: str, groups: ClassGroups) -> DataRecord:
        """Describe the parts so that anybody who has the images can tell whether they are the same.

        Args:
            description: Which images these are, in words.
            groups: Of the task, to count by.
        """
        return DataRecord(
            description=description,
            splits=tuple(split_record(name, part, groups) for name, part in self.parts.items()),
            num_views=self.num_views,
            num_duplicates=self.num_duplicates,
        )

    def check(self, task: Task) -> None:
        """Refuse images that are not the task's.

        Raises:
            DataError: A part is empty, its images are of another type or size, or a label is none of the task's.
        """
        for name, part in self.parts.items():
            expected = (len(part.label_N), task.input_px, task.input_px, 3)
            first = part.images[:1]
            seen = (len(part.images), *first.shape[1:])
            if not len(part.label_N) or first.dtype != np.uint8 or seen != expected:
                raise DataError(
                    f"the images for {name} are {first.dtype} {list(seen)}, expected uint8 {list(expected)} and at "
                    "least one; bring them to the task's size with ltkd.contract.image_decoding."
                )
            if part.label_N.min() < 0 or part.label_N.max() >= len(task.class_names):
                raise DataError(
                    f"the labels for {name} run from {part.label_N.min()} to {part.label_N.max()}, the task has "
                    f"classes 0 to {len(task.class_names) - 1}; give the images the task was made for."
                )


class Subset:
    """Some images of others, by position; none is copied before it is asked for.

    Args:
        images: The others.
        rows_N: Which of them.
    """

    def __init__(self, images: Images, rows_N: NDArray[np.int64]) -> None:
        self._images, self._rows_N = images, rows_N

    def __len__(self) -> int:
        return len(self._rows_N)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        return self._images[self._rows_N[rows]]


def split_test_images(data: Dataset, margins: Margins) -> Splits:
    """Divide the test images, and top up those that certify with views where the margins take more.

    The shares hold over all images and, to the rounding, within each class. An image that is the only one of its group
    certifies, where the other part can spare it.

    Args:
        data: Test images that chose nothing yet, and the training images to hold them against. Files are read once.
        margins: The tightest ones that will be asked for.

    Raises:
        DataError: There are too few different images to give every part one.
    """
    rows_N, num_duplicates = _different(data)
    if len(rows_N) < _FEWEST:
        raise DataError(
            f"{len(data.test_labels)} test images are {len(rows_N)} different ones that are not training images too; "
            f"at least {_FEWEST} are needed, so that what chooses a model and what certifies it share none. Add some."
        )
    label_N, groups = data.test_labels[rows_N], data.task.groups
    turn_N = np.empty(len(rows_N), dtype=np.int64)
    turn_N[np.argsort(label_N, kind="stable")] = np.resize([SPLITS.index(name) for name in _TURNS], len(rows_N))
    _let_every_group_certify(turn_N, groups.index[label_N])
    parts: dict[SplitName, LabelledImages] = {}
    for turn, name in enumerate(SPLITS):
        rows = np.sort(rows_N[turn_N == turn])
        parts[name] = LabelledImages(Subset(data.test_images, rows), data.test_labels[rows])
    certify = parts["certify"]
    images, labels, num_views = topped_up(certify.images, certify.label_N, groups, margins, mirror=data.mirror)
    parts["certify"] = LabelledImages(images, labels)
    return Splits(**parts, num_views=num_views, num_duplicates=num_duplicates)


def unsplit_test_images(data: Dataset) -> tuple[LabelledImages, int]:
    """Every different test image, to certify a model that none of them chose; and how many copies were left out.

    Raises:
        DataError: Every test image is also a training image.
    """
    rows_N, num_duplicates = _different(data)
    if not len(rows_N):
        raise DataError(f"all {len(data.test_labels)} test images are training images too; nothing can be certified.")
    rows_N = np.sort(rows_N)
    return LabelledImages(Subset(data.test_images, rows_N), data.test_labels[rows_N]), num_duplicates


def split_record(name: SplitName, part: LabelledImages, groups: ClassGroups) -> SplitRecord:
    """Describe a part: how many images of each group, and their hash."""
    return SplitRecord(
        name=name,
        num_images=len(part.label_N),
        per_group=tuple(np.bincount(groups.index[part.label_N], minlength=len(groups.names)).tolist()),
        sha256=_sha256_of(part),
    )


def _different(data: Dataset) -> tuple[NDArray[np.int64], int]:
    """Positions of the test images that are no copies, sorted by their hash, and how many are copies."""
    row_of: dict[bytes, int] = {}
    for row, digest in enumerate(digests(data.test_images)):
        row_of.setdefault(digest, row)
    if isinstance(data.train_images, np.ndarray):  # files would all have to be decoded again
        for digest in digests(data.train_images):
            row_of.pop(digest, None)
    rows_N = np.array([row_of[digest] for digest in sorted(row_of)], dtype=np.int64)
    return rows_N, len(data.test_labels) - len(rows_N)


def _let_every_group_certify(turn_N: NDArray[np.int64], group_N: NDArray[np.int64]) -> None:
    """Hand a group's only image to certify unless it is also the only one of its part."""
    certify = SPLITS.index("certify")
    for group in np.setdiff1d(group_N, group_N[turn_N == certify]):
        first = int(np.flatnonzero(group_N == group)[0])
        if (turn_N == turn_N[first]).sum() > 1:
            turn_N[first] = certify


def _sha256_of(part: LabelledImages) -> str:
    digest = hashlib.sha256()
    for images_BSS3 in in_batches(part.images):
        digest.update(images_BSS3.data)
    digest.update(np.ascontiguousarray(part.label_N).data)
    return digest.hexdigest()


def find_duplicates(certify: Images, num_views: int, others: Mapping[str, Images]) -> tuple[str, ...]:
    """What is wrong with the images that certify: one of another part, or one that is there twice.

    Args:
        certify: The images.
        num_views: So many of them, the last ones, are views of the others and may well be equal.
        others: Images that chose something, by what they are for.

    Returns:
        A sentence for each kind of copy; none if every image is there once.
    """
    own = digests(certify)
    real = [next(own) for _ in range(len(certify) - num_views)]
    known = set(real)
    findings = []
    if len(known) < len(real):
        findings.append(
            f"{len(real) - len(known)} images that certify are there twice, so they count as if independent."
        )
    for name, images in others.items():
        shared = known.intersection(digests(images))
        if shared:
            findings.append(f"{len(shared)} images that certify are also among those for {name}, so they chose.")
    return tuple(findings)
