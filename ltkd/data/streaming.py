"""Large images from disk to batches: worker processes decode and cut, a few batches ahead of the training.

Shape legend: B images in the batch, S pixels a side.
"""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ltkd.contract.image_decoding import Box, load_crop
from ltkd.data.augmentation import LEAST_SHARE, mixed
from ltkd.data.image_files import FileImages
from ltkd.errors import DataError, ImageError

BatchRequest = tuple[int, list[int]]
"""A batch that is asked of a worker: the epoch and the rows."""


class CropDataset(Dataset[Tensor | str]):
    """Random cuts of images on disk; an item is a whole batch.

    Args:
        files: Which images.
        mirror: Whether half of the cuts are mirrored.
        seed: The cut of an image is a function of this, the epoch and its row.
    """

    def __init__(self, files: FileImages, mirror: bool, seed: int) -> None:
        from torchvision.transforms.v2 import RandomResizedCrop  # noqa: PLC0415  # takes seconds, only needed here

        self._files, self._mirror, self._seed = files, mirror, seed
        self._crop = RandomResizedCrop(files.size_px, scale=(LEAST_SHARE, 1.0), antialias=True)

    def __getitem__(self, asked: BatchRequest) -> Tensor | str:
        """uint8 [B, S, S, 3], or what is wrong with a file: an exception would bring a worker's traceback along."""
        epoch, rows = asked
        pixels_BSS3 = np.empty((len(rows), self._files.size_px, self._files.size_px, 3), dtype=np.uint8)
        try:
            for place, row in enumerate(rows):
                pixels_BSS3[place] = self.crop(epoch, row)
        except ImageError as error:
            return str(error)
        return torch.from_numpy(pixels_BSS3)

    def crop(self, epoch: int, row: int) -> NDArray[np.uint8]:
        """What one image shows in an epoch, uint8 [S, S, 3]; the caller's random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed(self._seed, epoch, row))

            def choose(width: int, height: int) -> Box:
                # torchvision asks an image for its size and nothing else; this one has no pixels
                box = self._crop.make_params([torch.empty((1, height, width), device="meta")])
                return box["left"], box["top"], box["width"], box["height"]

            pixels_SS3 = load_crop(self._files.paths[row], self._files.size_px, choose)
            mirrored = self._mirror and bool(torch.rand(1) < 0.5)
        return pixels_SS3[:, ::-1] if mirrored else pixels_SS3


class BatchLoader:
    """Worker processes that fill batches in the order they are asked for.

    They live from the first epoch until this object is dropped, or an epoch is left before its end.

    Args:
        cuts: What a batch is made of.
        workers: How many processes; with 0 the batches are made here when they are asked for.
        pinned: Hand the batches over in memory that a GPU copies from by itself.
    """

    def __init__(self, cuts: CropDataset, workers: int, *, pinned: bool) -> None:
        self._cuts, self._workers, self._pinned = cuts, workers, pinned
        self._queue = _Queue()
        self._loader: DataLoader[Tensor | str] | None = None

    def batches(self, epoch: int, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """Batch after batch, uint8 [B, S, S, 3].

        If a worker is killed, by the system for want of memory or by a signal to all processes of a training, what
        is left is decoded in this process: slower, to the same pixels.

        Raises:
            DataError: A file has become unreadable; the message names it.
        """
        asked = self._queue.asked = [(epoch, rows_B.tolist()) for rows_B in rows]
        loader, self._loader = self._loader or self._start(), None
        done = 0
        try:
            for batch in loader:
                yield _refuse_words(batch)
                done += 1
            self._loader = loader
        except (RuntimeError, OSError, EOFError) as reason:  # what the cuts themselves raise is raised again below
            warnings.warn(
                f"a worker process ended ({str(reason).partition(chr(10))[0]}); the last {len(asked) - done} batches "
                "of this epoch are decoded without workers.",
                RuntimeWarning,
                stacklevel=2,
            )
            yield from (_refuse_words(self._cuts[batch]) for batch in asked[done:])
        finally:
            del loader  # the traceback of an error would keep it, and the end of the program would wait for it

    def _start(self) -> DataLoader[Tensor | str]:
        apart = self._workers > 0
        return DataLoader(
            self._cuts,
            batch_size=None,  # an item is a batch already
            sampler=self._queue,
            num_workers=self._workers,
            multiprocessing_context=_context() if apart else None,
            worker_init_fn=_begin_worker if apart else None,
            persistent_workers=apart,
            pin_memory=self._pinned,
            generator=torch.Generator(),  # it draws a seed, which must not come from the caller's random state
        )


def _refuse_words(batch: Tensor | str) -> Tensor:
    if isinstance(batch, str):
        raise DataError(batch)
    return batch


class _Queue:
    """What the loader asks of its workers, in order."""

    def __init__(self) -> None:
        self.asked: list[BatchRequest] = []

    def __iter__(self) -> Iterator[BatchRequest]:
        return iter(self.asked)

    def __len__(self) -> int:
        return len(self.asked)


def _context() -> str:
    """How workers are started: never by a fork of this process, which has threads, locks and perhaps CUDA."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    # a server that has imported torch once forks each worker in a moment
    multiprocessing.set_forkserver_preload([__name__, "torchvision.transforms.v2"])
    return "forkserver"


def _begin_worker(worker: int) -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the training; but end whenever it has ended.

    A training that is killed can tell nobody, and torch watches the parent, which is the server here.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_training, daemon=True).start()


def _end_with_the_training() -> None:
    training = multiprocessing.parent_process()
    if training is not None:
        training.join()
        os._exit(1)
