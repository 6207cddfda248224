"""Speed and size of exported networks, and the effect of the calibration images on int8.

    python -m benchmarks.export [--run RUN] [--quick]

Prints a table and writes docs/benchmarks/export.json with all values, and export.png next to it. The compared models
take turns on one machine, and ratios are taken between neighbouring measurements. Speed depends neither on the weights
nor on the images, so the networks are untrained and the images are noise. Eager torch is timed in its default memory
format and in channels last, and compared by the faster of the two. Channels last with folded batch normalisation is
timed too, because our export folds it.

With --run (a run on long-tailed data), the calibration images of int8 are drawn five times balanced over the classes
and five times distributed like the training data, and weights of seven bits are compared with eight. Without --run this
part is omitted, and the report states it.
"""

import argparse
import copy
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.quantising import CALIBRATION_IMAGES, QuantisationInputs, load_inputs, losses_by_draw, losses_by_weights
from benchmarks.run_metadata import run_metadata, spread
from export.conversion.fp16 import to_fp16
from export.conversion.fp32 import PixelsToLogits, to_onnx
from export.conversion.int8 import Int8Config, collect_ranges
from export.conversion.int8_graph import WEIGHT_LIMIT
from export.conversion.session import CPU, CUDA, INPUT, OUTPUT, cuda_works, instruction_set, open_session
from ltkd.contract.class_groups import groups_by_share
from ltkd.contract.resources import num_cores
from ltkd.contract.task import Task
from ltkd.data.long_tail import long_tailed_counts
from ltkd.models.registry import build_network
from ltkd.training.plots import group_colours, label_axes, save_figure
from ltkd.training.run_folder import open_run

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "benchmarks" / "export.json"
NUM_CLASSES = 100
EIGHT_BITS = 127
EAGER, FOLDED = ("torch", "torch, channels last"), "torch, folded"

INT8_AT_32, ONNX_AT_1, SMALLER = 1.4, 1.5, 3.0
"""Targets: speed of int8 over fp32 at batch 32, of fp32 over eager torch at batch 1, and size of fp32 over int8."""

InferFunction = Callable[[NDArray[np.uint8]], object]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        networks: Names and input sides in pixels.
        rounds: How often each compared model is timed.
        seconds: Duration of one timing; at least one call.
        draws: Draws of calibration images.
        most_images: Largest number of certify images for the comparison of the draws.
    """

    networks: tuple[tuple[str, int], ...]
    rounds: int
    seconds: float
    draws: int
    most_images: int


FULL = Plan(
    networks=(("resnet20", 32), ("mobilenetv2", 32), ("torchvision/resnet18", 224), ("torchvision/mobilenet_v2", 224)),
    rounds=7,
    seconds=0.3,
    draws=5,
    most_images=5_000,
)
QUICK = Plan(networks=(("resnet8", 32),), rounds=2, seconds=0, draws=2, most_images=200)


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        part: The section of the table.
        what: Its name in the section.
        unit: Unit of the values.
        values: All values.
        ratio: Meaning of the ratios, if any.
        ratios: One ratio per round.
        at_least: Target for the median ratio.
    """

    part: str
    what: str
    unit: str
    values: Sequence[float]
    ratio: str | None = None
    ratios: Sequence[float] = field(default_factory=tuple)
    at_least: float | None = None

    def as_record(self) -> dict[str, object]:
        """The row for the JSON file."""
        record: dict[str, object] = {"part": self.part, "what": self.what, "unit": self.unit, **spread(self.values)}
        if self.ratio is not None:
            record["ratio"] = {"of": self.ratio, **spread(self.ratios), "at_least": self.at_least}
        return record


def speed_rows(name: str, size_px: int, plan: Plan) -> list[Row]:
    """Size and speed of one network as fp32, int8 and torch."""
    part = f"{name}, {size_px} px"
    network, task = _network(name, size_px), _task(size_px)
    fp32 = to_onnx(network, task)
    noise = np.random.default_rng(0).integers(0, 256, (32, size_px, size_px, 3), dtype=np.uint8)
    int8 = collect_ranges(fp32, noise[:8]).to_onnx_bytes(Int8Config("minmax", per_channel=True))
    rows = [
        Row(part, "fp32", "MB", [len(fp32) / 1e6]),
        Row(part, "int8", "MB", [len(int8) / 1e6], "fp32 / int8", [len(fp32) / len(int8)], SMALLER),
    ]
    models: dict[str, InferFunction] = {"fp32": _onnx_function(fp32), "int8": _onnx_function(int8)}
    times = time_in_turn(models, noise, plan)
    ratios = [plain / fast for plain, fast in zip(times["fp32"], times["int8"], strict=True)]
    rows += [
        Row(part, "batch 32, fp32", "ms", times["fp32"]),
        Row(part, "batch 32, int8", "ms", times["int8"], "fp32 / int8", ratios, INT8_AT_32),
    ]
    times = time_in_turn(models | _torch_functions(network, task), noise[:1], plan)
    eager = min(EAGER, key=lambda model: statistics.median(times[model]))
    rows += [Row(part, f"batch 1, {model}", "ms", times[model]) for model in (*EAGER, FOLDED)]
    for model, peer, target in (("fp32", eager, ONNX_AT_1), ("fp32", FOLDED, None), ("int8", eager, None)):
        ratios = [torch_ms / onnx_ms for torch_ms, onnx_ms in zip(times[peer], times[model], strict=True)]
        what = f"batch 1, {model}" + (" against folded" if peer == FOLDED else "")
        rows.append(Row(part, what, "ms", times[model], f"{peer} / {model}", ratios, target))
    return rows


def time_in_turn(
    models: Mapping[str, InferFunction], images_NSS3: NDArray[np.uint8], plan: Plan
) -> dict[str, list[float]]:
    """Milliseconds per batch: in every round, each model is timed once."""
    times: dict[str, list[float]] = {model: [] for model in models}
    for round_ in range(plan.rounds + 1):
        for model, call in models.items():
            time.sleep(0.02)  # the threads of the previous model spin for a while
            call(images_NSS3)
            calls, start = 0, time.perf_counter()
            while not calls or time.perf_counter() - start < plan.seconds:
                call(images_NSS3)
                calls += 1
            if round_:  # the first round is warm-up
                times[model].append(1000 * (time.perf_counter() - start) / calls)
    return times


def cuda_rows(name: str, size_px: int, plan: Plan) -> list[Row]:
    """Speed of one network on CUDA: fp32 without and with TF32, and fp16."""
    part = f"{name}, {size_px} px, CUDA"
    fp32 = to_onnx(_network(name, size_px), _task(size_px))
    models = {
        "fp32": _onnx_function(fp32, CUDA),
        "fp32 with TF32": _onnx_function(fp32, CUDA, tf32=True),
        "fp16": _onnx_function(to_fp16(fp32), CUDA),
    }
    noise = np.random.default_rng(0).integers(0, 256, (32, size_px, size_px, 3), dtype=np.uint8)
    rows = []
    for batch in (1, 32):
        times = time_in_turn(models, noise[:batch], plan)
        for model in models:
            ratios = [plain / fast for plain, fast in zip(times["fp32"], times[model], strict=True)]
            rows.append(Row(part, f"batch {batch}, {model}", "ms", times[model], f"fp32 / {model}", ratios))
    return rows


def _onnx_function(content: bytes, provider: str = CPU, *, tf32: bool = False) -> InferFunction:
    session = open_session(content, provider, tf32=tf32)
    return lambda images_NSS3: session.run([OUTPUT], {INPUT: images_NSS3})


def _torch_functions(network: nn.Module, task: Task) -> dict[str, InferFunction]:
    eager = PixelsToLogits(copy.deepcopy(network), task).eval()
    channels_last = copy.deepcopy(eager).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    folded = copy.deepcopy(channels_last)
    _fold(folded, task)

    def call(module: nn.Module) -> InferFunction:
        def infer(images_NSS3: NDArray[np.uint8]) -> object:
            with torch.inference_mode():
                return module(torch.from_numpy(images_NSS3)).numpy()

        return infer

    return {EAGER[0]: call(eager), EAGER[1]: call(channels_last), FOLDED: call(folded)}


def _fold(module: nn.Module, task: Task) -> None:
    """Fold each batch normalisation into the convolution that is executed right before it."""
    executed: list[tuple[str, nn.Module]] = []
    hooks = [
        part.register_forward_hook(lambda part, _, __, name=name: executed.append((name, part)))
        for name, part in module.named_modules()
        if not list(part.children())
    ]
    with torch.inference_mode():
        module(torch.zeros(1, task.input_px, task.input_px, 3, dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    for (conv_name, conv), (norm_name, norm) in itertools.pairwise(executed):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            module.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
            module.set_submodule(norm_name, nn.Identity())


def _task(size_px: int) -> Task:
    counts = long_tailed_counts([500] * NUM_CLASSES, 100)
    return Task(
        class_names=tuple(f"class {label}" for label in range(NUM_CLASSES)),
        train_counts=tuple(counts),
        groups=groups_by_share(counts),
        input_px=size_px,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )


def _network(name: str, size_px: int) -> nn.Module:
    """An untrained network with batch statistics, so that its activations neither vanish nor explode."""
    network = build_network(name, NUM_CLASSES, 0).train()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 3, size_px, size_px, generator=random))
    return network.eval()


def calibration_rows(inputs: QuantisationInputs, plan: Plan, report: Callable[[str], None]) -> list[Row]:
    """Losses per group with both kinds of calibration images, and their differences."""
    rows = []
    names = (*inputs.task.groups.names, "all")
    for rule, by_kind in losses_by_draw(inputs, plan.draws, report).items():
        for place, what, unit, scale in ((0, "accuracy lost", "points", 100), (1, "KL", "nats", 1)):
            for name in names:
                values = {kind: [scale * draw_[name][place] for draw_ in drawn] for kind, drawn in by_kind.items()}
                differences = [
                    natural - balanced_rows
                    for natural, balanced_rows in zip(values["natural"], values["balanced"], strict=True)
                ]
                rows += [Row(f"{rule}, {what}", f"{name}, {kind}", unit, values[kind]) for kind in by_kind]
                rows.append(Row(f"{rule}, {what}", f"{name}, natural less balanced", unit, differences))
    return rows


def weight_rows(inputs: QuantisationInputs) -> list[Row]:
    """Weights of seven and eight bits: their losses, and how often the predicted class differs from exact sums."""
    rows = []
    for bits, limit in ((7, WEIGHT_LIMIT), (8, EIGHT_BITS)):
        part = f"weights of {bits} bits, minmax, per channel"
        losses, differing = losses_by_weights(inputs, limit)
        rows += [
            Row(part, f"{name} lost, {how}", "points", [100 * by_group[name][0]])
            for how, by_group in losses.items()
            for name in (*inputs.task.groups.names, "all")
        ]
        rows.append(Row(part, "images whose class is not that of exact sums", "%", [100 * differing]))
    return rows


def table_of(rows: Sequence[Row]) -> Table:
    """The rows as a table."""
    table = Table(title="Exported networks")
    for column in ("what", "median", "lowest to highest", "ratio of", "median", "lowest to highest", "at least"):
        table.add_column(column, justify="left" if column in ("what", "ratio of") else "right")
    part = None
    for row in rows:
        if row.part != part:
            table.add_section()
            table.add_row(f"[bold]{row.part}")
            part = row.part
        ratio = (
            [row.ratio or "", f"{statistics.median(row.ratios):.2f}", _range(row.ratios)] if row.ratios else [""] * 3
        )
        limit = f"{row.at_least:g}" if row.at_least else ""
        table.add_row(row.what, f"{statistics.median(row.values):.3g} {row.unit}", _range(row.values), *ratio, limit)
    return table


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}" if len(values) > 1 else ""


def draw_figure(rows: Sequence[Row], groups: Sequence[str], out: Path) -> None:
    """Plot the ratios with their targets, and the additional loss with natural calibration images."""
    rows_with_target = [row for row in rows if row.at_least]
    calibration_differences = [
        row for row in rows if row.what.endswith("natural less balanced") and row.part.endswith("KL")
    ]
    figure = Figure(
        figsize=(12 if calibration_differences else 6.5, max(4.2, 0.34 * len(rows_with_target) + 1.4)),
        layout="constrained",
    )
    left = figure.add_subplot(1, 2 if calibration_differences else 1, 1)
    for place, row in enumerate(reversed(rows_with_target)):
        left.hlines(place, min(row.ratios), max(row.ratios), color="#1b6ca8", linewidth=3)
        left.plot(statistics.median(row.ratios), place, "o", color="#1b6ca8")
        left.plot(row.at_least, place, "|", color="#d1603d", markersize=14)
    left.set_yticks(
        range(len(rows_with_target)), [f"{row.part}\n{row.what}" for row in reversed(rows_with_target)], fontsize=7
    )
    left.set_xscale("log")
    ticks = (1, 1.5, 2, 3, 5, 10, 20, 50)
    left.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    left.minorticks_off()
    label_axes(left, x="ratio: median, lowest to highest; the mark is the target", y="", grid="x")
    if calibration_differences:
        right = figure.add_subplot(1, 2, 2)
        names = [*groups, "all"]
        rules = list(dict.fromkeys(row.part for row in calibration_differences))
        colours = group_colours(len(rules))
        for row in calibration_differences:
            name, rule = row.what.partition(",")[0], rules.index(row.part)
            places = [names.index(name) + 0.2 * (rule - (len(rules) - 1) / 2)] * len(row.values)
            right.plot(
                places, row.values, "o", color=colours[rule], alpha=0.7, label=row.part if name == "all" else None
            )
        right.axhline(0, color="#222222", linewidth=0.8)
        right.set_xticks(range(len(names)), names)
        right.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(rules))
        label_axes(right, x="group", y="KL (nats), natural minus balanced")
    save_figure(figure, out)


def json_record(rows: Sequence[Row], plan: Plan, command: str, subject: str) -> dict[str, object]:
    """The content of the JSON file."""
    metadata = run_metadata(command, ("torch", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy"))
    return {
        **metadata,
        "hardware": f"{metadata['hardware']}, {instruction_set()}",
        "load_before": round(os.getloadavg()[0], 2),
        "torch_threads": torch.get_num_threads(),
        "calibration": subject,
        "plan": asdict(plan),
        "rows": [row.as_record() for row in rows],
    }


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, help="run on long-tailed data, for the comparison of calibration images")
    parser.add_argument(
        "--quick", action="store_true", help="run everything once at sizes too small for meaningful values"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file; --quick writes it only if it is given")
    arguments = parser.parse_args()
    plan, console = (QUICK if arguments.quick else FULL), Console(width=150)
    torch.set_num_threads(num_cores())
    rows: list[Row] = []
    for name, size_px in plan.networks:
        console.print(f"[dim]{name}, {size_px} px")
        rows += speed_rows(name, size_px, plan)
        rows += cuda_rows(name, size_px, plan) if cuda_works() else []
    if not cuda_works():
        console.print("CUDA is not available: fp16, and fp32 with and without TF32, are not measured on it")
    subject, groups = "left out: no --run was given", ()
    if arguments.run:
        inputs = load_inputs(arguments.run, plan.most_images)
        groups = inputs.task.groups.names
        subject = f"{open_run(arguments.run).config.model} by {open_run(arguments.run).config.method.name}, "
        subject += f"{len(inputs.labels_N):,} images to measure on, "
        subject += f"{min(CALIBRATION_IMAGES, len(inputs.pool_label_N))} per draw"
        rows += calibration_rows(inputs, plan, lambda message: console.print(f"[dim]{message}"))
        rows += weight_rows(inputs)
    console.print(table_of(rows))
    console.print(f"calibration images: {subject}")
    if arguments.quick and arguments.out == OUT:
        return
    flags = [flag for flag, is_set in (("--run RUN", arguments.run), ("--quick", arguments.quick)) if is_set]
    content = json_record(rows, plan, " ".join(["python -m benchmarks.export", *flags]), subject)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=2) + "\n")
    draw_figure(rows, groups, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
