"""Duration, memory and start-up of the journey, against the limits that the project sets itself.

    python benchmarks/journey.py [--bundle BUNDLE]

Prints a table and writes docs/benchmarks/journey.json. The pipeline runs in a folder of its own that is removed.
Every short measurement is repeated; median and spread are shown.
"""

import argparse
import datetime
import http.client
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

LTKD = str(Path(sys.executable).parent / "ltkd")
OUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "journey.json"
REPEATS = 7


def help_seconds() -> float:
    """From the start of the process to its end."""
    start = time.perf_counter()
    subprocess.run([LTKD, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def ready_seconds(bundle: Path) -> tuple[float, float]:
    """Seconds from the start of ``ltkd serve`` to the first /readyz that says 200, and its resident MiB then."""
    start = time.perf_counter()
    with subprocess.Popen([LTKD, "serve", str(bundle), "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        assert found, "the service did not say where it listens"
        while True:
            line = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=5)
            try:
                line.request("GET", "/readyz")
                if line.getresponse().status == 200:
                    break
            except ConnectionError:
                pass
            finally:
                line.close()
        seconds = time.perf_counter() - start
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.terminate()
    resident = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert resident
    return seconds, int(resident[1]) / 1024


def pipeline(folder: Path) -> tuple[float, float]:
    """Seconds and peak MiB of ``ltkd pipeline``."""
    start = time.perf_counter()
    subprocess.run([LTKD, "pipeline"], cwd=folder, check=True)
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="measure the service with this bundle and leave the pipeline out")
    given = parser.parse_args().bundle
    rows: list[tuple[str, str, list[float], float]] = []
    with tempfile.TemporaryDirectory() as name:
        bundle = given or Path(name) / "bundles" / "demo"
        if given is None:
            seconds, peak = pipeline(Path(name))
            rows += [("ltkd pipeline", "s", [seconds], 360), ("ltkd pipeline, peak memory", "MiB", [peak], 4096)]
        rows.append(("ltkd --help", "s", [help_seconds() for _ in range(REPEATS)], 0.5))
        starts = [ready_seconds(bundle) for _ in range(REPEATS)]
    rows.append(("ltkd serve, start to ready", "s", [seconds for seconds, _ in starts], 2))
    rows.append(("ltkd serve, resident when ready", "MiB", [resident for _, resident in starts], 300))

    table = Table(title="The journey against its limits")
    for column in ("what", "median", "lowest to highest", "limit", "share of the limit"):
        table.add_column(column, justify="left" if column == "what" else "right")
    record = []
    for what, unit, values, limit in rows:
        median = statistics.median(values)
        spread = f"{min(values):.2f} to {max(values):.2f}"
        table.add_row(what, f"{median:.2f} {unit}", spread, f"{limit:g} {unit}", f"{median / limit:.2f}")
        record.append({"what": what, "unit": unit, "values": values, "limit": limit})
    Console(width=110).print(table)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(
        json.dumps(
            {
                "command": " ".join(["python", *sys.argv]),
                "commit": commit.stdout.strip(),
                "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
                "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
                "python": platform.python_version(),
                "rows": record,
            },
            indent=2,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
