"""Runs and bundles of an earlier version can be opened and give the same results.

``recorded/`` contains a run and a bundle of the demo made by commit 5c949bc, the responses of the service to the
requests below, and the losses and gradients of every method. Numbers are compared with a tolerance for rounding,
because kernels differ between processors. Everything else must be equal.
"""

import base64
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from export.conversion.fp32 import to_onnx
from export.conversion.session import open_session, run
from export.verify import verify_bundle
from ltkd.contract.bundle import open_bundle
from ltkd.contract.preprocessing import FULL_DECODING
from ltkd.methods.registry import METHODS, ClassStatistics, LossInputs, build_method, method_config
from ltkd.training.run_folder import open_run

RECORDED = Path(__file__).parent / "recorded"
RUN, BUNDLE = RECORDED / "run", RECORDED / "demo"
# rounding of float32 sums of some hundred terms in another order
CLOSE = {"rel": 1e-3, "abs": 1e-5}
# fields that were added since
ADDED = {"answer_id", "parameters", "unavailable"}
# these differ between requests or versions, or are sentences for people
CHANGING = {"id", "since", "version", "request_id", "detail", "error", "title"}


def images() -> list[bytes]:
    """Six of the bundle's golden samples as PNG files."""
    with np.load(BUNDLE / "golden.npz") as golden:
        pixels_NSS3 = golden["images"]
    files = []
    for pixels_SS3 in pixels_NSS3[:: max(1, len(pixels_NSS3) // 6)][:6]:
        file = io.BytesIO()
        Image.fromarray(pixels_SS3).save(file, "png")
        files.append(file.getvalue())
    return files


def responses(address: str) -> dict[str, tuple[int, object]]:
    """Status and body of the response to each of a fixed list of requests, some of them invalid."""
    files = images()
    png, text = {"Content-Type": "image/png"}, {"Content-Type": "text/plain"}
    as_json = {"images": [base64.b64encode(file).decode() for file in files]}
    tensor = {"name": "image_bytes", "shape": [1], "datatype": "BYTES", "data": [as_json["images"][0]]}
    with httpx.Client(base_url=address, timeout=30) as client:
        received = {
            "one image": client.post("/v1/classify", content=files[0], headers=png),
            "three classes": client.post("/v1/classify?top_k=3", content=files[1], headers=png),
            "a form": client.post("/v1/classify", files=[("image", ("a.png", file, "image/png")) for file in files]),
            "json": client.post("/v1/classify", json=as_json),
            "one bad of two": client.post("/v1/classify", files=[("image", ("a", files[0])), ("image", ("b", b"x"))]),
            "no image": client.post("/v1/classify", content=b"x", headers=png),
            "no body": client.post("/v1/classify", headers=png),
            "text": client.post("/v1/classify", content=b"x", headers=text),
            "top_k of nothing": client.post("/v1/classify?top_k=x", content=files[0], headers=png),
            "a model that is not there": client.post("/v1/models/none/classify", content=files[0], headers=png),
            "the model": client.get("/v1/model"),
            "the groups": client.get("/v1/groups"),
            "alive": client.get("/livez"),
            "ready": client.get("/readyz"),
            "no such path": client.get("/nothing"),
            "v2 server": client.get("/v2"),
            "v2 inference": client.post("/v2/models/demo/infer", json={"inputs": [tensor]}),
            "v2 without inputs": client.post("/v2/models/demo/infer", json={"inputs": []}),
        }
    return {name: (response.status_code, _stable(response.json())) for name, response in received.items()}


def _stable(value: object) -> object:
    """Replace values that differ between requests with the names of their types, and leave out added fields."""
    if isinstance(value, dict):
        return {
            name: type(each).__name__ if name in CHANGING else _stable(each)
            for name, each in value.items()
            if name not in ADDED and not (name == "version" and "provider" in value)  # the version of a model
        }
    return [_stable(each) for each in value] if isinstance(value, list) else value


def differences(now: object, then: object, where: str = "") -> list[str]:
    """Describe where two responses differ by more than rounding."""
    if isinstance(now, dict) and isinstance(then, dict) and now.keys() == then.keys():
        return [found for name in then for found in differences(now[name], then[name], f"{where}.{name}")]
    if isinstance(now, list) and isinstance(then, list) and len(now) == len(then):
        return [
            found for place in range(len(then)) for found in differences(now[place], then[place], f"{where}[{place}]")
        ]
    if isinstance(now, float) and isinstance(then, float | int):
        return [] if now == pytest.approx(then, **CLOSE) else [f"{where}: {now} was {then}"]
    return [] if now == then else [f"{where}: {now!r} was {then!r}"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    program = "from ltkd.cli.main import main; main()"
    words = [
        sys.executable,
        "-c",
        program,
        "serve",
        str(BUNDLE),
        "--port",
        "0",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        with httpx.Client(base_url=found[0], transport=httpx.HTTPTransport(retries=20)) as client:
            assert client.get("/readyz").status_code == 200
        yield found[0]
        process.terminate()


def test_the_service_gives_the_recorded_responses(address: str) -> None:
    then = json.loads((RECORDED / "responses.json").read_text())
    now = json.loads(json.dumps(responses(address)))
    assert now.keys() == then.keys()
    assert {status for status, _ in then.values()} >= {200, 400, 404, 415}
    assert differences(now, then) == []


def test_a_changed_number_status_or_field_is_detected() -> None:
    then = json.loads((RECORDED / "responses.json").read_text())
    for change in (
        lambda body: body["one image"].__setitem__(0, 201),
        lambda body: body["one image"][1]["results"][0].__setitem__("probability", 0.123),
        lambda body: body["one image"][1]["results"][0].pop("group"),
        lambda body: body["json"][1]["results"].pop(),
    ):
        now = json.loads(json.dumps(then))
        change(now)
        assert differences(now, then) != []


def test_the_bundle_verifies() -> None:
    assert {check.precision for check in verify_bundle(BUNDLE).checks} == {"fp32", "int8"}


def test_the_run_opens_and_gives_the_logits_of_its_bundle() -> None:
    opened, bundle = open_run(RUN), open_bundle(BUNDLE)
    assert opened.task == bundle.manifest.task
    assert opened.task.resizing == opened.config.data.resizing == FULL_DECODING
    with np.load(BUNDLE / "golden.npz") as golden:
        pixels_NSS3, expected_NC = golden["images"], golden["logits_fp32"]
    session = open_session(to_onnx(opened.load_network(), opened.task))
    # the network is exported again; its logits are of order 10
    np.testing.assert_allclose(run(session, pixels_NSS3), expected_NC, atol=1e-3)


def losses() -> dict[str, list[float]]:
    """The loss of every method and the norm of its gradient: early, late, and after deferred re-weighting has begun."""
    task = open_run(RUN).task
    num_classes = len(task.class_names)
    random = torch.Generator().manual_seed(0)
    teacher_NC, logits_NC = 4 * torch.randn(2, 32, num_classes, generator=random)
    labels_N = torch.randint(0, num_classes, (32,), generator=random)
    feature = torch.randn(2, 32, 8, 4, 4, generator=random)
    found = {}
    for name in METHODS:
        method = build_method(method_config(name, {"reweight_after": 0.8}))
        found[name] = []
        for progress in (0.01, 0.5, 0.9):
            student_NC, student_feature = logits_NC.clone().requires_grad_(), feature[0].clone().requires_grad_()
            loss = method(
                LossInputs(
                    student_NC=student_NC,
                    teacher_NC=teacher_NC if method.needs_teacher else None,
                    labels_N=labels_N,
                    classes=ClassStatistics(task),
                    progress=progress,
                    student_features=[student_feature] if method.needs_features else (),
                    teacher_features=[feature[1]] if method.needs_features else (),
                )
            )
            loss.backward()
            assert student_NC.grad is not None
            found[name] += [loss.item(), student_NC.grad.norm().item()]
    return found


def test_every_method_has_its_recorded_loss_and_gradient() -> None:
    then = json.loads((RECORDED / "losses.json").read_text())
    now = losses()
    assert now.keys() >= then.keys()
    for name, figures in then.items():
        assert all(map(math.isfinite, figures))
        assert now[name] == pytest.approx(figures, rel=1e-5), name
