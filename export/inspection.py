"""What a person wants to know of a bundle, on one screen."""

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from export.console import confidence_table, percent, styled
from export.parity import ALL, CandidateReport, ParityReport
from ltkd.bundle import Bundle


def inspection(bundle: Bundle, report: ParityReport) -> Group:
    """Name, verdicts, accuracy and confidence per group, sizes, input, origin, and how to go on."""
    manifest = bundle.manifest
    head = Text.from_markup(
        f"[bold]{escape(manifest.name)}[/]: {styled(report.verdict)} against {escape(report.reference)}"
    )
    return Group(
        head,
        _facts(bundle),
        _precisions(bundle, report),
        Text(f"accuracy per group, limits at {100 * report.confidence:g} %", style="bold"),
        _accuracies(bundle, report),
        Text("what confidence means in each group (fp32), in %", style="bold"),
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
        "training images": f"{min(task.train_counts):,} to {max(task.train_counts):,} a class",
        "input": f"image, uint8 [N, {task.input_px}, {task.input_px}, 3], RGB; normalisation is inside",
        "outside": f"decode to RGB, centre square, resize to {task.input_px} x {task.input_px}",
        "source": f"run {source.run}: {source.model} by {source.method}, weights {source.weights_sha256[:12]}",
        "certified on": manifest.certified_on,
    }
    table = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        table.add_row(name, escape(fact))
    return table


def _precisions(bundle: Bundle, report: ParityReport) -> Table:
    """A row a precision that was tried: its verdict, and the file where it passed."""
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("precision", "verdict", "file", "certified on"):
        table.add_column(heading, no_wrap=True)
    table.add_column("size", justify="right")
    for candidate in report.candidates:
        model = bundle.manifest.precisions.get(candidate.precision)
        facts = ("not inside", "-", "-") if model is None else (model.path, model.provider, _size(model.num_bytes))
        table.add_row(candidate.precision, styled(candidate.verdict), *facts)
    return table


def _accuracies(bundle: Bundle, report: ParityReport) -> Table:
    """A row a group: with each precision its accuracy, how much of it was lost at most, and how much may be lost."""
    table = Table(box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("group", no_wrap=True)
    inside = [candidate for candidate in report.candidates if candidate.precision in bundle.manifest.precisions]
    for candidate in inside:
        table.add_column(f"{candidate.precision}\n% / at most / margin", justify="right")
    for group in (*report.groups, ALL):
        table.add_row(escape(group), *(_cell(candidate, group) for candidate in inside))
    return table


def _cell(candidate: CandidateReport, group: str) -> str:
    row = next((row for row in candidate.groups if row.group == group), None)
    if row is None:
        return "-"
    return " / ".join(percent(value) for value in (row.candidate_accuracy, row.loss_upper_limit, row.margin))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.3g} MB" if num_bytes >= 100_000 else f"{num_bytes:,} bytes"
