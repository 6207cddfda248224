import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_toys import report_of

from export.report.html import STYLE_FILE, parity_html, write_report
from export.report.markup import Markup, element, joined
from export.report.plots import Bar, accuracy_by_class, flips_by_margin, horizontal_bars, reliability
from export.schema import FlipsByMargin, ParityReport
from ltkd.contract.records import read_record
from ltkd.errors import BundleError

INJECTION = "<script>alert('x')</script> \"onload=\" & ]]>"


class Page(HTMLParser):
    """Parse a page into its elements with their attributes and its text; check that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join("".join(f"{text} " for text in self.texts).split())


def pages() -> Iterator[str]:
    for num_classes, failing in ((100, None), (100, "int8"), (12, "fp32")):
        yield parity_html(report_of(num_classes, failing))  # type: ignore[arg-type]


def test_a_page_is_valid_html_and_loads_and_runs_nothing() -> None:
    for text in pages():
        page = Page(text)
        assert not {"script", "link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in page.elements}
        for _, attributes in page.elements:
            assert not any(name.startswith("on") for name in attributes)
            assert attributes.get("href", "#").startswith("#")
            assert "src" not in attributes
        assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
        (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
        assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_the_verdict_comes_first_followed_by_its_meaning() -> None:
    text = Page(parity_html(report_of(100, "int8"))).text
    assert text.startswith(
        "PASS: parity of cifar100-student Parity of cifar100-student with torch float32 of the run cifar100-student "
        "✓ PASS With 95 % confidence, every group of classes (head, medium, tail) lost less accuracy than its margin "
        "in fp32 and fp16. Not certified, and not in the bundle: int8. fp32 ✓ PASS Closest to its margin: head"
    )
    assert "int8 ✗ FAIL Above its margin: tail lost " in text
    text = Page(parity_html(report_of(12, "fp32"))).text
    assert "✗ FAIL Nothing is certified: fp32 did not pass G3 task." in text


def test_an_inconclusive_report_asks_for_more_images() -> None:
    report = report_of(12).model_copy(update={"verdict": "INCONCLUSIVE"})
    text = Page(parity_html(report)).text
    assert "? INCONCLUSIVE Nothing is certified: with 95 % confidence, these images neither show nor rule out" in text
    assert "Certify with more images." in text


def test_every_value_of_the_table_per_group_is_on_the_page() -> None:
    report = report_of(100, "int8")
    text = Page(parity_html(report)).text
    for candidate in report.candidates:
        for row in candidate.groups:
            assert row.candidate_accuracy is not None and row.loss is not None
            losses = (row.loss, row.loss_upper_limit, row.margin)
            points = " ".join(f"{100 * loss:.2f}".replace("-", "\N{MINUS SIGN}") for loss in losses)
            assert f"{row.right_to_wrong:,} {row.wrong_to_right:,} {points} {row.num_flips:,}" in text
    for split in report.data.splits:
        assert split.sha256 in text
    for trial in report.candidates[2].quantisation:
        assert trial.configuration in text
    assert "/classifier/Gemm" in text
    assert "no guarantee" in text


def test_names_cannot_inject_markup() -> None:
    text = report_of(12, "int8").model_dump_json()
    names = {"cifar100-student", "head", "apple 0", "model.onnx", "/classifier/Gemm", "G3 task", "avx2"}
    report = ParityReport.model_validate_json(text)
    for name in names - {"G3 task"}:
        report = ParityReport.model_validate_json(
            report.model_dump_json().replace(f'"{name}"', '"' + INJECTION.replace('"', '\\"') + '"')
        )
    page = Page(parity_html(report))
    assert "script" not in {tag for tag, _ in page.elements}
    assert not any("onload" in attributes for _, attributes in page.elements)
    assert page.text.count(INJECTION) >= 5


def test_screen_readers_get_language_captions_scopes_and_labels() -> None:
    for text in pages():
        page = Page(text)
        assert page.all("html") == [{"lang": "en"}]
        assert len(page.all("h1")) == 1
        assert len(page.all("table")) == len(page.all("caption"))
        assert all(heading["scope"] in ("col", "row") for heading in page.all("th"))
        assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
        ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
        assert {link["href"][1:] for link in page.all("a")} <= ids


def luminance(colour: str) -> float:
    """Compute the relative luminance of a colour, as defined by the accessibility guidelines (WCAG 2.2)."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_text_has_enough_contrast_with_its_background(scheme: str) -> None:
    block = {"light": 0, "dark": 1, "print": 2}[scheme]
    blocks = re.findall(r":root \{(.*?)\}", STYLE_FILE.read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", blocks[block]))
    pairs = [
        (text, background)
        for text in ("ink", "quiet", "link", "pass", "fail", "doubt")
        for background in ("paper", "raised")
    ]
    pairs += [("ink", f"{tone}-paper") for tone in ("pass", "fail", "doubt")]
    pairs += [(tone, f"{tone}-paper") for tone in ("pass", "fail", "doubt")]
    pairs += [(f"g{group}", "paper") for group in range(6)]
    for text, background in pairs:
        light, dark = sorted((luminance(colours[text]), luminance(colours[background])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{text} on {background}"  # level AA


def test_equal_reports_give_equal_pages() -> None:
    report = report_of(12)
    assert parity_html(report) == parity_html(ParityReport.model_validate_json(report.model_dump_json()))


def test_a_report_of_a_failed_structure_gate_is_a_valid_page() -> None:
    report = report_of(12)
    broken = report.candidates[0].gates[0].model_copy(update={"verdict": "FAIL", "findings": ("not an ONNX model.",)})
    bare = report.candidates[0].model_copy(
        update={
            "verdict": "FAIL", "gates": (broken,), "groups": (), "classes": (), "flips": (), "confidence": (),
            "certificate": None, "latency": (),
        }
    )  # fmt: skip
    text = Page(parity_html(report.model_copy(update={"verdict": "FAIL", "candidates": (bare,)}))).text
    assert "✗ FAIL Nothing is certified: fp32 did not pass G0 structure. fp32 ✗ FAIL not an ONNX model." in text


def test_unknown_values_are_shown_as_dashes() -> None:
    report = report_of(12)
    candidate = report.candidates[2]
    no_images = {"num_images": 0, "reference_accuracy": None, "candidate_accuracy": None}
    assert candidate.certificate is not None
    reliabilities = [
        group.model_copy(
            update={"num_images": 0, "ece_before": None, "ece_after": None, "ece_null": None, "before": (), "after": ()}
        )
        for group in candidate.certificate.reliability
    ]
    empty = candidate.model_copy(
        update={
            "groups": tuple(row.model_copy(update={**no_images, "loss": None}) for row in candidate.groups),
            "classes": tuple(row.model_copy(update=no_images) for row in candidate.classes),
            "confidence": tuple(
                row.model_copy(
                    update={"kl": None, "nll": None, "brier": None, "ece_null": None, "confidence_change": None}
                )
                for row in candidate.confidence
            ),
            "certificate": candidate.certificate.model_copy(update={"reliability": tuple(reliabilities)}),
        }
    )
    page = Page(parity_html(report.model_copy(update={"candidates": (empty,)})))
    assert "nan" not in page.text.lower().split()
    assert "None" not in page.text


def parsed(svg: Markup) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def by_class(plot: ElementTree.Element, tag: str, css_class: str) -> list[ElementTree.Element]:
    namespace = "{http://www.w3.org/2000/svg}"
    return [node for node in plot.iter(namespace + tag) if css_class in node.get("class", "").split()]


def test_accuracies_by_class_are_drawn_at_their_values_in_the_given_order() -> None:
    candidate = report_of(12, "int8").candidates[2]
    plot = parsed(accuracy_by_class(candidate.classes, candidate.groups[:-1]))
    dots = by_class(plot, "circle", "after")
    assert len(dots) == 12
    xs = [float(dot.get("cx", "")) for dot in dots]
    assert xs == sorted(xs)
    for dot, row in zip(dots, candidate.classes, strict=True):
        assert row.candidate_accuracy is not None
        # the frame is 260 high and ends at 290; positions are rounded to two places
        assert float(dot.get("cy", "")) == pytest.approx(290 - 260 * row.candidate_accuracy, abs=0.01)
    assert [part.text for part in by_class(plot, "text", "group")] == ["head", "medium", "tail"]
    text = "".join(plot.itertext())
    assert all(row.label in text for row in candidate.classes)


def test_a_group_whose_classes_are_not_contiguous_is_labelled_once() -> None:
    candidate = report_of(12).candidates[0]
    mixed = [
        row.model_copy(update={"group": ("head", "tail")[index % 2]}) for index, row in enumerate(candidate.classes)
    ]
    plot = parsed(accuracy_by_class(mixed, [candidate.groups[0], candidate.groups[2]]))
    assert sorted(part.text or "" for part in by_class(plot, "text", "group")) == ["head", "tail"]
    assert len(by_class(plot, "rect", "band")) == 12


def test_a_plot_of_a_thousand_classes_has_the_same_width_and_no_rings() -> None:
    candidate = report_of(1000).candidates[0]
    plot = parsed(accuracy_by_class(candidate.classes, candidate.groups[:-1]))
    assert plot.get("viewBox", "").split()[2] == "860"
    dots = by_class(plot, "circle", "after")
    assert len(dots) == 1000
    assert float(dots[0].get("r", "")) >= 1.5
    assert by_class(plot, "circle", "before") == []


def test_flip_counts_are_drawn_above_their_bars() -> None:
    flips = (
        FlipsByMargin(above=0, up_to=0.01, num_images=(50, 20), num_flips=(5, 0)),
        FlipsByMargin(above=0.01, up_to=1, num_images=(100, 0), num_flips=(1, 0)),
    )
    plot = parsed(flips_by_margin(flips, ("head", "tail")))
    bars = by_class(plot, "rect", "g0")
    # 5 of 50 and 1 of 100, on an axis that ends at 10 %: 200 and 20 units high
    assert [float(bar.get("height", "")) for bar in bars] == pytest.approx([200, 20], abs=0.01)
    assert by_class(plot, "rect", "g1") == []
    assert {"5", "1", "0 to 1 %", "of 70", "1 to 100 %", "of 100"} <= {text.strip() for text in plot.itertext()}


def test_a_plot_without_flips_has_a_text_instead_of_bars() -> None:
    flips = (FlipsByMargin(above=0, up_to=1, num_images=(50, 20), num_flips=(0, 0)),)
    assert "no image changed class" in "".join(parsed(flips_by_margin(flips, ("head", "tail"))).itertext())


def test_reliability_has_a_point_for_every_bin_with_images() -> None:
    certificate = report_of(12).candidates[0].certificate
    assert certificate is not None
    plot = parsed(reliability(certificate.reliability[0]))
    filled = [each for each in certificate.reliability[0].after if each.num_images]
    assert len(by_class(plot, "circle", "after")) == len(by_class(plot, "circle", "before")) == len(filled)
    last = by_class(plot, "circle", "after")[-1]
    assert filled[-1].accuracy is not None and filled[-1].mean_confidence is not None
    assert float(last.get("cx", "")) == pytest.approx(48 + 240 * filled[-1].mean_confidence, abs=0.01)
    assert float(last.get("cy", "")) == pytest.approx(252 - 240 * filled[-1].accuracy, abs=0.01)


def test_the_length_of_a_bar_is_proportional_to_its_value() -> None:
    plot = parsed(horizontal_bars("time", [Bar("a", 2.0, "2 ms", 1.5, 4.0), Bar("b", 1.0, "1 ms")]))
    lengths = [float(bar.get("width", "")) for bar in by_class(plot, "rect", "bar")]
    assert lengths == pytest.approx([90, 45])  # the axis is 180 long and ends at 4
    (whisker,) = by_class(plot, "line", "whisker")
    assert float(whisker.get("x2", "")) == pytest.approx(104 + 180)


def test_everything_but_markup_is_escaped() -> None:
    inner = element("b", "<i>", title='"&"', data_x=1.0)
    assert inner == '<b title="&quot;&amp;&quot;" data-x="1">&lt;i&gt;</b>'
    assert element("p", inner, " & ", class_="x") == f'<p class="x">{inner} &amp; </p>'
    assert joined("<", Markup("<br>")) == "&lt;<br>"


def test_write_report_writes_json_and_html(tmp_path: Path) -> None:
    report = report_of(12)
    write_report(report, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["parity.html", "parity.json"]
    assert read_record(tmp_path / "new" / "folder" / "parity.json", ParityReport, BundleError) == report
    assert (tmp_path / "new" / "folder" / "parity.html").read_text() == parity_html(report)
