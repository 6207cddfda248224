"""Image files as a training set: read by position when asked for, and all of them looked at once beforehand.

Shape legend: N images, B of them, S pixels a side, L = 256 levels of a channel.
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
from ltkd.contract.resources import num_cores
from ltkd.errors import DataError, ImageError

MAX_THREADS = 8
AT_ONCE = 256
_TASK = 16  # files that a thread is handed at once; small ones are decoded faster than handed over
_TASKS = 64  # under way at once; a future for every file of millions would fill the memory

Result = TypeVar("Result")


class Images(Protocol):
    """Images by position; a NumPy array of them is one, and so are files that are decoded when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | NDArray[np.int64], /) -> NDArray[np.uint8]:
        """Some of the images, uint8 [B, S, S, 3]."""


@dataclass(frozen=True)
class FileImages:
    """Images that stay on disk: every access reads and decodes, so memory holds what was asked for and no more.

    Attributes:
        paths: N files.
        size_px: Side that they are brought to.
    """

    paths: tuple[Path, ...]
    size_px: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images by position, uint8 [B, S, S, 3].

        Raises:
            ImageError: A file has become unreadable; the message names it.
        """
        paths = self.take(rows).paths
        images_BSS3 = np.empty((len(paths), self.size_px, self.size_px, 3), dtype=np.uint8)

        def load(place: int) -> None:
            images_BSS3[place] = load_image(paths[place], self.size_px)

        for _ in _in_threads(load, len(paths)):
            pass
        return images_BSS3

    def take(self, rows: slice | NDArray[np.int64]) -> "FileImages":
        """Some of the files, unread."""
        chosen = self.paths[rows] if isinstance(rows, slice) else tuple(self.paths[row] for row in rows.tolist())
        return FileImages(chosen, self.size_px)


@dataclass
class FileCheck:
    """What a look at every file found.

    Attributes:
        images_NSS3: The decoded images, undefined where a file is unreadable; None unless they were asked for.
        problems: Position to what is wrong with the file.
        levels_3L: How often each level occurs in the readable images.
    """

    images_NSS3: NDArray[np.uint8] | None
    problems: dict[int, str] = field(default_factory=dict)
    levels_3L: NDArray[np.int64] = field(default_factory=lambda: np.zeros((3, 256), dtype=np.int64))


def check_files(
    files: FileImages, *, keep: bool, on_file: Callable[[int], None] = lambda num_files: None, levels: bool = True
) -> FileCheck:
    """Decode every file once.

    Args:
        files: Which.
        keep: Hand back the images. Without it JPEG files are decoded in draft, which finds the same damage.
        on_file: Told how many files are done, after every file.
        levels: Count the levels of the channels.
    """
    size_px = files.size_px
    look = FileCheck(np.empty((len(files), size_px, size_px, 3), dtype=np.uint8) if keep else None)

    def decode(place: int) -> str | NDArray[np.int64] | None:
        try:
            pixels_SS3 = load_image(files.paths[place], size_px, draft=not keep)
        except ImageError as error:
            return str(error)
        if look.images_NSS3 is not None:
            look.images_NSS3[place] = pixels_SS3
        return channel_levels(pixels_SS3) if levels else None

    for place, found in enumerate(_in_threads(decode, len(files))):
        if isinstance(found, str):
            look.problems[place] = found
        elif found is not None:
            look.levels_3L += found
        on_file(place + 1)
    return look


def in_batches(images: Images) -> Iterator[NDArray[np.uint8]]:
    """The images, few of them in memory at once."""
    for start in range(0, len(images), AT_ONCE):
        yield np.ascontiguousarray(images[start : start + AT_ONCE])


def digests(images: Images) -> Iterator[bytes]:
    """A hash of the pixels of each image."""
    for images_BSS3 in in_batches(images):
        for pixels_SS3 in images_BSS3:
            yield hashlib.blake2b(pixels_SS3.data, digest_size=16).digest()


def unreadable_error(problems: Sequence[str], num_files: int) -> DataError:
    """The error that names every file that cannot be read."""
    return DataError(
        f"{len(problems):,} of {num_files:,} images are unreadable; repair or remove them, or leave them out with "
        f"--skip-unreadable:{_listed(problems)}"
    )


def _listed(lines: Sequence[str]) -> str:
    """A few in the same line, more of them one a line."""
    return " " + " | ".join(lines) if len(lines) <= 3 else "".join(f"\n  {line}" for line in lines)


def channel_levels(pixels_SS3: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each level occurs in each channel of an image, int64 [3, 256]."""
    return np.stack([np.bincount(pixels_SS3[..., channel].ravel(), minlength=256) for channel in range(3)])


def _in_threads(work: Callable[[int], Result], count: int) -> Iterator[Result]:
    """The results of ``work(0)`` to ``work(count - 1)`` in order; Pillow decodes without Python's lock."""

    def some(start: int) -> list[Result]:
        return [work(place) for place in range(start, min(start + _TASK, count))]

    starts = range(0, count, _TASK)
    with ThreadPoolExecutor(min(MAX_THREADS, num_cores())) as threads:
        for first in range(0, len(starts), _TASKS):
            for results in threads.map(some, starts[first : first + _TASKS]):
                yield from results


@dataclass(frozen=True)
class LabelledImages:
    """Images with one purpose.

    Attributes:
        images: N images.
        label_N: Their classes.
    """

    images: Images
    label_N: NDArray[np.int64]
