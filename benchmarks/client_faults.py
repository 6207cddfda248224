"""Faults caused by clients: overload, disconnecting clients, slow clients and malformed images."""

import io
import random
import time
from collections import Counter
from collections.abc import Sequence
from statistics import median

from PIL import Image

from benchmarks.fault_test import FaultSetup, Row, Service, seconds_until
from benchmarks.load import (
    CLIENT_LEFT,
    Request,
    Result,
    Stage,
    http_request,
    open_loop,
    poisson,
    quantile_of,
    send_one_by_one,
    slow_clients,
)

MAX_REQUESTS_PER_S = 8000.0  # the load generator can certainly send this many


def overload(setup: FaultSetup, factor: int) -> Row:
    """Send bursts of several times the load that the service can answer, each followed by half of that load."""
    with setup.service() as service:
        best = [service.best_goodput()]
        bursts = []
        for seed in range(setup.plan.bursts):
            bursts.append(_send_burst(service, factor * best[-1], best[-1] / 2, seed))
            best.append(service.best_goodput())
    load_s, slo_s = setup.plan.load_s, setup.slo_s
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
            "goodput within 10 % of its best; 429 with Retry-After in milliseconds; recovered in 2 s; no other status"
        ),
        seen=(
            f"{offered_per_s:,.0f} requests/s offered, goodput {median(of_best):.2f} "
            f"({of_best[0]:.2f}-{of_best[-1]:.2f}) of its best ({median(best):,.0f}/s), 99 % of the 429 "
            f"within {rejected_ms:.1f} ms, recovered after {recovery_s:.2f} s"
        ),
        rest_kept=median(of_best) >= 0.9 and not rejected_ms > 100 and recovery_s < 2.0,
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


def slow_requests(setup: FaultSetup, stage: Stage) -> Row:
    """Clients that never complete their request, at the same time as clients that do."""
    count = setup.plan.slow
    with (
        setup.service(header_seconds=1, body_seconds=1) as service,
        service.under_load() as load,
        slow_clients(service.running.address, service.requests[0].content, count, stage) as ended,
    ):
        time.sleep(setup.plan.load_s)
        all_ended = seconds_until(lambda: len(ended) == count, limit_s=10) is not None
    result = load.result()
    return Row.of(
        result,
        lost=result.failed(),
        fault=f"clients that send their {stage} byte by byte, at {setup.plan.share:.0%} of the load",
        times=count,
        promise="each is disconnected after the timeout (1 s here); the other clients are not affected",
        seen=f"disconnected: {dict(Counter(ended))}, p99 of the others {1000 * result.latency_s(0.99):.1f} ms",
        rest_kept=all_ended,
    )


def malformed_images(setup: FaultSetup) -> Row:
    """Real images with flipped bits, truncated files, replaced bytes and joined files."""
    count = setup.plan.malformed
    with setup.service() as service:
        requests = malformed_requests(service, setup.images[:8], count, seed=5)
        result = open_loop(
            service.running.address, requests, [0.0] * count, max_connections=8, timeout_s=60 + 0.1 * count
        )
        after = send_one_by_one(service.running.address, service.requests)
    return Row.of(
        result,
        lost=[outcome for outcome in result.failed() if not 400 <= outcome.status < 500] + after.failed(),
        fault="malformed images: mutations of real JPEG, PNG and WebP files",
        times=count,
        promise="each gets 4xx, or 200 if the decoder can decode it; never 5xx, never a hang",
        seen=f"{sum(1 for outcome in result.outcomes if outcome.status == 200)} could still be decoded",
    )


def soak_test(setup: FaultSetup) -> Row:
    """A long load of ordinary traffic: mostly valid requests, some clients that disconnect, some malformed images."""
    plan, lost, ended = setup.plan, 0, Counter[str]()
    resident_mib: list[float] = []
    with setup.service() as service:
        rate = plan.share * service.best_goodput()
        malformed = malformed_requests(service, setup.images[:4], max(1, len(service.requests) // 20), seed=6)
        requests = [*service.requests, *malformed]
        stop_time = time.perf_counter() + plan.soak_s
        while time.perf_counter() < stop_time:
            due_s = poisson(rate, min(10.0, plan.soak_s / 10), seed=len(resident_mib))
            result = open_loop(service.running.address, requests, due_s, disconnect_share=0.05, timeout_s=10.0)
            ended.update(result.statuses)
            lost += sum(1 for outcome in result.failed() if outcome.status not in (400, 415, 422))
            resident_mib.append(service.running.resident_mib())
    fifth = max(1, len(resident_mib) // 5)
    early = quantile_of(resident_mib[fifth : 2 * fifth] or resident_mib, 0.5)
    late = quantile_of(resident_mib[-fifth:], 0.5)
    return Row(
        fault=(
            f"a soak test at {plan.share:.0%} of the load; 5 % of the clients disconnect, 5 % of the images are "
            "malformed"
        ),
        times=round(plan.soak_s),
        requests=sum(ended.values()),
        lost=lost,
        ended=dict(ended),
        promise="nothing is lost and memory stays flat (within 2 %)",
        seen=f"{early:.1f} MiB in the second fifth, {late:.1f} MiB in the last",
        kept=not lost and late <= 1.02 * early,
    )


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
