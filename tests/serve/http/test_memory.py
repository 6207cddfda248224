"""What a process does about memory at the end of its start."""

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
del blocks[:-1]  # the last one keeps the allocator from giving the others back by itself
before = resident_mib()
trim_memory()
print(before - resident_mib(), gc.isenabled(), gc.get_freeze_count())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to give pages back")
def test_pages_that_only_the_start_needed_are_given_back_and_cycles_are_searched_again() -> None:
    said = subprocess.run([sys.executable, "-c", _START], capture_output=True, text=True, check=True).stdout
    given_back_mib, searched, num_left_out = said.split()
    assert float(given_back_mib) > 80
    assert searched == "True"
    assert int(num_left_out) > 1_000
