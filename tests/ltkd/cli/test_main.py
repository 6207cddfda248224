"""The command line: help screens, error messages and exit codes."""

import errno
import json
import sys
from pathlib import Path

import click
import pytest
import torch
from training_toys import write_tree

from export import bundling
from export.certification.accuracy_margins import margins_for
from export.certification.splits import split_test_images
from ltkd.cli import main as cli
from ltkd.cli import serve as serve_commands
from ltkd.contract.class_groups import groups_by_share
from ltkd.models.registry import build_network
from ltkd.training import progress as progress_module
from ltkd.training.run_folder import open_run
from serve.http.api_keys import ROLES, read_keys

Result = tuple[int, str, str]


@pytest.fixture
def ltkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> "Ltkd":
    return Ltkd(monkeypatch, capsys)


class Ltkd:
    """Runs the command in this process; returns exit code, stdout and stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Result:
        self.monkeypatch.setattr(sys, "argv", ["ltkd", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        out, err = self.capsys.readouterr()
        return code, out, err


def assert_error(result: Result, *parts: str) -> None:
    """Check that the exit code is 2 and that stderr is one line that contains all the parts."""
    code, _, err = result
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err


HELP = """\
Usage: ltkd [OPTIONS] COMMAND [ARGS]...

  Train, certify and serve image classifiers for long-tailed data.

  All steps in one command, on a small data set that is generated locally:
      ltkd pipeline

  Step by step, on your own images (photos/train/CLASS/*, photos/test/CLASS/*):
      ltkd train --data photos --model resnet20 --out runs/teacher
      ltkd distill runs/teacher --method ltkd --model resnet8 --out runs/student
      ltkd export runs/student --out bundles/student
      ltkd serve bundles/student

Options:
  --version   Show the version and exit.
  -h, --help  Show this message and exit.

Commands:
  pipeline  Run all steps: train, distil, export and classify.
  train     Train a network on labels alone, such as a teacher.
  distill   Distil a trained teacher into a student.
  compare   Compare methods over imbalance ratios and seeds.
  export    Certify a run per class group and bundle it as ONNX models.
  parity    Compare the accuracy of any two models per class group.
  verify    Check that a bundle is complete, unchanged and certified.
  inspect   Show the contents of a bundle.
  serve     Serve bundles over HTTP.
  classify  Classify image files with a bundle.
  key       Create an API key for the service.
"""


def test_the_help_screen_has_each_example_on_its_own_line_and_the_commands_in_order_of_use(
    ltkd: Ltkd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = ltkd("--help")
    assert code == 0
    assert out.splitlines() == HELP.splitlines()


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("train", "torchrun --nproc-per-node 4 -m ltkd train ..."),
        ("distill", "torchrun --nproc-per-node 4 -m ltkd distill TEACHER ..."),
        ("key", "ltkd key NAME >> keys"),
    ],
)
@pytest.mark.parametrize("columns", [80, 120])
def test_the_example_of_a_command_stands_on_its_own_line(
    ltkd: Ltkd, monkeypatch: pytest.MonkeyPatch, command: str, example: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = ltkd(command, "--help")
    assert code == 0
    assert example in [line.strip() for line in out.splitlines()]
    assert "\\b" not in out and "\b" not in out


def test_every_option_has_a_help_text() -> None:
    missing = [
        f"{name} {parameter.name}"
        for name, command in cli.cli.commands.items()
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.help
    ]
    assert missing == []


def test_an_unknown_model_is_an_error_that_lists_the_known_models(ltkd: Ltkd, tmp_path: Path) -> None:
    result = ltkd("train", "--data", write_tree(tmp_path / "t"), "--model", "resnet9", "--out", tmp_path / "run")
    assert_error(result, "unknown model 'resnet9'", "resnet8", "torchvision/NAME", "package.module:function")
    assert not (tmp_path / "run").exists()


def test_an_unknown_method_is_an_error_that_lists_the_known_methods(ltkd: Ltkd, tmp_path: Path) -> None:
    result = ltkd("distill", tmp_path, "--method", "lktd", "--out", tmp_path / "run")
    assert_error(result, "unknown method 'lktd'; known: ce, kd, dkd, bkd, reviewkd, ltkd, ltkd_plus")


def test_a_comparison_with_an_unknown_method_trains_nothing(ltkd: Ltkd, tmp_path: Path) -> None:
    assert_error(ltkd("compare", "--methods", "ce,magic", "--out", tmp_path / "c"), "unknown method 'magic'")
    assert not (tmp_path / "c").exists()


def test_an_unknown_recipe_or_data_set_is_an_error_that_lists_the_known_ones(ltkd: Ltkd, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    assert_error(
        ltkd("train", "--data", tree, "--recipe", "quick", "--out", tmp_path / "r"), "choose one of: demo, short, paper"
    )
    assert_error(
        ltkd("train", "--data", "cifar", "--out", tmp_path / "r"), "'cifar' is not a data set (glyphs, cifar100)"
    )


@pytest.mark.parametrize("arguments", [("--set", "alpha"), ("--set", "=3")])
def test_a_parameter_without_a_value_is_an_error_with_an_example(
    ltkd: Ltkd, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    code, _, err = ltkd("distill", tmp_path, "--out", tmp_path / "run", *arguments)
    assert code == 2 and err.startswith("error: ") and "alpha" in err


def test_seeds_and_imbalance_ratios_that_are_not_distinct_numbers_are_errors(ltkd: Ltkd, tmp_path: Path) -> None:
    for seeds in ("one", "0,0", "0,,1", "-1"):
        assert_error(
            ltkd("compare", "--seeds", seeds, "--out", tmp_path / "c"), "--seeds takes distinct numbers of at least 0"
        )
    for gammas in ("0.5", "100,100", "inf", "x"):
        assert_error(
            ltkd("compare", "--gammas", gammas, "--out", tmp_path / "c"),
            "--gammas takes distinct numbers of at least 1",
        )


def test_a_method_that_is_named_twice_or_has_an_invalid_parameter_is_an_error(ltkd: Ltkd, tmp_path: Path) -> None:
    assert_error(ltkd("compare", "--methods", "kd,kd", "--out", tmp_path / "c"), "a method is given twice: kd, kd")
    assert_error(
        ltkd("compare", "--methods", "ltkd:alpha", "--out", tmp_path / "c"),
        "parameters have the form NAME=VALUE, got 'alpha'",
    )
    assert_error(ltkd("compare", "--methods", "ltkd:gamma=2", "--out", tmp_path / "c"), "no parameter 'gamma'")


def test_the_weights_of_an_external_teacher_are_used_unchanged_and_distilled(ltkd: Ltkd, tmp_path: Path) -> None:
    tree, weights = write_tree(tmp_path / "tree"), tmp_path / "w.pt"
    assert_error(
        ltkd("train", "--data", tree, "--recipe", "adopt", "--out", tmp_path / "t"), "give its weights with --weights"
    )
    assert_error(
        ltkd("train", "--data", tree, "--recipe", "adopt", "--weights", weights, "--out", tmp_path / "t"),
        "is not a file",
    )
    network = build_network("resnet8", 3, seed=5)
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in network.state_dict().items()}}, weights)
    arguments = ("--model", "resnet8", "--recipe", "adopt", "--weights", weights, "--out", tmp_path / "teacher")
    assert ltkd("train", "--data", tree, *arguments)[0] == 0
    adopted = open_run(tmp_path / "teacher")
    assert all(
        torch.equal(tensor, network.state_dict()[name]) for name, tensor in adopted.load_network().state_dict().items()
    )
    assert set(adopted.accuracy()) == {"head", "medium", "tail", "all"}
    assert ltkd("distill", tmp_path / "teacher", "--recipe", "demo", "--out", tmp_path / "student")[0] == 0


def test_a_run_folder_without_weights_is_not_exported(ltkd: Ltkd, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, _ = ltkd("train", "--data", write_tree(tmp_path / "t"), "--recipe", "demo", "--out", run)
    assert code == 0 and "Next: ltkd distill" in out
    (run / "weights.safetensors").unlink()
    assert_error(ltkd("export", run, "--out", tmp_path / "bundle"), "has no weights.safetensors: its training stopped")
    assert not (tmp_path / "bundle").exists()


def test_folders_that_are_neither_runs_nor_bundles_are_errors(ltkd: Ltkd, tmp_path: Path) -> None:
    assert_error(ltkd("export", tmp_path / "none", "--out", tmp_path / "b"), "is not a run folder: no such directory")
    assert_error(ltkd("verify", tmp_path / "none"), "is not a bundle: there is no such directory")
    assert_error(
        ltkd("serve", tmp_path), "is not a bundle and has no bundle in NAME/", "make one with: ltkd export RUN --out"
    )


def test_an_unreadable_image_is_named_and_nothing_is_written(ltkd: Ltkd, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    (tree / "train" / "green" / "3.png").write_bytes(b"no image")
    assert_error(
        ltkd("train", "--data", tree, "--out", tmp_path / "run"), "1 of 55 images are unreadable", "green", "3.png"
    )
    assert not (tmp_path / "run").exists()


def test_an_inconclusive_export_exits_with_code_3_and_writes_no_bundle(
    ltkd: Ltkd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = margins_for("fp32", {"all": 0.3, "head": 0.3, "medium": 0.3, "tail": 0.3}, groups_by_share([3, 2, 1]))
    monkeypatch.setattr(
        bundling, "split_test_images", lambda data, margins: split_test_images(data, wide)
    )  # wide margins reserve too few augmented views for the default margins
    tree, run = write_tree(tmp_path / "tree"), tmp_path / "run"
    assert ltkd("train", "--data", tree, "--recipe", "demo", "--model", "resnet8", "--out", run)[0] == 0
    code, out, _ = ltkd("export", run, "--out", tmp_path / "bundles" / "b")
    assert code == 3
    assert "INCONCLUSIVE" in out and f"did not pass: {tmp_path / 'bundles' / 'rejected' / 'b'}" in out
    assert not (tmp_path / "bundles" / "b").exists()
    rejected = tmp_path / "bundles" / "rejected" / "b"
    assert json.loads((rejected / "parity.json").read_text())["verdict"] == "INCONCLUSIVE"
    assert not list(rejected.glob("model*"))
    # int8 is not even tried then, which is no success
    assert ltkd("export", run, "--out", tmp_path / "bundles" / "b", "--precisions", "int8")[0] == 3


def test_forty_images_with_a_class_of_two_are_distilled_exported_and_classified_with_the_defaults(
    ltkd: Ltkd, tmp_path: Path
) -> None:
    tree = write_tree(tmp_path / "photos", train_counts=(25, 13, 2), num_test=4)
    teacher, student, bundle = tmp_path / "teacher", tmp_path / "student", tmp_path / "bundle"
    assert ltkd("train", "--data", tree, "--out", teacher)[0] == 0
    assert ltkd("distill", teacher, "--out", student)[0] == 0
    code, out, _ = ltkd("export", student, "--out", bundle)
    assert code == 0
    assert "random augmented views, from the 12 test images of photos" in out
    assert ltkd("verify", bundle)[0] == 0
    code, out, _ = ltkd("classify", bundle, *(tree / "test" / "red").iterdir())
    assert code == 0 and out.count("by group: head") == 4


def test_a_full_disk_is_reported_in_one_line(ltkd: Ltkd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(config: object, on_file: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "compare.json")

    monkeypatch.setattr(progress_module, "load_dataset", fail)
    arguments = ("train", "--data", write_tree(tmp_path / "tree"), "--out", tmp_path / "run")
    assert_error(
        ltkd(*arguments), "compare.json: No space left on device; free some space and run the same command again"
    )


def test_a_missing_package_is_an_error_that_names_the_extra_to_install(
    ltkd: Ltkd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # importing a module whose entry is None fails
    for module in [name for name in sys.modules if name.startswith(("ltkd.", "export"))]:
        if module != "ltkd.cli.main" and module != "ltkd.errors":
            monkeypatch.delitem(sys.modules, module)
    assert_error(
        ltkd("export", "run", "--out", "bundle"), "this command needs torch; install it with: pip install 'ltkd["
    )


def test_a_key_has_the_given_roles_and_limit_and_only_its_line_is_on_stdout(ltkd: Ltkd, tmp_path: Path) -> None:
    lines = []
    for arguments in ((), ("--role", "classify", "--role", "feedback", "--limit", "20"), ("--role", "admin")):
        code, out, err = ltkd("key", f"camera-{len(lines)}", *arguments)
        assert code == 0
        secret = err.split()[-1]
        assert secret.startswith("ltkd_") and secret not in out
        lines.append(out)
    (tmp_path / "keys").write_text("".join(lines))
    plain, limited, admin = read_keys(tmp_path / "keys")
    assert (plain.roles, plain.limit) == ({"classify"}, None)
    assert (limited.name, limited.roles, limited.limit) == ("camera-1", {"classify", "feedback"}, 20)
    assert admin.roles == set(ROLES)
    assert_error(ltkd("key", "camera", "--limit", "0"), "its limit is from 0.001 to 99999 requests a second")
    assert ltkd("key", "camera", "--role", "root")[0] == 2


def test_the_roles_of_the_command_are_those_of_the_service() -> None:
    assert tuple(serve_commands.ROLES) == ROLES
