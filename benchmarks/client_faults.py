"""Faults caused by clients: overload, disconnecting clients, and ordinary traffic for a long time.

benchmarks/attacks.py has the clients that mean harm.
"""

import io
import multiprocessing
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from statistics import median

from PIL import Image

from benchmarks.fault_test import FaultSetup, Row, Service
from benchmarks.hostile_bodies import largest_images, largest_requests
from benchmarks.hostile_clients import Attack, Target, run_attacks
from benchmarks.load import (
    CLIENT_LEFT,
    Request,
    Result,
    http_request,
    open_loop,
    poisson,
    quantile_of,
    send_one_by_one,
)
from benchmarks.serving import MAX_REQUESTS_PER_S
from benchmarks.workload_specs import SLO_S


def overload(setup: FaultSetup, factor: int) -> Row:
    """Send bursts of several times the load that the service can answer, each followed by half of that load."""
    with setup.service() as service:
        best = [service.best_goodput()]
        bursts = []
        for seed in range(setup.plan.bursts):
            bursts.append(_send_burst(service, factor * best[-1], best[-1] / 2, seed))
            best.append(service.best_goodput())
    load_s, slo_s = setup.plan.load_s, SLO_S
    # the speed of the machine varies: each burst is compared with the goodput right before and after it
    of_best = sorted(
        burst.goodput_of_burst(load_s, slo_s) / ((before + after) / 2)
        for burst, before, after in zip(bursts, best, best[1:], strict=False)
    )
    outcomes = [outcome for burst in bursts for outcome in burst.outcomes]
    rejected_ms = 1000 * quantile_of([outcome.latency_s for outcome in outcomes if outcome.status == 429], 0.99)
    recovery_s = max(
        [0.0, *(outcome.due_s - load_s for outcome in outcomes if not outcome.correct or outcome.latency_s > slo_s)]
    )
    offered_per_s = sum(1 for outcome in outcomes if outcome.due_s < load_s) / (len(bursts) * load_s)
    whole = Result(sum(burst.seconds for burst in bursts), outcomes)
    return Row.of(
        whole,
        lost=[outcome for outcome in whole.failed() if not (outcome.status == 429 and outcome.retry_after)],
        fault=f"{factor} times the load that the service can answer, {setup.what}",
        times=len(bursts),
        promise=(
            "goodput (within 2 s) within 10 % of its best; 99 % of the 429 within 50 ms, with Retry-After; "
            "recovered in 2 s; no other status"
        ),
        seen=(
            f"{offered_per_s:,.0f} requests/s offered, goodput {median(of_best):.2f} "
            f"({of_best[0]:.2f}-{of_best[-1]:.2f}) of its best ({median(best):,.0f}/s), 99 % of the 429 "
            f"within {rejected_ms:.1f} ms, recovered after {recovery_s:.2f} s"
        ),
        rest_kept=median(of_best) >= 0.9 and not rejected_ms > 50 and recovery_s < 2.0,
    )


def _send_burst(service: Service, rate: float, rate_after: float, seed: int) -> Result:
    load_s = service.plan.load_s
    burst = poisson(min(rate, MAX_REQUESTS_PER_S), load_s, seed=seed)
    after = [load_s + due for due in poisson(rate_after, load_s, seed=seed)]
    return open_loop(service.running.address, service.requests, burst + after, timeout_s=10.0)


def disconnect_storm(setup: FaultSetup) -> Row:
    """Three in ten clients disconnect before the response."""
    with setup.service() as service:
        with service.under_load(disconnect_share=0.3) as load:
            time.sleep(setup.plan.load_s)
        after = send_one_by_one(service.running.address, service.requests)
    result = load.result()
    return Row.of(
        result,
        lost=result.failed() + after.failed(),
        fault=(
            f"30 % of the clients disconnect before the response, at {setup.plan.share:.0%} of the load that the "
            "service can answer"
        ),
        times=sum(1 for outcome in result.outcomes if outcome.status == CLIENT_LEFT),
        promise="every client that stays connected gets its response",
        seen=f"p99 of the clients that stay {1000 * result.latency_s(0.99):.1f} ms",
    )


def soak_test(setup: FaultSetup, beside_large: bool = False) -> Row:
    """A long load of ordinary traffic: mostly valid requests, some clients that disconnect, some malformed images.

    Args:
        setup: The bundle, images and settings.
        beside_large: Two more clients send the largest admitted requests, one after the other without end.
    """
    plan = setup.plan
    with setup.service() as service, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        rate = plan.share * service.best_goodput()
        malformed = malformed_requests(service, setup.images[:4], max(1, len(service.requests) // 20), seed=6)
        requests = [*service.requests, *malformed]
        before = send_for(service, requests, rate, plan.load_s)
        executor.submit(largest_images).result()
        target = Target(service.running.address, {}, "", setup.images[0], setup.media_type, "", 0)
        large = {"largest-requests": Attack(largest_requests, per_s=1000, workers=2)} if beside_large else {}
        results = list[Result]()
        resident_mib = list[float]()
        hostile = executor.submit(run_attacks, large, target, plan.soak_s)
        stop_time = time.perf_counter() + plan.soak_s
        while time.perf_counter() < stop_time:
            results.append(send_for(service, requests, rate, min(10.0, plan.soak_s / 10), seed=len(results)))
            resident_mib.append(service.running.resident_mib())
        sent_large = {name: (found.statuses, found.violations) for name, found in hostile.result().items()}
    outcomes = [outcome for result in results for outcome in result.outcomes]
    whole = Result(plan.soak_s, outcomes)
    lost = [one for one in whole.failed() if one.status not in (400, 415, 422, 429)]
    refused = sum(1 for one in outcomes if one.status == 429) / max(1, len(outcomes))
    p99_ratio = whole.latency_s(0.99) / before.latency_s(0.99)
    fifth = max(1, len(resident_mib) // 5)
    early = quantile_of(resident_mib[fifth : 2 * fifth] or resident_mib, 0.5)
    late = quantile_of(resident_mib[-fifth:], 0.5)
    memory = f"{early:.1f} MiB in the second fifth, {late:.1f} MiB in the last"
    seen = f"{refused:.3%} refused, {memory}"
    fault = (
        f"a soak test at {plan.share:.0%} of the load; 5 % of the clients disconnect, 5 % of the images are malformed"
    )
    if not beside_large:
        promise = "nothing is lost or refused, and memory stays flat (within 2 %)"
        kept = not refused and late <= 1.02 * early
    else:
        fault += "; beside it, two clients send 100 MP per request without end"
        promise = "nothing is lost, at most 0.1 % is refused, p99 stays below three times that without the two clients"
        seen += f"; p99 {p99_ratio:.1f} times that without them; they got {sent_large}"
        kept = refused <= 0.001 and p99_ratio < 3
    return Row.of(whole, lost=lost, fault=fault, times=round(plan.soak_s), promise=promise, seen=seen, rest_kept=kept)


def send_for(service: Service, requests: Sequence[Request], rate: float, seconds: float, seed: int = 0) -> Result:
    """Send requests of independent clients for some seconds; 5 % of the clients disconnect."""
    due_s = poisson(rate, seconds, seed=seed)
    return open_loop(service.running.address, requests, due_s, disconnect_share=0.05, timeout_s=10.0, spin_s=0.0)


def malformed_requests(service: Service, images: Sequence[bytes], count: int, seed: int) -> list[Request]:
    """Requests with malformed images; if an image can still be decoded, any response is correct."""
    random_source, sources = random.Random(seed), encode_in_all_formats(images)
    path = service.running.path
    return [Request(http_request(path, mutate(random_source, sources), "image/jpeg"), bool) for _ in range(count)]


def encode_in_all_formats(images: Sequence[bytes]) -> list[bytes]:
    """Encode the images as JPEG, PNG and WebP."""
    encoded = []
    for content in images:
        with Image.open(io.BytesIO(content)) as image:
            for kind in ("JPEG", "PNG", "WEBP"):
                file = io.BytesIO()
                image.convert("RGB").save(file, kind)
                encoded.append(file.getvalue())
    return encoded


def mutate(random_source: random.Random, sources: Sequence[bytes]) -> bytes:
    """Damage a real image in one of five ways."""
    content = bytearray(random_source.choice(sources))
    kind = random_source.randrange(5)
    if kind == 0:  # truncated
        return bytes(content[: random_source.randrange(1, len(content))])
    if kind == 1:  # joined to the end of another file
        other = random_source.choice(sources)
        return bytes(content[: random_source.randrange(4, len(content))] + other[random_source.randrange(len(other)) :])
    if kind == 2:  # damaged in the header only
        for _ in range(random_source.randrange(1, 9)):
            content[random_source.randrange(min(64, len(content)))] = random_source.randrange(256)
        return bytes(content)
    if kind == 3:  # a range of bytes replaced
        first = random_source.randrange(len(content))
        content[first : first + random_source.randrange(1, 64)] = random_source.randbytes(random_source.randrange(64))
        return bytes(content)
    for _ in range(random_source.randrange(1, 33)):
        content[random_source.randrange(len(content))] ^= 1 << random_source.randrange(8)
    return bytes(content)
