"""The run folder: one training from its configuration to its weights.

    config.json            everything needed to repeat the run
    task.json              class names, training counts, groups, preprocessing
    metrics.jsonl          one flat object per epoch
    checkpoint/            where the training stands, for going on; gone when the run is complete
    weights.safetensors    there exactly when the run is complete
    curves.png             loss and accuracy per group over the epochs

Every file is written beside its place and renamed, so an interrupted run is usable or absent, never half.
"""

import errno
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ltkd.config import RunConfig
from ltkd.contract.records import read_record, write_record
from ltkd.contract.task import Task
from ltkd.errors import RunError
from ltkd.methods.registry import method_config
from ltkd.models.registry import build_network
from ltkd.training.distributed import Distributed

if sys.platform != "win32":
    import fcntl

CONFIG_FILE, TASK_FILE, METRICS_FILE = "config.json", "task.json", "metrics.jsonl"
WEIGHTS_FILE, CURVES_FILE = "weights.safetensors", "curves.png"
ACCURACY = "accuracy_"  # begins the names of accuracies in metrics.jsonl
CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}

Metrics = dict[str, float]


@dataclass(frozen=True)
class Run:
    """A complete run on disk."""

    path: Path
    config: RunConfig
    task: Task
    metrics: tuple[Metrics, ...]

    @property
    def weights_path(self) -> Path:
        """The file of the trained weights."""
        return self.path / WEIGHTS_FILE

    def load_network(self) -> nn.Module:
        """The trained network on the CPU, float32, in evaluation mode.

        It takes normalised images, float32 [N, 3, S, S], and gives logits [N, C].

        Raises:
            RunError: The weights are damaged or of another network.
        """
        network = build_network(self.config.model, len(self.task.class_names), self.config.seed)
        try:
            network.load_state_dict(load_file(self.weights_path))
        except (SafetensorError, RuntimeError, OSError) as reason:
            problem = str(reason).splitlines()[0]
            raise RunError(f"{self.weights_path} is no {self.config.model} ({problem}); train again.") from None
        return network.eval()

    def accuracy(self) -> dict[str, float]:
        """Test accuracy after the last epoch, by group and over all."""
        return _accuracy(self.metrics[-1])

    def best_accuracy(self) -> float:
        """The highest overall test accuracy of any epoch looked at; chosen on the test set, so never a result."""
        return max(_accuracy(line)["all"] for line in self.metrics if "accuracy_all" in line)


def open_run(path: Path) -> Run:
    """Open a complete run.

    Raises:
        RunError: It is no run folder, or its training did not end.
    """
    if not path.is_dir():
        raise RunError(f"{path} is no run folder: no such directory. Make one with: ltkd train --out {path}")
    config = read_record(path / CONFIG_FILE, RunConfig, RunError)
    task = read_record(path / TASK_FILE, Task, RunError)
    metrics = read_metrics(path)
    if not (path / WEIGHTS_FILE).is_file() or len(metrics) < config.recipe.epochs:
        raise RunError(
            f"{path} has no {WEIGHTS_FILE}: its training stopped after {len(metrics)} of {config.recipe.epochs} "
            "epochs. Give the command that started it once more; it goes on from there."
        )
    return Run(path, config, task, tuple(metrics))


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """A disk that is full or may not be written, as one clear line."""
    try:
        yield
    except OSError as reason:
        if reason.errno not in CANNOT_WRITE:
            raise
        raise RunError(
            f"{reason.filename or out} could not be written ({reason.strerror}); what was saved before is whole. "
            "Put that right, and the same command goes on from there."
        ) from None


@contextmanager
def claimed(out: Path, config: RunConfig, task: Task, ranks: Distributed) -> Iterator[None]:
    """Make ``out`` the folder of this run, or find that it is already; rank 0 does it for all."""
    with ExitStack() as held:
        problem = None
        if ranks.is_main:
            try:
                with writing(out):
                    if not (out / WEIGHTS_FILE).is_file():
                        held.enter_context(_alone_in(out))
                    _claim(out, config, task)
            except RunError as error:
                problem = error
        ranks.raise_on_all(problem)
        yield


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Keep other processes from training in ``out``; however this one ends, the kernel gives the folder free."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    folder = os.open(out, os.O_RDONLY)  # the folder itself is locked, so no file is left behind
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise RunError(f"another process is training in {out}; wait for it, or give another --out.") from None
    except OSError:
        pass  # some network file systems have no locks
    try:
        yield
    finally:
        os.close(folder)


def _claim(out: Path, config: RunConfig, task: Task) -> None:
    if (out / CONFIG_FILE).is_file():
        differing = _differing(read_record(out / CONFIG_FILE, RunConfig, RunError), config)
        if differing:
            raise RunError(f"{out} holds a run of another configuration ({'; '.join(differing)}); give another --out.")
        if read_record(out / TASK_FILE, Task, RunError) != task:
            raise RunError(f"{out} was trained on other images than {config.data.name} has now; give another --out.")
    else:
        # a process that is killed may leave the first file, and parts of both
        own = (TASK_FILE, f".{TASK_FILE}.*.part", f".{CONFIG_FILE}.*.part")
        if not all(any(path.match(name) for name in own) for path in out.iterdir()):
            raise RunError(f"{out} is not empty and no run folder; give another --out.")
        write_record(out / TASK_FILE, task)
        write_record(out / CONFIG_FILE, config)
    if not (out / WEIGHTS_FILE).is_file():
        for part in out.rglob(".*.part"):
            part.unlink()


def _differing(found: RunConfig, asked: RunConfig) -> list[str]:
    """Every field in which two configurations differ, in words."""
    if found.method.name != asked.method.name:
        return [f"method is {found.method.name}, asked for {asked.method.name}"]
    before, now = _by_field(found), _by_field(asked)
    return [
        f"{name} is {before.get(name)}, asked for {now.get(name)}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def _by_field(config: RunConfig) -> dict[str, object]:
    """Everything that counts in a configuration, by dotted name."""
    # by meaning: a parameter that a newer version added has the default that the older one was
    whole = config.model_copy(update={"method": method_config(config.method.name, config.method.parameters)})
    fields: dict[str, object] = {}

    def note(values: Mapping[str, object], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                note(value, f"{prefix}{name}.")
            else:
                fields[prefix + name] = value

    note(whole.model_dump(exclude={"versions", "schema_version"}), "")
    return fields


def read_metrics(path: Path) -> list[Metrics]:
    """The epochs that a run has recorded so far."""
    file = path / METRICS_FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _accuracy(line: Metrics) -> dict[str, float]:
    return {name.removeprefix(ACCURACY): value for name, value in line.items() if name.startswith(ACCURACY)}
