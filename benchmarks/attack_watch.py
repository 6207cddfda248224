"""What is observed while the service is attacked, and the rules by which it is judged.

A thread samples the probes and the memory of the service once a second. The rules are functions of what was observed,
so that the tests can show that each of them can fail.
"""

import http.client
import math
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from statistics import median

from benchmarks.hostile_clients import AttackResult
from benchmarks.load import Address, Result, quantile_of
from benchmarks.servers import RunningServer

PROBE_TIMEOUT_S = 5.0
MAX_LIVEZ_S = 1.0
GROWTH, GROWTH_MIB = 0.10, 16.0  # between the second and the last quarter of the attacks together
MAX_ABOVE_START_MIB = 640.0  # 128 MiB of bodies, the pixels of several images of 25 MP, and what malloc keeps of them


@dataclass(frozen=True)
class Sample:
    """The state of the service at one time.

    Attributes:
        at_s: Seconds since the start of the watch.
        livez_s: Seconds until ``/livez`` was answered.
        livez: Status of ``/livez``; 0 without an answer.
        readyz: Status of ``/readyz``; 0 without an answer.
        resident_mib: Memory of all processes; shared pages are counted in each process.
    """

    at_s: float
    livez_s: float
    livez: int
    readyz: int
    resident_mib: float


class Watch:
    """Samples the service once a second, in a thread, until the block ends.

    Attributes:
        samples: The samples so far.
        has_exited: Set when the server process has exited.
    """

    def __init__(self, running: RunningServer) -> None:
        self.samples: list[Sample] = []
        self.has_exited = threading.Event()
        self._running = running
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._begin = time.monotonic()

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take no more samples."""
        self._stopped.set()
        self._thread.join()

    def since(self, begin_s: float) -> list[Sample]:
        """The samples since a time; see ``now``."""
        return [sample for sample in self.samples if sample.at_s >= begin_s]

    def now(self) -> float:
        """Seconds since the start of the watch."""
        return time.monotonic() - self._begin

    def _watch(self) -> None:
        while not self._stopped.wait(max(0.0, len(self.samples) + 1 - self.now())):
            at_s = self.now()
            if self._running.has_exited():
                self.has_exited.set()
            livez, livez_s = probe(self._running.address, "/livez")
            readyz, _ = probe(self._running.address, "/readyz")
            self.samples.append(Sample(at_s, livez_s, livez, readyz, self._running.resident_mib()))


def probe(address: Address, path: str) -> tuple[int, float]:
    """The status of a GET request on a new connection, 0 without an answer, and its duration in seconds."""
    begin, status = time.perf_counter(), 0
    try:
        with closing(http.client.HTTPConnection(*address, timeout=PROBE_TIMEOUT_S)) as connection:
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            status = response.status
    except (OSError, http.client.HTTPException):
        pass
    return status, time.perf_counter() - begin


@dataclass(frozen=True)
class Phase:
    """Ordinary clients while one attack ran alone, or all of them, or none.

    Attributes:
        attack: Name of the attack.
        seconds: Duration.
        statuses: Ordinary requests by status.
        errors: Ordinary requests with a status of 500 or more.
        wrong: Ordinary requests with an incorrect answer.
        lost: Ordinary requests with neither a correct answer nor 429, among them the errors and the wrong ones.
        p99_ms: The 99th percentile of the latency of ordinary answers, from the due time.
        livez_ms: Longest time until ``/livez`` was answered.
        engines_replaced: Whether other engine processes ran at the end than at the start of the phase.
        attacks: What the attacks sent and got.
    """

    attack: str
    seconds: float
    statuses: dict[str, int]
    errors: int
    wrong: int
    lost: int
    p99_ms: float
    livez_ms: float
    engines_replaced: bool = False
    attacks: Mapping[str, AttackResult] = field(default_factory=dict)

    @classmethod
    def of(cls, attack: str, result: Result, samples: Sequence[Sample], *, engines_replaced: bool,
        attacks: Mapping[str, AttackResult]) -> "Phase":  # fmt: skip
        """Count the outcomes of the ordinary clients."""
        return cls(
            attack=attack,
            seconds=result.seconds,
            statuses=result.statuses,
            errors=sum(1 for one in result.outcomes if one.status >= 500),
            wrong=result.wrong,
            lost=sum(1 for one in result.failed() if one.status != 429),
            p99_ms=1000 * result.latency_s(0.99),
            livez_ms=1000 * max((sample.livez_s for sample in samples), default=0.0),
            engines_replaced=engines_replaced,
            attacks=attacks,
        )

    @property
    def requests(self) -> int:
        """Number of ordinary requests."""
        return sum(self.statuses.values())

    @property
    def refused(self) -> float:
        """Share of the ordinary requests that got 429."""
        return self.statuses.get("429", 0) / max(1, self.requests)


@dataclass(frozen=True)
class Check:
    """One promise, what was seen, and whether it was kept."""

    promise: str
    seen: str
    kept: bool


@dataclass(frozen=True)
class Observed:
    """All that was observed.

    Attributes:
        phases: Before the attacks, each attack alone, and all of them together, in this order.
        samples: All samples until the shutdown.
        mixed_samples: Those while all attacks ran together.
        same_server: Whether the server process was still running before the shutdown.
        same_engines: Whether the engine processes before the shutdown were those of the start.
        start_mib: Memory before the attacks.
        tracebacks: Number of tracebacks in the output of the service, by their last line.
        shutdown_s: Seconds from SIGTERM to the end of the process, during the attacks; None if it did not end.
        shutdown_limit_s: Largest allowed value of it.
    """

    phases: Sequence[Phase]
    samples: Sequence[Sample]
    mixed_samples: Sequence[Sample]
    same_server: bool
    same_engines: bool
    start_mib: float
    tracebacks: Mapping[str, int]
    shutdown_s: float | None
    shutdown_limit_s: float


def checks(observed: Observed) -> list[Check]:
    """All promises."""
    return [
        _check_processes(observed),
        _check_ordinary(observed.phases),
        _check_attacks(observed.phases),
        *_check_probes(observed.samples),
        *_check_memory(observed),
        Check(
            "the output has no traceback",
            "; ".join(f"{line} ({count} times)" for line, count in observed.tracebacks.items()) or "none",
            kept=not observed.tracebacks,
        ),
        Check(
            f"SIGTERM during the attacks ends the process within {observed.shutdown_limit_s:g} s",
            "it did not end" if observed.shutdown_s is None else f"after {observed.shutdown_s:.1f} s",
            kept=observed.shutdown_s is not None and observed.shutdown_s <= observed.shutdown_limit_s,
        ),
    ]


def _check_processes(observed: Observed) -> Check:
    replaced = [phase.attack for phase in observed.phases if phase.engines_replaced]
    seen = f"engine processes replaced during: {', '.join(replaced)}" if replaced else "the same processes"
    if not observed.same_server:
        seen = "the server process has exited"
    return Check(
        "the processes at the end are those of the start",
        seen,
        kept=observed.same_server and observed.same_engines and not replaced,
    )


def _check_ordinary(phases: Sequence[Phase]) -> Check:
    affected = [
        f"{phase.attack} {phase.lost} of {phase.requests} ({phase.errors} with 5xx, {phase.wrong} wrong)"
        for phase in phases
        if phase.lost or not phase.requests
    ]
    refused = sum(phase.statuses.get("429", 0) for phase in phases) / max(1, sum(phase.requests for phase in phases))
    return Check(
        "ordinary clients get correct answers, or 429; no 5xx, nothing lost",
        f"lost: {'; '.join(affected) or 'none'}; {refused:.2%} got 429",
        kept=not affected,
    )


def _check_attacks(phases: Sequence[Phase]) -> Check:
    found: dict[str, int] = {}
    for phase in phases:
        for name, result in phase.attacks.items():
            for what, count in result.violations.items():
                found[f"{name}, {what}"] = found.get(f"{name}, {what}", 0) + count
    seen = "; ".join(f"{what} ({count} times)" for what, count in sorted(found.items())) or "nothing else"
    return Check("each attack gets what is allowed for it: mostly 4xx or a closed connection", seen, kept=not found)


def _check_probes(samples: Sequence[Sample]) -> list[Check]:
    times_s = [sample.livez_s for sample in samples]
    failed = {path: sum(1 for sample in samples if getattr(sample, path) != 200) for path in ("livez", "readyz")}
    p99_ms, longest_ms = 1000 * quantile_of(times_s, 0.99), 1000 * max(times_s, default=math.inf)
    return [
        *(
            Check(
                f"/{path} is answered with 200, always",
                f"{len(samples)} times, {count} without 200",
                kept=bool(samples) and not count,
            )
            for path, count in failed.items()
        ),
        Check(
            f"/livez is answered within {MAX_LIVEZ_S:g} s, always",
            f"p99 {p99_ms:.0f} ms, longest {longest_ms:.0f} ms",
            kept=longest_ms <= 1000 * MAX_LIVEZ_S,
        ),
    ]


def _check_memory(observed: Observed) -> list[Check]:
    memory = [sample.resident_mib for sample in observed.mixed_samples]
    quarter = len(memory) // 4
    peak = max((sample.resident_mib for sample in observed.samples), default=0.0)
    limit = observed.start_mib + MAX_ABOVE_START_MIB
    bounded = Check(
        f"resident memory stays within {MAX_ABOVE_START_MIB:g} MiB of the start",
        f"{observed.start_mib:.0f} MiB at the start, at most {peak:.0f} MiB",
        kept=peak <= limit,
    )
    if not quarter:
        return [Check("resident memory is flat", f"{len(memory)} samples are too few", kept=False), bounded]
    early, late = median(memory[quarter : 2 * quarter]), median(memory[-quarter:])
    flat = Check(
        "resident memory is flat: the median of the last quarter of the attacks together is at most "
        f"{GROWTH:.0%} + {GROWTH_MIB:g} MiB above that of the second",
        f"{early:.0f} MiB in the second, {late:.0f} MiB in the last",
        kept=late <= (1 + GROWTH) * early + GROWTH_MIB,
    )
    return [flat, bounded]
