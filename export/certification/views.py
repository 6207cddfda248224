"""Random views of images, for data sets with too few of them to certify anything.

Whether two runtimes decide alike is asked of inputs, not of labels. Where a group has fewer images to certify on than
its margin takes, the gates are asked on random views of these too: crops and, where the data allows it, mirror images,
drawn as in training. The report says how many; what it proves then, it proves of such views.

Shape legend: N images, V views, S pixels a side.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from export.certification.statistics import images_needed
from export.schema import ALL, Margins
from ltkd.contract.class_groups import ClassGroups
from ltkd.data.augmentation import augment
from ltkd.data.image_files import Images


class WithViews:
    """Images followed by views of them, each made when it is asked for.

    Args:
        images: The N images themselves.
        rows_V: Which of them each view shows.
        mirror: Whether a mirrored image still shows its class.
    """

    def __init__(self, images: Images, rows_V: NDArray[np.int64], *, mirror: bool) -> None:
        self._images, self._rows_V, self._mirror = images, rows_V, mirror

    def __len__(self) -> int:
        return len(self._images) + len(self._rows_V)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        wanted = np.arange(len(self))[rows]
        own = wanted < len(self._images)
        sources = np.where(own, wanted, self._rows_V[np.maximum(wanted - len(self._images), 0)])
        pixels = np.array(self._images[sources])
        for place in np.flatnonzero(~own):
            random = torch.Generator().manual_seed(int(wanted[place]))
            view = augment(torch.from_numpy(pixels[place : place + 1]), self._mirror, random)
            pixels[place] = view[0].numpy()
        return pixels


def topped_up(
    images: Images, labels_N: NDArray[np.int64], groups: ClassGroups, margins: Margins, *, mirror: bool
) -> tuple[Images, NDArray[np.int64], int]:
    """The images, or these and as many views as the margins take where nothing flips.

    A group without an image stays without one.

    Returns:
        Images, their labels, and the number of views among them; the views come last.
    """
    group_N = groups.index[labels_N]
    of_group = np.array([images_needed(margins.of(name), 0.0) for name in groups.names])
    overall = images_needed(margins.of(ALL), 0.0)
    counts = np.bincount(group_N, minlength=len(groups.names))
    wanted = np.where(counts > 0, np.maximum(counts, of_group), 0)
    while wanted.sum() < overall and wanted.any():
        wanted[wanted > 0] += 1
    missing = wanted - counts
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
    return WithViews(images, rows_V, mirror=mirror), np.concatenate([labels_N, labels_N[rows_V]]), len(rows_V)
