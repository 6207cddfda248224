"""The number of processor cores this process may use, and memory settings for long-running processes.

ONNX Runtime counts the cores of the machine, but a container is often limited to fewer. Additional threads then only
compete for the same cores.
"""

import ctypes
import gc
import os
import sys
from pathlib import Path


def num_cores(root: Path = Path("/")) -> int:
    """The number of cores that the CPU affinity and the control group's quota allow, at least one.

    Args:
        root: The folder that contains ``proc`` and ``sys``.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not available on macOS and Windows
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, int(quota_cores(root))))


def quota_cores(root: Path) -> float:
    """The CPU quota of the control groups (version 2 or 1) in cores; a very large number if there is no quota."""
    shares = [_share_v2(folder) for folder in _folders(root, "", "sys/fs/cgroup")]
    shares += [_share_v1(folder) for folder in _folders(root, "cpu", "sys/fs/cgroup/cpu")]
    return min(shares, default=float(2**20))


def _folders(root: Path, controller: str, mount: str) -> list[Path]:
    """The folders of this process's control group and its parents in the mounted hierarchy."""
    own = Path()
    try:
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                own = Path(path.lstrip("/"))
    except (OSError, ValueError):
        pass  # not Linux, or hidden; the top folder of the mount still has a container's quota
    return [root / mount / folder for folder in (own, *own.parents)]


def _share_v2(folder: Path) -> float:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return float(quota) / float(period) if quota != "max" else float(2**20)
    except (OSError, ValueError):
        return float(2**20)


def _share_v1(folder: Path) -> float:
    try:
        quota = float((folder / "cpu.cfs_quota_us").read_text())
        period = float((folder / "cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 else float(2**20)
    except (OSError, ValueError):
        return float(2**20)


def trim_memory() -> None:
    """Enable garbage collection after the start of a process, and return freed memory to the system.

    Garbage collection is disabled during the start, because the objects created then are permanent. These objects are
    excluded from later collections: the objects of a request are freed by reference counting, and a full collection
    would otherwise visit every object of every library. glibc then returns freed pages, of which loading a model
    leaves many.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    gc.enable()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # musl has no malloc_trim
        libc.malloc_trim(0)


# constants of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Make glibc keep the pages of freed tensors, which saves the kernel's share of a step (docs/lab-book.md)."""
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):  # only glibc has mallopt
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            allocator.mallopt(option, 2**30)
