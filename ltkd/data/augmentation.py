"""Augmentation: random crops, for images in memory and on disk, and mirroring.

Shape legend: B images in the batch, S pixels a side.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Crops:
    """Where images are cut out of their border, and which are mirrored.

    Attributes:
        top_N: First row of the cut, int64, 0 to twice the border.
        left_N: First column, likewise.
        mirrored_N: bool; None where no image is mirrored.
    """

    top_N: Tensor
    left_N: Tensor
    mirrored_N: Tensor | None

    def __getitem__(self, rows: slice | Tensor) -> "Crops":
        """The cuts of some of the images."""
        mirrored_N = None if self.mirrored_N is None else self.mirrored_N[rows]
        return Crops(self.top_N[rows], self.left_N[rows], mirrored_N)

    def to(self, device: torch.device) -> "Crops":
        """The same on another device."""
        mirrored_N = None if self.mirrored_N is None else self.mirrored_N.to(device)
        return Crops(self.top_N.to(device), self.left_N.to(device), mirrored_N)


def augment(pixels_BSS3: Tensor, mirror: bool, random: torch.Generator) -> Tensor:
    """Crop at random from a border of S / 8 black pixels and, where allowed, mirror half of the images.

    Args:
        pixels_BSS3: uint8 images.
        mirror: Whether mirrored images still show their class.
        random: A generator on the CPU, so that every device sees the same images.
    """
    crops = draw_crops(len(pixels_BSS3), pixels_BSS3.shape[1], mirror, random)
    return crop(pixels_BSS3, crops.to(pixels_BSS3.device))


def draw_crops(num_images: int, size_px: int, mirror: bool, random: torch.Generator) -> Crops:
    """What ``augment`` leaves to chance, on the CPU."""
    top_N, left_N = torch.randint(0, 2 * (size_px // 8) + 1, (2, num_images), generator=random)
    return Crops(top_N, left_N, torch.rand(num_images, generator=random) < 0.5 if mirror else None)


def crop(pixels_BSS3: Tensor, crops: Crops) -> Tensor:
    """What ``augment`` does to images once the crops are drawn; both on one device."""
    batch, size_px = pixels_BSS3.shape[:2]
    border, device = size_px // 8, pixels_BSS3.device
    along_S = torch.arange(size_px, device=device)
    rows_BS, columns_BS = crops.top_N[:, None] + along_S, crops.left_N[:, None] + along_S
    if crops.mirrored_N is not None:
        columns_BS = torch.where(crops.mirrored_N[:, None], columns_BS.flip(1), columns_BS)
    padded = nn.functional.pad(pixels_BSS3, (0, 0, border, border, border, border))
    image_B11 = torch.arange(batch, device=device)[:, None, None]
    return padded[image_B11, rows_BS[:, :, None], columns_BS[:, None, :]]


LEAST_SHARE = 0.25
"""Of an image's area that a random cut keeps; the customary 0.08 leaves small networks too little to see."""


def mixed(*numbers: int) -> int:
    """A seed that is a function of all of them and spread over 64 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
