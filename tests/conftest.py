"""Settings of all tests: libraries use one thread, and changes to the logging are undone after each test.

The test networks are so small that threads on a busy machine mostly wait for each other.
"""

import logging
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files whose tests may take longest first, so that two workers end at nearly the same time."""
    allowed_seconds: dict[object, float] = {}
    for item in items:
        marker = item.get_closest_marker("timeout")
        allowed_seconds[item.path] = max(allowed_seconds.get(item.path, 0), marker.args[0] if marker else 0)
    items.sort(key=lambda item: -allowed_seconds[item.path])


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    """Remove the log handlers of a command, which configures logging for its process; here that runs further tests."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)
