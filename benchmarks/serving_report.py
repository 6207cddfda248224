"""The report of benchmarks/serving.py: serving.json, a Markdown table and a plot.

Every median over rounds has its lowest and highest value. Ratios are taken within a round.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from benchmarks.servers import LTKD_FP32, LTKD_INT8, PEER_SERVERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.serving import OfferedLoad, ServerResult, WorkloadResults

PYTHON_SERVERS = ("FastAPI handler", "LitServe", "BentoML", "Ray Serve")
SAME_MODEL: dict[str, dict[str, float]] = {
    "12 MP": dict.fromkeys(PEER_SERVERS, 3.0),
    "photographs": dict.fromkeys(PEER_SERVERS, 0.95),  # level with the best: rounds differ by more than 5 %
    "resnet20": {**dict.fromkeys(PYTHON_SERVERS, 1.0), "mosec": 0.95},
    "resnet8": dict.fromkeys(PYTHON_SERVERS, 1.0),
}
"""Comparison (a): our goodput at the knee over that of a peer, at least."""
AS_DEPLOYED: dict[str, dict[str, float]] = {
    "12 MP": dict.fromkeys(PEER_SERVERS, 3.0),
    "photographs": dict.fromkeys(PEER_SERVERS, 1.5),
    "resnet20": {"mosec": 1.2},
    "resnet8": {"mosec": 0.9},
}
"""Comparison (b), with our default precision."""
OVERLOADS = (2.0, 10.0)
OVERLOAD_GOODPUT, REFUSED_P99_MS, READY_S, RESIDENT_MIB = 0.9, 50.0, 2.0, 300.0
COLOURS = {
    LTKD_FP32: "#0b6e4f",
    LTKD_INT8: "#57b894",
    "mosec": "#d1495b",
    "FastAPI handler": "#30638e",
    "LitServe": "#8d6bb8",
    "BentoML": "#edae49",
    "Ray Serve": "#7f7f7f",
}


Metric = Literal["rate", "goodput", "p50_ms", "p99_ms", "refused_p99_ms"]


@dataclass(frozen=True)
class Spread:
    """One value per round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the rounds that have a value."""
        known = [value for value in self.values if not math.isnan(value)]
        return statistics.median(known) if known else math.nan

    def as_record(self) -> dict[str, object]:
        """The values for the JSON file, with null for NaN."""
        rounded = [None if math.isnan(value) else round(value, 4) for value in self.values]
        known = [value for value in rounded if value is not None]
        if not known:
            return {"median": None, "lowest": None, "highest": None, "values": rounded}
        middle = round(statistics.median(known), 4)
        return {"median": middle, "lowest": min(known), "highest": max(known), "values": rounded}

    def formatted(self, digits: int = 0) -> str:
        """The values as text: median (lowest to highest)."""
        known = [value for value in self.values if not math.isnan(value)]
        if not known:
            return "-"
        if len(known) == 1:
            return f"{known[0]:,.{digits}f}"
        return f"{self.median:,.{digits}f} ({min(known):,.{digits}f} to {max(known):,.{digits}f})"


@dataclass(frozen=True)
class Check:
    """One target of the service, and whether this run reached it.

    Attributes:
        what: The target in words.
        seen: One value per round.
        limit: The median is compared with it.
        at_least: Whether the limit is a lower limit; otherwise it is an upper limit.
    """

    what: str
    seen: Spread
    limit: float
    at_least: bool

    @property
    def kept(self) -> bool:
        """Whether the median is within the limit; false if the value is missing."""
        return self.seen.median >= self.limit if self.at_least else self.seen.median <= self.limit


def over_rounds(server_results: Sequence["ServerResult"], value: Callable[["ServerResult"], float]) -> Spread:
    """One value per round."""
    return Spread(tuple(value(result) for result in server_results))


def ratios(numerators: Spread, denominators: Spread) -> Spread:
    """The ratio in each round that has both values."""
    pairs = zip(numerators.values, denominators.values, strict=False)
    return Spread(tuple(a / b if b else math.nan for a, b in pairs))


def knees(results: "WorkloadResults", server: str) -> Spread:
    """The goodput at the knee."""
    return over_rounds(results.server_results.get(server, []), lambda result: result.knee)


def load_at_share(result: "ServerResult", share: float) -> "OfferedLoad":
    """The result of one of the offered loads."""
    return next(load for load in result.offered if load.share == share)


def over_rounds_of_load(server_results: Sequence["ServerResult"], load: "OfferedLoad", metric: Metric) -> Spread:
    """A metric of one of the offered loads, per round."""
    return over_rounds(server_results, lambda result: getattr(load_at_share(result, load.share), metric))


def checks(name: str, results: "WorkloadResults") -> list[Check]:
    """The targets of the service for a workload, with the observed values."""
    server_results = results.server_results.get(LTKD_FP32, [])
    found_checks = [
        Check(f"{what}: over {peer}", ratios(knees(results, ours), knees(results, peer)), limit, at_least=True)
        for what, ours, limits in (
            ("(a) same model", LTKD_FP32, SAME_MODEL[name]),
            ("(b) by default", LTKD_INT8, AS_DEPLOYED[name]),
        )
        for peer, limit in limits.items()
        if peer in results.server_results
    ]
    for share in OVERLOADS:
        kept_goodput = over_rounds(
            server_results,
            lambda result, share=share: load_at_share(result, share).goodput / result.knee,  # type: ignore[misc]
        )
        what = f"goodput at {share:g} times the load of the knee over goodput at the knee"
        found_checks.append(Check(what, kept_goodput, OVERLOAD_GOODPUT, at_least=True))
        refused_ms = over_rounds(
            server_results,
            lambda result, share=share: load_at_share(result, share).refused_p99_ms,  # type: ignore[misc]
        )
        what = f"p99 of 429 at {share:g} times the load of the knee, ms"
        found_checks.append(Check(what, refused_ms, REFUSED_P99_MS, at_least=False))
    found_checks.append(
        Check(
            "seconds to the first answer",
            over_rounds(server_results, lambda result: result.ready_s),
            READY_S,
            at_least=False,
        )
    )
    resident = over_rounds(server_results, lambda result: result.resident_mib)
    found_checks.append(Check("resident MiB of all processes", resident, RESIDENT_MIB, at_least=False))
    wrong = sum(result.wrong for rounds in results.server_results.values() for result in rounds)
    found_checks.append(Check("wrong answers of all servers", Spread((float(wrong),)), 0.0, at_least=False))
    return found_checks


def server_record(server: str, results: "WorkloadResults") -> dict[str, object]:
    """The values of one server in one workload, for the JSON file."""
    server_results = results.server_results[server]
    facts: dict[str, Callable[[ServerResult], float]] = {
        "goodput_at_the_knee": lambda result: result.knee,
        "knee_connections": lambda result: result.knee_connections,
        "processor_ms_per_answer": lambda result: result.cpu_ms,
        "alone_p50_ms": lambda result: result.alone_p50_ms,
        "ready_s": lambda result: result.ready_s,
        "resident_mib": lambda result: result.resident_mib,
        "proportional_mib": lambda result: result.proportional_mib,
        "wrong": lambda result: result.wrong,
    }
    return {
        **{name: over_rounds(server_results, value).as_record() for name, value in facts.items()},
        "closed_loop_goodput": {
            connections: over_rounds(
                server_results,
                lambda result, c=connections: result.closed[c],  # type: ignore[misc]
            ).as_record()
            for connections in server_results[0].closed
        },
        "offered": [
            {
                "share_of_the_knee": load.share,
                "rate": over_rounds_of_load(server_results, load, "rate").as_record(),
                "goodput": over_rounds_of_load(server_results, load, "goodput").as_record(),
                "p50_ms": over_rounds_of_load(server_results, load, "p50_ms").as_record(),
                "p99_ms": over_rounds_of_load(server_results, load, "p99_ms").as_record(),
                "refused_p99_ms": over_rounds_of_load(server_results, load, "refused_p99_ms").as_record(),
                "ended": [load_at_share(result, load.share).ended for result in server_results],
            }
            for load in server_results[0].offered
        ],
    }


def content(results: Mapping[str, "WorkloadResults"], metadata: Mapping[str, object]) -> dict[str, object]:
    """The content of the JSON file."""
    return {
        **metadata,
        "workloads": {
            name: {
                "servers": {
                    server: server_record(server, workload_results) for server in workload_results.server_results
                },
                "left_out": workload_results.missing,
                "checks": [
                    {
                        "what": check.what,
                        "kept": check.kept,
                        "limit": f"at {'least' if check.at_least else 'most'} {check.limit:g}",
                        "seen": check.seen.as_record(),
                    }
                    for check in checks(name, workload_results)
                ],
            }
            for name, workload_results in results.items()
        },
    }


def markdown(results: Mapping[str, "WorkloadResults"], metadata: Mapping[str, object]) -> str:
    """The tables as Markdown."""
    lines = [
        "# The service compared with other servers",
        "",
        f"`{metadata['command']}`, commit {metadata['commit']}, {metadata['date']}, {metadata['hardware']}: one core "
        f"for the server, one for the load. Median of {metadata['rounds']} rounds, lowest to highest in brackets.",
    ]
    for name, workload_results in results.items():
        lines += ["", f"## {name}", ""]
        lines += [
            "| server | goodput at the knee /s | (a) ltkd / server | (b) ltkd, int8 / server "
            "| p50 of one connection ms | p99 at 80 % ms | goodput at 2 times /s | goodput at 10 times /s "
            "| p99 of 429 at 10 times ms | ready s | MiB |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [markdown_row(server, workload_results) for server in workload_results.server_results]
        lines += [
            f"| {server} | left out: {reason} | | | | | | | | | |"
            for server, reason in workload_results.missing.items()
        ]
        lines += ["", "| target | limit | observed | reached |", "|---|---|---|---|"]
        for check in checks(name, workload_results):
            limit = f"at {'least' if check.at_least else 'most'} {check.limit:g}"
            reached = "yes" if check.kept else "**no**"
            lines.append(f"| {check.what} | {limit} | {check.seen.formatted(2)} | {reached} |")
    return "\n".join([*lines, "", "![goodput and p99 over offered load](serving.png)", ""])


def markdown_row(server: str, results: "WorkloadResults") -> str:
    """The table row of a server."""
    server_results = results.server_results[server]
    is_peer = server not in (LTKD_FP32, LTKD_INT8)
    cells = [
        server,
        knees(results, server).formatted(),
        ratios(knees(results, LTKD_FP32), knees(results, server)).formatted(2) if is_peer else "",
        ratios(knees(results, LTKD_INT8), knees(results, server)).formatted(2) if is_peer else "",
        over_rounds(server_results, lambda result: result.alone_p50_ms).formatted(1),
        over_rounds(server_results, lambda result: load_at_share(result, 0.8).p99_ms).formatted(1),
        over_rounds(server_results, lambda result: load_at_share(result, 2.0).goodput).formatted(),
        over_rounds(server_results, lambda result: load_at_share(result, 10.0).goodput).formatted(),
        over_rounds(server_results, lambda result: load_at_share(result, 10.0).refused_p99_ms).formatted(1),
        over_rounds(server_results, lambda result: result.ready_s).formatted(1),
        over_rounds(server_results, lambda result: result.resident_mib).formatted(),
    ]
    return f"| {' | '.join(cells)} |"


def plot(results: Mapping[str, "WorkloadResults"], path: Path) -> None:
    """Plot goodput and p99 over the offered load, one column per workload."""
    import matplotlib  # noqa: PLC0415 - not imported during measurements

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(2, len(results), figsize=(5.2 * len(results), 7.6), squeeze=False, sharex="col")
    for (upper, lower), (name, workload_results) in zip(axes.T, results.items(), strict=True):
        for server, server_results in workload_results.server_results.items():
            loads = server_results[0].offered
            colour, width = COLOURS.get(server), 2.2 if server in (LTKD_FP32, LTKD_INT8) else 1.3
            rates = [over_rounds_of_load(server_results, load, "rate").median for load in loads]
            metrics: tuple[tuple[Axes, Metric], ...] = ((upper, "goodput"), (lower, "p99_ms"))
            for axis, metric in metrics:
                spreads = [over_rounds_of_load(server_results, load, metric) for load in loads]
                known = [
                    [value for value in spread.values if not math.isnan(value)] or [math.nan] for spread in spreads
                ]
                medians = [spread.median for spread in spreads]
                axis.plot(rates, medians, "o-", color=colour, linewidth=width, markersize=3.5, label=server)
                lowest, highest = [min(values) for values in known], [max(values) for values in known]
                axis.fill_between(rates, lowest, highest, color=colour, alpha=0.12, linewidth=0)
        upper.set_title(name)
        upper.set_ylim(bottom=0)
        lower.set_xscale("log")
        lower.set_yscale("log")
        lower.yaxis.set_major_formatter("{x:g}")
        lower.yaxis.set_minor_formatter("")
        lower.set_xlabel("offered load, requests/s")
    axes[0][0].set_ylabel("goodput, correct responses in time /s")
    axes[1][0].set_ylabel("p99 from the due time, ms")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3 * len(results), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_report(results: Mapping[str, "WorkloadResults"], metadata: Mapping[str, object], out: Path | None) -> None:
    """Print the tables and write serving.json, serving.md and serving.png to ``out``; None writes nothing."""
    text = markdown(results, metadata)
    print(text)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "serving.json").write_text(json.dumps(content(results, metadata), indent=2, allow_nan=False) + "\n")
    (out / "serving.md").write_text(text)
    plot(results, out / "serving.png")
