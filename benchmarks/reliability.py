"""What the service loses when things go wrong around it: every fault of docs/reliability.md, injected and counted.

    python -m benchmarks.reliability [--quick] [--soak-seconds 600] [--faults A,B]

Writes docs/benchmarks/reliability.json and the table in docs/reliability.md. Each fault gets a service of its own in
processes of its own, on one core, with the load on another. Every answer is checked; a request that is not in the table
as lost was answered, rightly and within the time limit unless the row says otherwise.
"""

import argparse
import http.client
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from benchmarks.load import (
    LEFT,
    Question,
    Result,
    Stage,
    closed_loop,
    http_request,
    one_by_one,
    open_loop,
    poisson,
    quantile_of,
    slow_clients,
)
from benchmarks.servers import ROOT, Running, on_core, ours_running
from benchmarks.serving import LOAD_CORE, Asked, about_the_run, listed, workloads_made

TABLE, OUT = ROOT / "docs" / "reliability.md", ROOT / "docs" / "benchmarks" / "reliability.json"
BEGIN, END = "<!-- table of benchmarks/reliability.py: begin -->", "<!-- end -->"
WORKLOAD, PHOTOGRAPHS = "resnet20", "photographs"
MOST_PER_S = 8000.0  # requests that the generator can send for sure


@dataclass(frozen=True)
class Plan:
    """How much is injected.

    Attributes:
        load_s: How long load lasts around a fault.
        share: Of what the service can do, the load around a fault.
        kills: Times that an engine process is killed.
        reloads: Times that another bundle is put in place.
        slow: Slow clients of each kind.
        malformed: Mutated images.
        soak_s: Of the soak.
    """

    load_s: float = 4.0
    share: float = 0.5
    kills: int = 10
    reloads: int = 20
    slow: int = 100
    malformed: int = 5000
    soak_s: float = 600.0


# a fifth of the load leaves room on a machine that has other things to do
QUICK = Plan(load_s=1.0, share=0.2, kills=2, reloads=2, slow=10, malformed=300, soak_s=3.0)


@dataclass(frozen=True)
class Row:
    """A fault and what came of it.

    Attributes:
        fault: What was injected.
        times: How often.
        requests: Asked meanwhile.
        lost: Of them, those that got no right answer although the promise says that they do.
        ended: How all of them ended.
        promise: What the service promises.
        seen: What was seen of it.
        kept: Whether that keeps the promise.
    """

    fault: str
    times: int
    requests: int
    lost: int
    ended: dict[str, int]
    promise: str
    seen: str
    kept: bool


@dataclass(frozen=True)
class Bench:
    """What the faults are tried on.

    Attributes:
        bundle: Served.
        images: Encoded images that it takes.
        media_type: Of them.
        slo_s: An answer that takes longer is late.
    """

    bundle: Path
    images: Sequence[bytes]
    media_type: str
    slo_s: float

    @contextmanager
    def service(self, bundle: Path | None = None, **settings: object) -> Iterator["Service"]:
        """A service that has answered every image alone."""
        variables = {f"LTKD_{name.upper()}": str(value) for name, value in settings.items()}
        with ours_running(bundle or self.bundle, self.images[0], self.media_type, variables) as running:
            seen = running.asked_alone(self.images, self.media_type)
            questions = [
                running.question(image, self.media_type, named) for image, named in zip(self.images, seen, strict=True)
            ]
            yield Service(running, questions, self.slo_s)


@dataclass(frozen=True)
class Service:
    """A running service and the questions to it."""

    running: Running
    questions: Sequence[Question]
    slo_s: float

    def best_goodput(self, seconds: float) -> float:
        """Goodput of a closed loop: what the loads are shares of."""
        return closed_loop(self.running.address, self.questions, connections=32, seconds=seconds).goodput()

    def load(self, rate: float, seconds: float, stop: threading.Event | None = None, leaving: float = 0.0) -> Result:
        """Independent clients for a while."""
        due_s = poisson(rate, seconds)
        return open_loop(self.running.address, self.questions, due_s, stop=stop, leaving=leaving, patience_s=10.0)

    def engines(self) -> list[int]:
        """The engine processes: the children of the process that was started."""
        return [pid for pid in self.running.processes() if _parent_of(pid) == self.running.pid]

    def replaced(self, before: Sequence[int]) -> bool:
        """Whether the first of some engine processes is gone, another is there, and the service is ready."""
        now = self.engines()
        return before[0] not in now and len(now) == len(before) and self.is_ready()

    def is_ready(self) -> bool:
        """What /readyz says; a service that is gone is not ready."""
        line = http.client.HTTPConnection(*self.running.address, timeout=5)
        try:
            line.request("GET", "/readyz")
            return line.getresponse().status == 200
        except OSError:
            return False
        finally:
            line.close()


def _parent_of(pid: int) -> int | None:
    try:
        found = re.search(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return int(found[1]) if found else None


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Do something beside the block; the block ends when both have, and fails if either does."""
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            act()
        except BaseException as reason:
            failed.append(reason)

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failed:
        raise failed[0]


def within(seconds: float, happened: Callable[[], bool]) -> bool:
    """Whether something happens in time."""
    limit = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > limit:
            return False
        time.sleep(0.01)
    return True


def overload(bench: Bench, plan: Plan, factor: int, what: str) -> Row:
    """A burst of several times what the service can do, then half of it."""
    with bench.service(max_queue_seconds=bench.slo_s / 2) as service:
        best = service.best_goodput(plan.load_s)
        burst = poisson(min(factor * best, MOST_PER_S), plan.load_s, seed=factor)
        after = [plan.load_s + due for due in poisson(best / 2, plan.load_s, seed=1)]
        result = open_loop(service.running.address, service.questions, burst + after, patience_s=10.0)
    of_burst = [one for one in result.outcomes if one.due_s < plan.load_s]
    answered = Result(plan.load_s, of_burst).goodput(bench.slo_s)
    rejected_ms = 1000 * quantile_of([one.latency_s for one in of_burst if one.status == 429], 0.99)
    recovery_s = max(
        [0.0, *(one.due_s - plan.load_s for one in result.outcomes if not one.right or one.latency_s > bench.slo_s)]
    )
    lost = [one for one in result.failed() if one.status != 429]
    return Row(
        fault=f"{factor} times as many requests as it can answer, {what}",
        times=1,
        requests=len(result.outcomes),
        lost=len(lost),
        ended=result.statuses,
        promise="goodput within 10 % of its best; 429 with Retry-After in milliseconds; recovered in 2 s; nothing else",
        seen=(
            f"{len(burst) / plan.load_s:,.0f} requests/s offered, goodput {answered / best:.2f} of its best "
            f"({best:,.0f}/s), 99 % of the 429 within {rejected_ms:.1f} ms, recovered after {recovery_s:.2f} s"
        ),
        kept=answered >= 0.9 * best and not lost and not rejected_ms > 100 and recovery_s < 2.0,
    )


def disconnect_storm(bench: Bench, plan: Plan) -> Row:
    """Three in ten clients leave before their answer."""
    with bench.service() as service:
        best = service.best_goodput(plan.load_s)
        result = service.load(plan.share * best, plan.load_s, leaving=0.3)
        after = one_by_one(service.running.address, service.questions)
    left = sum(1 for one in result.outcomes if one.status == LEFT)
    lost = result.failed() + after.failed()
    return Row(
        fault=f"30 % of the clients leave before the answer, at {plan.share:.0%} of the load that it can answer",
        times=left,
        requests=len(result.outcomes),
        lost=len(lost),
        ended=result.statuses,
        promise="everybody who stays is answered",
        seen=f"p99 of those who stay {1000 * result.latency_s(0.99):.1f} ms",
        kept=not lost,
    )


def slow(bench: Bench, plan: Plan, stage: Stage) -> Row:
    """Clients that never come to an end, beside others."""
    with bench.service(header_seconds=1, body_seconds=1) as service:
        best = service.best_goodput(plan.load_s)
        request = service.questions[0].request
        with slow_clients(service.running.address, request, plan.slow, stage) as ended:
            result = service.load(plan.share * best, plan.load_s)
            all_ended = within(10.0, lambda: len(ended) == plan.slow)
    lost = result.failed()
    return Row(
        fault=f"clients that send their {stage} byte by byte, beside {plan.share:.0%} of the load",
        times=plan.slow,
        requests=len(result.outcomes),
        lost=len(lost),
        ended=result.statuses,
        promise="each is cut off after the limit (1 s here), and nobody else notices",
        seen=f"cut off: {dict(Counter(ended))}, p99 of the others {1000 * result.latency_s(0.99):.1f} ms",
        kept=all_ended and not lost,
    )


def killed(bench: Bench, plan: Plan, processes: int) -> Row:
    """An engine process gets SIGKILL, again and again, under load; readiness tells when the next one may be killed."""
    with bench.service(processes=processes) as service:
        best = service.best_goodput(plan.load_s)
        over = threading.Event()
        away_s: list[float] = []
        killed_at: list[float] = []

        def kill_in_turn() -> None:
            for _ in range(plan.kills):
                time.sleep(plan.load_s / 4)
                before = service.engines()
                killed_at.append(time.perf_counter())
                os.kill(before[0], signal.SIGKILL)
                if not within(30.0, lambda old=before: service.replaced(old)):  # type: ignore[misc]
                    break
                away_s.append(time.perf_counter() - killed_at[-1])
                if processes > 1:  # the service was ready all along; let the new one become so before another goes
                    time.sleep(2 * service.running.ready_s)
            time.sleep(plan.load_s / 4)
            over.set()

        with meanwhile(kill_in_turn):
            result = service.load(plan.share * best, 35.0 * plan.kills, stop=over)
    moments = [moment - result.started for moment in killed_at]
    answered_503 = [one for one in result.outcomes if one.status == 503]
    # due before the kill, or so soon after it that a busy machine had not told the front yet
    held = sum(1 for one in answered_503 if any(one.due_s <= at + 0.1 and one.done_s >= at for at in moments))
    refused = len(answered_503) - held
    lost = len(result.failed()) - (held if processes > 1 else len(answered_503))
    return Row(
        fault=f"an engine process of {processes} is killed (SIGKILL) under {plan.share:.0%} of the load",
        times=plan.kills,
        requests=len(result.outcomes),
        lost=lost,
        ended=result.statuses,
        promise=(
            "only what it held is lost, answered 503 at once"
            if processes > 1
            else "what it held, and what comes until another is ready, is answered 503 at once"
        ),
        seen=(
            f"replaced {len(away_s)} times, at the longest after {max(away_s, default=math.nan):.2f} s; {held} "
            f"requests were held, {refused} came meanwhile; the slowest 503 "
            f"{1000 * max((one.latency_s for one in answered_503), default=math.nan):.1f} ms after it was due"
        ),
        kept=not lost and len(away_s) == plan.kills,
    )


def stalled(bench: Bench, plan: Plan) -> Row:
    """The engine process stops dead (SIGSTOP), as a hung driver would make it."""
    with bench.service(stall_seconds=1, timeout_seconds=3) as service:
        best = service.best_goodput(plan.load_s)
        over = threading.Event()
        away_s: list[float] = []

        def stop_it() -> None:
            time.sleep(plan.load_s / 4)
            stuck = service.engines()[0]
            os.kill(stuck, signal.SIGSTOP)
            begin = time.monotonic()
            if within(20.0, lambda: stuck not in service.engines() and service.is_ready()):
                away_s.append(time.monotonic() - begin)
            time.sleep(plan.load_s / 4)
            over.set()

        with meanwhile(stop_it):
            result = service.load(plan.share * best, 30.0, stop=over)
    lost = [one for one in result.failed() if one.status not in (429, 503, 504)]
    return Row(
        fault=f"the session stalls: the engine process is stopped (SIGSTOP) under {plan.share:.0%} of the load",
        times=1,
        requests=len(result.outcomes),
        lost=len(lost),
        ended=result.statuses,
        promise="it is replaced after the limit (1 s here); what waited is answered 503 or 504, nothing hangs",
        seen=f"another one answered after {away_s[0]:.2f} s" if away_s else "it was not replaced within 20 s",
        kept=not lost and bool(away_s),
    )


def drained(bench: Bench, plan: Plan) -> Row:
    """SIGTERM under load, with a load balancer that looks at /readyz every 20 ms."""
    with bench.service(delay_seconds=1) as service:
        best = service.best_goodput(plan.load_s)
        not_ready = threading.Event()
        gone_s: list[float] = []

        def terminate() -> None:
            time.sleep(plan.load_s / 2)
            os.kill(service.running.pid, signal.SIGTERM)
            begin = time.monotonic()
            within(10.0, lambda: not service.is_ready())
            not_ready.set()
            if within(15.0, lambda: _parent_of(service.running.pid) is None or _is_zombie(service.running.pid)):
                gone_s.append(time.monotonic() - begin)

        with meanwhile(terminate):
            result = service.load(plan.share * best, 30.0, stop=not_ready)
    lost = result.failed()
    return Row(
        fault=f"SIGTERM under {plan.share:.0%} of the load; clients look elsewhere once /readyz says so",
        times=1,
        requests=len(result.outcomes),
        lost=len(lost),
        ended=result.statuses,
        promise="every request is answered, then the process ends",
        seen=f"ended {gone_s[0]:.2f} s after the signal (1 s of it the delay)" if gone_s else "it did not end in 15 s",
        kept=not lost and bool(gone_s),
    )


def _is_zombie(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


@contextmanager
def two_bundles(bundle: Path) -> Iterator[tuple[Path, list[Path]]]:
    """A link that points at one of two bundles that differ in their manifests alone."""
    with tempfile.TemporaryDirectory() as name:
        both = []
        for number in (1, 2):
            copy = Path(name) / str(number)
            shutil.copytree(bundle, copy)
            manifest = copy / "manifest.json"
            content = json.loads(manifest.read_bytes())
            content["certified_on"] = f"{content['certified_on']}, copy {number}"
            manifest.write_text(json.dumps(content))
            both.append(copy)
        link = Path(name) / "current"
        link.symlink_to(both[0])
        yield link, both


def point_at(link: Path, bundle: Path) -> None:
    """Exchange what a link points at, in one step."""
    beside = link.with_name("next")
    beside.symlink_to(bundle)
    beside.replace(link)


def reloaded(bench: Bench, plan: Plan) -> Row:
    """Another bundle is put in place, and SIGHUP sent, again and again."""
    with two_bundles(bench.bundle) as (link, both), bench.service(bundle=link) as service:
        best = service.best_goodput(plan.load_s)
        over = threading.Event()
        taken_s: list[float] = []

        def reload_in_turn() -> None:
            for number in range(plan.reloads):
                before = service.engines()
                point_at(link, both[(number + 1) % 2])
                begin = time.monotonic()
                os.kill(service.running.pid, signal.SIGHUP)
                if not within(30.0, lambda old=before: not set(old) & set(service.engines())):  # type: ignore[misc]
                    break
                taken_s.append(time.monotonic() - begin)
            over.set()

        with meanwhile(reload_in_turn):
            result = service.load(plan.share * best, 31.0 * plan.reloads, stop=over)
    lost = result.failed()
    return Row(
        fault=f"another bundle and SIGHUP under {plan.share:.0%} of the load",
        times=plan.reloads,
        requests=len(result.outcomes),
        lost=len(lost),
        ended=result.statuses,
        promise="no request fails",
        seen=(
            f"{len(taken_s)} reloads, the slowest took {max(taken_s, default=math.nan):.2f} s; "
            f"p99 meanwhile {1000 * result.latency_s(0.99):.1f} ms"
        ),
        kept=not lost and len(taken_s) == plan.reloads,
    )


def corrupted(bench: Bench, plan: Plan) -> Row:
    """The bundle that a reload finds has one bit flipped in its model."""
    with two_bundles(bench.bundle) as (link, both), bench.service(bundle=link) as service:
        best = service.best_goodput(plan.load_s)
        model = both[1] / "model.onnx"
        content = bytearray(model.read_bytes())
        content[len(content) // 2] ^= 1
        model.write_bytes(content)
        before = service.engines()

        def offer_it() -> None:
            time.sleep(plan.load_s / 4)
            point_at(link, both[1])
            os.kill(service.running.pid, signal.SIGHUP)

        with meanwhile(offer_it):
            result = service.load(plan.share * best, plan.load_s)
        stayed, ready = service.engines() == before, service.is_ready()
    lost = result.failed()
    return Row(
        fault=f"a reload finds a bundle with one bit flipped, under {plan.share:.0%} of the load",
        times=1,
        requests=len(result.outcomes),
        lost=len(lost),
        ended=result.statuses,
        promise="the old one keeps answering",
        seen=f"the {'same' if stayed else 'another'} engine process answers, /readyz says {'ready' if ready else 'no'}",
        kept=not lost and stayed and ready,
    )


def malformed(bench: Bench, plan: Plan) -> Row:
    """Real images with bits flipped, bytes cut off, exchanged and joined."""
    with bench.service() as service:
        chance = random.Random(5)
        sources = encodings(bench.images[:8])
        path = service.running.path
        questions = [
            Question(http_request(path, mutated(chance, sources), "image/jpeg"), bool) for _ in range(plan.malformed)
        ]
        result = open_loop(
            service.running.address, questions, [0.0] * len(questions), lines=8, patience_s=60 + 0.1 * plan.malformed
        )
        after = one_by_one(service.running.address, service.questions)
    lost = [one for one in result.failed() if not 400 <= one.status < 500] + after.failed()
    return Row(
        fault="malformed images: mutations of real JPEG, PNG and WebP files",
        times=plan.malformed,
        requests=len(result.outcomes),
        lost=len(lost),
        ended=result.statuses,
        promise="each is answered with 4xx, or with 200 where the decoder finds nothing wrong; never 5xx, never a hang",
        seen=f"{sum(1 for one in result.outcomes if one.status == 200)} could still be decoded",
        kept=not lost,
    )


def encodings(images: Sequence[bytes]) -> list[bytes]:
    """The same pictures as JPEG, PNG and WebP."""
    found = []
    for content in images:
        with Image.open(io.BytesIO(content)) as image:
            for kind in ("JPEG", "PNG", "WEBP"):
                file = io.BytesIO()
                image.convert("RGB").save(file, kind)
                found.append(file.getvalue())
    return found


def mutated(chance: random.Random, sources: Sequence[bytes]) -> bytes:
    """A real image with something wrong with it."""
    content = bytearray(chance.choice(sources))
    kind = chance.randrange(5)
    if kind == 0:  # cut off
        return bytes(content[: chance.randrange(1, len(content))])
    if kind == 1:  # joined to the rest of another
        other = chance.choice(sources)
        return bytes(content[: chance.randrange(4, len(content))] + other[chance.randrange(len(other)) :])
    if kind == 2:  # the header alone is hit
        for _ in range(chance.randrange(1, 9)):
            content[chance.randrange(min(64, len(content)))] = chance.randrange(256)
        return bytes(content)
    if kind == 3:  # a stretch of other bytes
        first = chance.randrange(len(content))
        content[first : first + chance.randrange(1, 64)] = chance.randbytes(chance.randrange(64))
        return bytes(content)
    for _ in range(chance.randrange(1, 33)):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(content)


def soaked(bench: Bench, plan: Plan) -> Row:
    """Everyday traffic for long: most of it in order, some clients that leave, some images that are none."""
    with bench.service() as service:
        best = service.best_goodput(min(plan.load_s, plan.soak_s))
        chance, ended = random.Random(6), Counter[str]()
        sources = encodings(bench.images[:4])
        broken = [
            Question(http_request(service.running.path, mutated(chance, sources), "image/jpeg"), bool)
            for _ in range(max(1, len(service.questions) // 20))
        ]
        resident_mib: list[float] = []
        lost = 0
        over = time.monotonic() + plan.soak_s
        while time.monotonic() < over:
            seconds = min(10.0, plan.soak_s / 10)
            due_s = poisson(plan.share * best, seconds, seed=len(resident_mib))
            questions = [*service.questions, *broken]
            result = open_loop(service.running.address, questions, due_s, leaving=0.05, patience_s=10.0)
            ended.update(result.statuses)
            lost += sum(1 for one in result.failed() if one.status not in (400, 415, 422))
            resident_mib.append(service.running.resident_mib())
    fifth = max(1, len(resident_mib) // 5)
    early, late = (
        quantile_of(part, 0.5) for part in (resident_mib[fifth : 2 * fifth] or resident_mib, resident_mib[-fifth:])
    )
    return Row(
        fault=f"a soak at {plan.share:.0%} of the load, 5 % of the clients leave, 5 % of the images are malformed",
        times=round(plan.soak_s),
        requests=sum(ended.values()),
        lost=lost,
        ended=dict(ended),
        promise="nothing is lost and memory stays flat (within 2 %)",
        seen=f"{early:.1f} MiB in the second fifth, {late:.1f} MiB in the last",
        kept=not lost and late <= 1.02 * early,
    )


FAULTS: dict[str, Callable[[Bench, Plan], Row]] = {
    "overload-2x": lambda bench, plan: overload(bench, plan, 2, "small images"),
    "overload-10x": lambda bench, plan: overload(bench, plan, 10, "small images"),
    "disconnects": disconnect_storm,
    "slow-header": lambda bench, plan: slow(bench, plan, "header"),
    "slow-body": lambda bench, plan: slow(bench, plan, "body"),
    "killed": lambda bench, plan: killed(bench, plan, processes=1),
    "killed-of-two": lambda bench, plan: killed(bench, plan, processes=2),
    "stalled": stalled,
    "drain": drained,
    "reload": reloaded,
    "corrupted": corrupted,
    "malformed": malformed,
    "soak": soaked,
}
ON_PHOTOGRAPHS: dict[str, Callable[[Bench, Plan], Row]] = {
    "overload-2x": lambda bench, plan: overload(bench, plan, 2, "photographs"),
    "overload-10x": lambda bench, plan: overload(bench, plan, 10, "photographs"),
}


def inject(benches: Mapping[str, Bench], plan: Plan, faults: Sequence[str], say: Callable[[str], None]) -> list[Row]:
    """Every fault in turn, some of them on photographs too."""
    rows = []
    for name in faults:
        for bench, known in ((WORKLOAD, FAULTS), (PHOTOGRAPHS, ON_PHOTOGRAPHS)):
            if name in known and bench in benches:
                begin = time.monotonic()
                row = known[name](benches[bench], plan)
                rows.append(row)
                verdict = "kept" if row.kept else "NOT KEPT"
                say(f"{name}, {bench}: {verdict}; {row.lost} of {row.requests} lost; {row.seen}; {row.ended}; "
                    f"{time.monotonic() - begin:.0f} s")  # fmt: skip
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows for docs/reliability.md."""
    lines = ["| injected | times | requests | lost | promise | seen | kept |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = (row.fault, f"{row.times:,}", f"{row.requests:,}", f"{row.lost:,}", row.promise, row.seen)
        lines.append(f"| {' | '.join(cells)} | {'yes' if row.kept else '**no**'} |")
    return "\n".join(lines)


def put_table(path: Path, text: str) -> None:
    """Put a table between its markers."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{path} has lost its markers"
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def bench_of(asked: Asked) -> Bench:
    """The float32 bundle of a workload, which every machine runs alike."""
    return Bench(asked.folder / "same", asked.images, asked.workload.media_type, asked.workload.slo_s)


def main() -> int:
    """Inject everything and report; the exit code is 1 if a promise was not kept."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a little of everything")
    parser.add_argument("--soak-seconds", type=float, help="600 by default, 3 with --quick")
    parser.add_argument("--faults", type=listed(FAULTS), default=list(FAULTS), help=", ".join(FAULTS))
    parser.add_argument("--write", action="store_true", help="write the files even after --quick or --faults")
    given = parser.parse_args()
    plan = QUICK if given.quick else Plan()
    if given.soak_seconds:
        plan = Plan(**{**asdict(plan), "soak_s": given.soak_seconds})
    with tempfile.TemporaryDirectory() as name:
        print("making images and bundles", flush=True)
        asked = workloads_made([WORKLOAD, PHOTOGRAPHS], Path(name))
        with on_core(LOAD_CORE):
            benches = {workload: bench_of(each) for workload, each in asked.items()}
            rows = inject(benches, plan, given.faults, say=lambda what: print(what, flush=True))
    print(table(rows))
    if given.write or not (given.quick or given.faults != list(FAULTS)):
        about = about_the_run(" ".join(["python -m benchmarks.reliability", *sys.argv[1:]]), 1, {})
        content = {**about, "plan": asdict(plan), "rows": [asdict(row) for row in rows]}
        OUT.parent.mkdir(parents=True, exist_ok=True)
        OUT.write_text(json.dumps(content, indent=2) + "\n")
        put_table(
            TABLE,
            f"`{about['command']}`, commit {about['commit']}, {about['date']}, {about['hardware']}.\n\n{table(rows)}",
        )
    return 0 if all(row.kept for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
