"""The routes for those who run the service, over real sockets and, for the last ones, with real engine processes."""

import asyncio
import os
import signal
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
from serve.pool.repository import ModelRepository
from serve.problems import ProblemError
from serve.settings import Settings
from tests.serve.http.test_bodies import problem
from tests.serve.pool.test_repository import (
    ToyModels,
    damaged_in_place,
    next_bundle,
    other_golden_samples,
    start_worker,
)

USER, USER_LINE = make_key("user", "classify")
OWNER, OWNER_LINE = make_key("owner", "admin")
FOX = PredictionFacts(group=2, label=5, confidence=0.75, decision="accept", set_size=1)


class Operated:
    """The routes alone, around the toy's models."""

    def __init__(self, root: Path, key_file: Path | None) -> None:
        telemetry = Telemetry()
        self.feedback = Feedback(10)
        self.keys = Keys(key_file)
        self.models: ToyModels = ModelRepository(root, start_worker, telemetry, Settings())

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
            await self.models.start()
            yield
            await self.models.close()

        self.app = FastAPI(
            lifespan=lifespan,
            exception_handlers={ProblemError: answer_problem, RequestValidationError: answer_validation},
        )
        self.app.include_router(operations(self.models, telemetry, self.feedback, self.keys))

    def answer_a_fox(self, request_id: str) -> None:
        """As the service does when it has answered a request."""
        served = self.models.find()
        served.meter.watch([FOX], {"total": 0.001}, 1)
        self.feedback.remember(request_id, served.ledger, [FOX])


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "toy")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    (tmp_path / "keys").write_text(f"{USER_LINE}\n{OWNER_LINE}\n")
    return tmp_path / "keys"


@contextmanager
def operated(root: Path, key_file: Path | None = None) -> Iterator[tuple[Operated, httpx.Client]]:
    service = Operated(root, key_file)
    with running(service.app) as client:
        yield service, client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_what_was_predicted_is_shown_by_group_and_what_was_told_beside_it(bundle: Path) -> None:
    with operated(bundle) as (service, client):
        service.answer_a_fox("abc")
        told = client.post("/v1/feedback", json={"request_id": "abc", "label": "fox"})
        body = client.get("/v1/groups").json()
    assert told.json() == {
        "request_id": "abc", "image": 0, "model": "toy", "version": "1",
        "predicted": "fox", "label": "fox", "group": "tail", "correct": True,
    }  # fmt: skip
    assert (body["model"], body["version"], body["window"]["num_images"]) == ("toy", "1", 1)
    tail = body["window"]["groups"][2]
    assert (tail["group"], tail["predictions"], tail["share"], tail["confidence"]["p50"]) == ("tail", 1, 1.0, 0.75)
    assert body["feedback"][2]["of_images"]["n"] == 1
    assert body["window"]["since"] is not None


def test_feedback_that_does_not_fit_is_a_problem(bundle: Path) -> None:
    with operated(bundle) as (service, client):
        service.answer_a_fox("abc")

        def status(body: object) -> int:
            return client.post("/v1/feedback", json=body).status_code

        assert status({"request_id": "nobody", "label": 0}) == 404
        assert status({"request_id": "abc", "label": "zebra"}) == 400
        for malformed in (
            {},
            {"request_id": "abc"},
            {"request_id": "abc", "label": 1.5},
            {"request_id": "abc", "label": True},
        ):
            problem(client.post("/v1/feedback", json=malformed), 400)
        problem(client.post("/v1/feedback", json={"request_id": "abc", "label": 5, "image": -1}), 400)
        assert status({"request_id": "abc", "label": 5}) == 200
        assert status({"request_id": "abc", "label": 5}) == 409


def test_groups_of_a_model_that_is_not_there_are_404(bundle: Path) -> None:
    with operated(bundle) as (_, client):
        assert "toy version 1" in problem(client.get("/v1/groups?model=owl"), 404)


@pytest.mark.parametrize(("method", "path"), [("GET", "/metrics"), ("GET", "/v1/groups"), ("POST", "/v1/feedback")])
def test_with_a_key_file_every_route_here_needs_a_key(bundle: Path, keys: Path, method: str, path: str) -> None:
    with operated(bundle, keys) as (_, client):
        refused = client.request(method, path, json={"request_id": "a", "label": 0})
        problem(refused, 401)
        assert refused.headers["www-authenticate"].startswith("Bearer")
        allowed = client.request(method, path, json={"request_id": "a", "label": 0}, headers=bearer(USER))
        assert allowed.status_code in (200, 404)


def test_a_reload_is_for_owners_only(bundle: Path, keys: Path) -> None:
    with operated(bundle, keys) as (_, client):
        problem(client.post("/v1/admin/reload"), 401)
        problem(client.post("/v1/admin/reload", headers=bearer(USER)), 403)
        next_bundle(bundle)
        done = client.post("/v1/admin/reload", headers=bearer(OWNER))
    assert done.json() == {"models": [{"name": "toy", "version": "1", "outcome": "replaced", "reason": ""}]}


def test_where_no_key_is_configured_nobody_gives_orders(bundle: Path) -> None:
    with operated(bundle) as (_, client):
        assert "--key-file" in problem(client.post("/v1/admin/reload", headers=bearer(OWNER)), 403)


def test_a_reload_that_fails_says_why_and_the_old_bundle_answers(bundle: Path, keys: Path) -> None:
    with operated(bundle, keys) as (service, client):
        before = service.models.find()
        other_golden_samples(bundle)
        detail = problem(client.post("/v1/admin/reload", headers=bearer(OWNER)), 409)
        assert "give logits that differ" in detail
        assert service.models.find() is before


def test_a_reload_reads_the_keys_again_and_a_broken_key_file_changes_nothing(bundle: Path, keys: Path) -> None:
    guest, guest_line = make_key("guest", "classify")
    with operated(bundle, keys) as (_, client):
        keys.write_text(f"{OWNER_LINE}\n{guest_line}\n")
        assert client.post("/v1/admin/reload", headers=bearer(OWNER)).status_code == 200
        assert client.get("/v1/groups", headers=bearer(guest)).status_code == 200
        problem(client.get("/v1/groups", headers=bearer(USER)), 401)
        keys.write_text("broken\n")
        assert "line 1 of the key file" in problem(client.post("/v1/admin/reload", headers=bearer(OWNER)), 409)
        assert client.get("/v1/groups", headers=bearer(guest)).status_code == 200


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_sighup_reloads(bundle: Path) -> None:
    async def scene() -> None:
        started = asyncio.Event()

        async def noticed(path: Path) -> object:
            started.set()
            return await start_worker(path)

        models = ModelRepository(bundle, noticed, Telemetry(), Settings())  # type: ignore[arg-type, var-annotated]
        await models.start()
        started.clear()
        reload_on_hangup(models, Keys(None))
        next_bundle(bundle)
        os.kill(os.getpid(), signal.SIGHUP)
        await started.wait()
        await models.reload()  # waits for the one on its way
        assert models.find().worker.manifest.certified_on == "other images"
        await models.close()
        asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)

    assert threading.current_thread() is threading.main_thread()
    asyncio.run(scene())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_real_processes_take_over_under_load_without_a_failed_request_and_a_damaged_bundle_is_left_alone(
    bundle: Path,
) -> None:
    content, failed, enough = encoded(toy_pixels(3)), [], threading.Event()
    answers: set[str] = set()

    def load(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not enough.is_set():
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
            enough.set()
            for client in clients:
                client.join()
    assert failed == []
    assert len(answers) == 1
