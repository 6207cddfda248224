"""Metrics of the service, exported to Prometheus.

Requests are counted in plain numbers without a lock, so everything here must be used from the event loop's thread. The
counters of ``prometheus_client`` would cost a lookup and a lock for each update; instead, a collector reads the numbers
at each scrape.
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
from serve.monitoring.drift import GroupReport, Window

MEDIA_TYPE = CONTENT_TYPE_LATEST
Stage = Literal["decode", "queue", "infer", "total"]
Reason = Literal["full", "over_limit", "late", "left", "too_large", "slow", "unauthorised", "not_ready"]
"""Why a request was rejected: the queue is full, its key has sent more requests than its limit, its deadline passed,
the client disconnected, the body is too large or arrived too slowly, there is no valid key, or the service is starting,
draining or without an engine process."""
Outcome = Literal["loaded", "replaced", "retired", "unchanged", "failed"]
"""The outcome of a reload for one model version."""

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_CONFIDENCE = tuple(tenth / 10 for tenth in range(1, 11))
_IMAGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_CLASSES = (0.0, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_MODEL = ("model", "version", "precision")


class ModelLabels(NamedTuple):
    """The labels of a served model; its series have the first three, ``ltkd_model_info`` has all."""

    model: str
    version: str
    precision: str
    provider: str
    sha256: str

    @property
    def series(self) -> tuple[str, str, str]:
        """The labels that identify the series of one model."""
        return self[:3]


class Histogram:
    """A histogram: how many values fell at or below each bound, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Add one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """The buckets in Prometheus' form: each upper bound with the number of values up to it."""
        num_below, buckets = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            num_below += count
            buckets.append((bound, float(num_below)))
        return buckets


class GroupCounts:
    """Counts of the predictions of one group."""

    __slots__ = ("confidence", "decisions", "feedback", "set_size")

    def __init__(self) -> None:
        self.confidence = Histogram(_CONFIDENCE)
        self.set_size = Histogram(_CLASSES)
        self.decisions: dict[str, int] = dict.fromkeys(DECISIONS, 0)
        self.feedback = [0, 0]  # wrong and right answers, for images whose true class is in the group


class ModelCounts:
    """Counts of one model version, from its first request to the end of the process."""

    def __init__(self, groups: Sequence[str]) -> None:
        self.groups = {group: GroupCounts() for group in groups}  # a group that is never predicted is exported as zero
        self.stages: dict[str, Histogram] = {stage: Histogram(_SECONDS) for stage in get_args(Stage)}
        self.batches = Histogram(_IMAGES)
        self.restarts = 0


class ModelMetrics:
    """Metrics of one served model: its predictions, its stage times and the restarts of its engine processes.

    Attributes:
        labels: The labels of the model.
        window: Its most recent predictions.
        queue_depth: Returns the number of images accepted and not answered yet; called at each scrape.
        alive: Returns whether an engine process is ready; called at each scrape.
        counts: Counters and histograms; a replacement of the model with the same groups shares them.
    """

    def __init__(self, labels: ModelLabels, counts: ModelCounts, window: Window) -> None:
        self.labels = labels
        self.window = window
        self.queue_depth: Callable[[], int] = int
        self.alive: Callable[[], bool] = lambda: True
        self.counts = counts
        self._groups = list(counts.groups.values())

    def record_request(
        self, images: Sequence[PredictionFacts | None], stage_seconds: Mapping[str, float], batch_size: int
    ) -> None:
        """Count one answered request.

        Args:
            images: One entry per image; None for an image that was rejected.
            stage_seconds: Wall time of each stage of the request.
            batch_size: Images in the batch that its last image ran in; 0 if nothing ran.
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
        """Count an engine process that died and was replaced."""
        self.counts.restarts += 1

    def count_feedback(self, true_group: int, right: bool) -> None:
        """Count an answer with a known true label."""
        self._groups[true_group].feedback[right] += 1


class Telemetry:
    """All metrics of the service; one object is shared by everything that counts."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int, str]] = Counter()
        self._rejections: Counter[str] = Counter(dict.fromkeys(get_args(Reason), 0))
        self._reloads: Counter[str] = Counter(dict.fromkeys(get_args(Outcome), 0))
        self._counts: dict[tuple[str, ...], ModelCounts] = {}
        self._models: dict[tuple[str, ...], ModelMetrics] = {}
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_TelemetryCollector(self._families))

    def add_model(self, labels: ModelLabels, groups: Sequence[str], window: Window) -> ModelMetrics:
        """Start to export a model. A model that replaces one of the same name and version continues its counts."""
        counts = self._counts.setdefault((*labels.series, *groups), ModelCounts(groups))
        self._models[labels.series] = model = ModelMetrics(labels, counts, window)
        return model

    def remove_model(self, model: ModelMetrics) -> None:
        """Stop exporting a model, unless another one has replaced it."""
        if self._models.get(model.labels.series) is model:
            del self._models[model.labels.series]

    def count_request(self, route: str, status: int, reason: Reason | None, key: str = "") -> None:
        """Count an answered request.

        Args:
            route: The template of the route, not the path, which is text from the client.
            status: Of the response.
            reason: Why it was rejected; None if it was not.
            key: The name of the client's API key; empty without a valid one, so that clients cannot create series.
        """
        self._requests[route, status, key] += 1
        if reason:
            self._rejections[reason] += 1

    def count_reload(self, outcome: Outcome) -> None:
        """Count the outcome of a reload for one model version."""
        self._reloads[outcome] += 1

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _families(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "ltkd_requests", "Requests by route, status and name of the API key", labels=["route", "status", "key"]
        )
        for (route, status, key), count in self._requests.items():
            requests.add_metric([route, str(status), key], count)
        yield requests
        yield _counter("ltkd_rejections", "Rejected requests by reason", "reason", self._rejections)
        yield _counter("ltkd_reloads", "Model versions in reloads, by outcome", "outcome", self._reloads)
        models = list(self._models.values())
        yield from _model_families(models)
        yield from _group_families(models)
        yield from _window_families(models)


class _TelemetryCollector(Collector):
    """Reads the metrics at each scrape."""

    def __init__(self, families: Callable[[], Iterator[Metric]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return self._families()


def _counter(name: str, text: str, label: str, counts: Mapping[str, int]) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family


def _model_families(models: Sequence[ModelMetrics]) -> Iterator[Metric]:
    info = GaugeMetricFamily("ltkd_model_info", "The served models", labels=ModelLabels._fields)
    depth = GaugeMetricFamily("ltkd_queue_images", "Images accepted and not answered yet", labels=_MODEL)
    alive = GaugeMetricFamily("ltkd_worker_alive", "1 while an engine process is ready", labels=_MODEL)
    restarts = CounterMetricFamily(
        "ltkd_worker_restarts", "Engine processes that died and were replaced", labels=_MODEL
    )
    batches = HistogramMetricFamily("ltkd_batch_images", "Images in the last batch of a request", labels=_MODEL)
    stages = HistogramMetricFamily("ltkd_stage_seconds", "Duration of a stage of a request", labels=[*_MODEL, "stage"])
    for model in models:
        labels, counts = model.labels.series, model.counts
        info.add_metric(model.labels, 1)
        depth.add_metric(labels, model.queue_depth())
        alive.add_metric(labels, model.alive())
        restarts.add_metric(labels, counts.restarts)
        batches.add_metric(labels, counts.batches.cumulative(), counts.batches.total)
        for stage, histogram in counts.stages.items():
            stages.add_metric([*labels, stage], histogram.cumulative(), histogram.total)
    yield from (info, depth, alive, restarts, batches, stages)


def _group_families(models: Sequence[ModelMetrics]) -> Iterator[Metric]:
    by_group = [*_MODEL, "group"]
    predictions = CounterMetricFamily("ltkd_predictions", "Images by the group of the predicted class", labels=by_group)
    decisions = CounterMetricFamily(
        "ltkd_decisions", "Images by the decision of the group's threshold", labels=[*by_group, "decision"]
    )
    confidence = HistogramMetricFamily("ltkd_confidence", "Probability of the predicted class", labels=by_group)
    set_size = HistogramMetricFamily("ltkd_prediction_set_classes", "Classes in the prediction set", labels=by_group)
    feedback = CounterMetricFamily(
        "ltkd_feedback", "Answers with a known true label, by the group of that label", labels=[*by_group, "outcome"]
    )
    for model in models:
        for group, counts in model.counts.groups.items():
            labels = [*model.labels.series, group]
            predictions.add_metric(labels, sum(counts.confidence.counts))
            for decision, count in counts.decisions.items():
                decisions.add_metric([*labels, decision], count)
            confidence.add_metric(labels, counts.confidence.cumulative(), counts.confidence.total)
            set_size.add_metric(labels, counts.set_size.cumulative(), counts.set_size.total)
            for outcome, count in zip(("wrong", "right"), counts.feedback, strict=True):
                feedback.add_metric([*labels, outcome], count)
    yield from (predictions, decisions, confidence, set_size, feedback)


_WINDOW_GAUGES: dict[str, tuple[str, Callable[[GroupReport], float | None]]] = {
    "ltkd_window_predictions": ("Predictions of the group in the rolling window", lambda group: group.predictions),
    "ltkd_window_share": ("Share of the group in the rolling window", lambda group: group.share),
    "ltkd_certified_share": ("Share of the group among the certification images", lambda group: group.certified_share),
    "ltkd_group_vanishing": ("1 while the group is predicted significantly too rarely", lambda group: group.vanishing),
    "ltkd_confidence_psi": (
        "PSI of the group's confidence against certification",
        lambda group: group.confidence_drift.psi if group.confidence_drift else None,
    ),
    "ltkd_confidence_psi_alarm": (
        "PSI above which the drift of the group's confidence raises an alarm",
        lambda group: group.confidence_drift.alarm_level if group.confidence_drift else None,
    ),
}


def _window_families(models: Sequence[ModelMetrics]) -> Iterator[Metric]:
    reports = [(model.labels.series, model.window.report()) for model in models]
    for name, (text, value_of) in _WINDOW_GAUGES.items():
        family = GaugeMetricFamily(name, text, labels=[*_MODEL, "group"])
        for labels, report in reports:
            for group in report.groups:
                value = value_of(group)
                if value is not None:
                    family.add_metric([*labels, group.group], value)
        yield family
    family = GaugeMetricFamily("ltkd_share_psi", "PSI of the groups' shares against certification", labels=_MODEL)
    alarm = GaugeMetricFamily(
        "ltkd_share_psi_alarm", "PSI above which the drift of the groups' shares raises an alarm", labels=_MODEL
    )
    for labels, report in reports:
        if report.share_drift:
            family.add_metric(labels, report.share_drift.psi)
            alarm.add_metric(labels, report.share_drift.alarm_level)
    yield from (family, alarm)
