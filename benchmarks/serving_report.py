"""What benchmarks/serving.py found, as JSON, as a Markdown table and as a plot.

A median of rounds never comes without its lowest and highest; a ratio is taken between neighbours of one round.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks.servers import OURS, OURS_BY_DEFAULT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.serving import Ceiling, Found, Offered, Visit

SHARE_OF_CEILING = {"resnet8": 0.75, "resnet20": 0.95, "photographs": 0.95}
PYTHON_FRONTS = ("FastAPI handler", "LitServe", "BentoML", "Ray Serve")
ARRIVALS = ("even", "poisson")
P99_OVER_ALONE, READY_S, RESIDENT_MIB = 3.0, 2.0, 300.0
COLOURS = {
    OURS: "#0b6e4f",
    OURS_BY_DEFAULT: "#57b894",
    "mosec": "#d1495b",
    "FastAPI handler": "#30638e",
    "LitServe": "#8d6bb8",
    "BentoML": "#edae49",
    "Ray Serve": "#7f7f7f",
}


Figure = Literal["rate", "goodput", "p50_ms", "p99_ms"]


@dataclass(frozen=True)
class Spread:
    """One value a round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the rounds in which there was a value."""
        known = [value for value in self.values if not math.isnan(value)]
        return statistics.median(known) if known else math.nan

    def as_record(self) -> dict[str, object]:
        """Its form in the JSON, where there is no NaN."""
        rounded = [None if math.isnan(value) else round(value, 4) for value in self.values]
        known = [value for value in rounded if value is not None]
        if not known:
            return {"median": None, "lowest": None, "highest": None, "values": rounded}
        middle = round(statistics.median(known), 4)
        return {"median": middle, "lowest": min(known), "highest": max(known), "values": rounded}

    def shown(self, digits: int = 0) -> str:
        """Median, lowest to highest."""
        known = [value for value in self.values if not math.isnan(value)]
        if not known:
            return "-"
        if len(known) == 1:
            return f"{known[0]:,.{digits}f}"
        return f"{self.median:,.{digits}f} ({min(known):,.{digits}f} to {max(known):,.{digits}f})"


@dataclass(frozen=True)
class Check:
    """One promise, and whether this run kept it.

    Attributes:
        what: The promise in words.
        seen: One value a round.
        limit: What the median is held against.
        at_least: Whether the limit is a lower one.
    """

    what: str
    seen: Spread
    limit: float
    at_least: bool

    @property
    def kept(self) -> bool:
        """A value that is missing keeps nothing."""
        return self.seen.median >= self.limit if self.at_least else self.seen.median <= self.limit


def over_rounds(visits: Sequence["Visit"], value: Callable[["Visit"], float]) -> Spread:
    """One value of every visit."""
    return Spread(tuple(value(visit) for visit in visits))


def best_of(ceilings: Sequence["Ceiling"]) -> Spread:
    """The ceiling of each round, with its best batch size."""
    return Spread(tuple(ceiling.best for ceiling in ceilings))


def lateness_of(ceilings: Sequence["Ceiling"], arrivals: str) -> Spread:
    """The p99 at 80 % over what an image takes alone, where there is no HTTP."""
    return Spread(tuple(ceiling.p99_over_alone[arrivals] for ceiling in ceilings))


def ratios(over: Spread, under: Spread) -> Spread:
    """Of each round, where both were measured in all of them."""
    return Spread(tuple(a / b if b else math.nan for a, b in zip(over.values, under.values, strict=False)))


def knees(found: "Found", server: str) -> Spread:
    """Goodput at the knee."""
    return over_rounds(found.visits.get(server, []), lambda visit: visit.knee)


def point(visit: "Visit", share: float, arrivals: str = "poisson") -> "Offered":
    """What came of one of the offered loads."""
    return next(one for one in visit.offered if (one.share, one.arrivals) == (share, arrivals))


def offered(visits: Sequence["Visit"], like: "Offered", figure: Figure) -> Spread:
    """A figure of one of the offered loads over the rounds."""
    return over_rounds(visits, lambda visit: getattr(point(visit, like.share, like.arrivals), figure))


def checks(name: str, found: "Found") -> list[Check]:
    """What the service promises for a workload."""
    ours, ceiling = knees(found, OURS), best_of(found.ceilings)
    visits = found.visits.get(OURS, [])
    promised = [
        Check("goodput at the knee over the ceiling", ratios(ours, ceiling), SHARE_OF_CEILING[name], at_least=True),
        *(
            Check(f"(a) same model: over {peer}", ratios(ours, knees(found, peer)), 1.0, at_least=True)
            for peer in PYTHON_FRONTS
            if peer in found.visits
        ),
        *(
            Check(
                f"(b) by default: over {peer}",
                ratios(knees(found, OURS_BY_DEFAULT), knees(found, peer)),
                1.0,
                at_least=True,
            )
            for peer in found.visits
            if peer not in (OURS, OURS_BY_DEFAULT)
        ),
    ]
    for arrivals in ARRIVALS:
        late = over_rounds(visits, lambda visit, how=arrivals: point(visit, 0.8, how).p99_ms / visit.alone_p50_ms)  # type: ignore[misc]
        what = f"p99 at 80 % of the knee ({arrivals} arrivals) over p50 alone"
        promised.append(Check(what, late, P99_OVER_ALONE, at_least=False))
    promised.append(
        Check("seconds to the first answer", over_rounds(visits, lambda one: one.ready_s), READY_S, at_least=False)
    )
    resident = over_rounds(visits, lambda one: one.resident_mib)
    promised.append(Check("resident MiB of all processes", resident, RESIDENT_MIB, at_least=False))
    wrong = [sum(one.wrong for one in each) for each in found.visits.values()]
    promised.append(Check("wrong answers of all servers", Spread((float(sum(wrong)),)), 0.0, at_least=False))
    return promised


def server_record(server: str, found: "Found") -> dict[str, object]:
    """Everything about one server in one workload."""
    visits = found.visits[server]
    facts: dict[str, Callable[[Visit], float]] = {
        "goodput_at_the_knee": lambda one: one.knee,
        "knee_connections": lambda one: one.knee_connections,
        "processor_ms_per_answer": lambda one: one.processor_ms,
        "alone_p50_ms": lambda one: one.alone_p50_ms,
        "ready_s": lambda one: one.ready_s,
        "resident_mib": lambda one: one.resident_mib,
        "proportional_mib": lambda one: one.proportional_mib,
        "wrong": lambda one: one.wrong,
    }
    ceilings = found.int8_ceilings if server == OURS_BY_DEFAULT else found.ceilings
    return {
        **{name: over_rounds(visits, value).as_record() for name, value in facts.items()},
        "share_of_its_ceiling": ratios(knees(found, server), best_of(ceilings)).as_record(),
        "closed_loop_goodput": {
            connections: over_rounds(visits, lambda one, c=connections: one.closed[c]).as_record()  # type: ignore[misc]
            for connections in visits[0].closed
        },
        "offered": [
            {
                "share_of_the_knee": one.share,
                "arrivals": one.arrivals,
                "rate": offered(visits, one, "rate").as_record(),
                "goodput": offered(visits, one, "goodput").as_record(),
                "p50_ms": offered(visits, one, "p50_ms").as_record(),
                "p99_ms": offered(visits, one, "p99_ms").as_record(),
                "ended": [point(visit, one.share, one.arrivals).ended for visit in visits],
            }
            for one in visits[0].offered
        ],
    }


def content(found: Mapping[str, "Found"], about: Mapping[str, object]) -> dict[str, object]:
    """What is written as JSON."""
    return {
        **about,
        "workloads": {
            name: {
                "ceiling": best_of(each.ceilings).as_record(),
                "int8_ceiling": best_of(each.int8_ceilings).as_record(),
                "ceilings_by_batch": [ceiling.images_per_s for ceiling in each.ceilings],
                "ceilings_p99_over_alone": {
                    arrivals: lateness_of(each.ceilings, arrivals).as_record() for arrivals in ARRIVALS
                },
                "servers": {server: server_record(server, each) for server in each.visits},
                "left_out": each.missing,
                "checks": [
                    {
                        "what": check.what,
                        "kept": check.kept,
                        "limit": f"at {'least' if check.at_least else 'most'} {check.limit:g}",
                        "seen": check.seen.as_record(),
                    }
                    for check in checks(name, each)
                ],
            }
            for name, each in found.items()
        },
    }


def markdown(found: Mapping[str, "Found"], about: Mapping[str, object]) -> str:
    """The tables for people."""
    lines = [
        "# The service against its ceiling and its peers",
        "",
        f"`{about['command']}`, commit {about['commit']}, {about['date']}, {about['hardware']}: one core for the "
        f"server, one for the load. Median of {about['repeats']} rounds, lowest to highest in brackets.",
    ]
    for name, each in found.items():
        lines += ["", f"## {name}", ""]
        lines.append(
            f"Ceiling, one core without HTTP: {best_of(each.ceilings).shown()} images/s, "
            f"int8 {best_of(each.int8_ceilings).shown()}. Fed at 80 % of that, its own p99 over what an image takes "
            f"alone is {' and '.join(f'{lateness_of(each.ceilings, how).shown(1)} ({how})' for how in ARRIVALS)}."
        )
        lines += [
            "",
            "| server | goodput at the knee /s | of its ceiling | ltkd over it | (b) over it | alone p50 ms "
            "| p99 at 80 % ms | goodput at 200 % /s | ready s | MiB |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [server_line(server, each) for server in each.visits]
        lines += [f"| {server} | left out: {reason} | | | | | | | | |" for server, reason in each.missing.items()]
        lines += ["", "| promise | limit | seen | kept |", "|---|---|---|---|"]
        for check in checks(name, each):
            limit = f"at {'least' if check.at_least else 'most'} {check.limit:g}"
            lines.append(f"| {check.what} | {limit} | {check.seen.shown(2)} | {'yes' if check.kept else '**no**'} |")
    return "\n".join([*lines, "", "![goodput and p99 over offered load](serving.png)", ""])


def server_line(server: str, found: "Found") -> str:
    """A server's row."""
    visits = found.visits[server]
    ceilings = best_of(found.int8_ceilings if server == OURS_BY_DEFAULT else found.ceilings)
    is_peer = server not in (OURS, OURS_BY_DEFAULT)
    cells = [
        server,
        knees(found, server).shown(),
        ratios(knees(found, server), ceilings).shown(2),
        ratios(knees(found, OURS), knees(found, server)).shown(2) if is_peer else "",
        ratios(knees(found, OURS_BY_DEFAULT), knees(found, server)).shown(2) if is_peer else "",
        over_rounds(visits, lambda one: one.alone_p50_ms).shown(1),
        over_rounds(visits, lambda one: point(one, 0.8).p99_ms).shown(1),
        over_rounds(visits, lambda one: point(one, 2.0).goodput).shown(),
        over_rounds(visits, lambda one: one.ready_s).shown(1),
        over_rounds(visits, lambda one: one.resident_mib).shown(),
    ]
    return f"| {' | '.join(cells)} |"


def plot(found: Mapping[str, "Found"], path: Path) -> None:
    """Goodput and p99 over offered load, a column a workload."""
    import matplotlib  # noqa: PLC0415 - not while something is measured

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(2, len(found), figsize=(5.2 * len(found), 7.6), squeeze=False, sharex="col")
    for (upper, lower), (name, each) in zip(axes.T, found.items(), strict=True):
        for server, visits in each.visits.items():
            loads = [one for one in visits[0].offered if one.arrivals == "poisson"]
            colour, width = COLOURS.get(server), 2.2 if server in (OURS, OURS_BY_DEFAULT) else 1.3
            rates = [offered(visits, load, "rate").median for load in loads]
            figures: tuple[tuple[Axes, Figure], ...] = ((upper, "goodput"), (lower, "p99_ms"))
            for axis, figure_name in figures:
                seen = [offered(visits, load, figure_name) for load in loads]
                known = [[value for value in one.values if not math.isnan(value)] or [math.nan] for one in seen]
                medians = [one.median for one in seen]
                axis.plot(rates, medians, "o-", color=colour, linewidth=width, markersize=3.5, label=server)
                lowest, highest = [min(one) for one in known], [max(one) for one in known]
                axis.fill_between(rates, lowest, highest, color=colour, alpha=0.12, linewidth=0)
        upper.axhline(best_of(each.ceilings).median, color="black", linestyle="--", linewidth=1, label="ceiling, fp32")
        upper.axhline(
            best_of(each.int8_ceilings).median, color="black", linestyle=":", linewidth=1, label="ceiling, int8"
        )
        upper.set_title(name)
        upper.set_ylim(bottom=0)
        lower.set_yscale("log")
        lower.yaxis.set_major_formatter("{x:g}")
        lower.yaxis.set_minor_formatter("")
        lower.set_xlabel("offered load, requests/s")
    axes[0][0].set_ylabel("goodput, right answers in time /s")
    axes[1][0].set_ylabel("p99 from the intended time, ms")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3 * len(found), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_report(found: Mapping[str, "Found"], about: Mapping[str, object], out: Path | None) -> None:
    """Print the tables and write serving.json, serving.md and serving.png below ``out``."""
    text = markdown(found, about)
    print(text)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "serving.json").write_text(json.dumps(content(found, about), indent=2, allow_nan=False) + "\n")
    (out / "serving.md").write_text(text)
    plot(found, out / "serving.png")
