"""What holds for every test: one thread for every library, and logging that ends with the test that set it up.

The toys are tiny, and threads that wait for each other on a busy machine are slow.
"""

import logging
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The command sets up logging for its whole process, which here lives on with a stream that is closed."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)
