"""The models that are served: find their bundles, choose the version that answers a request, and reload bundles.

    DIR/manifest.json           one bundle: the name is that of its manifest, the version is 1
    DIR/NAME/manifest.json      several bundles: the name is that of the directory, the version is 1
    DIR/NAME/2/manifest.json    several versions: the highest answers requests without a version

A reload reads the directory again. A new bundle is verified and warmed up in a new engine process while the old bundle
is still served. Then new requests are sent to the new process, and the old one ends when it has answered the requests
that it had accepted. If the new bundle fails, the old one stays in service. A bundle that has not changed is not loaded
again. If an engine process dies and its bundle has changed on disk meanwhile, that version is reloaded in the same way.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

from ltkd.contract.bundle import MANIFEST_FILE, Manifest, Precision, open_bundle
from ltkd.contract.records import Record, read_record, sha256_of
from ltkd.errors import BundleError, LtkdError, UsageError
from serve.engine.answers import ModelRef
from serve.monitoring.drift import Window
from serve.monitoring.feedback import FeedbackWindow
from serve.monitoring.prometheus import ModelLabels, ModelMetrics, Outcome, Telemetry
from serve.pool.pending_requests import AnswerCallback
from serve.problems import ProblemError, make_problem
from serve.settings import Settings

ONLY_VERSION = "1"
_log = logging.getLogger(__name__)


class EngineClient(Protocol):
    """The part of EnginePool that this module uses."""

    manifest: Manifest
    precision: Precision
    provider: str
    alive: bool
    reason: str
    on_restart: Callable[[], None] | None
    on_answer: AnswerCallback | None
    on_bundle_changed: Callable[[], Awaitable[object]] | None

    @property
    def num_waiting(self) -> int:
        """Images that were accepted and have no result yet."""

    async def close(self, drain_seconds: float) -> None:
        """Answer the accepted requests, then end the engine processes."""


AnyEngineClient = TypeVar("AnyEngineClient", bound=EngineClient)


class ModelKey(NamedTuple):
    """A model version, by its name and version in the API."""

    name: str
    version: str


@dataclass(eq=False)
class ServedModel(Generic[AnyEngineClient]):
    """A model version that is served.

    Attributes:
        key: Its name and version.
        fingerprint: SHA-256 of its manifest, which contains the hash of every other file of the bundle.
        pool: Its engine processes.
        metrics: Its Prometheus metrics.
        feedback: The true labels that clients have sent for its answers.
    """

    key: ModelKey
    fingerprint: str
    pool: AnyEngineClient
    metrics: ModelMetrics
    feedback: FeedbackWindow
    _num_holders: int = 0
    _released: asyncio.Event = field(default_factory=asyncio.Event)

    @cached_property
    def ref(self) -> ModelRef:
        """Which model answers, by the name and version under which it is served."""
        sha256 = self.pool.manifest.precisions[self.pool.precision].sha256
        name, version = self.key
        return ModelRef(
            name=name, version=version, precision=self.pool.precision, provider=self.pool.provider, sha256=sha256
        )

    @cached_property
    def ref_json(self) -> bytes:
        """The same in JSON."""
        return self.ref.model_dump_json().encode()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep this version running until the block ends, even if a reload replaces it."""
        self._num_holders += 1
        try:
            yield
        finally:
            self._num_holders -= 1
            if not self._num_holders:
                self._released.set()

    async def end(self, drain_seconds: float) -> None:
        """Wait until no request holds the model, then end its processes; at most ``drain_seconds`` in all."""
        until = time.monotonic() + drain_seconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                while self._num_holders:
                    self._released.clear()
                    await self._released.wait()
        await self.pool.close(max(0.0, until - time.monotonic()))


class ModelReloaded(Record):
    """The outcome of a reload for one model version.

    Attributes:
        name: Name of the model.
        version: Version of the model.
        outcome: ``loaded``, ``replaced``, ``retired``, ``unchanged``, or ``failed``, which changes nothing.
        reason: The error of a failed reload; empty otherwise.
    """

    name: str
    version: str
    outcome: Outcome
    reason: str = ""


class Reloaded(Record):
    """The outcome of a reload."""

    models: tuple[ModelReloaded, ...]


class UnavailableModel(Record):
    """A model version that cannot answer now, and why."""

    name: str
    version: str
    reason: str


StartPool = Callable[[Path], Awaitable[AnyEngineClient]]
"""Starts the engine processes of a bundle: verified, golden samples replayed, warmed up. Raises LtkdError."""


class ModelRepository(Generic[AnyEngineClient]):
    """The model versions that are served, and their reloads. All of it runs in the event loop's thread.

    Args:
        root: A bundle, or a directory of bundles or of versions.
        start_pool: Starts the engine processes of a bundle.
        telemetry: Publishes the metrics of every model.
        settings: Default model, window sizes and drain time.
    """

    def __init__(
        self, root: Path, start_pool: StartPool[AnyEngineClient], telemetry: Telemetry, settings: Settings
    ) -> None:
        self._root = root
        self._start_pool = start_pool
        self._telemetry = telemetry
        self._settings = settings
        self._served: dict[ModelKey, ServedModel[AnyEngineClient]] = {}
        self._defaults: dict[
            str | None, ServedModel[AnyEngineClient]
        ] = {}  # by name; None is the key of the default model
        self._lock = asyncio.Lock()  # of the start and of each reload
        self._reloads: set[asyncio.Task[Reloaded]] = set()
        self._ends: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start every bundle below the root. A reload that is requested meanwhile waits.

        Raises:
            LtkdError: There is no bundle, or a bundle cannot be served.
        """
        try:
            async with self._lock:
                for key, path in self._offered().items():
                    await self._begin(key, path)
        except BaseException:
            await self.close()
            raise

    def find(self, name: str | None = None, version: str | None = None) -> ServedModel[AnyEngineClient]:
        """Find a model version: by default the highest version of the default model.

        Raises:
            ProblemError: 404 if there is no such model; 400 without a name, if there are several models and no default.
        """
        current = self._defaults.get(name)
        if current is None or version is not None:
            current = self._served.get(ModelKey(current.key.name, version)) if current and version else None
        if current is not None:
            return current
        have = ", ".join(f"{served.key.name} version {served.key.version}" for served in self.all())
        if name is None and None not in self._defaults and self._served:
            raise ProblemError(make_problem(400, f"there are several models: {have}; name one with ?model=NAME."))
        missing = f"model {name}" if name else "default model"
        if version:
            missing = f"version {version} of the {missing}"
        raise ProblemError(make_problem(404, f"there is no {missing}; there is: {have or 'none'}."))

    def all(self) -> list[ServedModel[AnyEngineClient]]:
        """Every model version that is served, ordered by name and version."""
        return [self._served[key] for key in sorted(self._served, key=_by_name_and_number)]

    @property
    def ready(self) -> bool:
        """Whether any model version can answer now."""
        return any(served.pool.alive for served in self._served.values())

    def unavailable(self) -> tuple[UnavailableModel, ...]:
        """The model versions that cannot answer now."""
        return tuple(
            UnavailableModel(name=served.key.name, version=served.key.version, reason=served.pool.reason)
            for served in self.all()
            if not served.pool.alive
        )

    async def reload(self, only: ModelKey | None = None) -> Reloaded:
        """Read the directory again, for one model version or for all. A second reload waits until the first has ended.

        A reload continues if its caller is cancelled, so a client that disconnects does not interrupt it.
        """
        task = asyncio.get_running_loop().create_task(self._reload(only))
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Cancel a reload that is in progress, and end every engine pool. The server has waited for its requests."""
        for task in self._reloads:
            task.cancel()
        await asyncio.gather(*self._reloads, return_exceptions=True)
        for key in list(self._served):
            self._end(self._served.pop(key), 0)
        self._update_defaults()
        while self._ends:
            await asyncio.gather(*self._ends)

    async def _reload(self, only: ModelKey | None) -> Reloaded:
        async with self._lock:
            try:
                offered = await asyncio.to_thread(self._offered)
            except LtkdError as reason:
                failed = [served.key for served in self.all() if only in (None, served.key)]
                return Reloaded(models=tuple(self._outcome(key, "failed", str(reason)) for key in failed))
            if only not in offered:  # the name in the manifest of a single bundle may have changed
                only = None
            done = [await self._reload_one(key, path) for key, path in offered.items() if only in (None, key)]
            gone = sorted(self._served.keys() - offered.keys(), key=_by_name_and_number)
            if only or any(model.outcome == "failed" for model in done):
                gone = []  # the bundle may have been renamed, and its new name failed to load
            for key in gone:
                before = self._served.pop(key)
                self._update_defaults()
                self._end(before, self._settings.drain_seconds)
                done.append(self._outcome(key, "retired"))
            return Reloaded(models=tuple(done))

    async def _reload_one(self, key: ModelKey, path: Path) -> ModelReloaded:
        before = self._served.get(key)
        try:
            await asyncio.to_thread(
                open_bundle, path
            )  # reports a damaged file before the new engine process is started
            if before and before.fingerprint == fingerprint_of(path):
                return self._outcome(key, "unchanged")
            await self._begin(key, path)
        except LtkdError as reason:
            return self._outcome(key, "failed", str(reason))
        if before:
            self._end(before, self._settings.drain_seconds)
        return self._outcome(key, "replaced" if before else "loaded")

    async def _begin(self, key: ModelKey, path: Path) -> None:
        """Start the engine processes of a bundle, and send them requests."""
        fingerprint = fingerprint_of(path)
        pool = await self._start_pool(path)
        task, certified = pool.manifest.task, pool.manifest.precisions[pool.precision]
        window = Window(certified.calibration, self._settings.window_images)
        labels = ModelLabels(*key, pool.precision, pool.provider, certified.sha256)
        metrics = self._telemetry.add_model(labels, task.groups.names, window)
        metrics.watch(lambda: pool.num_waiting, lambda: pool.alive)
        pool.on_answer = metrics.record_request
        pool.on_restart = metrics.count_restart
        feedback = FeedbackWindow(task, certified.calibration, metrics, self._settings.feedback_images)
        pool.on_bundle_changed = lambda: self.reload(key)
        self._served[key] = ServedModel(key, fingerprint, pool, metrics, feedback)
        self._update_defaults()

    def _end(self, served: ServedModel[AnyEngineClient], drain_seconds: float) -> None:
        """End a model version in the background when it has answered its accepted requests."""
        self._telemetry.remove_model(served.metrics)
        served.pool.on_restart = served.pool.on_bundle_changed = None
        task = asyncio.get_running_loop().create_task(served.end(drain_seconds))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    def _update_defaults(self) -> None:
        """Choose the version that answers requests without a version, and the model for requests without a name."""
        highest: dict[str | None, ServedModel[AnyEngineClient]] = {served.key.name: served for served in self.all()}
        default = self._settings.default_model or (next(iter(highest)) if len(highest) == 1 else None)
        if default in highest:
            highest[None] = highest[default]
        self._defaults = highest

    def _offered(self) -> dict[ModelKey, Path]:
        offered = find_bundles(self._root)
        default, names = self._settings.default_model, sorted({key.name for key in offered})
        if default is not None and default not in names:
            raise UsageError(
                f"the default model is {default}, but {self._root} has {', '.join(names)}; choose one of these."
            )
        return offered

    def _outcome(self, key: ModelKey, outcome: Outcome, reason: str = "") -> ModelReloaded:
        self._telemetry.count_reload(outcome)
        if outcome == "failed":
            consequence = "the earlier version stays" if key in self._served else "it is not served"
            _log.error("reload of %s version %s failed, %s: %s", *key, consequence, reason)
        else:
            _log.info("reload of %s version %s: %s", *key, outcome)
        return ModelReloaded(name=key.name, version=key.version, outcome=outcome, reason=reason)


def _by_name_and_number(key: ModelKey) -> tuple[str, int]:
    return key.name, int(key.version)


def find_bundles(root: Path) -> dict[ModelKey, Path]:
    """The bundles below a directory. Names that begin with a dot, such as those of unfinished bundles, are ignored.

    Raises:
        BundleError: There are no bundles.
    """
    if (root / MANIFEST_FILE).exists() or not root.is_dir():
        if not root.is_dir():
            open_bundle(root)  # raises the error for a path that is not a bundle
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
            f"{root} is not a bundle and has no bundle in NAME/ or NAME/VERSION/ below it; "
            f"make one with: ltkd export RUN --out {root / 'NAME'}"
        )
    return found


def fingerprint_of(path: Path) -> str:
    """The SHA-256 of a bundle's manifest, which contains the hash of every other file.

    Raises:
        BundleError: There is no bundle at the path any more.
    """
    try:
        return sha256_of(path / MANIFEST_FILE)
    except OSError as reason:
        raise BundleError(f"{path} is no longer a bundle ({reason.strerror}).") from None
