"""What the service counts, in a registry of its own, as Prometheus reads it.

The hot path adds to plain numbers and takes no lock, so everything here belongs to the event loop's thread. Prometheus'
own counters cost a lookup and a lock each; instead its collector reads the numbers when somebody asks for them.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.engine.answers import DECISIONS
from serve.engine.messages import PredictionFacts
from serve.monitoring.drift import GroupSeen, Window

MEDIA_TYPE = CONTENT_TYPE_LATEST
Stage = Literal["decode", "queue", "infer", "total"]
Reason = Literal["full", "late", "left", "too_large", "slow", "unauthorised", "not_ready"]
"""Why a request was turned away: no place, past its deadline, the client left, too many bytes, too slow a body, no
valid key, starting, draining or without an engine process."""
Outcome = Literal["loaded", "replaced", "retired", "unchanged", "failed"]
"""What a reload did with one model version."""

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_CONFIDENCE = tuple(tenth / 10 for tenth in range(1, 11))
_IMAGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_CLASSES = (0.0, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_MODEL = ("model", "version", "precision")


class ModelLabels(NamedTuple):
    """The labels of a served model; its series carry the first three, ``ltkd_model_info`` all."""

    model: str
    version: str
    precision: str
    provider: str
    sha256: str

    @property
    def series(self) -> tuple[str, str, str]:
        """What tells the series of one model from those of another."""
        return self[:3]


class Histogram:
    """A histogram: how many values fell at or below each bound, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """The buckets as Prometheus has them."""
        reached, buckets = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            reached += count
            buckets.append((bound, float(reached)))
        return buckets


class GroupCounts:
    """What is counted of the predictions of one group."""

    __slots__ = ("confidence", "decisions", "feedback", "set_size")

    def __init__(self) -> None:
        self.confidence = Histogram(_CONFIDENCE)
        self.set_size = Histogram(_CLASSES)
        self.decisions: dict[str, int] = dict.fromkeys(DECISIONS, 0)
        self.feedback = [0, 0]  # of the true group's images: wrong, right


class ModelCounts:
    """What is counted of one model version, from its first request to the end of the process."""

    def __init__(self, groups: Sequence[str]) -> None:
        self.groups = {group: GroupCounts() for group in groups}  # one that is never predicted shows as zero
        self.stages: dict[str, Histogram] = {stage: Histogram(_SECONDS) for stage in get_args(Stage)}
        self.batches = Histogram(_IMAGES)
        self.restarts = 0


class ModelMetrics:
    """Watches one served model: what it answers, how long that takes, and how often its process died.

    Attributes:
        labels: Which model.
        window: Its most recent predictions.
        queue_depth: Images that wait for the model; asked at each scrape.
        alive: Whether its engine process is there; likewise.
    """

    def __init__(self, labels: ModelLabels, counts: ModelCounts, window: Window) -> None:
        self.labels = labels
        self.window = window
        self.queue_depth: Callable[[], int] = int
        self.alive: Callable[[], bool] = lambda: True
        self.counts = counts
        self._groups = list(counts.groups.values())

    def watch(
        self, images: Sequence[PredictionFacts | None], stage_seconds: Mapping[str, float], batch_size: int
    ) -> None:
        """Take in one answered request.

        Args:
            images: Its images; None in the place of one that was refused.
            stage_seconds: Wall time of the stages it went through.
            batch_size: Images of all requests that ran with its last one; 0 if nothing ran.
        """
        counts = self.counts
        for stage, seconds in stage_seconds.items():
            counts.stages[stage].add(seconds)
        if batch_size:
            counts.batches.add(batch_size)
        now = time.time()
        for image in images:
            if image is None:
                continue
            group = self._groups[image.group]
            group.confidence.add(image.confidence)
            group.set_size.add(image.set_size)
            group.decisions[image.decision] += 1
            self.window.add(image.group, image.confidence, image.decision == "abstain", now)

    def count_restart(self) -> None:
        """Count that the engine's process had died and was replaced."""
        self.counts.restarts += 1

    def count_feedback(self, true_group: int, right: bool) -> None:
        """Count what somebody said of an answer."""
        self._groups[true_group].feedback[right] += 1


class Telemetry:
    """Everything the service counts; handed to whoever has something to count."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._rejections: Counter[str] = Counter(dict.fromkeys(get_args(Reason), 0))
        self._reloads: Counter[str] = Counter(dict.fromkeys(get_args(Outcome), 0))
        self._counts: dict[tuple[str, ...], ModelCounts] = {}
        self._meters: dict[tuple[str, ...], ModelMetrics] = {}
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_Reader(self._families))

    def meter(self, labels: ModelLabels, groups: Sequence[str], window: Window) -> ModelMetrics:
        """Begin to show a model; one that replaces another of the same name and version goes on with its counts."""
        counts = self._counts.setdefault((*labels.series, *groups), ModelCounts(groups))
        self._meters[labels.series] = meter = ModelMetrics(labels, counts, window)
        return meter

    def retire(self, meter: ModelMetrics) -> None:
        """Show a model no longer, unless another has taken its place."""
        if self._meters.get(meter.labels.series) is meter:
            del self._meters[meter.labels.series]

    def count_request(self, route: str, status: int, reason: Reason | None) -> None:
        """Count an answered request, by the route's template and not by its path, and why it was turned away."""
        self._requests[route, status] += 1
        if reason:
            self._rejections[reason] += 1

    def num_rejected(self, reason: Reason) -> int:
        """How many requests were turned away for this reason so far."""
        return self._rejections[reason]

    def count_reload(self, outcome: Outcome) -> None:
        """Count what a reload did with one model version."""
        self._reloads[outcome] += 1

    def exposition(self) -> bytes:
        """Everything counted so far, in Prometheus' text form."""
        return generate_latest(self._registry)

    def _families(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("ltkd_requests", "Requests by route and status", labels=["route", "status"])
        for (route, status), count in self._requests.items():
            requests.add_metric([route, str(status)], count)
        yield requests
        yield _counter("ltkd_rejections", "Requests turned away, by reason", "reason", self._rejections)
        yield _counter("ltkd_reloads", "Model versions that a reload looked at, by outcome", "outcome", self._reloads)
        meters = list(self._meters.values())
        yield from _of_models(meters)
        yield from _of_groups(meters)
        yield from _of_windows(meters)


class _Reader(Collector):
    """Prometheus' view of numbers that lie elsewhere."""

    def __init__(self, families: Callable[[], Iterator[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return self._families()


def _counter(name: str, text: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family


def _of_models(meters: Sequence[ModelMetrics]) -> Iterator[Metric]:
    info = GaugeMetricFamily("ltkd_model_info", "The models that answer", labels=ModelLabels._fields)
    depth = GaugeMetricFamily("ltkd_queue_images", "Images that wait for the model", labels=_MODEL)
    alive = GaugeMetricFamily("ltkd_worker_alive", "1 while the engine's process is there", labels=_MODEL)
    restarts = CounterMetricFamily(
        "ltkd_worker_restarts", "Engine processes that died and were replaced", labels=_MODEL
    )
    batches = HistogramMetricFamily("ltkd_batch_images", "Images in the batch that a request ran in", labels=_MODEL)
    stages = HistogramMetricFamily("ltkd_stage_seconds", "Time in a stage of a request", labels=[*_MODEL, "stage"])
    for meter in meters:
        labels, counts = meter.labels.series, meter.counts
        info.add_metric(meter.labels, 1)
        depth.add_metric(labels, meter.queue_depth())
        alive.add_metric(labels, meter.alive())
        restarts.add_metric(labels, counts.restarts)
        batches.add_metric(labels, counts.batches.cumulative(), counts.batches.total)
        for stage, tally in counts.stages.items():
            stages.add_metric([*labels, stage], tally.cumulative(), tally.total)
    yield from (info, depth, alive, restarts, batches, stages)


def _of_groups(meters: Sequence[ModelMetrics]) -> Iterator[Metric]:
    by_group = [*_MODEL, "group"]
    predictions = CounterMetricFamily("ltkd_predictions", "Images by the group of the predicted class", labels=by_group)
    decisions = CounterMetricFamily(
        "ltkd_decisions", "Images by what the group's threshold made of them", labels=[*by_group, "decision"]
    )
    confidence = HistogramMetricFamily("ltkd_confidence", "Probability of the predicted class", labels=by_group)
    set_size = HistogramMetricFamily(
        "ltkd_prediction_set_classes", "ClassStatistics in the prediction set", labels=by_group
    )
    feedback = CounterMetricFamily(
        "ltkd_feedback", "Answers whose true label was told, by its group", labels=[*by_group, "outcome"]
    )
    for meter in meters:
        for group, counts in meter.counts.groups.items():
            labels = [*meter.labels.series, group]
            predictions.add_metric(labels, sum(counts.confidence.counts))
            for decision, count in counts.decisions.items():
                decisions.add_metric([*labels, decision], count)
            confidence.add_metric(labels, counts.confidence.cumulative(), counts.confidence.total)
            set_size.add_metric(labels, counts.set_size.cumulative(), counts.set_size.total)
            for outcome, count in zip(("wrong", "right"), counts.feedback, strict=True):
                feedback.add_metric([*labels, outcome], count)
    yield from (predictions, decisions, confidence, set_size, feedback)


_WINDOW_GAUGES: dict[str, tuple[str, Callable[[GroupSeen], float | None]]] = {
    "ltkd_window_predictions": ("Predictions of the group in the rolling window", lambda seen: seen.predictions),
    "ltkd_window_share": ("Share of the group in the rolling window", lambda seen: seen.share),
    "ltkd_certified_share": ("Share of the group among the certification images", lambda seen: seen.certified_share),
    "ltkd_group_vanishing": ("1 while the group is predicted far too rarely", lambda seen: seen.vanishing),
    "ltkd_confidence_psi": (
        "Drift of the group's confidence from certification",
        lambda seen: seen.confidence_drift.psi if seen.confidence_drift else None,
    ),
    "ltkd_confidence_psi_alarm": (
        "Drift of the group's confidence from which on it is more than chance",
        lambda seen: seen.confidence_drift.alarm_level if seen.confidence_drift else None,
    ),
}


def _of_windows(meters: Sequence[ModelMetrics]) -> Iterator[Metric]:
    reports = [(meter.labels.series, meter.window.report()) for meter in meters]
    for name, (text, value_of) in _WINDOW_GAUGES.items():
        family = GaugeMetricFamily(name, text, labels=[*_MODEL, "group"])
        for labels, report in reports:
            for seen in report.groups:
                value = value_of(seen)
                if value is not None:
                    family.add_metric([*labels, seen.group], value)
        yield family
    family = GaugeMetricFamily("ltkd_share_psi", "Drift of the groups' shares from certification", labels=_MODEL)
    alarm = GaugeMetricFamily(
        "ltkd_share_psi_alarm", "Drift of the groups' shares from which on it is more than chance", labels=_MODEL
    )
    for labels, report in reports:
        if report.share_drift:
            family.add_metric(labels, report.share_drift.psi)
            alarm.add_metric(labels, report.share_drift.alarm_level)
    yield from (family, alarm)
