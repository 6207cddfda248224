"""Build the tables of parity.html. The module ``html`` puts the page together."""

from collections.abc import Sequence

from export.report.markup import Markup, element, joined
from export.schema import ALL, CandidateReport, ClassParity, Difference, Gate, ParityReport, Verdict
from ltkd.contract.calibration import GroupCalibration, Proportion

_MINUS, _UNKNOWN = "\N{MINUS SIGN}", "\N{EN DASH}"
_MARKS: dict[Verdict, tuple[str, str]] = {"PASS": ("pass", "✓"), "FAIL": ("fail", "✗"), "INCONCLUSIVE": ("doubt", "?")}


def verdict_mark(verdict: Verdict) -> Markup:
    """Render a verdict with its sign and its colour."""
    tone, sign = _MARKS[verdict]
    return element("span", f"{sign} {verdict}", class_=f"verdict {tone}")


def group_table(candidate: CandidateReport) -> Markup:
    """Tabulate the accuracy of every group. This is the main table of the report."""
    headings = (
        "group", "verdict", "images", "reference %", "candidate %", "right to wrong", "wrong to right", "loss pp",
        "at most pp", "margin pp", "changed class",
    )  # fmt: skip
    rows = [
        (
            row.group, verdict_mark(row.verdict), f"{row.num_images:,}", percent(row.reference_accuracy),
            percent(row.candidate_accuracy), f"{row.right_to_wrong:,}", f"{row.wrong_to_right:,}", points(row.loss),
            points(row.loss_upper_limit), points(row.margin), f"{row.num_flips:,}",
        )
        for row in candidate.groups
    ]  # fmt: skip
    kinds = ["all" if row.group == ALL else "" for row in candidate.groups]
    return _table("Accuracy of each group of classes.", headings, rows, kinds, words=(1,))


def gate_table(gates: Sequence[Gate]) -> Markup:
    """Tabulate the verdict and the findings of every gate. On narrow screens the findings are below their gate."""
    rows = [(gate.name, verdict_mark(gate.verdict), _findings(gate.findings)) for gate in gates]
    return element(
        "div", _table("The gates, in order.", ("gate", "verdict", "findings"), rows, words=(1, 2)), class_="gates"
    )


def abstention_table(candidate: CandidateReport) -> Markup:
    """Tabulate temperature and confidence threshold by predicted group."""
    headings = (
        "predicted group", "share of predictions %", "temperature", "confidence threshold %", "accepted %",
        "accuracy of these %", "95 % interval", "images",
    )  # fmt: skip
    rows = [
        (group.group, percent(group.predicted_share, 1), f"{group.temperature:.2f}", *_abstention(group))
        for group in _calibration(candidate)
    ]
    targets = {f"{100 * group.abstention.target_precision:g} %" for group in _calibration(candidate)}
    caption = f"Abstention: {' or '.join(sorted(targets))} of the accepted predictions should be correct."
    return _table(caption, headings, rows)


def set_table(candidate: CandidateReport) -> Markup:
    """Tabulate the coverage of the prediction sets by true group."""
    headings = (
        "true group", "target %", "fitted on", "expected between %", "covered %", "95 % interval", "images",
    )  # fmt: skip
    rows = []
    for group in _calibration(candidate):
        fitted = group.prediction_set
        band = f"{percent(fitted.low, 1)} to {percent(fitted.high, 1)}"
        rows.append(
            (
                group.group,
                percent(fitted.target_coverage, 1),
                f"{fitted.num_images:,}",
                band,
                *_measured(fitted.coverage),
            )
        )
    return _table("Prediction sets: how often the set contains the true class.", headings, rows)


def expected_accuracy_table(candidate: CandidateReport) -> Markup:
    """Tabulate the accuracy of predictions by predicted group and confidence."""
    rows = [
        (group.group, f"{percent(part.above, 0)} to {percent(part.up_to, 0)}", *_measured(part.accuracy))
        for group in _calibration(candidate)
        for part in group.expected_accuracy
    ]
    headings = ("predicted group", "confidence %", "accuracy %", "95 % interval", "images")
    return _table("Expected accuracy that the service reports for a confidence.", headings, rows)


def probability_table(candidate: CandidateReport) -> Markup:
    """Tabulate the changes of the probabilities by true group."""
    headings = (
        "group", "divergence, nats", "confidence change pp", "NLL change", "Brier change", "ECE reference %",
        "ECE candidate %", "ECE if calibrated %",
    )  # fmt: skip
    rows = [
        (
            row.group, scientific(row.kl), points(row.confidence_change, 3), _difference(row.nll),
            _difference(row.brier), percent(row.reference_ece, 1), percent(row.candidate_ece, 1),
            joined(percent(row.ece_null, 1), element("small", f"up to {percent(row.ece_null_upper, 1)}")),
        )
        for row in candidate.confidence
    ]  # fmt: skip
    kinds = ["all" if row.group == ALL else "" for row in candidate.confidence]
    return _table(
        "Changes of the probabilities before calibration, with 95 % intervals.",
        headings,
        rows,
        kinds,
    )


def class_table(caption: str, classes: Sequence[ClassParity]) -> Markup:
    """Tabulate the accuracy of single classes."""
    headings = (
        "class", "group", "training images", "images", "reference %", "candidate %", "p-value", "flagged",
    )  # fmt: skip
    rows = [
        (
            row.label, row.group, f"{row.train_count:,}", f"{row.num_images:,}", percent(row.reference_accuracy, 1),
            percent(row.candidate_accuracy, 1), f"{row.p_value:.2g}", "yes" if row.flagged else "",
        )
        for row in classes
    ]  # fmt: skip
    return _table(caption, headings, rows, words=(1,))


def trial_table(candidate: CandidateReport) -> Markup:
    """Tabulate the int8 configurations that were tried."""
    headings = (
        "configuration",
        "layers kept in float",
        "worst group",
        "loss of this group pp",
        "overall loss pp",
        "divergence, nats",
    )
    most = max(trial.worst_group_loss for trial in candidate.quantisation)
    rows = []
    for trial in candidate.quantisation:
        name = joined(trial.configuration, element("strong", " — chosen")) if trial.chosen else trial.configuration
        loss = joined(points(trial.worst_group_loss), _share(trial.worst_group_loss, most))
        layers = ", ".join(trial.float_layers) or "only the first and the last"
        rows.append((name, layers, trial.worst_group, loss, points(trial.overall_loss), scientific(trial.kl)))
    kinds = ["chosen" if trial.chosen else "" for trial in candidate.quantisation]
    return _table(
        "Measured on the selection images, which are not used for certification.", headings, rows, kinds, words=(1, 2)
    )


def layer_table(candidate: CandidateReport) -> Markup:
    """Tabulate the error of each layer's output."""
    most = max(layer.error for layer in candidate.layers)
    rows = [
        (layer.layer, layer.operator, joined(f"{layer.error:.2g}", _share(layer.error, most)))
        for layer in candidate.layers
    ]
    return _table(
        "Error of each layer's output, relative to the output, in the order of the graph.",
        ("layer", "operator", "error"),
        rows,
        words=(1,),
    )


def split_table(report: ParityReport) -> Markup:
    """Tabulate the splits of the images."""
    headings = ("split", "images", *report.groups, "sha256 of images and labels")
    rows = [
        (part.name, f"{part.num_images:,}", *(f"{num:,}" for num in part.per_group), part.sha256)
        for part in report.data.splits
    ]
    return _table(
        "The splits share no image. The certify split was not used to choose anything.",
        headings,
        rows,
        hashes=len(headings) - 1,
    )


def file_table(report: ParityReport) -> Markup:
    """Tabulate the candidate files and the runtime of each."""
    headings = ("file", "bytes", "provider", "ONNX Runtime", "instructions", "TF32", "sha256")
    rows = []
    for candidate in report.candidates:
        runtime = candidate.runtime
        tf32 = {None: "not available", True: "on", False: "off"}[runtime.tf32]
        rows.append(
            (
                candidate.file,
                f"{candidate.num_bytes:,}",
                runtime.provider,
                runtime.onnxruntime,
                runtime.isa,
                tf32,
                candidate.sha256,
            )
        )
    return _table(
        "Candidate files, and the runtime on which each was measured.", headings, rows, hashes=len(headings) - 1
    )


def version_table(report: ParityReport) -> Markup:
    """Tabulate the versions of the packages that converted and certified."""
    return _table(
        "Packages that converted and certified the models.", ("package", "version"), list(report.versions.items())
    )


def percent(fraction: float | None, places: int = 2) -> str:
    """Format a fraction in per cent for a cell."""
    return _UNKNOWN if fraction is None else f"{100 * fraction:.{places}f}"


def points(fraction: float | None, places: int = 2) -> str:
    """Format a difference of fractions in percentage points for a cell, with a minus sign instead of a hyphen."""
    return percent(fraction, places).replace("-", _MINUS)


def scientific(value: float | None) -> str:
    """Format a number of any magnitude for a cell."""
    return _UNKNOWN if value is None else f"{value:.2g}".replace("-", _MINUS)


def _table(
    caption: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    kinds: Sequence[str] = (),
    words: Sequence[int] = (),
    hashes: int | None = None,
) -> Markup:
    """Build a table in a box that scrolls horizontally. The first cell of each row is its heading."""
    looks = dict.fromkeys(words, "words") | ({} if hashes is None else {hashes: "hash"})

    def cell(column: int, content: str) -> Markup:
        if column == 0:
            return element("th", content, scope="row")
        return element("td", content, class_=looks[column]) if column in looks else element("td", content)

    head = [
        element("th", heading, scope="col", class_="words")
        if column == 0 or column in looks
        else element("th", heading, scope="col")
        for column, heading in enumerate(headings)
    ]
    body = []
    for place, row in enumerate(rows):
        cells = [cell(column, content) for column, content in enumerate(row)]
        kind = kinds[place] if kinds else ""
        body.append(element("tr", *cells, class_=kind) if kind else element("tr", *cells))
    table = element(
        "table",
        element("caption", element("span", caption)),
        element("thead", element("tr", *head)),
        element("tbody", *body),
    )
    return element("div", table, class_="scroll", role="region", aria_label=caption, tabindex="0")


def _calibration(candidate: CandidateReport) -> tuple[GroupCalibration, ...]:
    return candidate.certificate.calibration if candidate.certificate else ()


def _abstention(group: GroupCalibration) -> tuple[str, ...]:
    abstention = group.abstention
    if abstention.threshold is None:
        return ("no guarantee", _UNKNOWN, _UNKNOWN, _UNKNOWN, _UNKNOWN)
    return (percent(abstention.threshold, 1), percent(abstention.coverage, 1), *_measured(abstention.precision))


def _measured(share: Proportion | None) -> tuple[str, str, str]:
    if share is None:
        return (_UNKNOWN, _UNKNOWN, "0")
    return (percent(share.value, 1), f"{percent(share.low, 1)} to {percent(share.high, 1)}", f"{share.n:,}")


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return _UNKNOWN
    interval = element("small", f"{scientific(difference.low)} to {scientific(difference.high)}")
    return joined(scientific(difference.value), interval)


def _findings(findings: Sequence[str]) -> str:
    if len(findings) < 2:
        return findings[0] if findings else ""
    return element("ul", *(element("li", finding) for finding in findings), class_="findings")


def _share(value: float, most: float) -> Markup:
    width = 100 * max(value, 0.0) / most if most > 0 else 0.0
    return element("span", element("span", style=f"width:{width:.0f}%"), class_="share", aria_hidden="true")
