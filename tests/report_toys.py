"""Parity reports and bundles from simulated predictions, for the tests of reports, bundles and ``verify``.

Shape legend: N images, C classes, K class groups, B bins.
"""

import functools
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.report.html import write_report
from export.report.model_card import model_card
from export.schema import (
    CandidateReport,
    ClassParity,
    ConfidenceCertificate,
    ConfidenceParity,
    DataRecord,
    Difference,
    FlipsByMargin,
    Gate,
    GroupParity,
    GroupReliability,
    Latency,
    LayerError,
    Margins,
    ParityReport,
    QuantisationTrial,
    ReliabilityBin,
    Runtime,
    SplitRecord,
    Verdict,
)
from ltkd.contract.bundle import (
    CARD_FILE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    PARITY_FILE,
    REPORT_FILE,
    CertifiedModel,
    Golden,
    Manifest,
    Precision,
    Provenance,
    file_record,
    staged_bundle,
)
from ltkd.contract.calibration import (
    HISTOGRAM_BINS,
    Abstention,
    Calibration,
    ConfidenceBin,
    GroupCalibration,
    Proportion,
    SetThreshold,
)
from ltkd.contract.class_groups import groups_by_share
from ltkd.contract.records import write_record
from ltkd.contract.task import Task

WORDS = (
    "apple",
    "bear",
    "clock",
    "dolphin",
    "elm",
    "fox",
    "girl",
    "hamster",
    "iris",
    "jug",
    "keyboard",
    "lamp",
    "motor",
)
IMAGES_PER_CLASS = 60
PROVIDERS: dict[Precision, str] = {
    "fp32": "CPUExecutionProvider",
    "fp16": "CUDAExecutionProvider",
    "int8": "CPUExecutionProvider",
}
MARGINS: dict[Precision, Margins] = {
    "fp32": Margins(overall=0.002, group=0.005),
    "fp16": Margins(overall=0.005, group=0.01),
    "int8": Margins(overall=0.01, group=0.02, groups={"tail": 0.03}),
}


def task_of(num_classes: int) -> Task:
    """Make a long-tailed task whose classes are not sorted by training count."""
    counts = [max(2, int(500 * 0.01 ** (index / (num_classes - 1)))) for index in range(num_classes)]
    names = [f"{WORDS[index % len(WORDS)]} {index // len(WORDS)}" for index in range(num_classes)]
    order = np.random.default_rng(3).permutation(num_classes)
    shuffled = tuple(counts[index] for index in order)
    return Task(
        class_names=tuple(names[index] for index in order),
        train_counts=shuffled,
        groups=groups_by_share(shuffled),
        input_px=32,
        mean=(0.5, 0.49, 0.44),
        std=(0.27, 0.26, 0.28),
    )


@functools.cache
def report_of(num_classes: int = 100, failing: Precision | None = None) -> ParityReport:
    """Make a report on fp32, fp16 and int8; the precision ``failing`` loses accuracy in the tail and fails."""
    task = task_of(num_classes)
    candidates = tuple(candidate_of(task, precision, precision == failing) for precision in PROVIDERS)
    return ParityReport(
        name="cifar100-student",
        verdict=candidates[0].verdict,
        reference="torch float32 of the run cifar100-student",
        groups=task.groups.names,
        data=DataRecord(
            description=f"the {100 * num_classes:,} test images of cifar100",
            splits=(
                SplitRecord(name="quantisation", num_images=1000, per_group=(330, 340, 330), sha256="1" * 64),
                SplitRecord(name="selection", num_images=2000, per_group=(660, 680, 660), sha256="2" * 64),
                SplitRecord(name="confidence", num_images=2000, per_group=(660, 680, 660), sha256="3" * 64),
                SplitRecord(name="certify", num_images=6000, per_group=(1980, 2040, 1980), sha256="4" * 64),
            ),
            num_views=1000,
            num_duplicates=3,
        ),
        versions={"ltkd": "0.4.0", "numpy": "2.4.1", "onnx": "1.23.2", "onnxruntime": "1.31.1", "torch": "2.15.0"},
        confidence=0.95,
        candidates=candidates,
    )


def candidate_of(task: Task, precision: Precision, failed: bool) -> CandidateReport:
    """Make one candidate. fp32 changes no prediction, the others change a few; a failed one loses tail accuracy."""
    rng = np.random.default_rng(len(task.class_names))
    labels_N = np.repeat(np.arange(len(task.class_names)), IMAGES_PER_CLASS)
    group_N = task.groups.index[labels_N]
    reference_N = rng.random(len(labels_N)) < np.array([0.72, 0.55, 0.31])[group_N]
    changes_N = rng.random(len(labels_N)) < {"fp32": 0.0, "fp16": 0.001, "int8": 0.012}[precision]
    damaged_N = (group_N == len(task.groups.names) - 1) & (rng.random(len(labels_N)) < 0.5)
    candidate_N = np.where(changes_N, ~reference_N, reference_N) & ~(damaged_N & failed)
    flipped_N = (reference_N != candidate_N) | (changes_N & (rng.random(len(labels_N)) < 0.5))
    margins = MARGINS[precision]
    rows = [
        _group(name, reference_N[of_N], candidate_N[of_N], flipped_N[of_N], margin)
        for name, of_N, margin in (
            *(
                (name, group_N == k, margins.groups.get(name, margins.group))
                for k, name in enumerate(task.groups.names)
            ),
            ("all", np.ones(len(labels_N), bool), margins.overall),
        )
    ]
    verdicts = [row.verdict for row in rows]
    verdict: Verdict = "FAIL" if "FAIL" in verdicts else "INCONCLUSIVE" if "INCONCLUSIVE" in verdicts else "PASS"
    return CandidateReport(
        precision=precision,
        verdict=verdict,
        file={"fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.onnx"}[precision],
        sha256=f"{list(PROVIDERS).index(precision):064x}",
        num_bytes={"fp32": 1_120_000, "fp16": 570_000, "int8": 316_000}[precision],
        runtime=Runtime(
            onnxruntime="1.31.1",
            provider=PROVIDERS[precision],
            isa="avx2",
            tf32=False if precision == "fp16" else None,
        ),
        margins=margins,
        gates=_gates(verdict, rows),
        groups=tuple(rows),
        classes=_classes(task, labels_N, reference_N, candidate_N),
        flips=_flips(task, flipped_N, group_N, rng),
        confidence=_confidence(rows, precision),
        certificate=certificate_of(task, rng),
        quantisation=_trials() if precision == "int8" else (),
        layers=_layers() if failed else (),
        latency=tuple(
            Latency(batch=batch, median_ms=median, low_ms=0.94 * median, high_ms=1.13 * median)
            for batch, median in {
                "fp32": ((1, 1.31), (32, 28.4)),
                "fp16": ((1, 0.82), (32, 1.9)),
                "int8": ((1, 0.97), (32, 17.6)),
            }[precision]
        ),
    )


def certificate_of(task: Task, rng: np.random.Generator) -> ConfidenceCertificate:
    """Certify a network that is overconfident before calibration; the rarest group gets no confidence threshold."""
    return ConfidenceCertificate(
        calibration=calibration_of(task),
        reliability=tuple(_reliability(name, k, rng) for k, name in enumerate(task.groups.names)),
        mean_set_size=4.37,
        empty_sets=0.004,
        num_temperature_images=1000,
        num_threshold_images=1000,
    )


def calibration_of(task: Task) -> Calibration:
    """Make the calibration of each group of a task."""
    last = len(task.groups.names) - 1
    return tuple(
        GroupCalibration(
            group=name,
            temperature=1.2 + 0.3 * k,
            expected_accuracy=(
                ConfidenceBin(above=0, up_to=0.5, accuracy=Proportion(value=0.41, low=0.33, high=0.49, n=150)),
                ConfidenceBin(above=0.5, up_to=1, accuracy=Proportion(value=0.83, low=0.77, high=0.88, n=210)),
            ),
            abstention=Abstention(
                target_precision=0.9,
                threshold=None if k == last else 0.71 + 0.05 * k,
                coverage=0.0 if k == last else 0.55 - 0.1 * k,
                precision=None if k == last else Proportion(value=0.93, low=0.91, high=0.95, n=620),
            ),
            prediction_set=SetThreshold(
                target_coverage=0.9,
                least_probability=0.05 / (k + 1),
                num_images=330,
                low=0.866,
                high=0.931,
                coverage=Proportion(value=0.9 - 0.01 * k, low=0.88 - 0.01 * k, high=0.915 - 0.01 * k, n=1980),
            ),
            predicted_share=(0.46, 0.33, 0.21)[min(k, 2)],
            confidence_counts=(50,) * HISTOGRAM_BINS,
        )
        for k, name in enumerate(task.groups.names)
    )


SOURCE = Provenance(
    run="cifar100-student",
    config_sha256="5" * 64,
    weights_sha256="6" * 64,
    model="resnet8",
    method="ltkd",
    versions={"torch": "2.15.0"},
)


def write_bundle(
    out: Path, task: Task, report: ParityReport, contents: Mapping[Precision, bytes], golden: Golden
) -> Path:
    """Write a bundle of the precisions that passed; the report gets the sizes and hashes of ``contents``."""
    candidates = tuple(
        candidate.model_copy(
            update={
                "sha256": hashlib.sha256(contents[candidate.precision]).hexdigest(),
                "num_bytes": len(contents[candidate.precision]),
            }
        )
        if candidate.precision in contents
        else candidate
        for candidate in report.candidates
    )
    report = report.model_copy(update={"candidates": candidates})
    with staged_bundle(out) as stage:
        models = {}
        for candidate in candidates:
            if candidate.verdict == "PASS" and candidate.precision in contents and candidate.certificate:
                (stage / candidate.file).write_bytes(contents[candidate.precision])
                models[candidate.precision] = CertifiedModel(
                    **file_record(stage / candidate.file).model_dump(),
                    provider=candidate.runtime.provider,
                    calibration=candidate.certificate.calibration,
                )
        (stage / GOLDEN_FILE).write_bytes(golden.to_bytes())
        write_report(report, stage)
        (stage / CARD_FILE).write_text(model_card(task, SOURCE, report))
        manifest = Manifest(
            name=report.name,
            task=task,
            precisions=models,
            parity=file_record(stage / PARITY_FILE),
            report=file_record(stage / REPORT_FILE),
            card=file_record(stage / CARD_FILE),
            golden=file_record(stage / GOLDEN_FILE),
            certified_on=report.data.description,
            source=SOURCE,
        )
        write_record(stage / MANIFEST_FILE, manifest)
    return out


def idle_bundle(out: Path, num_classes: int = 12, failing: Precision | None = None) -> Path:
    """Write a bundle whose model files are not ONNX, for code that only reads the manifest and the report."""
    task = task_of(num_classes)
    golden = Golden(
        np.zeros((1, 32, 32, 3), np.uint8),
        np.zeros(1, np.int64),
        {precision: np.zeros((1, num_classes), np.float32) for precision in PROVIDERS if precision != failing},
    )
    contents: dict[Precision, bytes] = {"fp32": b"thirty-two", "fp16": b"sixteen", "int8": b"eight"}
    return write_bundle(out, task, passing(report_of(num_classes, failing), failing), contents, golden)


def passing(report: ParityReport, failing: Precision | None) -> ParityReport:
    """Mark every candidate but ``failing`` as passed; few classes have too few images to pass their margins."""
    candidates = tuple(
        candidate if candidate.precision == failing else candidate.model_copy(update={"verdict": "PASS"})
        for candidate in report.candidates
    )
    return report.model_copy(update={"verdict": "PASS", "candidates": candidates})


def _group(
    name: str,
    reference_N: NDArray[np.bool_],
    candidate_N: NDArray[np.bool_],
    flipped_N: NDArray[np.bool_],
    margin: float,
) -> GroupParity:
    n = len(reference_N)
    b, c = int((reference_N & ~candidate_N).sum()), int((~reference_N & candidate_N).sum())
    # roughly Tango's interval, which is enough for these tests
    loss, half_width = (b - c) / n, 1.645 * math.sqrt(b + c + 2.7) / n
    num_flips = int(flipped_N.sum())
    return GroupParity(
        group=name,
        num_images=n,
        reference_accuracy=float(reference_N.mean()),
        candidate_accuracy=float(candidate_N.mean()),
        right_to_wrong=b,
        wrong_to_right=c,
        loss=loss,
        loss_lower_limit=loss - half_width,
        loss_upper_limit=loss + half_width,
        margin=margin,
        num_flips=num_flips,
        flip_rate_upper_limit=min(1.0, (num_flips + 3) / n),
        num_clear_flips=num_flips // 40,
        mcnemar_p=math.exp(-abs(b - c) / 4),
        verdict="PASS" if loss + half_width < margin else "FAIL" if loss - half_width > margin else "INCONCLUSIVE",
    )


def _gates(verdict: Verdict, rows: list[GroupParity]) -> tuple[Gate, ...]:
    lost = tuple(
        f"{row.group}: {row.right_to_wrong} images became wrong and {row.wrong_to_right} right: at least "
        f"{100 * row.loss_lower_limit:.3g} % of accuracy were lost, the margin is {100 * row.margin:.3g} %."
        for row in rows
        if row.verdict == "FAIL"
    )
    layer = ("the first layer above rounding is /classifier/Gemm.",) if lost else ()
    return (
        Gate(name="G0 structure", verdict="PASS"),
        Gate(
            name="G1 numeric",
            verdict="PASS",
            findings=("the largest error of a logit on 255 images is 4.8e-06, 0.00021 is allowed.",),
        ),
        Gate(name="G2 decisions", verdict="PASS"),
        Gate(name="G3 task", verdict=verdict, findings=(*lost, *layer)),
        Gate(name="G4 confidence", verdict="PASS"),
        Gate(name="G5 host", verdict="PASS"),
    )


def _classes(
    task: Task, labels_N: NDArray[np.int64], reference_N: NDArray[np.bool_], candidate_N: NDArray[np.bool_]
) -> tuple[ClassParity, ...]:
    order = sorted(range(len(task.class_names)), key=lambda label: -task.train_counts[label])
    rows = []
    for label in order:
        before, after = reference_N[labels_N == label], candidate_N[labels_N == label]
        lost = int((before & ~after).sum()) - int((~before & after).sum())
        rows.append(
            ClassParity(
                label=task.class_names[label],
                group=task.group_name(label),
                train_count=task.train_counts[label],
                num_images=len(before),
                reference_accuracy=float(before.mean()),
                candidate_accuracy=float(after.mean()),
                p_value=min(1.0, 2.0**-lost),
                flagged=lost > 8,
            )
        )
    return tuple(rows)


def _flips(
    task: Task, flipped_N: NDArray[np.bool_], group_N: NDArray[np.int64], rng: np.random.Generator
) -> tuple[FlipsByMargin, ...]:
    edges = (0.0, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
    bin_N = np.where(flipped_N, rng.choice(6, len(group_N), p=(0.5, 0.3, 0.15, 0.05, 0, 0)), 0)
    bin_N = np.where(flipped_N, bin_N, rng.choice(6, len(group_N), p=(0.01, 0.05, 0.1, 0.24, 0.35, 0.25)))
    counts = [
        [int(((bin_N == part) & (group_N == k)).sum()) for k in range(len(task.groups.names))] for part in range(6)
    ]
    flips = [
        [int(((bin_N == part) & (group_N == k) & flipped_N).sum()) for k in range(len(task.groups.names))]
        for part in range(6)
    ]
    return tuple(
        FlipsByMargin(
            above=edges[part], up_to=edges[part + 1], num_images=tuple(counts[part]), num_flips=tuple(flips[part])
        )
        for part in range(6)
    )


def _confidence(rows: list[GroupParity], precision: Precision) -> tuple[ConfidenceParity, ...]:
    kl = {"fp32": 1e-9, "fp16": 2e-5, "int8": 3.1e-3}[precision]
    return tuple(
        ConfidenceParity(
            group=row.group,
            num_images=row.num_images,
            kl=kl,
            confidence_change=2 * kl,
            nll=Difference(value=kl / 2, low=-kl, high=2 * kl),
            brier=Difference(value=kl / 8, low=-kl / 2, high=kl / 2),
            reference_ece=0.124,
            candidate_ece=0.126,
            ece_null=0.019,
            ece_null_upper=0.027,
        )
        for row in rows
    )


def _reliability(name: str, k: int, rng: np.random.Generator) -> GroupReliability:
    edges = np.linspace(0, 1, 11)

    def bins(overconfidence: float) -> tuple[ReliabilityBin, ...]:
        result = []
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            n = 0 if low < 0.1 else int(900 * high**2 / (k + 1))
            middle = (low + high) / 2
            accuracy = float(np.clip(middle - overconfidence * middle + rng.normal(0, 0.02), 0, 1))
            result.append(
                ReliabilityBin(
                    above=low,
                    up_to=high,
                    num_images=n,
                    mean_confidence=middle if n else None,
                    accuracy=accuracy if n else None,
                )
            )
        return tuple(result)

    return GroupReliability(
        group=name,
        num_images=2700 // (k + 1),
        before=bins(0.12 + 0.08 * k),
        after=bins(0.01),
        ece_before=0.09 + 0.06 * k,
        ece_after=0.017 + 0.004 * k,
        ece_null=0.012 + 0.004 * k,
    )


def _trials() -> tuple[QuantisationTrial, ...]:
    trials = (
        ("minmax, per channel, balanced", (), "tail", 0.021, 0.012, 0.011, False),
        ("minmax, per tensor, balanced", (), "tail", 0.034, 0.018, 0.022, False),
        ("percentile 99.99, per channel, balanced", (), "medium", 0.012, 0.006, 0.0072, False),
        ("entropy, per channel, balanced", (), "tail", 0.015, 0.007, 0.0081, False),
        ("percentile 99.99, per channel, balanced", ("/stage1/block0/conv2/Conv",), "tail", 0.006, 0.003, 0.0031, True),
    )
    return tuple(
        QuantisationTrial(
            configuration=configuration,
            float_layers=layers,
            worst_group=group,
            worst_group_loss=loss,
            overall_loss=overall,
            kl=kl,
            chosen=chosen,
        )
        for configuration, layers, group, loss, overall, kl, chosen in trials
    )


def _layers() -> tuple[LayerError, ...]:
    names = (
        *(f"/stage{stage}/block{block}/conv/Conv" for stage in range(1, 4) for block in range(2)),
        "/classifier/Gemm",
    )
    errors = (0.0, 2e-7, 3e-7, 3.3e-7, 5e-7, 6e-7, 0.38)
    return tuple(
        LayerError(layer=name, operator="Gemm" if "Gemm" in name else "Conv", error=error)
        for name, error in zip(names, errors, strict=True)
    )
