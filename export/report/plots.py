"""The pictures of the parity report, as SVG that takes its colours from the page.

Lengths are in units of the picture's own box, which are pixels at its natural size.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from export.report.markup import Markup, element, joined
from export.schema import ClassParity, FlipsByMargin, GroupParity, GroupReliability, ReliabilityBin

NUM_COLOURS = 6
MOST_NAMED_CLASSES = 40
MOST_RINGS = 250
LONGEST_NAME = 16


@dataclass(frozen=True)
class Frame:
    """The part of a picture that data are drawn in, with their ranges: x from 0 to ``x_max``, y from 0 to ``y_max``."""

    left: float
    top: float
    width: float
    height: float
    x_max: float = 1.0
    y_max: float = 1.0

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height

    def x(self, value: float) -> float:
        """Where a value lies from left to right."""
        return self.left + self.width * value / self.x_max

    def y(self, value: float) -> float:
        """Where a value lies from top to bottom."""
        return self.bottom - self.height * value / self.y_max


@dataclass(frozen=True)
class Bar:
    """One horizontal bar: a label on the left, a text on its right, and perhaps an interval."""

    label: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None


def accuracy_by_class(classes: Sequence[ClassParity], groups: Sequence[GroupParity]) -> Markup:
    """Accuracy of every class by reference and candidate, the most frequent class on the left, its group behind it.

    Args:
        classes: Sorted by training count.
        groups: The rows of the groups, in order; their accuracies are drawn as levels.
    """
    named = len(classes) <= MOST_NAMED_CLASSES
    frame = Frame(left=48, top=30, width=800, height=260, x_max=max(len(classes), 1))
    rows = {row.group: row for row in groups}
    order = list(rows)
    marks = [
        _class_mark(frame, place, row, order.index(row.group), ring=len(classes) <= MOST_RINGS)
        for place, row in enumerate(classes)
        if row.candidate_accuracy is not None and row.reference_accuracy is not None
    ]
    said = "; ".join(
        f"{row.group}: reference {_percent(row.reference_accuracy)}, candidate {_percent(row.candidate_accuracy)}"
        for row in groups
    )
    return _picture(
        860,
        frame.bottom + (104 if named else 46),
        f"Accuracy of {len(classes)} classes, sorted by training images. {said}.",
        *_bands(frame, classes, rows),
        *_percent_axis(frame, (0.0, 0.25, 0.5, 0.75, 1.0)),
        *marks,
        *(_class_names(frame, classes) if named else _class_counts(frame, classes)),
    )


def flips_by_margin(flips: Sequence[FlipsByMargin], group_names: Sequence[str]) -> Markup:
    """How many of the images changed class, by how clear their class was: a bar for every group."""
    rates = [
        [
            num_flips / num_images if num_images else 0.0
            for num_flips, num_images in zip(part.num_flips, part.num_images, strict=True)
        ]
        for part in flips
    ]
    highest = max((rate for part in rates for rate in part), default=0.0)
    ticks = _round_ticks(highest or 0.01)
    frame = Frame(left=56, top=22, width=700, height=200, x_max=max(len(flips), 1), y_max=ticks[-1])
    bars = [
        _flip_bar(frame, place, group, part.num_flips[group], rates[place][group], len(group_names))
        for place, part in enumerate(flips)
        for group in range(len(group_names))
    ]
    total = [sum(part.num_flips[group] for part in flips) for group in range(len(group_names))]
    said = ", ".join(f"{name} {num:,}" for name, num in zip(group_names, total, strict=True))
    nothing = [_text(frame.x(len(flips) / 2), frame.y(frame.y_max / 2), "no image changed class", anchor="middle")]
    return _picture(
        770,
        frame.bottom + 60,
        f"Images that changed class, by how clear their class was to the reference: {said}.",
        *_percent_axis(frame, ticks),
        *bars,
        *(nothing if not any(total) else ()),
        *(label for place, part in enumerate(flips) for label in _bin_labels(frame, place, part)),
        _text(
            frame.left + frame.width / 2,
            frame.bottom + 54,
            "margin between the two highest logits, as a share of their span",
            anchor="middle",
        ),
    )


def reliability(group: GroupReliability) -> Markup:
    """How often predictions of a group were right against how sure they were, before and after calibration."""
    frame = Frame(left=48, top=12, width=240, height=240)
    strip = Frame(
        left=48, top=264, width=240, height=36, y_max=max([part.num_images for part in group.after] or [1]) or 1
    )
    histogram = [
        element(
            "rect",
            x=strip.x(part.above) + 1,
            y=strip.y(part.num_images),
            width=max(strip.width * (part.up_to - part.above) - 2, 0.5),
            height=strip.bottom - strip.y(part.num_images),
            class_="after",
        )
        for part in group.after
    ]
    diagonal = element("line", x1=frame.left, y1=frame.bottom, x2=frame.right, y2=frame.top, class_="ideal")
    return _picture(
        312,
        352,
        f"Reliability of predictions in the group {group.group}: expected calibration error "
        f"{_percent(group.ece_before)} before and {_percent(group.ece_after)} after calibration.",
        *_percent_axis(frame, (0.0, 0.5, 1.0)),
        diagonal,
        *_reliability_points(frame, group.before, "before"),
        *_reliability_points(frame, group.after, "after"),
        *histogram,
        *(_text(strip.x(x), strip.bottom + 17, f"{100 * x:.0f} %", anchor="middle") for x in (0, 0.5, 1)),
        _text(strip.left + strip.width / 2, strip.bottom + 38, "confidence", anchor="middle"),
    )


def horizontal_bars(title: str, bars: Sequence[Bar]) -> Markup:
    """Bars that start at zero, with their figures in words."""
    highest = max((bar.high or bar.value for bar in bars), default=1.0) or 1.0
    frame = Frame(left=104, top=8, width=180, height=30 * len(bars), x_max=highest)
    drawn = []
    for place, bar in enumerate(bars):
        middle = frame.top + 30 * place + 15
        drawn += [
            _text(frame.left - 8, middle + 4, bar.label, anchor="end"),
            element("rect", x=frame.left, y=middle - 9, width=frame.x(bar.value) - frame.left, height=18, class_="bar"),
            _text(frame.right + 8, middle + 4, bar.text),
        ]
        if bar.low is not None and bar.high is not None:
            drawn.append(
                element("line", x1=frame.x(bar.low), y1=middle, x2=frame.x(bar.high), y2=middle, class_="whisker")
            )
    said = "; ".join(f"{bar.label} {bar.text}" for bar in bars)
    return _picture(380, frame.bottom + 8, f"{title}: {said}.", *drawn)


def _picture(width: float, height: float, said: str, *content: str) -> Markup:
    return element(
        "svg",
        *content,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        role="img",
        aria_label=said,
    )


def _text(x: float, y: float, words: str, anchor: str = "start", **attributes: str | float) -> Markup:
    return element("text", words, x=x, y=y, text_anchor=anchor, **attributes)


def _percent_axis(frame: Frame, ticks: Sequence[float]) -> Iterator[Markup]:
    for tick in ticks:
        height = frame.y(tick)
        yield element("line", x1=frame.left, y1=height, x2=frame.right, y2=height, class_="grid")
        yield _text(frame.left - 6, height + 4, f"{100 * tick:g} %", anchor="end")


def _bands(frame: Frame, classes: Sequence[ClassParity], rows: Mapping[str, GroupParity]) -> Iterator[Markup]:
    """The groups as areas behind their classes; one whose classes do not lie together has several."""
    order, longest = list(rows), _longest_runs(classes)
    for group, start, length in _runs(classes):
        left, right = frame.x(start), frame.x(start + length)
        colour = f"g{order.index(group) % NUM_COLOURS}"
        yield element("rect", x=left, y=frame.top, width=right - left, height=frame.height, class_=f"band {colour}")
        for accuracy, kind in ((rows[group].reference_accuracy, "before"), (rows[group].candidate_accuracy, "after")):
            if accuracy is not None:
                height = frame.y(accuracy)
                yield element("line", x1=left, y1=height, x2=right, y2=height, class_=f"level {kind} {colour}")
        if longest[group] == start:
            yield _text((left + right) / 2, frame.top - 10, group, anchor="middle", class_=f"group {colour}")


def _runs(classes: Sequence[ClassParity]) -> Iterator[tuple[str, int, int]]:
    start = 0
    for group, members in itertools.groupby(classes, key=_group_of):
        length = len(list(members))
        yield group, start, length
        start += length


def _group_of(row: ClassParity) -> str:
    return row.group


def _longest_runs(classes: Sequence[ClassParity]) -> dict[str, int]:
    """Where the longest run of every group begins; its name stands there, once."""
    by_length = sorted(_runs(classes), key=_length)
    return {group: start for group, start, _ in by_length}


def _length(run: tuple[str, int, int]) -> int:
    return run[2]


def _class_mark(frame: Frame, place: int, row: ClassParity, group: int, ring: bool) -> Markup:
    assert row.reference_accuracy is not None and row.candidate_accuracy is not None
    x, before, after = frame.x(place + 0.5), frame.y(row.reference_accuracy), frame.y(row.candidate_accuracy)
    radius = max(1.6, min(4.0, 0.36 * frame.width / frame.x_max))
    said = (
        f"{row.label} ({row.group}, {row.train_count:,} training images): "
        f"reference {_percent(row.reference_accuracy)}, candidate {_percent(row.candidate_accuracy)}"
    )
    parts = [element("title", said)]
    if row.reference_accuracy != row.candidate_accuracy:
        parts.append(element("line", x1=x, y1=before, x2=x, y2=after, class_="change"))
    if ring:
        parts.append(element("circle", cx=x, cy=before, r=radius + 1, class_="before"))
    return element(
        "g", *parts, element("circle", cx=x, cy=after, r=radius, class_="after"), class_=f"class g{group % NUM_COLOURS}"
    )


def _class_names(frame: Frame, classes: Sequence[ClassParity]) -> Iterator[Markup]:
    for place, row in enumerate(classes):
        x, y = frame.x(place + 0.5) + 4, frame.bottom + 14
        yield _text(x, y, _shortened(row.label), anchor="end", transform=f"rotate(-50 {x:.1f} {y:.1f})")


def _class_counts(frame: Frame, classes: Sequence[ClassParity]) -> Iterator[Markup]:
    last = len(classes) - 1
    for share, anchor in ((0.0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1.0, "end")):
        place = round(share * last)
        x = frame.x(place + 0.5)
        yield element("line", x1=x, y1=frame.bottom, x2=x, y2=frame.bottom + 5, class_="tick")
        yield _text(x, frame.bottom + 19, f"{classes[place].train_count:,}", anchor=anchor)
    yield _text(frame.left + frame.width / 2, frame.bottom + 40, "training images of the class", anchor="middle")


def _shortened(label: str) -> str:
    return label if len(label) <= LONGEST_NAME else label[: LONGEST_NAME - 1] + "…"


def _flip_bar(frame: Frame, place: int, group: int, num_flips: int, rate: float, num_groups: int) -> Markup:
    if not num_flips:
        return Markup()
    width = 0.8 * frame.width / frame.x_max / num_groups
    left = frame.x(place + 0.1) + group * width
    top = frame.y(rate)
    return joined(
        element(
            "rect", x=left, y=top, width=max(width - 2, 1), height=frame.bottom - top, class_=f"g{group % NUM_COLOURS}"
        ),
        _text(left + width / 2 - 1, top - 4, f"{num_flips:,}", anchor="middle"),
    )


def _bin_labels(frame: Frame, place: int, part: FlipsByMargin) -> tuple[Markup, Markup]:
    x = frame.x(place + 0.5)
    return (
        _text(x, frame.bottom + 17, f"{100 * part.above:g} to {100 * part.up_to:g} %", anchor="middle"),
        _text(x, frame.bottom + 34, f"of {sum(part.num_images):,}", anchor="middle", class_="quiet"),
    )


def _reliability_points(frame: Frame, bins: Sequence[ReliabilityBin], kind: str) -> Iterator[Markup]:
    seen = [part for part in bins if part.mean_confidence is not None and part.accuracy is not None]
    points = [(frame.x(part.mean_confidence or 0), frame.y(part.accuracy or 0)) for part in seen]
    yield element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=f"curve {kind}")
    most = max((part.num_images for part in seen), default=1)
    for (x, y), part in zip(points, seen, strict=True):
        said = f"{_percent(part.mean_confidence)} sure, {_percent(part.accuracy)} right, {part.num_images:,} images"
        radius = 2 + 3.5 * math.sqrt(part.num_images / most)
        yield element("circle", element("title", said), cx=x, cy=y, r=radius, class_=kind)


def _round_ticks(highest: float) -> list[float]:
    """Three to six round numbers from zero to at least ``highest``."""
    magnitude = 10.0 ** math.floor(math.log10(highest))
    size = next(factor * magnitude for factor in (0.2, 0.25, 0.5, 1.0, 2.0) if 5 * factor * magnitude >= highest)
    return [size * place for place in range(math.ceil(highest / size) + 1)]


def _percent(fraction: float | None) -> str:
    return "unknown" if fraction is None else f"{100 * fraction:.1f} %"
