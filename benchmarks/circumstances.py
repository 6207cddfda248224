"""What a figure is worth nothing without: the command, the commit, the day, the kind of machine, the versions."""

import datetime
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent


def circumstances(command: str, packages: Sequence[str]) -> dict[str, object]:
    """The beginning of every record; nothing in it names this machine.

    Args:
        command: What makes the figures.
        packages: Whose versions matter; one that is not installed is left out.
    """
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    versions = {name: version for name in packages if (version := _version(name))}
    return {
        "command": command,
        "commit": commit.stdout.strip(),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **versions},
    }


def hardware() -> str:
    """The kind of machine."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        cores = len(os.sched_getaffinity(0))
    except (OSError, AttributeError):  # not Linux
        found, cores = None, os.cpu_count() or 1
    return f"{found[1].strip() if found else platform.machine()}, {cores} cores"


def spread(values: Sequence[float]) -> dict[str, object]:
    """Every value, with their median, lowest and highest."""
    return {
        "median": statistics.median(values),
        "lowest": min(values),
        "highest": max(values),
        "values": list(values),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
