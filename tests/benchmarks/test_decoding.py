"""The benchmark of decoding runs end to end with a few images."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_decoding_benchmark_prints_times_differences_accuracies_and_verdicts() -> None:
    command = [sys.executable, "-W", "error", "-m", "benchmarks.decoding", "--rounds", "1"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [*command, "--per-class", "2", "--seeds", "1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    rows = [line.strip("| ").split(" | ") for line in process.stdout.splitlines() if line.startswith("| ")]
    assert [row[:2] for row in rows[1:7]] == [[size, how] for size in ("12 MP", "1.2 MP") for how in HOW]
    assert [row[0] for row in rows[14:]] == list(HOW)
    assert [row[1] for row in rows[8:13]] == ["6,242,400", *["49,939,200"] * 4]
    for row in rows[1:7]:
        assert (float(row[5]) == 0) == (row[1] == "none")
    assert all(row[-1] in ("PASS", "FAIL", "INCONCLUSIVE") for row in rows[14:])


HOW = ("none", "twice", "once")
