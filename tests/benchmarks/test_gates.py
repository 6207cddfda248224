"""The gate benchmark simulates the losses of its settings, computes exact probabilities and writes all its rates."""

import json
import platform
import subprocess
import sys
from itertools import product
from math import factorial
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are run from the repository and not installed

from benchmarks.gates import Setting, exact_probability, row_passes_exactly, simulate  # noqa: E402


def test_the_exact_probability_includes_every_outcome() -> None:
    n, p_b, p_c = 7, 0.2, 0.1
    passes = lambda b, c: b <= 1 + c // 2  # noqa: E731
    by_hand = sum(
        factorial(n) / (factorial(b) * factorial(c) * factorial(n - b - c))
        * p_b**b * p_c**c * (1 - p_b - p_c) ** (n - b - c)
        for b, c in product(range(n + 1), repeat=2)
        if b + c <= n and passes(b, c)
    )  # fmt: skip
    assert exact_probability(passes, n, p_b, p_c) == pytest.approx(by_hand, rel=1e-9)  # float64 sums of 36 terms
    assert exact_probability(lambda b, c: True, n, p_b, p_c) == pytest.approx(1, rel=1e-9)
    assert exact_probability(lambda b, c: False, n, p_b, p_c) == 0


def test_a_simulated_candidate_has_the_loss_of_its_setting_in_every_group() -> None:
    setting = Setting("int8", 20_000, 0.04, "the margin in the tail")
    before, after, labels = simulate(setting, np.random.default_rng(0))
    was_right, is_right = before.argmax(axis=1) == labels, after.argmax(axis=1) == labels
    for group, (broken, improved) in enumerate([(0.02, 0.02), (0.02, 0.02), (0.04, 0.02)]):
        of_group = labels == group
        # shares of 20,000 have a standard error of at most 0.0014: four of them
        assert (was_right & ~is_right)[of_group].mean() == pytest.approx(broken, abs=0.0056)
        assert (~was_right & is_right)[of_group].mean() == pytest.approx(improved, abs=0.0056)


def test_the_gate_keeps_the_nominal_rate_where_tangos_limit_alone_exceeds_it() -> None:
    found = row_passes_exactly(Setting("int8", 150, 0.0, "the overall margin everywhere"))
    assert found is not None
    assert found["gate"] <= 0.05 < found["tango"]
    assert row_passes_exactly(Setting("int8", 150, 0.0, "nothing")) is None


@pytest.mark.slow
def test_the_gate_benchmark_writes_every_rate_and_nothing_about_this_machine(tmp_path: Path) -> None:
    out = tmp_path / "benchmarks" / "gates.json"
    command = [sys.executable, "-W", "error", "-m", "benchmarks.gates", "--quick", "--out", str(out)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "false pass in all:" in process.stdout
    text = out.read_text()
    for private in (platform.node() or "no name", str(ROOT), str(tmp_path)):
        assert private not in text
    found = json.loads(text)
    assert {"command", "commit", "date", "hardware", "versions", "seconds", "nominal"} <= found.keys()
    assert len(found["rows"]) == 12  # four conditions with few images, three kinds of candidates
    for row in found["rows"]:
        assert sum(row["verdicts"].values()) == found["certifications"] == 20
        assert row["rate"]["low"] <= row["rate"]["value"] <= row["rate"]["high"]
        assert row["row_passes"] is None or row["row_passes"]["gate"] <= found["nominal"]
    assert {(row["margin"], row["discordant"]): row["gate"] for row in found["images_needed"]}[0.02, 0.03] == 268


def test_the_published_rates_are_within_the_nominal_rate() -> None:
    found = json.loads((ROOT / "docs" / "benchmarks" / "gates.json").read_text())
    assert found["command"] == "python -m benchmarks.gates"
    assert found["certifications"] == 500
    for row in found["rows"]:
        assert row["rate"]["low"] <= found["nominal"]
        assert row["row_passes"] is None or row["row_passes"]["gate"] <= found["nominal"]
    assert all(rate["high"] <= found["nominal"] for rate in found["together"].values())
