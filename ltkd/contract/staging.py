"""Replace a directory atomically: write it to a temporary directory, then rename it.

Readers see either the complete old directory or the complete new one.

    .NAME.XXXX.part   a directory being written; the writing process holds its lock, so others do not delete it
    .NAME.XXXX.old    the old directory between two renames, on systems that cannot exchange two directories

The locks are kernel locks on the directories themselves. The kernel releases them when a process is killed, and they
do not depend on process ids, which differ between containers.
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
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # constants of Linux' fcntl.h and fs.h
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)  # old kernels, NFS, strict containers


@contextmanager
def staged(out: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """A new directory beside ``out`` that replaces ``out`` when the block ends without an error.

    Several processes may write to one path: each directory is complete, and the last process to end its block wins.
    Temporary directories of killed processes are removed.

    Args:
        out: The path to replace. If it is a symbolic link, the directory it points to is replaced.
        check: Raises if the content of a path must not be replaced.
    """
    check(out)
    out = out.resolve()  # gives "." a name
    out.parent.mkdir(parents=True, exist_ok=True)
    restore(out)
    _clear_leftovers(out)
    stage, lock = _create_locked(out)
    try:
        yield stage
        _make_durable(stage)
        with _locked(out.parent):
            check(out)  # another process may have written to this path since the first check
            _publish(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # an unfinished directory, or the old one after the exchange
        _unlock(lock)


def restore(out: Path) -> None:
    """Restore a directory if the process that replaced it was killed between two renames."""
    out = out.resolve()
    if out.exists() or not _siblings(out, OLD):
        return
    with _locked(out.parent), suppress(OSError):  # the lock waits for a process between its two renames
        retired = _siblings(out, OLD)
        if retired and not out.exists():
            retired[-1].rename(out)


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
    """Exchange two directories in one step; False if the system or the file system does not support it."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _create_locked(out: Path) -> tuple[Path, int | None]:
    """Create a directory beside ``out`` and lock it, so that other processes do not delete it."""
    while True:
        stage = out.with_name(f".{out.name}.{secrets.token_hex(4)}{PART}")
        stage.mkdir()
        lock = _lock(stage, wait=True)
        if stage.exists():
            return stage, lock
        _unlock(lock)  # another process deleted it as a leftover before it was locked


def _clear_leftovers(out: Path) -> None:
    """Remove directories that killed processes left; a locked directory is still being written."""
    for leftover in _siblings(out, PART):
        lock = _lock(leftover, wait=False)
        if lock is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            _unlock(lock)
    with _locked(out.parent):
        for leftover in _siblings(out, OLD) if out.exists() else ():
            shutil.rmtree(leftover, ignore_errors=True)


def _siblings(out: Path, suffix: str) -> list[Path]:
    """The temporary directories of ``out`` with a suffix, without those of a neighbour such as ``out.v2``."""
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
def _locked(folder: Path) -> Iterator[None]:
    lock = _lock(folder, wait=True)
    try:
        yield
    finally:
        _unlock(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """Lock a directory; None if another process holds the lock, or if locks are not supported.

    Returns:
        The descriptor that holds the lock until it is closed.
    """
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # removed, or not readable by this process
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another process, or a network file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _make_durable(folder: Path) -> None:
    """Flush a folder and its files to the disk before the folder becomes visible to readers."""
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
