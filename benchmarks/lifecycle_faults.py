"""Faults of the service's processes: killed, stalled, shut down, or given another bundle."""

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

from benchmarks.fault_test import FaultSetup, Row, Service, seconds_until
from benchmarks.load import Outcome
from serve.http.api_keys import make_key

DETECTION_S = 0.1  # longest delay until the server process detects that an engine process has died
MAX_RESPONSE_S = 1.0  # longest delay until the last request that it held is answered


def kill_engine(setup: FaultSetup, processes: int) -> Row:
    """Kill an engine process (SIGKILL) repeatedly."""
    kill_times: list[float] = []
    downtimes_s: list[float] = []
    with setup.service(processes=processes) as service, service.under_load() as load:
        for _ in range(setup.plan.kills):
            oldest = service.engines()[:1]
            kill_times.append(time.perf_counter())
            os.kill(oldest[0], signal.SIGKILL)
            downtime = service.seconds_until_replaced(oldest)
            if downtime is None:
                break
            downtimes_s.append(downtime)
            # with two processes, wait until the new one is ready; with one, wait until the backlog is processed
            time.sleep(2 * service.running.ready_s)
    result = load.result()
    kill_times_s = [kill_time - result.started for kill_time in kill_times]
    held = [outcome for outcome in result.failed() if was_held(outcome, kill_times_s)]
    return Row.of(
        result,
        lost=[outcome for outcome in result.failed() if not was_held(outcome, kill_times_s)],
        fault=(
            f"1 of {processes} engine process{'es' if processes > 1 else ''} is killed (SIGKILL) at "
            f"{setup.plan.share:.0%} of the load"
        ),
        times=setup.plan.kills,
        promise="only the requests it held are lost; they get 503 at once",
        seen=(
            f"replaced {len(downtimes_s)} times, after at most {max(downtimes_s, default=math.nan):.2f} s; {len(held)} "
            f"requests were held, the slowest 503 sent "
            f"{1000 * max((outcome.latency_s for outcome in held), default=math.nan):.1f} ms after it was due"
        ),
        rest_kept=len(downtimes_s) == setup.plan.kills,
    )


def was_held(outcome: Outcome, kill_times_s: Sequence[float]) -> bool:
    """Whether a process held a request when it was killed, and the request was answered with 503 at once."""
    return outcome.status == 503 and any(
        outcome.due_s <= kill_time_s + DETECTION_S and kill_time_s <= outcome.done_s <= kill_time_s + MAX_RESPONSE_S
        for kill_time_s in kill_times_s
    )


def stall_engine(setup: FaultSetup) -> Row:
    """Stop the engine process (SIGSTOP), as a hanging driver would."""
    with setup.service(stall_seconds=1) as service, service.under_load() as load:
        stalled_engines = service.engines()
        begin = time.perf_counter()
        os.kill(stalled_engines[0], signal.SIGSTOP)
        seconds_until(lambda: stalled_engines[0] not in service.engines())
        killed_at = time.perf_counter()
        replaced = service.seconds_until_replaced(stalled_engines) is not None
        replaced_s = time.perf_counter() - begin
        time.sleep(2 * service.running.ready_s)
    result = load.result()
    begin_s, killed_s = begin - result.started, killed_at - result.started
    return Row.of(
        result,
        lost=[
            outcome
            for outcome in result.failed()
            if not (outcome.status in (429, 503) and begin_s <= outcome.done_s and outcome.due_s <= killed_s)
        ],
        fault=f"the session stalls: the engine process is stopped (SIGSTOP) at {setup.plan.share:.0%} of the load",
        promise=(
            "it is killed after the timeout (1 s here) and replaced; until then the status is 503, or 429 if the queue "
            "is full; later requests are answered"
        ),
        seen=(
            f"killed after {killed_at - begin:.2f} s, "
            f"{'its replacement' if replaced else 'no replacement'} ready after {replaced_s:.2f} s"
        ),
        rest_kept=replaced,
    )


def shut_down(setup: FaultSetup) -> Row:
    """Send SIGTERM while a load balancer polls /readyz every 10 ms."""
    with setup.service(delay_seconds=1) as service:
        with service.under_load() as load:
            begin = time.perf_counter()
            os.kill(service.running.pid, signal.SIGTERM)
            seconds_until(lambda: not service.is_ready())
        ended = seconds_until(service.running.has_exited, limit_s=15) is not None
        shutdown_s = time.perf_counter() - begin
    result = load.result()
    return Row.of(
        result,
        lost=result.failed(),
        fault=f"SIGTERM at {setup.plan.share:.0%} of the load; clients stop sending when /readyz returns 503",
        promise="every request is answered, then the process exits",
        seen=(
            f"{'exited' if ended else 'had not exited'} {shutdown_s:.2f} s after the signal "
            "(including the delay of 1 s)"
        ),
        rest_kept=ended,
    )


def reload_bundles(setup: FaultSetup) -> Row:
    """Replace the bundle repeatedly and request a reload, by SIGHUP and POST in turn."""
    outcomes = Counter[str]()
    durations_s: list[float] = []
    with service_with_two_bundles(setup) as (service, link, bundles), service.under_load() as load:
        for number in range(1, setup.plan.reloads + 1):
            before = service.engines()
            begin = time.perf_counter()
            replace_link(link, bundles[number % 2])
            if number % 2:
                os.kill(service.running.pid, signal.SIGHUP)
            else:
                outcomes[service.reload()] += 1
            if service.seconds_until_replaced(before) is None:
                break
            durations_s.append(time.perf_counter() - begin)
    result = load.result()
    return Row.of(
        result,
        lost=result.failed(),
        fault=f"a changed bundle is reloaded, by SIGHUP and POST in turn, at {setup.plan.share:.0%} of the load",
        times=setup.plan.reloads,
        promise="no request fails",
        seen=(
            f"{len(durations_s)} reloads, the slowest took {max(durations_s, default=math.nan):.2f} s; "
            f"POST returned {dict(outcomes)}; p99 during the reloads {1000 * result.latency_s(0.99):.1f} ms"
        ),
        rest_kept=len(durations_s) == setup.plan.reloads and outcomes == {"replaced": setup.plan.reloads // 2},
    )


def reload_corrupted_bundle(setup: FaultSetup) -> Row:
    """Reload a bundle with one flipped bit in its model."""
    with service_with_two_bundles(setup) as (service, link, bundles):
        model = bundles[1] / "model.onnx"
        content = bytearray(model.read_bytes())
        content[len(content) // 2] ^= 1
        model.write_bytes(content)
        before = service.engines()
        with service.under_load() as load:
            replace_link(link, bundles[1])
            reload_outcome = service.reload()
            time.sleep(setup.plan.load_s / 4)
            is_same, ready = service.engines() == before, service.is_ready()
    result = load.result()
    return Row.of(
        result,
        lost=result.failed(),
        fault=f"a reload of a bundle with one bit flipped, at {setup.plan.share:.0%} of the load",
        promise="the reload is rejected with 409, and the old bundle stays in service",
        seen=(
            f"POST returned {reload_outcome}, the {'same' if is_same else 'another'} engine process answers, "
            f"/readyz reports {'ready' if ready else 'not ready'}"
        ),
        rest_kept=reload_outcome == "409" and is_same and ready,
    )


@contextmanager
def service_with_two_bundles(setup: FaultSetup) -> Iterator[tuple[Service, Path, list[Path]]]:
    """A service with an admin key, the link that it serves, and two bundles that differ only in their manifests.

    The link points to the first bundle.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundles = [folder / "1", folder / "2"]
        for copy in bundles:
            shutil.copytree(setup.bundle, copy)
            manifest = copy / "manifest.json"
            content = json.loads(manifest.read_bytes())
            content["certified_on"] = f"{content['certified_on']}, copy {copy.name}"
            manifest.write_text(json.dumps(content))
        link, keys = folder / "current", folder / "keys"
        link.symlink_to(bundles[0])
        key, key_file_line = make_key("reliability", "admin")
        keys.write_text(key_file_line)
        with setup.service(bundle=link, key=key, key_file=keys) as service:
            yield service, link, bundles


def replace_link(link: Path, bundle: Path) -> None:
    """Replace the target of a link atomically."""
    new_link = link.with_name("next")
    new_link.symlink_to(bundle)
    new_link.replace(link)
