"""Every example runs with the command in its docstring, and leaves no files behind."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXPECTED_OUTPUT = {
    "add_a_method": ["ce: head", "logits: head", "ltkd: head"],
    "custom_dataset": ["training images per class: {'flat': 200, ", "teacher: head", "student: head"],
    "custom_teacher": ["custom_teacher:small_cnn: head", "resnet8: head"],
    "loss_in_your_loop": ["step   0  loss", "step  80  loss"],
}
CHANCE = 1 / 6


def run(path: Path, folder: Path) -> str:
    command = [sys.executable, "-W", "error", str(path)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs_in_any_folder_and_leaves_no_files_there(path: Path, tmp_path: Path) -> None:
    assert f"python examples/{path.name}" in path.read_text().partition('"""\n\n')[0]
    output = run(path, tmp_path)
    assert all(text in output for text in EXPECTED_OUTPUT[path.stem])
    accuracies = [line for line in output.splitlines() if line.endswith("correct")]
    # the test set is balanced, so a network that learned nothing stays near chance
    assert all(int(line.rpartition("all ")[2].partition("%")[0]) / 100 > 1.5 * CHANCE for line in accuracies)
    assert list(tmp_path.iterdir()) == []
