"""One fault test: start a service, send load while a fault is injected, and make the row of the result.

client_faults.py and lifecycle_faults.py inject the faults; reliability.py runs them and writes the table.
"""

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

from benchmarks.load import Outcome, Request, Result, closed_loop, open_loop, poisson
from benchmarks.servers import RunningServer, running_service

MAX_LOAD_S = 300.0  # longest load around a fault; every fault test ends much earlier


@dataclass(frozen=True)
class Plan:
    """How much is injected.

    Attributes:
        load_s: How long the load lasts around a fault.
        share: Load around a fault, as a share of the best goodput.
        bursts: Number of overload bursts.
        kills: How often an engine process is killed.
        reloads: How often the bundle is replaced.
        soak_s: Duration of each soak test.
    """

    load_s: float = 4.0
    share: float = 0.5
    bursts: int = 5
    kills: int = 10
    reloads: int = 20
    soak_s: float = 600.0


# a fifth of the load, for machines that run other programs at the same time
QUICK = Plan(load_s=1.0, share=0.2, bursts=1, kills=2, reloads=2, soak_s=3.0)


@dataclass(frozen=True)
class Row:
    """A fault and its result.

    Attributes:
        fault: What was injected.
        times: How often it was injected.
        requests: Requests sent meanwhile.
        lost: Requests without a correct response that the service guarantees to answer.
        ended: Number of requests by status.
        promise: What the service guarantees.
        seen: What was observed.
        kept: Whether the guarantee was kept.
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
        rest_kept: bool = True,
    ) -> Self:
        """Count the outcomes of a load.

        Args:
            result: The load.
            lost: The lost requests, of the load or of those sent afterwards.
            fault: As in the row.
            promise: As in the row.
            seen: As in the row.
            times: As in the row.
            rest_kept: Whether the rest of the guarantee was kept.
        """
        return cls(
            fault, times, len(result.outcomes), len(lost), result.statuses, promise, seen, kept=not lost and rest_kept
        )


@dataclass(frozen=True)
class FaultSetup:
    """The bundle, images and settings for the fault tests.

    Attributes:
        bundle: The bundle that is served.
        images: Encoded images that it accepts.
        what: Description of the images.
        media_type: Media type of the images.
        plan: How much is injected.
        settings: Settings of every service by name; the defaults if empty.
    """

    bundle: Path
    images: Sequence[bytes]
    what: str
    media_type: str
    plan: Plan
    settings: dict[str, object] = field(default_factory=dict)

    @contextmanager
    def service(self, bundle: Path | None = None, key: str = "", **settings: object) -> Iterator["Service"]:
        """Start a service that has answered every image once, sent alone.

        Args:
            bundle: Served instead of the default bundle.
            key: API key sent with every request, for a service that requires one.
            settings: Additional settings of this service.
        """
        variables = {f"LTKD_{name.upper()}": str(value) for name, value in (self.settings | settings).items()}
        with running_service(bundle or self.bundle, self.images[0], self.media_type, variables, key=key) as running:
            predictions = running.predict_one_by_one(self.images, self.media_type)
            requests = [
                running.request(image, self.media_type, prediction)
                for image, prediction in zip(self.images, predictions, strict=True)
            ]
            yield Service(running, requests, self.plan, len(running.children()))


@dataclass(frozen=True)
class Service:
    """A running service and the requests for it.

    Attributes:
        running: Its processes and its address.
        requests: Sent in turn.
        plan: How much load is sent.
        num_engines: Number of engine processes at the start.
    """

    running: RunningServer
    requests: Sequence[Request]
    plan: Plan
    num_engines: int

    def best_goodput(self) -> float:
        """Goodput of a closed loop; the loads are shares of it."""
        loop = closed_loop(self.running.address, self.requests, connections=32, seconds=self.plan.load_s)
        return loop.goodput()

    @contextmanager
    def under_load(self, disconnect_share: float = 0.0) -> Iterator[Future[Result]]:
        """Send load from independent clients during the block, and shortly before. The result is available afterwards.

        Args:
            disconnect_share: Share of the clients that disconnect before the response.
        """
        due_s = poisson(self.plan.share * self.best_goodput(), MAX_LOAD_S)
        stop = threading.Event()
        with ThreadPoolExecutor(1) as executor:
            load = executor.submit(
                open_loop,
                self.running.address,
                self.requests,
                due_s,
                stop=stop,
                disconnect_share=disconnect_share,
                timeout_s=10.0,
            )
            try:
                time.sleep(self.plan.load_s / 4)
                yield load
                assert not load.done() or load.exception(), "the load ended before the block"
            finally:
                stop.set()

    def engines(self) -> list[int]:
        """The engine processes."""
        return self.running.children()

    def seconds_until_replaced(self, old: Collection[int]) -> float | None:
        """Seconds until the old engine processes are gone, new ones run and the service is ready; None after 30 s."""

        def replaced() -> bool:
            current = self.engines()
            return not set(old) & set(current) and len(current) == self.num_engines and self.is_ready()

        return seconds_until(replaced)

    def is_ready(self) -> bool:
        """Whether /readyz returns 200; false if the service has exited."""
        try:
            return self._request("GET", "/readyz")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def reload(self) -> str:
        """Request a reload over HTTP; returns the outcome for the model, or the status if the reload is rejected."""
        status, body = self._request("POST", "/v1/admin/reload")
        return str(json.loads(body)["models"][0]["outcome"]) if status == 200 else str(status)

    def _request(self, method: str, path: str) -> tuple[int, bytes]:
        with closing(http.client.HTTPConnection(*self.running.address, timeout=30)) as connection:
            connection.request(method, path, headers={"Authorization": f"Bearer {self.running.key}"})
            response = connection.getresponse()
            return response.status, response.read()


def seconds_until(condition: Callable[[], bool], limit_s: float = 30.0) -> float | None:
    """Seconds until a condition is true; None if that takes longer than the limit."""
    begin = time.perf_counter()
    while not condition():
        if time.perf_counter() - begin > limit_s:
            return None
        time.sleep(0.01)
    return time.perf_counter() - begin
