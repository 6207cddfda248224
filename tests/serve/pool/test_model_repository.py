"""Which bundles are served, and how a reload replaces them: verified first, and without a failed request.

The real engine runs in this process instead of in engine processes, so bundles are really verified.
"""

import asyncio
import json
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from serve_toys import expected_logits, toy_pixels, write_toy_bundle

from ltkd.contract.bundle import MANIFEST_FILE, Manifest, Precision, open_bundle
from ltkd.errors import BundleError, UsageError
from serve.engine.session import OnnxEngine, open_engine
from serve.monitoring.prometheus import Telemetry
from serve.pool.model_repository import ModelKey, ModelRepository, Reloaded, find_bundles
from serve.pool.pending_requests import AnswerCallback
from serve.problems import ProblemError
from serve.settings import Settings

PIXELS = toy_pixels(3)


class InThisProcess:
    """An engine pool that answers in this process. After ``close`` it fails, like a process that has ended."""

    def __init__(self, engine: OnnxEngine) -> None:
        self.manifest: Manifest = engine.manifest
        self.precision: Precision = engine.precision
        self.provider = engine.provider
        self.alive = True
        self.reason = ""
        self.on_restart: Callable[[], None] | None = None
        self.on_answer: AnswerCallback | None = None
        self.on_bundle_changed: Callable[[], Awaitable[object]] | None = None
        self.num_waiting = 0
        self.closed_with: float | None = None
        self._engine = engine

    async def logits(self) -> list[float]:
        assert self.alive, "used after its end"
        self.num_waiting += 1
        await asyncio.sleep(0)  # the answer arrives in a later iteration of the event loop, as from another process
        self.num_waiting -= 1
        logits: list[float] = self._engine.logits(PIXELS[None])[0].tolist()
        return logits

    async def close(self, drain_seconds: float) -> None:
        while self.num_waiting:
            await asyncio.sleep(0)
        self.alive, self.closed_with = False, drain_seconds


async def start_pool(path: Path) -> InThisProcess:
    return InThisProcess(await asyncio.to_thread(lambda: open_engine(open_bundle(path), "cpu")))


ToyModels = ModelRepository[InThisProcess]
Start = Callable[[Path], Awaitable[InThisProcess]]


def running(
    root: Path, scenario: Callable[[ToyModels], Awaitable[None]], start: Start = start_pool, default: str | None = None
) -> str:
    """Run a scenario with the models of a directory; returns the metrics at its end."""
    telemetry = Telemetry()

    async def run_scenario() -> None:
        models = ModelRepository(root, start, telemetry, Settings(default_model=default))
        await models.start()
        try:
            await scenario(models)
        finally:
            await models.close()

    asyncio.run(run_scenario())
    return telemetry.exposition().decode()


def next_bundle(path: Path, certified_on: str = "other images") -> Path:
    """Another valid bundle in the same place, as written by another export; only its description differs."""
    content = json.loads((path / MANIFEST_FILE).read_text())
    (path / MANIFEST_FILE).write_text(json.dumps(content | {"certified_on": certified_on}))
    return path


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def outcomes(reloaded: Reloaded) -> dict[tuple[str, str], str]:
    return {(done.name, done.version): done.outcome for done in reloaded.models}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "toy")


def test_a_single_bundle_has_the_name_of_its_manifest_and_version_1(bundle: Path) -> None:
    assert find_bundles(bundle) == {ModelKey("toy", "1"): bundle}


def test_the_bundles_and_versions_in_a_directory_are_found(tmp_path: Path) -> None:
    for name in ("birds", "cars/2", "cars/10", "cars/.3.part", ".hidden", "cars/old"):
        write_toy_bundle(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not a bundle")
    (tmp_path / "empty").mkdir()
    assert find_bundles(tmp_path) == {
        ModelKey("birds", "1"): tmp_path / "birds",
        ModelKey("cars", "2"): tmp_path / "cars" / "2",
        ModelKey("cars", "10"): tmp_path / "cars" / "10",
    }


def test_a_directory_without_a_bundle_gives_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle and has no bundle") as caught:
        find_bundles(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(BundleError, match="no such directory"):
        find_bundles(tmp_path / "nowhere")


def test_the_highest_version_is_the_default_and_others_are_found_by_number(tmp_path: Path) -> None:
    for version in ("9", "10"):
        write_toy_bundle(tmp_path / "cars" / version)

    async def scenario(models: ToyModels) -> None:
        assert models.find().key == models.find("cars").key == ("cars", "10")
        assert models.find("cars", "9").key == models.find(None, "9").key == ("cars", "9")
        assert [served.key.version for served in models.all()] == ["9", "10"]
        assert await models.find().pool.logits() == pytest.approx(expected_logits(PIXELS[None])[0].tolist(), abs=1e-4)

    running(tmp_path, scenario)


@pytest.mark.parametrize(("name", "version"), [("planes", None), ("cars", "2"), (None, "2"), ("", None)])
def test_an_unknown_model_is_404_and_the_known_ones_are_listed(
    tmp_path: Path, name: str | None, version: str | None
) -> None:
    write_toy_bundle(tmp_path / "cars" / "1")

    async def scenario(models: ToyModels) -> None:
        with pytest.raises(ProblemError, match="there is: cars version 1") as caught:
            models.find(name, version)
        assert caught.value.problem.status == 404

    running(tmp_path, scenario)


def test_with_several_models_a_request_names_one_or_gets_the_default(tmp_path: Path) -> None:
    for name in ("birds", "cars"):
        write_toy_bundle(tmp_path / name)

    async def without_default(models: ToyModels) -> None:
        with pytest.raises(ProblemError, match=r"several models: birds version 1, cars version 1; name one") as caught:
            models.find()
        assert caught.value.problem.status == 400
        assert models.find("birds").key.name == "birds"

    async def with_default(models: ToyModels) -> None:
        assert models.find().key.name == "cars"

    running(tmp_path, without_default)
    running(tmp_path, with_default, default="cars")
    with pytest.raises(UsageError, match="the default model is planes"):
        running(tmp_path, with_default, default="planes")


def test_a_bundle_that_cannot_be_served_stops_the_start_and_leaves_no_process(tmp_path: Path) -> None:
    write_toy_bundle(tmp_path / "a")
    write_toy_bundle(tmp_path / "b", golden_shift=1.0)
    started: list[InThisProcess] = []

    async def recording(path: Path) -> InThisProcess:
        started.append(await start_pool(path))
        return started[-1]

    async def scenario(_: ToyModels) -> None:
        raise AssertionError("it must not start")

    with pytest.raises(BundleError, match="golden samples"):
        running(tmp_path, scenario, recording)
    assert [pool.alive for pool in started] == [False]


def test_an_unchanged_bundle_is_not_loaded_again(bundle: Path) -> None:
    async def scenario(models: ToyModels) -> None:
        before = models.find()
        assert outcomes(await models.reload()) == {("toy", "1"): "unchanged"}
        write_toy_bundle(bundle)  # exported again, to the same bytes
        assert outcomes(await models.reload()) == {("toy", "1"): "unchanged"}
        assert models.find() is before

    running(bundle, scenario)


def test_a_new_bundle_replaces_the_old_one_and_the_old_process_ends(bundle: Path) -> None:
    async def scenario(models: ToyModels) -> None:
        before = models.find()
        next_bundle(bundle)
        assert outcomes(await models.reload()) == {("toy", "1"): "replaced"}
        after = models.find()
        assert after.pool is not before.pool
        assert after.pool.manifest.certified_on == "other images"
        while before.pool.alive:
            await asyncio.sleep(0)

    assert 'ltkd_reloads_total{outcome="replaced"} 1.0' in running(bundle, scenario)


def test_versions_are_added_and_removed(tmp_path: Path) -> None:
    write_toy_bundle(tmp_path / "cars" / "1")

    async def scenario(models: ToyModels) -> None:
        write_toy_bundle(tmp_path / "cars" / "2")
        assert outcomes(await models.reload()) == {("cars", "1"): "unchanged", ("cars", "2"): "loaded"}
        assert models.find().key.version == "2"
        shutil.rmtree(tmp_path / "cars" / "2")
        assert outcomes(await models.reload()) == {("cars", "1"): "unchanged", ("cars", "2"): "retired"}
        assert models.find().key.version == "1"

    running(tmp_path, scenario)


def damaged_model(path: Path) -> None:
    next_bundle(path)
    flip_a_bit(path / "model.onnx")


def damaged_in_place(path: Path) -> None:
    flip_a_bit(path / "model.onnx")


def other_golden_samples(path: Path) -> None:
    write_toy_bundle(path, golden_shift=1.0)


def newer_schema(path: Path) -> None:
    content = json.loads((path / MANIFEST_FILE).read_text())
    (path / MANIFEST_FILE).write_text(json.dumps(content | {"schema_version": 99}))


def half_a_manifest(path: Path) -> None:
    whole = (path / MANIFEST_FILE).read_bytes()
    (path / MANIFEST_FILE).write_bytes(whole[: len(whole) // 2])


def removed(path: Path) -> None:
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damaged_model, "was changed after export"),
        (damaged_in_place, "was changed after export"),
        (other_golden_samples, "from the certified ones"),
        (newer_schema, "schema version 99"),
        (half_a_manifest, "not readable JSON"),
        (removed, "no such directory"),
    ],
)
def test_a_bundle_that_fails_verification_changes_nothing_and_the_reason_is_given(
    bundle: Path, damage: Callable[[Path], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(models: ToyModels) -> None:
        before = models.find()
        damage(bundle)
        (done,) = (await models.reload()).models
        assert (done.name, done.version, done.outcome) == ("toy", "1", "failed")
        assert reason in done.reason
        assert models.find() is before
        await before.pool.logits()
        assert models.ready

    metrics = running(bundle, scenario)
    assert 'ltkd_reloads_total{outcome="failed"} 1.0' in metrics
    assert "the earlier version stays" in caplog.text
    assert reason in caplog.text


def test_after_a_failed_reload_a_valid_bundle_is_loaded(bundle: Path) -> None:
    async def scenario(models: ToyModels) -> None:
        other_golden_samples(bundle)
        assert outcomes(await models.reload()) == {("toy", "1"): "failed"}
        next_bundle(write_toy_bundle(bundle))
        assert outcomes(await models.reload()) == {("toy", "1"): "replaced"}

    running(bundle, scenario)


def test_no_model_is_retired_in_a_reload_with_a_failure(tmp_path: Path) -> None:
    write_toy_bundle(tmp_path / "cars")

    async def scenario(models: ToyModels) -> None:
        (tmp_path / "cars").rename(tmp_path / "autos")
        other_golden_samples(tmp_path / "autos")
        assert outcomes(await models.reload()) == {("autos", "1"): "failed"}
        await models.find("cars").pool.logits()

    running(tmp_path, scenario)


def test_a_reload_that_would_remove_the_default_model_fails(tmp_path: Path) -> None:
    for name in ("birds", "cars"):
        write_toy_bundle(tmp_path / name)

    async def scenario(models: ToyModels) -> None:
        shutil.rmtree(tmp_path / "cars")
        reloaded = await models.reload()
        assert set(outcomes(reloaded).values()) == {"failed"}
        assert "the default model is cars" in reloaded.models[0].reason
        await models.find().pool.logits()

    running(tmp_path, scenario, default="cars")


def test_two_reloads_at_once_run_one_after_the_other(bundle: Path) -> None:
    starting = most = 0

    async def counting(path: Path) -> InThisProcess:
        nonlocal starting, most
        starting += 1
        most = max(most, starting)
        pool = await start_pool(path)
        starting -= 1
        return pool

    async def scenario(models: ToyModels) -> None:
        next_bundle(bundle)
        first, second = await asyncio.gather(models.reload(), models.reload())
        assert [outcomes(first), outcomes(second)] == [{("toy", "1"): "replaced"}, {("toy", "1"): "unchanged"}]

    running(bundle, scenario, counting)
    assert most == 1


def test_no_request_fails_over_twenty_reloads_under_load(bundle: Path) -> None:
    answered = 0
    expected = expected_logits(PIXELS[None])[0]

    async def scenario(models: ToyModels) -> None:
        enough = asyncio.Event()

        async def client() -> None:
            nonlocal answered
            while not enough.is_set():
                served = models.find()
                with served.in_use():
                    await asyncio.sleep(0)  # as if the rest of the body arrived now
                    # float32 sums of 192 terms in another order: 1e-4 is far above rounding
                    np.testing.assert_allclose(await served.pool.logits(), expected, atol=1e-4)
                answered += 1

        clients = [asyncio.create_task(client()) for _ in range(8)]
        for number in range(20):
            next_bundle(bundle, f"images {number}")
            assert outcomes(await models.reload()) == {("toy", "1"): "replaced"}
        enough.set()
        await asyncio.gather(*clients)

    running(bundle, scenario)
    assert answered > 20


def test_a_request_that_holds_a_model_can_still_use_it_after_a_reload(bundle: Path) -> None:
    async def scenario(models: ToyModels) -> None:
        before = models.find()
        with before.in_use():
            next_bundle(bundle)
            assert outcomes(await models.reload()) == {("toy", "1"): "replaced"}
            for _ in range(100):  # lets every task run that the reload started
                await asyncio.sleep(0)
            await before.pool.logits()
        while before.pool.alive:
            await asyncio.sleep(0)

    running(bundle, scenario)


def test_the_wait_for_a_request_that_holds_a_model_is_bounded(bundle: Path) -> None:
    async def run_scenario() -> None:
        models = ModelRepository(bundle, start_pool, Telemetry(), Settings(drain_seconds=1))
        await models.start()
        pool = models.find().pool
        with models.find().in_use():
            await models.close()
        assert pool.closed_with == 0

    asyncio.run(run_scenario())


def test_a_client_that_disconnects_does_not_interrupt_a_reload(bundle: Path) -> None:
    begun = asyncio.Event()
    may_continue = asyncio.Event()

    async def slow(path: Path) -> InThisProcess:
        begun.set()
        await may_continue.wait()
        return await start_pool(path)

    async def scenario(models: ToyModels) -> None:
        next_bundle(bundle)
        begun.clear()
        may_continue.clear()
        caller = asyncio.create_task(models.reload())
        await begun.wait()
        caller.cancel()
        may_continue.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert outcomes(await models.reload()) == {("toy", "1"): "unchanged"}
        assert models.find().pool.manifest.certified_on == "other images"

    may_continue.set()
    running(bundle, scenario, slow)


def test_closing_does_not_wait_for_a_reload(bundle: Path) -> None:
    started: list[InThisProcess] = []
    stuck = asyncio.Event()

    async def stuck_later(path: Path) -> InThisProcess:
        if started:
            stuck.set()
            await asyncio.Event().wait()
        started.append(await start_pool(path))
        return started[-1]

    async def scenario(models: ToyModels) -> None:
        next_bundle(bundle)
        reload = asyncio.create_task(models.reload())
        await stuck.wait()
        await models.close()
        with pytest.raises(asyncio.CancelledError):
            await reload

    running(bundle, scenario, stuck_later)
    assert [pool.alive for pool in started] == [False]


def test_a_replaced_process_is_counted(bundle: Path) -> None:
    async def scenario(models: ToyModels) -> None:
        pool = models.find().pool
        assert pool.on_restart is not None
        pool.on_restart()
        assert re.search(r"ltkd_worker_restarts_total\{.*\} 1\.0", models._telemetry.exposition().decode())

    running(bundle, scenario)


def test_the_models_are_ready_while_any_answers_and_those_that_do_not_are_named(tmp_path: Path) -> None:
    for name in ("birds", "cars/1", "cars/2"):
        write_toy_bundle(tmp_path / name)

    async def scenario(models: ToyModels) -> None:
        assert (models.ready, models.unavailable()) == (True, ())
        for number, served in enumerate(models.all()):
            assert models.ready
            served.pool.alive, served.pool.reason = False, f"reason {number}"
            assert models.unavailable()[-1].reason == f"reason {number}"
        named = [(model.name, model.version) for model in models.unavailable()]
        assert (models.ready, named) == (False, [("birds", "1"), ("cars", "1"), ("cars", "2")])

    running(tmp_path, scenario)


def test_a_reload_during_the_start_waits_for_it(bundle: Path) -> None:
    async def run_scenario() -> None:
        begun, may_continue = asyncio.Event(), asyncio.Event()
        started: list[Path] = []

        async def slow(path: Path) -> InThisProcess:
            started.append(path)
            begun.set()
            await may_continue.wait()
            return await start_pool(path)

        models = ModelRepository(bundle, slow, Telemetry(), Settings())
        start = asyncio.create_task(models.start())
        await begun.wait()
        reload = asyncio.create_task(models.reload())
        await asyncio.sleep(0)  # the reload begins
        may_continue.set()
        await start
        assert outcomes(await reload) == {("toy", "1"): "unchanged"}
        assert started == [bundle]
        await models.close()

    asyncio.run(run_scenario())


def test_one_version_is_reloaded_without_the_others(tmp_path: Path) -> None:
    for version in ("1", "2"):
        write_toy_bundle(tmp_path / "cars" / version)

    async def scenario(models: ToyModels) -> None:
        next_bundle(tmp_path / "cars" / "2")
        shutil.rmtree(tmp_path / "cars" / "1")
        assert outcomes(await models.reload(ModelKey("cars", "2"))) == {("cars", "2"): "replaced"}
        assert [served.key.version for served in models.all()] == ["1", "2"]

    running(tmp_path, scenario)


def test_if_the_name_in_the_manifest_has_changed_a_reload_of_the_version_is_one_of_all(bundle: Path) -> None:
    async def scenario(models: ToyModels) -> None:
        content = json.loads((bundle / MANIFEST_FILE).read_text())
        (bundle / MANIFEST_FILE).write_text(json.dumps(content | {"name": "new"}))
        assert outcomes(await models.reload(ModelKey("toy", "1"))) == {("new", "1"): "loaded", ("toy", "1"): "retired"}

    running(bundle, scenario)
