"""What clients do to a service: too many at once, those that leave, those that are slow, and images that are none."""

import io
import random
import time
from collections import Counter
from collections.abc import Sequence
from statistics import median

from PIL import Image

from benchmarks.load import (
    LEFT,
    Question,
    Result,
    Stage,
    http_request,
    one_by_one,
    open_loop,
    poisson,
    quantile_of,
    slow_clients,
)
from benchmarks.trial import Bench, Row, Service, seconds_until

MOST_PER_S = 8000.0  # requests that the generator can send for sure


def overload(bench: Bench, factor: int) -> Row:
    """Bursts of several times what the service can do, each followed by half of it."""
    with bench.service() as service:
        best = [service.best_goodput()]
        bursts = []
        for seed in range(bench.plan.bursts):
            bursts.append(_burst(service, factor * best[-1], best[-1] / 2, seed))
            best.append(service.best_goodput())
    load_s, slo_s = bench.plan.load_s, bench.slo_s
    # a machine becomes faster and slower: each burst is compared with what was seen right before and after it
    of_best = sorted(
        burst.goodput_of_burst(load_s, slo_s) / ((before + after) / 2)
        for burst, before, after in zip(bursts, best, best[1:], strict=False)
    )
    outcomes = [one for burst in bursts for one in burst.outcomes]
    rejected_ms = 1000 * quantile_of([one.latency_s for one in outcomes if one.status == 429], 0.99)
    recovery_s = max([0.0, *(one.due_s - load_s for one in outcomes if not one.right or one.latency_s > slo_s)])
    offered = sum(1 for one in outcomes if one.due_s < load_s) / (len(bursts) * load_s)
    whole = Result(sum(burst.seconds for burst in bursts), outcomes)
    return Row.of(
        whole,
        lost=[one for one in whole.failed() if not (one.status == 429 and one.retry_after)],
        fault=f"{factor} times as many requests as it can answer, {bench.what}",
        times=len(bursts),
        promise="goodput within 10 % of its best; 429 with Retry-After in milliseconds; recovered in 2 s; nothing else",
        seen=(
            f"{offered:,.0f} requests/s offered, goodput {median(of_best):.2f} ({of_best[0]:.2f}-{of_best[-1]:.2f}) of "
            f"its best ({median(best):,.0f}/s), 99 % of the 429 within {rejected_ms:.1f} ms, recovered after "
            f"{recovery_s:.2f} s"
        ),
        besides=median(of_best) >= 0.9 and not rejected_ms > 100 and recovery_s < 2.0,
    )


def _burst(service: Service, rate: float, rate_after: float, seed: int) -> Result:
    load_s = service.plan.load_s
    burst = poisson(min(rate, MOST_PER_S), load_s, seed=seed)
    after = [load_s + due for due in poisson(rate_after, load_s, seed=seed)]
    return open_loop(service.running.address, service.questions, burst + after, patience_s=10.0)


def disconnect_storm(bench: Bench) -> Row:
    """Three in ten clients leave before their answer."""
    with bench.service() as service:
        with service.under_load(leaving=0.3) as load:
            time.sleep(bench.plan.load_s)
        after = one_by_one(service.running.address, service.questions)
    result = load.result()
    return Row.of(
        result,
        lost=result.failed() + after.failed(),
        fault=f"30 % of the clients leave before the answer, at {bench.plan.share:.0%} of the load that it can answer",
        times=sum(1 for one in result.outcomes if one.status == LEFT),
        promise="everybody who stays is answered",
        seen=f"p99 of those who stay {1000 * result.latency_s(0.99):.1f} ms",
    )


def slow(bench: Bench, stage: Stage) -> Row:
    """Clients that never come to an end, beside others."""
    count = bench.plan.slow
    with (
        bench.service(header_seconds=1, body_seconds=1) as service,
        service.under_load() as load,
        slow_clients(service.running.address, service.questions[0].request, count, stage) as ended,
    ):
        time.sleep(bench.plan.load_s)
        all_ended = seconds_until(lambda: len(ended) == count, limit_s=10) is not None
    result = load.result()
    return Row.of(
        result,
        lost=result.failed(),
        fault=f"clients that send their {stage} byte by byte, beside {bench.plan.share:.0%} of the load",
        times=count,
        promise="each is cut off after the limit (1 s here), and nobody else notices",
        seen=f"cut off: {dict(Counter(ended))}, p99 of the others {1000 * result.latency_s(0.99):.1f} ms",
        besides=all_ended,
    )


def malformed(bench: Bench) -> Row:
    """Real images with bits flipped, bytes cut off, exchanged and joined."""
    count = bench.plan.malformed
    with bench.service() as service:
        questions = broken_questions(service, bench.images[:8], count, seed=5)
        result = open_loop(service.running.address, questions, [0.0] * count, lines=8, patience_s=60 + 0.1 * count)
        after = one_by_one(service.running.address, service.questions)
    return Row.of(
        result,
        lost=[one for one in result.failed() if not 400 <= one.status < 500] + after.failed(),
        fault="malformed images: mutations of real JPEG, PNG and WebP files",
        times=count,
        promise="each is answered with 4xx, or with 200 where the decoder finds nothing wrong; never 5xx, never a hang",
        seen=f"{sum(1 for one in result.outcomes if one.status == 200)} could still be decoded",
    )


def soaked(bench: Bench) -> Row:
    """Everyday traffic for long: most of it in order, some clients that leave, some images that are none."""
    plan, lost, ended = bench.plan, 0, Counter[str]()
    resident_mib: list[float] = []
    with bench.service() as service:
        rate = plan.share * service.best_goodput()
        broken = broken_questions(service, bench.images[:4], max(1, len(service.questions) // 20), seed=6)
        questions = [*service.questions, *broken]
        over = time.perf_counter() + plan.soak_s
        while time.perf_counter() < over:
            due_s = poisson(rate, min(10.0, plan.soak_s / 10), seed=len(resident_mib))
            result = open_loop(service.running.address, questions, due_s, leaving=0.05, patience_s=10.0)
            ended.update(result.statuses)
            lost += sum(1 for one in result.failed() if one.status not in (400, 415, 422))
            resident_mib.append(service.running.resident_mib())
    fifth = max(1, len(resident_mib) // 5)
    early = quantile_of(resident_mib[fifth : 2 * fifth] or resident_mib, 0.5)
    late = quantile_of(resident_mib[-fifth:], 0.5)
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


def broken_questions(service: Service, images: Sequence[bytes], count: int, seed: int) -> list[Question]:
    """Requests with mutations of some images; where one can still be decoded, any answer is right."""
    chance, sources = random.Random(seed), encodings(images)
    path = service.running.path
    return [Question(http_request(path, mutated(chance, sources), "image/jpeg"), bool) for _ in range(count)]


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
