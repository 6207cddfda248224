"""parity.html: the parity report as one page for people, with the verdict first and nothing from outside."""

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
from ltkd.contract.records import write_record, write_whole

STYLE_FILE = Path(__file__).with_name("style.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
MOST_FLAGGED = 20
_TONES: dict[Verdict, str] = {"PASS": "pass", "FAIL": "fail", "INCONCLUSIVE": "doubt"}


def parity_html(report: ParityReport) -> str:
    """The whole page. It loads nothing, runs nothing, and equal reports give equal pages."""
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
    """Leave parity.json and parity.html in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    write_record(out / PARITY_FILE, report)
    write_whole(out / REPORT_FILE, parity_html(report).encode())


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
    """One sentence for somebody who reads no further."""
    passed = [candidate.precision for candidate in report.candidates if candidate.verdict == "PASS"]
    others = [candidate.precision for candidate in report.candidates if candidate.verdict != "PASS"]
    limit = f"{100 * report.confidence:g} % confidence"
    if report.verdict == "PASS":
        kept = (
            f"With {limit}, every group of classes ({', '.join(report.groups)}) lost less accuracy than its margin in "
            f"{_listed(passed)}."
        )
        return f"{kept} Not certified, and not in the bundle: {_listed(others)}." if others else kept
    if report.verdict == "INCONCLUSIVE":
        return (
            f"Nothing is certified: these images neither show nor exclude, with {limit}, a loss beyond the margin. "
            "More images would decide it."
        )
    failed = next(candidate for candidate in report.candidates if candidate.verdict == "FAIL")
    gates = [gate.name for gate in failed.gates if gate.verdict == "FAIL"]
    return f"Nothing is certified: {failed.precision} did not pass {_listed(gates)}."


def _closest(candidate: CandidateReport) -> str:
    """The group that is nearest to its margin, or beyond it."""
    if not candidate.groups:
        return " ".join(finding for gate in candidate.gates if gate.verdict != "PASS" for finding in gate.findings)
    failed = [row for row in candidate.groups if row.verdict == "FAIL" and row.group != ALL]
    row = max(failed or candidate.groups, key=_used)
    name, allowed = "all images together" if row.group == ALL else row.group, points(row.margin)
    if row.verdict == "FAIL":
        return f"Beyond its margin: {name}, {points(row.loss)} points of accuracy lost, {allowed} are allowed."
    lost = points(max(row.loss_upper_limit, 0.0))
    return f"Closest to its margin: {name}, at most {lost} points of accuracy lost, {allowed} are allowed."


def _used(row: GroupParity) -> float:
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
        *([element("h3", "Where the difference arises"), layer_table(candidate)] if candidate.layers else ()),
        *_classes(candidate),
        *_decisions(report, candidate),
        *_confidence(candidate),
        *([element("h3", "How int8 was configured"), trial_table(candidate)] if candidate.quantisation else ()),
    )


def _accuracy(report: ParityReport, candidate: CandidateReport) -> Iterator[Markup]:
    if not candidate.groups:
        return
    yield group_table(candidate)
    yield element(
        "p",
        f"“At most” is the upper {100 * report.confidence:g} % limit of the loss: Tango's paired score interval, or "
        "the exact one where that is larger. A group passes when it lies below the margin, fails when the lower limit "
        "lies above it, and is inconclusive otherwise.",
        class_="quiet",
    )


def _classes(candidate: CandidateReport) -> Iterator[Markup]:
    if not candidate.classes:
        return
    yield element("h3", "Accuracy by class")
    groups = [row for row in candidate.groups if row.group != ALL]
    caption = (
        "Every dot is a class, the most frequent one on the left. A line leads from its accuracy in the reference to "
        "that in the candidate; the horizontal lines are the accuracy of the group."
    )
    yield _figure(caption, _key("reference", "candidate"), accuracy_by_class(candidate.classes, groups), wide=True)
    flagged = [row for row in candidate.classes if row.flagged]
    if flagged:
        more = f" The first {MOST_FLAGGED} of {len(flagged):,}." if len(flagged) > MOST_FLAGGED else ""
        said = "Classes that lost accuracy, at a false discovery rate of 5 % (Benjamini and Hochberg)."
        yield class_table(said + more, flagged[:MOST_FLAGGED])
    else:
        yield element("p", "No single class lost accuracy, at a false discovery rate of 5 %.")
    every = class_table("All classes, the most frequent first.", candidate.classes)
    yield element("details", element("summary", f"All {len(candidate.classes):,} classes"), every)


def _decisions(report: ParityReport, candidate: CandidateReport) -> Iterator[Markup]:
    if not candidate.flips:
        return
    yield element("h3", "Changed decisions")
    caption = (
        "Share of the images whose most likely class changed, by how clear it was to the reference: changes belong on "
        "the left, where the two best classes were nearly equal. The numbers count images."
    )
    yield _figure(caption, _group_key(report.groups), flips_by_margin(candidate.flips, report.groups), wide=True)


def _confidence(candidate: CandidateReport) -> Iterator[Markup]:
    if candidate.confidence:
        yield element("h3", "Probabilities")
        yield probability_table(candidate)
    certificate = candidate.certificate
    if certificate is None:
        return
    yield element("h3", "What confidence means in each group")
    yield element(
        "p",
        f"Temperatures were fitted on {certificate.num_temperature_images:,} images, thresholds on "
        f"{certificate.num_threshold_images:,} others; what is shown was seen on the certification images. "
        f"Prediction sets hold {certificate.mean_set_size:.1f} classes on average, "
        f"{100 * certificate.empty_sets:.2g} % are empty.",
    )
    yield abstention_table(candidate)
    yield set_table(candidate)
    yield element("details", element("summary", "Expected accuracy by confidence"), expected_accuracy_table(candidate))
    yield element(
        "p",
        "How often predictions were right (upwards) that were so sure (to the right); the dashed line is ideal. ",
        _key("before", "after"),
    )
    pictures = []
    for group in certificate.reliability:
        said = (
            f"{group.group}: {group.num_images:,} images predicted in it. Expected calibration error "
            f"{_percent(group.ece_before)} before and {_percent(group.ece_after)} after; a perfect model shows "
            f"{_percent(group.ece_null)} on so few."
        )
        pictures.append(_figure(said, Markup(), reliability(group)))
    yield element("div", *pictures, class_="pictures")


def _cost(candidates: Sequence[CandidateReport]) -> Iterator[Markup]:
    yield element("h2", "Size and speed", id="cost")
    sizes = [Bar(candidate.precision, candidate.num_bytes, _size(candidate.num_bytes)) for candidate in candidates]
    pictures = [_figure("Size of the file.", Markup(), horizontal_bars("Size of the file", sizes))]
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
        said = f"Time of a batch of {batch}: median, and quartiles as a line."
        pictures.append(_figure(said, Markup(), horizontal_bars(said, bars)))
    yield element("div", *pictures, class_="pictures")


def _basis(report: ParityReport) -> Iterator[Markup]:
    data = report.data
    yield element("h2", "What this rests on", id="basis")
    said = f"Certified on {data.description}."
    if data.num_views:
        said += (
            f" {data.num_views:,} of the certification images are random views of others, because there were too few."
        )
    if data.num_duplicates:
        said += f" {data.num_duplicates:,} images were left out because they are also in another part."
    yield element("p", said)
    yield split_table(report)
    yield file_table(report)
    yield version_table(report)
    yield element("h3", "What it does not prove")
    yield element(
        "ul",
        element("li", "Anything about images of another kind, camera or time than those it was certified on."),
        element(
            "li", "That single classes kept their accuracy: the limits hold for groups; classes are only screened."
        ),
        element("li", "Confidence where classes are mixed otherwise than in the images that fitted it."),
        element(
            "li", "Another device, provider or version of ONNX Runtime: the golden samples of the bundle are for that."
        ),
    )


def _figure(caption: str, key: Markup, picture: Markup, wide: bool = False) -> Markup:
    caption_mark = element("figcaption", caption, " ", key)
    if not wide:
        return element("figure", picture, caption_mark)
    box = element("div", picture, class_="scroll wide", role="region", aria_label=caption, tabindex="0")
    return element("figure", caption_mark, box)


def _key(before: str, after: str) -> Markup:
    marks = {before: "before", after: "after"}
    return joined(
        *(_key_entry(name, element("circle", cx=7.0, cy=7.0, r=4.5, class_=mark)) for name, mark in marks.items())
    )


def _group_key(group_names: Sequence[str]) -> Markup:
    swatch = [
        element("rect", x=1.0, y=2.0, width=12.0, height=11.0, class_=f"g{group % 6}")
        for group in range(len(group_names))
    ]
    return joined(*(_key_entry(name, mark) for name, mark in zip(group_names, swatch, strict=True)))


def _key_entry(name: str, mark: Markup) -> Markup:
    picture = element("svg", mark, width=14.0, height=14.0, viewBox="0 0 14 14", aria_hidden="true")
    return element("span", picture, name, class_="key")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.3g} MB" if num_bytes >= 100_000 else f"{num_bytes / 1e3:.3g} kB"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _percent(fraction: float | None) -> str:
    return "unknown" if fraction is None else f"{100 * fraction:.1f} %"
