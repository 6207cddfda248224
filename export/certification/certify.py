"""A network to certified ONNX files in every precision that this machine can prove.

Shape legend: N images, M sampled images, C classes.
"""

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from torch import nn

from export.certification.calibration import certify_confidence
from export.certification.candidate import assess_candidate
from export.certification.gates import host, worst
from export.certification.latency import measure
from export.certification.margins import margins_for
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


def certify(
    network: nn.Module,
    task: Task,
    splits: Splits,
    name: str,
    description: str,
    policy: Policy | None = None,
    on_message: Callable[[str], None] = discard_message,
) -> Certification:
    """Convert any network to every precision asked for and put the results through the gates.

    Args:
        network: Takes normalised float32 [N, 3, S, S], gives logits [N, C].
        task: Its classes, groups and preprocessing.
        splits: Images for each purpose; those that certify chose nothing, neither weights nor settings.
        name: Of the model, for the report.
        description: Which images these are, in words, for the report.
        policy: What is asked; None asks for the defaults.
        on_message: As in export_run.

    Raises:
        DataError: Images or labels do not fit the task.
        RunError: The network itself gives logits that are not finite.
        DeviceError: A precision was asked for whose device is not here.
    """
    policy = policy or Policy()
    splits.check(task)
    on_message("converting to ONNX")
    fp32 = to_onnx(network, task)
    on_message("asking the network itself")
    reference = reference_of(network, task, splits, fp32)
    contents: dict[Precision, bytes] = {}
    reports: list[CandidateReport] = []
    sessions: dict[Precision, InferenceSession] = {}
    for precision in policy.tried:
        if reports and not passed(reports[0]):
            break  # what is wrong with fp32 is wrong with what is made of it
        margins = margins_for(precision, policy.margins, task.groups)
        contents[precision], trials = _converted(precision, fp32, splits, task, margins, on_message)
        on_message(f"{precision}: certifying on {len(splits.certify.label_N):,} images")
        file, provider = MODEL_FILES[precision], PROVIDERS[precision]
        judged = assess_candidate(contents[precision], file, precision, reference, margins, provider)
        update: dict[str, object] = {"quantisation": trials}
        if passed(judged.report) and judged.session is not None and judged.certify_NC is not None:
            sessions[precision] = judged.session
            update["certificate"] = _certificate(judged.session, judged.certify_NC, splits, task, policy)
        reports.append(judged.report.model_copy(update=update))
    on_message("replaying golden images, measuring speed")
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
    precision: Precision, fp32: bytes, splits: Splits, task: Task, margins: Margins, on_message: Callable[[str], None]
) -> tuple[bytes, tuple[QuantisationTrial, ...]]:
    if precision == "fp32":
        return fp32, ()
    if precision == "fp16":
        return to_fp16(fp32), ()

    def told(trial: QuantisationTrial) -> None:
        on_message(f"int8: {trial.configuration}: {trial.worst_group} loses {100 * trial.worst_group_loss:.2f} %")

    tolerated_loss = min(map(margins.of, task.groups.names)) / 4  # leaves room to prove the rest
    return search_int8(fp32, splits.quantisation, splits.selection, task.groups, told, tolerated_loss)


def _certificate(
    session: InferenceSession, certify_NC: NDArray[np.float32], splits: Splits, task: Task, policy: Policy
) -> ConfidenceCertificate:
    num_real = len(splits.certify.label_N) - splits.num_views  # views of one image are not further images
    return certify_confidence(
        run(session, splits.selection.images),
        splits.selection.label_N,
        run(session, splits.confidence.images),
        splits.confidence.label_N,
        certify_NC[:num_real],
        splits.certify.label_N[:num_real],
        task.groups,
        policy.target_precision,
        policy.target_coverage,
    )


def _on_this_host(report: CandidateReport, contents: Mapping[Precision, bytes], golden: Golden) -> CandidateReport:
    """The report with G5, asked of a session opened anew, as the service will."""
    if not passed(report):
        return report
    precision = report.precision
    session = open_session(contents[precision], report.runtime.provider)
    gates = (*report.gates, host(session, golden.images_MSS3, golden.logits[precision], precision))
    return report.model_copy(update={"gates": gates, "verdict": worst(gate.verdict for gate in gates)})
