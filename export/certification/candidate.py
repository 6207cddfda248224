"""One candidate through all gates: what the report says of it.

Shape legend: N images, M sampled images, C classes.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from export.certification.comparison import compare, compare_classes, compare_confidence, flips_by_margin
from export.certification.gates import confidence, decisions, numeric, structure, task_accuracy, worst
from export.certification.layer_errors import find_layer_errors, first_above_rounding
from export.certification.reference import Reference
from export.conversion.session import CPU, isa, open_session, run, runtime_version
from export.schema import CandidateReport, Gate, LayerError, Margins, Runtime
from ltkd.contract.bundle import Precision

LOCATE_IMAGES = 32


@dataclass(frozen=True)
class Assessment:
    """What became of a candidate.

    Attributes:
        report: What the gates say.
        session: It, opened where it was judged; None where it failed the structure.
        certify_NC: Its logits of the certify images, likewise.
    """

    report: CandidateReport
    session: InferenceSession | None = None
    certify_NC: NDArray[np.float32] | None = None


def assess_candidate(
    candidate: bytes, file: str, precision: Precision, reference: Reference, margins: Margins, provider: str = CPU
) -> Assessment:
    """Put any ONNX file that claims to be the reference through the gates.

    A file that fails the structure is asked nothing more. On FAIL the layers in which the difference arises are sought.

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
            onnxruntime=runtime_version(), provider=provider, isa=isa(), tf32=None if provider == CPU else False
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
    """A report with all that a candidate's logits say: numbers, decisions, task and confidence.

    Args:
        report: What is known already, with the margins.
        candidate: The ONNX file, to find the layer that errs; None where there is none.
        candidate_NC: Its logits of the certify images.
        reference: What it is held against.
        rounding_only: Whether the candidate claims to compute the same as the reference, so that a clear image that
            changes class is an error of fp32 and fp16.
    """
    groups, precision = reference.task.groups, report.precision
    seen = (reference.logits_NC, candidate_NC, reference.certify.label_N)
    rows = compare(*seen, groups, report.margins, precision)
    classes = compare_classes(*seen, reference.task)
    shifts = compare_confidence(*seen, groups)
    gates = [*report.gates, *(_numbers(precision, reference, candidate_NC) if rounding_only else ())]
    gates += [
        decisions(rows, precision if rounding_only else "int8"),
        task_accuracy(rows, classes, reference.copies),
        confidence(shifts),
    ]
    verdict = worst(gate.verdict for gate in gates)
    layers: tuple[LayerError, ...] = ()
    if verdict == "FAIL" and reference.onnx is not None and candidate is not None:
        layers = find_layer_errors(reference.onnx, candidate, reference.certify.images[:LOCATE_IMAGES])
        gates = [_with_place(gate, layers) for gate in gates]
    update = {
        "verdict": verdict,
        "gates": tuple(gates),
        "groups": rows,
        "classes": classes,
        "flips": flips_by_margin(*seen, groups),
        "confidence": shifts,
        "layers": layers,
    }
    return report.model_copy(update=update)


def _numbers(precision: Precision, reference: Reference, candidate_NC: NDArray[np.floating]) -> list[Gate]:
    """G1, where float32 is held against the exact logits; other precisions round by intention."""
    if precision != "fp32" or reference.oracle_MC is None:
        return []
    sample_M = reference.sample_M
    return [numeric(reference.oracle_MC, reference.logits_NC[sample_M], candidate_NC[sample_M])]


def _with_place(gate: Gate, layers: Sequence[LayerError]) -> Gate:
    first = first_above_rounding(layers)
    if gate.verdict != "FAIL" or first is None:
        return gate
    found = f"the difference arises in {first.layer} ({first.operator}), which is {100 * first.error:.2g} % off."
    return gate.model_copy(update={"findings": (*gate.findings, found)})
