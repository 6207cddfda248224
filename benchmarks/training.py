"""Speed and memory of distillation by ltkd, compared with a usual training loop and with the limits of the project.

    python -m benchmarks.training [--compile] [--quick]

Prints a table and writes docs/benchmarks/training.json with all values, medians, and ratios with their range. The
compared loops (benchmarks/loops.py) run in turn (A B A B ...) on one machine, each in its own process, and ratios are
taken between neighbouring measurements. With CUDA, the loops are timed on the GPU, and also compiled with bfloat16.

The images are made here. Those of 32 px are random noise in memory, where CIFAR is kept too. Noise is as fast as
photographs there, because nothing is decoded. Those of 224 px are crops of JPEG files of 500 x 375 pixels and about 40
kB: noise of many scales, with about the detail of a photograph.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.loops import NUM_CLASSES, PLAIN_WORKERS, Loop, Measured, ltkd_epochs, measure
from benchmarks.run_metadata import run_metadata, spread
from ltkd.contract.class_groups import groups_by_share
from ltkd.contract.task import Task
from ltkd.data.batches import Shard, default_workers
from ltkd.data.long_tail import long_tailed_counts
from ltkd.methods.registry import METHODS, ClassStatistics, LossInputs

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "benchmarks" / "training.json"

PLAIN = "plain loop"
LOSSES = ("kd", "ltkd", "dkd", "bkd")  # the others are compared with the first
TREE_CLASSES = 4
PHOTO_PX = (500, 375)


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        narrow: resnet20 to resnet8 at 32 px.
        photos: resnet18 to itself at 224 px, from JPEG files.
        narrow_repeats: How often every loop of the narrow pair is timed.
        photo_repeats: The same for the photos.
        step_rounds: Timed epochs per loss, after one epoch of warm-up.
        step_steps: Steps of such an epoch.
        loss_rounds: How often every loss alone is timed.
        loss_calls: Number of calls per timing.
        apart: Whether every loop has its own process; otherwise the memory values have no meaning.
    """

    narrow: Loop
    photos: Loop
    narrow_repeats: int
    photo_repeats: int
    step_rounds: int
    step_steps: int
    loss_rounds: int
    loss_calls: int
    apart: bool = True


def full_plan(device: str) -> Plan:
    """The plan for reported values."""
    on_gpu = device == "cuda"
    return Plan(
        narrow=Loop("ltkd", "resnet20", "resnet8", 32, 64, steps=800 if on_gpu else 60, device=device),
        photos=Loop(
            "ltkd",
            "torchvision/resnet18",
            "torchvision/resnet18",
            224,
            16,
            steps=100 if on_gpu else 5,
            device=device,
        ),
        narrow_repeats=5,
        photo_repeats=3,
        step_rounds=20 if on_gpu else 10,
        step_steps=200 if on_gpu else 20,
        loss_rounds=15,
        loss_calls=200,
    )


def quick_plan(device: str) -> Plan:
    """A smoke test: everything once, at sizes too small for meaningful values."""
    return Plan(
        narrow=Loop("ltkd", "resnet8", "resnet8", 32, 4, steps=2, device=device),
        photos=Loop("ltkd", "torchvision/resnet18", "torchvision/resnet18", 112, 2, steps=2, workers=0, device=device),
        narrow_repeats=1,
        photo_repeats=1,
        step_rounds=2,
        step_steps=2,
        loss_rounds=2,
        loss_calls=2,
        apart=False,
    )


@dataclass(frozen=True)
class Limit:
    """The limit of a ratio.

    Attributes:
        at_least: Lowest acceptable ratio; None if lower is better.
        at_most: Highest acceptable ratio.
    """

    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        return f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"


CIFAR_ON_CUDA, CIFAR_ON_CPU, PHOTOS_ON_CPU = Limit(at_least=5), Limit(at_least=1.5), Limit(at_least=1)
LTKD_OVER_KD = Limit(at_most=1.03)


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        part: The section of the table.
        what: Its name in the section.
        unit: Unit of the values.
        values: All values.
        to: What the ratios are relative to, if any.
        ratios: One per repeat: the value over the neighbouring value.
        limit: Limit of the median ratio.
    """

    part: str
    what: str
    unit: str
    values: Sequence[float]
    to: str | None = None
    ratios: Sequence[float] = ()
    limit: Limit | None = None

    def as_record(self) -> dict[str, object]:
        """The row for the JSON file."""
        record: dict[str, object] = {"part": self.part, "what": self.what, "unit": self.unit, **spread(self.values)}
        if self.to is not None:
            record["ratio"] = {
                "to": self.to,
                **spread(self.ratios),
                "limit": str(self.limit) if self.limit else None,
            }
        return record


def variants(loop: Loop, *, compiled: bool) -> dict[str, Loop]:
    """The compared loops, in the order in which they take turns."""
    loops = {PLAIN: replace(loop, kind="plain"), "ltkd": loop}
    if loop.tree is None:
        loops["ltkd, kept teacher logits"] = replace(loop, views=1)
    if compiled and loop.device == "cpu":
        loops["ltkd, compiled"] = replace(loop, compiled=True)
    if loop.device == "cuda":
        loops["ltkd, bfloat16, compiled"] = replace(loop, compiled=True, precision="bfloat16")
    return loops


def time_in_turn(
    loops: Mapping[str, Loop], repeats: int, *, apart: bool, report: Callable[[str], None]
) -> dict[str, list[Measured]]:
    """Time every loop ``repeats`` times: each loop once, then each loop again."""
    found: dict[str, list[Measured]] = {name: [] for name in loops}
    for repeat in range(repeats):
        for name, loop in loops.items():
            report(f"{loop.teacher} to {loop.student}, {name}, {repeat + 1} of {repeats}")
            found[name].append(_measure_in_subprocess(loop) if apart else measure(loop))
    return found


def _measure_in_subprocess(loop: Loop) -> Measured:
    command = [sys.executable, "-m", "benchmarks.loops", json.dumps(asdict(loop))]
    process = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(**json.loads(process.stdout.splitlines()[-1]))


def loop_rows(part: str, found: Mapping[str, Sequence[Measured]], limits: Mapping[str, Limit]) -> list[Row]:
    """Throughput and memory of every loop, with the ratios to the plain loop."""
    rows = []
    for name, runs in found.items():
        speeds = [run.images_per_s for run in runs]
        ratios = [run.images_per_s / plain.images_per_s for run, plain in zip(runs, found[PLAIN], strict=True)]
        comparison = (PLAIN, ratios, limits.get(name)) if name != PLAIN else (None, (), None)
        rows.append(Row(part, name, "images/s", speeds, *comparison))
    for name, runs in found.items():
        total_mib = [run.process_mib + run.workers_mib for run in runs]
        ratios = [
            mib / (plain.process_mib + plain.workers_mib) for mib, plain in zip(total_mib, found[PLAIN], strict=True)
        ]
        comparison = (PLAIN, ratios, None) if name != PLAIN else (None, (), None)
        rows.append(Row(part, f"{name}, peak memory with its workers", "MiB", total_mib, *comparison))
        rows.append(Row(part, f"{name}, of that its workers", "MiB", [run.workers_mib for run in runs]))
    return rows


def step_milliseconds(loop: Loop, rounds: int) -> dict[str, list[float]]:
    """Milliseconds per step for every loss: trainings on the same images, one epoch of each in turn."""
    trainings = {name: ltkd_epochs(replace(loop, method=name), rounds + 2) for name in LOSSES}
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    for round_ in range(rounds + 1):
        for name in LOSSES if round_ % 2 == 0 else reversed(LOSSES):
            epoch_report = next(trainings[name])
            if round_ > 0:  # the first round is warm-up
                times[name].append(1000 * loop.batch_size / epoch_report.images_per_s)
    return times


def loss_microseconds(device: str, rounds: int, calls: int, batch_size: int = 64) -> dict[str, list[float]]:
    """Microseconds per forward and backward pass of every loss alone, including its cross-entropy."""
    counts = long_tailed_counts([500] * NUM_CLASSES, 100)
    task = Task(
        class_names=tuple(map(str, range(NUM_CLASSES))),
        train_counts=tuple(counts),
        groups=groups_by_share(counts),
        input_px=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    classes = ClassStatistics(task).to(device)
    random = torch.Generator().manual_seed(0)
    student_NC, teacher_NC = torch.randn(2, batch_size, NUM_CLASSES, generator=random).to(device)
    labels_N = torch.randint(NUM_CLASSES, (batch_size,), generator=random).to(device)
    batch = LossInputs(student_NC.clone().requires_grad_(), teacher_NC, labels_N, classes, progress=0.5)
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    for round_ in range(rounds + 1):
        for name in LOSSES if round_ % 2 == 0 else reversed(LOSSES):
            method = METHODS[name]()
            begin = time.perf_counter()
            for _ in range(calls):
                batch.student_NC.grad = None
                method(batch).backward()  # type: ignore[no-untyped-call]
            if device == "cuda":
                torch.cuda.synchronize()
            if round_ > 0:  # the first round is warm-up
                times[name].append(1e6 * (time.perf_counter() - begin) / calls)
    return times


def loss_rows(steps: Mapping[str, Sequence[float]], loss_times: Mapping[str, Sequence[float]]) -> list[Row]:
    """The cost of a loss: in a whole step, alone, and the second relative to the first."""
    part, kd = "the loss", LOSSES[0]
    rows = []
    for what, unit, times in (("a step with", "ms", steps), ("alone:", "us", loss_times)):
        for name, values in times.items():
            ratios = [value / plain for value, plain in zip(values, times[kd], strict=True)]
            limit = LTKD_OVER_KD if name == "ltkd" and unit == "ms" else None
            comparison = (f"{what} {kd}", ratios, limit) if name != kd else (None, (), None)
            rows.append(Row(part, f"{what} {name}", unit, values, *comparison))
    # a step varies by more than a loss costs; the difference of the losses alone, relative to a median step, does not
    step_us = 1000 * statistics.median(steps[kd])
    relative_cost = [
        1 + (ltkd - plain) / step_us for ltkd, plain in zip(loss_times["ltkd"], loss_times[kd], strict=True)
    ]
    differences = [ltkd - plain for ltkd, plain in zip(loss_times["ltkd"], loss_times[kd], strict=True)]
    rows.append(
        Row(part, "ltkd less kd, alone", "us", differences, f"a step with {kd}, plus that", relative_cost, LTKD_OVER_KD)
    )
    return rows


def write_photos(root: Path, num_train: int) -> None:
    """Write class folders with ``num_train`` training images, and one test image per class."""
    for split, count, seed in (("train", num_train, 0), ("test", TREE_CLASSES, 1)):
        for number in range(count):
            folder = root / split / f"class{number % TREE_CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = photo_like_noise(np.random.default_rng((seed, number)))
            Image.fromarray(pixels).save(folder / f"{number:04}.jpg", quality=85)


def photo_like_noise(random: np.random.Generator) -> NDArray[np.uint8]:
    """Noise of many scales, strongest at the coarsest scale, uint8 [375, 500, 3]."""
    width, height = PHOTO_PX
    image_HW3 = 128 + random.normal(0, 6, (height, width, 3))
    for across, strength in ((4, 60), (8, 40), (24, 22), (72, 20)):
        coarse = random.normal(0, strength, (3, across * 3 // 4, across)).astype(np.float32)
        layers = [np.asarray(Image.fromarray(layer).resize(PHOTO_PX, Image.Resampling.BICUBIC)) for layer in coarse]
        image_HW3 += np.stack(layers, axis=2)
    return image_HW3.clip(0, 255).astype(np.uint8)


def measure_plan(plan: Plan, *, compiled: bool, report: Callable[[str], None]) -> list[Row]:
    """Measure everything in a plan."""
    on_gpu = plan.narrow.device == "cuda"
    limits = {"ltkd, bfloat16, compiled": CIFAR_ON_CUDA} if on_gpu else {"ltkd": CIFAR_ON_CPU}
    loops = variants(plan.narrow, compiled=compiled)
    rows = loop_rows(
        _part_name(plan.narrow), time_in_turn(loops, plan.narrow_repeats, apart=plan.apart, report=report), limits
    )
    with tempfile.TemporaryDirectory() as tree:
        report("making photos")
        write_photos(Path(tree), plan.photos.num_images)
        loops = variants(replace(plan.photos, tree=tree), compiled=compiled)
        limits = {} if on_gpu else {"ltkd": PHOTOS_ON_CPU}
        rows += loop_rows(
            _part_name(plan.photos), time_in_turn(loops, plan.photo_repeats, apart=plan.apart, report=report), limits
        )
    report("a step with every loss")
    steps = step_milliseconds(replace(plan.narrow, steps=plan.step_steps), plan.step_rounds)
    report("every loss alone")
    return rows + loss_rows(steps, loss_microseconds(plan.narrow.device, plan.loss_rounds, plan.loss_calls))


def _part_name(loop: Loop) -> str:
    return f"{loop.teacher} to {loop.student}, {loop.size_px} px, batch {loop.batch_size}"


def table_of(rows: Sequence[Row]) -> Table:
    """The rows as a table."""
    table = Table(title="Distillation compared with the plain loop and its limits")
    for column in ("what", "median", "lowest to highest", "ratio", "lowest to highest", "limit"):
        table.add_column(column, justify="left" if column == "what" else "right")
    part = None
    for row in rows:
        if row.part != part:
            table.add_section()
            table.add_row(f"[bold]{row.part}")
            part = row.part
        ratio = [f"{statistics.median(row.ratios):.3f}", _range(row.ratios, 3)] if row.ratios else ["", ""]
        table.add_row(
            row.what,
            f"{statistics.median(row.values):,.1f} {row.unit}",
            _range(row.values, 1),
            *ratio,
            str(row.limit or ""),
        )
    return table


def _range(values: Sequence[float], digits: int) -> str:
    return f"{min(values):,.{digits}f} to {max(values):,.{digits}f}"


def json_record(rows: Sequence[Row], plan: Plan, command: str) -> dict[str, object]:
    """The content of the JSON file."""
    metadata = run_metadata(command, ("torch", "torchvision", "numpy"))
    if plan.narrow.device == "cuda":
        metadata["hardware"] = f"{metadata['hardware']}, {torch.cuda.get_device_name()}"
    return {
        **metadata,
        "torch_threads": torch.get_num_threads(),
        "workers": {"plain loop": PLAIN_WORKERS, "ltkd, from files": default_workers(Shard())},
        "plan": asdict(plan),
        "rows": [row.as_record() for row in rows],
    }


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.partition("\n")[0])
    parser.add_argument("--compile", action="store_true", help="also time our loop compiled on the CPU")
    parser.add_argument(
        "--quick", action="store_true", help="run everything once at sizes too small for meaningful values"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file; --quick writes it only if it is given")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not arguments.quick else "cpu"
    plan = quick_plan(device) if arguments.quick else full_plan(device)
    console = Console(width=150)
    rows = measure_plan(plan, compiled=arguments.compile, report=lambda message: console.print(f"[dim]{message}"))
    console.print(table_of(rows))
    if arguments.quick and arguments.out == OUT:
        return
    flags = [flag for flag, is_set in (("--compile", arguments.compile), ("--quick", arguments.quick)) if is_set]
    content = json_record(rows, plan, " ".join(["python -m benchmarks.training", *flags]))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
