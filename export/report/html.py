"""parity.html: the parity report as one self-contained web page, with the verdict first.

The module puts the page together from the tables of ``tables`` and the plots of ``plots``. The page loads no other
file and runs no script.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from export.report.markup import Markup, element, joined
from export.report.plots import Bar, accuracy_by_class, flips_by_margin, horizontal_bars, reliability
from export.report.tables import (
    abstention_table,
    class_table,
    expected_accuracy_table,
    file_table,
    gate_table,
    group_table,
    layer_table,
    points,
    probability_table,
    set_table,
    split_table,
    trial_table,
    verdict_mark,
    version_table,
)
from export.schema import ALL, CandidateReport, GroupParity, ParityReport, Verdict
from ltkd.contract.bundle import PARITY_FILE, REPORT_FILE
from ltkd.contract.records import write_atomically, write_record

STYLE_FILE = Path(__file__).with_name("style.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
MOST_FLAGGED = 20
_TONES: dict[Verdict, str] = {"PASS": "pass", "FAIL": "fail", "INCONCLUSIVE": "doubt"}


def parity_html(report: ParityReport) -> str:
    """Render a report as an HTML page. The page loads and runs nothing, and equal reports give equal pages."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{report.verdict}: parity of {report.name}"),
        element("style", Markup(STYLE_FILE.read_text(encoding="utf-8"))),
    )
    sections = [_candidate(report, candidate) for candidate in report.candidates]
    body = element("body", _verdict(report), element("main", *sections, *_cost(report.candidates), *_basis(report)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def write_report(report: ParityReport, out: Path) -> None:
    """Write parity.json and parity.html to a folder."""
    out.mkdir(parents=True, exist_ok=True)
    write_record(out / PARITY_FILE, report)
    write_atomically(out / REPORT_FILE, parity_html(report).encode())


def _verdict(report: ParityReport) -> Markup:
    precisions = [
        element(
            "li",
            element("a", candidate.precision, href=f"#{candidate.precision}"),
            " ",
            verdict_mark(candidate.verdict),
            element("p", _closest(candidate)),
        )
        for candidate in report.candidates
    ]
    return element(
        "header",
        element("h1", f"Parity of {report.name} with {report.reference}"),
        verdict_mark(report.verdict),
        element("p", _meaning(report), class_="meaning"),
        element("ul", *precisions, class_="precisions"),
        class_=_TONES[report.verdict],
    )


def _meaning(report: ParityReport) -> str:
    """Explain the verdict in one or two sentences."""
    passed = [candidate.precision for candidate in report.candidates if candidate.verdict == "PASS"]
    others = [candidate.precision for candidate in report.candidates if candidate.verdict != "PASS"]
    confidence = f"{100 * report.confidence:g} % confidence"
    if report.verdict == "PASS":
        kept = (
            f"With {confidence}, every group of classes ({', '.join(report.groups)}) lost less accuracy than its "
            f"margin in {_listed(passed)}."
        )
        return f"{kept} Not certified, and not in the bundle: {_listed(others)}." if others else kept
    if report.verdict == "INCONCLUSIVE":
        return (
            f"Nothing is certified: with {confidence}, these images neither show nor rule out a loss above the margin. "
            "Certify with more images."
        )
    failed = next(candidate for candidate in report.candidates if candidate.verdict == "FAIL")
    gates = [gate.name for gate in failed.gates if gate.verdict == "FAIL"]
    return f"Nothing is certified: {failed.precision} did not pass {_listed(gates)}."


def _closest(candidate: CandidateReport) -> str:
    """Name the group whose loss is closest to its margin, or the furthest above it."""
    if not candidate.groups:
        return " ".join(finding for gate in candidate.gates if gate.verdict != "PASS" for finding in gate.findings)
    failed = [row for row in candidate.groups if row.verdict == "FAIL" and row.group != ALL]
    row = max(failed or candidate.groups, key=_used_margin)
    name, allowed = "all images together" if row.group == ALL else row.group, points(row.margin)
    if row.verdict == "FAIL":
        return f"Above its margin: {name} lost {points(row.loss)} percentage points of accuracy; {allowed} are allowed."
    lost = points(max(row.loss_upper_limit, 0.0))
    return f"Closest to its margin: {name} lost at most {lost} percentage points of accuracy; {allowed} are allowed."


def _used_margin(row: GroupParity) -> float:
    return row.loss_upper_limit / row.margin


def _candidate(report: ParityReport, candidate: CandidateReport) -> Markup:
    return element(
        "section",
        element("h2", f"{candidate.precision} ", verdict_mark(candidate.verdict), id=candidate.precision),
        element(
            "p",
            f"{candidate.file}, {_size(candidate.num_bytes)}, run on {candidate.runtime.provider}.",
            class_="quiet",
        ),
        *_accuracy(report, candidate),
        gate_table(candidate.gates),
        *([element("h3", "Error per layer"), layer_table(candidate)] if candidate.layers else ()),
        *_classes(candidate),
        *_decisions(report, candidate),
        *_confidence(candidate),
        *([element("h3", "Quantisation configurations"), trial_table(candidate)] if candidate.quantisation else ()),
    )


def _accuracy(report: ParityReport, candidate: CandidateReport) -> Iterator[Markup]:
    if not candidate.groups:
        return
    yield group_table(candidate)
    yield element(
        "p",
        f"“At most” is the upper confidence bound of the loss at {100 * report.confidence:g} %. It is taken from "
        "Tango's paired score interval, or from the exact interval where that bound is larger. A group passes when "
        "this bound lies below the margin, fails when the lower bound lies above it, and is inconclusive otherwise.",
        class_="quiet",
    )


def _classes(candidate: CandidateReport) -> Iterator[Markup]:
    if not candidate.classes:
        return
    yield element("h3", "Accuracy by class")
    groups = [row for row in candidate.groups if row.group != ALL]
    caption = (
        "Each dot is one class, with the most frequent class on the left. A vertical line connects the accuracy of the "
        "reference with that of the candidate. The horizontal lines are the accuracy of the group."
    )
    yield _figure(caption, _legend("reference", "candidate"), accuracy_by_class(candidate.classes, groups), wide=True)
    flagged = [row for row in candidate.classes if row.flagged]
    if flagged:
        more = f" The first {MOST_FLAGGED} of {len(flagged):,}." if len(flagged) > MOST_FLAGGED else ""
        caption = "Classes that lost accuracy, at a false discovery rate of 5 % (Benjamini and Hochberg)."
        yield class_table(caption + more, flagged[:MOST_FLAGGED])
    else:
        yield element("p", "No single class lost accuracy significantly, at a false discovery rate of 5 %.")
    all_classes = class_table("All classes, the most frequent first.", candidate.classes)
    yield element("details", element("summary", f"All {len(candidate.classes):,} classes"), all_classes)


def _decisions(report: ParityReport, candidate: CandidateReport) -> Iterator[Markup]:
    if not candidate.flips:
        return
    yield element("h3", "Changed decisions")
    caption = (
        "Share of the images whose predicted class changed, by the reference's margin between the two highest logits. "
        "Changes are expected on the left, where the two logits are nearly equal. The numbers above the bars count "
        "images."
    )
    yield _figure(caption, _group_legend(report.groups), flips_by_margin(candidate.flips, report.groups), wide=True)


def _confidence(candidate: CandidateReport) -> Iterator[Markup]:
    if candidate.confidence:
        yield element("h3", "Probabilities")
        yield probability_table(candidate)
    certificate = candidate.certificate
    if certificate is None:
        return
    yield element("h3", "Calibrated confidence per group")
    yield element(
        "p",
        f"Temperatures were fitted on {certificate.num_temperature_images:,} images, thresholds on "
        f"{certificate.num_threshold_images:,} others. All figures below were measured on the certification images. "
        f"Prediction sets hold {certificate.mean_set_size:.1f} classes on average; "
        f"{100 * certificate.empty_sets:.2g} % of them are empty.",
    )
    yield abstention_table(candidate)
    yield set_table(candidate)
    yield element("details", element("summary", "Expected accuracy by confidence"), expected_accuracy_table(candidate))
    yield element(
        "p",
        "Accuracy of the predictions (vertical) by their confidence (horizontal). The dashed line is perfect "
        "calibration. ",
        _legend("before calibration", "after calibration"),
    )
    figures = []
    for group in certificate.reliability:
        caption = (
            f"{group.group}: {group.num_images:,} images were predicted in this group. Expected calibration error: "
            f"{_percent(group.ece_before)} before and {_percent(group.ece_after)} after calibration; "
            f"{_percent(group.ece_null)} for a perfectly calibrated model on the same number of images."
        )
        figures.append(_figure(caption, Markup(), reliability(group)))
    yield element("div", *figures, class_="figures")


def _cost(candidates: Sequence[CandidateReport]) -> Iterator[Markup]:
    yield element("h2", "Size and speed", id="cost")
    sizes = [Bar(candidate.precision, candidate.num_bytes, _size(candidate.num_bytes)) for candidate in candidates]
    figures = [_figure("File size.", Markup(), horizontal_bars("File size", sizes))]
    batches = sorted({latency.batch for candidate in candidates for latency in candidate.latency})
    for batch in batches:
        bars = [
            Bar(
                f"{candidate.precision} {candidate.runtime.provider.removesuffix('ExecutionProvider')}",
                latency.median_ms,
                f"{latency.median_ms:.3g} ms",
                latency.low_ms,
                latency.high_ms,
            )
            for candidate in candidates
            for latency in candidate.latency
            if latency.batch == batch
        ]
        caption = f"Latency of a batch of {batch}: median, with the quartiles as a line."
        figures.append(_figure(caption, Markup(), horizontal_bars(caption, bars)))
    yield element("div", *figures, class_="figures")


def _basis(report: ParityReport) -> Iterator[Markup]:
    data = report.data
    yield element("h2", "Data and software", id="basis")
    summary = f"Certified on {data.description}."
    if data.num_views:
        summary += (
            f" {data.num_views:,} of the certification images are random augmented views of the others, because there "
            "were too few images."
        )
    if data.num_duplicates:
        summary += f" {data.num_duplicates:,} images were left out because they are duplicates."
    yield element("p", summary)
    yield split_table(report)
    yield file_table(report)
    yield version_table(report)
    yield element("h3", "What this report does not prove")
    yield element(
        "ul",
        element("li", "Accuracy on images of another kind, camera or time than those it was certified on."),
        element("li", "Accuracy of single classes. The bounds hold for groups; classes are only screened."),
        element("li", "Confidence where the class proportions differ from those of the images it was fitted on."),
        element(
            "li",
            "Results on another device, provider or version of ONNX Runtime. There, ltkd verify only replays the "
            "golden samples.",
        ),
    )


def _figure(caption: str, legend: Markup, plot: Markup, wide: bool = False) -> Markup:
    caption_mark = element("figcaption", caption, " ", legend)
    if not wide:
        return element("figure", plot, caption_mark)
    box = element("div", plot, class_="scroll wide", role="region", aria_label=caption, tabindex="0")
    return element("figure", caption_mark, box)


def _legend(before: str, after: str) -> Markup:
    marks = {before: "before", after: "after"}
    return joined(
        *(_legend_entry(name, element("circle", cx=7.0, cy=7.0, r=4.5, class_=mark)) for name, mark in marks.items())
    )


def _group_legend(group_names: Sequence[str]) -> Markup:
    swatches = [
        element("rect", x=1.0, y=2.0, width=12.0, height=11.0, class_=f"g{group % 6}")
        for group in range(len(group_names))
    ]
    return joined(*(_legend_entry(name, mark) for name, mark in zip(group_names, swatches, strict=True)))


def _legend_entry(name: str, mark: Markup) -> Markup:
    icon = element("svg", mark, width=14.0, height=14.0, viewBox="0 0 14 14", aria_hidden="true")
    return element("span", icon, name, class_="key")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.3g} MB" if num_bytes >= 100_000 else f"{num_bytes / 1e3:.3g} kB"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _percent(fraction: float | None) -> str:
    return "unknown" if fraction is None else f"{100 * fraction:.1f} %"
