"""The service compared with other servers (the peers), on the same machine with the same images.

    python -m benchmarks.serving [--quick] [--rounds N] [--workloads A,B] [--peers A,B] [--cache FOLDER]

Writes docs/benchmarks/serving.json, serving.md and serving.png. The server runs on one core, the load generator on
another. Every response of every server is checked, and every request has an X-Request-ID of its own.

For each workload (benchmarks/workload_specs.py), a round measures our service and each peer (benchmarks/servers.py).
Each round starts with another server. A server is measured in these steps: start it and wait for the first correct
response; send every image alone; run closed loops with an increasing number of connections; run the best one, the
*knee*, again, because the maximum of several noisy values is biased upwards; offer Poisson arrivals at 50 % to ten
times the goodput at the knee, all for the same time, with latency from the due times. Goodput is the number of correct
responses per second within 2 s.

Ratios are taken within a round. In comparison (a) all servers use the same model file. In comparison (b) our service
has its default settings, with which it uses the int8 model of a bundle if there is one; the peers are unchanged.

To try a part of it, without writing files; the peers are installed once:

    python -m benchmarks.serving --rounds 1 --workloads '12 MP' --peers mosec --cache /tmp/peers
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime as ort

from benchmarks.load import Request, closed_loop, open_loop, poisson, send_one_by_one
from benchmarks.run_metadata import run_metadata
from benchmarks.servers import (
    LTKD_FP32,
    LTKD_INT8,
    PEER_SERVERS,
    ROOT,
    NotStartedError,
    RunningServer,
    pinned_to_core,
    running_peer,
    running_service,
)
from benchmarks.serving_report import write_report
from benchmarks.workload_specs import SLO_S, WORKLOADS, Workload
from ltkd.contract.image_decoding import decode_image
from ltkd.contract.preprocessing import Preprocessing

OUT = ROOT / "docs" / "benchmarks"
SHARES = (0.5, 0.8, 1.0, 1.2, 2.0, 10.0)
MAX_REQUESTS_PER_S = 8000.0  # the load generator can certainly send this many
SERVER_CORE, LOAD_CORE = 0, 1
FP32_FILE, INT8_FILE = "same/model.onnx", "default/model.int8.onnx"


@dataclass(frozen=True)
class Plan:
    """The durations of one measurement of a server.

    Attributes:
        connections: Numbers of connections of the closed loops.
        closed_s: Seconds per closed loop.
        open_s: Seconds per offered load.
    """

    connections: tuple[int, ...]
    closed_s: float
    open_s: float


# photographs: some 20 requests per second, so the measurements take longer and need fewer connections
PLANS = {
    "resnet8": Plan((1, 8, 16, 32, 64), closed_s=0.6, open_s=1.0),
    "resnet20": Plan((1, 8, 16, 32, 64), closed_s=0.6, open_s=1.0),
    "photographs": Plan((1, 4, 8), closed_s=2.5, open_s=2.0),
    "12 MP": Plan((1, 4, 8), closed_s=3.0, open_s=3.0),
}
QUICK = Plan((1, 4), closed_s=1.0, open_s=1.0)


@dataclass(frozen=True)
class OfferedLoad:
    """The result of one offered load.

    Attributes:
        share: The load as a share of the goodput at the knee.
        rate: Requests per second.
        goodput: Correct responses per second within 2 s.
        p50_ms: Median latency of the responses with status 200, from the due time.
        p99_ms: The 99th percentile of the same latency.
        refused_p99_ms: The 99th percentile of the latency of the responses with status 429; NaN if there are none.
        ended: Number of requests by status.
        wrong: Incorrect responses with status 200.
    """

    share: float
    rate: float
    goodput: float
    p50_ms: float
    p99_ms: float
    refused_p99_ms: float
    ended: dict[str, int]
    wrong: int


@dataclass(frozen=True)
class ServerResult:
    """The measurements of one server in one round.

    Attributes:
        ready_s: Seconds from the start of its process to its first correct response.
        resident_mib: Memory of all its processes after the closed loops; shared pages are counted in each process.
        proportional_mib: The same memory with shared pages counted once.
        alone_p50_ms: Median latency with one connection.
        closed: Goodput by number of connections.
        knee_connections: The number of connections with the best goodput.
        knee: Goodput with that number, measured again.
        cpu_ms: Processor time of all its processes per response, at the knee.
        offered: Result of each offered load.
        wrong: Total number of incorrect responses.
    """

    ready_s: float
    resident_mib: float
    proportional_mib: float
    alone_p50_ms: float
    closed: dict[int, float]
    knee_connections: int
    knee: float
    cpu_ms: float
    offered: list[OfferedLoad]
    wrong: int


@dataclass
class WorkloadResults:
    """All rounds of one workload.

    Attributes:
        server_results: For each server, one result per round.
        missing: Servers that could not take part, with the reason.
    """

    server_results: dict[str, list[ServerResult]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkloadInputs:
    """A workload with its images.

    Attributes:
        workload: The workload.
        folder: The folder that benchmarks/workloads.py wrote.
        images: Encoded images.
    """

    workload: Workload
    folder: Path
    images: list[bytes]

    def classes(self, model: str) -> list[int]:
        """The correct class of each image: the prediction of the model in this process, one image at a time."""
        session = ort.InferenceSession(self.folder / model, providers=["CPUExecutionProvider"])
        preprocessing = Preprocessing(input_px=self.workload.input_px)
        pixels = [decode_image(image, preprocessing).pixels_SS3 for image in self.images]
        return [int(session.run(["logits"], {"image": image_SS3[None]})[0].argmax()) for image_SS3 in pixels]


def measure_server(running: RunningServer, inputs: WorkloadInputs, classes: Sequence[int], plan: Plan) -> ServerResult:
    """Measure a server that has just started.

    Raises:
        NotStartedError: It predicts other classes than expected for images sent alone.
    """
    requests = checked_requests(running, inputs, classes)
    loops = {
        connections: closed_loop(running.address, requests, connections=connections, seconds=plan.closed_s)
        for connections in plan.connections
    }
    closed = {connections: loop.goodput(SLO_S) for connections, loop in loops.items()}
    knee_connections = find_knee(closed)
    resident_mib, proportional_mib = running.resident_mib(), running.proportional_mib()
    begin, before_s = time.perf_counter(), running.cpu_s()
    at_knee = closed_loop(running.address, requests, connections=knee_connections, seconds=2 * plan.closed_s)
    counted_share = at_knee.seconds / (time.perf_counter() - begin)
    cpu_ms = 1000 * (running.cpu_s() - before_s) * counted_share / max(1, len(at_knee.outcomes))
    knee = at_knee.goodput(SLO_S)
    offered = [measure_offered_load(running, requests, plan, share, knee) for share in SHARES]
    return ServerResult(
        ready_s=running.ready_s,
        resident_mib=resident_mib,
        proportional_mib=proportional_mib,
        alone_p50_ms=1000 * loops[min(loops)].latency_s(0.5),
        closed=closed,
        knee_connections=knee_connections,
        knee=knee,
        cpu_ms=cpu_ms,
        offered=offered,
        wrong=sum(loop.wrong for loop in (*loops.values(), at_knee)) + sum(point.wrong for point in offered),
    )


def checked_requests(running: RunningServer, inputs: WorkloadInputs, classes: Sequence[int]) -> list[Request]:
    """Send every image alone and check its class; later responses must agree with these predictions.

    Raises:
        NotStartedError: A class is incorrect or a response is missing.
    """
    predictions = running.predict_one_by_one(inputs.images, inputs.workload.media_type)
    if [prediction.class_index for prediction in predictions] != list(classes):
        raise NotStartedError(
            f"it answered {len(predictions)} of {len(classes)} images sent alone, and not all of them correctly"
        )
    return [
        running.request(image, inputs.workload.media_type, prediction)
        for image, prediction in zip(inputs.images, predictions, strict=True)
    ]


def find_knee(closed: dict[int, float]) -> int:
    """The number of connections with the best goodput; the smallest of them if there are several."""
    return max(sorted(closed), key=closed.__getitem__)


def measure_offered_load(
    running: RunningServer, requests: Sequence[Request], plan: Plan, share: float, knee: float
) -> OfferedLoad:
    """Offer a multiple of the goodput at the knee for some seconds."""
    rate = min(max(share * knee, 1 / plan.open_s), MAX_REQUESTS_PER_S)
    due_s = poisson(rate, plan.open_s, seed=round(100 * share))
    result = open_loop(running.address, requests, due_s, timeout_s=SLO_S)
    # this request is answered when the queue is empty, so the next load starts with an empty queue
    send_one_by_one(running.address, requests[:1], limit_s=30.0)
    return OfferedLoad(
        share=share,
        rate=len(due_s) / plan.open_s,
        goodput=result.goodput_of_burst(plan.open_s, SLO_S),
        p50_ms=1000 * result.latency_s(0.5),
        p99_ms=1000 * result.latency_s(0.99),
        refused_p99_ms=1000 * result.latency_s(0.99, status=429),
        ended=result.statuses,
        wrong=result.wrong,
    )


def server_starters(
    inputs: WorkloadInputs, peers: Sequence[str], cache: Path
) -> dict[str, Callable[[], AbstractContextManager[RunningServer]]]:
    """How each server is started."""
    first, media_type = inputs.images[0], inputs.workload.media_type
    starters: dict[str, Callable[[], AbstractContextManager[RunningServer]]] = {
        LTKD_FP32: lambda: running_service(inputs.folder / "same", first, media_type),
        LTKD_INT8: lambda: running_service(inputs.folder / "default", first, media_type),
    }
    for name in peers:
        starters[name] = lambda peer=PEER_SERVERS[name]: running_peer(  # type: ignore[misc]
            peer, cache, inputs.folder / "same", inputs.workload, first
        )
    return starters


def measure(
    inputs: dict[str, WorkloadInputs], plans: dict[str, Plan], rounds: int, peers: Sequence[str], cache: Path,
    report: Callable[[str], None],
) -> dict[str, WorkloadResults]:  # fmt: skip
    """Measure all rounds of all workloads."""
    results = {name: WorkloadResults() for name in inputs}
    classes = {
        name: {model: workload_inputs.classes(model) for model in (FP32_FILE, INT8_FILE)}
        for name, workload_inputs in inputs.items()
    }
    for number in range(rounds):
        for name, workload_inputs in inputs.items():
            workload_results, plan = results[name], plans[name]
            starters = list(server_starters(workload_inputs, peers, cache).items())
            shift = number % len(starters)
            for server, start_server in starters[shift:] + starters[:shift]:
                if server in workload_results.missing:
                    continue
                model = INT8_FILE if server == LTKD_INT8 else FP32_FILE
                try:
                    with start_server() as running:
                        result = measure_server(running, workload_inputs, classes[name][model], plan)
                except NotStartedError as reason:
                    workload_results.missing[server] = str(reason)
                    report(f"{name}, {server}: left out, {reason}")
                    continue
                workload_results.server_results.setdefault(server, []).append(result)
                report(
                    f"{name}, {server}, round {number + 1} of {rounds}: {result.knee:.0f}/s at "
                    f"{result.knee_connections} connections, ready in {result.ready_s:.1f} s"
                )
    return results


def make_workloads(names: Sequence[str], folder: Path) -> dict[str, WorkloadInputs]:
    """Make the images and bundles in a separate process, so that its imports do not stay in this one."""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.workloads", str(folder), *names], cwd=ROOT, check=True
    )
    inputs = {}
    for name in names:
        images = [path.read_bytes() for path in sorted((folder / name / "images").iterdir())]
        inputs[name] = WorkloadInputs(WORKLOADS[name], folder / name, images)
    return inputs


def serving_metadata(command: str, rounds: int, plans: dict[str, Plan]) -> dict[str, object]:
    """The metadata of the record: command, versions, peers and durations."""
    return {
        **run_metadata(command, ("onnxruntime-gpu", "onnxruntime", "numpy", "pillow", "uvloop", "httptools")),
        "peers": {name: f"{peer.package} {peer.version}" for name, peer in PEER_SERVERS.items()},
        "rounds": rounds,
        "plans": {name: dataclasses.asdict(plan) for name, plan in plans.items()},
    }


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="run everything once, too briefly for meaningful values")
    parser.add_argument("--rounds", type=int, help="number of rounds; 5 by default, 1 with --quick")
    parser.add_argument(
        "--workloads", type=comma_separated(WORKLOADS), default=list(WORKLOADS), help=", ".join(WORKLOADS)
    )
    parser.add_argument(
        "--peers", type=comma_separated(PEER_SERVERS), default=list(PEER_SERVERS), help=", ".join(PEER_SERVERS)
    )
    parser.add_argument("--cache", type=Path, help="folder for the peers' environments; temporary by default")
    parser.add_argument("--out", type=Path, help="output folder; by default docs/benchmarks, for a whole run only")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    plans = {name: QUICK if arguments.quick else PLANS[name] for name in arguments.workloads}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cache = (arguments.cache or folder / "peers").resolve()
        print("making images and bundles", flush=True)
        inputs = make_workloads(arguments.workloads, folder / "workloads")
        stack.enter_context(pinned_to_core(LOAD_CORE))
        results = measure(
            inputs, plans, rounds, arguments.peers, cache, report=lambda message: print(message, flush=True)
        )
    metadata = serving_metadata(" ".join(["python -m benchmarks.serving", *command_flags(arguments)]), rounds, plans)
    is_whole = (arguments.quick, arguments.workloads, arguments.peers) == (False, [*WORKLOADS], [*PEER_SERVERS])
    write_report(results, metadata, arguments.out or (OUT if is_whole else None))


def comma_separated(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names for argparse."""

    def read(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return names

    return read


def command_flags(arguments: argparse.Namespace) -> Iterator[str]:
    """The given options, without the folders of this machine."""
    if arguments.quick:
        yield "--quick"
    if arguments.rounds:
        yield f"--rounds {arguments.rounds}"
    if arguments.workloads != list(WORKLOADS):
        yield f"--workloads '{','.join(arguments.workloads)}'"
    if arguments.peers != list(PEER_SERVERS):
        yield f"--peers '{','.join(arguments.peers)}'"


if __name__ == "__main__":
    main()
