"""The parity report and the summary of a bundle on the console.

``ltkd export`` and ``ltkd parity`` print the report with ``print_report``. ``ltkd inspect`` prints the summary of a
bundle. The module ``html`` writes the same report as a web page.
"""

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from export.schema import ALL, CandidateReport, ParityReport, Verdict
from ltkd.contract.bundle import Bundle
from ltkd.contract.calibration import Calibration, GroupCalibration, Proportion

_STYLES: dict[Verdict, str] = {"PASS": "green", "FAIL": "bold red", "INCONCLUSIVE": "yellow"}


def print_report(report: ParityReport, console: Console) -> None:
    """Print the report: per candidate the accuracy per group, the gates with their findings, and the confidence."""
    for candidate in report.candidates:
        for section in _candidate(report, candidate):
            console.print(section, soft_wrap=isinstance(section, Text))
    certify = report.data.splits[-1]
    views = f", including {report.data.num_views:,} random augmented views" if report.data.num_views else ""
    summary = f"certified on {certify.num_images:,} images{views}, from {report.data.description}"
    console.print(summary, markup=False, highlight=False, soft_wrap=True)


def parity_table(candidate: CandidateReport) -> Table:
    """Tabulate the accuracy of one candidate in per cent, one row per group."""
    table = _table()
    for heading in ("n", "reference", "candidate", "loss", "upper\nbound", "margin", "flips"):
        table.add_column(heading, justify="right")
    table.add_column("verdict", no_wrap=True)
    for row in candidate.groups:
        fractions = (row.reference_accuracy, row.candidate_accuracy, row.loss, row.loss_upper_limit, row.margin)
        table.add_row(
            escape(row.group),
            f"{row.num_images:,}",
            *map(percent, fractions),
            f"{row.num_flips:,}",
            styled(row.verdict),
        )
    return table


def confidence_table(calibration: Calibration) -> Table:
    """Tabulate the calibration of each group: temperature, coverage of prediction sets, confidence threshold."""
    table = _table()
    headings = ("temperature", "coverage\nof sets", "expected range", "confidence\nthreshold", "accuracy\nabove it")
    for heading in headings:
        table.add_column(heading, justify="right")
    for group in calibration:
        table.add_row(escape(group.group), f"{group.temperature:.2f}", *_coverage(group), *_abstention(group))
    return table


def percent(fraction: float | None) -> str:
    """Format a fraction in per cent for a table cell."""
    return "-" if fraction is None else f"{100 * fraction:.2f}"


def styled(verdict: Verdict) -> str:
    """Format a verdict in its colour, as rich markup."""
    return f"[{_STYLES[verdict]}]{verdict}[/]"


def _candidate(report: ParityReport, candidate: CandidateReport) -> Iterator[RenderableType]:
    yield Text.from_markup(
        f"[bold]{candidate.precision}[/] {styled(candidate.verdict)} against {escape(report.reference)}, on "
        f"{escape(candidate.runtime.provider)}; accuracy in %, bounds at {100 * report.confidence:g} % confidence"
    )
    if candidate.groups:
        yield parity_table(candidate)
    yield Text.from_markup("   ".join(f"{gate.name} {styled(gate.verdict)}" for gate in candidate.gates))
    for gate in candidate.gates:
        if gate.verdict != "PASS":
            yield from (Text(f"{gate.name} {gate.verdict}: {finding}") for finding in gate.findings)
    flagged = [row.label for row in candidate.classes if row.flagged]
    if flagged:
        yield Text(f"classes that lost accuracy: {', '.join(flagged[:10])}{', ...' if len(flagged) > 10 else ''}")
    if candidate.certificate is not None:
        yield Text(f"\n{candidate.precision}: calibrated confidence per group, in %", style="bold")
        yield confidence_table(candidate.certificate.calibration)
    yield Text()


def _table() -> Table:
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("group", no_wrap=True)
    return table


def _coverage(group: GroupCalibration) -> tuple[str, str]:
    thresholds = group.prediction_set
    return _proportion(thresholds.coverage), f"{percent(thresholds.low)} - {percent(thresholds.high)}"


def _abstention(group: GroupCalibration) -> tuple[str, str]:
    abstention = group.abstention
    if abstention.threshold is None:
        return "no guarantee", "-"
    return percent(abstention.threshold), _proportion(abstention.precision)


def _proportion(share: Proportion | None) -> str:
    return "-" if share is None else f"{percent(share.value)} of {share.n:,}"


def bundle_summary(bundle: Bundle, report: ParityReport) -> Group:
    """Summarise a bundle: verdicts, sizes, input, source, accuracy and confidence per group, and the next commands."""
    manifest = bundle.manifest
    confidence = f"{100 * report.confidence:g} %"
    head = Text.from_markup(
        f"[bold]{escape(manifest.name)}[/]: {styled(report.verdict)} against {escape(report.reference)}"
    )
    return Group(
        head,
        _facts(bundle),
        _precisions(bundle, report),
        Text(
            f"accuracy, upper bound of the loss (at {confidence}) and margin per group, in %",
            style="bold",
        ),
        _accuracies(bundle, report),
        Text("calibrated confidence per group (fp32), in %", style="bold"),
        confidence_table(manifest.precisions["fp32"].calibration),
        Text.from_markup(
            f"serve it:  ltkd serve {escape(str(bundle.path))}\ncheck it:  ltkd verify {escape(str(bundle.path))}"
        ),
    )


def _facts(bundle: Bundle) -> Table:
    manifest, task = bundle.manifest, bundle.manifest.task
    counts = ", ".join(f"{name} {len(task.groups.members(name))}" for name in task.groups.names)
    source = manifest.source
    facts = {
        "classes": f"{len(task.class_names):,} ({counts})",
        "training images": f"{min(task.train_counts):,} to {max(task.train_counts):,} per class",
        "input": f"image, uint8 [N, {task.input_px}, {task.input_px}, 3], RGB; the model normalises it",
        "preprocessing": task.preprocessing.description,
        "source": f"run {source.run}: {source.model} by {source.method}, weights {source.weights_sha256[:12]}",
        "certified on": manifest.certified_on,
    }
    table = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        table.add_row(name, escape(fact))
    return table


def _precisions(bundle: Bundle, report: ParityReport) -> Table:
    """Tabulate the verdict of every precision that was tried, with its file if the precision passed."""
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("precision", "verdict", "file", "certified on"):
        table.add_column(heading, no_wrap=True)
    table.add_column("size", justify="right")
    for candidate in report.candidates:
        model = bundle.manifest.precisions.get(candidate.precision)
        facts = ("not in bundle", "-", "-") if model is None else (model.path, model.provider, _size(model.num_bytes))
        table.add_row(candidate.precision, styled(candidate.verdict), *facts)
    return table


def _accuracies(bundle: Bundle, report: ParityReport) -> Table:
    """Tabulate accuracy, upper bound of the loss and margin of each precision in the bundle, one row per group."""
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("group", no_wrap=True)
    certified = [candidate for candidate in report.candidates if candidate.precision in bundle.manifest.precisions]
    for candidate in certified:
        table.add_column(f"{candidate.precision}\nacc. / loss / margin", justify="right")
    for group in (*report.groups, ALL):
        table.add_row(escape(group), *(_cell(candidate, group) for candidate in certified))
    return table


def _cell(candidate: CandidateReport, group: str) -> str:
    row = next((row for row in candidate.groups if row.group == group), None)
    if row is None:
        return "-"
    return " / ".join(percent(value) for value in (row.candidate_accuracy, row.loss_upper_limit, row.margin))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.3g} MB" if num_bytes >= 100_000 else f"{num_bytes:,} bytes"
