"""The routes for operators, over real sockets. The last test uses real engine processes."""

import asyncio
import gzip
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from serve_toys import encoded, running, served, toy_pixels, write_toy_bundle

from serve.api.operations import operations, reload_on_hangup
from serve.engine.messages import PredictionFacts
from serve.http.api_keys import Keys, make_key
from serve.http.middleware import answer_problem, answer_validation
from serve.monitoring.feedback import Feedback
from serve.monitoring.prometheus import Telemetry
from serve.pool.model_repository import ModelRepository
from serve.problems import ProblemError
from serve.settings import Settings
from tests.serve.http.test_bodies import problem
from tests.serve.pool.test_model_repository import (
    ToyModels,
    damaged_in_place,
    next_bundle,
    other_golden_samples,
    start_pool,
)

USER_KEY, USER_LINE = make_key("user", "classify")
OTHER_KEY, OTHER_LINE = make_key("other", "classify")
LABELLER_KEY, LABELLER_LINE = make_key("labeller", "feedback")
SCRAPER_KEY, SCRAPER_LINE = make_key("scraper", "metrics")
ADMIN_KEY, ADMIN_LINE = make_key("admin", "admin")
FOX = PredictionFacts(group=2, label=5, confidence=0.75, decision="accept", set_size=1)


class OperatorApp:
    """An application with only the routes for operators, and toy models."""

    def __init__(self, root: Path, key_file: Path | None) -> None:
        telemetry = Telemetry()
        self.feedback = Feedback(10)
        self.keys = Keys(key_file)
        self.models: ToyModels = ModelRepository(root, start_pool, telemetry, Settings())

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
            await self.models.start()
            yield
            await self.models.close()

        self.app = FastAPI(
            lifespan=lifespan,
            exception_handlers={ProblemError: answer_problem, RequestValidationError: answer_validation},
        )
        self.app.include_router(operations(self.models, telemetry, self.feedback, self.keys, Settings()))

    def answer_a_fox(self, key: str = "") -> str:
        """Record an answer as the service does, and return its id.

        Args:
            key: The name of the key that asked.
        """
        served = self.models.find()
        served.metrics.record_request([FOX], {"total": 0.001}, 1)
        (answer_id,) = self.feedback.remember(key, served.feedback, [FOX])
        return answer_id


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "toy")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    lines = (USER_LINE, OTHER_LINE, LABELLER_LINE, SCRAPER_LINE, ADMIN_LINE)
    (tmp_path / "keys").write_text("\n".join(lines) + "\n")
    return tmp_path / "keys"


@contextmanager
def operator_app(root: Path, key_file: Path | None = None) -> Iterator[tuple[OperatorApp, httpx.Client]]:
    service = OperatorApp(root, key_file)
    with running(service.app) as client:
        assert client.get("/openapi.json").status_code == 200  # it is answered after the models have started
        yield service, client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_predictions_and_feedback_are_reported_by_group(bundle: Path) -> None:
    with operator_app(bundle) as (service, client):
        answer_id = service.answer_a_fox()
        feedback = client.post("/v1/feedback", json={"answer_id": answer_id, "label": "fox"})
        body = client.get("/v1/groups").json()
    assert feedback.json() == {
        "answer_id": answer_id, "model": "toy", "version": "1",
        "predicted": "fox", "label": "fox", "group": "tail", "correct": True,
    }  # fmt: skip
    assert (body["model"], body["version"], body["window"]["num_images"]) == ("toy", "1", 1)
    tail = body["window"]["groups"][2]
    assert (tail["group"], tail["predictions"], tail["share"], tail["confidence"]["p50"]) == ("tail", 1, 1.0, 0.75)
    assert body["feedback"][2]["of_images"]["n"] == 1
    assert body["window"]["since"] is not None


def test_invalid_feedback_is_a_problem(bundle: Path) -> None:
    with operator_app(bundle) as (service, client):
        answer_id = service.answer_a_fox()

        def status(body: object) -> int:
            return client.post("/v1/feedback", json=body).status_code

        assert status({"answer_id": "unknown", "label": 0}) == 404
        assert status({"answer_id": answer_id, "label": "zebra"}) == 400
        for malformed in (
            {},
            {"answer_id": answer_id},
            {"answer_id": answer_id, "label": 1.5},
            {"answer_id": answer_id, "label": True},
            {"answer_id": answer_id, "label": 5, "image": 0},
            {"request_id": "abc", "label": 5},
        ):
            problem(client.post("/v1/feedback", json=malformed), 400)
        assert status({"answer_id": answer_id, "label": 5}) == 200
        assert status({"answer_id": answer_id, "label": 5}) == 409


def test_only_the_key_that_asked_and_keys_with_the_role_feedback_may_label_an_answer(bundle: Path, keys: Path) -> None:
    with operator_app(bundle, keys) as (service, client):

        def send(key: str, answer_id: str) -> tuple[int, str]:
            body = {"answer_id": answer_id, "label": "fox"}
            response = client.post("/v1/feedback", json=body, headers=bearer(key))
            return response.status_code, response.text.replace(answer_id, "ID")

        first, second, third = (service.answer_a_fox("user") for _ in range(3))
        unknown = send(OTHER_KEY, "0" * 32)
        assert unknown[0] == 404
        assert send(OTHER_KEY, first) == unknown
        assert send(SCRAPER_KEY, first)[0] == 403
        for key, name in ((USER_KEY, first), (LABELLER_KEY, second), (ADMIN_KEY, third)):
            assert send(key, name)[0] == 200
        assert send(OTHER_KEY, first) == unknown  # also once it has a label
        assert [send(key, first)[0] for key in (USER_KEY, LABELLER_KEY)] == [409, 409]


def test_feedback_is_read_after_the_key_is_checked_and_up_to_4_kib(bundle: Path, keys: Path) -> None:
    with operator_app(bundle, keys) as (service, client):
        label = json.dumps({"answer_id": service.answer_a_fox("user"), "label": "fox"}).encode()
        problem(client.post("/v1/feedback", content=b"not JSON"), 401)
        too_large = label + b" " * 4096
        assert "larger than 4,096 bytes" in problem(
            client.post("/v1/feedback", content=too_large, headers=bearer(USER_KEY)), 413
        )
        packed = {"Content-Encoding": "gzip", **bearer(USER_KEY)}
        problem(client.post("/v1/feedback", content=gzip.compress(too_large), headers=packed), 413)
        nested = client.post("/v1/feedback", content=b"[" * 4000, headers=bearer(USER_KEY))
        assert "expected a JSON object with the fields answer_id, label" in problem(nested, 400)
        # the response does not wait for a body that the service will not read
        head = "POST /v1/feedback HTTP/1.1\r\nHost: service\r\nContent-Length: 31457280\r\n\r\n"
        with socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=30) as connection:
            connection.sendall(head.encode())
            assert connection.recv(12) == b"HTTP/1.1 401"
        assert client.post("/v1/feedback", content=label, headers=bearer(USER_KEY)).status_code == 200


def test_groups_of_an_unknown_model_are_404(bundle: Path) -> None:
    with operator_app(bundle) as (_, client):
        assert "toy version 1" in problem(client.get("/v1/groups?model=owl"), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/metrics", {"scraper", "admin"}),
        ("GET", "/v1/groups", {"scraper", "admin"}),
        ("POST", "/v1/feedback", {"user", "labeller", "admin"}),
        ("POST", "/v1/admin/reload", {"admin"}),
    ],
)
def test_with_a_key_file_every_operator_route_needs_a_key_with_its_role(
    bundle: Path, keys: Path, method: str, path: str, allowed: set[str]
) -> None:
    every = {"user": USER_KEY, "labeller": LABELLER_KEY, "scraper": SCRAPER_KEY, "admin": ADMIN_KEY}
    with operator_app(bundle, keys) as (_, client):
        rejected = client.request(method, path, json={"answer_id": "a", "label": 0})
        problem(rejected, 401)
        assert rejected.headers["www-authenticate"].startswith("Bearer")
        for name, key in every.items():
            response = client.request(method, path, json={"answer_id": "a", "label": 0}, headers=bearer(key))
            if name in allowed:
                assert response.status_code in (200, 404)
            else:
                assert f"the key {name} has the role" in problem(response, 403)


def test_a_reload_needs_an_admin_key(bundle: Path, keys: Path) -> None:
    with operator_app(bundle, keys) as (_, client):
        problem(client.post("/v1/admin/reload"), 401)
        problem(client.post("/v1/admin/reload", headers=bearer(USER_KEY)), 403)
        next_bundle(bundle)
        reloaded = client.post("/v1/admin/reload", headers=bearer(ADMIN_KEY))
    assert reloaded.json() == {"models": [{"name": "toy", "version": "1", "outcome": "replaced", "reason": ""}]}


def test_without_a_key_file_a_reload_is_disabled(bundle: Path) -> None:
    with operator_app(bundle) as (_, client):
        assert "--key-file" in problem(client.post("/v1/admin/reload", headers=bearer(ADMIN_KEY)), 403)


def test_a_failed_reload_gives_the_reason_and_the_old_bundle_still_answers(bundle: Path, keys: Path) -> None:
    with operator_app(bundle, keys) as (service, client):
        before = service.models.find()
        other_golden_samples(bundle)
        detail = problem(client.post("/v1/admin/reload", headers=bearer(ADMIN_KEY)), 409)
        assert "logits of the golden samples" in detail
        assert service.models.find() is before


def test_a_reload_reads_the_key_file_and_a_malformed_one_changes_nothing(bundle: Path, keys: Path) -> None:
    guest, guest_line = make_key("guest", "metrics")
    with operator_app(bundle, keys) as (_, client):
        keys.write_text(f"{ADMIN_LINE}\n{guest_line}\n")
        assert client.post("/v1/admin/reload", headers=bearer(ADMIN_KEY)).status_code == 200
        assert client.get("/v1/groups", headers=bearer(guest)).status_code == 200
        problem(client.get("/v1/groups", headers=bearer(SCRAPER_KEY)), 401)
        keys.write_text("broken\n")
        assert "line 1 of the key file" in problem(client.post("/v1/admin/reload", headers=bearer(ADMIN_KEY)), 409)
        assert client.get("/v1/groups", headers=bearer(guest)).status_code == 200


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_sighup_reloads(bundle: Path) -> None:
    async def reload_on_signal() -> None:
        started = asyncio.Event()

        async def start_and_notify(path: Path) -> object:
            started.set()
            return await start_pool(path)

        models = ModelRepository(bundle, start_and_notify, Telemetry(), Settings())  # type: ignore[arg-type, var-annotated]
        await models.start()
        started.clear()
        reload_on_hangup(models, Keys(None))
        next_bundle(bundle)
        os.kill(os.getpid(), signal.SIGHUP)
        await started.wait()
        await models.reload()  # waits for the reload in progress
        assert models.find().pool.manifest.certified_on == "other images"
        await models.close()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)

    assert threading.current_thread() is threading.main_thread()
    asyncio.run(reload_on_signal())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_reloads_under_load_fail_no_request_and_a_damaged_bundle_is_not_loaded(
    bundle: Path,
) -> None:
    content, failed, stop = encoded(toy_pixels(3)), [], threading.Event()
    answers: set[str] = set()

    def load(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not stop.is_set():
                response = client.post("/v1/classify", content=content, headers={"Content-Type": "image/png"})
                if response.status_code == 200:
                    answers.add(response.json()["results"][0]["label"])
                else:
                    failed.append(response.text)

    with served(bundle) as service:
        clients = [threading.Thread(target=load, args=[service.url]) for _ in range(4)]
        for client in clients:
            client.start()
        try:
            for number in range(3):
                next_bundle(bundle, f"images {number}")
                service.process.send_signal(signal.SIGHUP)
                while httpx.get(f"{service.url}/v1/model").json()["manifest"]["certified_on"] != f"images {number}":
                    assert not failed
            damaged_in_place(bundle)
            service.process.send_signal(signal.SIGHUP)
            while 'ltkd_reloads_total{outcome="failed"} 1.0' not in httpx.get(f"{service.url}/metrics").text:
                assert not failed
            assert httpx.get(f"{service.url}/readyz").status_code == 200
        finally:
            stop.set()
            for client in clients:
                client.join()
    assert failed == []
    assert len(answers) == 1
