"""Speed and size of exported networks, and what the choice of calibration images does to int8.

    python -m benchmarks.export [--run RUN] [--quick]

Prints a table, and writes docs/benchmarks/export.json with every single value and export.png beside it. What is
compared takes turns on one machine, and a ratio is taken between neighbours. Speed depends neither on the weights nor
on the images, so networks are untrained and images are noise. Eager torch is timed as it is and in channels last, and
the faster of the two counts; beside them stands channels last with batch normalisation folded, as our export does it.

With --run, a run on long-tailed data, the calibration images of int8 are drawn five times balanced over the classes and
five times as the training data are distributed, and weights of seven bits are held against eight. Without it this part
is left out, and the report says so.
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

from benchmarks.circumstances import circumstances, spread
from benchmarks.quantising import CALIBRATION_IMAGES, Subject, losses_by_draw, losses_by_weights, subject_of
from export.conversion.fp16 import to_fp16
from export.conversion.fp32 import PixelsToLogits, to_onnx
from export.conversion.int8 import Int8Config, collect_ranges
from export.conversion.int8_graph import WEIGHT_LIMIT
from export.conversion.session import CPU, CUDA, INPUT, OUTPUT, cuda_works, isa, open_session
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
"""What is promised: int8 against fp32 at batch 32, fp32 against eager torch at batch 1, and the files' sizes."""

Call = Callable[[NDArray[np.uint8]], object]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        networks: Names and sides in pixels.
        rounds: Times that everything that is compared takes its turn.
        seconds: How long one of them is timed in a turn; at least one call.
        draws: Of calibration images.
        most_images: Certify images to measure the draws on.
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
    """One thing that was measured.

    Attributes:
        part: What it belongs to.
        what: Its name there.
        unit: Of the values.
        values: Every single one.
        ratio: What the ratios are of, if any.
        ratios: One a round.
        at_least: What the median ratio should reach.
    """

    part: str
    what: str
    unit: str
    values: Sequence[float]
    ratio: str | None = None
    ratios: Sequence[float] = field(default_factory=tuple)
    at_least: float | None = None

    def as_record(self) -> dict[str, object]:
        """Its form in the JSON."""
        record: dict[str, object] = {"part": self.part, "what": self.what, "unit": self.unit, **spread(self.values)}
        if self.ratio is not None:
            record["ratio"] = {"of": self.ratio, **spread(self.ratios), "at_least": self.at_least}
        return record


def speed_rows(name: str, size_px: int, plan: Plan) -> list[Row]:
    """Size and speed of one network in all its forms."""
    part = f"{name}, {size_px} px"
    network, task = _network(name, size_px), _task(size_px)
    fp32 = to_onnx(network, task)
    noise = np.random.default_rng(0).integers(0, 256, (32, size_px, size_px, 3), dtype=np.uint8)
    int8 = collect_ranges(fp32, noise[:8]).written(Int8Config("minmax", per_channel=True))
    rows = [
        Row(part, "fp32", "MB", [len(fp32) / 1e6]),
        Row(part, "int8", "MB", [len(int8) / 1e6], "fp32 / int8", [len(fp32) / len(int8)], SMALLER),
    ]
    forms: dict[str, Call] = {"fp32": _onnx_call(fp32), "int8": _onnx_call(int8)}
    times = in_turn(forms, noise, plan)
    ratios = [plain / fast for plain, fast in zip(times["fp32"], times["int8"], strict=True)]
    rows += [
        Row(part, "batch 32, fp32", "ms", times["fp32"]),
        Row(part, "batch 32, int8", "ms", times["int8"], "fp32 / int8", ratios, INT8_AT_32),
    ]
    times = in_turn(forms | _torch_calls(network, task), noise[:1], plan)
    eager = min(EAGER, key=lambda form: statistics.median(times[form]))
    rows += [Row(part, f"batch 1, {form}", "ms", times[form]) for form in (*EAGER, FOLDED)]
    for form, peer, limit in (("fp32", eager, ONNX_AT_1), ("fp32", FOLDED, None), ("int8", eager, None)):
        ratios = [torch_ms / onnx_ms for torch_ms, onnx_ms in zip(times[peer], times[form], strict=True)]
        what = f"batch 1, {form}" + (" against folded" if peer == FOLDED else "")
        rows.append(Row(part, what, "ms", times[form], f"{peer} / {form}", ratios, limit))
    return rows


def in_turn(forms: Mapping[str, Call], images_NSS3: NDArray[np.uint8], plan: Plan) -> dict[str, list[float]]:
    """Milliseconds a batch: every form for a moment, then every form again."""
    times: dict[str, list[float]] = {form: [] for form in forms}
    for round_ in range(plan.rounds + 1):
        for form, call in forms.items():
            time.sleep(0.02)  # the threads of the one before spin for a while
            call(images_NSS3)
            calls, start = 0, time.perf_counter()
            while not calls or time.perf_counter() - start < plan.seconds:
                call(images_NSS3)
                calls += 1
            if round_:  # the first warms up
                times[form].append(1000 * (time.perf_counter() - start) / calls)
    return times


def cuda_rows(name: str, size_px: int, plan: Plan) -> list[Row]:
    """Speed of one network on CUDA: fp32 without and with TF32, and fp16."""
    part = f"{name}, {size_px} px, CUDA"
    fp32 = to_onnx(_network(name, size_px), _task(size_px))
    forms = {
        "fp32": _onnx_call(fp32, CUDA),
        "fp32 with TF32": _onnx_call(fp32, CUDA, tf32=True),
        "fp16": _onnx_call(to_fp16(fp32), CUDA),
    }
    noise = np.random.default_rng(0).integers(0, 256, (32, size_px, size_px, 3), dtype=np.uint8)
    rows = []
    for batch in (1, 32):
        times = in_turn(forms, noise[:batch], plan)
        for form in forms:
            ratios = [plain / fast for plain, fast in zip(times["fp32"], times[form], strict=True)]
            rows.append(Row(part, f"batch {batch}, {form}", "ms", times[form], f"fp32 / {form}", ratios))
    return rows


def _onnx_call(content: bytes, provider: str = CPU, *, tf32: bool = False) -> Call:
    session = open_session(content, provider, tf32=tf32)
    return lambda images_NSS3: session.run([OUTPUT], {INPUT: images_NSS3})


def _torch_calls(network: nn.Module, task: Task) -> dict[str, Call]:
    eager = PixelsToLogits(copy.deepcopy(network), task).eval()
    last = copy.deepcopy(eager).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    folded = copy.deepcopy(last)
    _fold(folded, task)

    def call(module: nn.Module) -> Call:
        def infer(images_NSS3: NDArray[np.uint8]) -> object:
            with torch.inference_mode():
                return module(torch.from_numpy(images_NSS3)).numpy()

        return infer

    return {EAGER[0]: call(eager), EAGER[1]: call(last), FOLDED: call(folded)}


def _fold(module: nn.Module, task: Task) -> None:
    """Fold batch normalisation into the convolution that ran right before it."""
    ran: list[tuple[str, nn.Module]] = []
    hooks = [
        part.register_forward_hook(lambda part, _, __, name=name: ran.append((name, part)))
        for name, part in module.named_modules()
        if not list(part.children())
    ]
    with torch.inference_mode():
        module(torch.zeros(1, task.input_px, task.input_px, 3, dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    for (conv_name, conv), (norm_name, norm) in itertools.pairwise(ran):
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
    """Untrained, but with the statistics of its maps, so that they neither vanish nor explode."""
    network = build_network(name, NUM_CLASSES, 0).train()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 3, size_px, size_px, generator=random))
    return network.eval()


def calibration_rows(subject: Subject, plan: Plan, say: Callable[[str], None]) -> list[Row]:
    """What every group loses with either kind of calibration images, and how much less with balanced ones."""
    rows = []
    names = (*subject.task.groups.names, "all")
    for rule, found in losses_by_draw(subject, plan.draws, say).items():
        for place, what, unit, scale in ((0, "accuracy lost", "points", 100), (1, "KL", "nats", 1)):
            for name in names:
                values = {kind: [scale * draw_[name][place] for draw_ in drawn] for kind, drawn in found.items()}
                less = [natural - even for natural, even in zip(values["natural"], values["balanced"], strict=True)]
                rows += [Row(f"{rule}, {what}", f"{name}, {kind}", unit, values[kind]) for kind in found]
                rows.append(Row(f"{rule}, {what}", f"{name}, natural less balanced", unit, less))
    return rows


def weight_rows(subject: Subject) -> list[Row]:
    """Weights of seven bits and of eight: what they lose, and how often this processor answers unlike exact sums."""
    rows = []
    for bits, limit in ((7, WEIGHT_LIMIT), (8, EIGHT_BITS)):
        part = f"weights of {bits} bits, minmax, per channel"
        lost, differing = losses_by_weights(subject, limit)
        rows += [
            Row(part, f"{name} lost, {how}", "points", [100 * found[name][0]])
            for how, found in lost.items()
            for name in (*subject.task.groups.names, "all")
        ]
        rows.append(Row(part, "images whose class is not that of exact sums", "%", [100 * differing]))
    return rows


def table_of(rows: Sequence[Row]) -> Table:
    """The rows for reading."""
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
    """The ratios against what is promised, and what natural calibration images cost beside balanced ones."""
    promised = [row for row in rows if row.at_least]
    extra = [row for row in rows if row.what.endswith("natural less balanced") and row.part.endswith("KL")]
    figure = Figure(figsize=(12 if extra else 6.5, max(4.2, 0.34 * len(promised) + 1.4)), layout="constrained")
    left = figure.add_subplot(1, 2 if extra else 1, 1)
    for place, row in enumerate(reversed(promised)):
        left.hlines(place, min(row.ratios), max(row.ratios), color="#1b6ca8", linewidth=3)
        left.plot(statistics.median(row.ratios), place, "o", color="#1b6ca8")
        left.plot(row.at_least, place, "|", color="#d1603d", markersize=14)
    left.set_yticks(range(len(promised)), [f"{row.part}\n{row.what}" for row in reversed(promised)], fontsize=7)
    left.set_xscale("log")
    ticks = (1, 1.5, 2, 3, 5, 10, 20, 50)
    left.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    left.minorticks_off()
    label_axes(left, x="ratio: median, lowest to highest; the mark is what is promised", y="", grid="x")
    if extra:
        right = figure.add_subplot(1, 2, 2)
        names = [*groups, "all"]
        rules = list(dict.fromkeys(row.part for row in extra))
        colours = group_colours(len(rules))
        for row in extra:
            name, rule = row.what.partition(",")[0], rules.index(row.part)
            places = [names.index(name) + 0.2 * (rule - (len(rules) - 1) / 2)] * len(row.values)
            right.plot(
                places, row.values, "o", color=colours[rule], alpha=0.7, label=row.part if name == "all" else None
            )
        right.axhline(0, color="#222222", linewidth=0.8)
        right.set_xticks(range(len(names)), names)
        right.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(rules))
        label_axes(right, x="group", y="KL (nats), natural less balanced")
    save_figure(figure, out)


def report(rows: Sequence[Row], plan: Plan, command: str, subject: str) -> dict[str, object]:
    """What is written."""
    about = circumstances(command, ("torch", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy"))
    return {
        **about,
        "hardware": f"{about['hardware']}, {isa()}",
        "load_before": round(os.getloadavg()[0], 2),
        "torch_threads": torch.get_num_threads(),
        "calibration": subject,
        "plan": asdict(plan),
        "rows": [row.as_record() for row in rows],
    }


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, help="a run on long-tailed data, for the part about calibration images")
    parser.add_argument("--quick", action="store_true", help="run everything once at sizes that measure nothing")
    parser.add_argument("--out", type=Path, default=OUT, help="the JSON file; --quick writes it only where it is given")
    given = parser.parse_args()
    plan, console = (QUICK if given.quick else FULL), Console(width=150)
    torch.set_num_threads(num_cores())
    rows: list[Row] = []
    for name, size_px in plan.networks:
        console.print(f"[dim]{name}, {size_px} px")
        rows += speed_rows(name, size_px, plan)
        rows += cuda_rows(name, size_px, plan) if cuda_works() else []
    if not cuda_works():
        console.print("CUDA does not work here: fp16 beside fp32 with and without TF32 is left out")
    subject, groups = "left out: no --run was given", ()
    if given.run:
        found = subject_of(given.run, plan.most_images)
        groups = found.task.groups.names
        subject = f"{open_run(given.run).config.model} by {open_run(given.run).config.method.name}, "
        subject += (
            f"{len(found.label_N):,} images to measure on, {min(CALIBRATION_IMAGES, len(found.pool_label_N))} a draw"
        )
        rows += calibration_rows(found, plan, lambda what: console.print(f"[dim]{what}"))
        rows += weight_rows(found)
    console.print(table_of(rows))
    console.print(f"calibration images: {subject}")
    if given.quick and given.out == OUT:
        return
    flags = [flag for flag, asked in (("--run RUN", given.run), ("--quick", given.quick)) if asked]
    content = report(rows, plan, " ".join(["python -m benchmarks.export", *flags]), subject)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(content, indent=2) + "\n")
    draw_figure(rows, groups, given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
