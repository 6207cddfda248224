"""Runs the command of ``make paper``, which reproduces the published table on a GPU, for one epoch on the CPU."""

import shlex
import subprocess
from pathlib import Path

import pytest
from training_toys import RECIPE, write_tree

from ltkd import recipes
from ltkd.cli.main import cli
from ltkd.contract.records import read_record
from ltkd.errors import RunError
from ltkd.evaluation.results import COMPARISON_FILE, Comparison

ROOT = Path(__file__).parents[3]


def arguments_of_make_paper(data: Path) -> list[str]:
    """The arguments with which ``make paper`` runs ``ltkd``."""
    result = subprocess.run(
        ["make", "--no-print-directory", "-n", "-o", "install", "paper", f"DATA={data}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    words = shlex.split(result.stdout.replace("\\\n", " "))
    return words[words.index(".venv/bin/ltkd") + 1 :]


@pytest.mark.slow
def test_make_paper_reproduces_the_published_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = arguments_of_make_paper(write_tree(tmp_path / "photos"))
    for pair in (("--recipe", "paper"), ("--device", "cuda"), ("--seeds", "0,1,2"), ("--out", "runs/paper")):
        position = words.index(pair[0])
        assert words[position + 1] == pair[1]
    # the same command, but for one epoch, on the CPU and not compiled
    monkeypatch.setitem(recipes.RECIPES, "paper", lambda: RECIPE.model_copy(update={"epochs": 1}))
    tiny = {"cuda": "cpu", "0,1,2": "0", "runs/paper": str(tmp_path / "paper")}
    cli([tiny.get(word, word) for word in words if word != "--compile"], standalone_mode=False)
    comparison = read_record(tmp_path / "paper" / COMPARISON_FILE, Comparison, RunError)
    assert [(row.network, row.model) for row in comparison.rows] == [
        ("teacher", "resnet32x4"),
        ("kd", "resnet8x4"),
        ("dkd", "resnet8x4"),
        ("ltkd", "resnet8x4"),
        ("ltkd_plus", "resnet8x4"),
    ]
    assert comparison.methods["dkd"].parameters["beta"] == 8.0  # the published value for this pair
