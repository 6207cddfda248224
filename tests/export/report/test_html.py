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

EVIL = "<script>alert('x')</script> \"onload=\" & ]]>"


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and whether every element is closed in its turn."""

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


def test_a_page_is_sound_html_and_loads_and_runs_nothing() -> None:
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


def test_the_verdict_comes_first_then_what_it_means() -> None:
    seen = Page(parity_html(report_of(100, "int8"))).text
    assert seen.startswith(
        "PASS: parity of cifar100-student Parity of cifar100-student with torch float32 of the run cifar100-student "
        "✓ PASS With 95 % confidence, every group of classes (head, medium, tail) lost less accuracy than its margin "
        "in fp32 and fp16. Not certified, and not in the bundle: int8. fp32 ✓ PASS Closest to its margin: head"
    )
    assert "int8 ✗ FAIL Beyond its margin: tail, " in seen
    seen = Page(parity_html(report_of(12, "fp32"))).text
    assert "✗ FAIL Nothing is certified: fp32 did not pass G3 task." in seen


def test_an_inconclusive_report_says_what_would_decide_it() -> None:
    report = report_of(12).model_copy(update={"verdict": "INCONCLUSIVE"})
    assert (
        "? INCONCLUSIVE Nothing is certified: these images neither show nor exclude" in Page(parity_html(report)).text
    )


def test_every_figure_of_the_table_per_group_is_on_the_page() -> None:
    report = report_of(100, "int8")
    seen = Page(parity_html(report)).text
    for candidate in report.candidates:
        for row in candidate.groups:
            assert row.candidate_accuracy is not None and row.loss is not None
            figures = (row.loss, row.loss_upper_limit, row.margin)
            points = " ".join(f"{100 * figure:.2f}".replace("-", "\N{MINUS SIGN}") for figure in figures)
            assert f"{row.right_to_wrong:,} {row.wrong_to_right:,} {points} {row.num_flips:,}" in seen
    for part in report.data.splits:
        assert part.sha256 in seen
    for trial in report.candidates[2].quantisation:
        assert trial.configuration in seen
    assert "/classifier/Gemm" in seen
    assert "no guarantee" in seen


def test_all_names_are_text_whatever_they_hold() -> None:
    text = report_of(12, "int8").model_dump_json()
    names = {"cifar100-student", "head", "apple 0", "model.onnx", "/classifier/Gemm", "G3 task", "avx2"}
    report = ParityReport.model_validate_json(text)
    for name in names - {"G3 task"}:
        report = ParityReport.model_validate_json(
            report.model_dump_json().replace(f'"{name}"', '"' + EVIL.replace('"', '\\"') + '"')
        )
    page = Page(parity_html(report))
    assert "script" not in {tag for tag, _ in page.elements}
    assert not any("onload" in attributes for _, attributes in page.elements)
    assert page.text.count(EVIL) >= 5


def test_what_a_reader_of_the_screen_aloud_needs_is_there() -> None:
    for text in pages():
        page = Page(text)
        assert page.all("html") == [{"lang": "en"}]
        assert len(page.all("h1")) == 1
        assert len(page.all("table")) == len(page.all("caption"))
        assert all(heading["scope"] in ("col", "row") for heading in page.all("th"))
        assert all(picture.get("aria-label") or picture.get("aria-hidden") for picture in page.all("svg"))
        named = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
        assert {link["href"][1:] for link in page.all("a")} <= named


def luminance(colour: str) -> float:
    """Relative luminance of a colour, as the accessibility guidelines (WCAG 2.2) define it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("look", ["light", "dark", "print"])
def test_every_colour_of_words_stands_out_from_its_paper(look: str) -> None:
    start = {"light": 0, "dark": 1, "print": 2}[look]
    blocks = re.findall(r":root \{(.*?)\}", STYLE_FILE.read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", blocks[start]))
    pairs = [
        (words, paper) for words in ("ink", "quiet", "link", "pass", "fail", "doubt") for paper in ("paper", "raised")
    ]
    pairs += [("ink", f"{tone}-paper") for tone in ("pass", "fail", "doubt")]
    pairs += [(tone, f"{tone}-paper") for tone in ("pass", "fail", "doubt")]
    pairs += [(f"g{group}", "paper") for group in range(6)]
    for words, paper in pairs:
        light, dark = sorted((luminance(colours[words]), luminance(colours[paper])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{words} on {paper}"  # level AA


def test_equal_reports_give_equal_pages() -> None:
    report = report_of(12)
    assert parity_html(report) == parity_html(ParityReport.model_validate_json(report.model_dump_json()))


def test_a_report_that_ended_at_the_structure_is_a_page_too() -> None:
    report = report_of(12)
    broken = report.candidates[0].gates[0].model_copy(update={"verdict": "FAIL", "findings": ("no ONNX model.",)})
    bare = report.candidates[0].model_copy(
        update={
            "verdict": "FAIL", "gates": (broken,), "groups": (), "classes": (), "flips": (), "confidence": (),
            "certificate": None, "latency": (),
        }
    )  # fmt: skip
    seen = Page(parity_html(report.model_copy(update={"verdict": "FAIL", "candidates": (bare,)}))).text
    assert "✗ FAIL Nothing is certified: fp32 did not pass G0 structure. fp32 ✗ FAIL no ONNX model." in seen


def test_groups_without_images_and_figures_that_are_unknown_are_dashes() -> None:
    report = report_of(12)
    candidate = report.candidates[2]
    nothing = {"num_images": 0, "reference_accuracy": None, "candidate_accuracy": None}
    assert candidate.certificate is not None
    reliabilities = [
        group.model_copy(
            update={"num_images": 0, "ece_before": None, "ece_after": None, "ece_null": None, "before": (), "after": ()}
        )
        for group in candidate.certificate.reliability
    ]
    empty = candidate.model_copy(
        update={
            "groups": tuple(row.model_copy(update={**nothing, "loss": None}) for row in candidate.groups),
            "classes": tuple(row.model_copy(update=nothing) for row in candidate.classes),
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


def drawn(picture: Markup) -> ElementTree.Element:
    return ElementTree.fromstring(picture)


def by_class(picture: ElementTree.Element, tag: str, kind: str) -> list[ElementTree.Element]:
    space = "{http://www.w3.org/2000/svg}"
    return [part for part in picture.iter(space + tag) if kind in part.get("class", "").split()]


def test_accuracies_by_class_lie_at_their_heights_in_the_order_given() -> None:
    candidate = report_of(12, "int8").candidates[2]
    picture = drawn(accuracy_by_class(candidate.classes, candidate.groups[:-1]))
    dots = by_class(picture, "circle", "after")
    assert len(dots) == 12
    places = [float(dot.get("cx", "")) for dot in dots]
    assert places == sorted(places)
    for dot, row in zip(dots, candidate.classes, strict=True):
        assert row.candidate_accuracy is not None
        # the frame is 260 high and ends at 290; positions are rounded to two places
        assert float(dot.get("cy", "")) == pytest.approx(290 - 260 * row.candidate_accuracy, abs=0.01)
    assert [part.text for part in by_class(picture, "text", "group")] == ["head", "medium", "tail"]
    words = "".join(picture.itertext())
    assert all(row.label in words for row in candidate.classes)


def test_groups_that_are_not_in_the_order_of_frequency_are_named_once_each() -> None:
    candidate = report_of(12).candidates[0]
    mixed = [
        row.model_copy(update={"group": ("head", "tail")[place % 2]}) for place, row in enumerate(candidate.classes)
    ]
    picture = drawn(accuracy_by_class(mixed, [candidate.groups[0], candidate.groups[2]]))
    assert sorted(part.text or "" for part in by_class(picture, "text", "group")) == ["head", "tail"]
    assert len(by_class(picture, "rect", "band")) == 12


def test_a_thousand_classes_are_a_picture_of_the_same_width_without_rings() -> None:
    candidate = report_of(1000).candidates[0]
    picture = drawn(accuracy_by_class(candidate.classes, candidate.groups[:-1]))
    assert picture.get("viewBox", "").split()[2] == "860"
    dots = by_class(picture, "circle", "after")
    assert len(dots) == 1000
    assert float(dots[0].get("r", "")) >= 1.5
    assert by_class(picture, "circle", "before") == []


def test_flips_are_counted_above_their_bars() -> None:
    flips = (
        FlipsByMargin(above=0, up_to=0.01, num_images=(50, 20), num_flips=(5, 0)),
        FlipsByMargin(above=0.01, up_to=1, num_images=(100, 0), num_flips=(1, 0)),
    )
    picture = drawn(flips_by_margin(flips, ("head", "tail")))
    bars = by_class(picture, "rect", "g0")
    # 5 of 50 and 1 of 100, on an axis that ends at 10 %: 200 and 20 units high
    assert [float(bar.get("height", "")) for bar in bars] == pytest.approx([200, 20], abs=0.01)
    assert by_class(picture, "rect", "g1") == []
    assert {"5", "1", "0 to 1 %", "of 70", "1 to 100 %", "of 100"} <= {text.strip() for text in picture.itertext()}


def test_no_flips_are_said_in_words() -> None:
    flips = (FlipsByMargin(above=0, up_to=1, num_images=(50, 20), num_flips=(0, 0)),)
    assert "no image changed class" in "".join(drawn(flips_by_margin(flips, ("head", "tail"))).itertext())


def test_reliability_has_a_point_for_every_bin_with_images() -> None:
    certificate = report_of(12).candidates[0].certificate
    assert certificate is not None
    picture = drawn(reliability(certificate.reliability[0]))
    filled = [part for part in certificate.reliability[0].after if part.num_images]
    assert len(by_class(picture, "circle", "after")) == len(by_class(picture, "circle", "before")) == len(filled)
    last = by_class(picture, "circle", "after")[-1]
    assert filled[-1].accuracy is not None and filled[-1].mean_confidence is not None
    assert float(last.get("cx", "")) == pytest.approx(48 + 240 * filled[-1].mean_confidence, abs=0.01)
    assert float(last.get("cy", "")) == pytest.approx(252 - 240 * filled[-1].accuracy, abs=0.01)


def test_bars_are_as_long_as_their_values() -> None:
    picture = drawn(horizontal_bars("time", [Bar("a", 2.0, "2 ms", 1.5, 4.0), Bar("b", 1.0, "1 ms")]))
    lengths = [float(bar.get("width", "")) for bar in by_class(picture, "rect", "bar")]
    assert lengths == pytest.approx([90, 45])  # of 180, which stand for 4
    (whisker,) = by_class(picture, "line", "whisker")
    assert float(whisker.get("x2", "")) == pytest.approx(104 + 180)


def test_markup_escapes_everything_but_markup() -> None:
    inner = element("b", "<i>", title='"&"', data_x=1.0)
    assert inner == '<b title="&quot;&amp;&quot;" data-x="1">&lt;i&gt;</b>'
    assert element("p", inner, " & ", class_="x") == f'<p class="x">{inner} &amp; </p>'
    assert joined("<", Markup("<br>")) == "&lt;<br>"


def test_a_report_is_left_for_programs_and_for_people(tmp_path: Path) -> None:
    report = report_of(12)
    write_report(report, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["parity.html", "parity.json"]
    assert read_record(tmp_path / "new" / "folder" / "parity.json", ParityReport, BundleError) == report
    assert (tmp_path / "new" / "folder" / "parity.html").read_text() == parity_html(report)
