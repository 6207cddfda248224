"""The gates that a candidate must pass to be certified as equivalent to its reference network.

    G0 structure   the file is valid and self-contained, accepts any batch size and has the right metadata
    G1 numeric     fp32: the logits equal those of the network, up to rounding
    G2 decisions   fp32, fp16: no image whose class was clear changes class
    G3 task        every class group, and all images together, kept their accuracy
    G4 confidence  the probabilities are finite; changes are reported, and calibration corrects for them
    G5 host        on the machine that serves it, the model gives the same logits as here

Each gate is a function of model bytes, of logits or of results of the comparison module, and returns a Gate. PASS and
FAIL both need evidence. Without enough evidence for either, the verdict is INCONCLUSIVE, and the candidate is not
certified. PASS needs no correction for multiple tests, because a bad candidate would have to pass in every group. FAIL
in any one group rejects the candidate, so the lower limits of the loss are corrected for the number of groups.

Shape legend: N images, M of them sampled, S side in pixels, C classes.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime import InferenceSession

from export.certification.comparison import span
from export.certification.statistics import images_needed
from export.conversion.session import CPU, INPUT, OUTPUT, model_metadata, open_session, read_model, run, tensors_of
from export.schema import ClassParity, ConfidenceParity, Gate, GroupParity, Verdict
from ltkd.contract.bundle import GOLDEN_TOLERANCE, Precision
from ltkd.contract.task import Task
from ltkd.data.image_files import Images
from ltkd.errors import BundleError, DeviceError

BATCH_SIZES = (1, 2, 3, 17)
ROUNDING_SHARE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 5e-3, "int8": 1e-2}
"""How much logits may change with the batch size, as a share of their span.

Other batch sizes use other kernels, which sum in another order. In int8 most sums are exact (no change was measured),
but a rounding difference in the float layers can change an activation by one of 256 quantisation steps.
"""
ALARM = 0.05

_LEAK = re.compile(rb"[\w./\\ -]*(?:\.pyc?\b|site-packages|/home/|/root/|/Users/|/tmp/|:\\Users\\)[\w./\\ -]*")
_MAX_CLASSES_NAMED = 5

NOTABLE = 1e-4
"""The least rise of the mean NLL (nats) or Brier score that is reported; float32 rounding changes them by some 1e-7."""


def structure(candidate: bytes, task: Task, images: Images, precision: Precision = "fp32", provider: str = CPU) -> Gate:
    """G0: the file is valid, its metadata match the task, and logits do not depend on the batch size.

    Args:
        candidate: The ONNX file.
        task: The task that the metadata, the input and the output must match.
        images: At least one real image.
        precision: Determines how much rounding may change logits between batch sizes.
        provider: The ONNX Runtime provider on which every node must run.
    """
    try:
        model, session = read_model(candidate), open_session(candidate, provider)
    except (BundleError, DeviceError) as reason:
        return Gate(name="G0 structure", verdict="FAIL", findings=(str(reason),))
    most = max(BATCH_SIZES)
    images_NSS3 = images[:most]
    findings = (
        *_signature(session, task),
        *_metadata(model, task),
        *_leaks(model),
        *_batches(session, np.resize(images_NSS3, (most, *images_NSS3.shape[1:])), ROUNDING_SHARE[precision]),
    )
    return Gate(name="G0 structure", verdict="FAIL" if findings else "PASS", findings=findings)


def numeric(
    float64_logits_MC: NDArray[np.floating], torch_MC: NDArray[np.floating], candidate_MC: NDArray[np.floating]
) -> Gate:
    """G1: the logit error of an fp32 candidate is at most ten times that of torch in float32.

    Args:
        float64_logits_MC: Logits of torch in float64, taken as exact.
        torch_MC: Logits of torch in float32; their error determines the allowed error.
        candidate_MC: Logits of the candidate. The gate fails if one is not finite.
    """
    error = float(np.abs(candidate_MC - float64_logits_MC).max())
    allowed = max(10 * float(np.abs(torch_MC - float64_logits_MC).max()), 1e-5 * span(float64_logits_MC))
    finding = (
        f"the largest logit error on {len(float64_logits_MC)} images is {error:.2g}; at most {allowed:.2g} is allowed."
    )
    return Gate(name="G1 numeric", verdict="PASS" if error <= allowed else "FAIL", findings=(finding,))


def decisions(rows: Sequence[GroupParity], precision: Precision = "fp32") -> Gate:
    """G2: no image whose class was clear to the reference changes class. Changes of unclear images are only counted.

    int8 rounds so coarsely that clear images may change class. For int8, the changes are only listed, and gate G3
    decides whether they matter.
    """
    findings = tuple(
        f"{row.group}: {row.num_flips} of {row.num_images} images changed class (95 % upper bound "
        f"{_percent(row.flip_rate_upper_limit)}), {row.num_clear_flips} of them although their class was clear."
        for row in rows
        if row.num_flips
    )
    failed = precision != "int8" and any(row.num_clear_flips for row in rows)
    return Gate(name="G2 decisions", verdict="FAIL" if failed else "PASS", findings=findings)


def task_accuracy(
    rows: Sequence[GroupParity], classes: Sequence[ClassParity] = (), duplicates: Sequence[str] = ()
) -> Gate:
    """G3: every group, and all images together, kept their accuracy within the margin.

    Alarms are reported but do not change the verdict: groups that do not fail but have a statistically significant
    loss, and single classes with a significant loss.

    Args:
        rows: Result of ``comparison.compare``.
        classes: Result of ``comparison.compare_classes``.
        duplicates: Result of ``splits.find_duplicates``. The gate fails if there are any: the results are not valid on
            images that influenced the candidate or are counted twice.
    """
    findings = (
        *duplicates,
        *(_reason(row) for row in rows if row.verdict != "PASS"),
        *(_alarm(row) for row in rows if row.verdict != "FAIL" and row.mcnemar_p < ALARM and (row.loss or 0) > 0),
        *_class_alarm(classes),
    )
    return Gate(
        name="G3 task",
        verdict="FAIL" if duplicates else combine_verdicts(row.verdict for row in rows),
        findings=findings,
    )


def confidence(rows: Sequence[ConfidenceParity]) -> Gate:
    """G4: the candidate's probabilities are finite. A rise of negative log likelihood or Brier score is reported.

    A change of confidence does not fail the gate, because each precision is afterwards calibrated on its own logits and
    its calibration is certified. The uncalibrated calibration error of a small group is mostly noise.
    """
    not_finite = tuple(
        f"{row.group}: the probabilities of some of the {row.num_images} images are not finite."
        for row in rows
        if row.num_images and row.kl is None
    )
    risen = tuple(
        f"{row.group}: the {name} rose by {change.value:.2g} "
        f"(95 % confidence interval {change.low:.2g} to {change.high:.2g})."
        for row in rows
        for name, change in (("negative log likelihood", row.nll), ("Brier score", row.brier))
        if change is not None and change.low > NOTABLE
    )
    return Gate(name="G4 confidence", verdict="FAIL" if not_finite else "PASS", findings=(*not_finite, *risen))


def host(session: InferenceSession, images: Images, expected_MC: NDArray[np.floating], precision: Precision) -> Gate:
    """G5: on this machine and provider, the golden images have the same logits as at certification.

    Args:
        session: The model, opened as it will be served.
        images: M golden images.
        expected_MC: Their logits at certification.
        precision: Determines how much the logits may differ on other hardware.
    """
    try:
        logits_MC = run(session, images)
    except BundleError as reason:
        return Gate(name="G5 host", verdict="FAIL", findings=(str(reason),))
    if logits_MC.shape != expected_MC.shape:
        shapes = f"{list(logits_MC.shape)} for the golden images, expected {list(expected_MC.shape)}"
        return Gate(name="G5 host", verdict="FAIL", findings=(f"the model gives logits of shape {shapes}.",))
    error, allowed = float(np.abs(logits_MC - expected_MC).max()), GOLDEN_TOLERANCE[precision] * _largest(expected_MC)
    finding = (
        f"the logits of {len(expected_MC)} golden images differ by up to {error:.2g} from those at certification; "
        f"at most {allowed:.2g} is allowed."
    )
    return Gate(name="G5 host", verdict="PASS" if error <= allowed else "FAIL", findings=(finding,))


def combine_verdicts(verdicts: Iterable[Verdict]) -> Verdict:
    """Combine verdicts: FAIL if any is FAIL, else INCONCLUSIVE if any is INCONCLUSIVE, else PASS."""
    distinct = set(verdicts)
    return "FAIL" if "FAIL" in distinct else "INCONCLUSIVE" if "INCONCLUSIVE" in distinct else "PASS"


def _reason(row: GroupParity) -> str:
    if not row.num_images:
        return f"{row.group}: there are no images of this group, so its accuracy cannot be tested."
    if row.verdict == "FAIL":
        return (
            f"{row.group}: {_changes(row)}. The accuracy fell by at least {_points(row.loss_lower_limit)}; "
            f"the margin is {_points(row.margin)}."
        )
    rounded_up = math.ceil(10_000 * row.loss_upper_limit) / 100
    discordant = (row.right_to_wrong + row.wrong_to_right) / row.num_images
    return (
        f"{row.group}: {row.num_images} images cannot rule out a loss of up to {rounded_up:.2f} percentage points; "
        f"the margin is {_points(row.margin)}. If no accuracy is lost, about "
        f"{images_needed(row.margin, discordant):,} images are enough."
    )


def _alarm(row: GroupParity) -> str:
    p_value = f"McNemar's test gives p = {row.mcnemar_p:.2g} (adjusted by Holm)"
    return (
        f"{row.group}: alarm: {_changes(row)}. {p_value}: the loss is statistically significant, but within the margin."
        if row.verdict == "PASS"
        else f"{row.group}: alarm: {p_value}: the loss is statistically significant."
    )


def _changes(row: GroupParity) -> str:
    return f"{row.right_to_wrong} predictions became wrong and {row.wrong_to_right} became correct"


def _class_alarm(classes: Sequence[ClassParity]) -> list[str]:
    flagged = [row.label for row in classes if row.flagged]
    if not flagged:
        return []
    more = len(flagged) - _MAX_CLASSES_NAMED
    named = ", ".join(flagged[:_MAX_CLASSES_NAMED]) + (f" and {more} more" if more > 0 else "")
    return [
        f"alarm: {len(flagged)} of {len(classes)} classes lost accuracy: {named} (false discovery rate at most 5 %)."
    ]


def _largest(logits_MC: NDArray[np.floating]) -> float:
    return float(np.abs(logits_MC).max())


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"


def _points(fraction: float) -> str:
    return f"{100 * fraction:.3g} percentage points"


def _signature(session: InferenceSession, task: Task) -> list[str]:
    expected = {
        "input": (INPUT, "tensor(uint8)", [task.input_px, task.input_px, 3]),
        "output": (OUTPUT, "tensor(float)", [len(task.class_names)]),
    }
    tensors = {"input": session.get_inputs(), "output": session.get_outputs()}
    findings = []
    for side, (name, kind, shape) in expected.items():
        found = [(tensor.name, tensor.type, list(tensor.shape)) for tensor in tensors[side]]
        fits = len(found) == 1 and found[0][:2] == (name, kind) and found[0][2][1:] == shape
        if not fits or not isinstance(found[0][2][0], str):
            findings.append(f"the {side} is {found}, expected {name} {kind} of shape {['N', *shape]} with N dynamic.")
    return findings


def _metadata(model: ModelProto, task: Task) -> list[str]:
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return [
        f"the metadata entry {key} is {metadata.get(key, 'missing')[:80]}, expected {value[:80]}."
        for key, value in model_metadata(task).items()
        if json.loads(metadata.get(key, "null")) != json.loads(value)
    ]


def _leaks(model: ModelProto) -> list[str]:
    """Find a path of the exporting machine, in all but the weights and the metadata, which are checked by value."""
    text = ModelProto()
    text.CopyFrom(model)
    del text.metadata_props[:]
    for tensor in tensors_of(text.graph):  # the bytes of weights can match the pattern by chance
        for field in ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data"):
            tensor.ClearField(field)
    match = _LEAK.search(text.SerializeToString())
    return [f"the file contains a path of this machine: {match.group().decode(errors='replace')}"] if match else []


def _batches(session: InferenceSession, images_NSS3: NDArray[np.uint8], rounding_share: float) -> list[str]:
    try:
        single_NC = run(session, images_NSS3, batch_size=1)
        batches = {size: run(session, images_NSS3[:size], batch_size=size) for size in BATCH_SIZES}
    except BundleError as reason:
        return [str(reason)]
    tolerance = rounding_share * span(single_NC)
    return [
        f"in a batch of {size} images the logits differ from those of the same images run one at a time."
        for size, batch_NC in batches.items()
        if batch_NC.shape != single_NC[:size].shape
        or not np.allclose(batch_NC, single_NC[:size], rtol=0, atol=tolerance, equal_nan=True)
    ]
