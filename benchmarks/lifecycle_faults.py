"""What happens to the processes of a service: killed, stalled, stopped, or given another bundle."""

import json
import math
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.load import Outcome
from benchmarks.trial import Bench, Row, Service, seconds_until
from serve.http.api_keys import make_key

NOTICED_S = 0.1  # so late may a busy machine tell the front that a process has died
AT_ONCE_S = 1.0  # and so late may the last of those it held have its answer


def killed(bench: Bench, processes: int) -> Row:
    """An engine process gets SIGKILL, again and again."""
    moments: list[float] = []
    away_s: list[float] = []
    with bench.service(processes=processes) as service, service.under_load() as load:
        for _ in range(bench.plan.kills):
            oldest = service.engines()[:1]
            moments.append(time.perf_counter())
            os.kill(oldest[0], signal.SIGKILL)
            away = service.seconds_until_replaced(oldest)
            if away is None:
                break
            away_s.append(away)
            # one of two: the service was ready all along, the new one is not yet; the only one: work has gathered
            time.sleep(2 * service.running.ready_s)
    result = load.result()
    moments_s = [moment - result.started for moment in moments]
    held = [one for one in result.failed() if was_held(one, moments_s)]
    return Row.of(
        result,
        lost=[one for one in result.failed() if not was_held(one, moments_s)],
        fault=f"an engine process of {processes} is killed (SIGKILL) under {bench.plan.share:.0%} of the load",
        times=bench.plan.kills,
        promise="only what it held is lost, answered 503 at once",
        seen=(
            f"replaced {len(away_s)} times, at the longest after {max(away_s, default=math.nan):.2f} s; {len(held)} "
            f"requests were held, the slowest of their 503 "
            f"{1000 * max((one.latency_s for one in held), default=math.nan):.1f} ms after it was due"
        ),
        besides=len(away_s) == bench.plan.kills,
    )


def was_held(one: Outcome, moments_s: Sequence[float]) -> bool:
    """Whether a process had a request when it was killed, and this was told at once."""
    return one.status == 503 and any(
        one.due_s <= moment_s + NOTICED_S and moment_s <= one.done_s <= moment_s + AT_ONCE_S for moment_s in moments_s
    )


def stalled(bench: Bench) -> Row:
    """The engine process stops dead (SIGSTOP), as a hung driver would make it."""
    with bench.service(stall_seconds=1) as service, service.under_load() as load:
        stuck = service.engines()
        begin = time.perf_counter()
        os.kill(stuck[0], signal.SIGSTOP)
        seconds_until(lambda: stuck[0] not in service.engines())
        gone = time.perf_counter()
        replaced = service.seconds_until_replaced(stuck) is not None
        away_s = time.perf_counter() - begin
        time.sleep(2 * service.running.ready_s)
    result = load.result()
    begin_s, gone_s = begin - result.started, gone - result.started
    return Row.of(
        result,
        lost=[
            one
            for one in result.failed()
            if not (one.status in (429, 503) and begin_s <= one.done_s and one.due_s <= gone_s)
        ],
        fault=f"the session stalls: the engine process is stopped (SIGSTOP) under {bench.plan.share:.0%} of the load",
        promise=(
            "it is killed after the limit (1 s here) and replaced; until it is killed the answer is 503, or 429 beyond "
            "the queue; what comes later is answered"
        ),
        seen=f"killed after {gone - begin:.2f} s, {'another' if replaced else 'none'} ready after {away_s:.2f} s",
        besides=replaced,
    )


def drained(bench: Bench) -> Row:
    """SIGTERM, with a load balancer that looks at /readyz every 10 ms."""
    with bench.service(delay_seconds=1) as service:
        with service.under_load() as load:
            begin = time.perf_counter()
            os.kill(service.running.pid, signal.SIGTERM)
            seconds_until(lambda: not service.is_ready())
        ended = seconds_until(service.running.has_ended, limit_s=15) is not None
        took_s = time.perf_counter() - begin
    result = load.result()
    return Row.of(
        result,
        lost=result.failed(),
        fault=f"SIGTERM under {bench.plan.share:.0%} of the load; clients look elsewhere once /readyz says so",
        promise="every request is answered, then the process ends",
        seen=f"{'ended' if ended else 'had not ended'} {took_s:.2f} s after the signal (1 s of it the delay)",
        besides=ended,
    )


def reloaded(bench: Bench) -> Row:
    """Another bundle is put in place, again and again; a signal and a request in turn give the order to look."""
    told = Counter[str]()
    taken_s: list[float] = []
    with two_bundles(bench) as (service, link, both), service.under_load() as load:
        for number in range(1, bench.plan.reloads + 1):
            before = service.engines()
            begin = time.perf_counter()
            point_at(link, both[number % 2])
            if number % 2:
                os.kill(service.running.pid, signal.SIGHUP)
            else:
                told[service.reload()] += 1
            if service.seconds_until_replaced(before) is None:
                break
            taken_s.append(time.perf_counter() - begin)
    result = load.result()
    return Row.of(
        result,
        lost=result.failed(),
        fault=f"another bundle, and SIGHUP or POST in turn, under {bench.plan.share:.0%} of the load",
        times=bench.plan.reloads,
        promise="no request fails",
        seen=(
            f"{len(taken_s)} reloads, the slowest took {max(taken_s, default=math.nan):.2f} s; POST said {dict(told)}; "
            f"p99 meanwhile {1000 * result.latency_s(0.99):.1f} ms"
        ),
        besides=len(taken_s) == bench.plan.reloads and told == {"replaced": bench.plan.reloads // 2},
    )


def corrupted(bench: Bench) -> Row:
    """The bundle that a reload finds has one bit flipped in its model."""
    with two_bundles(bench) as (service, link, both):
        model = both[1] / "model.onnx"
        content = bytearray(model.read_bytes())
        content[len(content) // 2] ^= 1
        model.write_bytes(content)
        before = service.engines()
        with service.under_load() as load:
            point_at(link, both[1])
            told = service.reload()
            time.sleep(bench.plan.load_s / 4)
            stayed, ready = service.engines() == before, service.is_ready()
    result = load.result()
    return Row.of(
        result,
        lost=result.failed(),
        fault=f"a reload finds a bundle with one bit flipped, under {bench.plan.share:.0%} of the load",
        promise="the reload is refused with 409, and the old one keeps answering",
        seen=(
            f"POST said {told}, the {'same' if stayed else 'another'} engine process answers, "
            f"/readyz says {'ready' if ready else 'no'}"
        ),
        besides=told == "409" and stayed and ready,
    )


@contextmanager
def two_bundles(bench: Bench) -> Iterator[tuple[Service, Path, list[Path]]]:
    """A service that takes orders, the link that it serves, and two bundles that differ in their manifests alone.

    The link points at the first of them.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        both = [folder / "1", folder / "2"]
        for copy in both:
            shutil.copytree(bench.bundle, copy)
            manifest = copy / "manifest.json"
            content = json.loads(manifest.read_bytes())
            content["certified_on"] = f"{content['certified_on']}, copy {copy.name}"
            manifest.write_text(json.dumps(content))
        link, keys = folder / "current", folder / "keys"
        link.symlink_to(both[0])
        key, line = make_key("reliability", "admin")
        keys.write_text(line)
        with bench.service(bundle=link, key=key, key_file=keys) as service:
            yield service, link, both


def point_at(link: Path, bundle: Path) -> None:
    """Exchange what a link points at, in one step."""
    beside = link.with_name("next")
    beside.symlink_to(bundle)
    beside.replace(link)
