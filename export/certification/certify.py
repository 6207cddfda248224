"""Convert a network to every precision that this machine can certify, and certify each one.

For each precision, ``certify`` converts the network (``export.conversion``), runs the gates (candidate), calibrates
confidence (calibration) and measures latency. ``export.bundling`` writes the result as a bundle.

Shape legend: N images, M sampled images, C classes.
"""

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from torch import nn

from export.certification.accuracy_margins import margins_for
from export.certification.calibration import certify_confidence
from export.certification.candidate import assess_candidate
from export.certification.gates import combine_verdicts, host
from export.certification.latency import measure
from export.certification.reference import reference_of, spread_over_groups
from export.certification.splits import Splits
from export.certification.statistics import CONFIDENCE
from export.conversion.fp16 import to_fp16
from export.conversion.fp32 import to_onnx
from export.conversion.int8 import search_int8
from export.conversion.session import CPU, CUDA, cuda_works, open_session, run
from export.schema import CandidateReport, ConfidenceCertificate, Margins, ParityReport, QuantisationTrial
from ltkd.contract.bundle import MODEL_FILES, Golden, Precision
from ltkd.contract.task import Task
from ltkd.errors import DeviceError

GOLDEN_PER_GROUP = 4
PROVIDERS: dict[Precision, str] = {"fp32": CPU, "int8": CPU, "fp16": CUDA}


def discard_message(_: str) -> None:
    """Ignore a progress message."""


@dataclass(frozen=True)
class ExportRequirements:
    """The requirements of an export.

    Attributes:
        precisions: Precisions to try in addition to fp32; None tries int8, and fp16 if CUDA works.
        margins: Acceptable loss of accuracy, a fraction, by the name of a group or ``all``. Groups that are not named
            keep the default of the precision.
        target_precision: Required share of correct predictions among the accepted predictions of a group.
        target_coverage: Required share of a group's images whose true class is in the prediction set.
    """

    precisions: tuple[Precision, ...] | None = None
    margins: Mapping[str, float] = field(default_factory=dict)
    target_precision: float = 0.9
    target_coverage: float = 0.9

    @property
    def precisions_to_certify(self) -> tuple[Precision, ...]:
        """The precisions to try, fp32 first.

        Raises:
            DeviceError: fp16 is among ``precisions``, but CUDA, on which it is certified, does not work here.
        """
        if self.precisions is None:
            return ("fp32", "int8", "fp16") if cuda_works() else ("fp32", "int8")
        if "fp16" in self.precisions and not cuda_works():
            raise DeviceError("fp16 is certified on CUDA, which does not work here; export on a machine with a GPU.")
        return ("fp32", *(precision for precision in self.precisions if precision != "fp32"))


@dataclass(frozen=True)
class Certification:
    """The result of certifying a network.

    Attributes:
        report: The results of the gates for every precision.
        contents: The ONNX file of each precision that was tried.
        golden: Golden images, with the logits of each precision that passed before gate G5.
    """

    report: ParityReport
    contents: dict[Precision, bytes]
    golden: Golden

    @property
    def passed(self) -> dict[Precision, CandidateReport]:
        """The reports of the precisions that may go into a bundle; empty unless fp32 passed."""
        if self.report.verdict != "PASS":
            return {}
        return {report.precision: report for report in self.report.candidates if passed(report)}


def certify(
    network: nn.Module,
    task: Task,
    splits: Splits,
    name: str,
    description: str,
    policy: ExportRequirements | None = None,
    on_message: Callable[[str], None] = discard_message,
) -> Certification:
    """Convert a network to every requested precision and run each result through the gates.

    Args:
        network: Takes normalised float32 [N, 3, S, S] and returns logits [N, C].
        task: Classes, groups and preprocessing of the network.
        splits: Images for each purpose. The certification images must not have influenced weights or settings.
        name: Name of the model in the report.
        description: Describes the images in the report.
        policy: The requirements; None uses the defaults.
        on_message: Called with progress messages, as in ``export_run``.

    Raises:
        DataError: Images or labels do not fit the task.
        RunError: The network itself gives logits that are not finite.
        DeviceError: A requested precision needs a device that this machine does not have.
    """
    policy = policy or ExportRequirements()
    splits.check(task)
    on_message("converting to ONNX")
    fp32 = to_onnx(network, task)
    on_message("running the network in PyTorch as the reference")
    reference = reference_of(network, task, splits, fp32)
    contents: dict[Precision, bytes] = {}
    reports: list[CandidateReport] = []
    sessions: dict[Precision, InferenceSession] = {}
    for precision in policy.precisions_to_certify:
        if reports and not passed(reports[0]):
            break  # the other precisions are made from the fp32 file and would have the same fault
        margins = margins_for(precision, policy.margins, task.groups)
        contents[precision], trials = _convert(precision, fp32, splits, task, margins, on_message)
        on_message(f"{precision}: certifying on {len(splits.certify.labels_N):,} images")
        file, provider = MODEL_FILES[precision], PROVIDERS[precision]
        assessment = assess_candidate(contents[precision], file, precision, reference, margins, provider)
        update: dict[str, object] = {"quantisation": trials}
        if passed(assessment.report) and assessment.session is not None and assessment.certify_NC is not None:
            sessions[precision] = assessment.session
            update["certificate"] = _certificate(assessment.session, assessment.certify_NC, splits, task, policy)
        reports.append(assessment.report.model_copy(update=update))
    on_message("checking golden images and measuring latency")
    golden = golden_of(sessions, task, splits)
    reports = [_with_host_gate(report, contents, golden) for report in reports]
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


def golden_of(sessions: Mapping[Precision, InferenceSession], task: Task, splits: Splits) -> Golden:
    """Take a few images of every group with each model's logits, to check the model wherever the bundle is served."""
    num_real = len(splits.certify.labels_N) - splits.num_views
    sample_M = spread_over_groups(splits.certify.labels_N[:num_real], task.groups, GOLDEN_PER_GROUP)
    images_MSS3 = splits.certify.images[sample_M]
    logits = {precision: run(session, images_MSS3) for precision, session in sessions.items()}
    return Golden(images_MSS3, splits.certify.labels_N[sample_M], logits)


def passed(report: CandidateReport) -> bool:
    """Whether a candidate passed all gates and may be served."""
    return report.verdict == "PASS"


def _convert(
    precision: Precision, fp32: bytes, splits: Splits, task: Task, margins: Margins, on_message: Callable[[str], None]
) -> tuple[bytes, tuple[QuantisationTrial, ...]]:
    if precision == "fp32":
        return fp32, ()
    if precision == "fp16":
        return to_fp16(fp32), ()

    def on_trial(trial: QuantisationTrial) -> None:
        loss = f"{100 * trial.worst_group_loss:.2f} percentage points"
        on_message(f"int8: {trial.configuration}: the worst group, {trial.worst_group}, loses {loss} of accuracy")

    # a quarter of the margin: the statistical uncertainty of certification takes up much of the rest
    tolerated_loss = min(map(margins.of, task.groups.names)) / 4
    return search_int8(fp32, splits.quantisation, splits.selection, task.groups, on_trial, tolerated_loss)


def _certificate(
    session: InferenceSession, certify_NC: NDArray[np.float32], splits: Splits, task: Task, policy: ExportRequirements
) -> ConfidenceCertificate:
    num_real = len(splits.certify.labels_N) - splits.num_views  # augmented views are not independent images
    return certify_confidence(
        run(session, splits.selection.images),
        splits.selection.labels_N,
        run(session, splits.confidence.images),
        splits.confidence.labels_N,
        certify_NC[:num_real],
        splits.certify.labels_N[:num_real],
        task.groups,
        policy.target_precision,
        policy.target_coverage,
    )


def _with_host_gate(report: CandidateReport, contents: Mapping[Precision, bytes], golden: Golden) -> CandidateReport:
    """Add gate G5 to a report, run in a new session as the service would open it."""
    if not passed(report):
        return report
    precision = report.precision
    session = open_session(contents[precision], report.runtime.provider)
    gates = (*report.gates, host(session, golden.images_MSS3, golden.logits[precision], precision))
    return report.model_copy(update={"gates": gates, "verdict": combine_verdicts(gate.verdict for gate in gates)})
