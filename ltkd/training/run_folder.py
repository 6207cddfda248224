"""The run folder: one training from its configuration to its weights.

    config.json            everything needed to repeat the run
    task.json              class names, training counts, groups, preprocessing
    metrics.jsonl          one flat object per epoch
    checkpoint/            state to resume from; removed when the run is complete
    weights.safetensors    exists exactly when the run is complete
    curves.png             loss and accuracy per group over the epochs

Every file is written under a temporary name and then renamed, so an interruption never leaves a partial file. ``run``
trains into the folder; this module creates, locks, checks and reads it.
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
ACCURACY = "accuracy_"  # prefix of the accuracies in metrics.jsonl
WRITE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}

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

        It takes normalised images, float32 [N, 3, S, S], and returns logits [N, C].

        Raises:
            RunError: The weights are damaged or belong to another network.
        """
        network = build_network(self.config.model, len(self.task.class_names), self.config.seed)
        try:
            network.load_state_dict(load_file(self.weights_path))
        except (SafetensorError, RuntimeError, OSError) as reason:
            problem = str(reason).splitlines()[0]
            raise RunError(
                f"{self.weights_path} does not have the weights of {self.config.model} ({problem}); train again."
            ) from None
        return network.eval()

    def accuracy(self) -> dict[str, float]:
        """Test accuracy after the last epoch, by group and over all."""
        return _accuracy(self.metrics[-1])

    def best_accuracy(self) -> float:
        """The highest overall test accuracy of any evaluated epoch; chosen on the test set, so never a result."""
        return max(_accuracy(line)["all"] for line in self.metrics if "accuracy_all" in line)


def open_run(path: Path) -> Run:
    """Open a complete run.

    Raises:
        RunError: The path is not a run folder, or its training is not complete.
    """
    if not path.is_dir():
        raise RunError(f"{path} is not a run folder: no such directory. Create one with: ltkd train --out {path}")
    config = read_record(path / CONFIG_FILE, RunConfig, RunError)
    task = read_record(path / TASK_FILE, Task, RunError)
    metrics = read_metrics(path)
    if not (path / WEIGHTS_FILE).is_file() or len(metrics) < config.recipe.epochs:
        raise RunError(
            f"{path} has no {WEIGHTS_FILE}: its training stopped after {len(metrics)} of {config.recipe.epochs} "
            "epochs. Run the command that started it again to resume."
        )
    return Run(path, config, task, tuple(metrics))


@contextmanager
def report_write_errors(out: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error of one line."""
    try:
        yield
    except OSError as reason:
        if reason.errno not in WRITE_ERRORS:
            raise
        raise RunError(
            f"{reason.filename or out} could not be written ({reason.strerror}); earlier files are intact. Fix the "
            "cause, then run the same command again to resume."
        ) from None


@contextmanager
def claim_run_folder(out: Path, config: RunConfig, task: Task, distributed: Distributed) -> Iterator[None]:
    """Lock ``out``, then create the run folder there or check that it belongs to this run; rank 0 does it for all."""
    with ExitStack() as lock:
        error = None
        if distributed.is_main:
            try:
                with report_write_errors(out):
                    if not (out / WEIGHTS_FILE).is_file():
                        lock.enter_context(_lock_folder(out))
                    _create_or_check(out, config, task)
            except RunError as raised:
                error = raised
        distributed.raise_on_all(error)
        yield


@contextmanager
def _lock_folder(out: Path) -> Iterator[None]:
    """Prevent other processes from training in ``out``; the kernel releases the lock however this process ends."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file, not a folder; give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    folder = os.open(out, os.O_RDONLY)  # the folder itself is locked, so there is no lock file to remove
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


def _create_or_check(out: Path, config: RunConfig, task: Task) -> None:
    """Create the run folder, or raise if ``out`` has other contents or a run of another configuration or task."""
    if (out / CONFIG_FILE).is_file():
        differences = _differences(read_record(out / CONFIG_FILE, RunConfig, RunError), config)
        if differences:
            raise RunError(f"{out} has a run of another configuration ({'; '.join(differences)}); give another --out.")
        if read_record(out / TASK_FILE, Task, RunError) != task:
            raise RunError(f"{out} was trained on other images than {config.data.name} has now; give another --out.")
    else:
        # a killed process may leave the first file, and temporary files of both
        own = (TASK_FILE, f".{TASK_FILE}.*.part", f".{CONFIG_FILE}.*.part")
        if not all(any(path.match(name) for name in own) for path in out.iterdir()):
            raise RunError(f"{out} is not empty and not a run folder; give another --out.")
        write_record(out / TASK_FILE, task)
        write_record(out / CONFIG_FILE, config)
    if not (out / WEIGHTS_FILE).is_file():
        for part in out.rglob(".*.part"):
            part.unlink()


def _differences(found: RunConfig, requested: RunConfig) -> list[str]:
    """Describe every field in which two configurations differ."""
    if found.method.name != requested.method.name:
        return [f"method is {found.method.name}, requested {requested.method.name}"]
    found_fields, requested_fields = _flatten(found), _flatten(requested)
    return [
        f"{name} is {found_fields.get(name)}, requested {requested_fields.get(name)}"
        for name in {**found_fields, **requested_fields}
        if found_fields.get(name) != requested_fields.get(name)
    ]


def _flatten(config: RunConfig) -> dict[str, object]:
    """The fields that define the run, by dotted name; parameters that an older version did not write are filled in."""
    # the default of a new parameter is the behaviour of the versions before it
    complete = config.model_copy(update={"method": method_config(config.method.name, config.method.parameters)})
    fields: dict[str, object] = {}

    def add(values: Mapping[str, object], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                add(value, f"{prefix}{name}.")
            else:
                fields[prefix + name] = value

    add(complete.model_dump(exclude={"versions", "schema_version"}), "")
    return fields


def read_metrics(path: Path) -> list[Metrics]:
    """The metrics of the epochs that a run has recorded so far."""
    file = path / METRICS_FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _accuracy(line: Metrics) -> dict[str, float]:
    return {name.removeprefix(ACCURACY): value for name, value in line.items() if name.startswith(ACCURACY)}
