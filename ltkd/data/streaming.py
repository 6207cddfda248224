"""Batches of large images from disk: worker processes decode and crop a few batches ahead of the training.

``CropDataset`` makes one batch; ``BatchLoader`` runs it in worker processes. ``batches`` chooses the order of the
images and uses this module for data sets that are too large to hold in memory.

Shape legend: B images in the batch, S side in pixels.
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

from ltkd.contract.image_decoding import load_crop
from ltkd.data.augmentation import RandomCropBox, mix_seeds
from ltkd.data.image_files import FileImages
from ltkd.errors import DataError, ImageError

BatchRequest = tuple[int, list[int]]
"""A batch that a worker should make: the epoch and the rows."""


class CropDataset(Dataset[Tensor | str]):
    """Random crops of images on disk; an item is a whole batch.

    Args:
        files: The images.
        mirror: Whether half of the crops are mirrored.
        seed: The crop of an image is a function of this seed, the epoch and the row.
    """

    def __init__(self, files: FileImages, mirror: bool, seed: int) -> None:
        self._files, self._mirror, self._seed = files, mirror, seed
        self._random_box = RandomCropBox(files.size_px)

    def __getitem__(self, request: BatchRequest) -> Tensor | str:
        """The batch, uint8 [B, S, S, 3], or a message that says what is wrong with a file.

        It is a message because an exception would carry the traceback of the worker.
        """
        epoch, rows = request
        pixels_BSS3 = np.empty((len(rows), self._files.size_px, self._files.size_px, 3), dtype=np.uint8)
        try:
            for position, row in enumerate(rows):
                pixels_BSS3[position] = self.crop(epoch, row)
        except ImageError as error:
            return str(error)
        return torch.from_numpy(pixels_BSS3)

    def crop(self, epoch: int, row: int) -> NDArray[np.uint8]:
        """The crop of one image in an epoch, uint8 [S, S, 3]; the caller's random state does not change."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seeds(self._seed, epoch, row))
            pixels_SS3 = load_crop(self._files.paths[row], self._files.size_px, self._random_box)
            mirrored = self._mirror and bool(torch.rand(1) < 0.5)
        return pixels_SS3[:, ::-1] if mirrored else pixels_SS3


class BatchLoader:
    """Load batches in worker processes, in the order of the requests.

    The workers start with the first epoch. They end when this object is dropped or an epoch is abandoned before its
    end.

    Args:
        dataset: Makes the batches.
        workers: Number of processes; with 0 the batches are made in this process, one at a time.
        pinned: Return the batches in page-locked memory, from which a GPU copies asynchronously.
    """

    def __init__(self, dataset: CropDataset, workers: int, *, pinned: bool) -> None:
        self._dataset, self._workers, self._pinned = dataset, workers, pinned
        self._sampler = _RequestSampler()
        self._loader: DataLoader[Tensor | str] | None = None

    def batches(self, epoch: int, rows: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the batches of an epoch, uint8 [B, S, S, 3].

        A worker can be killed: by the system when memory runs out, or by a signal to all processes of a training.
        The remaining batches are then decoded in this process, more slowly but to the same pixels.

        Raises:
            DataError: A file has become unreadable; the message names it.
        """
        requests = self._sampler.requests = [(epoch, rows_B.tolist()) for rows_B in rows]
        loader, self._loader = self._loader or self._start(), None
        num_loaded = 0
        try:
            for batch in loader:
                yield _checked(batch)
                num_loaded += 1
            self._loader = loader
        except (RuntimeError, OSError, EOFError) as reason:  # an error of the dataset itself is raised again below
            warnings.warn(
                f"a worker process ended ({str(reason).partition(chr(10))[0]}); the last {len(requests) - num_loaded} "
                "batches of this epoch are decoded without workers.",
                RuntimeWarning,
                stacklevel=2,
            )
            yield from (_checked(self._dataset[request]) for request in requests[num_loaded:])
        finally:
            del loader  # the traceback of an error would keep it alive, and the program would wait for it at exit

    def _start(self) -> DataLoader[Tensor | str]:
        has_workers = self._workers > 0
        return DataLoader(
            self._dataset,
            batch_size=None,  # an item is already a batch
            sampler=self._sampler,
            num_workers=self._workers,
            multiprocessing_context=_start_method() if has_workers else None,
            worker_init_fn=_init_worker if has_workers else None,
            persistent_workers=has_workers,
            pin_memory=self._pinned,
            generator=torch.Generator(),  # it draws a seed, which must not come from the caller's random state
        )


def _checked(batch: Tensor | str) -> Tensor:
    """The batch; a message instead of one is raised as an error."""
    if isinstance(batch, str):
        raise DataError(batch)
    return batch


class _RequestSampler:
    """The sampler of the loader: yields the requests of the current epoch in order."""

    def __init__(self) -> None:
        self.requests: list[BatchRequest] = []

    def __iter__(self) -> Iterator[BatchRequest]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


def _start_method() -> str:
    """How to start workers. This process is never forked, because it has threads, locks and perhaps a CUDA context."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    # the fork server imports torch once, so that each worker starts quickly
    multiprocessing.set_forkserver_preload([__name__, "torchvision.transforms.v2"])
    return "forkserver"


def _init_worker(worker: int) -> None:
    """Ignore Ctrl-C, which a terminal sends to every process, and exit when the training process has ended.

    A training process that is killed cannot stop its workers. PyTorch's own check does not help: it watches the parent
    process, which here is the fork server.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_training_process, daemon=True).start()


def _exit_with_training_process() -> None:
    training_process = multiprocessing.parent_process()
    if training_process is not None:
        training_process.join()
        os._exit(1)
