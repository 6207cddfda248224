"""A bundle that changes on disk before its engine process dies: it is reloaded, or given up until it is right again.

The engine processes are real.
"""

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from serve_toys import write_toy_bundle

from serve.monitoring.prometheus import Telemetry
from serve.pool.dispatcher import EnginePool
from serve.pool.engine_process import launch
from serve.pool.model_repository import ModelRepository, ServedModel
from serve.pool.supervisor import engine_configs
from serve.problems import ProblemError
from serve.settings import Settings
from tests.serve.pool.test_dispatcher import PNG, deadline, run, until
from tests.serve.pool.test_model_repository import damaged_model, next_bundle, other_golden_samples, removed

Models = ModelRepository[EnginePool]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_toy_bundle(tmp_path / "toy")


@asynccontextmanager
async def served_models(bundle: Path, telemetry: Telemetry | None = None) -> AsyncIterator[Models]:
    settings = Settings(device="cpu")

    async def start_pool(path: Path) -> EnginePool:
        return await EnginePool.start([partial(launch, config) for config in engine_configs(path, settings)], settings)

    models: Models = ModelRepository(bundle, start_pool, telemetry or Telemetry(), settings)
    await models.start()
    try:
        yield models
    finally:
        await models.close()


def kill_process(served: ServedModel[EnginePool]) -> None:
    (process,) = served.pool._supervisor.processes
    os.kill(process._child.pid, signal.SIGKILL)


def test_a_changed_bundle_is_served_when_the_engine_process_of_the_old_one_dies(bundle: Path) -> None:
    telemetry = Telemetry()

    async def test() -> None:
        async with served_models(bundle, telemetry) as models:
            old = models.find()
            next_bundle(bundle)
            kill_process(old)
            await until(lambda: models.find() is not old)
            new = models.find()
            assert new.pool.manifest.certified_on == "other images"
            assert len((await new.pool.classify([PNG], 1, deadline())).results) == 1
            assert 'ltkd_reloads_total{outcome="replaced"} 1.0' in telemetry.exposition().decode()

    run(test)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damaged_model, "was changed after export"),
        (other_golden_samples, "from the certified ones"),
        (removed, "no such directory"),
    ],
)
def test_if_the_changed_bundle_is_bad_the_reason_is_given_until_it_is_right(
    bundle: Path, damage: Callable[[Path], None], reason: str
) -> None:
    async def test() -> None:
        async with served_models(bundle) as models:
            damage(bundle)
            kill_process(models.find())
            await until(lambda: reason in models.find().pool.reason)
            assert not models.ready
            (unavailable,) = models.unavailable()
            assert (unavailable.name, unavailable.version, reason in unavailable.reason) == ("toy", "1", True)
            with pytest.raises(ProblemError, match=reason) as raised:
                await models.find().pool.classify([PNG], 1, deadline())
            assert raised.value.problem.status == 503
            next_bundle(write_toy_bundle(bundle))
            await until(lambda: models.ready)
            assert models.find().pool.manifest.certified_on == "other images"
            assert len((await models.find().pool.classify([PNG], 1, deadline())).results) == 1

    run(test)
