"""The metadata of every benchmark record: command, commit, date, kind of machine and package versions."""

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


def run_metadata(command: str, packages: Sequence[str]) -> dict[str, object]:
    """The metadata at the start of every record. It contains no host name and no path.

    Args:
        command: The command that produces the values.
        packages: Packages whose versions are recorded; those that are not installed are omitted.
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
    """The processor model and the number of cores."""
    try:
        model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        cores = len(os.sched_getaffinity(0))
    except (OSError, AttributeError):  # not Linux
        model, cores = None, os.cpu_count() or 1
    return f"{model[1].strip() if model else platform.machine()}, {cores} cores"


def spread(values: Sequence[float]) -> dict[str, object]:
    """All values, with their median, lowest and highest."""
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
