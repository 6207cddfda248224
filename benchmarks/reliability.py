"""What the service loses when things go wrong around it: every fault of docs/reliability.md, injected and counted.

    python -m benchmarks.reliability [--quick] [--soak-seconds 600] [--faults A,B]

Writes docs/benchmarks/reliability.json and the table in docs/reliability.md. Each fault gets a service of its own in
processes of its own, on one core, with the load on another. Every answer is checked; a request that is not in the table
as lost was answered, rightly and within the time limit unless the row says otherwise.
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

from benchmarks.client_faults import disconnect_storm, malformed, overload, slow, soaked
from benchmarks.lifecycle_faults import corrupted, drained, killed, reloaded, stalled
from benchmarks.servers import ROOT, on_core
from benchmarks.serving import LOAD_CORE, Asked, about_the_run, listed, workloads_made
from benchmarks.trial import QUICK, Bench, Plan, Row

TABLE, OUT = ROOT / "docs" / "reliability.md", ROOT / "docs" / "benchmarks" / "reliability.json"
BEGIN, END = "<!-- table of benchmarks/reliability.py: begin -->", "<!-- end -->"

FAULTS: dict[str, Callable[[Bench], Row]] = {
    "overload-2x": partial(overload, factor=2),
    "overload-10x": partial(overload, factor=10),
    "disconnects": disconnect_storm,
    "slow-header": partial(slow, stage="header"),
    "slow-body": partial(slow, stage="body"),
    "killed": partial(killed, processes=1),
    "killed-of-two": partial(killed, processes=2),
    "stalled": stalled,
    "drain": drained,
    "reload": reloaded,
    "corrupted": corrupted,
    "malformed": malformed,
    "soak": soaked,
}
IMAGES = {"resnet20": "small images", "photographs": "photographs"}
ON_ALL_IMAGES = ("overload-2x", "overload-10x")  # the others on the first alone


def inject(benches: Sequence[Bench], faults: Sequence[str], say: Callable[[str], None]) -> list[Row]:
    """Every fault in turn, some of them on photographs too."""
    rows = []
    for name in faults:
        for bench in benches if name in ON_ALL_IMAGES else benches[:1]:
            begin = time.monotonic()
            row = FAULTS[name](bench)
            rows.append(row)
            verdict = "kept" if row.kept else "NOT KEPT"
            say(f"{name}, {bench.what}: {verdict}; {row.lost} of {row.requests} lost; {row.seen}; {row.ended}; "
                f"{time.monotonic() - begin:.0f} s")  # fmt: skip
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows for docs/reliability.md."""
    lines = ["| injected | times | requests | lost | promise | seen | kept |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = (row.fault, f"{row.times:,}", f"{row.requests:,}", f"{row.lost:,}", row.promise, row.seen)
        lines.append(f"| {' | '.join(cells)} | {'yes' if row.kept else '**no**'} |")
    return "\n".join(lines)


def put_table(path: Path, text: str) -> None:
    """Put a table between its markers."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{path} has lost its markers"
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def bench_of(asked: Asked, what: str, plan: Plan) -> Bench:
    """The float32 bundle of a workload, which every machine runs alike."""
    return Bench(asked.folder / "same", asked.images, what, asked.workload.media_type, asked.workload.slo_s, plan)


def main() -> int:
    """Inject everything and report; the exit code is 1 if a promise was not kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a little of everything")
    parser.add_argument("--soak-seconds", type=float, help="600 by default, 3 with --quick")
    parser.add_argument("--faults", type=listed(FAULTS), default=list(FAULTS), help=", ".join(FAULTS))
    parser.add_argument("--write", action="store_true", help="write the files even after --quick or --faults")
    given = parser.parse_args()
    plan = QUICK if given.quick else Plan()
    if given.soak_seconds:
        plan = replace(plan, soak_s=given.soak_seconds)
    with tempfile.TemporaryDirectory() as name:
        print("making images and bundles", flush=True)
        asked = workloads_made(list(IMAGES), Path(name))
        with on_core(LOAD_CORE):
            benches = [bench_of(asked[workload], what, plan) for workload, what in IMAGES.items()]
            rows = inject(benches, given.faults, say=lambda what: print(what, flush=True))
    print(table(rows))
    if given.write or not (given.quick or given.faults != list(FAULTS)):
        about = about_the_run(" ".join(["python -m benchmarks.reliability", *sys.argv[1:]]), 1, {})
        content = {**about, "plan": asdict(plan), "rows": [asdict(row) for row in rows]}
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(json.dumps(content, indent=2) + "\n")
        put_table(
            TABLE,
            f"`{about['command']}`, commit {about['commit']}, {about['date']}, {about['hardware']}.\n\n{table(rows)}",
        )
    return 0 if all(row.kept for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
