"""The plots of the parity report, as SVG whose colours come from the page's style sheet.

Lengths are in units of the plot's ``viewBox``, which are pixels at its natural size.
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
    """The plotting area: its position, its size and the data range, x from 0 to ``x_max`` and y from 0 to ``y_max``."""

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
        """Convert a data value to a horizontal position."""
        return self.left + self.width * value / self.x_max

    def y(self, value: float) -> float:
        """Convert a data value to a vertical position."""
        return self.bottom - self.height * value / self.y_max


@dataclass(frozen=True)
class Bar:
    """One horizontal bar: a label on the left, a text on the right and an optional interval."""

    label: str
    value: float
    text: str
    low: float | None = None
    high: float | None = None


def accuracy_by_class(classes: Sequence[ClassParity], groups: Sequence[GroupParity]) -> Markup:
    """Plot the accuracy of every class in reference and candidate, with the most frequent class on the left.

    Args:
        classes: Sorted by training count.
        groups: The rows of the groups, in order. Each group is a coloured band, its accuracies are horizontal lines.
    """
    named = len(classes) <= MOST_NAMED_CLASSES
    frame = Frame(left=48, top=30, width=800, height=260, x_max=max(len(classes), 1))
    rows = {row.group: row for row in groups}
    order = list(rows)
    marks = [
        _class_mark(frame, index, row, order.index(row.group), ring=len(classes) <= MOST_RINGS)
        for index, row in enumerate(classes)
        if row.candidate_accuracy is not None and row.reference_accuracy is not None
    ]
    accuracies = "; ".join(
        f"{row.group}: reference {_percent(row.reference_accuracy)}, candidate {_percent(row.candidate_accuracy)}"
        for row in groups
    )
    return _svg(
        860,
        frame.bottom + (104 if named else 46),
        f"Accuracy of {len(classes)} classes, sorted by training images. {accuracies}.",
        *_bands(frame, classes, rows),
        *_percent_axis(frame, (0.0, 0.25, 0.5, 0.75, 1.0)),
        *marks,
        *(_class_names(frame, classes) if named else _class_counts(frame, classes)),
    )


def flips_by_margin(flips: Sequence[FlipsByMargin], group_names: Sequence[str]) -> Markup:
    """Plot the share of images that changed class, by the margin between the reference's two highest logits."""
    rates = [
        [
            num_flips / num_images if num_images else 0.0
            for num_flips, num_images in zip(interval.num_flips, interval.num_images, strict=True)
        ]
        for interval in flips
    ]
    highest = max((rate for interval in rates for rate in interval), default=0.0)
    ticks = _round_ticks(highest or 0.01)
    frame = Frame(left=56, top=22, width=700, height=200, x_max=max(len(flips), 1), y_max=ticks[-1])
    bars = [
        _flip_bar(frame, index, group, interval.num_flips[group], rates[index][group], len(group_names))
        for index, interval in enumerate(flips)
        for group in range(len(group_names))
    ]
    total = [sum(interval.num_flips[group] for interval in flips) for group in range(len(group_names))]
    counts = ", ".join(f"{name} {num:,}" for name, num in zip(group_names, total, strict=True))
    no_flips = [_text(frame.x(len(flips) / 2), frame.y(frame.y_max / 2), "no image changed class", anchor="middle")]
    return _svg(
        770,
        frame.bottom + 60,
        f"Images that changed class, by the reference's margin between the two highest logits: {counts}.",
        *_percent_axis(frame, ticks),
        *bars,
        *(no_flips if not any(total) else ()),
        *(label for index, interval in enumerate(flips) for label in _bin_labels(frame, index, interval)),
        _text(
            frame.left + frame.width / 2,
            frame.bottom + 54,
            "margin between the two highest logits, as a share of their span",
            anchor="middle",
        ),
    )


def reliability(group: GroupReliability) -> Markup:
    """Plot accuracy over confidence for the predictions of a group, before and after calibration."""
    frame = Frame(left=48, top=12, width=240, height=240)
    strip = Frame(
        left=48, top=264, width=240, height=36, y_max=max([each.num_images for each in group.after] or [1]) or 1
    )
    histogram = [
        element(
            "rect",
            x=strip.x(interval.above) + 1,
            y=strip.y(interval.num_images),
            width=max(strip.width * (interval.up_to - interval.above) - 2, 0.5),
            height=strip.bottom - strip.y(interval.num_images),
            class_="after",
        )
        for interval in group.after
    ]
    diagonal = element("line", x1=frame.left, y1=frame.bottom, x2=frame.right, y2=frame.top, class_="ideal")
    return _svg(
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
    """Plot horizontal bars that start at zero, with their values as text."""
    highest = max((bar.high or bar.value for bar in bars), default=1.0) or 1.0
    frame = Frame(left=104, top=8, width=180, height=30 * len(bars), x_max=highest)
    shapes = []
    for index, bar in enumerate(bars):
        middle = frame.top + 30 * index + 15
        shapes += [
            _text(frame.left - 8, middle + 4, bar.label, anchor="end"),
            element("rect", x=frame.left, y=middle - 9, width=frame.x(bar.value) - frame.left, height=18, class_="bar"),
            _text(frame.right + 8, middle + 4, bar.text),
        ]
        if bar.low is not None and bar.high is not None:
            shapes.append(
                element("line", x1=frame.x(bar.low), y1=middle, x2=frame.x(bar.high), y2=middle, class_="whisker")
            )
    values = "; ".join(f"{bar.label} {bar.text}" for bar in bars)
    return _svg(380, frame.bottom + 8, f"{title}: {values}.", *shapes)


def _svg(width: float, height: float, description: str, *content: str) -> Markup:
    return element(
        "svg",
        *content,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        width=width,
        height=height,
        role="img",
        aria_label=description,
    )


def _text(x: float, y: float, words: str, anchor: str = "start", **attributes: str | float) -> Markup:
    return element("text", words, x=x, y=y, text_anchor=anchor, **attributes)


def _percent_axis(frame: Frame, ticks: Sequence[float]) -> Iterator[Markup]:
    for tick in ticks:
        height = frame.y(tick)
        yield element("line", x1=frame.left, y1=height, x2=frame.right, y2=height, class_="grid")
        yield _text(frame.left - 6, height + 4, f"{100 * tick:g} %", anchor="end")


def _bands(frame: Frame, classes: Sequence[ClassParity], rows: Mapping[str, GroupParity]) -> Iterator[Markup]:
    """Draw each group as a coloured band behind its classes; a group that is not contiguous has several bands."""
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
    """Find where the longest run of each group starts; the group is labelled there, once."""
    by_length = sorted(_runs(classes), key=_length)
    return {group: start for group, start, _ in by_length}


def _length(run: tuple[str, int, int]) -> int:
    return run[2]


def _class_mark(frame: Frame, index: int, row: ClassParity, group: int, ring: bool) -> Markup:
    assert row.reference_accuracy is not None and row.candidate_accuracy is not None
    x, before, after = frame.x(index + 0.5), frame.y(row.reference_accuracy), frame.y(row.candidate_accuracy)
    radius = max(1.6, min(4.0, 0.36 * frame.width / frame.x_max))
    tooltip = (
        f"{row.label} ({row.group}, {row.train_count:,} training images): "
        f"reference {_percent(row.reference_accuracy)}, candidate {_percent(row.candidate_accuracy)}"
    )
    parts = [element("title", tooltip)]
    if row.reference_accuracy != row.candidate_accuracy:
        parts.append(element("line", x1=x, y1=before, x2=x, y2=after, class_="change"))
    if ring:
        parts.append(element("circle", cx=x, cy=before, r=radius + 1, class_="before"))
    return element(
        "g", *parts, element("circle", cx=x, cy=after, r=radius, class_="after"), class_=f"class g{group % NUM_COLOURS}"
    )


def _class_names(frame: Frame, classes: Sequence[ClassParity]) -> Iterator[Markup]:
    for index, row in enumerate(classes):
        x, y = frame.x(index + 0.5) + 4, frame.bottom + 14
        yield _text(x, y, _shortened(row.label), anchor="end", transform=f"rotate(-50 {x:.1f} {y:.1f})")


def _class_counts(frame: Frame, classes: Sequence[ClassParity]) -> Iterator[Markup]:
    last = len(classes) - 1
    for share, anchor in ((0.0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1.0, "end")):
        index = round(share * last)
        x = frame.x(index + 0.5)
        yield element("line", x1=x, y1=frame.bottom, x2=x, y2=frame.bottom + 5, class_="tick")
        yield _text(x, frame.bottom + 19, f"{classes[index].train_count:,}", anchor=anchor)
    yield _text(frame.left + frame.width / 2, frame.bottom + 40, "training images of the class", anchor="middle")


def _shortened(label: str) -> str:
    return label if len(label) <= LONGEST_NAME else label[: LONGEST_NAME - 1] + "…"


def _flip_bar(frame: Frame, index: int, group: int, num_flips: int, rate: float, num_groups: int) -> Markup:
    if not num_flips:
        return Markup()
    width = 0.8 * frame.width / frame.x_max / num_groups
    left = frame.x(index + 0.1) + group * width
    top = frame.y(rate)
    return joined(
        element(
            "rect", x=left, y=top, width=max(width - 2, 1), height=frame.bottom - top, class_=f"g{group % NUM_COLOURS}"
        ),
        _text(left + width / 2 - 1, top - 4, f"{num_flips:,}", anchor="middle"),
    )


def _bin_labels(frame: Frame, index: int, interval: FlipsByMargin) -> tuple[Markup, Markup]:
    x = frame.x(index + 0.5)
    return (
        _text(x, frame.bottom + 17, f"{100 * interval.above:g} to {100 * interval.up_to:g} %", anchor="middle"),
        _text(x, frame.bottom + 34, f"of {sum(interval.num_images):,}", anchor="middle", class_="quiet"),
    )


def _reliability_points(frame: Frame, bins: Sequence[ReliabilityBin], kind: str) -> Iterator[Markup]:
    filled = [interval for interval in bins if interval.mean_confidence is not None and interval.accuracy is not None]
    points = [(frame.x(interval.mean_confidence or 0), frame.y(interval.accuracy or 0)) for interval in filled]
    yield element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=f"curve {kind}")
    most = max((interval.num_images for interval in filled), default=1)
    for (x, y), interval in zip(points, filled, strict=True):
        confidence, accuracy = _percent(interval.mean_confidence), _percent(interval.accuracy)
        tooltip = f"confidence {confidence}, accuracy {accuracy}, {interval.num_images:,} images"
        radius = 2 + 3.5 * math.sqrt(interval.num_images / most)
        yield element("circle", element("title", tooltip), cx=x, cy=y, r=radius, class_=kind)


def _round_ticks(highest: float) -> list[float]:
    """Choose three to six round numbers from zero to at least ``highest``."""
    magnitude = 10.0 ** math.floor(math.log10(highest))
    size = next(factor * magnitude for factor in (0.2, 0.25, 0.5, 1.0, 2.0) if 5 * factor * magnitude >= highest)
    return [size * index for index in range(math.ceil(highest / size) + 1)]


def _percent(fraction: float | None) -> str:
    return "unknown" if fraction is None else f"{100 * fraction:.1f} %"
