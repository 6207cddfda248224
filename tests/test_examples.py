"""The examples are a reader's first contact: each runs as its first lines say, and leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SAYS = {
    "add_a_method": ["ce: head", "logits: head", "ltkd: head"],
    "custom_dataset": ["training images a class: {'flat': 200, ", "teacher: head", "student: head"],
    "custom_teacher": ["custom_teacher:small_cnn: head", "resnet8: head"],
    "loss_in_your_loop": ["step   0  loss", "step  80  loss"],
}
CHANCE = 1 / 6


def run(path: Path, folder: Path) -> str:
    command = [sys.executable, "-W", "error", str(path)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs_in_any_folder_and_leaves_nothing_there(path: Path, tmp_path: Path) -> None:
    assert f"python examples/{path.name}" in path.read_text().partition('"""\n\n')[0]
    said = run(path, tmp_path)
    assert all(text in said for text in SAYS[path.stem])
    rights = [line for line in said.splitlines() if line.endswith("right")]
    # one training image in four is of the first class, so a network that learned nothing stays near chance
    assert all(int(line.rpartition("all ")[2].partition("%")[0]) / 100 > 1.5 * CHANCE for line in rights)
    assert list(tmp_path.iterdir()) == []
