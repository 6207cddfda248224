"""What happens to a training when its process, its disk or its user stops it: whole commands in real processes."""

import json
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from process_toys import STEPS, Ended, ltkd_, start
from safetensors.torch import load_file
from training_toys import write_tree

from ltkd.contract.records import sha256_of

pytestmark = pytest.mark.slow

DROPOUT = ("--model", "process_toys:net", "--recipe", "toy", "--device", "cpu")
COMPARE = ("--teacher-model", "process_toys:net", "--student-model", "process_toys:net", "--methods", "ce,kd,ltkd_plus")
ENDINGS = {
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
    done = ltkd_(folder, "train", "--data", "photos", *DROPOUT, "--out", "teacher")
    assert done.code == 0, done.said
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, dict[str, object]]:
    """What every kind of training leaves that was never interrupted."""
    left = {}
    for kind in ENDINGS:
        done = train(folder, kind, f"undisturbed {kind}")
        assert done.code == 0, done.said
        left[kind] = remains(folder / f"undisturbed {kind}")
    shutil.rmtree(folder / "teacher" / "logits")
    return left


def train(folder: Path, kind: str, out: str, **variables: str) -> Ended:
    what = ("distill", "teacher") if "--method" in ENDINGS[kind] else ("train", "--data", "photos")
    return ltkd_(folder, *what, *DROPOUT, *ENDINGS[kind], "--out", out, **variables)


def remains(run: Path) -> dict[str, object]:
    """Everything of a complete run that does not depend on the time of day."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["images_per_s"]
    return {
        "weights": sha256_of(run / "weights.safetensors"),
        "metrics": lines,
        "files": sorted(path.name for path in run.iterdir()),
    }


@pytest.mark.parametrize("kind", ENDINGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_training_that_is_killed_again_and_again_ends_with_the_same_bits(
    folder: Path, undisturbed: dict[str, dict[str, object]], kind: str, seed: int
) -> None:
    choice, out = random.Random(f"{kind} {seed}"), f"killed {kind} {seed}"
    codes = []
    for _ in range(4):
        # of a process's own steps and writes: in mid-epoch, at its end, and with a file half there; a training that is
        # nearly over has fewer left than that, and then completes
        end = choice.choice([f"SIGKILL:step:{choice.randint(1, 6)}", f"SIGKILL:write:{choice.randint(1, 8)}"])
        codes.append(train(folder, kind, out, TOY_END=end).code)
    assert codes.count(-signal.SIGKILL) >= 2 and set(codes) <= {-signal.SIGKILL, 0}
    done = train(folder, kind, out)
    assert done.code == 0, done.said
    assert remains(folder / out) == undisturbed[kind]


def test_a_kill_is_a_kill_and_without_the_random_state_the_bits_would_differ(
    folder: Path, undisturbed: dict[str, dict[str, object]]
) -> None:
    assert train(folder, "labels", "forgetful", TOY_END="SIGKILL:step:8").code == -signal.SIGKILL
    state = folder / "forgetful" / "checkpoint" / "state.safetensors"
    content = state.read_bytes()
    cut = content.index(b"rank0.random.cpu")
    assert cut > 0
    # the random state is the one tensor of bytes: change one of them
    size = int.from_bytes(content[:8], "little")
    begin = json.loads(content[8 : 8 + size])["rank0.random.cpu"]["data_offsets"][0] + 8 + size + 3000
    state.write_bytes(content[:begin] + bytes([content[begin] ^ 1]) + content[begin + 1 :])
    done = train(folder, "labels", "forgetful")
    assert "going on after 7 steps" in done.said
    assert remains(folder / "forgetful") != undisturbed["labels"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("kind", ["labels", "float16"])
def test_a_signal_saves_in_mid_epoch_and_says_how_to_go_on(
    folder: Path, undisturbed: dict[str, dict[str, object]], number: signal.Signals, code: int, kind: str
) -> None:
    out = f"stopped {kind} {code}"
    # no checkpoint in mid-epoch but the one that the signal asks for
    done = train(folder, kind, out, TOY_END=f"{number.name}:step:8", TOY_SAVE_EVERY_S="1000")
    assert done.code == code
    stopped = re.fullmatch(
        rf"stopped in {out} after epoch (\d) of 3 and ([1-4]) of 5 steps; saved\. "
        r"The same command goes on from there\.",
        done.said.splitlines()[-1],
    )
    assert stopped is not None
    again = train(folder, kind, out)
    assert f"going on after {5 * int(stopped[1]) + int(stopped[2])} steps" in again.said
    assert remains(folder / out) == undisturbed[kind]


def test_a_signal_in_the_last_step_is_obeyed_too(folder: Path, undisturbed: dict[str, dict[str, object]]) -> None:
    done = train(folder, "labels", "last", TOY_END=f"SIGTERM:step:{STEPS}")
    assert done.code == 143
    assert "after epoch 3 of 3 and 0 of 5 steps" in done.said
    assert train(folder, "labels", "last").code == 0
    assert remains(folder / "last") == undisturbed["labels"]


def test_a_second_ctrl_c_ends_at_once(folder: Path, undisturbed: dict[str, dict[str, object]]) -> None:
    done = train(folder, "labels", "twice", TOY_END="SIGINT:step:8,SIGINT:step:8")
    assert done.code == 130
    assert done.said.splitlines()[-1].startswith("interrupted; ")
    again = train(folder, "labels", "twice")
    assert "going on after 7 steps" in again.said  # the eighth was not finished, and nothing was saved on the way out
    assert remains(folder / "twice") == undisturbed["labels"]


def test_a_second_sigterm_changes_nothing(folder: Path) -> None:
    done = train(folder, "labels", "told twice", TOY_END="SIGTERM:step:8,SIGTERM:step:8")
    assert done.code == 143
    assert "and 3 of 5 steps; saved" in done.said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB: room for some twenty checkpoints, were they not one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a file system of its own can only be mounted by root: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


# pages of 4 KiB that are free: for no file; for the first ones but no checkpoint; for a checkpoint but not for a second
# one beside it; for all but the picture of the curves
@pytest.mark.parametrize("free_pages", [0, 3, 6, 9])
def test_a_full_disk_is_one_line_and_after_making_room_the_same_command_ends_with_the_same_bits(
    folder: Path, small_disk: Path, undisturbed: dict[str, dict[str, object]], free_pages: int
) -> None:
    (small_disk / "ballast").write_bytes(bytes(4096 * (16 - free_pages)))
    done = train(folder, "labels", str(small_disk / "run"))
    assert done.code == 2
    *_, last = done.said.strip().splitlines()
    assert last.startswith("error: ") and "could not be written (No space left on device)" in last
    assert "Traceback" not in done.said
    state = small_disk / "run" / "checkpoint" / "state.safetensors"
    assert not state.exists() or load_file(state)
    assert not list(small_disk.rglob("*.part"))
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    again = train(folder, "labels", str(small_disk / "run"))
    assert again.code == 0, again.said
    assert remains(small_disk / "run") == undisturbed["labels"]


def test_two_processes_in_one_folder_do_not_disturb_each_other(
    folder: Path, undisturbed: dict[str, dict[str, object]]
) -> None:
    words = ("train", "--data", "photos", *DROPOUT, "--out", "contested")
    ended = [each.ended() for each in [start(folder, *words) for _ in range(3)]]
    refused = [each for each in ended if each.code]
    for each in refused:
        assert each.code == 2
        assert each.said == "error: another process is training in contested; wait for it, or give another --out.\n"
    assert len(refused) < 3
    assert remains(folder / "contested") == undisturbed["labels"]


def test_the_folder_of_a_killed_process_is_free_at_once(
    folder: Path, undisturbed: dict[str, dict[str, object]]
) -> None:
    assert train(folder, "labels", "freed", TOY_END="SIGKILL:step:3").code == -signal.SIGKILL
    assert train(folder, "labels", "freed").code == 0
    assert remains(folder / "freed") == undisturbed["labels"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "logit_adjustment=1"), "method.parameters.logit_adjustment is 0.0, asked for 1.0"),
        (("--precision", "bfloat16"), "execution.precision is float32, asked for bfloat16"),
        (("--seed", "3"), "seed is 0, asked for 3"),
        (("--model", "process_toys:plain_net"), "model is process_toys:net, asked for process_toys:plain_net"),
    ],
)
def test_an_interrupted_run_is_not_continued_as_another_one(
    folder: Path, undisturbed: dict[str, dict[str, object]], words: tuple[str, ...], said: str
) -> None:
    out = f"changed {words[0]}"
    assert train(folder, "labels", out, TOY_END="SIGKILL:step:7").code == -signal.SIGKILL
    done = ltkd_(folder, "train", "--data", "photos", *DROPOUT, *words, "--out", out)
    assert done.code == 2
    assert done.said == f"error: {out} holds a run of another configuration ({said}); give another --out.\n"
    assert train(folder, "labels", out).code == 0
    assert remains(folder / out) == undisturbed["labels"]


def test_a_comparison_that_is_interrupted_three_times_ends_with_the_same_rows_and_tables(folder: Path) -> None:
    words = ("compare", "--data", "photos", *DROPOUT[2:], *COMPARE, "--seeds", "0,1", "--out")
    whole = ltkd_(folder, *words, "whole")
    assert whole.code == 0, whole.said
    choice = random.Random(7)
    for name, code in (("SIGKILL", -signal.SIGKILL), ("SIGINT", 130), ("SIGKILL", -signal.SIGKILL)):
        # of 120 steps of eight runs; what was done before is not done again, so each gets further than the last
        done = ltkd_(folder, *words, "torn", TOY_END=f"{name}:step:{choice.randint(10, 35)}")
        assert done.code == code, done.said
    assert len(json.loads((folder / "torn" / "compare.json").read_text())["rows"]) < 8
    again = ltkd_(folder, *words, "torn")
    assert again.code == 0, again.said
    records = [json.loads((folder / out / "compare.json").read_text()) for out in ("whole", "torn")]
    for record in records:
        del record["date"]
    assert len(records[0]["rows"]) == 8
    assert records[0] == records[1]
    tables = [ended.said[ended.said.index("Test accuracy") :] for ended in (whole, again)]
    assert tables[0] == tables[1].replace("everything in torn", "everything in whole")
    files = [
        sorted(str(path.relative_to(folder / out)) for path in (folder / out).rglob("*")) for out in ("whole", "torn")
    ]
    assert files[0] == [name for name in files[1] if not name.endswith(".part")]
