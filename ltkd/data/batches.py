"""The training set as shuffled, augmented batches, for one process or as one rank's part of every batch.

The images of a batch are a function of the seed, the epoch and the step alone. ``make_batches`` takes images from
memory, augmented on the device, or large images from disk, which ``streaming`` decodes in worker processes.

Shape legend: B images in the batch, N images in the set, S side in pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ltkd.contract.resources import num_cores
from ltkd.data.augmentation import Crops, crop, draw_crops
from ltkd.data.datasets import Dataset
from ltkd.data.image_files import FileImages
from ltkd.data.streaming import BatchLoader, CropDataset
from ltkd.errors import UsageError

MAX_WORKERS = 8


@dataclass(frozen=True)
class Shard:
    """The part of every batch that one of several processes trains on.

    Attributes:
        rank: The rank of this process, from 0.
        world: Number of processes.
    """

    rank: int = 0
    world_size: int = 1


class Batches(Protocol):
    """The training set as batches, epoch after epoch."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch; the same on every rank."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch: pixels, uint8 [B, S, S, 3] on the device, and rows, int64 [B] on the CPU.

        Rows are positions in the training set. A training that resumes at ``first_step`` gets the same images as one
        that was never interrupted.
        """


def make_batches(
    data: Dataset,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    shard: Shard = Shard(),
    views: int | None = None,
    workers: int | None = None,
) -> Batches:
    """Make the batches of training images for one process.

    Every rank draws the augmentation of the whole batch and takes its part of the rows, so several ranks together
    train on exactly the images of one process. If ``batch_size`` is not a multiple of the number of ranks, their parts
    differ by one image.

    Images in memory are cropped from a black border and mirrored. Larger images, on disk, are decoded by worker
    processes, which crop a random box and resize it.

    Args:
        data: Training images.
        batch_size: Images of a step over all ranks.
        seed: Seed of order and augmentation.
        device: The device of the pixels.
        shard: The part of this process.
        views: Number of augmented views of every image, repeated in turn, so that the logits of a teacher can be
            stored. None draws a new view in every epoch.
        workers: Processes that decode images on disk; 0 decodes in this process. None chooses by the number of cores.

    Raises:
        UsageError: Some rank would have no image, or fixed views were requested for images on disk.
    """
    num_images = len(data.train_labels)
    sampler = EpochSampler(num_images, batch_size, seed, shard)
    if batch_size < shard.world_size or sampler.steps_per_epoch == 0:
        raise UsageError(
            f"{shard.world_size} processes cannot share batches of {min(batch_size, num_images)} images; "
            "start fewer processes or use a larger batch."
        )
    if views is not None and views < 1:
        raise UsageError(f"the number of views must be at least 1, got {views}.")
    if not isinstance(data.train_images, FileImages):
        return InMemory(data, sampler, device, views)
    if views is not None:
        raise UsageError(
            f"fixed views need images in memory, but images of {data.task.input_px} px are read from disk; "
            "train without fixed views."
        )
    return Streamed(
        data.train_images, data.mirror, sampler, device, default_workers(shard) if workers is None else workers
    )


def default_workers(shard: Shard) -> int:
    """Number of worker processes per rank: this rank's share of the cores, less one; at least 1, at most 8."""
    return max(1, min(MAX_WORKERS, num_cores() // shard.world_size - 1))


@dataclass(frozen=True)
class EpochSampler:
    """The order of the images in every epoch, and the part of each rank.

    Attributes:
        num_images: N.
        batch_size: Images of a step over all ranks.
        seed: Seed of order and augmentation.
        shard: The part of this process.
    """

    num_images: int
    batch_size: int
    seed: int
    shard: Shard

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches in an epoch; a last batch with fewer images than ranks is left out."""
        whole, rest = divmod(self.num_images, self.batch_size)
        return whole + (rest >= self.shard.world_size)

    def generator(self, epoch: int) -> torch.Generator:
        """The random generator of an epoch."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)

    def order(self, random: torch.Generator) -> Tensor:
        """Draw the order of the rows in an epoch, int64 [N]."""
        return torch.randperm(self.num_images, generator=random)

    def shares(self, first_step: int) -> Iterator[slice]:
        """This rank's part of each batch, as a slice of the order."""
        for step in range(first_step, self.steps_per_epoch):
            begin = step * self.batch_size
            end = min(begin + self.batch_size, self.num_images)
            yield slice(begin + self.shard.rank, end, self.shard.world_size)


class InMemory:
    """Batches of images that are one tensor on the device, augmented one batch at a time."""

    def __init__(self, data: Dataset, sampler: EpochSampler, device: torch.device, views: int | None) -> None:
        self._images_NSS3 = torch.from_numpy(np.asarray(data.train_images[:])).to(device)
        self._mirror, self._sampler, self._views = data.mirror, sampler, views

    @property
    def steps_per_epoch(self) -> int:
        return self._sampler.steps_per_epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        device = self._images_NSS3.device
        order_N, crops = self._draw_epoch(epoch)
        if self._views is not None and epoch >= self._views:  # reuse each image's crop from the epoch of this view
            order_of_view_N, crops = self._draw_epoch(epoch % self._views)
            crops = crops[order_of_view_N.argsort()[order_N]]
        crops, on_device_N = crops.to(device), order_N.to(device)
        for share in self._sampler.shares(first_step):
            yield crop(self._images_NSS3[on_device_N[share]], crops[share]), order_N[share]

    def _draw_epoch(self, epoch: int) -> tuple[Tensor, Crops]:
        """Draw the order of an epoch, then its crops.

        The crops of the whole epoch are drawn at once. So a resumed epoch makes the same draws, and no step waits for
        small copies to the device.
        """
        random = self._sampler.generator(epoch)
        order_N = self._sampler.order(random)
        size_px = self._images_NSS3.shape[1]
        batches = [
            draw_crops(len(rows_B), size_px, self._mirror, random)
            for rows_B in torch.split(order_N, self._sampler.batch_size)
        ]
        tops, lefts, mirrored = zip(*((crops.top_N, crops.left_N, crops.mirrored_N) for crops in batches), strict=True)
        return order_N, Crops(torch.cat(tops), torch.cat(lefts), torch.cat(mirrored) if self._mirror else None)


class Streamed:
    """Batches of images that stay on disk; worker processes decode and crop them a few batches ahead.

    The crop of image n in epoch e is a function of (seed, e, n) alone. It does not depend on the number of workers.
    """

    def __init__(
        self, files: FileImages, mirror: bool, sampler: EpochSampler, device: torch.device, workers: int
    ) -> None:
        self._loader = BatchLoader(CropDataset(files, mirror, sampler.seed), workers, pinned=device.type == "cuda")
        self._sampler, self._device = sampler, device

    @property
    def steps_per_epoch(self) -> int:
        return self._sampler.steps_per_epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order_N = self._sampler.order(self._sampler.generator(epoch))
        rows = [order_N[share] for share in self._sampler.shares(first_step)]
        for pixels_BSS3, rows_B in zip(self._loader.batches(epoch, rows), rows, strict=True):
            yield pixels_BSS3.to(self._device, non_blocking=True), rows_B
