"""The gates a candidate has to pass before it may call itself the network.

    G0 structure   it is one sound file that takes any batch and says what it is
    G1 numeric     fp32: its logits are those of the network, up to rounding
    G2 decisions   fp32, fp16: no image whose class was clear gets another one
    G3 task        every group of classes, and all together, kept its accuracy
    G4 confidence  its probabilities are numbers; how far they moved is told, and calibration answers it
    G5 host        where it is served, it answers as it did here

Each is a function from model bytes, logits or figures of the comparison module to a Gate. PASS and FAIL are both shown
by the data; when they show neither, the verdict is INCONCLUSIVE, which certifies nothing. That every group has to pass
needs no correction for multiple testing: a bad candidate must get past all of them, which only lowers its chances. That
any group may fail does, and has it in the lower limits.

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
"""How far logits may move with the size of the batch, as a share of their span.

Other sizes take other kernels, which sum in another order. In int8 most sums are exact (nothing moved in what was
measured), but a last bit of the float layers may push an activation over to the next of 256 steps.
"""
ALARM = 0.05

_LEAK = re.compile(rb"[\w./\\ -]*(?:\.pyc?\b|site-packages|/home/|/root/|/Users/|/tmp/|:\\Users\\)[\w./\\ -]*")
_NAMED = 5

NOTABLE = 1e-4
"""A rise of the mean NLL (nats) or Brier score that is told; float32 alone moves them by some 1e-7."""


def structure(candidate: bytes, task: Task, images: Images, precision: Precision = "fp32", provider: str = CPU) -> Gate:
    """G0: the file is sound, says the right things of itself and treats images alike in batches of any size.

    Args:
        candidate: The ONNX file.
        task: What it should do.
        images: Real ones, at least one.
        precision: Says how far rounding may move logits between batches of different sizes.
        provider: Where every node has to run.
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
    oracle_MC: NDArray[np.floating], torch_MC: NDArray[np.floating], candidate_MC: NDArray[np.floating]
) -> Gate:
    """G1: an fp32 candidate errs no more than ten times as much as torch itself does in float32.

    Args:
        oracle_MC: Logits of torch in float64.
        torch_MC: Logits of torch in float32; their error is the yardstick.
        candidate_MC: Logits of the candidate. One that is not finite fails.
    """
    error = float(np.abs(candidate_MC - oracle_MC).max())
    allowed = max(10 * float(np.abs(torch_MC - oracle_MC).max()), 1e-5 * span(oracle_MC))
    finding = f"the largest error of a logit on {len(oracle_MC)} images is {error:.2g}, {allowed:.2g} is allowed."
    return Gate(name="G1 numeric", verdict="PASS" if error <= allowed else "FAIL", findings=(finding,))


def decisions(rows: Sequence[GroupParity], precision: Precision = "fp32") -> Gate:
    """G2: no image whose class was clear to the reference gets another class. Flips of unclear ones are counted.

    int8 rounds so coarsely that a clear image may flip; there they are listed, and G3 says whether they matter.
    """
    findings = tuple(
        f"{row.group}: {row.num_flips} of {row.num_images} images changed class "
        f"(at most {_percent(row.flip_rate_upper_limit)}), {row.num_clear_flips} of them at a large margin."
        for row in rows
        if row.num_flips
    )
    failed = precision != "int8" and any(row.num_clear_flips for row in rows)
    return Gate(name="G2 decisions", verdict="FAIL" if failed else "PASS", findings=findings)


def task_accuracy(rows: Sequence[GroupParity], classes: Sequence[ClassParity] = (), copies: Sequence[str] = ()) -> Gate:
    """G3: every group, and all images together, kept their accuracy within the margin.

    Alarms are told and decide nothing: a group whose loss chance hardly explains, and classes that stand out.

    Args:
        rows: Of comparison.compare.
        classes: Of comparison.compare_classes.
        copies: Of ``find_duplicates``. Any fails the gate: figures prove nothing on images that chose the candidate or
            count twice.
    """
    findings = (
        *copies,
        *(_why(row) for row in rows if row.verdict != "PASS"),
        *(_alarm(row) for row in rows if row.verdict != "FAIL" and row.mcnemar_p < ALARM and (row.loss or 0) > 0),
        *_standing_out(classes),
    )
    return Gate(name="G3 task", verdict="FAIL" if copies else worst(row.verdict for row in rows), findings=findings)


def confidence(rows: Sequence[ConfidenceParity]) -> Gate:
    """G4: the candidate's probabilities are numbers; where they became worse is told.

    Nothing else fails it. Confidence may move, because each precision is calibrated on its own logits afterwards and
    held to that; and the raw calibration error of a small group is mostly noise.
    """
    broken = tuple(
        f"{row.group}: probabilities of some of {row.num_images} images are not finite."
        for row in rows
        if row.num_images and row.kl is None
    )
    told = tuple(
        f"{row.group}: the {name} rose by {change.value:.2g} (95 % interval {change.low:.2g} to {change.high:.2g})."
        for row in rows
        for name, change in (("negative log likelihood", row.nll), ("Brier score", row.brier))
        if change is not None and change.low > NOTABLE
    )
    return Gate(name="G4 confidence", verdict="FAIL" if broken else "PASS", findings=(*broken, *told))


def host(session: InferenceSession, images: Images, expected_MC: NDArray[np.floating], precision: Precision) -> Gate:
    """G5: on this machine and provider, the golden images get the logits they got where the model was certified.

    Args:
        session: The model, opened as it will be served.
        images: M golden images.
        expected_MC: Their logits at certification.
        precision: Says how far other hardware may move them.
    """
    try:
        seen_MC = run(session, images)
    except BundleError as reason:
        return Gate(name="G5 host", verdict="FAIL", findings=(str(reason),))
    if seen_MC.shape != expected_MC.shape:
        shapes = f"{list(seen_MC.shape)} for the golden images, expected {list(expected_MC.shape)}"
        return Gate(name="G5 host", verdict="FAIL", findings=(f"the model gives logits {shapes}.",))
    error, allowed = float(np.abs(seen_MC - expected_MC).max()), GOLDEN_TOLERANCE[precision] * _largest(expected_MC)
    finding = f"the logits of {len(expected_MC)} golden images are up to {error:.2g} off, {allowed:.2g} is allowed."
    return Gate(name="G5 host", verdict="PASS" if error <= allowed else "FAIL", findings=(finding,))


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict for many: a failure outweighs a doubt, a doubt outweighs any number of passes."""
    seen = set(verdicts)
    return "FAIL" if "FAIL" in seen else "INCONCLUSIVE" if "INCONCLUSIVE" in seen else "PASS"


def _why(row: GroupParity) -> str:
    if not row.num_images:
        return f"{row.group}: there are no images of this group, so nothing is known about it."
    if row.verdict == "FAIL":
        return (
            f"{row.group}: {row.right_to_wrong} images became wrong and {row.wrong_to_right} right: at least "
            f"{_percent(row.loss_lower_limit)} of accuracy were lost, the margin is {_percent(row.margin)}."
        )
    rounded_up = math.ceil(10_000 * row.loss_upper_limit) / 100
    discordant = (row.right_to_wrong + row.wrong_to_right) / row.num_images
    return (
        f"{row.group}: {row.num_images} images certify no margin below {rounded_up:.2f} %, "
        f"the margin is {_percent(row.margin)}. If nothing is lost, about "
        f"{images_needed(row.margin, discordant):,} images certify it."
    )


def _alarm(row: GroupParity) -> str:
    return (
        f"{row.group}: alarm: {row.right_to_wrong} images became wrong and {row.wrong_to_right} right, which chance "
        f"alone does with p = {row.mcnemar_p:.2g} (McNemar, Holm); the loss is real, though no larger than allowed."
        if row.verdict == "PASS"
        else f"{row.group}: alarm: chance alone does this with p = {row.mcnemar_p:.2g} (McNemar, Holm)."
    )


def _standing_out(classes: Sequence[ClassParity]) -> list[str]:
    flagged = [row.label for row in classes if row.flagged]
    if not flagged:
        return []
    named = ", ".join(flagged[:_NAMED]) + (f" and {len(flagged) - _NAMED} more" if len(flagged) > _NAMED else "")
    return [
        f"alarm: {len(flagged)} of {len(classes)} classes lost accuracy: {named} (a share of 5 % of such findings is "
        "expected to be chance)."
    ]


def _largest(logits_MC: NDArray[np.floating]) -> float:
    return float(np.abs(logits_MC).max())


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"


def _signature(session: InferenceSession, task: Task) -> list[str]:
    expected = {
        "input": (INPUT, "tensor(uint8)", [task.input_px, task.input_px, 3]),
        "output": (OUTPUT, "tensor(float)", [len(task.class_names)]),
    }
    seen = {"input": session.get_inputs(), "output": session.get_outputs()}
    findings = []
    for side, (name, kind, shape) in expected.items():
        found = [(tensor.name, tensor.type, list(tensor.shape)) for tensor in seen[side]]
        fits = len(found) == 1 and found[0][:2] == (name, kind) and found[0][2][1:] == shape
        if not fits or not isinstance(found[0][2][0], str):
            findings.append(f"the {side} is {found}, expected {name} {kind} of shape {['N', *shape]} with N dynamic.")
    return findings


def _metadata(model: ModelProto, task: Task) -> list[str]:
    said = {entry.key: entry.value for entry in model.metadata_props}
    return [
        f"the metadata say {key} = {said.get(key, 'nothing')[:80]}, the task says {value[:80]}."
        for key, value in model_metadata(task).items()
        if json.loads(said.get(key, "null")) != json.loads(value)
    ]


def _leaks(model: ModelProto) -> list[str]:
    """Paths of the exporting machine in anything but the weights and the metadata, which are checked by value."""
    words = ModelProto()
    words.CopyFrom(model)
    del words.metadata_props[:]
    for tensor in tensors_of(words.graph):  # random weights spell anything, sooner or later
        for numbers in ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data"):
            tensor.ClearField(numbers)
    found = _LEAK.search(words.SerializeToString())
    return [f"the file holds a path of this machine: {found.group().decode(errors='replace')}"] if found else []


def _batches(session: InferenceSession, images_NSS3: NDArray[np.uint8], rounding_share: float) -> list[str]:
    try:
        alone_NC = run(session, images_NSS3, batch_size=1)
        batches = {size: run(session, images_NSS3[:size], batch_size=size) for size in BATCH_SIZES}
    except BundleError as reason:
        return [str(reason)]
    tolerance = rounding_share * span(alone_NC)
    return [
        f"in a batch of {size} images the logits are not those of the images alone."
        for size, together_NC in batches.items()
        if together_NC.shape != alone_NC[:size].shape
        or not np.allclose(together_NC, alone_NC[:size], rtol=0, atol=tolerance, equal_nan=True)
    ]
