"""The models that are served: which bundles there are, which version answers, and how one takes another's place.

    DIR/manifest.json           one bundle: its name is the manifest's, its version 1
    DIR/NAME/manifest.json      several bundles: each has its directory's name and version 1
    DIR/NAME/2/manifest.json    several versions: the highest answers where none is asked for

A reload looks at the directory again. What is new is verified and made warm in a process of its own while the old one
answers; only then do requests go to the new one, and the old one ends when it has answered what it had accepted. What
fails changes nothing: the old one stays. What has not changed is not touched.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

from ltkd.contract.bundle import MANIFEST_FILE, Manifest, Precision, open_bundle
from ltkd.contract.records import Record, read_record, sha256_of
from ltkd.errors import BundleError, LtkdError, UsageError
from serve.monitoring.drift import Window
from serve.monitoring.feedback import FeedbackWindow
from serve.monitoring.prometheus import ModelLabels, ModelMetrics, Outcome, Telemetry
from serve.pool.engine_process import AnswerCallback
from serve.problems import ProblemError, problem_of
from serve.settings import Settings

ONLY_VERSION = "1"
_log = logging.getLogger(__name__)


class EngineClient(Protocol):
    """What is asked of an engine process here; the routes ask more of it."""

    manifest: Manifest
    precision: Precision
    provider: str
    alive: bool
    on_change: Callable[[], None] | None
    on_answer: AnswerCallback | None

    @property
    def num_waiting(self) -> int:
        """Images that were accepted and are not answered."""

    def admission_paused(self) -> AbstractContextManager[None]:
        """Refuse nobody for the time that the queue takes: a process is being started beside this one."""

    async def close(self, drain_seconds: float) -> None:
        """Answer what was accepted, then end."""


AnyEngineClient = TypeVar("AnyEngineClient", bound=EngineClient)


class ModelKey(NamedTuple):
    """A model version, by its name and version in the API."""

    name: str
    version: str


@dataclass(eq=False)
class ServedModel(Generic[AnyEngineClient]):
    """A model version that answers.

    Attributes:
        key: Its name and version.
        fingerprint: SHA-256 of its manifest, which vouches for every file of the bundle.
        worker: Its engine process.
        meter: Counts what it answers.
        ledger: Takes in what its answers should have been.
    """

    key: ModelKey
    fingerprint: str
    worker: AnyEngineClient
    meter: ModelMetrics
    ledger: FeedbackWindow
    _holders: int = 0
    _let_go: asyncio.Event = field(default_factory=asyncio.Event)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the model answering while a request is between finding it and asking it, whatever a reload does."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            if not self._holders:
                self._let_go.set()

    async def end(self, drain_seconds: float) -> None:
        """Wait until nobody holds the model, then end its process; in all at most ``drain_seconds``."""
        until = time.monotonic() + drain_seconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                while self._holders:
                    self._let_go.clear()
                    await self._let_go.wait()
        await self.worker.close(max(0.0, until - time.monotonic()))


class ModelReloaded(Record):
    """What a reload did with one model version.

    Attributes:
        name: Of the model.
        version: Of the model.
        outcome: ``loaded``, ``replaced``, ``retired``, ``unchanged``, or ``failed``: then all stays as it was.
        reason: Why it failed; empty otherwise.
    """

    name: str
    version: str
    outcome: Outcome
    reason: str = ""


class Reloaded(Record):
    """What a reload did."""

    models: tuple[ModelReloaded, ...]


StartWorker = Callable[[Path], Awaitable[AnyEngineClient]]
"""Starts the engine process of a bundle: verified, golden samples replayed, warm; raises LtkdError if it cannot."""


class ModelRepository(Generic[AnyEngineClient]):
    """The model versions that answer, and their reload. It belongs to the event loop's thread.

    Args:
        root: A bundle, or a directory of bundles or of versions.
        start_worker: Starts the engine process of a bundle.
        telemetry: Shows every model.
        settings: Names the default model, and says how much is remembered and how long a model that goes may take.
    """

    def __init__(
        self, root: Path, start_worker: StartWorker[AnyEngineClient], telemetry: Telemetry, settings: Settings
    ) -> None:
        self._root = root
        self._start_worker = start_worker
        self._telemetry = telemetry
        self._settings = settings
        self._served: dict[ModelKey, ServedModel[AnyEngineClient]] = {}
        self._current: dict[str | None, ServedModel[AnyEngineClient]] = {}  # by name, and by None where none is needed
        self._one_at_a_time = asyncio.Lock()
        self._reloads: set[asyncio.Task[Reloaded]] = set()
        self._ends: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Serve everything there is.

        Raises:
            LtkdError: There is no bundle, or one of them cannot be served.
        """
        try:
            for key, path in self._offered().items():
                await self._begin(key, path)
        except BaseException:
            await self.close()
            raise

    def find(self, name: str | None = None, version: str | None = None) -> ServedModel[AnyEngineClient]:
        """The model version that answers; without a version the highest, without a name the default.

        Raises:
            ProblemError: 404 if there is none; 400 if a name is needed, because there are several and no default.
        """
        current = self._current.get(name)
        if current is None or version is not None:
            current = self._served.get(ModelKey(current.key.name, version)) if current and version else None
        if current is not None:
            return current
        have = ", ".join(f"{served.key.name} version {served.key.version}" for served in self.all())
        if name is None and None not in self._current and self._served:
            raise ProblemError(problem_of(400, f"there are several models: {have}; name one with ?model=NAME."))
        wanted = f"model {name or 'by default'}" + (f" version {version}" if version else "")
        raise ProblemError(problem_of(404, f"there is no {wanted}; there is: {have or 'none'}."))

    def all(self) -> list[ServedModel[AnyEngineClient]]:
        """Every model version that answers, in the order of names and versions."""
        return [self._served[key] for key in sorted(self._served, key=_by_name_and_number)]

    @property
    def ready(self) -> bool:
        """Whether every model version can answer now."""
        return bool(self._served) and all(served.worker.alive for served in self._served.values())

    async def reload(self) -> Reloaded:
        """Look at the directory again; a second reload waits for the first and then looks itself.

        It goes on when its caller is cancelled: a client that leaves must not leave half of a reload.
        """
        task = asyncio.get_running_loop().create_task(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End every engine process once it has answered what it had accepted; a reload on its way is given up."""
        for task in self._reloads:
            task.cancel()
        await asyncio.gather(*self._reloads, return_exceptions=True)
        for key in list(self._served):
            self._end(self._served.pop(key))
        self._settle()
        while self._ends:
            await asyncio.gather(*self._ends)

    async def _reload(self) -> Reloaded:
        async with self._one_at_a_time:
            try:
                offered = await asyncio.to_thread(self._offered)
            except LtkdError as reason:
                return Reloaded(models=tuple(self._outcome(served.key, "failed", str(reason)) for served in self.all()))
            done = [await self._reload_one(key, path) for key, path in offered.items()]
            gone = sorted(self._served.keys() - offered.keys(), key=_by_name_and_number)
            if any(model.outcome == "failed" for model in done):
                gone = []  # what goes may be what should have been replaced
            for key in gone:
                before = self._served.pop(key)
                self._settle()
                self._end(before)
                done.append(self._outcome(key, "retired"))
            return Reloaded(models=tuple(done))

    async def _reload_one(self, key: ModelKey, path: Path) -> ModelReloaded:
        before = self._served.get(key)
        try:
            await asyncio.to_thread(open_bundle, path)  # a damaged file is told now, not when it is needed
            if before and before.fingerprint == fingerprint_of(path):
                return self._outcome(key, "unchanged")
            await self._begin(key, path)
        except LtkdError as reason:
            return self._outcome(key, "failed", str(reason))
        if before:
            self._end(before)
        return self._outcome(key, "replaced" if before else "loaded")

    async def _begin(self, key: ModelKey, path: Path) -> None:
        """Start the engine process of a bundle, and let it answer."""
        fingerprint = fingerprint_of(path)
        with contextlib.ExitStack() as admission_paused:
            for served in self._served.values():
                admission_paused.enter_context(served.worker.admission_paused())
            worker = await self._start_worker(path)
        task, certified = worker.manifest.task, worker.manifest.precisions[worker.precision]
        window = Window(certified.calibration, self._settings.window_images)
        labels = ModelLabels(*key, worker.precision, worker.provider, certified.sha256)
        meter = self._telemetry.meter(labels, task.groups.names, window)
        meter.queue_depth, meter.alive = lambda: worker.num_waiting, lambda: worker.alive
        worker.on_answer = meter.watch
        worker.on_change = lambda: meter.count_restart() if worker.alive else None
        ledger = FeedbackWindow(task, certified.calibration, meter, self._settings.feedback_images)
        self._served[key] = ServedModel(key, fingerprint, worker, meter, ledger)
        self._settle()

    def _end(self, served: ServedModel[AnyEngineClient]) -> None:
        """Let a model version answer what it has accepted, in the background, and go."""
        self._telemetry.retire(served.meter)
        served.worker.on_change = None
        task = asyncio.get_running_loop().create_task(served.end(self._settings.drain_seconds))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    def _settle(self) -> None:
        """Work out which version answers for each name, and for none."""
        highest: dict[str | None, ServedModel[AnyEngineClient]] = {served.key.name: served for served in self.all()}
        default = self._settings.default_model or (next(iter(highest)) if len(highest) == 1 else None)
        if default in highest:
            highest[None] = highest[default]
        self._current = highest

    def _offered(self) -> dict[ModelKey, Path]:
        offered = find_bundles(self._root)
        default, names = self._settings.default_model, sorted({key.name for key in offered})
        if default is not None and default not in names:
            raise UsageError(f"the default model is {default}, but {self._root} has {', '.join(names)}; name one.")
        return offered

    def _outcome(self, key: ModelKey, outcome: Outcome, reason: str = "") -> ModelReloaded:
        self._telemetry.count_reload(outcome)
        if outcome == "failed":
            stays = "it stays as it was" if key in self._served else "it is not served"
            _log.error("reload of %s version %s failed, %s: %s", *key, stays, reason)
        else:
            _log.info("reload of %s version %s: %s", *key, outcome)
        return ModelReloaded(name=key.name, version=key.version, outcome=outcome, reason=reason)


def _by_name_and_number(key: ModelKey) -> tuple[str, int]:
    return key.name, int(key.version)


def find_bundles(root: Path) -> dict[ModelKey, Path]:
    """The bundles below a directory; what begins with a dot is half-written or withdrawn, and left out.

    Raises:
        BundleError: There are none.
    """
    if (root / MANIFEST_FILE).exists() or not root.is_dir():
        if not root.is_dir():
            open_bundle(root)  # says what is wrong
        return {ModelKey(read_record(root / MANIFEST_FILE, Manifest, BundleError).name, ONLY_VERSION): root}
    found: dict[ModelKey, Path] = {}
    for path in sorted(root.iterdir()):
        if path.name.startswith("."):
            continue
        if (path / MANIFEST_FILE).exists():
            found[ModelKey(path.name, ONLY_VERSION)] = path
        elif path.is_dir():
            versions = [inner for inner in path.iterdir() if inner.name.isdecimal() and inner.name.isascii()]
            for inner in sorted(versions, key=lambda inner: int(inner.name)):
                if (inner / MANIFEST_FILE).exists():
                    found[ModelKey(path.name, str(int(inner.name)))] = inner
    if not found:
        raise BundleError(
            f"{root} holds no bundle, none in NAME/ and none in NAME/VERSION/ below it; "
            f"make one with: ltkd export RUN --out {root / 'NAME'}"
        )
    return found


def fingerprint_of(path: Path) -> str:
    """The SHA-256 of a bundle's manifest, which vouches for its every file.

    Raises:
        BundleError: It is gone.
    """
    try:
        return sha256_of(path / MANIFEST_FILE)
    except OSError as reason:
        raise BundleError(f"{path} is no bundle any more ({reason.strerror}).") from None
