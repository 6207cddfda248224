"""Trainings that are stopped by a killed process, a full disk or a signal: complete commands in real processes."""

import json
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from process_toys import STEPS, CommandResult, run_ltkd, start
from safetensors.torch import load_file
from training_toys import write_tree

from ltkd.contract.records import sha256_of

pytestmark = pytest.mark.slow

DROPOUT = ("--model", "process_toys:net", "--recipe", "toy", "--device", "cpu")
COMPARE = ("--teacher-model", "process_toys:net", "--student-model", "process_toys:net", "--methods", "ce,kd,ltkd_plus")
VARIANTS = {
    "labels": (),
    "float16": ("--precision", "float16"),
    "teacher": ("--method", "ltkd"),
    "kept logits": ("--method", "ltkd", "--teacher-views", "2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree of images and a teacher."""
    folder = tmp_path_factory.mktemp("faults")
    write_tree(folder / "photos")
    result = run_ltkd(folder, "train", "--data", "photos", *DROPOUT, "--out", "teacher")
    assert result.code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> dict[str, dict[str, object]]:
    """The contents of a run of every variant that was never interrupted."""
    contents = {}
    for variant in VARIANTS:
        result = train(folder, variant, f"uninterrupted {variant}")
        assert result.code == 0, result.output
        contents[variant] = run_contents(folder / f"uninterrupted {variant}")
    shutil.rmtree(folder / "teacher" / "logits")
    return contents


def train(folder: Path, variant: str, out: str, **variables: str) -> CommandResult:
    command = ("distill", "teacher") if "--method" in VARIANTS[variant] else ("train", "--data", "photos")
    return run_ltkd(folder, *command, *DROPOUT, *VARIANTS[variant], "--out", out, **variables)


def run_contents(run: Path) -> dict[str, object]:
    """The contents of a complete run, without the measured times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["images_per_s"]
    return {
        "weights": sha256_of(run / "weights.safetensors"),
        "metrics": lines,
        "files": sorted(path.name for path in run.iterdir()),
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_training_that_is_killed_again_and_again_ends_with_the_same_bits(
    folder: Path, uninterrupted: dict[str, dict[str, object]], variant: str, seed: int
) -> None:
    choice, out = random.Random(f"{variant} {seed}"), f"killed {variant} {seed}"
    codes = []
    for _ in range(4):
        # steps and writes are counted per process: in mid-epoch, at the end of an epoch, and before a file is renamed;
        # a training with fewer steps or writes left completes
        kill = choice.choice([f"SIGKILL:step:{choice.randint(1, 6)}", f"SIGKILL:write:{choice.randint(1, 8)}"])
        codes.append(train(folder, variant, out, TOY_SIGNAL=kill).code)
    assert codes.count(-signal.SIGKILL) >= 2 and set(codes) <= {-signal.SIGKILL, 0}
    result = train(folder, variant, out)
    assert result.code == 0, result.output
    assert run_contents(folder / out) == uninterrupted[variant]


def test_with_a_changed_random_state_the_bits_differ(folder: Path, uninterrupted: dict[str, dict[str, object]]) -> None:
    assert train(folder, "labels", "changed state", TOY_SIGNAL="SIGKILL:step:8").code == -signal.SIGKILL
    state = folder / "changed state" / "checkpoint" / "state.safetensors"
    content = state.read_bytes()
    assert content.index(b"rank0.random.cpu") > 0
    # the random state is a tensor of bytes: change one of them
    size = int.from_bytes(content[:8], "little")
    begin = json.loads(content[8 : 8 + size])["rank0.random.cpu"]["data_offsets"][0] + 8 + size + 3000
    state.write_bytes(content[:begin] + bytes([content[begin] ^ 1]) + content[begin + 1 :])
    result = train(folder, "labels", "changed state")
    assert "resuming after 7 steps" in result.output
    assert run_contents(folder / "changed state") != uninterrupted["labels"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("variant", ["labels", "float16"])
def test_a_signal_saves_a_checkpoint_in_mid_epoch_and_prints_how_to_resume(
    folder: Path, uninterrupted: dict[str, dict[str, object]], number: signal.Signals, code: int, variant: str
) -> None:
    out = f"stopped {variant} {code}"
    # the only checkpoint in mid-epoch is the one after the signal
    result = train(folder, variant, out, TOY_SIGNAL=f"{number.name}:step:8", TOY_SAVE_EVERY_S="1000")
    assert result.code == code
    stopped = re.fullmatch(
        rf"stopped in {out} after epoch (\d) of 3 and ([1-4]) of 5 steps; "
        r"a checkpoint was saved\. Run the same command again to resume\.",
        result.output.splitlines()[-1],
    )
    assert stopped is not None
    resumed = train(folder, variant, out)
    assert f"resuming after {5 * int(stopped[1]) + int(stopped[2])} steps" in resumed.output
    assert run_contents(folder / out) == uninterrupted[variant]


def test_a_signal_in_the_last_step_stops_the_training(
    folder: Path, uninterrupted: dict[str, dict[str, object]]
) -> None:
    result = train(folder, "labels", "last", TOY_SIGNAL=f"SIGTERM:step:{STEPS}")
    assert result.code == 143
    assert "after epoch 3 of 3 and 0 of 5 steps" in result.output
    assert train(folder, "labels", "last").code == 0
    assert run_contents(folder / "last") == uninterrupted["labels"]


def test_a_second_ctrl_c_ends_the_process_at_once(folder: Path, uninterrupted: dict[str, dict[str, object]]) -> None:
    result = train(folder, "labels", "twice", TOY_SIGNAL="SIGINT:step:8,SIGINT:step:8")
    assert result.code == 130
    assert result.output.splitlines()[-1].startswith("interrupted; ")
    resumed = train(folder, "labels", "twice")
    # the eighth step was not finished, and no checkpoint was saved at exit
    assert "resuming after 7 steps" in resumed.output
    assert run_contents(folder / "twice") == uninterrupted["labels"]


def test_a_second_sigterm_has_no_effect(folder: Path) -> None:
    result = train(folder, "labels", "sigterm twice", TOY_SIGNAL="SIGTERM:step:8,SIGTERM:step:8")
    assert result.code == 143
    assert "and 3 of 5 steps; a checkpoint was saved" in result.output


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, which has room for a few checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"only root can mount a file system: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


# free pages of 4 KiB: enough for no file; for the first files but no checkpoint; for a checkpoint but not for a second
# one beside it; for everything except the plot of the curves
@pytest.mark.parametrize("free_pages", [0, 3, 6, 9])
def test_a_full_disk_is_a_one_line_error_and_the_training_resumes_to_the_same_bits(
    folder: Path, small_disk: Path, uninterrupted: dict[str, dict[str, object]], free_pages: int
) -> None:
    (small_disk / "ballast").write_bytes(bytes(4096 * (16 - free_pages)))
    result = train(folder, "labels", str(small_disk / "run"))
    assert result.code == 2
    *_, last = result.output.strip().splitlines()
    assert last.startswith("error: ") and "could not be written (No space left on device)" in last
    assert "Traceback" not in result.output
    state = small_disk / "run" / "checkpoint" / "state.safetensors"
    assert not state.exists() or load_file(state)
    assert not list(small_disk.rglob("*.part"))
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    resumed = train(folder, "labels", str(small_disk / "run"))
    assert resumed.code == 0, resumed.output
    assert run_contents(small_disk / "run") == uninterrupted["labels"]


def test_only_one_of_several_processes_trains_in_a_folder(
    folder: Path, uninterrupted: dict[str, dict[str, object]]
) -> None:
    words = ("train", "--data", "photos", *DROPOUT, "--out", "contested")
    commands = [start(folder, *words) for _ in range(3)]
    results = [command.wait() for command in commands]
    rejected = [result for result in results if result.code]
    for result in rejected:
        assert result.code == 2
        assert result.output == "error: another process is training in contested; wait for it, or give another --out.\n"
    assert len(rejected) < 3
    assert run_contents(folder / "contested") == uninterrupted["labels"]


def test_the_folder_of_a_killed_process_is_unlocked_at_once(
    folder: Path, uninterrupted: dict[str, dict[str, object]]
) -> None:
    assert train(folder, "labels", "freed", TOY_SIGNAL="SIGKILL:step:3").code == -signal.SIGKILL
    assert train(folder, "labels", "freed").code == 0
    assert run_contents(folder / "freed") == uninterrupted["labels"]


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (("--set", "logit_adjustment=1"), "method.parameters.logit_adjustment is 0.0, requested 1.0"),
        (("--precision", "bfloat16"), "execution.precision is float32, requested bfloat16"),
        (("--seed", "3"), "seed is 0, requested 3"),
        (("--model", "process_toys:plain_net"), "model is process_toys:net, requested process_toys:plain_net"),
    ],
)
def test_an_interrupted_run_is_not_resumed_with_another_configuration(
    folder: Path, uninterrupted: dict[str, dict[str, object]], words: tuple[str, ...], difference: str
) -> None:
    out = f"changed {words[0]}"
    assert train(folder, "labels", out, TOY_SIGNAL="SIGKILL:step:7").code == -signal.SIGKILL
    result = run_ltkd(folder, "train", "--data", "photos", *DROPOUT, *words, "--out", out)
    assert result.code == 2
    assert result.output == f"error: {out} has a run of another configuration ({difference}); give another --out.\n"
    assert train(folder, "labels", out).code == 0
    assert run_contents(folder / out) == uninterrupted["labels"]


def test_a_comparison_that_is_interrupted_three_times_ends_with_the_same_rows_and_tables(folder: Path) -> None:
    words = ("compare", "--data", "photos", *DROPOUT[2:], *COMPARE, "--seeds", "0,1", "--out")
    whole = run_ltkd(folder, *words, "whole")
    assert whole.code == 0, whole.output
    choice = random.Random(7)
    for name, code in (("SIGKILL", -signal.SIGKILL), ("SIGINT", 130), ("SIGKILL", -signal.SIGKILL)):
        # 120 steps in eight runs; completed steps are not repeated, so every attempt gets further than the one before
        result = run_ltkd(folder, *words, "interrupted", TOY_SIGNAL=f"{name}:step:{choice.randint(10, 35)}")
        assert result.code == code, result.output
    assert len(json.loads((folder / "interrupted" / "compare.json").read_text())["rows"]) < 8
    resumed = run_ltkd(folder, *words, "interrupted")
    assert resumed.code == 0, resumed.output
    records = [json.loads((folder / out / "compare.json").read_text()) for out in ("whole", "interrupted")]
    for record in records:
        del record["date"]
    assert len(records[0]["rows"]) == 8
    assert records[0] == records[1]
    tables = [result.output[result.output.index("Test accuracy") :] for result in (whole, resumed)]
    assert tables[0] == tables[1].replace("all results are in interrupted", "all results are in whole")
    files = [
        sorted(str(path.relative_to(folder / out)) for path in (folder / out).rglob("*"))
        for out in ("whole", "interrupted")
    ]
    assert files[0] == [name for name in files[1] if not name.endswith(".part")]
