"""One training from its configuration to a complete run folder, resuming where an earlier attempt stopped."""

import importlib.metadata
import json
import shutil
import signal
import time
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save
from torch import nn

from ltkd.config import DataConfig, Execution, MethodConfig, Recipe, RunConfig
from ltkd.contract.records import sha256_of, write_whole
from ltkd.data.batches import Shard, batches_of
from ltkd.data.datasets import Dataset
from ltkd.errors import DeviceError, RunError, StoppedError, UsageError
from ltkd.methods.registry import Method, build_method
from ltkd.methods.reviewkd import ReviewFusion
from ltkd.models.registry import build_network, load_weights, model_builder
from ltkd.training.checkpoint import Checkpoint
from ltkd.training.distributed import Distributed
from ltkd.training.loop import Position, Student, TrainState, evaluate, train
from ltkd.training.plots import plot_curves
from ltkd.training.progress import TensorBoardWriter, TrainingDisplay
from ltkd.training.run_folder import (
    ACCURACY,
    CURVES_FILE,
    METRICS_FILE,
    WEIGHTS_FILE,
    Metrics,
    Run,
    claimed,
    open_run,
    read_metrics,
    writing,
)
from ltkd.training.signals import stop_signals
from ltkd.training.teacher import CachedTeacher, Teacher

CHECKPOINT_FILE = Path("checkpoint") / "state.safetensors"
LOGITS_FOLDER, BOARD_FOLDER = "logits", "tensorboard"

SAVE_EVERY_S = 300.0  # an epoch of a large data set lasts hours
AGREE_EVERY = 20  # steps between two questions of the ranks whether to save or to stop


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
    model_builder(model)
    if build_method(method).needs_teacher and teacher is None:
        raise UsageError(f"method '{method.name}' needs a teacher; use: ltkd distill TEACHER --method {method.name}")
    if recipe.epochs == 0 and weights_from is None:
        raise UsageError(f"recipe '{recipe.name}' takes a network as it is; give its weights with --weights FILE.")
    if weights_from is not None and not weights_from.is_file():
        raise UsageError(
            f"{weights_from} is no file; give the weights as .safetensors or as a state dict saved by torch."
        )
    if teacher_views is not None and (execution.num_devices > 1 or build_method(method).needs_features):
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
    data: Dataset,
    out: Path,
    console: Console,
    title: str,
    *,
    ranks: Distributed | None = None,
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
    ranks = ranks or Distributed()
    network = build_network(config.model, len(data.task.class_names), config.seed)
    if config.weights_from is not None:
        load_weights(network, config.weights_from)
    taught_by = None if (out / WEIGHTS_FILE).is_file() else _teacher_network(config, data)
    device = torch.device(config.execution.device)
    with writing(out), claimed(out, config, data.task, ranks):
        if ranks.any_rank(ranks.is_main and (out / WEIGHTS_FILE).is_file()):
            if ranks.is_main:
                console.print(f"[dim]{title}: {out} is complete already[/dim]")
        else:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(config.seed + ranks.rank)  # of what networks draw themselves, such as dropout
                metrics = _train(config, data, network, taught_by, out, console, title, ranks, tensorboard)
            if ranks.is_main:
                if config.recipe.epochs:
                    plot_curves(metrics, data.task.groups.names, title, out / CURVES_FILE)
                weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
                write_whole(out / WEIGHTS_FILE, save(weights))
        if ranks.is_main:
            shutil.rmtree((out / CHECKPOINT_FILE).parent, ignore_errors=True)
        ranks.barrier()
    return open_run(out)


def _train(
    config: RunConfig,
    data: Dataset,
    network: nn.Module,
    taught_by: nn.Module | None,
    out: Path,
    console: Console,
    title: str,
    ranks: Distributed,
    tensorboard: bool,
) -> list[Metrics]:
    """Train ``network`` to its last epoch and keep the run folder up to date; the metrics of every epoch."""
    method, device = build_method(config.method), torch.device(config.execution.device)
    learner = _learner(config, network, taught_by, data.task.input_px)
    checkpoint = Checkpoint(out / CHECKPOINT_FILE, learner, ranks)
    start = checkpoint.load()
    if config.execution.compiled:
        learner.student.compile()
    metrics = read_metrics(out)[: start.epoch]
    batches = batches_of(
        data,
        batch_size=config.recipe.batch_size,
        seed=config.seed,
        device=device,
        shard=Shard(ranks.rank, ranks.size),
        views=config.teacher_views,
    )
    display = TrainingDisplay(
        console if ranks.is_main else Console(quiet=True), title, config.recipe.epochs, batches.steps_per_epoch, start
    )
    board = TensorBoardWriter(out / BOARD_FOLDER if tensorboard and ranks.is_main else None)
    with stop_signals() as asked, display, board:
        saved_at = time.monotonic()

        def after_step(progress: Position, num_images: int) -> None:
            nonlocal saved_at
            display.step(progress, num_images)
            if ranks.size > 1 and progress.step % AGREE_EVERY:
                return  # ranks must agree, and asking is a wait for all of them
            stop = ranks.any_rank(asked.signal_number is not None)
            if stop or progress.step == 0 or ranks.any_rank(time.monotonic() - saved_at > SAVE_EVERY_S):
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
            if ranks.is_main:
                write_whole(out / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in metrics).encode())
            board.note(metrics[-1])
            display.epoch(report)
    if not config.recipe.epochs:
        accuracy = evaluate(network, data, device, ranks)
        metrics = [{"epoch": 0, **{f"{ACCURACY}{name}": value for name, value in accuracy.items()}}]
        if ranks.is_main:
            write_whole(out / METRICS_FILE, (json.dumps(metrics[0]) + "\n").encode())
    return metrics


def _learner(config: RunConfig, network: nn.Module, taught_by: nn.Module | None, input_px: int) -> TrainState:
    """The network on its device, with what its method adds and what moves it."""
    device, fusion = torch.device(config.execution.device), None
    if build_method(config.method).needs_features and taught_by is not None:
        fusion = ReviewFusion.between(network, taught_by, input_px, seed=config.seed)
    student = Student(network, fusion).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        student.parameters(),
        lr=config.recipe.peak_learning_rate,
        momentum=config.recipe.momentum,
        weight_decay=config.recipe.weight_decay,
    )
    return TrainState(
        student, optimizer, torch.amp.GradScaler(device.type, enabled=config.execution.precision == "float16")
    )


def _teacher_network(config: RunConfig, data: Dataset) -> nn.Module | None:
    if config.teacher is None:
        return None
    teacher = open_run(config.teacher)
    if teacher.task != data.task:
        raise RunError(f"the teacher {teacher.path} was trained on other images or groups; train it again on these.")
    return teacher.load_network()


def _teacher(config: RunConfig, network: nn.Module | None, method: Method, num_images: int) -> Teacher | None:
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


def resolve_device(asked: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` stands for.

    Raises:
        DeviceError: CUDA was asked for and is not there.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked == "cuda" and not torch.cuda.is_available():
        raise DeviceError("asked for cuda, but torch sees no CUDA device; give --device cpu to train on the CPU.")
    return torch.device(asked)
