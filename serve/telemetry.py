"""What the service counts, in a registry of its own, as Prometheus reads it."""

from collections.abc import Mapping, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.answers import Answer, ModelRef, Refused

MEDIA_TYPE = CONTENT_TYPE_LATEST
STAGES = ("decode", "infer")
_STAGE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_CONFIDENCE_BUCKETS = tuple(tenth / 10 for tenth in range(1, 11))


class Telemetry:
    """Counts requests, times stages, and watches what is predicted in each group of classes."""

    def __init__(self, model: ModelRef, groups: Sequence[str]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "ltkd_requests", "Requests by route and status", ["route", "status"], registry=self._registry
        )
        self._stages = Histogram(
            "ltkd_stage_seconds", "Time in a stage of a request", ["stage"],
            buckets=_STAGE_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self._predictions = Counter(
            "ltkd_predictions", "Images by the group of the predicted class", ["group"], registry=self._registry
        )
        self._confidence = Histogram(
            "ltkd_confidence", "Probability of the predicted class, by its group", ["group"],
            buckets=_CONFIDENCE_BUCKETS, registry=self._registry,
        )  # fmt: skip
        facts = Gauge("ltkd_model_info", "The model that answers", list(ModelRef.model_fields), registry=self._registry)
        facts.labels(**model.model_dump()).set(1)
        for stage in STAGES:
            self._stages.labels(stage)
        for group in groups:  # a group that is never predicted must show as zero, not be absent
            self._predictions.labels(group)
            self._confidence.labels(group)

    def count_request(self, route: str, status: int) -> None:
        """Count an answered request."""
        self._requests.labels(route, str(status)).inc()

    def watch(self, results: Sequence[Answer | Refused], stage_seconds: Mapping[str, float]) -> None:
        """Take in the results of one classify request."""
        for stage, seconds in stage_seconds.items():
            self._stages.labels(stage).observe(seconds)
        for result in results:
            if isinstance(result, Answer):
                self._predictions.labels(result.group).inc()
                self._confidence.labels(result.group).observe(result.probability)

    def exposition(self) -> bytes:
        """Everything counted so far, in Prometheus' text form."""
        return generate_latest(self._registry)
