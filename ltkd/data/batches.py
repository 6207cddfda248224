"""What training consumes: shuffled, augmented batches that depend on seed, epoch and position alone.

Shape legend: B images in the batch, N images in the set, S pixels a side.
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
    """Which share of every batch one of several processes takes.

    Attributes:
        rank: This process, counted from 0.
        world: How many there are.
    """

    rank: int = 0
    world: int = 1


class Batches(Protocol):
    """The training set as batches, epoch after epoch."""

    @property
    def steps_per_epoch(self) -> int:
        """How many batches an epoch has; the same on every rank."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch: pixels, uint8 [B, S, S, 3] on the device, and rows, int64 [B] on the CPU.

        Rows are positions in the training set. A training that goes on at ``first_step`` sees the same images as one
        that was never interrupted.
        """


def batches_of(
    data: Dataset,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    shard: Shard = Shard(),
    views: int | None = None,
    workers: int | None = None,
) -> Batches:
    """The training images as batches for one process.

    Every rank makes the draws for the whole batch and takes its share of the rows, so N ranks together see exactly
    the images of one process. Ranks may differ by one image where ``batch_size`` is no multiple of their number.

    Images in memory are cut out of a border and mirrored; images on disk, which are larger, are decoded by worker
    processes that cut out a random part and stretch it.

    Args:
        data: Training images.
        batch_size: Images of a step over all ranks.
        seed: Seed of order and augmentation.
        device: Where the pixels go.
        shard: The share of this process.
        views: Give every image the augmentations of this many epochs and no more, in turn, so that what a teacher
            says of them can be kept. None makes new ones every epoch.
        workers: Processes that decode images on disk; 0 decodes in this one. None takes as many as the cores allow.

    Raises:
        UsageError: Some rank would have no image, or fixed views of images on disk are asked for.
    """
    num_images = len(data.train_labels)
    plan = EpochSampler(num_images, batch_size, seed, shard)
    if batch_size < shard.world or plan.steps_per_epoch == 0:
        raise UsageError(
            f"{shard.world} processes cannot share batches of {min(batch_size, num_images)} images; "
            "start fewer processes or take a larger batch."
        )
    if views is not None and views < 1:
        raise UsageError(f"an image has at least one view, got {views}.")
    if not isinstance(data.train_images, FileImages):
        return InMemory(data, plan, device, views)
    if views is not None:
        raise UsageError(
            f"fixed views are made of images in memory, and those of {data.task.input_px} px are read from disk; "
            "train without them."
        )
    return Streamed(
        data.train_images, data.mirror, plan, device, default_workers(shard) if workers is None else workers
    )


def default_workers(shard: Shard) -> int:
    """A process for every core but one, shared by the ranks: at least 1, at most 8."""
    return max(1, min(MAX_WORKERS, num_cores() // shard.world - 1))


@dataclass(frozen=True)
class EpochSampler:
    """The order of the images in every epoch, and who takes which.

    Attributes:
        num_images: N.
        batch_size: Images of a step over all ranks.
        seed: Seed of order and augmentation.
        shard: The share of this process.
    """

    num_images: int
    batch_size: int
    seed: int
    shard: Shard

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch; a last one with fewer images than ranks is left out."""
        whole, rest = divmod(self.num_images, self.batch_size)
        return whole + (rest >= self.shard.world)

    def generator(self, epoch: int) -> torch.Generator:
        """What an epoch's order is drawn from."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)

    def order(self, random: torch.Generator) -> Tensor:
        """Rows in the order of an epoch, int64 [N]."""
        return torch.randperm(self.num_images, generator=random)

    def shares(self, first_step: int) -> Iterator[slice]:
        """This rank's part of each batch, as places in the order."""
        for step in range(first_step, self.steps_per_epoch):
            begin = step * self.batch_size
            end = min(begin + self.batch_size, self.num_images)
            yield slice(begin + self.shard.rank, end, self.shard.world)


class InMemory:
    """Batches of images that lie on the device as one tensor, augmented a batch at a time."""

    def __init__(self, data: Dataset, plan: EpochSampler, device: torch.device, views: int | None) -> None:
        self._images_NSS3 = torch.from_numpy(np.asarray(data.train_images[:])).to(device)
        self._mirror, self._plan, self._views = data.mirror, plan, views

    @property
    def steps_per_epoch(self) -> int:
        return self._plan.steps_per_epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        device = self._images_NSS3.device
        order_N, crops = self._drawn(epoch)
        if self._views is not None and epoch >= self._views:  # what each image showed in the epoch of its view
            order_of_view_N, crops = self._drawn(epoch % self._views)
            crops = crops[order_of_view_N.argsort()[order_N]]
        crops, on_device_N = crops.to(device), order_N.to(device)
        for share in self._plan.shares(first_step):
            yield crop(self._images_NSS3[on_device_N[share]], crops[share]), order_N[share]

    def _drawn(self, epoch: int) -> tuple[Tensor, Crops]:
        """The order of an epoch and its cuts, in that order.

        Those of a whole epoch at once: one that is resumed skips none, and no step waits for small copies.
        """
        random = self._plan.generator(epoch)
        order_N = self._plan.order(random)
        size_px = self._images_NSS3.shape[1]
        batches = [
            draw_crops(len(rows_B), size_px, self._mirror, random)
            for rows_B in torch.split(order_N, self._plan.batch_size)
        ]
        tops, lefts, mirrored = zip(*((crops.top_N, crops.left_N, crops.mirrored_N) for crops in batches), strict=True)
        return order_N, Crops(torch.cat(tops), torch.cat(lefts), torch.cat(mirrored) if self._mirror else None)


class Streamed:
    """Batches of images that stay on disk, decoded and cut by worker processes a few batches ahead.

    What image n shows in epoch e is a function of (seed, e, n) alone, whatever the number of workers.
    """

    def __init__(self, files: FileImages, mirror: bool, plan: EpochSampler, device: torch.device, workers: int) -> None:
        self._stream = BatchLoader(CropDataset(files, mirror, plan.seed), workers, pinned=device.type == "cuda")
        self._plan, self._device = plan, device

    @property
    def steps_per_epoch(self) -> int:
        return self._plan.steps_per_epoch

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        order_N = self._plan.order(self._plan.generator(epoch))
        rows = [order_N[share] for share in self._plan.shares(first_step)]
        for pixels_BSS3, rows_B in zip(self._stream.batches(epoch, rows), rows, strict=True):
            yield pixels_BSS3.to(self._device, non_blocking=True), rows_B
