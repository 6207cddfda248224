"""The gates a candidate has to pass before it may call itself the network.

    G0 structure   it is one sound file that takes any batch and says what it is
    G1 numeric     its logits are those of the network, up to rounding
    G2 decisions   no image whose class was clear gets another one
    G3 task        every group of classes, and all together, kept its accuracy

Each is a function from model bytes or arrays to a Gate. PASS and FAIL are both shown by the data; when they show
neither, the verdict is INCONCLUSIVE, which certifies nothing. That every group has to pass needs no correction for
multiple testing: a bad candidate must get past all of them, which only lowers its chances.

Shape legend: N images, M of them sampled, S side in pixels, C classes.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime import InferenceSession
from pydantic import Field

from export.candidate import INPUT, OUTPUT, model_metadata, open_session, read_model, run, tensors_of
from export.statistics import clopper_pearson_upper, images_needed, tango_lower, tango_upper
from ltkd.errors import BundleError, DeviceError
from ltkd.files import Images
from ltkd.groups import ClassGroups
from ltkd.records import Record
from ltkd.task import Task

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
GateName = Literal["G0 structure", "G1 numeric", "G2 decisions", "G3 task"]

ALL = "all"
BATCH_SIZES = (1, 2, 3, 17)
SUM_ORDER_SHARE = 1e-4
"""How far logits may move, as a share of their span, when only the order of float32 sums changes."""
LARGE_MARGIN_SHARE = 1e-3
"""The class of an image is clear when its two highest logits are this share of the span apart.

G1 tolerates an error of 1e-5 of the span, which can turn margins up to 2e-5; no rounding turns 1e-3.
"""

_LEAK = re.compile(rb"[\w./\\ -]*(?:\.pyc?\b|site-packages|/home/|/root/|/Users/|/tmp/|:\\Users\\)[\w./\\ -]*")


class Gate(Record):
    """What one gate says.

    Attributes:
        findings: Sentences for people; those of a gate that was not passed say why.
    """

    name: GateName
    verdict: Verdict
    findings: tuple[str, ...] = ()


class Margins(Record):
    """The loss of accuracy that is acceptable, as a fraction, for all images and for each group."""

    overall: float = Field(gt=0, lt=1)
    group: float = Field(gt=0, lt=1)


FP32_MARGINS = Margins(overall=0.002, group=0.005)


class GroupParity(Record):
    """Reference and candidate on the images of one group, or on ``all``. Limits are one-sided at 95 %.

    Attributes:
        reference_accuracy: None, like all that is undefined, when there are no images.
        loss: Reference minus candidate accuracy.
        loss_upper_limit: Tango's; also the smallest margin that these images certify.
        num_flips: Images whose most likely class changed.
        flip_rate_upper_limit: Clopper and Pearson's.
        num_clear_flips: Flips of images whose class was clear by LARGE_MARGIN_SHARE, or whose logits are not finite.
        verdict: PASS when the upper limit of the loss lies below the margin, FAIL when the lower one lies above.
    """

    group: str
    num_images: int
    reference_accuracy: float | None
    candidate_accuracy: float | None
    right_to_wrong: int
    wrong_to_right: int
    loss: float | None
    loss_lower_limit: float
    loss_upper_limit: float
    margin: float
    num_flips: int
    flip_rate_upper_limit: float
    num_clear_flips: int
    verdict: Verdict


def structure(candidate: bytes, task: Task, images: Images) -> Gate:
    """G0: the file is sound, says the right things of itself and treats images alike in batches of any size.

    Args:
        candidate: The ONNX file.
        task: What it should do.
        images: Real ones, at least one.
    """
    try:
        model, session = read_model(candidate), open_session(candidate)
    except (BundleError, DeviceError) as reason:
        return Gate(name="G0 structure", verdict="FAIL", findings=(str(reason),))
    most = max(BATCH_SIZES)
    images_NSS3 = images[:most]
    findings = (
        *_signature(session, task),
        *_metadata(model, task),
        *_leaks(model),
        *_batches(session, np.resize(images_NSS3, (most, *images_NSS3.shape[1:]))),
    )
    return Gate(name="G0 structure", verdict="FAIL" if findings else "PASS", findings=findings)


def numeric(oracle_MC: NDArray[np.floating], torch_MC: NDArray[np.floating], candidate_MC: NDArray[np.float32]) -> Gate:
    """G1: the candidate errs no more than ten times as much as torch itself does in float32.

    Args:
        oracle_MC: Logits of torch in float64.
        torch_MC: Logits of torch in float32; their error is the yardstick.
        candidate_MC: Logits of the candidate. One that is not finite fails.
    """
    error = float(np.abs(candidate_MC - oracle_MC).max())
    allowed = max(10 * float(np.abs(torch_MC - oracle_MC).max()), 1e-5 * span(oracle_MC))
    finding = f"the largest error of a logit on {len(oracle_MC)} images is {error:.2g}, {allowed:.2g} is allowed."
    return Gate(name="G1 numeric", verdict="PASS" if error <= allowed else "FAIL", findings=(finding,))


def compare(
    reference_NC: NDArray[np.floating],
    candidate_NC: NDArray[np.float32],
    label_N: NDArray[np.int64],
    groups: ClassGroups,
    margins: Margins,
) -> tuple[GroupParity, ...]:
    """Hold candidate against reference, image by image: one row a group, by true class, and one for ``all``.

    Of tied logits the first counts. Logits that are not finite decide nothing: they are wrong, and a clear flip.
    """
    reference_N, candidate_N = _decided(reference_NC), _decided(candidate_NC)
    top_two_N2 = np.partition(reference_NC, -2, axis=1)[:, -2:]
    clear_N = (np.ptp(top_two_N2, axis=1) > LARGE_MARGIN_SHARE * span(reference_NC)) | (candidate_N < 0)
    flipped_N = reference_N != candidate_N
    facts_N4 = np.stack([reference_N == label_N, candidate_N == label_N, flipped_N, flipped_N & clear_N], axis=1)
    group_N = groups.index[label_N]
    by_group = [_row(name, facts_N4[group_N == group], margins.group) for group, name in enumerate(groups.names)]
    return (*by_group, _row(ALL, facts_N4, margins.overall))


def decisions(rows: Sequence[GroupParity]) -> Gate:
    """G2: no image whose class was clear to the reference gets another class. Flips of unclear ones are counted."""
    findings = tuple(
        f"{row.group}: {row.num_flips} of {row.num_images} images changed class "
        f"(at most {_percent(row.flip_rate_upper_limit)}), {row.num_clear_flips} of them at a large margin."
        for row in rows
        if row.num_flips
    )
    failed = any(row.num_clear_flips for row in rows)
    return Gate(name="G2 decisions", verdict="FAIL" if failed else "PASS", findings=findings)


def task_accuracy(rows: Sequence[GroupParity]) -> Gate:
    """G3: every group, and all images together, kept their accuracy within the margin."""
    findings = tuple(_why(row) for row in rows if row.verdict != "PASS")
    return Gate(name="G3 task", verdict=worst(row.verdict for row in rows), findings=findings)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict for many: a failure outweighs a doubt, a doubt outweighs any number of passes."""
    seen = set(verdicts)
    return "FAIL" if "FAIL" in seen else "INCONCLUSIVE" if "INCONCLUSIVE" in seen else "PASS"


def span(logits_NC: NDArray[np.floating]) -> float:
    """Highest minus lowest finite logit: the yardstick that makes errors of different networks comparable."""
    finite = logits_NC[np.isfinite(logits_NC)]
    return float(np.ptp(finite)) if finite.size else 0.0


def _row(group: str, facts_N4: NDArray[np.bool_], margin: float) -> GroupParity:
    num_images = len(facts_N4)
    was_right_N, is_right_N, flipped_N, clear_N = facts_N4.T
    b, c = int((was_right_N & ~is_right_N).sum()), int((~was_right_N & is_right_N).sum())
    lower, upper = tango_lower(b, c, num_images), tango_upper(b, c, num_images)
    num_flips = int(flipped_N.sum())
    return GroupParity(
        group=group,
        num_images=num_images,
        reference_accuracy=float(was_right_N.mean()) if num_images else None,
        candidate_accuracy=float(is_right_N.mean()) if num_images else None,
        right_to_wrong=b,
        wrong_to_right=c,
        loss=(b - c) / num_images if num_images else None,
        loss_lower_limit=lower,
        loss_upper_limit=upper,
        margin=margin,
        num_flips=num_flips,
        flip_rate_upper_limit=clopper_pearson_upper(num_flips, num_images),
        num_clear_flips=int(clear_N.sum()),
        verdict="PASS" if upper < margin else "FAIL" if lower > margin else "INCONCLUSIVE",
    )


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


def _decided(logits_NC: NDArray[np.floating]) -> NDArray[np.int64]:
    """The most likely class, -1 where a logit is not finite."""
    return np.where(np.isfinite(logits_NC).all(axis=1), logits_NC.argmax(axis=1), -1)


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


def _batches(session: InferenceSession, images_NSS3: NDArray[np.uint8]) -> list[str]:
    try:
        alone_NC = run(session, images_NSS3, batch_size=1)
        batches = {size: run(session, images_NSS3[:size], batch_size=size) for size in BATCH_SIZES}
    except BundleError as reason:
        return [str(reason)]
    tolerance = SUM_ORDER_SHARE * span(alone_NC)
    return [
        f"in a batch of {size} images the logits are not those of the images alone."
        for size, together_NC in batches.items()
        if together_NC.shape != alone_NC[:size].shape
        or not np.allclose(together_NC, alone_NC[:size], rtol=0, atol=tolerance, equal_nan=True)
    ]
