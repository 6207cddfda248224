"""A directory that is written beside its place and takes it as a whole: readers see the old one or the new one.

    .NAME.XXXX.part   being written; the process that writes it holds its lock, so nobody takes it for a leftover
    .NAME.XXXX.old    the old directory in between two renames, where the system cannot exchange two directories

The locks are the kernel's, on the directories themselves: a process that is killed leaves none behind, and process
numbers, which containers do not share, play no part.
"""

import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

PART, OLD = ".part", ".old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' fcntl.h and fs.h
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)  # old kernels, NFS, strict containers


@contextmanager
def staged(out: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """A fresh directory beside ``out`` that becomes ``out`` when the block ends without an error.

    Of several processes at one place each one's directory is whole, and the last to end its block stays. What a
    killed process left is cleared away.

    Args:
        out: The place; a link keeps pointing at its directory.
        check: Raises if what is at a path must not be replaced.
    """
    check(out)
    out = out.resolve()  # "." has a name
    out.parent.mkdir(parents=True, exist_ok=True)
    restore(out)
    _clear_leftovers(out)
    stage, lock = _fresh(out)
    try:
        yield stage
        _make_durable(stage)
        with _alone_in(out.parent):
            check(out)  # somebody may have put something else there meanwhile
            _publish(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # nothing, what was not finished, or the old directory
        _unlock(lock)


def restore(out: Path) -> None:
    """Bring back a directory whose replacement was killed between two renames; in all other cases do nothing."""
    out = out.resolve()
    if out.exists() or not _siblings(out, OLD):
        return
    with _alone_in(out.parent), suppress(OSError):  # who is between its two renames right now is waited for
        left = _siblings(out, OLD)
        if left and not out.exists():
            left[-1].rename(out)


def _publish(stage: Path, out: Path) -> None:
    if not out.exists():
        stage.rename(out)
    elif not _exchanged(stage, out):
        retired = stage.with_suffix(OLD)
        out.rename(retired)
        try:
            stage.rename(out)
        except BaseException:
            retired.rename(out)
            raise
        _sync(out.parent)
        shutil.rmtree(retired, ignore_errors=True)
    _sync(out.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two directories change places in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _fresh(out: Path) -> tuple[Path, int | None]:
    """A new directory beside ``out``, and its lock, which tells others that somebody is at it."""
    while True:
        stage = out.with_name(f".{out.name}.{secrets.token_hex(4)}{PART}")
        stage.mkdir()
        lock = _lock(stage, wait=True)
        if stage.exists():
            return stage, lock
        _unlock(lock)  # it was taken for a leftover before it could be locked


def _clear_leftovers(out: Path) -> None:
    """Remove what killed processes left; what is locked is being written."""
    for left in _siblings(out, PART):
        lock = _lock(left, wait=False)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            _unlock(lock)
    with _alone_in(out.parent):
        for left in _siblings(out, OLD) if out.exists() else ():
            shutil.rmtree(left, ignore_errors=True)


def _siblings(out: Path, suffix: str) -> list[Path]:
    """The directories of this module's making beside ``out``, and not those of another ``out.something``."""
    try:
        beside = sorted(out.parent.iterdir())
    except OSError:
        return []
    head = f".{out.name}."
    return [
        path
        for path in beside
        if path.name.startswith(head) and path.suffix == suffix and path.stem.removeprefix(head).isalnum()
    ]


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    lock = _lock(folder, wait=True)
    try:
        yield
    finally:
        _unlock(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """Lock a directory; None where somebody else has the lock, or where there are no locks.

    Returns:
        The descriptor that holds the lock until it is closed.
    """
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # gone, or not ours to read
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # somebody has it, or this is a network file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _make_durable(folder: Path) -> None:
    """Have the disk take everything before anybody can see it."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
