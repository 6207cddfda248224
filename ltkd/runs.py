"""The run folder: one training from its configuration to its weights.

    config.json            everything needed to repeat the run
    task.json              class names, training counts, groups, preprocessing
    metrics.jsonl          one flat object per epoch
    checkpoint/            the last whole epoch, for going on; gone when the run is complete
    weights.safetensors    there exactly when the run is complete
    curves.png             loss and accuracy per group over the epochs

Every file is written beside its place and renamed, so an interrupted run is usable or absent, never half.
"""

import importlib.metadata
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ltkd.config import DataConfig, MethodConfig, Recipe, RunConfig
from ltkd.data import ImageData
from ltkd.display import TrainingDisplay
from ltkd.errors import RunError, UsageError
from ltkd.methods import method_of
from ltkd.networks import build_network, model_of
from ltkd.plots import plot_curves
from ltkd.records import read_record, sha256_of, write_record, write_whole
from ltkd.task import Task
from ltkd.training import device_of, train

CONFIG_FILE, TASK_FILE, METRICS_FILE = "config.json", "task.json", "metrics.jsonl"
WEIGHTS_FILE, CURVES_FILE = "weights.safetensors", "curves.png"
CHECKPOINT_FILE = Path("checkpoint") / "state.safetensors"

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
    data: DataConfig, model: str, method: MethodConfig, recipe: Recipe, *, seed: int, device: str, teacher: Run | None
) -> RunConfig:
    """A complete configuration: the device is decided, versions and the teacher's weights are noted.

    Raises:
        UsageError: The model does not exist, or the method needs a teacher and has none.
        DeviceError: The device is not there.
    """
    model_of(model)
    if method_of(method).needs_teacher and teacher is None:
        raise UsageError(f"method '{method.name}' needs a teacher; use: ltkd distill TEACHER --method {method.name}")
    return RunConfig(
        data=data,
        model=model,
        method=method,
        recipe=recipe,
        seed=seed,
        device=device_of(device).type,
        teacher=teacher.path if teacher else None,
        teacher_weights_sha256=sha256_of(teacher.weights_path) if teacher else None,
        versions={name: importlib.metadata.version(name) for name in ("ltkd", "torch", "numpy", "pillow")},
    )


def train_run(config: RunConfig, data: ImageData, out: Path, console: Console, title: str) -> Run:
    """Train what the configuration says, in ``out``; go on where an interrupted run stopped.

    A run that is complete is opened as it is.

    Raises:
        RunError: ``out`` holds something else, or a run of another configuration.
        TrainingError: The loss is no longer finite.
    """
    method = method_of(config.method)
    network = build_network(config.model, len(data.task.class_names), config.seed)
    teacher = _load_teacher(config, data)
    _claim(out, config, data.task)
    if (out / WEIGHTS_FILE).is_file():
        console.print(f"[dim]{title}: {out} is complete already[/dim]")
        return open_run(out)
    device = device_of(config.device)
    network.to(device)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=config.recipe.peak_learning_rate,
        momentum=config.recipe.momentum,
        weight_decay=config.recipe.weight_decay,
    )
    epochs_done = _load_checkpoint(out, network, optimizer)
    metrics = _read_metrics(out)[:epochs_done]
    with TrainingDisplay(console, title, config.recipe.epochs, len(data.train_labels), epochs_done) as display:
        for report in train(
            network,
            optimizer,
            data,
            method,
            config.recipe,
            teacher=teacher,
            seed=config.seed,
            device=device,
            epochs_done=epochs_done,
            on_step=display.step,
        ):
            metrics.append(report.as_flat())
            write_whole(out / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in metrics).encode())
            _save_checkpoint(out, network, optimizer, report.epoch)
            display.epoch(report)
    plot_curves(metrics, data.task.groups.names, title, out / CURVES_FILE)
    write_whole(out / WEIGHTS_FILE, save(_contiguous(network.state_dict())))
    shutil.rmtree((out / CHECKPOINT_FILE).parent)
    return open_run(out)


def _claim(out: Path, config: RunConfig, task: Task) -> None:
    """Make ``out`` the folder of this run, or find that it is already."""
    if (out / CONFIG_FILE).is_file():
        found = read_record(out / CONFIG_FILE, RunConfig, RunError)
        differing = [
            f"{name} is {getattr(found, name)}, asked for {getattr(config, name)}"
            for name in RunConfig.model_fields
            if name != "versions" and getattr(found, name) != getattr(config, name)
        ]
        if differing:
            raise RunError(f"{out} holds a run of another configuration ({'; '.join(differing)}); give another --out.")
        if read_record(out / TASK_FILE, Task, RunError) != task:
            raise RunError(f"{out} was trained on other images than {config.data.name} has now; give another --out.")
        return
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is not empty and no run folder; give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_record(out / TASK_FILE, task)
    write_record(out / CONFIG_FILE, config)


def _load_teacher(config: RunConfig, data: ImageData) -> nn.Module | None:
    if config.teacher is None:
        return None
    teacher = open_run(config.teacher)
    if teacher.task != data.task:
        raise RunError(f"the teacher {teacher.path} was trained on other images or groups; train it again on these.")
    return teacher.load_network().requires_grad_(False)


def _save_checkpoint(out: Path, network: nn.Module, optimizer: torch.optim.Optimizer, epochs_done: int) -> None:
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        tensors[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
    path = out / CHECKPOINT_FILE
    path.parent.mkdir(exist_ok=True)
    write_whole(path, save(_contiguous(tensors), metadata={"epochs_done": str(epochs_done)}))


def _load_checkpoint(out: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put network and momentum where the checkpoint has them; the number of epochs done, 0 without one."""
    path = out / CHECKPOINT_FILE
    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            epochs_done = int(file.metadata()["epochs_done"])
        tensors = load_file(path)
        network.load_state_dict(_below("network.", tensors))
        momentum = _below("momentum.", tensors)
        for name, parameter in network.named_parameters():
            optimizer.state[parameter]["momentum_buffer"] = momentum[name].to(parameter.device)
    except (SafetensorError, RuntimeError, KeyError, OSError) as reason:
        problem = str(reason).splitlines()[0]
        raise RunError(f"{path} is damaged ({problem}); remove {out} and train again.") from None
    return epochs_done


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _read_metrics(path: Path) -> list[Metrics]:
    file = path / METRICS_FILE
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _accuracy(line: Metrics) -> dict[str, float]:
    prefix = "accuracy_"
    return {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}
