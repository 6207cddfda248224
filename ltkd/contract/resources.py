"""How many processor cores this process may really use.

ONNX Runtime counts the machine's cores; a container is often given fewer, and threads beyond them only wait for
each other.
"""

import ctypes
import gc
import os
import sys
from pathlib import Path


def num_cores(root: Path = Path("/")) -> int:
    """The cores that affinity and the control group's quota leave, at least one.

    Args:
        root: Where ``proc`` and ``sys`` are found.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # neither macOS nor Windows can tell
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, int(quota_cores(root))))


def quota_cores(root: Path) -> float:
    """Cores' worth of time that the control groups grant (version 2 or 1); infinity becomes a very large number."""
    shares = [_share_v2(folder) for folder in _folders(root, "", "sys/fs/cgroup")]
    shares += [_share_v1(folder) for folder in _folders(root, "cpu", "sys/fs/cgroup/cpu")]
    return min(shares, default=float(2**20))


def _folders(root: Path, controller: str, mount: str) -> list[Path]:
    """The control group of this process and its parents, as the mounted hierarchy shows them."""
    own = Path()
    try:
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                own = Path(path.lstrip("/"))
    except (OSError, ValueError):
        pass  # not Linux, or hidden: the mount's own top still tells a container's quota
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
    """End a start, in which Python's search for cycles was switched off: it only finds what will stay.

    What is there now is left out of the search from now on. What a request needs is freed by its last reference; the
    search finds nothing of it and looks, each time it goes deep, at every object of every library. And glibc gives the
    freed pages back, of which loading a model leaves many.
    """
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)
    gc.enable()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # musl has none
        libc.malloc_trim(0)


# of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Have glibc keep the pages of freed tensors: the kernel's part of a step's time is gone (docs/lab-book.md)."""
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):  # glibc alone has it
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            allocator.mallopt(option, 2**30)
