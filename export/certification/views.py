"""Add random augmented views of images to test sets that are too small to certify a margin.

The gates test whether two models make the same predictions, which can be tested on any input. If a group has fewer
images than its margin requires, random views of its images are added: crops and, if the data allow it, mirrored crops,
drawn as in training. The report states the number of views, because the results then hold for such views.

Shape legend: N images, V views, S side in pixels.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from export.certification.statistics import images_needed
from export.schema import ALL, Margins
from ltkd.contract.class_groups import ClassGroups
from ltkd.data.augmentation import augment
from ltkd.data.image_files import Images


class ImagesWithViews:
    """Images followed by augmented views of them. A view is computed whenever it is read.

    Args:
        images: The N images.
        rows_V: The position of the image from which each view is made.
        mirror: Whether a mirrored image still shows its class.
    """

    def __init__(self, images: Images, rows_V: NDArray[np.int64], *, mirror: bool) -> None:
        self._images, self._rows_V, self._mirror = images, rows_V, mirror

    def __len__(self) -> int:
        return len(self._images) + len(self._rows_V)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        positions = np.arange(len(self))[rows]
        is_image = positions < len(self._images)
        sources = np.where(is_image, positions, self._rows_V[np.maximum(positions - len(self._images), 0)])
        pixels = np.array(self._images[sources])
        for place in np.flatnonzero(~is_image):
            random = torch.Generator().manual_seed(int(positions[place]))
            view = augment(torch.from_numpy(pixels[place : place + 1]), self._mirror, random)
            pixels[place] = view[0].numpy()
        return pixels


def add_views(
    images: Images, labels_N: NDArray[np.int64], groups: ClassGroups, margins: Margins, *, mirror: bool
) -> tuple[Images, NDArray[np.int64], int]:
    """Add as many views as the margins require if no image changes class; none if there are enough images.

    No views are added to a group without images.

    Returns:
        The images, their labels, and the number of views among them; the views come last.
    """
    group_N = groups.index[labels_N]
    of_group = np.array([images_needed(margins.of(name), 0.0) for name in groups.names])
    overall = images_needed(margins.of(ALL), 0.0)
    counts = np.bincount(group_N, minlength=len(groups.names))
    required = np.where(counts > 0, np.maximum(counts, of_group), 0)
    while required.sum() < overall and required.any():
        required[required > 0] += 1
    missing = required - counts
    if not missing.sum():
        return images, labels_N, 0
    random = np.random.default_rng(0)
    rows_V = np.concatenate(
        [
            random.choice(np.flatnonzero(group_N == group), number)
            for group, number in enumerate(missing.tolist())
            if number
        ]
    )
    return ImagesWithViews(images, rows_V, mirror=mirror), np.concatenate([labels_N, labels_N[rows_V]]), len(rows_V)
