"""What a process does about memory that only its start needed."""

import ctypes
import gc
import sys


def settle() -> None:
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
