import io

from report_toys import report_of
from rich.console import Console, RenderableType

from export.report.console import confidence_table, parity_table, print_report
from export.schema import ParityReport


def printed_lines(renderable: RenderableType, width: int = 110) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text().splitlines()


def report_lines(report: ParityReport, width: int = 110) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    print_report(report, console)
    return console.export_text().splitlines()


def line_of(lines: list[str], start: str) -> str:
    return next(line for line in lines if line.lstrip().startswith(start))


def test_a_candidate_has_one_row_per_group_in_per_cent_and_its_gates_below() -> None:
    report = report_of()
    row = report.candidates[2].groups[2]
    assert row.reference_accuracy is not None and row.candidate_accuracy is not None and row.loss is not None
    lines = printed_lines(parity_table(report.candidates[2]))
    expected = [row.reference_accuracy, row.candidate_accuracy, row.loss, row.loss_upper_limit, 0.03]
    assert line_of(lines, "tail").split() == [
        "tail", f"{row.num_images:,}", *(f"{100 * value:.2f}" for value in expected), f"{row.num_flips:,}", "PASS",
    ]  # fmt: skip
    lines = report_lines(report, width=200)
    assert line_of(lines, "int8").rstrip() == (
        "int8 PASS against torch float32 of the run cifar100-student, on CPUExecutionProvider; accuracy in %, "
        "bounds at 95 % confidence"
    )
    assert line_of(lines, "G0").rstrip() == (
        "G0 structure PASS   G1 numeric PASS   G2 decisions PASS   G3 task PASS   G4 confidence PASS   G5 host PASS"
    )


def test_the_findings_of_a_failed_gate_and_the_classes_that_lost_accuracy_are_printed() -> None:
    lines = report_lines(report_of(100, "int8"))
    findings = [line.rstrip() for line in lines if line.startswith("G3 task FAIL: ")]
    assert [finding.split()[3] for finding in findings] == ["tail:", "all:", "the"]
    assert findings[2].endswith("the first layer above rounding is /classifier/Gemm.")
    assert line_of(lines, "classes that lost accuracy: ").count(",") <= 10


def test_the_confidence_table_shows_coverage_and_missing_guarantees() -> None:
    certificate = report_of().candidates[0].certificate
    assert certificate is not None
    lines = printed_lines(confidence_table(certificate.calibration))
    assert line_of(lines, "head").split() == [
        "head", "1.20", "90.00", "of", "1,980", "86.60", "-", "93.10", "71.00", "93.00", "of", "620",
    ]  # fmt: skip
    assert line_of(lines, "tail").split()[-3:] == ["no", "guarantee", "-"]


def test_a_group_without_images_has_dashes_for_values() -> None:
    report = report_of()
    empty = (
        report.candidates[0]
        .groups[0]
        .model_copy(update={"num_images": 0, "reference_accuracy": None, "candidate_accuracy": None, "loss": None})
    )
    candidate = report.candidates[0].model_copy(update={"groups": (empty,)})
    assert line_of(printed_lines(parity_table(candidate)), "head").split()[:5] == ["head", "0", "-", "-", "-"]


def test_a_candidate_that_failed_the_structure_gate_is_printed_with_the_reason() -> None:
    report = report_of()
    broken = report.candidates[0].gates[0].model_copy(update={"verdict": "FAIL", "findings": ("it is [not] a model.",)})
    candidate = report.candidates[0].model_copy(
        update={"verdict": "FAIL", "gates": (broken,), "groups": (), "classes": (), "certificate": None}
    )
    lines = report_lines(report.model_copy(update={"reference": "a.onnx", "candidates": (candidate,)}))
    assert [line.rstrip() for line in lines] == [
        "fp32 FAIL against a.onnx, on CPUExecutionProvider; accuracy in %, bounds at 95 % confidence",
        "G0 structure FAIL",
        "G0 structure FAIL: it is [not] a model.",
        "",
        f"certified on {report.data.splits[-1].num_images:,} images, including 1,000 random augmented views, "
        "from the 10,000 test images of cifar100",
    ]


def test_names_with_brackets_are_shown_as_they_are() -> None:
    report = report_of()
    row = report.candidates[0].groups[0].model_copy(update={"group": "[red]head[/]"})
    candidate = report.candidates[0].model_copy(update={"groups": (row,)})
    assert "[red]head[/]" in " ".join(printed_lines(parity_table(candidate)))


def test_everything_fits_a_console_of_eighty_columns() -> None:
    report: ParityReport = report_of()
    for line in report_lines(report, width=80):
        assert len(line) <= 80 or line[0].isalnum()  # the terminal wraps sentences; tables must fit
    assert "PASS" in line_of(printed_lines(parity_table(report.candidates[0]), width=80), "tail")
