"""Run one candidate ONNX file through the gates and collect the results in its report.

``certify`` calls this module for each precision. ``ltkd parity`` calls ``apply_gates`` to compare any two models.

Shape legend: N images, M sampled images, C classes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from export.certification.comparison import compare, compare_classes, compare_confidence, flips_by_margin
from export.certification.gates import combine_verdicts, confidence, decisions, numeric, structure, task_accuracy
from export.certification.layer_errors import find_layer_errors, first_above_rounding
from export.certification.reference import Reference
from export.conversion.session import CPU, instruction_set, open_session, run, runtime_version
from export.schema import CandidateReport, Gate, LayerError, Margins, Runtime
from ltkd.contract.bundle import Precision

LOCATE_IMAGES = 32


@dataclass(frozen=True)
class Assessment:
    """The result of testing a candidate.

    Attributes:
        report: The report with the results of the gates.
        session: The candidate's session on its provider; None if gate G0 failed.
        certify_NC: The candidate's logits of the certification images; None if gate G0 failed.
    """

    report: CandidateReport
    session: InferenceSession | None = None
    certify_NC: NDArray[np.float32] | None = None


def assess_candidate(
    candidate: bytes, file: str, precision: Precision, reference: Reference, margins: Margins, provider: str = CPU
) -> Assessment:
    """Run an ONNX file through the gates, as a candidate for the reference network.

    If gate G0 fails, the file is not run on the images. If another gate fails, the layers that cause the difference are
    located.

    Args:
        candidate: The ONNX file.
        file: Its name in the report.
        precision: The precision of the candidate.
        reference: The network that the candidate is compared with.
        margins: The acceptable loss of accuracy.
        provider: The ONNX Runtime provider on which the candidate is certified.

    Raises:
        DeviceError: The provider does not work here.
    """
    images = reference.certify.images
    report = CandidateReport(
        precision=precision,
        verdict="FAIL",
        file=file,
        sha256=hashlib.sha256(candidate).hexdigest(),
        num_bytes=len(candidate),
        runtime=Runtime(
            onnxruntime=runtime_version(),
            provider=provider,
            isa=instruction_set(),
            tf32=None if provider == CPU else False,
        ),
        margins=margins,
        gates=(structure(candidate, reference.task, images, precision, provider),),
    )
    if report.gates[0].verdict != "PASS":
        return Assessment(report)
    session = open_session(candidate, provider)
    certify_NC = run(session, images)
    return Assessment(apply_gates(report, candidate, certify_NC, reference), session, certify_NC)


def apply_gates(
    report: CandidateReport,
    candidate: bytes | None,
    candidate_NC: NDArray[np.floating],
    reference: Reference,
    *,
    rounding_only: bool = True,
) -> CandidateReport:
    """Apply the gates on logits (G1 to G4) and return the completed report.

    Args:
        report: The report so far, which contains the margins.
        candidate: The ONNX file, used to locate the layer that causes a difference; None if there is no file.
        candidate_NC: The candidate's logits of the certification images.
        reference: The model that the candidate is compared with.
        rounding_only: Whether the candidate is meant to compute the same function as the reference. If so, gate G1
            applies, and in fp32 and fp16 gate G2 fails when the class of a clear image changes.
    """
    groups, precision = reference.task.groups, report.precision
    compared = (reference.logits_NC, candidate_NC, reference.certify.labels_N)
    rows = compare(*compared, groups, report.margins, precision)
    classes = compare_classes(*compared, reference.task)
    shifts = compare_confidence(*compared, groups)
    gates = [*report.gates, *(_numeric_gate(precision, reference, candidate_NC) if rounding_only else ())]
    gates += [
        decisions(rows, precision if rounding_only else "int8"),
        task_accuracy(rows, classes, reference.duplicates),
        confidence(shifts),
    ]
    verdict = combine_verdicts(gate.verdict for gate in gates)
    layers: tuple[LayerError, ...] = ()
    if verdict == "FAIL" and reference.onnx is not None and candidate is not None:
        layers = find_layer_errors(reference.onnx, candidate, reference.certify.images[:LOCATE_IMAGES])
        gates = [_with_layer(gate, layers) for gate in gates]
    update = {
        "verdict": verdict,
        "gates": tuple(gates),
        "groups": rows,
        "classes": classes,
        "flips": flips_by_margin(*compared, groups),
        "confidence": shifts,
        "layers": layers,
    }
    return report.model_copy(update=update)


def _numeric_gate(precision: Precision, reference: Reference, candidate_NC: NDArray[np.floating]) -> list[Gate]:
    """G1 for fp32, which is compared with the float64 logits; the other precisions round by design and skip G1."""
    if precision != "fp32" or reference.float64_logits_MC is None:
        return []
    sample_M = reference.sample_M
    return [numeric(reference.float64_logits_MC, reference.logits_NC[sample_M], candidate_NC[sample_M])]


def _with_layer(gate: Gate, layers: Sequence[LayerError]) -> Gate:
    first = first_above_rounding(layers)
    if gate.verdict != "FAIL" or first is None:
        return gate
    finding = (
        f"the difference arises in the layer {first.layer} ({first.operator}), whose relative error is "
        f"{100 * first.error:.2g} %."
    )
    return gate.model_copy(update={"findings": (*gate.findings, finding)})
