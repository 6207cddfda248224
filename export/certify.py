"""From a run to a certified bundle, or to a rejected candidate and the reason.

Shape legend: N images, S side in pixels, M sampled images, C classes.
"""

import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.candidate import CPU, open_session, run, runtime_version
from export.convert import to_onnx
from export.gates import (
    FP32_MARGINS,
    GroupParity,
    Margins,
    compare,
    decisions,
    numeric,
    structure,
    task_accuracy,
    worst,
)
from export.parity import ParityReport, Runtime, certify_data
from export.reference import torch_logits
from export.views import topped_up
from ltkd.bundle import (
    GOLDEN_FILE,
    MANIFEST_FILE,
    MODEL_FILES,
    PARITY_FILE,
    Golden,
    Manifest,
    Source,
    check_replaceable,
    record_of,
    staged_bundle,
)
from ltkd.data import ImageData, load_data
from ltkd.errors import DataError, RunError
from ltkd.files import Images
from ltkd.groups import ClassGroups
from ltkd.records import sha256_of, write_record, write_whole
from ltkd.runs import CONFIG_FILE, Run, open_run
from ltkd.task import Task

REJECTED_DIRECTORY, CANDIDATE_FILE = "rejected", "candidate.onnx"
NUMERIC_IMAGES = 256
GOLDEN_PER_GROUP = 4


@dataclass(frozen=True)
class Export:
    """How an export ended.

    Attributes:
        report: What the gates said.
        path: The bundle; after any verdict but PASS the folder with the rejected candidate and its report.
    """

    report: ParityReport
    path: Path


def export_run(run_dir: Path, out: Path, margins: Margins = FP32_MARGINS, data: ImageData | None = None) -> Export:
    """Convert a run's network, put it through the gates on the test images, and write a bundle if it passes.

    Otherwise nothing appears at ``out``, what is there stays as it is, and the candidate goes to
    ``rejected/`` beside it.

    Args:
        run_dir: A complete run.
        out: The bundle's directory; an earlier bundle there is replaced as a whole.
        margins: The loss of accuracy that is acceptable.
        data: The run's images where they are in memory already; None loads them.

    Raises:
        RunError: The run cannot be used, or its data set is no longer what it was trained on.
        DataError: The images cannot be loaded.
        BundleError: ``out`` is something else than a bundle.
    """
    check_replaceable(out)  # before minutes of certifying
    trained = open_run(run_dir)
    data = data or load_data(trained.config.data)
    if data.task != trained.task:
        raise RunError(
            f"{run_dir} was trained on other images or groups than {trained.config.data.name} has now; train again."
        )
    source = trained.config.data
    description = f"the {len(data.test_labels):,} test images of {source.root.name if source.root else source.name}"
    images, label_N, num_views = topped_up(data, margins)
    if num_views:
        description += f", too few to certify alone, and {num_views:,} random views of them"
    candidate, report = certify(trained.load_network(), trained.task, images, label_N, description, margins)
    if report.verdict != "PASS":
        return Export(report, _reject(out, candidate, report))
    golden = golden_of(candidate, trained.task.groups, data.test_images, data.test_labels)
    with staged_bundle(out) as stage:
        _fill(stage, out.resolve().name, trained, candidate, report, golden)
    return Export(report, out)


def certify(
    network: nn.Module,
    task: Task,
    images: Images,
    label_N: NDArray[np.int64],
    description: str,
    margins: Margins = FP32_MARGINS,
) -> tuple[bytes, ParityReport]:
    """Convert any network and put the result through the gates.

    Args:
        network: Takes normalised float32 [N, 3, S, S], gives logits [N, C].
        task: Its classes, groups and preprocessing.
        images: Images that chose nothing: neither weights nor settings.
        label_N: Their classes.
        description: Which images these are, in words, for the report.
        margins: The loss of accuracy that is acceptable.

    Returns:
        The ONNX file, and what the gates say of it.

    Raises:
        DataError: Images or labels do not fit the task.
        RunError: The network itself gives logits that are not finite.
    """
    candidate = to_onnx(network, task)
    return candidate, judge(candidate, network, task, images, label_N, description, margins)


def judge(
    candidate: bytes,
    network: nn.Module,
    task: Task,
    images: Images,
    label_N: NDArray[np.int64],
    description: str,
    margins: Margins = FP32_MARGINS,
) -> ParityReport:
    """Put any ONNX file that claims to be the network through the gates; arguments are those of certify."""
    _check_images(task, images, label_N)
    gates = [structure(candidate, task, images)]
    rows: tuple[GroupParity, ...] = ()
    if gates[0].verdict == "PASS":
        reference_NC = torch_logits(network, task, images, torch.float32)
        candidate_NC = run(open_session(candidate), images)
        sample_M = spread_over_groups(label_N, task.groups, NUMERIC_IMAGES // len(task.groups.names) or 1)
        oracle_MC = torch_logits(network, task, images[sample_M], torch.float64)
        rows = compare(reference_NC, candidate_NC, label_N, task.groups, margins)
        gates += [
            numeric(oracle_MC, reference_NC[sample_M], candidate_NC[sample_M]),
            decisions(rows),
            task_accuracy(rows),
        ]
    return ParityReport(
        verdict=worst(gate.verdict for gate in gates),
        precision="fp32",
        candidate_sha256=hashlib.sha256(candidate).hexdigest(),
        runtime=Runtime(onnxruntime=runtime_version(), provider=CPU),
        versions={name: importlib.metadata.version(name) for name in ("ltkd", "torch", "onnx", "onnxscript", "numpy")},
        data=certify_data(description, images, label_N),
        margins=margins,
        gates=tuple(gates),
        groups=rows,
    )


def golden_of(candidate: bytes, groups: ClassGroups, images: Images, label_N: NDArray[np.int64]) -> Golden:
    """A few images of every group with the candidate's logits, for replay wherever the bundle is served."""
    sample_M = spread_over_groups(label_N, groups, GOLDEN_PER_GROUP)
    images_MSS3 = images[sample_M]
    return Golden(images_MSS3, label_N[sample_M], run(open_session(candidate), images_MSS3))


def spread_over_groups(label_N: NDArray[np.int64], groups: ClassGroups, per_group: int) -> NDArray[np.int64]:
    """Positions of up to ``per_group`` images of each group, evenly over its classes; the same every time."""
    by_class_N = np.argsort(label_N, kind="stable")
    picked = []
    for group in range(len(groups.names)):
        members = by_class_N[groups.index[label_N[by_class_N]] == group]
        steps = np.linspace(0, len(members), min(per_group, len(members)), endpoint=False).astype(np.int64)
        picked.append(members[steps])
    return np.concatenate(picked)


def _check_images(task: Task, images: Images, label_N: NDArray[np.int64]) -> None:
    expected = (len(label_N), task.input_px, task.input_px, 3)
    first = images[:1]
    seen = (len(images), *first.shape[1:])
    if not len(label_N) or first.dtype != np.uint8 or seen != expected:
        raise DataError(
            f"the images are {first.dtype} {list(seen)}, expected uint8 {list(expected)} and at "
            "least one; bring them to the task's size with ltkd.images."
        )
    if label_N.min() < 0 or label_N.max() >= len(task.class_names):
        raise DataError(
            f"the labels run from {label_N.min()} to {label_N.max()}, the task has classes 0 to "
            f"{len(task.class_names) - 1}; give the images the task was made for."
        )


def _fill(stage: Path, name: str, trained: Run, candidate: bytes, report: ParityReport, golden: Golden) -> None:
    (stage / MODEL_FILES["fp32"]).write_bytes(candidate)
    (stage / GOLDEN_FILE).write_bytes(golden.to_bytes())
    write_record(stage / PARITY_FILE, report)
    source = Source(
        run=trained.path.resolve().name,
        config_sha256=sha256_of(trained.path / CONFIG_FILE),
        weights_sha256=sha256_of(trained.weights_path),
        model=trained.config.model,
        method=trained.config.method.name,
        versions=report.versions,
    )
    manifest = Manifest(
        name=name,
        task=trained.task,
        precisions={"fp32": record_of(stage / MODEL_FILES["fp32"])},
        parity=record_of(stage / PARITY_FILE),
        golden=record_of(stage / GOLDEN_FILE),
        certified_on=report.data.description,
        source=source,
    )
    write_record(stage / MANIFEST_FILE, manifest)


def _reject(out: Path, candidate: bytes, report: ParityReport) -> Path:
    rejected = out.parent / REJECTED_DIRECTORY / out.resolve().name
    rejected.mkdir(parents=True, exist_ok=True)
    write_whole(rejected / CANDIDATE_FILE, candidate)
    write_record(rejected / PARITY_FILE, report)
    return rejected
