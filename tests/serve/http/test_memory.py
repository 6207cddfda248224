"""A process releases unused memory when its start has ended."""

import platform
import subprocess
import sys

import pytest

_START = """
import gc
from pathlib import Path
from ltkd.contract.resources import trim_memory

def resident_mib():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmRSS")) / 1024

gc.disable()
blocks = [bytearray(100_000) for _ in range(1_000)]
del blocks[:-1]  # the last one prevents the allocator from returning the others by itself
before = resident_mib()
trim_memory()
print(before - resident_mib(), gc.isenabled(), gc.get_freeze_count())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="pages are returned with a function of glibc")
def test_trimming_returns_unused_pages_enables_garbage_collection_and_freezes_objects() -> None:
    output = subprocess.run([sys.executable, "-c", _START], capture_output=True, text=True, check=True).stdout
    returned_mib, gc_enabled, num_frozen = output.split()
    assert float(returned_mib) > 80
    assert gc_enabled == "True"
    assert int(num_frozen) > 1_000
