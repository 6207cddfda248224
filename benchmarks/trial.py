"""One trial: a service of its own, load while something happens to it, and the row that comes of it."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from benchmarks.load import Outcome, Question, Result, closed_loop, open_loop, poisson
from benchmarks.servers import Running, ours_running

LONGEST_S = 300.0  # of the load around a fault; every fault is over much sooner


@dataclass(frozen=True)
class Plan:
    """How much is injected.

    Attributes:
        load_s: How long load lasts around a fault.
        share: Of what the service can do, the load around a fault.
        bursts: Of more than it can do.
        kills: Times that an engine process is killed.
        reloads: Times that another bundle is put in place.
        slow: Slow clients of each kind.
        malformed: Mutated images.
        soak_s: Of the soak.
    """

    load_s: float = 4.0
    share: float = 0.5
    bursts: int = 5
    kills: int = 10
    reloads: int = 20
    slow: int = 100
    malformed: int = 5000
    soak_s: float = 600.0


# a fifth of the load leaves room on a machine that has other things to do
QUICK = Plan(load_s=1.0, share=0.2, bursts=1, kills=2, reloads=2, slow=10, malformed=300, soak_s=3.0)


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

    @classmethod
    def of(
        cls,
        result: Result,
        lost: Sequence[Outcome],
        *,
        fault: str,
        promise: str,
        seen: str,
        times: int = 1,
        besides: bool = True,
    ) -> Self:
        """Count what became of a load.

        Args:
            result: The load.
            lost: What was lost of it, or of what was asked afterwards.
            fault: As in the row.
            promise: As in the row.
            seen: As in the row.
            times: As in the row.
            besides: Whether the promise was kept in what it says besides.
        """
        return cls(
            fault, times, len(result.outcomes), len(lost), result.statuses, promise, seen, kept=not lost and besides
        )


@dataclass(frozen=True)
class Bench:
    """What the faults are tried on.

    Attributes:
        bundle: Served.
        images: Encoded images that it takes.
        what: They are, in words.
        media_type: Of them.
        slo_s: An answer that takes longer is late.
        plan: How much is injected.
        settings: Of every service, by their names; by default it is as it comes.
    """

    bundle: Path
    images: Sequence[bytes]
    what: str
    media_type: str
    slo_s: float
    plan: Plan
    settings: dict[str, object] = field(default_factory=dict)

    @contextmanager
    def service(self, bundle: Path | None = None, key: str = "", **settings: object) -> Iterator["Service"]:
        """A service that has answered every image alone.

        Args:
            bundle: Served in place of this one.
            key: Sent with every request, for a service that asks for one.
            settings: Of this service besides.
        """
        variables = {f"LTKD_{name.upper()}": str(value) for name, value in (self.settings | settings).items()}
        with ours_running(bundle or self.bundle, self.images[0], self.media_type, variables, key=key) as running:
            seen = running.asked_alone(self.images, self.media_type)
            questions = [
                running.question(image, self.media_type, named) for image, named in zip(self.images, seen, strict=True)
            ]
            yield Service(running, questions, self.plan, len(running.children()))


@dataclass(frozen=True)
class Service:
    """A running service and the questions to it.

    Attributes:
        running: Its processes and its address.
        questions: Asked in turn.
        plan: How much load there is.
        num_engines: Engine processes that it started with.
    """

    running: Running
    questions: Sequence[Question]
    plan: Plan
    num_engines: int

    def best_goodput(self) -> float:
        """Goodput of a closed loop: what the loads are shares of."""
        loop = closed_loop(self.running.address, self.questions, connections=32, seconds=self.plan.load_s)
        return loop.goodput()

    @contextmanager
    def under_load(self, leaving: float = 0.0) -> Iterator[Future[Result]]:
        """Independent clients, from a moment before the block until its end; the result is there after it.

        Args:
            leaving: Share of them that close their connection before the answer.
        """
        due_s = poisson(self.plan.share * self.best_goodput(), LONGEST_S)
        over = threading.Event()
        with ThreadPoolExecutor(1) as beside:
            load = beside.submit(
                open_loop, self.running.address, self.questions, due_s, stop=over, leaving=leaving, patience_s=10.0
            )
            try:
                time.sleep(self.plan.load_s / 4)
                yield load
                assert not load.done() or load.exception(), "the load was over before the block was"
            finally:
                over.set()

    def engines(self) -> list[int]:
        """The engine processes."""
        return self.running.children()

    def seconds_until_replaced(self, old: Collection[int]) -> float | None:
        """How long it takes until engine processes are gone, others are there, and the service is ready."""

        def replaced() -> bool:
            now = self.engines()
            return not set(old) & set(now) and len(now) == self.num_engines and self.is_ready()

        return seconds_until(replaced)

    def is_ready(self) -> bool:
        """What /readyz says; a service that is gone is not ready."""
        try:
            return self._told("GET", "/readyz")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def reload(self) -> str:
        """Give the order to reload over HTTP: what that did with the model, or the status of the refusal."""
        status, body = self._told("POST", "/v1/admin/reload")
        return str(json.loads(body)["models"][0]["outcome"]) if status == 200 else str(status)

    def _told(self, method: str, path: str) -> tuple[int, bytes]:
        with closing(http.client.HTTPConnection(*self.running.address, timeout=30)) as line:
            line.request(method, path, headers={"Authorization": f"Bearer {self.running.key}"})
            answer = line.getresponse()
            return answer.status, answer.read()


def seconds_until(happened: Callable[[], bool], limit_s: float = 30.0) -> float | None:
    """How long it takes until something has happened; None if that is longer than the limit."""
    begin = time.perf_counter()
    while not happened():
        if time.perf_counter() - begin > limit_s:
            return None
        time.sleep(0.01)
    return time.perf_counter() - begin
