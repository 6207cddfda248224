"""Clients of the Open Inference Protocol as their makers publish them, against the real service."""

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
    """A Python with the clients: an environment of their own, for they need other versions than training does."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not beside this Python; `make install` puts it there")
    environment = tmp_path_factory.mktemp("clients") / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    pins = HERE / "clients.txt"
    wanted = ["tritonclient[http]", "kserve"]
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "--constraint", pins, *wanted], check=True)
    return python


@pytest.fixture(scope="module")
def seen(clients: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the clients were told by the service, and what ``/v1/classify`` answers of the same images."""
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
    yield {**json.loads(done.stdout.splitlines()[-1]), "classify": answers}


@pytest.mark.parametrize("client", ["tritonclient", "kserve"])
def test_a_client_gets_the_logits_that_classify_answers_with(seen: dict[str, Any], client: str) -> None:
    probability_NC = np.zeros((3, 6))
    for row, result in enumerate(seen["classify"]["results"]):
        for entry in result["top_k"]:
            probability_NC[row, entry["class_index"]] = entry["probability"]
    assert len(seen[client]["logits"]) >= 5
    for way, logits in seen[client]["logits"].items():
        logits_NC = np.array(logits)
        # float32 sums of 192 terms, in batches of other sizes
        np.testing.assert_allclose(logits_NC, expected_logits(PIXELS_NSS3), atol=1e-5, err_msg=way)
        softmax_NC = np.exp(logits_NC) / np.exp(logits_NC).sum(axis=1, keepdims=True)  # the toy's temperature is one
        np.testing.assert_allclose(softmax_NC, probability_NC, atol=1e-5, err_msg=way)


@pytest.mark.parametrize("client", ["tritonclient", "kserve"])
def test_a_client_sees_who_is_ready_and_reads_what_went_wrong(seen: dict[str, Any], client: str) -> None:
    told = seen[client]
    assert [told[asked] for asked in ("live", "ready", "model_ready", "other_ready")] == [True, True, True, False]
    said = {"tritonclient": "404 there is no model other", "kserve": "expected an inference request in JSON"}
    assert said[client] in told["error"]


def test_tritonclient_lists_and_describes_the_model(seen: dict[str, Any]) -> None:
    told = seen["tritonclient"]
    assert told["server"]["name"] == "ltkd"
    assert told["index"] == [{"name": "toy", "version": "1", "state": "READY", "reason": ""}]
    inputs = [(tensor["name"], tensor["datatype"], tensor["shape"]) for tensor in told["metadata"]["inputs"]]
    assert inputs == [("image", "UINT8", [-1, SIZE_PX, SIZE_PX, 3]), ("image_bytes", "BYTES", [-1])]
    assert told["metadata"] == told["metadata_of_version"]
    assert [output["dims"] for output in told["config"]["output"]] == [[len(CLASS_NAMES)]]


def test_tritonclient_classifies(seen: dict[str, Any]) -> None:
    told = seen["tritonclient"]
    logits_NC = expected_logits(PIXELS_NSS3)
    assert told["classification"] == told["classification_in_json"]
    for row, listed in enumerate(told["classification"]):
        best = np.argsort(-logits_NC[row])[:3].tolist()
        assert [text.split(":")[1:] for text in listed] == [[str(index), CLASS_NAMES[index]] for index in best]
        # six decimals are printed
        np.testing.assert_allclose([float(text.split(":")[0]) for text in listed], logits_NC[row, best], atol=1e-5)
