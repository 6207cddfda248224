"""Metrics of the service, exported to Prometheus.

The children of ``prometheus_client``'s counters and histograms are looked up once per model; an update of one takes
about a microsecond. Shares and drift are computed from the window at each scrape.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
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


class Series:
    """The metrics whose series belong to one model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        by_group = (*_MODEL, "group")
        self.info = Gauge("ltkd_model_info", "The served models", ModelLabels._fields, registry=registry)
        self.queue_images = Gauge(
            "ltkd_queue_images", "Images accepted and not answered yet", _MODEL, registry=registry
        )
        self.alive = Gauge("ltkd_worker_alive", "1 while an engine process is ready", _MODEL, registry=registry)
        self.restarts = Counter(
            "ltkd_worker_restarts", "Engine processes that died and were replaced", _MODEL, registry=registry
        )
        self.batch_images = Histogram(
            "ltkd_batch_images", "Images in the last batch of a request", _MODEL, buckets=_IMAGES, registry=registry
        )
        self.stage_seconds = Histogram(
            "ltkd_stage_seconds", "Duration of a stage of a request", (*_MODEL, "stage"), buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.predictions = Counter(
            "ltkd_predictions", "Images by the group of the predicted class", by_group, registry=registry
        )
        self.decisions = Counter(
            "ltkd_decisions", "Images by the decision of the group's threshold", (*by_group, "decision"),
            registry=registry,
        )  # fmt: skip
        self.confidence = Histogram(
            "ltkd_confidence", "Probability of the predicted class", by_group, buckets=_CONFIDENCE, registry=registry
        )
        self.set_classes = Histogram(
            "ltkd_prediction_set_classes", "Classes in the prediction set", by_group, buckets=_CLASSES,
            registry=registry,
        )  # fmt: skip
        self.feedback = Counter(
            "ltkd_feedback", "Answers with a known true label, by the group of that label", (*by_group, "outcome"),
            registry=registry,
        )  # fmt: skip

    def remove(self, labels: "ModelLabels") -> None:
        """Stop exporting a model."""
        for metric in vars(self).values():
            metric.remove_by_labels(dict(zip(_MODEL, labels.series, strict=True)))


class GroupSeries:
    """The series of one group of a model. All exist from the start: a group that is never predicted is zero."""

    def __init__(self, series: Series, labels: tuple[str, ...]) -> None:
        self.predictions = series.predictions.labels(*labels)
        self.confidence = series.confidence.labels(*labels)
        self.set_classes = series.set_classes.labels(*labels)
        self.decisions = {decision: series.decisions.labels(*labels, decision) for decision in DECISIONS}
        self.feedback = [series.feedback.labels(*labels, outcome) for outcome in ("wrong", "right")]


class ModelMetrics:
    """Metrics of one served model: its predictions, its stage times and the restarts of its engine processes.

    Attributes:
        labels: The labels of the model.
        window: Its most recent predictions.
    """

    def __init__(self, labels: ModelLabels, series: Series, groups: Sequence[str], window: Window) -> None:
        self.labels = labels
        self.window = window
        self._series = series
        self._groups = [GroupSeries(series, (*labels.series, group)) for group in groups]
        self._stages = {stage: series.stage_seconds.labels(*labels.series, stage) for stage in get_args(Stage)}
        self._batch_images = series.batch_images.labels(*labels.series)
        self._restarts = series.restarts.labels(*labels.series)
        series.info.labels(*labels).set(1)
        self.watch(int, lambda: True)

    def watch(self, queue_images: Callable[[], int], alive: Callable[[], bool]) -> None:
        """Read the number of images accepted and not answered yet, and the liveness, at each scrape."""
        self._series.queue_images.labels(*self.labels.series).set_function(queue_images)
        self._series.alive.labels(*self.labels.series).set_function(alive)

    def record_request(
        self, images: Sequence[PredictionFacts | None], stage_seconds: Mapping[str, float], batch_size: int
    ) -> None:
        """Count one answered request.

        Args:
            images: One entry per image; None for an image that was rejected.
            stage_seconds: Wall time of each stage of the request.
            batch_size: Images in the batch that its last image ran in; 0 if nothing ran.
        """
        for stage, seconds in stage_seconds.items():
            self._stages[stage].observe(seconds)
        if batch_size:
            self._batch_images.observe(batch_size)
        now = time.time()
        for image in images:
            if image is None:
                continue
            group = self._groups[image.group]
            group.predictions.inc()
            group.confidence.observe(image.confidence)
            group.set_classes.observe(image.set_size)
            group.decisions[image.decision].inc()
            self.window.add(image.group, image.confidence, image.decision == "abstain", now)

    def record_total(self, seconds: float) -> None:
        """Record the time from the head of a request to its response."""
        self._stages["total"].observe(seconds)

    def count_restart(self) -> None:
        """Count an engine process that died and was replaced."""
        self._restarts.inc()

    def count_feedback(self, true_group: int, right: bool) -> None:
        """Count an answer with a known true label."""
        self._groups[true_group].feedback[right].inc()


class Telemetry:
    """All metrics of the service; one object is shared by everything that counts."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "ltkd_requests", "Requests by route, status and name of the API key", ("route", "status", "key"),
            registry=registry,
        )  # fmt: skip
        self._rejections = Counter("ltkd_rejections", "Rejected requests by reason", ("reason",), registry=registry)
        self._reloads = Counter(
            "ltkd_reloads", "Model versions in reloads, by outcome", ("outcome",), registry=registry
        )
        for reason in get_args(Reason):
            self._rejections.labels(reason)
        for outcome in get_args(Outcome):
            self._reloads.labels(outcome)
        self._series = Series(registry)
        self._models: dict[tuple[str, ...], ModelMetrics] = {}
        registry.register(_WindowCollector(self._models))

    def add_model(self, labels: ModelLabels, groups: Sequence[str], window: Window) -> ModelMetrics:
        """Start to export a model. A model that replaces one of the same name and version continues its counts."""
        if before := self._models.get(labels.series):
            self._series.info.remove(*before.labels)
        self._models[labels.series] = model = ModelMetrics(labels, self._series, groups, window)
        return model

    def remove_model(self, model: ModelMetrics) -> None:
        """Stop exporting a model, unless another one has replaced it."""
        if self._models.get(model.labels.series) is model:
            del self._models[model.labels.series]
            self._series.remove(model.labels)

    def count_request(self, route: str, status: int, reason: Reason | None, key: str = "") -> None:
        """Count an answered request.

        Args:
            route: The template of the route, not the path, which is text from the client.
            status: Of the response.
            reason: Why it was rejected; None if it was not.
            key: The name of the client's API key; empty without a valid one, so that clients cannot create series.
        """
        self._requests.labels(route, status, key).inc()
        if reason:
            self._rejections.labels(reason).inc()

    def count_reload(self, outcome: Outcome) -> None:
        """Count the outcome of a reload for one model version."""
        self._reloads.labels(outcome).inc()

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _WindowCollector(Collector):
    """Reads the windows of all models at each scrape."""

    def __init__(self, models: Mapping[tuple[str, ...], ModelMetrics]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        return _window_families(list(self._models.values()))


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
