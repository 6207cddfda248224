"""Clients of one service with keys of their own: what each may do, and what it cannot do to the others."""

import json
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serve_toys import CLASS_NAMES, encoded, running, toy_app, toy_pixels

from serve.http.api_keys import make_key
from serve.settings import Settings
from tests.serve.http.test_bodies import problem

PNG = encoded(toy_pixels(3))
KEYS = {
    name: make_key(name, *roles, limit=limit)
    for name, roles, limit in (
        ("alice", ("classify",), None),
        ("mallory", ("classify",), None),
        ("used-up", ("admin",), 0.001),
        ("labeller", ("feedback",), None),
        ("scraper", ("metrics",), None),
    )
}
OPEN = {"/livez", "/readyz", "/v2/health/live", "/v2/health/ready"}
ROUTES = [
    (method.upper(), path.format(model="toy", version="1"))
    for path, methods in toy_app().openapi()["paths"].items()
    for method in methods
    if path not in OPEN
]


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name][0]}"}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[httpx.Client]:
    (tmp_path / "keys").write_text("".join(f"{line}\n" for _, line in KEYS.values()))
    with running(toy_app(settings=Settings(key_file=tmp_path / "keys"))) as client:
        yield client


def classify(client: httpx.Client, name: str, **headers: str) -> httpx.Response:
    response = client.post("/v1/classify", content=PNG, headers={**bearer(name), **headers})
    assert response.status_code == 200, response.text
    return response


def label(client: httpx.Client, name: str, answer_id: str, true_class: str = "fox") -> httpx.Response:
    body = {"answer_id": answer_id, "label": true_class}
    return client.post("/v1/feedback", json=body, headers=bearer(name))


def metrics(client: httpx.Client) -> str:
    return client.get("/metrics", headers=bearer("scraper")).text


def test_feedback_cannot_be_forged_by_counting_through_ids(client: httpx.Client) -> None:
    mallorys = classify(client, "mallory")
    alices = classify(client, "alice")
    request_id = mallorys.headers["X-Request-ID"]
    neighbours = [f"{int(request_id, 16) + step:0{len(request_id)}x}" for step in range(-5, 6)]
    answer_id = mallorys.json()["results"][0]["answer_id"]
    neighbours += [f"{int(answer_id, 16) + step:032x}" for step in (-2, -1, 1, 2)]
    neighbours.append(alices.headers["X-Request-ID"])
    for guess in neighbours:
        assert "predicted" not in label(client, "mallory", guess).text
        # the form of the requests before answers had ids
        old = {"request_id": guess, "image": 0, "label": "fox"}
        assert "predicted" not in client.post("/v1/feedback", json=old, headers=bearer("mallory")).text
    groups = client.get("/v1/groups", headers=bearer("scraper")).json()
    assert all(group["of_images"] is None for group in groups["feedback"])


def test_a_client_neither_reads_nor_labels_nor_detects_the_answer_to_another_key(client: httpx.Client) -> None:
    answer_id = classify(client, "alice").json()["results"][0]["answer_id"]
    unknown = problem(label(client, "mallory", "0" * 32), 404)
    assert problem(label(client, "mallory", answer_id), 404).replace(answer_id, "0" * 32) == unknown
    assert problem(label(client, "mallory", answer_id, "zebra"), 404).replace(answer_id, "0" * 32) == unknown
    assert not any(name in unknown for name in CLASS_NAMES)
    assert label(client, "alice", answer_id).status_code == 200
    problem(label(client, "alice", answer_id), 409)
    assert problem(label(client, "mallory", answer_id), 404).replace(answer_id, "0" * 32) == unknown


def test_a_request_id_chosen_by_one_client_does_not_replace_the_answer_of_another(client: httpx.Client) -> None:
    alices = classify(client, "alice", **{"X-Request-ID": "order-4711"}).json()["results"][0]["answer_id"]
    mallorys = classify(client, "mallory", **{"X-Request-ID": "order-4711"}).json()["results"][0]["answer_id"]
    assert alices != mallorys
    problem(label(client, "mallory", "order-4711"), 404)
    assert [label(client, name, own).status_code for name, own in (("alice", alices), ("mallory", mallorys))] == [
        200, 200,
    ]  # fmt: skip


def test_answers_of_v2_belong_to_the_key_that_asked_too(client: httpx.Client) -> None:
    head = json.dumps(
        {
            "inputs": [
                {"name": "image_bytes", "datatype": "BYTES", "shape": [2],
                 "parameters": {"binary_data_size": 2 * (len(PNG) + 4)}}
            ]
        }
    ).encode()  # fmt: skip
    body = head + 2 * (len(PNG).to_bytes(4, "little") + PNG)
    headers = {**bearer("alice"), "Inference-Header-Content-Length": str(len(head))}
    reply = client.post("/v2/models/toy/infer", content=body, headers=headers).json()
    first, second = reply["parameters"]["answer_ids"].split(",")
    problem(label(client, "mallory", first), 404)
    assert label(client, "alice", first).status_code == 200
    assert label(client, "labeller", second).status_code == 200


def test_a_key_that_only_labels_cannot_classify_and_one_that_only_classifies_cannot_read_metrics(
    client: httpx.Client,
) -> None:
    problem(client.post("/v1/classify", content=PNG, headers=bearer("labeller")), 403)
    assert client.post("/v2/models/toy/infer", content=b"{}", headers=bearer("scraper")).status_code == 403
    for path in ("/metrics", "/v1/groups"):
        assert client.get(path, headers=bearer("scraper")).status_code == 200
        for name in ("alice", "labeller"):
            problem(client.get(path, headers=bearer(name)), 403)
    for name in ("alice", "labeller", "scraper"):
        assert client.get("/v1/model", headers=bearer(name)).status_code == 200


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(("name", "status"), [(None, b"401"), ("used-up", b"429")])
def test_every_route_but_the_probes_checks_key_and_limit_before_it_reads_a_body(
    client: httpx.Client, method: str, path: str, name: str | None, status: bytes
) -> None:
    authorization = f"Authorization: {bearer(name)['Authorization']}\r\n" if name else ""
    head = f"{method} {path} HTTP/1.1\r\nHost: service\r\n{authorization}"
    if name:
        assert client.get("/v1/model", headers=bearer(name)).status_code == 200  # the one request of its limit
    with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=30) as connection:
        connection.sendall(f"{head}Content-Length: 30000000\r\n\r\n".encode())  # and no byte of the body
        assert connection.recv(12) == b"HTTP/1.1 " + status


@pytest.mark.parametrize("path", sorted(OPEN))
def test_a_key_above_its_limit_and_a_wrong_key_do_not_close_the_probes(client: httpx.Client, path: str) -> None:
    client.get("/v1/model", headers=bearer("used-up"))
    for headers in ({}, bearer("used-up"), {"Authorization": "Bearer wrong"}):
        assert client.get(path, headers=headers).status_code == 200


def test_the_limit_of_a_key_holds_over_all_routes_and_no_other_key_notices(client: httpx.Client) -> None:
    classify(client, "used-up")
    tensors = client.post("/v2/models/toy/infer", content=b"{}", headers=bearer("used-up"))
    assert (tensors.status_code, tensors.headers["content-type"]) == (429, "application/json")
    rejected = client.post("/v1/classify", content=PNG, headers=bearer("used-up"))
    seconds = int(rejected.headers["Retry-After"])
    assert 900 < seconds <= 1000
    detail = f"the key used-up is limited to 0.001 requests a second; try again in {seconds} s."
    assert problem(rejected, 429) == detail
    for name in ("alice", "mallory"):
        classify(client, name)
    assert 'ltkd_rejections_total{reason="over_limit"} 2.0' in metrics(client)
    assert 'ltkd_rejections_total{reason="full"} 0.0' in metrics(client)


def test_log_and_metrics_name_the_key_and_never_what_an_invalid_key_says(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ltkd.requests"):
        classify(client, "alice")
        client.get("/metrics", headers=bearer("alice"))  # 403
        client.get("/v1/model", headers=bearer("used-up"))
        client.get("/v1/model", headers=bearer("used-up"))  # 429
        for number in range(20):
            invalid = {"Authorization": f"Bearer alice{number}", "X-API-Key": "alice"}
            assert client.post("/v1/classify", content=PNG, headers=invalid).status_code == 401
        client.get("/livez", headers=bearer("alice"))
        text = metrics(client)
    requests = {
        re.sub(r"(\w+)=", "", line) for line in text.splitlines() if line.startswith("ltkd_requests_total{")
    }  # fmt: skip
    assert requests == {
        'ltkd_requests_total{"alice","/v1/classify","200"} 1.0',
        'ltkd_requests_total{"alice","/metrics","403"} 1.0',
        'ltkd_requests_total{"used-up","/v1/model","200"} 1.0',
        'ltkd_requests_total{"used-up","/v1/model","429"} 1.0',
        'ltkd_requests_total{"","/v1/classify","401"} 20.0',
        'ltkd_requests_total{"","/livez","200"} 1.0',
    }
    facts = [record.facts for record in caplog.records if record.name == "ltkd.requests"]  # type: ignore[attr-defined]
    assert [(line["route"], line["status"], line.get("key")) for line in facts[:4]] == [
        ("/v1/classify", 200, "alice"), ("/metrics", 403, "alice"),
        ("/v1/model", 200, "used-up"), ("/v1/model", 429, "used-up"),
    ]  # fmt: skip
    assert all("key" not in line for line in facts[4:25])
    for secret, _ in KEYS.values():
        assert secret not in caplog.text and secret not in text
