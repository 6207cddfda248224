"""Routes, problems, headers, metrics and the OpenAPI description."""

import base64
import io
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from serve_toys import (
    CLASS_NAMES,
    SIZE_PX,
    TASK,
    blocked_engine,
    encoded,
    expected_logits,
    running,
    toy_app,
    toy_engine,
    toy_pixels,
    toy_process,
    write_toy_bundle,
)

from ltkd.contract.image_decoding import decode_image
from ltkd.contract.preprocessing import Preprocessing
from ltkd.data.datasets import data_config, load_dataset
from serve.api.app import create_app
from serve.http.service import Service
from serve.pool.dispatcher import EnginePool
from serve.pool.engine_process import ChildProcess
from serve.settings import Settings
from tests.serve.http.test_bodies import problem

PNG = encoded(toy_pixels(3))


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with running(toy_app()) as client:
        yield client


def test_an_answer_names_its_model_and_its_groups(client: httpx.Client) -> None:
    body = client.post("/v1/classify", content=PNG).json()
    assert body["model"] == {
        "name": "toy",
        "version": "1",
        "precision": "fp32",
        "provider": "ToyProvider",
        "sha256": "f" * 64,
    }
    (result,) = body["results"]
    # float64 rounding of a few terms
    assert sum(result["group_confidence"].values()) == pytest.approx(1, abs=1e-12)
    assert list(result["group_confidence"]) == ["head", "medium", "tail"]
    assert result["top_k"][0] == {key: result[key] for key in ("label", "class_index", "probability", "group")}


def test_the_client_chooses_top_k(client: httpx.Client) -> None:
    def listed(query: str) -> int:
        return len(client.post(f"/v1/classify{query}", content=PNG).json()["results"][0]["top_k"])

    assert [listed(""), listed("?top_k=1"), listed("?top_k=1000")] == [5, 1, len(CLASS_NAMES)]


@pytest.mark.parametrize("top_k", ["0", "-1", "five", ""])
def test_a_top_k_that_is_not_a_positive_number_is_400(client: httpx.Client, top_k: str) -> None:
    assert "top_k" in problem(client.post(f"/v1/classify?top_k={top_k}", content=PNG), 400)


def test_the_model_route_has_the_manifest_and_the_preprocessing(client: httpx.Client) -> None:
    body = client.get("/v1/model").json()
    assert body["model"]["provider"] == "ToyProvider"
    assert body["nodes"] == {"num_nodes": {"ToyProvider": 1}, "shape_nodes": []}
    rules = body["preprocessing"].pop("rules")
    assert "the centre square is resized bilinearly, after a JPEG was decoded at 1/2, 1/4 or 1/8" in rules
    assert body["preprocessing"] == {
        "formats": ["JPEG", "PNG", "WEBP"],
        "input_px": 8,
        "interpolation": "bilinear",
        "crop_ratio": 1,
        "jpeg_scaling": "twice",
        "max_pixels": 25_000_000,
        "max_header_pixels": 89_478_485,
    }
    assert body["manifest"]["task"]["class_names"] == list(CLASS_NAMES)


def test_a_photograph_gets_the_logits_of_the_pixels_that_training_evaluates(
    client: httpx.Client, tmp_path: Path
) -> None:
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8))
    content = encoded(np.asarray(coarse.resize((800, 600), Image.Resampling.BICUBIC)), "JPEG")
    for folder in (f"{split}/{name}" for split in ("train", "test") for name in "abc"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "photograph.jpg").write_bytes(content)
    data = load_dataset(data_config(str(tmp_path), None, "share", SIZE_PX))
    assert data.task.preprocessing == TASK.preprocessing
    expected_C = expected_logits(data.test_images[:1])[0]
    whole = decode_image(content, Preprocessing(input_px=SIZE_PX, jpeg_scaling="none")).pixels_SS3
    assert not np.array_equal(expected_logits(whole[None])[0], expected_C)  # shows that the decoder scaled
    tensor = {
        "name": "image_bytes",
        "shape": [1],
        "datatype": "BYTES",
        "data": [base64.b64encode(content).decode()],
    }
    body = {"inputs": [tensor], "outputs": [{"name": "logits"}]}
    (output,) = client.post("/v2/models/toy/infer", json=body).json()["outputs"]
    np.testing.assert_array_equal(np.float32(output["data"]), expected_C)


@pytest.mark.parametrize(
    ("kind", "side_px", "status"), [("WEBP", 7071, 422), ("PNG", 7071, 422), ("WEBP", 4000, 200), ("JPEG", 7071, 200)]
)
def test_pixels_are_counted_as_they_are_decoded(client: httpx.Client, kind: str, side_px: int, status: int) -> None:
    options = {"lossless": True, "quality": 0, "method": 0} if kind == "WEBP" else {}
    file = io.BytesIO()
    Image.new("L", (side_px, side_px)).save(file, kind, **options)
    response = client.post("/v1/classify", content=file.getvalue())
    if status == 200:
        assert response.status_code == 200
    else:
        assert "7071 x 7071 pixels (the limit is 25,000,000)" in problem(response, status)


def test_the_health_checks_list_the_models(client: httpx.Client) -> None:
    assert client.get("/livez").json() == {"status": "alive"}
    ready = client.get("/readyz").json()
    (model,) = ready["models"]
    assert (ready["status"], model["provider"], model["sha256"]) == ("ready", "ToyProvider", "f" * 64)
    assert ready["unavailable"] == []


def test_readiness_is_that_of_any_model_and_the_others_are_named(tmp_path: Path) -> None:
    processes: dict[str, list[ChildProcess]] = {"birds": [], "cars": []}

    async def start_pool(path: Path) -> EnginePool:
        def start_process() -> ChildProcess:
            if processes[path.name]:
                raise OSError("out of memory")
            processes[path.name].append(toy_process(toy_engine()))
            return processes[path.name][0]

        return await EnginePool.start([start_process], Settings())

    for name in processes:
        write_toy_bundle(tmp_path / name)
    service = Service(tmp_path, Settings(delay_seconds=0), start_pool)
    with running(create_app(service)) as client:
        processes["birds"][0].kill()
        while "out of memory" not in client.get("/readyz").text:
            pass
        ready = client.get("/readyz").json()
        (birds,) = ready["unavailable"]
        assert (len(ready["models"]), birds["name"], birds["version"]) == (1, "birds", "1")
        assert client.get("/v2/health/ready").status_code == 200
        for path in ("ready", "versions/1/ready"):
            assert client.get(f"/v2/models/cars/{path}").status_code == 200
            not_ready = client.get(f"/v2/models/birds/{path}")
            assert (not_ready.status_code, not_ready.headers["retry-after"]) == (503, "1")
            assert "birds version 1 is not ready" in not_ready.json()["error"]
        index = client.post("/v2/repository/index").json()
        assert [(entry["name"], entry["state"], "out of memory" in entry["reason"]) for entry in index] == [
            ("birds", "UNAVAILABLE", True),
            ("cars", "READY", False),
        ]
        assert client.post("/v1/classify?model=cars", content=PNG).status_code == 200
        assert "out of memory" in problem(client.post("/v1/classify?model=birds", content=PNG), 503)

        processes["cars"][0].kill()
        while client.get("/readyz").status_code == 200:
            pass
        while "cars version 1: no engine process could be started" not in (detail := client.get("/readyz").text):
            assert "birds version 1: no engine process could be started" in detail
        assert "no model can answer" in client.get("/v2/health/ready").json()["error"]
        assert client.get("/livez").status_code == 200


def test_requests_before_the_service_is_ready_are_503() -> None:
    with running(toy_app(), lifespan="off") as client:
        assert "not ready" in problem(client.get("/readyz"), 503)
        assert "not ready" in problem(client.post("/v1/classify", content=PNG), 503)
        assert client.get("/livez").status_code == 200


def test_a_path_that_does_not_exist_is_a_problem(client: httpx.Client) -> None:
    assert "/v1/clasify" in problem(client.post("/v1/clasify", content=PNG), 404)


def test_a_path_with_a_slash_at_its_end_is_not_redirected_to_the_host_that_the_request_names(
    client: httpx.Client,
) -> None:
    response = client.post("/v1/classify/", content=encoded(toy_pixels(1)), headers={"Host": "elsewhere.example"})
    problem(response, 404)
    assert "location" not in response.headers


def test_a_method_that_is_not_allowed_is_a_problem_that_names_the_allowed_one(client: httpx.Client) -> None:
    response = client.get("/v1/classify")
    assert "it allows POST" in problem(response, 405)
    assert response.headers["allow"] == "POST"


def test_an_internal_error_is_500_without_details_and_the_log_has_the_cause(caplog: pytest.LogCaptureFixture) -> None:
    with running(toy_app(toy_engine(fails=True))) as client, caplog.at_level(logging.ERROR):
        response = client.post("/v1/classify", content=PNG, headers={"X-Request-ID": "abc-1"})
        problem(response, 500)
        assert response.headers["x-request-id"] == "abc-1"
        assert "secret" not in response.text
        assert client.get("/readyz").status_code == 200
    assert "a secret internal detail" in caplog.text
    assert "abc-1" in caplog.text


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/classify"), ("GET", "/livez"), ("GET", "/metrics"), ("GET", "/nowhere"), ("GET", "/v1/classify")],
)
def test_every_response_has_a_request_id_and_the_provider(client: httpx.Client, method: str, path: str) -> None:
    response = client.request(method, path, headers={"X-Request-ID": "mine.1"})
    assert response.headers["x-request-id"] == "mine.1"
    assert response.headers["x-ltkd-provider"] == "ToyProvider"
    without_id = client.request(method, path)
    assert without_id.headers["x-request-id"] not in ("", client.request(method, path).headers["x-request-id"])


@pytest.mark.parametrize("invalid", ["a b", "x" * 129, '"><script>'])
def test_an_invalid_request_id_is_replaced(client: httpx.Client, invalid: str) -> None:
    assert client.get("/livez", headers={"X-Request-ID": invalid}).headers["x-request-id"] != invalid


def test_the_stages_are_timed_in_a_header(client: httpx.Client) -> None:
    timing = client.post("/v1/classify", content=PNG).headers["server-timing"]
    stages = dict(part.split(";dur=") for part in timing.split(", "))
    assert set(stages) == {"decode", "queue", "infer"}
    assert all(float(milliseconds) >= 0 for milliseconds in stages.values())


def test_metrics_count_requests_stages_and_groups() -> None:
    with running(toy_app()) as client:
        group = client.post("/v1/classify", content=PNG).json()["results"][0]["group"]
        client.post("/v1/classify", content=b"text")
        client.get("/nowhere")
        response = client.get("/metrics")
    lines = response.text.splitlines()
    assert response.headers["content-type"].startswith("text/plain")
    assert 'ltkd_requests_total{key="",route="/v1/classify",status="200"} 1.0' in lines
    assert 'ltkd_requests_total{key="",route="/v1/classify",status="415"} 1.0' in lines
    assert 'ltkd_requests_total{key="",route="none",status="404"} 1.0' in lines
    model = 'model="toy",precision="fp32",version="1"'
    sorted_lines = [sorted_labels(line) for line in lines]
    for stage, num in {"decode": 2, "queue": 1, "infer": 1, "total": 1}.items():  # the text ended while decoding
        labels = f'model="toy",precision="fp32",stage="{stage}",version="1"'
        assert f"ltkd_stage_seconds_count{{{labels}}} {num}.0" in sorted_lines
    for name in ("head", "medium", "tail"):  # groups without predictions are reported as zero
        labels = f'group="{name}",{model}'
        assert f"ltkd_predictions_total{{{labels}}} {float(name == group)}" in sorted_lines
        assert f"ltkd_confidence_count{{{labels}}} {float(name == group)}" in sorted_lines


def test_answers_and_their_feedback_are_counted_by_group_for_both_protocols() -> None:
    pixels_SS3 = decode_image(PNG, TASK.preprocessing).pixels_SS3
    tensor = {
        "name": "image",
        "datatype": "UINT8",
        "shape": [1, *pixels_SS3.shape],
        "data": pixels_SS3.ravel().tolist(),
    }
    with running(toy_app()) as client:
        answered = client.post("/v1/classify", content=PNG)
        (predicted,) = answered.json()["results"]
        group = predicted["group"]
        pixels = client.post("/v2/models/toy/infer", json={"inputs": [tensor]})
        binary = {"binary_data_size": len(PNG) + 4}
        head = json.dumps(
            {"inputs": [{"name": "image_bytes", "datatype": "BYTES", "shape": [1], "parameters": binary}]}
        ).encode()
        encoded = client.post(
            "/v2/models/toy/infer",
            content=head + len(PNG).to_bytes(4, "little") + PNG,
            headers={"Inference-Header-Content-Length": str(len(head))},
        )
        head_bytes = int(encoded.headers.get("Inference-Header-Content-Length", len(encoded.content)))
        ids = (
            predicted["answer_id"],
            pixels.json()["parameters"]["answer_ids"],
            json.loads(encoded.content[:head_bytes])["parameters"]["answer_ids"],
        )
        for answer_id in ids:
            truth = {"answer_id": answer_id, "label": predicted["class_index"]}
            feedback = client.post("/v1/feedback", json=truth).json()
            assert (feedback["predicted"], feedback["correct"]) == (predicted["label"], True)
        groups = client.get("/v1/groups").json()
    none = {"head": 0, "medium": 0, "tail": 0}
    assert {one["group"]: one["predictions"] for one in groups["window"]["groups"]} == none | {group: 3}
    labelled = {one["group"]: one["of_predictions"]["n"] for one in groups["feedback"] if one["of_predictions"]}
    assert labelled == {group: 3}


def sorted_labels(line: str) -> str:
    """A line of the metrics with its labels in alphabetical order."""
    name, brace, rest = line.partition("{")
    labels, _, value = rest.rpartition("} ")
    return f"{name}{{{','.join(sorted(labels.split(',')))}}} {value}" if brace else line


def test_requests_above_the_queue_limit_are_429_and_health_checks_still_answer() -> None:
    engine = blocked_engine()
    with running(toy_app(engine, Settings(max_queue_images=1, max_images=1))) as client:
        statuses: list[int] = []
        first = threading.Thread(target=lambda: statuses.append(client.post("/v1/classify", content=PNG).status_code))
        first.start()
        assert engine.begun.wait(30)
        rejected = client.post("/v1/classify", content=PNG)
        ready = client.get("/readyz").status_code
        engine.go.set()
        first.join()
        assert "1 images are waiting" in problem(rejected, 429)
        assert rejected.headers["retry-after"] == "1"
        assert (ready, statuses) == (200, [200])
        assert client.post("/v1/classify", content=PNG).status_code == 200


def test_the_description_has_all_bodies_and_problems(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()
    classify = described["paths"]["/v1/classify"]["post"]
    assert {"image/jpeg", "multipart/form-data", "application/json"} <= set(classify["requestBody"]["content"])
    assert set(classify["responses"]) == {
        "200", "400", "401", "403", "404", "408", "413", "415", "422", "429", "500", "503", "504"
    }  # fmt: skip
    for status, response in classify["responses"].items():
        if status != "200":
            example = response["content"]["application/problem+json"]["example"]
            assert example["status"] == int(status)
    assert {"Problem", "ServedAnswer", "RejectedImage"} <= set(described["components"]["schemas"])
    assert "HTTPValidationError" not in described["components"]["schemas"]


def test_the_json_example_of_the_description_is_answered(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()["paths"]["/v1/classify"]["post"]["requestBody"]["content"]
    example = described["application/json"]["example"]
    assert base64.b64decode(example["images"][0]).startswith(b"\x89PNG")
    assert client.post("/v1/classify", json=example).status_code == 200


def test_the_limits_of_bodies_hold_under_another_asgi_server() -> None:
    app = toy_app(settings=Settings(max_body_bytes=10_000, body_seconds=0.2, delay_seconds=0))
    with running(app, other_server=True) as client:
        assert len(client.post("/v1/classify", content=PNG).json()["results"]) == 1
        assert "10,000 bytes" in problem(client.post("/v1/classify", content=iter([bytes(6_000)] * 2)), 413)

        def slow_body() -> Iterator[bytes]:
            yield b"x"
            threading.Event().wait(0.5)  # longer than body_seconds
            yield b"x"

        assert "did not arrive" in problem(client.post("/v1/classify", content=slow_body()), 408)
        assert problem(client.post("/v1/feedback", content=iter([bytes(3_000)] * 2)), 413)


@pytest.mark.parametrize(("seconds", "status"), [("soon", 400), ("0.000001", 504), ("9", 200)])
def test_the_timeout_in_the_header_holds_for_the_open_inference_protocol_too(
    client: httpx.Client, seconds: str, status: int
) -> None:
    tensor = {"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(PNG).decode()]}
    headers = {"X-Request-Timeout": seconds}
    assert client.post("/v2/models/toy/infer", json={"inputs": [tensor]}, headers=headers).status_code == status


def test_the_model_of_an_answer_is_named_as_it_is_served(tmp_path: Path) -> None:
    for version in ("1", "2"):
        write_toy_bundle(tmp_path / "birds" / version)

    async def start_pool(_: Path) -> EnginePool:
        return await EnginePool.start([lambda: toy_process(toy_engine())], Settings())

    with running(create_app(Service(tmp_path, Settings(delay_seconds=0), start_pool))) as client:
        named = [(model["name"], model["version"]) for model in client.get("/readyz").json()["models"]]
        assert named == [("birds", "1"), ("birds", "2")]
        answer = client.post("/v1/classify?model=birds&version=1", content=PNG).json()["model"]
        assert (answer["name"], answer["version"]) == ("birds", "1")
