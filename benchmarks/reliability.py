"""Injects every fault of docs/reliability.md into the service and counts the requests that are lost.

    python -m benchmarks.reliability [--quick] [--soak-seconds 600] [--faults A,B]

Writes docs/benchmarks/reliability.json and the table in docs/reliability.md. Each fault gets its own service in its own
processes on one core; the load generator runs on another core. Every response is checked. benchmarks/attacks.py has the
hostile clients. The soak tests of ten minutes: python -m benchmarks.reliability --faults soak,soak-beside-large
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from benchmarks.client_faults import disconnect_storm, overload, soak_test
from benchmarks.fault_test import QUICK, FaultSetup, Plan, Row
from benchmarks.lifecycle_faults import kill_engine, reload_bundles, reload_corrupted_bundle, shut_down, stall_engine
from benchmarks.servers import ROOT, pinned_to_core
from benchmarks.serving import LOAD_CORE, WorkloadInputs, comma_separated, make_workloads, serving_metadata

TABLE, OUT = ROOT / "docs" / "reliability.md", ROOT / "docs" / "benchmarks" / "reliability.json"
BEGIN, END = "<!-- table of benchmarks/reliability.py: begin -->", "<!-- end -->"

FAULTS: dict[str, Callable[[FaultSetup], Row]] = {
    "overload-2x": partial(overload, factor=2),
    "overload-10x": partial(overload, factor=10),
    "disconnects": disconnect_storm,
    "killed": partial(kill_engine, processes=1),
    "killed-of-two": partial(kill_engine, processes=2),
    "stalled": stall_engine,
    "drain": shut_down,
    "reload": reload_bundles,
    "corrupted": reload_corrupted_bundle,
    "soak": soak_test,
    "soak-beside-large": partial(soak_test, beside_large=True),
}
IMAGES = {"resnet20": "small images", "photographs": "photographs"}
ON_ALL_IMAGES = ("overload-2x", "overload-10x")  # the other faults use the first images only


def inject(setups: Sequence[FaultSetup], faults: Sequence[str], report: Callable[[str], None]) -> list[Row]:
    """Inject every fault in turn, some of them on photographs too."""
    rows = []
    for name in faults:
        for setup in setups if name in ON_ALL_IMAGES else setups[:1]:
            begin = time.monotonic()
            row = FAULTS[name](setup)
            rows.append(row)
            verdict = "kept" if row.kept else "NOT KEPT"
            report(f"{name}, {setup.what}: {verdict}; {row.lost} of {row.requests} lost; {row.seen}; {row.ended}; "
                f"{time.monotonic() - begin:.0f} s")  # fmt: skip
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table for docs/reliability.md."""
    lines = ["| fault | times | requests | lost | guarantee | observed | kept |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = (row.fault, f"{row.times:,}", f"{row.requests:,}", f"{row.lost:,}", row.promise, row.seen)
        lines.append(f"| {' | '.join(cells)} | {'yes' if row.kept else '**no**'} |")
    return "\n".join(lines)


def replace_table(path: Path, text: str, begin: str = BEGIN) -> None:
    """Replace the table between a marker and the next END."""
    before, found, rest = path.read_text().partition(begin)
    _, end, after = rest.partition(END)
    assert found and end, f"{path} has no markers for the table"
    path.write_text(f"{before}{begin}\n\n{text}\n\n{END}{after}")


def setup_for(inputs: WorkloadInputs, what: str, plan: Plan) -> FaultSetup:
    """The setup for a workload, with its float32 bundle, which is the same on every machine."""
    return FaultSetup(inputs.folder / "same", inputs.images, what, inputs.workload.media_type, plan)


def main() -> int:
    """Inject all faults and write the report; the exit code is 1 if a guarantee was not kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="inject every fault only a few times")
    parser.add_argument("--soak-seconds", type=float, help="duration of the soak test; 600 by default, 3 with --quick")
    parser.add_argument("--faults", type=comma_separated(FAULTS), default=list(FAULTS), help=", ".join(FAULTS))
    parser.add_argument("--write", action="store_true", help="write the files even after --quick or --faults")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else Plan()
    if arguments.soak_seconds:
        plan = replace(plan, soak_s=arguments.soak_seconds)
    with tempfile.TemporaryDirectory() as name:
        print("making images and bundles", flush=True)
        inputs = make_workloads(list(IMAGES), Path(name))
        with pinned_to_core(LOAD_CORE):
            setups = [setup_for(inputs[workload], what, plan) for workload, what in IMAGES.items()]
            rows = inject(setups, arguments.faults, report=lambda message: print(message, flush=True))
    print(table(rows))
    if arguments.write or not (arguments.quick or arguments.faults != list(FAULTS)):
        metadata = serving_metadata(" ".join(["python -m benchmarks.reliability", *sys.argv[1:]]), 1, {})
        content = {**metadata, "plan": asdict(plan), "rows": [asdict(row) for row in rows]}
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(json.dumps(content, indent=2) + "\n")
        origin = f"`{metadata['command']}`, commit {metadata['commit']}, {metadata['date']}, {metadata['hardware']}."
        replace_table(TABLE, f"{origin}\n\n{table(rows)}")
    return 0 if all(row.kept for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
