"""One training, from its configuration to a complete run folder; an interrupted training is resumed."""

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
from ltkd.contract.records import sha256_of, write_atomically
from ltkd.data.batches import Shard, make_batches
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
    claim_run_folder,
    open_run,
    read_metrics,
    report_write_errors,
)
from ltkd.training.signals import stop_signals
from ltkd.training.teacher import CachedTeacher, Teacher

CHECKPOINT_FILE = Path("checkpoint") / "state.safetensors"
LOGITS_FOLDER, BOARD_FOLDER = "logits", "tensorboard"

SAVE_EVERY_S = 300.0  # an epoch of a large data set lasts hours
AGREE_EVERY = 20  # steps between two collective decisions of the ranks whether to save or stop


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
    """Complete a run's configuration with the package versions and the hashes of weights.

    Raises:
        UsageError: The model does not exist, the method needs a teacher and none is given, the recipe does not train
            and no weights are given, the weights are not a file, or teacher views cannot be used.
    """
    model_builder(model)
    if build_method(method).needs_teacher and teacher is None:
        raise UsageError(f"method '{method.name}' needs a teacher; use: ltkd distill TEACHER --method {method.name}")
    if recipe.epochs == 0 and weights_from is None:
        raise UsageError(f"recipe '{recipe.name}' does not train the network; give its weights with --weights FILE.")
    if weights_from is not None and not weights_from.is_file():
        raise UsageError(
            f"{weights_from} is not a file; give the weights as .safetensors or as a state dict saved by torch."
        )
    if teacher_views is not None and (execution.num_devices > 1 or build_method(method).needs_features):
        raise UsageError(
            "--teacher-views needs a single process and a method that compares logits alone; remove the option."
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
    distributed: Distributed | None = None,
    tensorboard: bool = False,
) -> Run:
    """Train a configuration in the run folder ``out``, or resume an interrupted training there.

    If the run is complete already, it is only opened. A checkpoint is saved after every epoch, every few minutes, and
    when a signal requests the process to stop.

    Args:
        config: The configuration of the run.
        data: The images that ``config.data`` specifies.
        out: The run folder.
        console: Where progress is shown.
        title: Short description of the training.
        distributed: This process's place in distributed training; only rank 0 writes and shows progress.
        tensorboard: Whether the metrics are also written for TensorBoard, below ``out``.

    Raises:
        RunError: ``out`` has other contents or a run of another configuration, cannot be written, or another process is
            training in it.
        TrainingError: The loss is no longer finite.
        StoppedError: A signal requested a stop; a checkpoint was saved.
    """
    distributed = distributed or Distributed()
    network = build_network(config.model, len(data.task.class_names), config.seed)
    if config.weights_from is not None:
        load_weights(network, config.weights_from)
    teacher_network = None if (out / WEIGHTS_FILE).is_file() else _teacher_network(config, data)
    device = torch.device(config.execution.device)
    with report_write_errors(out), claim_run_folder(out, config, data.task, distributed):
        if distributed.any_rank(distributed.is_main and (out / WEIGHTS_FILE).is_file()):
            if distributed.is_main:
                console.print(f"[dim]{title}: {out} is already complete[/dim]")
        else:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                # for random numbers that the network draws, such as dropout
                torch.manual_seed(config.seed + distributed.rank)
                metrics = _train(config, data, network, teacher_network, out, console, title, distributed, tensorboard)
            if distributed.is_main:
                if config.recipe.epochs:
                    plot_curves(metrics, data.task.groups.names, title, out / CURVES_FILE)
                weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
                write_atomically(out / WEIGHTS_FILE, save(weights))
        if distributed.is_main:
            shutil.rmtree((out / CHECKPOINT_FILE).parent, ignore_errors=True)
        distributed.barrier()
    return open_run(out)


def _train(
    config: RunConfig,
    data: Dataset,
    network: nn.Module,
    teacher_network: nn.Module | None,
    out: Path,
    console: Console,
    title: str,
    distributed: Distributed,
    tensorboard: bool,
) -> list[Metrics]:
    """Train ``network`` to its last epoch, keep the run folder up to date and return the metrics of every epoch."""
    method, device = build_method(config.method), torch.device(config.execution.device)
    state = _train_state(config, network, teacher_network, data.task.input_px)
    checkpoint = Checkpoint(out / CHECKPOINT_FILE, state, distributed)
    start = checkpoint.load()
    if config.execution.compiled:
        state.student.compile()
    metrics = read_metrics(out)[: start.epoch]
    batches = make_batches(
        data,
        batch_size=config.recipe.batch_size,
        seed=config.seed,
        device=device,
        shard=Shard(distributed.rank, distributed.size),
        views=config.teacher_views,
    )
    display = TrainingDisplay(
        console if distributed.is_main else Console(quiet=True),
        title,
        config.recipe.epochs,
        batches.steps_per_epoch,
        start,
    )
    tensorboard_writer = TensorBoardWriter(out / BOARD_FOLDER if tensorboard and distributed.is_main else None)
    with stop_signals() as stop_request, display, tensorboard_writer:
        saved_at = time.monotonic()

        def after_step(position: Position, num_images: int) -> None:
            nonlocal saved_at
            display.step(position, num_images)
            if distributed.size > 1 and position.step % AGREE_EVERY:
                return  # the ranks decide together, and every decision waits for all of them
            stop = distributed.any_rank(stop_request.signal_number is not None)
            if stop or position.step == 0 or distributed.any_rank(time.monotonic() - saved_at > SAVE_EVERY_S):
                checkpoint.save(position)
                saved_at = time.monotonic()
            if stop:
                raise StoppedError(
                    f"stopped in {out} after epoch {position.epoch} of {config.recipe.epochs} and {position.step} of "
                    f"{batches.steps_per_epoch} steps; a checkpoint was saved. Run the same command again to resume.",
                    stop_request.signal_number or signal.SIGTERM,
                )

        for report in train(
            state,
            data,
            batches,
            method,
            config.recipe,
            teacher=_teacher(config, teacher_network, method, len(data.train_labels)),
            execution=config.execution,
            distributed=distributed,
            start=start,
            on_step=after_step,
        ):
            metrics.append(report.as_flat())
            if distributed.is_main:
                write_atomically(out / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in metrics).encode())
            tensorboard_writer.write(metrics[-1])
            display.epoch(report)
    if not config.recipe.epochs:
        accuracy = evaluate(network, data, device, distributed)
        metrics = [{"epoch": 0, **{f"{ACCURACY}{name}": value for name, value in accuracy.items()}}]
        if distributed.is_main:
            write_atomically(out / METRICS_FILE, (json.dumps(metrics[0]) + "\n").encode())
    return metrics


def _train_state(config: RunConfig, network: nn.Module, teacher_network: nn.Module | None, input_px: int) -> TrainState:
    """The network on its device, with the layers of its method, the optimiser and the gradient scaler."""
    device, fusion = torch.device(config.execution.device), None
    if build_method(config.method).needs_features and teacher_network is not None:
        fusion = ReviewFusion.between(network, teacher_network, input_px, seed=config.seed)
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
        view_source=f"seed{config.seed}-batch{config.recipe.batch_size}",
        num_images=num_images,
        views=config.teacher_views,
    )


def resolve_device(requested: str) -> torch.device:
    """The device for ``auto``, ``cpu`` or ``cuda``; ``auto`` is CUDA if it is available.

    Raises:
        DeviceError: CUDA was requested and is not available.
    """
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if requested == "cuda" and not torch.cuda.is_available():
        raise DeviceError("cuda was requested, but torch finds no CUDA device; give --device cpu to train on the CPU.")
    return torch.device(requested)
