"""The two training loops that benchmarks/training.py compares: ours, and a distillation script in its usual form.

    python -m benchmarks.loops LOOP

times one of them in its own process. LOOP is JSON, and the result is printed as a line of JSON. Both loops train for
two epochs: the first is warm-up (threads, workers, compilation, cached logits) and shows the memory, the second is
timed as a whole. The networks are untrained, because the duration of a step does not depend on the weights.

Shape legend: N images, B of them in a batch, S side in pixels, C classes.
"""

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils import data as torch_data

from ltkd.config import ComputePrecision, Execution, Recipe
from ltkd.contract.class_groups import groups_by_share
from ltkd.contract.task import Task
from ltkd.data.batches import make_batches
from ltkd.data.datasets import Dataset, data_config, load_dataset
from ltkd.methods.registry import METHODS
from ltkd.models.registry import build_network
from ltkd.training.loop import EpochReport, Position, Student, TrainState, train
from ltkd.training.teacher import CachedTeacher, Teacher

NUM_CLASSES = 100
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
PLAIN_WORKERS = 2
TEMPERATURE = 4.0


@dataclass(frozen=True)
class Loop:
    """A configuration to be timed.

    Attributes:
        kind: Our loop or the plain loop.
        teacher: Name of the teacher network.
        student: Name of the student network.
        size_px: Side of the images.
        batch_size: Images per step.
        steps: Steps per epoch.
        tree: Class folders of JPEG files; None for noise in memory, where CIFAR is kept too.
        workers: Processes that decode JPEG files for our loop; None for the default.
        method: Method of our loop; the plain loop always uses KD.
        views: Number of fixed augmented views with cached teacher logits; with 1, the timed epoch is that of a second
            student.
        device: ``cpu`` or ``cuda``.
        precision: Precision of the forward passes of our loop.
        compiled: Whether the passes of our loop are compiled.
    """

    kind: Literal["ltkd", "plain"]
    teacher: str
    student: str
    size_px: int
    batch_size: int
    steps: int
    tree: str | None = None
    workers: int | None = None
    method: str = "ltkd"
    views: int | None = None
    device: str = "cpu"
    precision: ComputePrecision = "float32"
    compiled: bool = False

    @property
    def num_images(self) -> int:
        """N."""
        return self.steps * self.batch_size


@dataclass(frozen=True)
class Measured:
    """The result of one process.

    Attributes:
        images_per_s: Training throughput over an epoch.
        process_mib: Peak resident memory of the training process.
        workers_mib: Peak memory of its workers, without the pages that they share with it.
    """

    images_per_s: float
    process_mib: float
    workers_mib: float


def measure(loop: Loop) -> Measured:
    """Time a loop in this process."""
    return (_measure_ltkd if loop.kind == "ltkd" else _measure_plain)(loop)


def noise(loop: Loop) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Random pixels uint8 [N, S, S, 3] and labels [N]; the speed of a loop does not depend on the image content."""
    shape = (loop.num_images, loop.size_px, loop.size_px, 3)
    pixels_NSS3 = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return pixels_NSS3, np.arange(loop.num_images) % min(NUM_CLASSES, loop.num_images)


def ltkd_epochs(
    loop: Loop, epochs: int, on_step: Callable[[Position, int], None] = lambda progress, num_images: None
) -> Iterator[EpochReport]:
    """The epoch reports of an ltkd training; do not request the last one, because it would include an evaluation."""
    execution = Execution(device=loop.device, precision=loop.precision, compiled=loop.compiled)
    recipe = Recipe(
        name="benchmark",
        epochs=epochs,
        batch_size=loop.batch_size,
        peak_learning_rate=0.01,
        schedule="one-cycle",
        eval_every=epochs,
    )
    device, method, data = torch.device(loop.device), METHODS[loop.method](), _data(loop)
    num_classes = len(data.task.class_names)
    network = build_network(loop.student, num_classes, seed=0)
    student = Student(network).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        student.parameters(), lr=0.01, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    train_state = TrainState(student, optimizer, torch.amp.GradScaler(loop.device, enabled=loop.precision == "float16"))
    if loop.compiled:
        student.compile()
    batches = make_batches(
        data, batch_size=loop.batch_size, seed=0, device=device, views=loop.views, workers=loop.workers
    )
    teacher_network = build_network(loop.teacher, num_classes, seed=1)
    with tempfile.TemporaryDirectory() as cache_folder:
        teacher = (
            Teacher(teacher_network, execution)
            if loop.views is None
            else CachedTeacher(
                teacher_network,
                execution,
                Path(cache_folder),
                view_source="seed0",
                num_images=len(data.train_labels),
                views=loop.views,
            )
        )
        yield from train(
            train_state, data, batches, method, recipe, teacher=teacher, execution=execution, on_step=on_step
        )


def _measure_ltkd(loop: Loop) -> Measured:
    memory = _MemoryPeak()

    def record_in_first_epoch(progress: Position, num_images: int) -> None:
        if progress.epoch == 0:
            memory.record_memory()

    reports = ltkd_epochs(loop, 3, record_in_first_epoch)
    next(reports)
    images_per_s = next(reports).images_per_s
    return memory.result(images_per_s)


def _measure_plain(loop: Loop) -> Measured:
    memory = _MemoryPeak()
    device = torch.device(loop.device)
    dataset, num_classes = _plain_dataset(loop)
    loader = torch_data.DataLoader(
        dataset,
        batch_size=loop.batch_size,
        shuffle=True,
        num_workers=PLAIN_WORKERS,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    teacher = build_network(loop.teacher, num_classes, seed=1).to(device).eval()
    student = build_network(loop.student, num_classes, seed=0).to(device)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    images_per_s = 0.0
    for epoch in range(2):
        student.train()
        begin = time.perf_counter()
        losses, top_1, top_5 = _Average(), _Average(), _Average()
        for image_B3SS, labels_B in loader:
            images, labels = image_B3SS.to(device), labels_B.to(device)
            with torch.no_grad():
                teacher_logits = teacher(images)
            logits = student(images)
            distillation = F.kl_div(
                F.log_softmax(logits / TEMPERATURE, dim=1),
                F.softmax(teacher_logits / TEMPERATURE, dim=1),
                reduction="batchmean",
            )
            loss = 0.1 * F.cross_entropy(logits, labels) + 0.9 * TEMPERATURE**2 * distillation
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.add(loss.item(), len(labels))
            hits = logits.topk(min(5, num_classes)).indices == labels[:, None]
            top_1.add(hits[:, 0].float().mean().item(), len(labels))
            top_5.add(hits.any(1).float().mean().item(), len(labels))
            if epoch == 0:
                memory.record_memory()
        images_per_s = losses.count / (time.perf_counter() - begin)
    return memory.result(images_per_s)


@dataclass
class _Average:
    """A running mean, as training scripts use it."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float, count: int) -> None:
        self.total += value * count
        self.count += count


class _ImagesInMemory(torch_data.Dataset[tuple[Tensor, int]]):
    """Arrays in memory, converted to PIL images one at a time, as in torchvision's CIFAR100."""

    def __init__(self, loop: Loop, transform: Callable[[Image.Image], Tensor]) -> None:
        self._pixels_NSS3, self._labels_N = noise(loop)
        self._transform = transform

    def __len__(self) -> int:
        return len(self._labels_N)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._pixels_NSS3[row])), int(self._labels_N[row])


def _plain_dataset(loop: Loop) -> tuple[torch_data.Dataset[tuple[Tensor, int]], int]:
    """The dataset of the plain loop, and its number of classes."""
    from torchvision import datasets, transforms  # noqa: PLC0415  # our loop's memory is measured without torchvision

    last_transforms = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    if loop.tree is None:
        images = _ImagesInMemory(
            loop, transforms.Compose([transforms.RandomCrop(loop.size_px, padding=4), *last_transforms])
        )
        return images, min(NUM_CLASSES, len(images))
    folder = datasets.ImageFolder(
        str(Path(loop.tree) / "train"),
        transforms.Compose([transforms.RandomResizedCrop(loop.size_px), *last_transforms]),
    )
    return folder, len(folder.classes)


def _data(loop: Loop) -> Dataset:
    """The same images for our loop."""
    if loop.tree is not None:
        return load_dataset(data_config(loop.tree, None, "share", loop.size_px))
    pixels_NSS3, labels_N = noise(loop)
    counts = np.bincount(labels_N).tolist()
    task = Task(
        class_names=tuple(f"class {label}" for label in range(len(counts))),
        train_counts=tuple(counts),
        groups=groups_by_share(counts),
        input_px=loop.size_px,
        mean=MEAN,
        std=STD,
    )
    return Dataset(task, pixels_NSS3, labels_N, pixels_NSS3[:1], labels_N[:1], mirror=True)


class _MemoryPeak:
    """The peak memory of this process and its workers."""

    def __init__(self) -> None:
        self._workers_kib = 0

    def record_memory(self) -> None:
        """Record the current memory of the workers, without the part that they share with this process."""
        total_kib = sum(_kib(f"/proc/{process}/smaps_rollup", "Pss_Anon", "Pss_Shmem") for process in _processes())
        self._workers_kib = max(self._workers_kib, total_kib - _kib("/proc/self/status", "RssAnon", "RssShmem"))

    def result(self, images_per_s: float) -> Measured:
        """The result, with the peak memory of this process as the operating system reports it."""
        process_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return Measured(images_per_s, process_kib / 1024, self._workers_kib / 1024)


def _processes() -> list[int]:
    """This process and all its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has ended
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [os.getpid()]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def _kib(file: str, *names: str) -> int:
    """The sum of some fields of a file below /proc; 0 if its process has ended."""
    with suppress(OSError):
        fields = dict(line.split(":", 1) for line in Path(file).read_text().splitlines() if ":" in line)
        return sum(int(fields[name].split()[0]) for name in names)
    return 0


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Loop(**json.loads(sys.argv[1]))))))
