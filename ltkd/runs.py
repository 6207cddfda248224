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
import importlib.metadata
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from ltkd.batches import Shard, batches_of
from ltkd.checkpoint import Checkpoint
from ltkd.config import DataConfig, Execution, MethodConfig, Recipe, RunConfig
from ltkd.data import ImageData
from ltkd.display import TrainingDisplay
from ltkd.errors import RunError, StoppedError, UsageError
from ltkd.interrupt import stop_signals
from ltkd.methods import CE, method_config, method_of
from ltkd.networks import build_network, load_weights, model_of
from ltkd.plots import plot_curves
from ltkd.ranks import Ranks
from ltkd.records import read_record, sha256_of, write_record, write_whole
from ltkd.review import ReviewFusion
from ltkd.task import Task
from ltkd.teacher import CachedTeacher, Teacher
from ltkd.training import Learner, Progress, Student, evaluate, train

if sys.platform != "win32":
    import fcntl

CONFIG_FILE, TASK_FILE, METRICS_FILE = "config.json", "task.json", "metrics.jsonl"
WEIGHTS_FILE, CURVES_FILE = "weights.safetensors", "curves.png"
CHECKPOINT_FILE = Path("checkpoint") / "state.safetensors"
ACCURACY = "accuracy_"  # begins the names of accuracies in metrics.jsonl
LOGITS_FOLDER, BOARD_FOLDER = "logits", "tensorboard"

SAVE_EVERY_S = 300.0  # an epoch of a large data set lasts hours
AGREE_EVERY = 20  # steps between two questions of the ranks whether to save or to stop
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
    metrics = _read_metrics(path)
    if not (path / WEIGHTS_FILE).is_file() or len(metrics) < config.recipe.epochs:
        raise RunError(
            f"{path} has no {WEIGHTS_FILE}: its training stopped after {len(metrics)} of {config.recipe.epochs} "
            "epochs. Give the command that started it once more; it goes on from there."
        )
    return Run(path, config, task, tuple(metrics))


def run_config(
    data: DataConfig,
    model: str,
    method: MethodConfig,
    recipe: Recipe,
    *,
    seed: int,
    execution: Execution,
    weights_from: Path | None = None,
    teacher: Run | None = None,
    teacher_views: int | None = None,
) -> RunConfig:
    """A complete configuration, in which versions and the teacher's weights are noted.

    Raises:
        UsageError: The model does not exist, the method needs a teacher and has none, or a network is to be taken as
            it is and has no weights.
    """
    model_of(model)
    if method_of(method).needs_teacher and teacher is None:
        raise UsageError(f"method '{method.name}' needs a teacher; use: ltkd distill TEACHER --method {method.name}")
    if recipe.epochs == 0 and weights_from is None:
        raise UsageError(f"recipe '{recipe.name}' takes a network as it is; give its weights with --weights FILE.")
    if weights_from is not None and not weights_from.is_file():
        raise UsageError(
            f"{weights_from} is no file; give the weights as .safetensors or as a state dict saved by torch."
        )
    if teacher_views is not None and (execution.num_devices > 1 or method_of(method).needs_features):
        raise UsageError(
            "kept teacher logits are for one process and a method that compares logits alone; leave "
            "--teacher-views out."
        )
    return RunConfig(
        data=data,
        model=model,
        method=method,
        recipe=recipe,
        seed=seed,
        execution=execution,
        weights_from=weights_from,
        weights_from_sha256=sha256_of(weights_from) if weights_from else None,
        teacher=teacher.path if teacher else None,
        teacher_weights_sha256=sha256_of(teacher.weights_path) if teacher else None,
        teacher_views=teacher_views,
        versions={name: importlib.metadata.version(name) for name in ("ltkd", "torch", "numpy", "pillow")},
    )


def train_run(
    config: RunConfig,
    data: ImageData,
    out: Path,
    console: Console,
    title: str,
    *,
    ranks: Ranks | None = None,
    tensorboard: bool = False,
) -> Run:
    """Train what the configuration says, in ``out``; go on where an interrupted run stopped.

    A run that is complete is opened as it is. It is saved after every epoch, every few minutes, and when a signal asks
    the process to stop.

    Args:
        config: What to train, and on what.
        data: The images that ``config.data`` stands for.
        out: The run folder.
        console: Where progress is shown.
        title: What is trained, in a few words.
        ranks: The processes that share every batch; rank 0 alone writes and shows.
        tensorboard: Whether the metrics are written for TensorBoard too, below ``out``.

    Raises:
        RunError: ``out`` holds something else, or a run of another configuration, or cannot be written, or another
            process trains in it.
        TrainingError: The loss is no longer finite.
        StoppedError: A signal asked to stop; the run was saved.
    """
    ranks = ranks or Ranks()
    network = build_network(config.model, len(data.task.class_names), config.seed)
    if config.weights_from is not None:
        load_weights(network, config.weights_from)
    taught_by = None if (out / WEIGHTS_FILE).is_file() else _teacher_network(config, data)
    device = torch.device(config.execution.device)
    with _writing(out), _claimed(out, config, data.task, ranks):
        if ranks.any(ranks.leads and (out / WEIGHTS_FILE).is_file()):
            if ranks.leads:
                console.print(f"[dim]{title}: {out} is complete already[/dim]")
        else:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(config.seed + ranks.rank)  # of what networks draw themselves, such as dropout
                metrics = _train(config, data, network, taught_by, out, console, title, ranks, tensorboard)
            if ranks.leads:
                if config.recipe.epochs:
                    plot_curves(metrics, data.task.groups.names, title, out / CURVES_FILE)
                weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
                write_whole(out / WEIGHTS_FILE, save(weights))
        if ranks.leads:
            shutil.rmtree((out / CHECKPOINT_FILE).parent, ignore_errors=True)
        ranks.wait()
    return open_run(out)


def _train(
    config: RunConfig,
    data: ImageData,
    network: nn.Module,
    taught_by: nn.Module | None,
    out: Path,
    console: Console,
    title: str,
    ranks: Ranks,
    tensorboard: bool,
) -> list[Metrics]:
    """Train ``network`` to its last epoch and keep the run folder up to date; the metrics of every epoch."""
    method, device = method_of(config.method), torch.device(config.execution.device)
    learner = _learner(config, network, taught_by, data.task.input_px)
    checkpoint = Checkpoint(out / CHECKPOINT_FILE, learner, ranks)
    start = checkpoint.load()
    if config.execution.compiled:
        learner.student.compile()
    metrics = _read_metrics(out)[: start.epoch]
    batches = batches_of(
        data,
        batch_size=config.recipe.batch_size,
        seed=config.seed,
        device=device,
        shard=Shard(ranks.rank, ranks.size),
        views=config.teacher_views,
    )
    display = TrainingDisplay(
        console if ranks.leads else Console(quiet=True), title, config.recipe.epochs, batches.steps_per_epoch, start
    )
    board = _Board(out / BOARD_FOLDER if tensorboard and ranks.leads else None)
    with stop_signals() as asked, display, board:
        saved_at = time.monotonic()

        def after_step(progress: Progress, num_images: int) -> None:
            nonlocal saved_at
            display.step(progress, num_images)
            if ranks.size > 1 and progress.step % AGREE_EVERY:
                return  # ranks must agree, and asking is a wait for all of them
            stop = ranks.any(asked.signal_number is not None)
            if stop or progress.step == 0 or ranks.any(time.monotonic() - saved_at > SAVE_EVERY_S):
                checkpoint.save(progress)
                saved_at = time.monotonic()
            if stop:
                raise StoppedError(
                    f"stopped in {out} after epoch {progress.epoch} of {config.recipe.epochs} and {progress.step} of "
                    f"{batches.steps_per_epoch} steps; saved. The same command goes on from there.",
                    asked.signal_number or signal.SIGTERM,
                )

        for report in train(
            learner,
            data,
            batches,
            method,
            config.recipe,
            teacher=_teacher(config, taught_by, method, len(data.train_labels)),
            execution=config.execution,
            ranks=ranks,
            start=start,
            on_step=after_step,
        ):
            metrics.append(report.as_flat())
            if ranks.leads:
                write_whole(out / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in metrics).encode())
            board.note(metrics[-1])
            display.epoch(report)
    if not config.recipe.epochs:
        accuracy = evaluate(network, data, device, ranks)
        metrics = [{"epoch": 0, **{f"{ACCURACY}{name}": value for name, value in accuracy.items()}}]
        if ranks.leads:
            write_whole(out / METRICS_FILE, (json.dumps(metrics[0]) + "\n").encode())
    return metrics


def _learner(config: RunConfig, network: nn.Module, taught_by: nn.Module | None, input_px: int) -> Learner:
    """The network on its device, with what its method adds and what moves it."""
    device, fusion = torch.device(config.execution.device), None
    if method_of(config.method).needs_features and taught_by is not None:
        fusion = ReviewFusion.between(network, taught_by, input_px, seed=config.seed)
    student = Student(network, fusion).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        student.parameters(),
        lr=config.recipe.peak_learning_rate,
        momentum=config.recipe.momentum,
        weight_decay=config.recipe.weight_decay,
    )
    return Learner(
        student, optimizer, torch.amp.GradScaler(device.type, enabled=config.execution.precision == "float16")
    )


@contextmanager
def _writing(out: Path) -> Iterator[None]:
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
def _claimed(out: Path, config: RunConfig, task: Task, ranks: Ranks) -> Iterator[None]:
    """Make ``out`` the folder of this run, or find that it is already; rank 0 does it for all."""
    with ExitStack() as held:
        problem = None
        if ranks.leads:
            try:
                with _writing(out):
                    if not (out / WEIGHTS_FILE).is_file():
                        held.enter_context(_alone_in(out))
                    _claim(out, config, task)
            except RunError as error:
                problem = error
        ranks.raise_together(problem)
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


def _teacher_network(config: RunConfig, data: ImageData) -> nn.Module | None:
    if config.teacher is None:
        return None
    teacher = open_run(config.teacher)
    if teacher.task != data.task:
        raise RunError(f"the teacher {teacher.path} was trained on other images or groups; train it again on these.")
    return teacher.load_network()


def _teacher(config: RunConfig, network: nn.Module | None, method: CE, num_images: int) -> Teacher | None:
    if network is None or config.teacher is None:
        return None
    if config.teacher_views is None:
        return Teacher(network, config.execution, with_features=method.needs_features)
    return CachedTeacher(
        network,
        config.execution,
        config.teacher / LOGITS_FOLDER,
        drawn_by=f"seed{config.seed}-batch{config.recipe.batch_size}",
        num_images=num_images,
        views=config.teacher_views,
    )


class _Board:
    """The metrics as TensorBoard scalars, where a folder for them is given."""

    def __init__(self, folder: Path | None) -> None:
        self._writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra

            self._writer = SummaryWriter(str(folder))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def note(self, line: Metrics) -> None:
        """Write one epoch's metrics."""
        if self._writer is not None:
            for name, value in line.items():
                if name != "epoch":
                    self._writer.add_scalar(name, value, int(line["epoch"]))


def _read_metrics(path: Path) -> list[Metrics]:
    file = path / METRICS_FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _accuracy(line: Metrics) -> dict[str, float]:
    return {name.removeprefix(ACCURACY): value for name, value in line.items() if name.startswith(ACCURACY)}
