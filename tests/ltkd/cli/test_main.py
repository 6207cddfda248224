"""The front door: what it says when something is wrong, and with which exit code."""

import errno
import json
import sys
from pathlib import Path

import pytest
import torch
from training_toys import write_tree

from export import bundling
from export.certification.margins import margins_for
from export.certification.splits import split_test_images
from ltkd.cli import main as cli
from ltkd.contract.class_groups import groups_by_share
from ltkd.models.registry import build_network
from ltkd.training import progress as display
from ltkd.training.run_folder import open_run

Result = tuple[int, str, str]


@pytest.fixture
def ltkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Ltkd":
    return Ltkd(monkeypatch, capsys)


class Ltkd:
    """Runs the command in this process; gives exit code, stdout and stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *words: object) -> Result:
        self.monkeypatch.setattr(sys, "argv", ["ltkd", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        out, err = self.capsys.readouterr()
        return code, out, err


def one_line(result: Result, *parts: str) -> None:
    """Exit code 2 and a single line on stderr that says all of this."""
    code, _, err = result
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err


def test_help_teaches_the_journey(ltkd: Ltkd) -> None:
    code, out, _ = ltkd("--help")
    assert code == 0
    for command in ("train", "distill", "compare", "export", "verify", "serve", "classify", "pipeline"):
        assert command in out
    assert "ltkd export runs/student --out bundles/student" in out


def test_an_unknown_model_is_answered_with_the_known_ones(ltkd: Ltkd, tmp_path: Path) -> None:
    result = ltkd("train", "--data", write_tree(tmp_path / "t"), "--model", "resnet9", "--out", tmp_path / "run")
    one_line(result, "unknown model 'resnet9'", "resnet8", "torchvision/NAME", "package.module:function")
    assert not (tmp_path / "run").exists()


def test_an_unknown_method_is_answered_with_the_known_ones(ltkd: Ltkd, tmp_path: Path) -> None:
    result = ltkd("distill", tmp_path, "--method", "lktd", "--out", tmp_path / "run")
    one_line(result, "unknown method 'lktd'; known: ce, kd, dkd, bkd, reviewkd, ltkd, ltkd_plus")


def test_a_comparison_with_an_unknown_method_trains_nothing(ltkd: Ltkd, tmp_path: Path) -> None:
    one_line(ltkd("compare", "--methods", "ce,magic", "--out", tmp_path / "c"), "unknown method 'magic'")
    assert not (tmp_path / "c").exists()


def test_an_unknown_recipe_and_an_unknown_data_set_are_answered_with_the_known_ones(ltkd: Ltkd, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    one_line(ltkd("train", "--data", tree, "--recipe", "quick", "--out", tmp_path / "r"), "known: demo, short, paper")
    one_line(ltkd("train", "--data", "cifar", "--out", tmp_path / "r"), "'cifar' is no data set (glyphs, cifar100)")


@pytest.mark.parametrize("words", [("--set", "alpha"), ("--set", "=3")])
def test_a_parameter_without_a_value_is_explained(ltkd: Ltkd, tmp_path: Path, words: tuple[str, ...]) -> None:
    code, _, err = ltkd("distill", tmp_path, "--out", tmp_path / "run", *words)
    assert code == 2 and err.startswith("error: ") and "alpha" in err


def test_seeds_that_are_no_numbers_or_repeat_are_explained(ltkd: Ltkd, tmp_path: Path) -> None:
    for seeds in ("one", "0,0", "0,,1", "-1"):
        one_line(
            ltkd("compare", "--seeds", seeds, "--out", tmp_path / "c"), "--seeds takes different numbers from 0 on"
        )
    for gammas in ("0.5", "100,100", "inf", "x"):
        one_line(
            ltkd("compare", "--gammas", gammas, "--out", tmp_path / "c"), "--gammas takes different numbers from 1"
        )


def test_a_contestant_named_twice_or_with_a_broken_parameter_is_explained(ltkd: Ltkd, tmp_path: Path) -> None:
    one_line(ltkd("compare", "--methods", "kd,kd", "--out", tmp_path / "c"), "a method is named twice: kd, kd")
    one_line(
        ltkd("compare", "--methods", "ltkd:alpha", "--out", tmp_path / "c"), "a parameter is NAME=VALUE, got 'alpha'"
    )
    one_line(ltkd("compare", "--methods", "ltkd:gamma=2", "--out", tmp_path / "c"), "no parameter 'gamma'")


def test_a_teacher_from_elsewhere_is_adopted_as_it_is_and_distilled(ltkd: Ltkd, tmp_path: Path) -> None:
    tree, weights = write_tree(tmp_path / "tree"), tmp_path / "w.pt"
    one_line(
        ltkd("train", "--data", tree, "--recipe", "adopt", "--out", tmp_path / "t"), "give its weights with --weights"
    )
    one_line(
        ltkd("train", "--data", tree, "--recipe", "adopt", "--weights", weights, "--out", tmp_path / "t"), "is no file"
    )
    own = build_network("resnet8", 3, seed=5)
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in own.state_dict().items()}}, weights)
    words = ("--model", "resnet8", "--recipe", "adopt", "--weights", weights, "--out", tmp_path / "teacher")
    assert ltkd("train", "--data", tree, *words)[0] == 0
    adopted = open_run(tmp_path / "teacher")
    assert all(
        torch.equal(tensor, own.state_dict()[name]) for name, tensor in adopted.load_network().state_dict().items()
    )
    assert set(adopted.accuracy()) == {"head", "medium", "tail", "all"}
    assert ltkd("distill", tmp_path / "teacher", "--recipe", "demo", "--out", tmp_path / "student")[0] == 0


def test_a_run_folder_without_weights_is_not_exported(ltkd: Ltkd, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, _ = ltkd("train", "--data", write_tree(tmp_path / "t"), "--recipe", "demo", "--out", run)
    assert code == 0 and "Next: ltkd distill" in out
    (run / "weights.safetensors").unlink()
    one_line(ltkd("export", run, "--out", tmp_path / "bundle"), "has no weights.safetensors: its training stopped")
    assert not (tmp_path / "bundle").exists()


def test_folders_that_are_no_runs_and_no_bundles_are_told_apart(ltkd: Ltkd, tmp_path: Path) -> None:
    one_line(ltkd("export", tmp_path / "none", "--out", tmp_path / "b"), "is no run folder: no such directory")
    one_line(ltkd("verify", tmp_path / "none"), "is no bundle: no such directory")
    one_line(ltkd("serve", tmp_path), "holds no bundle, none in NAME/", "make one with: ltkd export RUN --out")


def test_an_unreadable_image_is_named_and_nothing_is_written(ltkd: Ltkd, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    (tree / "train" / "green" / "3.png").write_bytes(b"no image")
    one_line(
        ltkd("train", "--data", tree, "--out", tmp_path / "run"), "1 of 55 images are unreadable", "green", "3.png"
    )
    assert not (tmp_path / "run").exists()


def test_an_inconclusive_export_ends_with_code_3_and_without_a_bundle(
    ltkd: Ltkd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loose = margins_for("fp32", {"all": 0.3, "head": 0.3, "medium": 0.3, "tail": 0.3}, groups_by_share([3, 2, 1]))
    monkeypatch.setattr(
        bundling, "split_test_images", lambda data, margins: split_test_images(data, loose)
    )  # too few views for the default
    tree, run = write_tree(tmp_path / "tree"), tmp_path / "run"
    assert ltkd("train", "--data", tree, "--recipe", "demo", "--model", "resnet8", "--out", run)[0] == 0
    code, out, _ = ltkd("export", run, "--out", tmp_path / "bundles" / "b")
    assert code == 3
    assert "INCONCLUSIVE" in out and f"did not pass: {tmp_path / 'bundles' / 'rejected' / 'b'}" in out
    assert not (tmp_path / "bundles" / "b").exists()
    rejected = tmp_path / "bundles" / "rejected" / "b"
    assert json.loads((rejected / "parity.json").read_text())["verdict"] == "INCONCLUSIVE"
    assert not list(rejected.glob("model*"))


def test_forty_images_with_a_class_of_two_go_the_whole_way_without_an_option(ltkd: Ltkd, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "photos", train_counts=(25, 13, 2), num_test=4)
    teacher, student, bundle = tmp_path / "teacher", tmp_path / "student", tmp_path / "bundle"
    assert ltkd("train", "--data", tree, "--out", teacher)[0] == 0
    assert ltkd("distill", teacher, "--out", student)[0] == 0
    code, out, _ = ltkd("export", student, "--out", bundle)
    assert code == 0
    assert "of them random views of others, out of the 12 test images of photos" in out
    assert ltkd("verify", bundle)[0] == 0
    code, out, _ = ltkd("classify", bundle, *(tree / "test" / "red").iterdir())
    assert code == 0 and out.count("by group: head") == 4


def test_a_full_disk_is_one_line_wherever_it_happens(
    ltkd: Ltkd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(config: object, on_file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "compare.json")

    monkeypatch.setattr(display, "load_dataset", full)
    words = ("train", "--data", write_tree(tmp_path / "tree"), "--out", tmp_path / "run")
    one_line(ltkd(*words), "compare.json: No space left on device; make room and give the same command again")


def test_a_missing_package_is_answered_with_the_extra_that_has_it(ltkd: Ltkd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # the import system takes None for "not installed"
    for module in [name for name in sys.modules if name.startswith(("ltkd.", "export"))]:
        if module != "ltkd.cli.main" and module != "ltkd.errors":
            monkeypatch.delitem(sys.modules, module)
    one_line(ltkd("export", "run", "--out", "bundle"), "this command needs torch; install it with: pip install 'ltkd[")
