"""From a run to a certified bundle, or to rejected candidates and the reason.

Shape legend: N images, M sampled images, C classes.
"""

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from onnxruntime import InferenceSession
from torch import nn

from export.calibrate import certify_confidence
from export.candidate import CPU, CUDA, cuda_works, open_session, run
from export.card import model_card
from export.convert import to_onnx
from export.gates import copied, host, margins_for, worst
from export.half import to_fp16
from export.judge import NUMERIC_IMAGES, Reference, judge, spread_over_groups
from export.latency import measure
from export.parity import CandidateReport, ParityReport, QuantisationTrial
from export.quantise import search_int8
from export.reference import torch_logits
from export.report import parity_html
from export.splits import Splits, divide
from export.statistics import CONFIDENCE
from ltkd.bundle import (
    CARD_FILE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    MODEL_FILES,
    PARITY_FILE,
    REPORT_FILE,
    CertifiedModel,
    Golden,
    Manifest,
    Precision,
    Source,
    check_replaceable,
    record_of,
    staged_bundle,
)
from ltkd.data import ImageData, load_data
from ltkd.errors import DeviceError, RunError
from ltkd.files import Images
from ltkd.records import sha256_of, write_record, write_whole
from ltkd.runs import CONFIG_FILE, Run, open_run
from ltkd.task import Task

REJECTED_DIRECTORY = "rejected"
GOLDEN_PER_GROUP = 4
PROVIDERS: dict[Precision, str] = {"fp32": CPU, "int8": CPU, "fp16": CUDA}


def tell_nobody(_: str) -> None:
    """Take news of the work and say nothing."""


@dataclass(frozen=True)
class Policy:
    """What is asked of an export.

    Attributes:
        precisions: Which to try besides fp32; None tries int8, and fp16 where CUDA works.
        margins: Acceptable loss of accuracy by the name of a group, or ``all``; a fraction. The others keep the
            defaults of their precision.
        target_precision: Share of accepted predictions of a group that shall be right.
        target_coverage: Share of a group's images whose class shall be in the prediction set.
    """

    precisions: tuple[Precision, ...] | None = None
    margins: Mapping[str, float] = field(default_factory=dict)
    target_precision: float = 0.9
    target_coverage: float = 0.9

    @property
    def tried(self) -> tuple[Precision, ...]:
        """The precisions to try, fp32 first.

        Raises:
            DeviceError: fp16 was asked for, which is certified on CUDA, and there is none.
        """
        if self.precisions is None:
            return ("fp32", "int8", "fp16") if cuda_works() else ("fp32", "int8")
        if "fp16" in self.precisions and not cuda_works():
            raise DeviceError("fp16 is certified on CUDA, which does not work here; export it where a GPU is.")
        return ("fp32", *(precision for precision in self.precisions if precision != "fp32"))


@dataclass(frozen=True)
class Certification:
    """What the gates said of every precision, the files they were asked about, and what the good ones answer."""

    report: ParityReport
    contents: dict[Precision, bytes]
    golden: Golden

    @property
    def passed(self) -> dict[Precision, CandidateReport]:
        """What may go into a bundle: nothing unless fp32 passed."""
        if self.report.verdict != "PASS":
            return {}
        return {report.precision: report for report in self.report.candidates if passed(report)}


@dataclass(frozen=True)
class Export:
    """How an export ended.

    Attributes:
        report: What the gates said.
        bundle: The bundle; None after any verdict but PASS.
        rejected: The folder of the candidates that did not pass, with the report; None when all did.
    """

    report: ParityReport
    bundle: Path | None
    rejected: Path | None


def export_run(
    run_dir: Path,
    out: Path,
    policy: Policy | None = None,
    data: ImageData | None = None,
    tell: Callable[[str], None] = tell_nobody,
) -> Export:
    """Convert a run's network, put each precision through the gates on test images, and bundle what passes.

    Unless fp32 passes nothing appears at ``out`` and what is there stays as it is. Candidates that did not pass go
    to ``rejected/`` beside it.

    Args:
        run_dir: A complete run.
        out: The bundle's directory; an earlier bundle there is replaced as a whole.
        policy: What is asked; None asks for the defaults.
        data: The run's images where they are in memory already; None loads them.
        tell: Told in a few words what is going on, several times a minute.

    Raises:
        RunError: The run cannot be used, or its data set is no longer what it was trained on.
        DataError: The images cannot be loaded.
        BundleError: ``out`` is something else than a bundle.
        DeviceError: A precision was asked for whose device is not here.
    """
    check_replaceable(out)  # before minutes of certifying
    policy = policy or Policy()
    _ = policy.tried
    trained = open_run(run_dir)
    data = data or load_data(trained.config.data)
    if data.task != trained.task:
        raise RunError(
            f"{run_dir} was trained on other images or groups than {trained.config.data.name} has now; train again."
        )
    name = out.resolve().name
    source = trained.config.data
    description = f"the {len(data.test_labels):,} test images of {source.root.name if source.root else source.name}"
    splits = divide(data, margins_for("fp32", policy.margins, data.task.groups))
    done = certify(trained.load_network(), trained.task, splits, name, description, policy, tell)
    bundle = rejected = None
    if done.passed:
        with staged_bundle(out) as stage:
            _fill(stage, trained, done)
        bundle = out
    if len(done.passed) < len(done.report.candidates):
        rejected = _reject(out, done)
    return Export(done.report, bundle, rejected)


def certify(
    network: nn.Module,
    task: Task,
    splits: Splits,
    name: str,
    description: str,
    policy: Policy | None = None,
    tell: Callable[[str], None] = tell_nobody,
) -> Certification:
    """Convert any network to every precision asked for and put the results through the gates.

    Args:
        network: Takes normalised float32 [N, 3, S, S], gives logits [N, C].
        task: Its classes, groups and preprocessing.
        splits: Images for each purpose; those that certify chose nothing, neither weights nor settings.
        name: Of the model, for the report.
        description: Which images these are, in words, for the report.
        policy: What is asked; None asks for the defaults.
        tell: As in export_run.

    Raises:
        DataError: Images or labels do not fit the task.
        RunError: The network itself gives logits that are not finite.
        DeviceError: A precision was asked for whose device is not here.
    """
    policy = policy or Policy()
    splits.check(task)
    tell("converting to ONNX")
    fp32 = to_onnx(network, task)
    tell("asking the network itself")
    reference = reference_of(network, task, splits, fp32)
    contents: dict[Precision, bytes] = {}
    reports: list[CandidateReport] = []
    for precision in policy.tried:
        if reports and not passed(reports[0]):
            break  # what is wrong with fp32 is wrong with what is made of it
        contents[precision], trials = _converted(precision, fp32, splits, task, tell)
        tell(f"{precision}: certifying on {len(splits.certify.label_N):,} images")
        margins = margins_for(precision, policy.margins, task.groups)
        file, provider = MODEL_FILES[precision], PROVIDERS[precision]
        report = judge(contents[precision], file, precision, reference, margins, provider)
        report = report.model_copy(update={"quantisation": trials})
        if passed(report):
            report = _with_confidence(report, open_session(contents[precision], provider), splits, task, policy)
        reports.append(report)
    tell("replaying golden images, measuring speed")
    sessions = {r.precision: open_session(contents[r.precision], r.runtime.provider) for r in reports if passed(r)}
    golden = golden_of(sessions, task, splits)
    reports = [_on_this_host(report, contents, golden) for report in reports]
    latency = measure(sessions, splits.certify.images)
    return Certification(
        ParityReport(
            name=name,
            verdict=reports[0].verdict,
            reference="torch float32",
            groups=task.groups.names,
            data=splits.record(description, task.groups),
            versions={p: importlib.metadata.version(p) for p in ("ltkd", "torch", "onnx", "onnxscript", "numpy")},
            confidence=CONFIDENCE,
            candidates=tuple(r.model_copy(update={"latency": latency.get(r.precision, ())}) for r in reports),
        ),
        contents,
        golden,
    )


def reference_of(network: nn.Module, task: Task, splits: Splits, fp32: bytes | None) -> Reference:
    """The network's own answers to the certify images.

    Raises:
        RunError: They are not finite.
    """
    certify = splits.certify
    sample_M = spread_over_groups(certify.label_N, task.groups, NUMERIC_IMAGES // len(task.groups.names) or 1)
    others: dict[str, Images] = {name: part.images for name, part in splits.parts.items() if name != "certify"}
    return Reference(
        task=task,
        certify=certify,
        logits_NC=torch_logits(network, task, certify.images, torch.float32),
        sample_M=sample_M,
        copies=copied(certify.images, splits.num_views, others),
        oracle_MC=torch_logits(network, task, certify.images[sample_M], torch.float64),
        onnx=fp32,
    )


def golden_of(sessions: Mapping[Precision, InferenceSession], task: Task, splits: Splits) -> Golden:
    """A few images of every group with each model's logits, for replay wherever the bundle is served."""
    num_real = len(splits.certify.label_N) - splits.num_views
    sample_M = spread_over_groups(splits.certify.label_N[:num_real], task.groups, GOLDEN_PER_GROUP)
    images_MSS3 = splits.certify.images[sample_M]
    logits = {precision: run(session, images_MSS3) for precision, session in sessions.items()}
    return Golden(images_MSS3, splits.certify.label_N[sample_M], logits)


def passed(report: CandidateReport) -> bool:
    """Whether a candidate may be served."""
    return report.verdict == "PASS"


def _converted(
    precision: Precision, fp32: bytes, splits: Splits, task: Task, tell: Callable[[str], None]
) -> tuple[bytes, tuple[QuantisationTrial, ...]]:
    if precision == "fp32":
        return fp32, ()
    if precision == "fp16":
        return to_fp16(fp32), ()

    def told(trial: QuantisationTrial) -> None:
        tell(f"int8: {trial.configuration}: {trial.worst_group} loses {100 * trial.worst_group_loss:.2f} %")

    return search_int8(fp32, splits.quantisation, splits.selection, task.groups, told)


def _with_confidence(
    report: CandidateReport, session: InferenceSession, splits: Splits, task: Task, policy: Policy
) -> CandidateReport:
    num_real = len(splits.certify.label_N) - splits.num_views  # views of one image are not further images
    selection, threshold, certify = (
        run(session, images)
        for images in (splits.selection.images, splits.confidence.images, splits.certify.images[:num_real])
    )
    certificate = certify_confidence(
        selection,
        splits.selection.label_N,
        threshold,
        splits.confidence.label_N,
        certify,
        splits.certify.label_N[:num_real],
        task.groups,
        policy.target_precision,
        policy.target_coverage,
    )
    return report.model_copy(update={"certificate": certificate})


def _on_this_host(report: CandidateReport, contents: Mapping[Precision, bytes], golden: Golden) -> CandidateReport:
    """The report with G5, asked of a session opened anew, as the service will."""
    if not passed(report):
        return report
    precision = report.precision
    session = open_session(contents[precision], report.runtime.provider)
    gates = (*report.gates, host(session, golden.images_MSS3, golden.logits[precision], precision))
    return report.model_copy(update={"gates": gates, "verdict": worst(gate.verdict for gate in gates)})


def _fill(stage: Path, trained: Run, done: Certification) -> None:
    for precision in done.passed:
        (stage / MODEL_FILES[precision]).write_bytes(done.contents[precision])
    (stage / GOLDEN_FILE).write_bytes(done.golden.to_bytes())
    write_record(stage / PARITY_FILE, done.report)
    (stage / REPORT_FILE).write_text(parity_html(done.report), encoding="utf-8")
    source = Source(
        run=trained.path.resolve().name,
        config_sha256=sha256_of(trained.path / CONFIG_FILE),
        weights_sha256=sha256_of(trained.weights_path),
        model=trained.config.model,
        method=trained.config.method.name,
        versions=done.report.versions,
    )
    (stage / CARD_FILE).write_text(model_card(trained.task, source, done.report), encoding="utf-8")
    manifest = Manifest(
        name=done.report.name,
        task=trained.task,
        precisions={p: _certified(stage / MODEL_FILES[p], report) for p, report in done.passed.items()},
        parity=record_of(stage / PARITY_FILE),
        report=record_of(stage / REPORT_FILE),
        card=record_of(stage / CARD_FILE),
        golden=record_of(stage / GOLDEN_FILE),
        certified_on=done.report.data.description,
        source=source,
    )
    write_record(stage / MANIFEST_FILE, manifest)


def _certified(path: Path, report: CandidateReport) -> CertifiedModel:
    assert report.certificate is not None  # every candidate that passes has one
    facts = record_of(path).model_dump()
    return CertifiedModel(**facts, provider=report.runtime.provider, calibration=report.certificate.calibration)


def _reject(out: Path, done: Certification) -> Path:
    """Leave what did not pass, and the report, beside the bundle's place; the folder holds this export alone."""
    rejected = out.resolve().parent / REJECTED_DIRECTORY / out.resolve().name
    rejected.mkdir(parents=True, exist_ok=True)
    for old in rejected.glob("candidate*.onnx"):
        old.unlink()
    for report in done.report.candidates:
        if report.precision not in done.passed:
            write_whole(rejected / f"candidate.{report.precision}.onnx", done.contents[report.precision])
    write_record(rejected / PARITY_FILE, done.report)
    write_whole(rejected / REPORT_FILE, parity_html(done.report).encode())
    return rejected
