"""The published clients of the Open Inference Protocol against the real service."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from serve_toys import CLASS_NAMES, SIZE_PX, encoded, expected_logits, served, toy_pixels, write_toy_bundle

HERE = Path(__file__).parents[2]
PIXELS_NSS3 = np.stack([toy_pixels(seed) for seed in range(3)])

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the clients, in a separate environment because they need other versions than training."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed; `make install` installs it")
    environment = tmp_path_factory.mktemp("clients") / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    pins = HERE / "clients.txt"
    packages = ["tritonclient[http]", "kserve"]
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "--constraint", pins, *packages], check=True)
    return python


@pytest.fixture(scope="module")
def responses(clients: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The responses that the clients received, and the answers of ``/v1/classify`` for the same images."""
    folder = tmp_path_factory.mktemp("service")
    np.save(folder / "pixels.npy", PIXELS_NSS3)
    files = [folder / f"{number}.png" for number in range(len(PIXELS_NSS3))]
    for file, pixels_SS3 in zip(files, PIXELS_NSS3, strict=True):
        file.write_bytes(encoded(pixels_SS3))
    with served(write_toy_bundle(folder / "bundle")) as service:
        address = service.url.removeprefix("http://")
        script = [clients, HERE / "protocol_clients.py", address, folder / "pixels.npy", *files]
        done = subprocess.run(script, check=False, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        form = [("image", (file.name, file.read_bytes())) for file in files]
        answers = httpx.post(f"{service.url}/v1/classify?top_k=6", files=form, timeout=60).json()
        received = json.loads(done.stdout.splitlines()[-1])
        for client in ("tritonclient", "kserve"):
            truths = [{"answer_id": answer_id, "label": 0} for answer_id in received[client]["answer_ids"]]
            feedback = [httpx.post(f"{service.url}/v1/feedback", json=truth, timeout=60) for truth in truths]
            received[client]["feedback"] = [response.json().get("predicted") for response in feedback]
    yield {**received, "classify": answers}


@pytest.mark.parametrize("client", ["tritonclient", "kserve"])
def test_a_client_gets_the_same_logits_as_classify(responses: dict[str, Any], client: str) -> None:
    probability_NC = np.zeros((3, 6))
    for row, result in enumerate(responses["classify"]["results"]):
        for entry in result["top_k"]:
            probability_NC[row, entry["class_index"]] = entry["probability"]
    assert len(responses[client]["logits"]) >= 5
    for call, logits in responses[client]["logits"].items():
        logits_NC = np.array(logits)
        # float32 sums of 192 terms, in batches of different sizes
        np.testing.assert_allclose(logits_NC, expected_logits(PIXELS_NSS3), atol=1e-5, err_msg=call)
        softmax_NC = np.exp(logits_NC) / np.exp(logits_NC).sum(axis=1, keepdims=True)  # the toy's temperature is 1
        np.testing.assert_allclose(softmax_NC, probability_NC, atol=1e-5, err_msg=call)


@pytest.mark.parametrize(("client", "num_requests"), [("tritonclient", 2), ("kserve", 1)])
def test_a_client_gets_the_ids_that_name_its_answers_in_feedback(
    responses: dict[str, Any], client: str, num_requests: int
) -> None:
    labels = [result["label"] for result in responses["classify"]["results"]]
    assert responses[client]["feedback"] == num_requests * labels


@pytest.mark.parametrize("client", ["tritonclient", "kserve"])
def test_a_client_reports_readiness_and_errors(responses: dict[str, Any], client: str) -> None:
    received = responses[client]
    assert [received[name] for name in ("live", "ready", "model_ready", "other_ready")] == [True, True, True, False]
    expected = {"tritonclient": "404 there is no model other", "kserve": "expected an inference request in JSON"}
    assert expected[client] in received["error"]


def test_tritonclient_lists_and_describes_the_model(responses: dict[str, Any]) -> None:
    received = responses["tritonclient"]
    assert received["server"]["name"] == "ltkd"
    assert received["index"] == [{"name": "toy", "version": "1", "state": "READY", "reason": ""}]
    inputs = [(tensor["name"], tensor["datatype"], tensor["shape"]) for tensor in received["metadata"]["inputs"]]
    assert inputs == [("image", "UINT8", [-1, SIZE_PX, SIZE_PX, 3]), ("image_bytes", "BYTES", [-1])]
    assert received["metadata"] == received["metadata_of_version"]
    assert [output["dims"] for output in received["config"]["output"]] == [[len(CLASS_NAMES)]]


def test_tritonclient_classifies(responses: dict[str, Any]) -> None:
    received = responses["tritonclient"]
    logits_NC = expected_logits(PIXELS_NSS3)
    assert received["classification"] == received["classification_in_json"]
    for row, listed in enumerate(received["classification"]):
        best = np.argsort(-logits_NC[row])[:3].tolist()
        assert [text.split(":")[1:] for text in listed] == [[str(index), CLASS_NAMES[index]] for index in best]
        # the protocol's text has six decimals
        np.testing.assert_allclose([float(text.split(":")[0]) for text in listed], logits_NC[row, best], atol=1e-5)
