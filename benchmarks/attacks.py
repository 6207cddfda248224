"""Attacks a running service with hostile clients, and shows what its ordinary clients notice.

    python -m benchmarks.attacks [--seconds 3600] [--bundle FOLDER] [--attacks A,B]

Starts ``ltkd serve`` with a key file on one core, and on the other ordinary clients at half of the load that it can
answer. Each attack runs alone for some seconds, then all of them run together until the time is over, and SIGTERM ends
the service in the middle of them. All traffic is on loopback; rates and connections are bounded.

Prints a table and the promises (benchmarks/attack_watch.py), and exits with 1 if one was not kept. With the default
options it writes docs/benchmarks/attacks.json and the table in docs/reliability.md. To try one attack:

    python -m benchmarks.attacks --seconds 30 --attacks forged-feedback
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import os
import re
import secrets
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import hostile_bodies as bodies
from benchmarks import hostile_connections as connections
from benchmarks.attack_report import describe, promises, table, write_report
from benchmarks.attack_watch import Observed, Phase, Watch, checks
from benchmarks.fault_test import seconds_until
from benchmarks.hostile_clients import Attack, Target, run_attacks
from benchmarks.load import Request, closed_loop, http_request, open_loop, poisson, send_one_by_one
from benchmarks.servers import RunningServer, pinned_to_core, running_service
from benchmarks.serving import LOAD_CORE, comma_separated, make_workloads

SECONDS, SHARE = 3600.0, 0.5
WORKLOAD = "resnet20"
ORDINARY_CONNECTIONS = 64
ROLES = {"ordinary": "classify", "camera": "classify", "labeller": "classify,feedback", "scraper": "metrics"}
STRANGER = "stranger"  # its key is not in the key file
SETTINGS = {"max_connections": 300, "header_seconds": 2, "body_seconds": 2, "write_seconds": 2}
SHUTDOWN_S = 0.5 + 8.0 + 1.0  # delay and drain by default, and the end of the process itself
TOGETHER = "all together"

ATTACKS: dict[str, Attack] = {
    "malformed-http": Attack(connections.malformed_http, per_s=30),
    "bytes-after-request": Attack(connections.bytes_after_request),
    "upgrade": Attack(connections.upgrade, per_s=5),
    "key-in-trailer": Attack(connections.key_in_trailer),
    "slow-header": Attack(connections.slow_header, workers=20),
    "slow-body": Attack(connections.slow_body, workers=20),
    "body-never-continued": Attack(connections.body_never_continued, workers=20),
    "never-reads": Attack(connections.never_reads, per_s=2, workers=8),
    "leaves": Attack(connections.leaves, per_s=20),
    "pipelines": Attack(connections.pipelines, per_s=1, workers=1),
    "pipelined-body": Attack(connections.pipelined_body_never_ends, workers=20),
    "pipelined-large": Attack(connections.pipelined_large_bodies, per_s=1),
    "idle-connections": Attack(connections.idle_connections, per_s=0.1, workers=1),
    "image-bombs": Attack(bodies.image_bomb, per_s=5),
    "64-webp": Attack(bodies.many_large_webps, per_s=0.5, workers=1),
    "largest-requests": Attack(bodies.largest_requests, per_s=1000, workers=2),
    "gzip-bombs": Attack(bodies.gzip_bomb, per_s=2),
    "json-bombs": Attack(bodies.json_bomb, per_s=2, workers=2),
    "large-feedback": Attack(bodies.large_feedback, per_s=1, workers=2),
    "multipart": Attack(bodies.multipart, per_s=2),
    "tensors": Attack(bodies.tensors, per_s=5),
    "forged-feedback": Attack(bodies.forged_feedback, per_s=2, workers=2),
    "wrong-keys": Attack(bodies.wrong_keys, per_s=10),
    "mutations": Attack(bodies.mutated_requests, per_s=20, workers=20),
}


@dataclass(frozen=True)
class Plan:
    """How long everything lasts, in seconds.

    Attributes:
        before_s: Ordinary clients without attacks.
        alone_s: Each attack alone.
        mixed_s: All attacks together.
    """

    before_s: float
    alone_s: float
    mixed_s: float

    @classmethod
    def of(cls, seconds: float, num_attacks: int) -> "Plan":
        """Divide the time: at most half of it for the single attacks, and at most 20 s for each."""
        before_s, alone_s = min(30.0, seconds / 20), min(20.0, seconds / 2 / num_attacks)
        return cls(before_s, alone_s, seconds - before_s - num_attacks * alone_s)


@dataclass(frozen=True)
class Site:
    """A running service with its ordinary clients.

    Attributes:
        running: The service.
        requests: Ordinary requests, with the check of their answers.
        target: What the hostile clients know.
        rate: Ordinary requests per second.
        settle_s: Longest wait after an attack until ordinary requests are answered as before.
    """

    running: RunningServer
    requests: Sequence[Request]
    target: Target
    rate: float
    settle_s: float = 30.0

    def is_answered(self) -> bool:
        """Whether an ordinary request is answered within a second."""
        (outcome,) = send_one_by_one(self.running.address, self.requests[:1], limit_s=1.0).outcomes
        return outcome.correct


def run(
    site: Site, attacks: Mapping[str, Attack], plan: Plan, executor: Executor, report: Callable[[str], None]
) -> Observed:
    """Run all phases, and end the service.

    Args:
        site: The service.
        attacks: The attacks by name.
        plan: How long everything lasts.
        executor: Runs the hostile clients, in another process so that they do not delay the ordinary ones.
        report: Called with a line for each phase.
    """
    running, endings = site.running, list[Ending]()
    engines, start_mib = running.children(), running.resident_mib()
    with Watch(running) as watch:

        def add_phase(phase: Phase) -> None:
            phases.append(phase)
            report(describe(phase))

        def end() -> None:
            watch.stop()
            endings.append(shut_down(running, engines))

        phases = list[Phase]()
        add_phase(measure_phase(site, watch, executor, "none", {}, plan.before_s))
        for name, attack in attacks.items():
            if not running.has_exited():
                add_phase(measure_phase(site, watch, executor, name, {name: attack}, plan.alone_s))
        begin_s = watch.now()
        add_phase(measure_phase(site, watch, executor, TOGETHER, attacks, plan.mixed_s, end))
    (ending,) = endings
    return Observed(
        phases=phases,
        samples=watch.samples,
        mixed_samples=watch.since(begin_s),
        same_server=ending.was_running,
        same_engines=ending.same_engines,
        start_mib=start_mib,
        tracebacks=tracebacks(running.log.read_text(errors="replace") if running.log else ""),
        shutdown_s=ending.shutdown_s,
        shutdown_limit_s=SHUTDOWN_S,
    )


def measure_phase(
    site: Site,
    watch: Watch,
    executor: Executor,
    name: str,
    attacks: Mapping[str, Attack],
    seconds: float,
    at_end: Callable[[], None] | None = None,
) -> Phase:
    """Ordinary clients beside attacks.

    Args:
        site: The service.
        watch: Samples it.
        executor: Runs the hostile clients.
        name: Name of the phase.
        attacks: The attacks by name; with none, the ordinary clients are alone.
        seconds: Duration.
        at_end: Called when the ordinary clients have ended, while the attacks go on.
    """
    begin_s, engines = watch.now(), site.running.children()
    hostile = executor.submit(run_attacks, dict(attacks), site.target, seconds, SHUTDOWN_S if at_end else 0.0)
    due_s = poisson(site.rate, seconds)
    result = open_loop(
        site.running.address, site.requests, due_s, timeout_s=15.0, stop=watch.has_exited,
        max_connections=ORDINARY_CONNECTIONS, connect_first=True, spin_s=0.0,
    )  # fmt: skip
    samples, replaced = watch.since(begin_s), site.running.children() != engines
    if at_end:
        at_end()
        done = hostile.result()
    else:  # the consequences of the attack belong to this phase
        done = hostile.result()
        seconds_until(site.is_answered, site.settle_s)
        samples, replaced = watch.since(begin_s), site.running.children() != engines
    return Phase.of(name, result, samples, engines_replaced=replaced, attacks=done)


@dataclass(frozen=True)
class Ending:
    """The state of the service before its shutdown, and the duration of the shutdown; None if it did not end."""

    was_running: bool
    same_engines: bool
    shutdown_s: float | None


def shut_down(running: RunningServer, engines: Sequence[int]) -> Ending:
    """Send SIGTERM and wait for the end of the server process."""
    was_running, same_engines = not running.has_exited(), running.children() == list(engines)
    if was_running:
        os.kill(running.pid, signal.SIGTERM)
    return Ending(was_running, same_engines, seconds_until(running.has_exited, SHUTDOWN_S + 5.0))


def tracebacks(log: str) -> dict[str, int]:
    """The number of tracebacks in the output of the service, by their last line."""
    found = re.findall(r"Traceback \(most recent call last\):\n(?:[ \t|+].*\n|\n)*(\S.*)", log)
    lines = Counter(re.sub("0x[0-9a-f]+", "0x...", line)[:150] for line in found)
    return dict(lines.most_common(10))


def write_keys(path: Path) -> dict[str, str]:
    """Write a key file, and return the key of each client. The stranger's key is not in the file."""
    keys = {name: f"ltkd_{secrets.token_urlsafe(32)}" for name in (*ROLES, STRANGER)}
    lines = [f"{name}:{roles}:{hashlib.sha256(keys[name].encode()).hexdigest()}" for name, roles in ROLES.items()]
    path.write_text("\n".join(lines) + "\n")
    return keys


@contextmanager
def served_site(
    bundle: Path, images: Sequence[bytes], media_type: str, seconds: float, share: float = SHARE
) -> Iterator[Site]:
    """Start the service, and measure how much load it can answer.

    Args:
        bundle: What it serves.
        images: Encoded images that ordinary clients send.
        media_type: Their media type.
        seconds: Duration of the closed loop that measures its goodput.
        share: Share of that goodput that the ordinary clients send.
    """
    with tempfile.TemporaryDirectory() as folder:
        keys = write_keys(Path(folder) / "keys")
        settings = {**SETTINGS, "key_file": Path(folder) / "keys"}
        variables = {f"LTKD_{name.upper()}": str(value) for name, value in settings.items()}
        with running_service(bundle, images[0], media_type, variables, key=keys["ordinary"]) as running:
            predictions = running.predict_one_by_one(images, media_type)
            requests = [
                running.request(image, media_type, prediction)
                for image, prediction in zip(images, predictions, strict=True)
            ]
            best = closed_loop(running.address, requests, connections=32, seconds=seconds).goodput()
            yield Site(running, requests, target_of(running, images[0], media_type, keys), share * best)


def target_of(running: RunningServer, image: bytes, media_type: str, keys: Mapping[str, str]) -> Target:
    """What the hostile clients know: one valid image and its answer, and some keys."""
    answers: list[bytes] = []

    def keep(body: bytes) -> bool:
        answers.append(body)
        return True

    content = http_request(running.path, image, media_type, f"Authorization: Bearer {keys['ordinary']}\r\n")
    send_one_by_one(running.address, [Request(content, keep)])
    answer = json.loads(answers[0])
    return Target(
        address=running.address,
        keys=keys,
        model=answer["model"]["name"],
        image=image,
        media_type=media_type,
        label=answer["results"][0]["label"],
        max_connections=SETTINGS["max_connections"],
    )


def noise_images(count: int = 16) -> list[bytes]:
    """PNG images for a bundle of unknown content."""
    images = []
    for seed in range(count):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
        images.append(file.getvalue())
    return images


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attacks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="duration of all phases together; 3600 by default"
    )
    parser.add_argument(
        "--share", type=float, default=SHARE, help="ordinary load, as a share of the best; 0.5 by default"
    )
    parser.add_argument("--bundle", type=Path, help="served bundle; by default a resnet20 with random weights is made")
    parser.add_argument("--attacks", type=comma_separated(ATTACKS), default=list(ATTACKS), help=", ".join(ATTACKS))
    parser.add_argument("--write", action="store_true", help="write the files even with other options")
    return parser.parse_args(arguments)


def main() -> int:
    """Attack the service and write the report; the exit code is 1 if a promise was not kept."""
    arguments = parse_arguments(sys.argv[1:])
    attacks = {name: ATTACKS[name] for name in arguments.attacks}
    plan = Plan.of(arguments.seconds, len(attacks))
    with (
        tempfile.TemporaryDirectory() as folder,
        pinned_to_core(LOAD_CORE),
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor,
    ):
        bundle, images, media_type = arguments.bundle, noise_images(), "image/png"
        if bundle is None:
            print("making a bundle", flush=True)
            inputs = make_workloads([WORKLOAD], Path(folder))[WORKLOAD]
            bundle, images, media_type = inputs.folder / "same", inputs.images, inputs.workload.media_type
        with served_site(bundle.resolve(), images, media_type, plan.before_s, arguments.share) as site:
            executor.submit(bodies.prepare).result()
            print(f"{site.rate:.0f} ordinary requests/s", flush=True)
            observed = run(site, attacks, plan, executor, report=lambda line: print(line, flush=True))
    found = checks(observed)
    descriptions = {name: (attack.attempt.__doc__ or "").partition("\n")[0] for name, attack in attacks.items()}
    print(table(observed.phases, descriptions), promises(found), sep="\n\n")
    if arguments.write or (arguments.seconds, arguments.share, arguments.bundle, attacks) == (
        SECONDS,
        SHARE,
        None,
        ATTACKS,
    ):
        write_report(observed, found, descriptions, asdict(plan), site.rate)
    return 0 if all(check.kept for check in found) else 1


if __name__ == "__main__":
    sys.exit(main())
