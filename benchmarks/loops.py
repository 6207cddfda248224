"""The two loops that benchmarks/training.py compares: ours, and distillation code as it is usually written.

    python -m benchmarks.loops LOOP

times one of them in a process of its own; LOOP is JSON, and so is the line that is printed. Both loops pass twice over
the images: the first epoch warms up (threads, workers, compilation, kept logits) and shows the memory, the second is
timed from its beginning to its end. Networks are not trained ones: what a step costs does not depend on its weights.

Shape legend: N images, B of them in a batch, S pixels a side, C classes.
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
from ltkd.data.batches import batches_of
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
    """What is timed.

    Attributes:
        kind: Our loop, or the plain one.
        teacher: Its network.
        student: The network that learns.
        size_px: Side of the images.
        batch_size: Images of a step.
        steps: Steps of an epoch.
        tree: Class folders of JPEG files; None takes noise in memory, as CIFAR lies in memory.
        workers: Processes that decode JPEG files for our loop; None is its default.
        method: What our loop minimises; the plain one always distils by KD.
        views: Fixed views whose teacher logits are kept; with 1 the timed epoch is that of a second student.
        device: ``cpu`` or ``cuda``.
        precision: Of our loop's forward passes.
        compiled: Whether our loop's passes are compiled.
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
    """What one process found.

    Attributes:
        images_per_s: Training throughput of a whole epoch.
        process_mib: Most resident memory of the training process.
        workers_mib: Most that its workers had beside it; pages of libraries are not counted again.
    """

    images_per_s: float
    process_mib: float
    workers_mib: float


def measured(loop: Loop) -> Measured:
    """Time a loop in this process."""
    return (_measured_ltkd if loop.kind == "ltkd" else _measured_plain)(loop)


def noise(loop: Loop) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Random pixels uint8 [N, S, S, 3] and labels [N]; no loop is faster or slower for what they show."""
    shape = (loop.num_images, loop.size_px, loop.size_px, 3)
    pixels_NSS3 = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return pixels_NSS3, np.arange(loop.num_images) % min(NUM_CLASSES, loop.num_images)


def ltkd_epochs(
    loop: Loop, epochs: int, on_step: Callable[[Position, int], None] = lambda progress, num_images: None
) -> Iterator[EpochReport]:
    """The reports of a training by ltkd; the last of them would look at the test set and is better not asked for."""
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
    learner = TrainState(student, optimizer, torch.amp.GradScaler(loop.device, enabled=loop.precision == "float16"))
    if loop.compiled:
        student.compile()
    batches = batches_of(
        data, batch_size=loop.batch_size, seed=0, device=device, views=loop.views, workers=loop.workers
    )
    taught_by = build_network(loop.teacher, num_classes, seed=1)
    with tempfile.TemporaryDirectory() as kept:
        teacher = (
            Teacher(taught_by, execution)
            if loop.views is None
            else CachedTeacher(
                taught_by, execution, Path(kept), drawn_by="seed0", num_images=len(data.train_labels), views=loop.views
            )
        )
        yield from train(learner, data, batches, method, recipe, teacher=teacher, execution=execution, on_step=on_step)


def _measured_ltkd(loop: Loop) -> Measured:
    memory = _Memory()

    def look(progress: Position, num_images: int) -> None:
        if progress.epoch == 0:
            memory.look()

    reports = ltkd_epochs(loop, 3, look)
    next(reports)
    images_per_s = next(reports).images_per_s
    return memory.measured(images_per_s)


def _measured_plain(loop: Loop) -> Measured:
    memory = _Memory()
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
                memory.look()
        images_per_s = losses.count / (time.perf_counter() - begin)
    return memory.measured(images_per_s)


@dataclass
class _Average:
    """A running mean, as training scripts keep them."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float, count: int) -> None:
        self.total += value * count
        self.count += count


class _Pictures(torch_data.Dataset[tuple[Tensor, int]]):
    """Arrays in memory that are turned into pictures one at a time, as torchvision's CIFAR100 does."""

    def __init__(self, loop: Loop, transform: Callable[[Image.Image], Tensor]) -> None:
        self._pixels_NSS3, self._labels_N = noise(loop)
        self._transform = transform

    def __len__(self) -> int:
        return len(self._labels_N)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._pixels_NSS3[row])), int(self._labels_N[row])


def _plain_dataset(loop: Loop) -> tuple[torch_data.Dataset[tuple[Tensor, int]], int]:
    """The images as usual code prepares them, and how many classes they have."""
    from torchvision import datasets, transforms  # noqa: PLC0415  # the memory of our loop is measured without it

    end = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    if loop.tree is None:
        pictures = _Pictures(loop, transforms.Compose([transforms.RandomCrop(loop.size_px, padding=4), *end]))
        return pictures, min(NUM_CLASSES, len(pictures))
    folder = datasets.ImageFolder(
        str(Path(loop.tree) / "train"), transforms.Compose([transforms.RandomResizedCrop(loop.size_px), *end])
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


class _Memory:
    """The most memory that this process and its workers have had."""

    def __init__(self) -> None:
        self._workers_kib = 0

    def look(self) -> None:
        """Note what the workers have now, beside what they share with this process."""
        whole = sum(_kib(f"/proc/{process}/smaps_rollup", "Pss_Anon", "Pss_Shmem") for process in _processes())
        self._workers_kib = max(self._workers_kib, whole - _kib("/proc/self/status", "RssAnon", "RssShmem"))

    def measured(self, images_per_s: float) -> Measured:
        """With the peak of this process, which the system keeps."""
        process_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return Measured(images_per_s, process_kib / 1024, self._workers_kib / 1024)


def _processes() -> list[int]:
    """This process and all that it started, and those that they started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [os.getpid()]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


def _kib(file: str, *names: str) -> int:
    """The sum of some lines of a file below /proc; 0 if its process has ended."""
    with suppress(OSError):
        fields = dict(line.split(":", 1) for line in Path(file).read_text().splitlines() if ":" in line)
        return sum(int(fields[name].split()[0]) for name in names)
    return 0


if __name__ == "__main__":
    print(json.dumps(asdict(measured(Loop(**json.loads(sys.argv[1]))))))
