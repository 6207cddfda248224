"""The model card: what a bundle's README.md says to somebody who finds it, in the form that Hugging Face reads.

It says nothing of the day, the machine or the speed: the same run, certified anew, gives the same card.
"""

import json
import re
from collections.abc import Iterator, Sequence

from export.schema import CandidateReport, ParityReport
from ltkd.contract.bundle import GOLDEN_FILE, MANIFEST_FILE, PARITY_FILE, REPORT_FILE, Provenance
from ltkd.contract.calibration import GroupCalibration, Proportion
from ltkd.contract.task import Task

MOST_NAMED_CLASSES = 100


def model_card(task: Task, source: Provenance, report: ParityReport) -> str:
    """The card of a bundle, Markdown with its front matter.

    Args:
        task: Classes, groups and preprocessing.
        source: The run behind the bundle.
        report: What the gates said; the precisions that passed are in the bundle.
    """
    sections = (
        _front_matter(report),
        *_head(task, source, report),
        *_use(task),
        *_data(task, source),
        *_accuracy(report),
        *_confidence(report),
        *_certification(report),
        *_limits(report),
        *_files(report),
        *_commands(),
    )
    return "\n\n".join(sections) + "\n"


def passed(report: ParityReport) -> list[CandidateReport]:
    """The candidates that are in the bundle."""
    return [candidate for candidate in report.candidates if candidate.verdict == "PASS"]


def _front_matter(report: ParityReport) -> str:
    """The part that machines read; a text in JSON's quotes is one in YAML too."""
    lines = [
        "---",
        "library_name: onnx",
        "pipeline_tag: image-classification",
        "tags:",
        *(f"- {tag}" for tag in ("onnx", "onnxruntime", "image-classification", "long-tailed", "calibrated")),
        "metrics:",
        "- accuracy",
        "model-index:",
        f"- name: {json.dumps(report.name)}",
        "  results:",
    ]
    for candidate in passed(report):
        lines += [
            "  - task:",
            "      type: image-classification",
            "    dataset:",
            f"      name: {json.dumps(report.data.description)}",
            f"      type: {json.dumps('certification images')}",
            "    metrics:",
        ]
        for row in candidate.groups:
            if row.candidate_accuracy is not None:
                lines += [
                    "    - type: accuracy",
                    f"      name: {json.dumps(f'accuracy, {candidate.precision}, {row.group}')}",
                    f"      value: {row.candidate_accuracy:.6f}",
                ]
    return "\n".join([*lines, "---"])


def _head(task: Task, source: Provenance, report: ParityReport) -> Iterator[str]:
    precisions = ", ".join(candidate.precision for candidate in passed(report))
    yield f"# {_plain(report.name)}"
    yield (
        f"A classifier of images into {len(task.class_names):,} classes: {_plain(source.model)}, trained by "
        f"{_plain(source.method)} and exported to ONNX in {precisions}. Every group of classes was shown to have kept "
        f"its accuracy through the export: **{report.verdict}** against {_plain(report.reference)}, with limits at "
        f"{100 * report.confidence:g} %."
    )


def _use(task: Task) -> Iterator[str]:
    size = f"{task.input_px} x {task.input_px}"
    yield "## Intended use"
    yield (
        f"To name the class of photographs or drawings of the same kind as it was trained and certified on, one class "
        f"an image, out of those listed under Data. The input `image` is uint8 [N, {task.input_px}, {task.input_px}, "
        f"3], RGB: decode, cut the centre square, resize to {size}; normalisation is inside the file. The output "
        f"`logits` is float32 [N, {len(task.class_names)}]."
    )
    yield (
        "Not meant for images of another kind, for images that show none of the classes, or for decisions about people "
        "that nobody looks at again."
    )


def _data(task: Task, source: Provenance) -> Iterator[str]:
    yield "## Data"
    yield f"The training data have a long tail, so classes are judged in groups. Source: run `{_code(source.run)}`."
    rows = []
    for name in task.groups.names:
        counts = [task.train_counts[label] for label in task.groups.members(name)]
        rows.append((name, f"{len(counts):,}", f"{sum(counts):,}", f"{min(counts):,} to {max(counts):,}"))
    yield _table(("group", "classes", "training images", "images a class"), rows)
    for name in task.groups.names:
        labels = [task.class_names[label] for label in task.groups.members(name)]
        more = f" and {len(labels) - MOST_NAMED_CLASSES:,} more" if len(labels) > MOST_NAMED_CLASSES else ""
        yield f"**{_plain(name)}**: {', '.join(_plain(label) for label in labels[:MOST_NAMED_CLASSES])}{more}."


def _accuracy(report: ParityReport) -> Iterator[str]:
    yield "## Accuracy by group"
    yield (
        "In per cent, on the certification images. “Lost at most” is the upper limit of what the export cost, in "
        "points; it lies below the margin."
    )
    rows = [
        (
            candidate.precision,
            row.group,
            f"{row.num_images:,}",
            _percent(row.reference_accuracy),
            _percent(row.candidate_accuracy),
            _percent(row.loss_upper_limit),
            _percent(row.margin),
        )
        for candidate in passed(report)
        for row in candidate.groups
    ]
    yield _table(("precision", "group", "images", "before export", "accuracy", "lost at most", "margin"), rows)
    flagged = sorted({row.label for candidate in passed(report) for row in candidate.classes if row.flagged})
    if flagged:
        yield f"Single classes that seem to have lost accuracy: {', '.join(_plain(label) for label in flagged)}."


def _confidence(report: ParityReport) -> Iterator[str]:
    yield "## What confidence means"
    yield (
        "A probability means what it says only within a group, so it is calibrated, and trusted, by the group of the "
        "predicted class. Prediction sets cover the images of each true group."
    )
    rows = [
        (candidate.precision, *_confidence_row(group))
        for candidate in passed(report)
        if candidate.certificate
        for group in candidate.certificate.calibration
    ]
    yield _table(
        ("precision", "group", "temperature", "trust from", "then right", "set covers", "expected between"), rows
    )


def _confidence_row(group: GroupCalibration) -> tuple[str, ...]:
    abstention, kept = group.abstention, group.prediction_set
    trusted = abstention.threshold is not None
    return (
        group.group,
        f"{group.temperature:.2f}",
        _percent(abstention.threshold, 1) if trusted else f"no guarantee of {_percent(abstention.target_precision, 0)}",
        _seen(abstention.precision) if trusted else "-",
        _seen(kept.coverage),
        f"{_percent(kept.low, 1)} to {_percent(kept.high, 1)}",
    )


def _certification(report: ParityReport) -> Iterator[str]:
    yield "## How it was certified"
    text = f"On {_plain(report.data.description)}, divided into parts that share no image"
    if report.data.num_views:
        text += (
            f"; {report.data.num_views:,} of the certification images are random views of others, because there were "
            "too few"
        )
    yield text + ":"
    purposes = {
        "quantisation": "ranges of activations",
        "selection": "choice of a configuration, and temperatures",
        "confidence": "expected accuracy, thresholds and prediction sets",
        "certify": "every figure of this card; chose nothing",
    }
    yield _table(
        ("part", "images", "for"),
        [(part.name, f"{part.num_images:,}", purposes[part.name]) for part in report.data.splits],
    )
    gates = dict.fromkeys(gate.name for candidate in passed(report) for gate in candidate.gates)
    yield (
        f"Gates passed: {', '.join(gates)}. The loss of accuracy of each group is bounded by Tango's paired score "
        f"interval, or the exact one where that is larger, one-sided. `{REPORT_FILE}` shows everything that was "
        f"measured, `{PARITY_FILE}` says it to programs."
    )
    rejected = [candidate.precision for candidate in report.candidates if candidate.verdict != "PASS"]
    if rejected:
        yield f"Tried and not certified, so not in this bundle: {', '.join(rejected)}."


def _limits(report: ParityReport) -> Iterator[str]:
    yield "## Limits"
    limits = [
        "It is proved that the export kept the accuracy, not that the accuracy is enough: see the table above.",
        "Nothing is proved about other images: another camera, place, time or mixture of classes.",
        "Limits hold for groups of classes. Single classes were screened, which is no proof.",
        "Confidence, thresholds and sets hold where classes come in the proportions of the certification images. Where "
        "head classes are more frequent than there, predictions of tail classes are right less often than stated.",
        "Each precision was certified on the provider named under Files. On another device `ltkd verify` replays the "
        "golden samples, which shows gross faults and no more.",
    ]
    if report.data.num_views:
        limits.append("Views of an image are not independent images, so the limits are narrower than they should be.")
    yield "\n".join(f"- {limit}" for limit in limits)


def _files(report: ParityReport) -> Iterator[str]:
    yield "## Files"
    rows = [
        (
            f"`{candidate.file}`",
            f"{candidate.num_bytes:,} bytes",
            f"{candidate.precision}, certified on {candidate.runtime.provider}",
        )
        for candidate in passed(report)
    ]
    rows += [
        (f"`{MANIFEST_FILE}`", "", "classes, groups, calibration, and the SHA-256 of every file"),
        (f"`{PARITY_FILE}`, `{REPORT_FILE}`", "", "what was proved, for programs and for people"),
        (f"`{GOLDEN_FILE}`", "", "samples of every group and the logits expected of them"),
    ]
    yield _table(("file", "size", "what it is"), rows, escaped=False)


def _commands() -> Iterator[str]:
    yield "## Serve and verify"
    yield "```\npip install 'ltkd[serve,export]'\nltkd verify DIRECTORY\nltkd serve DIRECTORY\n```"
    yield (
        "With `DIRECTORY` the folder that holds this file. `ltkd verify` checks every hash, holds the report against "
        "the files and replays the golden samples; the service refuses to start on a bundle that was changed."
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], escaped: bool = True) -> str:
    lines = [_line(headings), _line(["---"] * len(headings))]
    return "\n".join([*lines, *(_line([_plain(cell) if escaped else cell for cell in row]) for row in rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Text in which nothing is Markdown or HTML, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Text between backquotes, on one line."""
    return " ".join(text.replace("`", "'").split())


def _percent(fraction: float | None, places: int = 2) -> str:
    return "-" if fraction is None else f"{100 * fraction:.{places}f}"


def _seen(share: Proportion | None) -> str:
    return "-" if share is None else f"{_percent(share.value, 1)} of {share.n:,}"
