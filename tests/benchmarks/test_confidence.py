"""The confidence benchmark runs end to end with a few worlds and writes all its values."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_confidence_benchmark_reports_every_guarantee_and_nothing_about_this_machine(tmp_path: Path) -> None:
    out = tmp_path / "benchmarks" / "confidence.json"
    command = [sys.executable, "-W", "error", "-m", "benchmarks.confidence", "--worlds", "3", "--out", str(out)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr

    text = out.read_text()
    for private in (platform.node() or "no name", str(ROOT), str(tmp_path)):
        assert private not in text
    found = json.loads(text)
    assert {"command", "commit", "date", "hardware", "versions", "targets"} <= found.keys()
    assert found["runs"] == []
    assert [(row["images a part"], row["group"]) for row in found["simulated"]] == [
        (size, group) for size in (150, 1000) for group in ("head", "medium", "tail")
    ]
    for row in found["simulated"]:
        assert row["worlds"] == 3
        assert 0.7 < row["coverage"] <= 1
        for share in ("below band", "above band", "intervals hold", "guarantee given", "guarantee broken", "accepted"):
            assert 0 <= row[share] <= 1
        assert row["ece after"] < row["ece before"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
