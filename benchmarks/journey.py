"""Duration, memory and start-up time of the pipeline and the service, compared with the limits of the project.

    python -m benchmarks.journey [--bundle BUNDLE]

Prints a table and writes docs/benchmarks/journey.json. The pipeline runs in a temporary folder. Short measurements are
repeated; the table has their median and range.
"""

import argparse
import http.client
import json
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

from benchmarks.run_metadata import run_metadata

LTKD = str(Path(sys.executable).parent / "ltkd")
OUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "journey.json"
REPEATS = 7


def help_seconds() -> float:
    """Duration of ``ltkd --help``."""
    start = time.perf_counter()
    subprocess.run([LTKD, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def seconds_until_ready(bundle: Path) -> tuple[float, float]:
    """Seconds from the start of ``ltkd serve`` to the first 200 of /readyz, and the resident MiB at that time."""
    start = time.perf_counter()
    with subprocess.Popen([LTKD, "serve", str(bundle), "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        assert found, "the service did not print its address"
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=5)
            try:
                connection.request("GET", "/readyz")
                if connection.getresponse().status == 200:
                    break
            except ConnectionError:
                pass
            finally:
                connection.close()
        seconds = time.perf_counter() - start
        resident = resident_mib(process.pid)
        process.terminate()
    return seconds, resident


def resident_mib(pid: int) -> float:
    """The resident memory of a process and its descendants (the server process and its engine processes)."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found[1]) / 1024 + sum(resident_mib(int(child)) for child in children)


def pipeline(folder: Path) -> tuple[float, float]:
    """Duration in seconds and peak MiB of ``ltkd pipeline``."""
    start = time.perf_counter()
    subprocess.run([LTKD, "pipeline"], cwd=folder, check=True)
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, help="serve this bundle and do not measure the pipeline")
    given_bundle = parser.parse_args().bundle
    rows: list[tuple[str, str, list[float], float]] = []
    with tempfile.TemporaryDirectory() as name:
        bundle = given_bundle or Path(name) / "bundles" / "demo"
        if given_bundle is None:
            seconds, peak = pipeline(Path(name))
            rows += [("ltkd pipeline", "s", [seconds], 360), ("ltkd pipeline, peak memory", "MiB", [peak], 4096)]
        rows.append(("ltkd --help", "s", [help_seconds() for _ in range(REPEATS)], 0.5))
        startups = [seconds_until_ready(bundle) for _ in range(REPEATS)]
    rows.append(("ltkd serve, start to ready", "s", [seconds for seconds, _ in startups], 2))
    rows.append(("ltkd serve, resident when ready", "MiB", [resident for _, resident in startups], 300))

    table = Table(title="The pipeline and the service compared with their limits")
    for column in ("what", "median", "lowest to highest", "limit", "share of the limit"):
        table.add_column(column, justify="left" if column == "what" else "right")
    record = []
    for what, unit, values, limit in rows:
        median = statistics.median(values)
        spread = f"{min(values):.2f} to {max(values):.2f}"
        table.add_row(what, f"{median:.2f} {unit}", spread, f"{limit:g} {unit}", f"{median / limit:.2f}")
        record.append({"what": what, "unit": unit, "values": values, "limit": limit})
    Console(width=110).print(table)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    content = {**run_metadata("python -m benchmarks.journey", ("torch", "onnxruntime-gpu")), "rows": record}
    OUT.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
