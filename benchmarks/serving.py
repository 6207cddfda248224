"""The service against its ceiling and against its peers: one core for the server, one for the load.

    python -m benchmarks.serving [--quick] [--repeats N] [--workloads A,B] [--peers A,B] [--cache FOLDER]

Writes docs/benchmarks/serving.json, serving.md and serving.png. Every answer of every server is checked.

Of each workload (benchmarks/workloads.py) a round measures our service, just before it the ceiling (decode and run in a
loop, no HTTP: its speed, and how late it is with arrivals at 80 % of that), and each peer (benchmarks/servers.py), one
after the other; the next round begins with another server. A visit to a server is: start, until the first right answer;
every image alone; a closed loop with more and more connections, whose *knee* is the fewest that give 97 % of the best
goodput, and that one again, because the highest of several noisy figures is too high; then Poisson arrivals at 50 to
200 % of that goodput, for as long as each, with latency from the intended time. Goodput is right answers within the
workload's time limit.

Ratios are taken within a round. (a) is the same model file for everybody; (b) is our service as it comes, which takes
the int8 model where the bundle has one, against the peers as before.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime as ort

from benchmarks.circumstances import circumstances
from benchmarks.load import Question, closed_loop, one_by_one, open_loop, poisson, uniform
from benchmarks.servers import (
    OURS,
    OURS_BY_DEFAULT,
    PEER_SERVERS,
    ROOT,
    NotStartedError,
    Running,
    on_core,
    ours_running,
    peer_running,
)
from benchmarks.serving_report import write_report
from benchmarks.shapes import WORKLOADS, Workload
from ltkd.contract.image_decoding import decode_image

OUT = ROOT / "docs" / "benchmarks"
SHARES = (0.5, 0.8, 1.0, 1.2, 2.0)
SERVER_CORE, LOAD_CORE = 0, 1
FP32, INT8 = "same/model.onnx", "default/model.int8.onnx"


@dataclass(frozen=True)
class Plan:
    """How long everything is done in one visit.

    Attributes:
        connections: Of the closed loops.
        closed_s: Each of them.
        open_s: Each offered load.
        ceiling_s: Each batch size of the ceiling.
    """

    connections: tuple[int, ...]
    closed_s: float
    open_s: float
    ceiling_s: float


# the slowest answers some 20 requests a second: what is done with it takes longer and needs fewer clients at a time
PLANS = {
    "resnet8": Plan((1, 8, 16, 32, 64), closed_s=0.6, open_s=1.0, ceiling_s=0.4),
    "resnet20": Plan((1, 8, 16, 32, 64), closed_s=0.6, open_s=1.0, ceiling_s=0.4),
    "photographs": Plan((1, 4, 8), closed_s=2.5, open_s=2.0, ceiling_s=1.2),
}
QUICK = Plan((1, 4), closed_s=0.3, open_s=0.3, ceiling_s=0.05)


@dataclass(frozen=True)
class Offered:
    """What came of one offered load.

    Attributes:
        share: Of the goodput at the knee.
        arrivals: ``poisson``, or ``even`` at equal distances.
        rate: Requests a second.
        goodput: Right answers a second within the time limit.
        p50_ms: Of the answers with 200, from the intended time.
        p99_ms: Likewise.
        ended: How requests ended.
        wrong: Answers with 200 that were not right.
    """

    share: float
    arrivals: str
    rate: float
    goodput: float
    p50_ms: float
    p99_ms: float
    ended: dict[str, int]
    wrong: int


@dataclass(frozen=True)
class Visit:
    """Everything that was seen of one server in one round.

    Attributes:
        ready_s: From the start of its process to its first right answer.
        resident_mib: Of all its processes after the closed loops; pages that they share count in each.
        proportional_mib: The same with shared pages counted once.
        alone_p50_ms: Latency when nobody else asks.
        closed: Goodput by number of connections.
        knee_connections: The fewest that give 97 % of the best goodput.
        knee: Goodput there, measured afresh.
        processor_ms: Processor time of all its processes for one answer, there.
        offered: What came of each offered load.
        wrong: Wrong answers, all in all.
    """

    ready_s: float
    resident_mib: float
    proportional_mib: float
    alone_p50_ms: float
    closed: dict[int, float]
    knee_connections: int
    knee: float
    processor_ms: float
    offered: list[Offered]
    wrong: int


@dataclass(frozen=True)
class Ceiling:
    """What a loop without HTTP can do.

    Attributes:
        images_per_s: By batch size.
        best: Of the best batch size, measured afresh.
        p99_over_alone: At 80 % of the best of them, by kind of arrivals, over what an image takes alone: what queueing
            costs anybody on this machine.
    """

    images_per_s: dict[int, float]
    best: float
    p99_over_alone: dict[str, float]


@dataclass
class Found:
    """All rounds of one workload.

    Attributes:
        ceilings: Of each round, fp32.
        int8_ceilings: The same of the int8 model.
        visits: Of each server one a round.
        missing: Servers that could not take part, and why.
    """

    ceilings: list[Ceiling] = field(default_factory=list)
    int8_ceilings: list[Ceiling] = field(default_factory=list)
    visits: dict[str, list[Visit]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """A workload with its images.

    Attributes:
        folder: What benchmarks/workloads.py made of it.
        images: Encoded.
    """

    workload: Workload
    folder: Path
    images: list[bytes]

    def classes(self, model: str) -> list[int]:
        """The right class of each image, by the model in this process, one image at a time."""
        session = ort.InferenceSession(self.folder / model, providers=["CPUExecutionProvider"])
        pixels = [decode_image(image, self.workload.input_px).pixels_SS3 for image in self.images]
        return [int(session.run(["logits"], {"image": image_SS3[None]})[0].argmax()) for image_SS3 in pixels]


def visit(running: Running, asked: Asked, classes: Sequence[int], plan: Plan) -> Visit:
    """Measure a server that has just started.

    Raises:
        NotStartedError: Asked alone it does not give the right classes.
    """
    questions = right_questions(running, asked, classes)
    slo_s = asked.workload.slo_s
    loops = {
        connections: closed_loop(running.address, questions, connections=connections, seconds=plan.closed_s)
        for connections in plan.connections
    }
    closed = {connections: loop.goodput(slo_s) for connections, loop in loops.items()}
    knee_connections = knee_of(closed)
    resident_mib, proportional_mib = running.resident_mib(), running.proportional_mib()
    begin, before_s = time.perf_counter(), running.processor_s()
    at_knee = closed_loop(running.address, questions, connections=knee_connections, seconds=2 * plan.closed_s)
    share = at_knee.seconds / (time.perf_counter() - begin)
    processor_ms = 1000 * (running.processor_s() - before_s) * share / max(1, len(at_knee.outcomes))
    knee = at_knee.goodput(slo_s)
    offered = [
        offer(running, questions, plan, share, knee, arrivals, slo_s)
        for share, arrivals in [(0.8, "even"), *((share, "poisson") for share in SHARES)]
    ]
    return Visit(
        ready_s=running.ready_s,
        resident_mib=resident_mib,
        proportional_mib=proportional_mib,
        alone_p50_ms=1000 * loops[min(loops)].latency_s(0.5),
        closed=closed,
        knee_connections=knee_connections,
        knee=knee,
        processor_ms=processor_ms,
        offered=offered,
        wrong=sum(loop.wrong for loop in (*loops.values(), at_knee)) + sum(point.wrong for point in offered),
    )


def right_questions(running: Running, asked: Asked, classes: Sequence[int]) -> list[Question]:
    """Ask every image alone: the class must be the right one, and from now on the answer must stay what it is.

    Raises:
        NotStartedError: It is another class, or no answer.
    """
    seen = running.asked_alone(asked.images, asked.workload.media_type)
    if [named.class_index for named in seen] != list(classes):
        raise NotStartedError(f"it answered {len(seen)} of {len(classes)} images alone, and not all of them rightly")
    return [
        running.question(image, asked.workload.media_type, named)
        for image, named in zip(asked.images, seen, strict=True)
    ]


def knee_of(closed: dict[int, float]) -> int:
    """The connections that give most, chosen as the ceiling's batch size is."""
    return max(sorted(closed), key=closed.__getitem__)


def offer(
    running: Running, questions: Sequence[Question], plan: Plan, share: float, knee: float, arrivals: str, slo_s: float
) -> Offered:
    """Offer a share of the knee for a while."""
    rate = max(share * knee, 1 / plan.open_s)
    due_s = uniform(rate, plan.open_s) if arrivals == "even" else poisson(rate, plan.open_s, seed=round(100 * share))
    result = open_loop(running.address, questions, due_s, patience_s=slo_s)
    one_by_one(
        running.address, questions[:1], limit_s=10.0
    )  # answered once the queue is empty: the next load begins so
    return Offered(
        share=share,
        arrivals=arrivals,
        rate=len(due_s) / plan.open_s,
        goodput=result.goodput_of_burst(plan.open_s, slo_s),
        p50_ms=1000 * result.latency_s(0.5),
        p99_ms=1000 * result.latency_s(0.99),
        ended=result.statuses,
        wrong=result.wrong,
    )


def ceiling(asked: Asked, model: str, plan: Plan) -> Ceiling:
    """What can be done in a process of its own on the server's core."""
    words = [str(asked.folder / model), str(asked.workload.input_px), str(plan.ceiling_s)]
    images = [str(path) for path in sorted((asked.folder / "images").iterdir())]
    with on_core(SERVER_CORE):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.ceiling", *words, *images],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    found = json.loads(done.stdout)
    images_per_s = {int(size): speed for size, speed in found["images_per_s"].items()}
    return Ceiling(images_per_s, found["best"], found["p99_over_alone"])


def servers(
    asked: Asked, peers: Sequence[str], cache: Path
) -> dict[str, Callable[[], AbstractContextManager[Running]]]:
    """How each server is started."""
    first, media_type = asked.images[0], asked.workload.media_type
    found: dict[str, Callable[[], AbstractContextManager[Running]]] = {
        OURS: lambda: ours_running(asked.folder / "same", first, media_type),
        OURS_BY_DEFAULT: lambda: ours_running(asked.folder / "default", first, media_type),
    }
    for name in peers:
        found[name] = lambda peer=PEER_SERVERS[name]: peer_running(  # type: ignore[misc]
            peer, cache, asked.folder / "same", asked.workload, first
        )
    return found


def measure(
    asked: dict[str, Asked], plans: dict[str, Plan], repeats: int, peers: Sequence[str], cache: Path,
    say: Callable[[str], None],
) -> dict[str, Found]:  # fmt: skip
    """All rounds of all workloads."""
    found = {name: Found() for name in asked}
    classes = {name: {model: each.classes(model) for model in (FP32, INT8)} for name, each in asked.items()}
    for repeat in range(repeats):
        for name, each in asked.items():
            here, plan = found[name], plans[name]
            ceilings = {OURS: here.ceilings, OURS_BY_DEFAULT: here.int8_ceilings}
            starts = list(servers(each, peers, cache).items())
            shift = repeat % len(starts)
            for server, start in starts[shift:] + starts[:shift]:
                if server in here.missing:
                    continue
                model = INT8 if server == OURS_BY_DEFAULT else FP32
                if server in ceilings:  # just before, so that both see the same machine
                    ceilings[server].append(ceiling(each, model, plan))
                try:
                    with start() as running:
                        seen = visit(running, each, classes[name][model], plan)
                except NotStartedError as reason:
                    here.missing[server] = str(reason)
                    say(f"{name}, {server}: left out, {reason}")
                    continue
                here.visits.setdefault(server, []).append(seen)
                say(
                    f"{name}, {server}, round {repeat + 1} of {repeats}: {seen.knee:.0f}/s at {seen.knee_connections} "
                    f"connections, ready in {seen.ready_s:.1f} s"
                )
    return found


def workloads_made(names: Sequence[str], folder: Path) -> dict[str, Asked]:
    """The images and bundles, made by a process of its own: what it imports would stay in this one."""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.workloads", str(folder), *names], cwd=ROOT, check=True
    )
    asked = {}
    for name in names:
        images = [path.read_bytes() for path in sorted((folder / name / "images").iterdir())]
        asked[name] = Asked(WORKLOADS[name], folder / name, images)
    return asked


def about_the_run(command: str, repeats: int, plans: dict[str, Plan]) -> dict[str, object]:
    """What a reader must know of the run."""
    return {
        **circumstances(command, ("onnxruntime-gpu", "onnxruntime", "numpy", "pillow", "uvloop", "httptools")),
        "peers": {name: f"{peer.package} {peer.version}" for name, peer in PEER_SERVERS.items()},
        "repeats": repeats,
        "plans": {name: dataclasses.asdict(plan) for name, plan in plans.items()},
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="everything once, at sizes that measure nothing")
    parser.add_argument("--repeats", type=int, help="rounds; 5 by default, 1 with --quick")
    parser.add_argument("--workloads", type=listed(WORKLOADS), default=list(WORKLOADS), help=", ".join(WORKLOADS))
    parser.add_argument("--peers", type=listed(PEER_SERVERS), default=list(PEER_SERVERS), help=", ".join(PEER_SERVERS))
    parser.add_argument("--cache", type=Path, help="where the peers are installed; a temporary folder by default")
    parser.add_argument("--out", type=Path, default=OUT, help="a folder; --quick writes only where it is given")
    given = parser.parse_args()
    repeats = given.repeats or (1 if given.quick else 5)
    plans = {name: QUICK if given.quick else PLANS[name] for name in given.workloads}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cache = (given.cache or folder / "peers").resolve()
        print("making images and bundles", flush=True)
        asked = workloads_made(given.workloads, folder / "workloads")
        stack.enter_context(on_core(LOAD_CORE))
        found = measure(asked, plans, repeats, given.peers, cache, say=lambda what: print(what, flush=True))
    about = about_the_run(" ".join(["python -m benchmarks.serving", *flags(given)]), repeats, plans)
    write_report(found, about, None if given.quick and given.out == OUT else given.out)


def listed(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    """Reads names with commas between them."""

    def read(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return names

    return read


def flags(given: argparse.Namespace) -> Iterator[str]:
    """What was asked for, without the folders of this machine."""
    if given.quick:
        yield "--quick"
    if given.repeats:
        yield f"--repeats {given.repeats}"
    if given.workloads != list(WORKLOADS):
        yield f"--workloads {','.join(given.workloads)}"
    if given.peers != list(PEER_SERVERS):
        yield f"--peers '{','.join(given.peers)}'"


if __name__ == "__main__":
    main()
