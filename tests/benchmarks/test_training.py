"""The training benchmark runs end to end at small sizes and writes all its values."""

import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_training_benchmark_writes_every_value_and_nothing_about_this_machine(tmp_path: Path) -> None:
    out = tmp_path / "benchmarks" / "training.json"
    command = [sys.executable, "-W", "error", "-m", "benchmarks.training", "--quick", "--out", str(out)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "at most 1.03" in process.stdout

    text = out.read_text()
    for private in (platform.node() or "no name", str(ROOT), str(tmp_path)):
        assert private not in text
    found = json.loads(text)
    assert found["command"] == "python -m benchmarks.training --quick"
    assert {"commit", "date", "hardware", "versions", "plan"} <= found.keys()
    rows = {(row["part"], row["what"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"])
    for row in rows.values():
        assert row["lowest"] <= row["median"] == statistics.median(row["values"]) <= row["highest"]

    narrow, photos, loss = dict.fromkeys(row["part"] for row in found["rows"])
    for part in (narrow, photos):
        plain, ours = rows[part, "plain loop"], rows[part, "ltkd"]
        assert ours["ratio"]["to"] == "plain loop"
        assert ours["ratio"]["values"] == [ours["values"][0] / plain["values"][0]]
        assert rows[part, "ltkd, peak memory with its workers"]["median"] > 0
    assert rows[narrow, "plain loop, of that its workers"]["median"] > 0  # it has two workers
    assert rows[loss, "a step with ltkd"]["ratio"]["limit"] == "at most 1.03"
    assert len(rows[loss, "a step with ltkd"]["values"]) == 2
