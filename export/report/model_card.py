"""The model card: a bundle's README.md, with the front matter that Hugging Face reads.

The card contains no date, machine or speed, so that exporting the same run again gives the same card.
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
    """Write the model card of a bundle, as Markdown with front matter.

    Args:
        task: Classes, groups and preprocessing.
        source: The run behind the bundle.
        report: The results of the gates. The bundle contains the precisions that passed.
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
    """Select the candidates that are in the bundle."""
    return [candidate for candidate in report.candidates if candidate.verdict == "PASS"]


def _front_matter(report: ParityReport) -> str:
    """Write the machine-readable part. Strings are quoted as JSON, which is valid YAML."""
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
    yield f"# {_escaped(report.name)}"
    yield (
        f"An image classifier with {len(task.class_names):,} classes: {_escaped(source.model)}, trained with "
        f"{_escaped(source.method)} and exported to ONNX in {precisions}. The export was tested against "
        f"{_escaped(report.reference)}: **{report.verdict}**. With {100 * report.confidence:g} % confidence, every "
        "group of classes lost less accuracy than its margin."
    )


def _use(task: Task) -> Iterator[str]:
    yield "## Intended use"
    yield (
        "The model predicts one class per image, out of those listed under Data, for images of the same kind as it was "
        f"trained and certified on. The input `image` is uint8 [N, {task.input_px}, {task.input_px}, 3], RGB: "
        f"{task.preprocessing.description}. The model normalises its input. The output "
        f"`logits` is float32 [N, {len(task.class_names)}]."
    )
    yield (
        "The model is not meant for images of another kind, for images that show none of the classes, or for decisions "
        "about people without human review."
    )


def _data(task: Task, source: Provenance) -> Iterator[str]:
    yield "## Data"
    yield f"The training data are long-tailed, so classes are assessed in groups. Source: run `{_code(source.run)}`."
    rows = []
    for name in task.groups.names:
        counts = [task.train_counts[label] for label in task.groups.members(name)]
        rows.append((name, f"{len(counts):,}", f"{sum(counts):,}", f"{min(counts):,} to {max(counts):,}"))
    yield _table(("group", "classes", "training images", "images per class"), rows)
    for name in task.groups.names:
        labels = [task.class_names[label] for label in task.groups.members(name)]
        more = f" and {len(labels) - MOST_NAMED_CLASSES:,} more" if len(labels) > MOST_NAMED_CLASSES else ""
        yield f"**{_escaped(name)}**: {', '.join(_escaped(label) for label in labels[:MOST_NAMED_CLASSES])}{more}."


def _accuracy(report: ParityReport) -> Iterator[str]:
    yield "## Accuracy by group"
    yield (
        "In per cent, on the certification images. “Lost at most” is the upper confidence bound of the accuracy lost "
        "by the export, in percentage points; it lies below the margin."
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
        yield f"Classes that may have lost accuracy: {', '.join(_escaped(label) for label in flagged)}."


def _confidence(report: ParityReport) -> Iterator[str]:
    yield "## Calibrated confidence"
    yield (
        "Confidence is calibrated separately for each group of classes. Temperatures and confidence thresholds are "
        "those of the group of the predicted class. Prediction sets have the stated coverage in each true group."
    )
    rows = [
        (candidate.precision, *_confidence_row(group))
        for candidate in passed(report)
        if candidate.certificate
        for group in candidate.certificate.calibration
    ]
    yield _table(
        (
            "precision",
            "group",
            "temperature",
            "confidence threshold",
            "accuracy above it",
            "coverage of sets",
            "expected range",
        ),
        rows,
    )


def _confidence_row(group: GroupCalibration) -> tuple[str, ...]:
    abstention, prediction_set = group.abstention, group.prediction_set
    has_threshold = abstention.threshold is not None
    return (
        group.group,
        f"{group.temperature:.2f}",
        _percent(abstention.threshold, 1)
        if has_threshold
        else f"no guarantee of {_percent(abstention.target_precision, 0)}",
        _proportion(abstention.precision) if has_threshold else "-",
        _proportion(prediction_set.coverage),
        f"{_percent(prediction_set.low, 1)} to {_percent(prediction_set.high, 1)}",
    )


def _certification(report: ParityReport) -> Iterator[str]:
    yield "## How it was certified"
    text = f"On {_escaped(report.data.description)}, divided into disjoint splits"
    if report.data.num_views:
        text += (
            f"; {report.data.num_views:,} of the certification images are random augmented views of the others, "
            "because there were too few images"
        )
    yield text + ":"
    purposes = {
        "quantisation": "activation ranges of int8",
        "selection": "choosing the int8 configuration, fitting temperatures",
        "confidence": "fitting expected accuracy, thresholds and prediction sets",
        "certify": "measuring every result in this card; not used to choose or fit anything",
    }
    yield _table(
        ("split", "images", "used for"),
        [(split.name, f"{split.num_images:,}", purposes[split.name]) for split in report.data.splits],
    )
    gates = dict.fromkeys(gate.name for candidate in passed(report) for gate in candidate.gates)
    yield (
        f"Gates passed: {', '.join(gates)}. The upper bound of each group's loss of accuracy is one-sided. It is that "
        "of Tango's paired score interval, or of the exact interval where that bound is larger. "
        f"`{REPORT_FILE}` shows all measurements; `{PARITY_FILE}` has them in machine-readable form."
    )
    rejected = [candidate.precision for candidate in report.candidates if candidate.verdict != "PASS"]
    if rejected:
        yield f"Not certified and therefore not in this bundle: {', '.join(rejected)}."


def _limits(report: ParityReport) -> Iterator[str]:
    yield "## Limits"
    limits = [
        "The certificate shows that the export kept the accuracy. It does not show that the accuracy is sufficient.",
        "The certificate does not cover other images: another camera, place, time or other class proportions.",
        "Bounds hold for groups of classes. Single classes were only screened.",
        "Confidence, thresholds and prediction sets hold for the class proportions of the certification images. Where "
        "head classes are more frequent, predictions of tail classes are correct less often than stated.",
        "Each precision was certified on the provider named under Files. On another device, `ltkd verify` "
        "replays the golden samples, which detects only gross faults.",
    ]
    if report.data.num_views:
        limits.append("Augmented views of an image are not independent images, so the bounds are too optimistic.")
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
        (f"`{PARITY_FILE}`, `{REPORT_FILE}`", "", "the certification report, machine-readable and as a web page"),
        (f"`{GOLDEN_FILE}`", "", "sample images of every group and their expected logits"),
    ]
    yield _table(("file", "size", "content"), rows, escaped=False)


def _commands() -> Iterator[str]:
    yield "## Serve and verify"
    yield "```\npip install 'ltkd[serve,export]'\nltkd verify DIRECTORY\nltkd serve DIRECTORY\n```"
    yield (
        "`DIRECTORY` is the folder that contains this file. `ltkd verify` checks every hash, compares the report with "
        "the files and replays the golden samples. The service does not start with a bundle that was changed."
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], escaped: bool = True) -> str:
    lines = [_table_row(headings), _table_row(["---"] * len(headings))]
    return "\n".join([*lines, *(_table_row([_escaped(cell) if escaped else cell for cell in row]) for row in rows)])


def _table_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Put text on one line and escape Markdown and HTML."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Put text on one line and replace backquotes, for use between backquotes."""
    return " ".join(text.replace("`", "'").split())


def _percent(fraction: float | None, places: int = 2) -> str:
    return "-" if fraction is None else f"{100 * fraction:.{places}f}"


def _proportion(share: Proportion | None) -> str:
    return "-" if share is None else f"{_percent(share.value, 1)} of {share.n:,}"
