"""The report of benchmarks/attacks.py: a line for each phase, two Markdown tables and a JSON file."""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from benchmarks.attack_watch import Check, Observed, Phase
from benchmarks.reliability import OUT as RELIABILITY_OUT
from benchmarks.reliability import TABLE, replace_table
from benchmarks.run_metadata import run_metadata

BEGIN = "<!-- table of benchmarks/attacks.py: begin -->"
OUT = RELIABILITY_OUT.with_name("attacks.json")


def describe(phase: Phase) -> str:
    """One line about a phase."""
    sent = ", ".join(
        f"{result.requests} {result.statuses}" for result in phase.attacks.values() if len(phase.attacks) == 1
    )
    return (
        f"{phase.attack}: {sent or 'ordinary clients'}; ordinary {phase.statuses}, {phase.lost} lost, p99 "
        f"{phase.p99_ms:.0f} ms, /livez {phase.livez_ms:.0f} ms{', ENGINE REPLACED' if phase.engines_replaced else ''}"
    )


def table(phases: Sequence[Phase], descriptions: Mapping[str, str]) -> str:
    """A row for each attack as Markdown: what it sent, what came back, and what ordinary clients noticed meanwhile.

    Args:
        phases: All phases. Requests and replies of an attack are those of all phases, the rest is that of its own.
        descriptions: What each attack tries.
    """
    lines = [
        "| attack | requests | what came back | ordinary requests | lost | refused (429) | p99 | longest `/livez` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for phase in phases:
        results = [other.attacks[phase.attack] for other in phases if phase.attack in other.attacks]
        results = results or list(phase.attacks.values())
        statuses: Counter[str] = Counter()
        for result in results:
            statuses.update(result.statuses)
        came_back = ", ".join(f"{count:,} {status}" for status, count in sorted(statuses.items()))
        lines.append(
            f"| {descriptions.get(phase.attack, phase.attack)} | {sum(result.requests for result in results):,} | "
            f"{came_back} | {phase.requests:,} | "
            f"{phase.lost:,} | {phase.refused:.2%} | {phase.p99_ms:.1f} ms | {phase.livez_ms:.0f} ms |"
        )
    return "\n".join(lines)


def promises(found: Sequence[Check]) -> str:
    """The promises as a Markdown table."""
    rows = [f"| {check.promise} | {check.seen} | {'yes' if check.kept else '**no**'} |" for check in found]
    return "\n".join(["| promise | observed | kept |", "|---|---|---|", *rows])


def write_report(
    observed: Observed, found: Sequence[Check], descriptions: Mapping[str, str], plan: Mapping[str, float], rate: float
) -> None:
    """Write the JSON file and the tables of docs/reliability.md."""
    metadata = run_metadata(
        " ".join(["python -m benchmarks.attacks", *sys.argv[1:]]), ("onnxruntime", "pillow", "uvicorn", "httptools")
    )
    content = {
        **metadata,
        "plan": plan,
        "ordinary_requests_per_s": round(rate, 1),
        "promises": [asdict(check) for check in found],
        "phases": [asdict(phase) for phase in observed.phases],
        "resident_mib_each_second": [round(sample.resident_mib) for sample in observed.samples],
        "tracebacks": observed.tracebacks,
    }
    OUT.write_text(json.dumps(content, indent=2) + "\n")
    origin = (
        f"`{metadata['command']}`, commit {metadata['commit']}, {metadata['date']}, {metadata['hardware']}; "
        f"{rate:.0f} ordinary requests/s; each attack alone for {plan['alone_s']:.0f} s, then together for "
        f"{plan['mixed_s']:.0f} s."
    )
    replace_table(TABLE, f"{origin}\n\n{table(observed.phases, descriptions)}\n\n{promises(found)}", BEGIN)
