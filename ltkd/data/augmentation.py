"""Augmentation: random crops and mirroring.

Small images are held in memory and cropped from a black border, a batch at a time (``augment``). Large images stay on
disk and are cropped to a random box while they are decoded (``RandomCropBox``, used by ``streaming``).

Shape legend: B images in the batch, N images, S side in pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ltkd.contract.image_decoding import Box

MIN_CROP_AREA = 0.25
"""Smallest crop of a large image, as a fraction of its area. The customary 0.08 leaves too little detail for small
networks."""


@dataclass(frozen=True)
class Crops:
    """The crop of each image inside its black border, and whether the image is mirrored.

    Attributes:
        top_N: First row of the crop, int64, 0 to twice the border.
        left_N: First column, likewise.
        mirrored_N: bool; None if no image is mirrored.
    """

    top_N: Tensor
    left_N: Tensor
    mirrored_N: Tensor | None

    def __getitem__(self, rows: slice | Tensor) -> "Crops":
        """The crops of some of the images."""
        mirrored_N = None if self.mirrored_N is None else self.mirrored_N[rows]
        return Crops(self.top_N[rows], self.left_N[rows], mirrored_N)

    def to(self, device: torch.device) -> "Crops":
        """The same crops on another device."""
        mirrored_N = None if self.mirrored_N is None else self.mirrored_N.to(device)
        return Crops(self.top_N.to(device), self.left_N.to(device), mirrored_N)


def augment(pixels_BSS3: Tensor, mirror: bool, random: torch.Generator) -> Tensor:
    """Crop images at random from a border of S / 8 black pixels and, if allowed, mirror half of them.

    Args:
        pixels_BSS3: uint8 images.
        mirror: Whether a mirrored image still shows its class.
        random: A generator on the CPU, so that the images are the same on every device.
    """
    crops = draw_crops(len(pixels_BSS3), pixels_BSS3.shape[1], mirror, random)
    return crop(pixels_BSS3, crops.to(pixels_BSS3.device))


def draw_crops(num_images: int, size_px: int, mirror: bool, random: torch.Generator) -> Crops:
    """Draw the random crops of ``augment``, on the CPU."""
    top_N, left_N = torch.randint(0, 2 * (size_px // 8) + 1, (2, num_images), generator=random)
    return Crops(top_N, left_N, torch.rand(num_images, generator=random) < 0.5 if mirror else None)


def crop(pixels_BSS3: Tensor, crops: Crops) -> Tensor:
    """Apply drawn crops to images on the same device."""
    batch, size_px = pixels_BSS3.shape[:2]
    border, device = size_px // 8, pixels_BSS3.device
    along_S = torch.arange(size_px, device=device)
    rows_BS, columns_BS = crops.top_N[:, None] + along_S, crops.left_N[:, None] + along_S
    if crops.mirrored_N is not None:
        columns_BS = torch.where(crops.mirrored_N[:, None], columns_BS.flip(1), columns_BS)
    padded = nn.functional.pad(pixels_BSS3, (0, 0, border, border, border, border))
    image_B11 = torch.arange(batch, device=device)[:, None, None]
    return padded[image_B11, rows_BS[:, :, None], columns_BS[:, None, :]]


class RandomCropBox:
    """Draw the box that a large image is cropped to, exactly as torchvision's RandomResizedCrop does.

    Args:
        size_px: Side that the crop is resized to.
    """

    def __init__(self, size_px: int) -> None:
        from torchvision.transforms.v2 import RandomResizedCrop  # noqa: PLC0415  # takes seconds, only needed here

        self._transform = RandomResizedCrop(size_px, scale=(MIN_CROP_AREA, 1.0), antialias=True)

    def __call__(self, width: int, height: int) -> Box:
        """A box inside an image of this size, drawn from torch's default generator."""
        # torchvision reads only the size of the image, so a tensor without memory is enough
        box = self._transform.make_params([torch.empty((1, height, width), device="meta")])
        return box["left"], box["top"], box["width"], box["height"]


def mix_seeds(*numbers: int) -> int:
    """Mix several numbers into one seed that is spread over 64 bits."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
