import io
from pathlib import Path

from report_toys import idle_bundle
from rich.console import Console

from export.report.console import bundle_summary
from export.verify import read_report
from ltkd.contract.bundle import Precision, open_bundle


def lines_of(path: Path, width: int = 120, failing: Precision | None = None) -> list[str]:
    bundle = open_bundle(idle_bundle(path, failing=failing))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(bundle_summary(bundle, read_report(bundle)))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_summary_of_a_bundle_fits_one_screen(tmp_path: Path) -> None:
    lines = lines_of(tmp_path / "student")
    text = "\n".join(lines)
    assert lines[0] == "cifar100-student: PASS against torch float32 of the run cifar100-student"
    for fact in (
        "12 (head 4, medium 4, tail 4)",
        "5 to 500 per class",
        "uint8 [N, 32, 32, 3], RGB",
        "run cifar100-student: resnet8 by ltkd, weights 666666666666",
        "certified on     the 1,200 test images of cifar100",
        f"ltkd serve {tmp_path / 'student'}",
        f"ltkd verify {tmp_path / 'student'}",
        "no guarantee",
    ):
        assert fact in text
    assert len(lines) <= 40


def test_every_precision_shows_accuracy_bound_of_the_loss_and_margin_of_each_group(tmp_path: Path) -> None:
    bundle = open_bundle(idle_bundle(tmp_path / "student"))
    row = read_report(bundle).candidates[2].groups[2]
    assert row.candidate_accuracy is not None
    line = next(line for line in lines_of(tmp_path / "student") if line.strip().startswith("tail"))
    assert f"{100 * row.candidate_accuracy:.2f} / {100 * row.loss_upper_limit:.2f} / 3.00" in line


def test_a_precision_that_did_not_pass_is_marked_as_not_in_the_bundle(tmp_path: Path) -> None:
    line = next(line for line in lines_of(tmp_path / "student", failing="int8") if line.strip().startswith("int8"))
    assert "FAIL" in line and "not in bundle" in line


def test_the_summary_fits_a_console_of_eighty_columns(tmp_path: Path) -> None:
    lines = lines_of(tmp_path / "s", width=80)
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 50
