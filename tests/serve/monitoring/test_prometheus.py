"""The exported metrics, and the Grafana dashboard that uses them."""

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_toys import GROUPS, toy_calibration

from serve.engine.answers import Decision
from serve.engine.messages import PredictionFacts
from serve.monitoring.drift import Window
from serve.monitoring.prometheus import ModelLabels, ModelMetrics, Telemetry

DASHBOARD = Path(__file__).parents[3] / "docs" / "grafana.json"
TOY = ModelLabels("toy", "1", "fp32", "CPUExecutionProvider", "f" * 64)
STAGES = {"decode": 0.002, "queue": 0.0, "infer": 0.03, "total": 0.04}


def prediction(
    group: int, confidence: float = 0.75, decision: Decision = "accept", set_size: int = 2
) -> PredictionFacts:
    return PredictionFacts(group=group, label=2 * group, confidence=confidence, decision=decision, set_size=set_size)


def toy_metrics(telemetry: Telemetry, labels: ModelLabels = TOY) -> ModelMetrics:
    return telemetry.add_model(labels, GROUPS.names, Window(toy_calibration(), 100))


def samples(telemetry: Telemetry) -> dict[str, float]:
    """Every sample by ``name{labels, sorted by name}``, without the labels model and precision."""
    found = {}
    for family in text_string_to_metric_families(telemetry.exposition().decode()):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name not in ("model", "precision")}
            found[f"{sample.name}{{{','.join(f'{name}={labels[name]}' for name in sorted(labels))}}}"] = sample.value
    return found


def test_requests_rejections_and_reloads_are_counted() -> None:
    telemetry = Telemetry()
    for status in (200, 200, 415):
        telemetry.count_request("/v1/classify", status, None)
    telemetry.count_request("/v1/classify", 429, "full")
    telemetry.count_reload("failed")
    found = samples(telemetry)
    assert found["ltkd_requests_total{key=,route=/v1/classify,status=200}"] == 2
    assert found["ltkd_requests_total{key=,route=/v1/classify,status=415}"] == 1
    assert (found["ltkd_rejections_total{reason=full}"], found["ltkd_rejections_total{reason=late}"]) == (1, 0)
    assert (found["ltkd_reloads_total{outcome=failed}"], found["ltkd_reloads_total{outcome=replaced}"]) == (1, 0)


def test_requests_are_counted_by_the_name_of_the_key() -> None:
    telemetry = Telemetry()
    telemetry.count_request("/v1/classify", 200, None, "camera-3")
    telemetry.count_request("/v1/classify", 429, "over_limit", "camera-3")
    telemetry.count_request("/v1/classify", 200, None, "camera-4")
    found = samples(telemetry)
    assert found["ltkd_requests_total{key=camera-3,route=/v1/classify,status=200}"] == 1
    assert found["ltkd_requests_total{key=camera-3,route=/v1/classify,status=429}"] == 1
    assert found["ltkd_requests_total{key=camera-4,route=/v1/classify,status=200}"] == 1
    assert (found["ltkd_rejections_total{reason=over_limit}"], found["ltkd_rejections_total{reason=full}"]) == (1, 0)


def test_a_request_is_counted_by_stage_by_batch_and_by_group() -> None:
    telemetry = Telemetry()
    toy_metrics(telemetry).record_request([prediction(2, 0.31, "abstain", 4), None, prediction(0)], STAGES, 8)
    found = samples(telemetry)
    assert found["ltkd_stage_seconds_sum{stage=infer,version=1}"] == 0.03
    assert found["ltkd_stage_seconds_bucket{le=0.0005,stage=queue,version=1}"] == 1
    assert found["ltkd_batch_images_bucket{le=4.0,version=1}"] == 0
    assert found["ltkd_batch_images_bucket{le=8.0,version=1}"] == 1
    assert [found[f"ltkd_predictions_total{{group={group},version=1}}"] for group in GROUPS.names] == [1, 0, 1]
    assert found["ltkd_confidence_sum{group=tail,version=1}"] == 0.31
    assert found["ltkd_confidence_bucket{group=tail,le=0.3,version=1}"] == 0
    assert found["ltkd_confidence_bucket{group=tail,le=0.4,version=1}"] == 1
    assert found["ltkd_decisions_total{decision=abstain,group=tail,version=1}"] == 1
    assert found["ltkd_decisions_total{decision=abstain,group=head,version=1}"] == 0
    assert found["ltkd_prediction_set_classes_sum{group=tail,version=1}"] == 4
    assert found["ltkd_window_predictions{group=tail,version=1}"] == 1


def test_groups_that_are_never_predicted_are_exported_as_zero() -> None:
    telemetry = Telemetry()
    toy_metrics(telemetry)
    found = samples(telemetry)
    for group in GROUPS.names:
        assert found[f"ltkd_predictions_total{{group={group},version=1}}"] == 0
        assert found[f"ltkd_group_vanishing{{group={group},version=1}}"] == 0
    assert not any(name.startswith("ltkd_confidence_psi") for name in found)  # an unknown value is not zero


def test_queue_depth_and_liveness_are_read_at_each_scrape() -> None:
    telemetry = Telemetry()
    toy_metrics(telemetry).watch(lambda: 17, lambda: False)
    found = samples(telemetry)
    assert (found["ltkd_queue_images{version=1}"], found["ltkd_worker_alive{version=1}"]) == (17, 0)


def test_the_model_info_has_the_hash_and_the_provider() -> None:
    telemetry = Telemetry()
    toy_metrics(telemetry)
    assert samples(telemetry)[f"ltkd_model_info{{provider=CPUExecutionProvider,sha256={'f' * 64},version=1}}"] == 1


def test_a_replacement_bundle_continues_the_counters_and_starts_a_new_window() -> None:
    telemetry = Telemetry()
    old = toy_metrics(telemetry)
    old.record_request([prediction(0)], STAGES, 1)
    new = toy_metrics(telemetry, TOY._replace(sha256="0" * 64))
    telemetry.remove_model(old)
    new.record_request([prediction(0)], STAGES, 1)
    old.record_request([prediction(0)], STAGES, 1)  # requests that it had accepted are answered after the replacement
    found = samples(telemetry)
    assert found["ltkd_predictions_total{group=head,version=1}"] == 3
    assert found["ltkd_window_predictions{group=head,version=1}"] == 1
    assert f"ltkd_model_info{{provider=CPUExecutionProvider,sha256={'0' * 64},version=1}}" in found
    assert not any("f" * 64 in name for name in found)


def test_a_retired_version_is_no_longer_exported() -> None:
    telemetry = Telemetry()
    toy_metrics(telemetry)
    telemetry.remove_model(toy_metrics(telemetry, TOY._replace(version="2")))
    found = samples(telemetry)
    assert any("version=1" in name for name in found)
    assert not any("version=2" in name for name in found)


def test_every_metric_name_has_the_prefix_and_a_base_unit() -> None:
    telemetry = Telemetry()
    toy_metrics(telemetry).record_request([prediction(0)], STAGES, 1)
    names = {family.name for family in text_string_to_metric_families(telemetry.exposition().decode())}
    assert all(name.startswith(("ltkd_", "process_")) for name in names)
    assert not any(re.search(r"_(ms|milliseconds|percent|kb|mb)(_|$)", name) for name in names)


def test_special_characters_in_a_model_name_are_escaped() -> None:
    telemetry = Telemetry()
    toy_metrics(telemetry, TOY._replace(model='a"b\nc\\d'))
    (info,) = [
        family for family in text_string_to_metric_families(telemetry.exposition().decode())
        if family.name == "ltkd_model_info"
    ]  # fmt: skip
    assert info.samples[0].labels["model"] == 'a"b\nc\\d'


def panels_of(dashboard: dict[str, object]) -> list[dict[str, object]]:
    panels = dashboard["panels"]
    assert isinstance(panels, list)
    return panels


def test_the_dashboard_uses_only_exported_metrics() -> None:
    telemetry = Telemetry()
    metrics = toy_metrics(telemetry)
    metrics.record_request([prediction(group) for group in range(3)], STAGES, 1)
    exported = {
        sample.name
        for family in text_string_to_metric_families(telemetry.exposition().decode())
        for sample in family.samples
    } | {"ltkd_requests_total"}
    text = DASHBOARD.read_text()
    used = set(re.findall(r"\b(?:ltkd|process)_\w+", text))
    assert used <= exported
    assert len(used) >= 15


def test_the_dashboard_has_what_grafana_needs_to_import_it() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert (dashboard["uid"], dashboard["title"]) == ("ltkd", "ltkd")
    assert len({panel["id"] for panel in panels_of(dashboard)}) == len(panels_of(dashboard))
    for panel in panels_of(dashboard):
        position = panel["gridPos"]
        assert isinstance(position, dict)
        assert position["x"] + position["w"] <= 24
    source = {"type": "prometheus", "uid": "${source}"}
    charts = [panel for panel in panels_of(dashboard) if panel["type"] != "row"]
    assert charts
    assert all(panel["datasource"] == source and panel["targets"] and panel["description"] for panel in charts)


def test_an_unknown_stage_is_a_key_error_and_not_a_new_series() -> None:
    with pytest.raises(KeyError):
        toy_metrics(Telemetry()).record_request([], {"lunch": 1.0}, 0)
