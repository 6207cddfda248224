"""Image files as an array of images: decoded by position on access, and checked once before training.

``datasets`` checks the files and keeps small images in memory; ``streaming`` decodes large ones during the training.

Shape legend: N images, B of them, S side in pixels, L = 256 levels of a channel.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ltkd.contract.image_decoding import load_image
from ltkd.contract.preprocessing import Preprocessing
from ltkd.contract.resources import num_cores
from ltkd.errors import DataError, ImageError

MAX_THREADS = 8
AT_ONCE = 256
_TASK = 16  # files per task of a thread; submitting a task can take longer than decoding a small file
_TASKS = 64  # tasks pending at once; a future per file would fill the memory for millions of files

Result = TypeVar("Result")


class Images(Protocol):
    """Images by position: a NumPy array, or files that are decoded on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | NDArray[np.int64], /) -> NDArray[np.uint8]:
        """Some of the images, uint8 [B, S, S, 3]."""


@dataclass(frozen=True)
class FileImages:
    """Images that stay on disk: every access decodes files, so memory holds only the images of that access.

    Attributes:
        paths: N files.
        preprocessing: How the files are decoded.
    """

    paths: tuple[Path, ...]
    preprocessing: Preprocessing

    @property
    def size_px(self) -> int:
        """Side of the images in pixels."""
        return self.preprocessing.input_px

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images by position, uint8 [B, S, S, 3].

        Raises:
            ImageError: A file has become unreadable; the message names it.
        """
        paths = self.take(rows).paths
        images_BSS3 = np.empty((len(paths), self.size_px, self.size_px, 3), dtype=np.uint8)

        def load(position: int) -> None:
            images_BSS3[position] = load_image(paths[position], self.preprocessing)

        for _ in _in_threads(load, len(paths)):
            pass
        return images_BSS3

    def take(self, rows: slice | NDArray[np.int64]) -> "FileImages":
        """Select files without reading them."""
        chosen = self.paths[rows] if isinstance(rows, slice) else tuple(self.paths[row] for row in rows.tolist())
        return FileImages(chosen, self.preprocessing)


@dataclass
class FileCheck:
    """The result of checking every file.

    Attributes:
        images_NSS3: The decoded images, undefined for unreadable files; None unless ``keep`` was set.
        problems: The error message of each unreadable file, by position.
        levels_3L: Number of pixels per channel and level in the readable images.
    """

    images_NSS3: NDArray[np.uint8] | None
    problems: dict[int, str] = field(default_factory=dict)
    levels_3L: NDArray[np.int64] = field(default_factory=lambda: np.zeros((3, 256), dtype=np.int64))


def check_files(
    files: FileImages, *, keep: bool, on_file: Callable[[int], None] = lambda num_files: None, levels: bool = True
) -> FileCheck:
    """Decode every file once, and report the unreadable ones.

    Args:
        files: The files.
        keep: Return the images. Otherwise the JPEG decoder scales down as far as it can, which finds the same damage.
        on_file: Called after every file with the number of files checked.
        levels: Count the levels of the channels.
    """
    size_px, preprocessing = files.size_px, files.preprocessing
    if not keep:
        preprocessing = preprocessing.model_copy(update={"jpeg_scaling": "once"})
    check = FileCheck(np.empty((len(files), size_px, size_px, 3), dtype=np.uint8) if keep else None)

    def decode(position: int) -> str | NDArray[np.int64] | None:
        try:
            pixels_SS3 = load_image(files.paths[position], preprocessing)
        except ImageError as error:
            return str(error)
        if check.images_NSS3 is not None:
            check.images_NSS3[position] = pixels_SS3
        return channel_levels(pixels_SS3) if levels else None

    for position, result in enumerate(_in_threads(decode, len(files))):
        if isinstance(result, str):
            check.problems[position] = result
        elif result is not None:
            check.levels_3L += result
        on_file(position + 1)
    return check


def iterate_batches(images: Images) -> Iterator[NDArray[np.uint8]]:
    """Yield the images in batches, so that few of them are in memory at once."""
    for start in range(0, len(images), AT_ONCE):
        yield np.ascontiguousarray(images[start : start + AT_ONCE])


def pixel_hashes(images: Images) -> Iterator[bytes]:
    """Yield a hash of the pixels of each image."""
    for images_BSS3 in iterate_batches(images):
        for pixels_SS3 in images_BSS3:
            yield hashlib.blake2b(pixels_SS3.data, digest_size=16).digest()


def unreadable_error(problems: Sequence[str], num_files: int) -> DataError:
    """Make the error that names every unreadable file."""
    return DataError(
        f"{len(problems):,} of {num_files:,} images are unreadable; repair or remove them, or leave them out with "
        f"--skip-unreadable:{_listed(problems)}"
    )


def _listed(lines: Sequence[str]) -> str:
    """Up to three problems in the same line; more of them with one line each."""
    return " " + " | ".join(lines) if len(lines) <= 3 else "".join(f"\n  {line}" for line in lines)


def channel_levels(pixels_SS3: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Number of pixels per channel and level of an image, int64 [3, 256]."""
    return np.stack([np.bincount(pixels_SS3[..., channel].ravel(), minlength=256) for channel in range(3)])


def _in_threads(function: Callable[[int], Result], count: int) -> Iterator[Result]:
    """Yield ``function(0)`` to ``function(count - 1)`` in order; threads help because Pillow releases the GIL."""

    def run_task(start: int) -> list[Result]:
        return [function(position) for position in range(start, min(start + _TASK, count))]

    starts = range(0, count, _TASK)
    with ThreadPoolExecutor(min(MAX_THREADS, num_cores())) as threads:
        for first in range(0, len(starts), _TASKS):
            for results in threads.map(run_task, starts[first : first + _TASKS]):
                yield from results


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes.

    Attributes:
        images: N images.
        labels_N: Class of each image.
    """

    images: Images
    labels_N: NDArray[np.int64]
