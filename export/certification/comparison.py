"""Two models' logits of the same images, held against each other: the figures that the gates judge.

Shape legend: N images, C classes.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from export.certification.statistics import (
    CONFIDENCE,
    benjamini_hochberg,
    bootstrap_means,
    calibration_error,
    calibration_error_null,
    clopper_pearson_upper,
    holm,
    loss_lower,
    loss_upper,
    mcnemar,
    mcnemar_loss,
)
from export.schema import ALL, ClassParity, ConfidenceParity, Difference, FlipsByMargin, GroupParity, Margins
from ltkd.contract.bundle import Precision
from ltkd.contract.class_groups import ClassGroups
from ltkd.contract.task import Task

CLEAR_MARGIN: dict[Precision, float] = {"fp32": 1e-3, "fp16": 1e-2, "int8": 5e-2}
"""The class of an image is clear when its two highest logits are this share of the span apart.

It takes an error of half of that to turn it. G1 tolerates 1e-5 of the span in fp32; in half precision 2e-3 was the most
that was seen in ResNets and MobileNets, in int8 1.4e-2.
"""
FLIP_INTERVALS = (0.0, 1e-3, 1e-2, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_AT_ONCE = 4096


def compare(
    reference_NC: NDArray[np.floating],
    candidate_NC: NDArray[np.floating],
    label_N: NDArray[np.int64],
    groups: ClassGroups,
    margins: Margins,
    precision: Precision = "fp32",
) -> tuple[GroupParity, ...]:
    """Hold candidate against reference, image by image: one row a group, by true class, and one for ``all``.

    Of tied logits the first counts. Logits that are not finite decide nothing: they are wrong, and a clear flip.

    Args:
        reference_NC: Logits of what the candidate claims to be.
        candidate_NC: Logits of the candidate, of the same images.
        label_N: True classes.
        groups: Of the task.
        margins: The loss of accuracy that is acceptable.
        precision: Of the candidate; says how clear an image has to be to count as clear.
    """
    reference_N, candidate_N = _decided(reference_NC), _decided(candidate_NC)
    clear_N = (_lead(reference_NC) > CLEAR_MARGIN[precision]) | (candidate_N < 0)
    flipped_N = reference_N != candidate_N
    facts_N4 = np.stack([reference_N == label_N, candidate_N == label_N, flipped_N, flipped_N & clear_N], axis=1)
    group_N = groups.index[label_N]
    confidence = 1 - (1 - CONFIDENCE) / (len(groups.names) + 1)  # any row may say FAIL, so they share the error
    rows = [_row(name, facts_N4[group_N == group], margins, confidence) for group, name in enumerate(groups.names)]
    rows.append(_row(ALL, facts_N4, margins, confidence))
    adjusted = holm([row.mcnemar_p for row in rows])
    return tuple(row.model_copy(update={"mcnemar_p": p}) for row, p in zip(rows, adjusted, strict=True))


def compare_classes(
    reference_NC: NDArray[np.floating], candidate_NC: NDArray[np.floating], label_N: NDArray[np.int64], task: Task
) -> tuple[ClassParity, ...]:
    """Hold candidate against reference class by class, the class with most training images first."""
    was_right_N, is_right_N = _decided(reference_NC) == label_N, _decided(candidate_NC) == label_N
    num_classes = len(task.class_names)
    counts, was_right, is_right, broken, mended = (
        np.bincount(label_N[chosen_N], minlength=num_classes).tolist()
        for chosen_N in (
            np.ones(len(label_N), dtype=np.bool_),
            was_right_N,
            is_right_N,
            was_right_N & ~is_right_N,
            ~was_right_N & is_right_N,
        )
    )
    p_values = [mcnemar_loss(b, c) for b, c in zip(broken, mended, strict=True)]
    flagged = benjamini_hochberg(p_values)
    return tuple(
        ClassParity(
            label=task.class_names[label],
            group=task.group_name(label),
            train_count=task.train_counts[label],
            num_images=counts[label],
            reference_accuracy=was_right[label] / counts[label] if counts[label] else None,
            candidate_accuracy=is_right[label] / counts[label] if counts[label] else None,
            p_value=p_values[label],
            flagged=flagged[label],
        )
        for label in np.argsort(-np.array(task.train_counts), kind="stable").tolist()
    )


def flips_by_margin(
    reference_NC: NDArray[np.floating],
    candidate_NC: NDArray[np.floating],
    label_N: NDArray[np.int64],
    groups: ClassGroups,
) -> tuple[FlipsByMargin, ...]:
    """How many images of each group changed class, by how clear their class was to the reference."""
    flipped_N = _decided(reference_NC) != _decided(candidate_NC)
    interval_N = np.searchsorted(FLIP_INTERVALS[1:-1], _lead(reference_NC))  # the upper end belongs to an interval
    group_N = groups.index[label_N]

    def counted(chosen_N: NDArray[np.bool_]) -> tuple[int, ...]:
        return tuple(np.bincount(group_N[chosen_N], minlength=len(groups.names)).tolist())

    return tuple(
        FlipsByMargin(
            above=above,
            up_to=up_to,
            num_images=counted(interval_N == interval),
            num_flips=counted((interval_N == interval) & flipped_N),
        )
        for interval, (above, up_to) in enumerate(itertools.pairwise(FLIP_INTERVALS))
    )


def compare_confidence(
    reference_NC: NDArray[np.floating],
    candidate_NC: NDArray[np.floating],
    label_N: NDArray[np.int64],
    groups: ClassGroups,
) -> tuple[ConfidenceParity, ...]:
    """How far the probabilities of each group's images, and of all, moved.

    A row without images has no figures, and none has one with a logit that is not finite.
    """
    moved = _moved(reference_NC, candidate_NC, label_N)
    group_N = groups.index[label_N]
    by_group = [_confidence_row(name, moved.of(group_N == group)) for group, name in enumerate(groups.names)]
    return (*by_group, _confidence_row(ALL, moved))


def span(logits_NC: NDArray[np.floating]) -> float:
    """Highest minus lowest finite logit: the yardstick that makes errors of different networks comparable."""
    finite = logits_NC[np.isfinite(logits_NC)]
    return float(np.ptp(finite)) if finite.size else 0.0


@dataclass(frozen=True)
class _Moved:
    """What happened to the probabilities of each image; float64 [N] unless it says otherwise."""

    finite_N: NDArray[np.bool_]
    kl_N: NDArray[np.float64]
    confidence_NR: NDArray[np.float64]  # of reference and candidate, like the following
    right_NR: NDArray[np.bool_]
    nll_NR: NDArray[np.float64]
    brier_NR: NDArray[np.float64]

    def of(self, chosen_N: NDArray[np.bool_]) -> "_Moved":
        """The same of some images."""
        return _Moved(*(values[chosen_N] for values in vars(self).values()))


def _moved(
    reference_NC: NDArray[np.floating], candidate_NC: NDArray[np.floating], label_N: NDArray[np.int64]
) -> _Moved:
    parts = []
    for start in range(0, max(len(label_N), 1), _AT_ONCE):  # probabilities in float64 take more room than the logits
        rows = slice(start, start + _AT_ONCE)
        parts.append(_moved_at_once(reference_NC[rows], candidate_NC[rows], label_N[rows]))
    return _Moved(*(np.concatenate(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


def _moved_at_once(
    reference_NC: NDArray[np.floating], candidate_NC: NDArray[np.floating], label_N: NDArray[np.int64]
) -> _Moved:
    finite_N = np.isfinite(reference_NC).all(axis=1) & np.isfinite(candidate_NC).all(axis=1)
    own = np.arange(len(label_N)), label_N
    log_NC = [
        log_softmax(np.where(finite_N[:, None], logits_NC, 0).astype(np.float64), axis=1)
        for logits_NC in (reference_NC, candidate_NC)
    ]
    probability_NC = [np.exp(log) for log in log_NC]
    brier = [np.square(probability).sum(axis=1) - 2 * probability[own] + 1 for probability in probability_NC]
    return _Moved(
        finite_N=finite_N,
        kl_N=np.maximum((probability_NC[0] * (log_NC[0] - log_NC[1])).sum(axis=1), 0.0),
        confidence_NR=np.stack([probability.max(axis=1) for probability in probability_NC], axis=1),
        right_NR=np.stack([probability.argmax(axis=1) == label_N for probability in probability_NC], axis=1),
        nll_NR=np.stack([-log[own] for log in log_NC], axis=1),
        brier_NR=np.stack(brier, axis=1),
    )


def _confidence_row(group: str, moved: _Moved) -> ConfidenceParity:
    num_images = len(moved.kl_N)
    if not num_images or not moved.finite_N.all():
        figures = ConfidenceParity.model_fields.keys() - {"group", "num_images"}
        return ConfidenceParity(group=group, num_images=num_images, **dict.fromkeys(figures))
    worse_N2 = np.stack([np.diff(moved.nll_NR)[:, 0], np.diff(moved.brier_NR)[:, 0]], axis=1)
    (nll, brier), ((nll_low, brier_low), (nll_high, brier_high)) = worse_N2.mean(axis=0), bootstrap_means(worse_N2)
    null, null_upper = calibration_error_null(moved.confidence_NR[:, 1])
    return ConfidenceParity(
        group=group,
        num_images=num_images,
        kl=float(moved.kl_N.mean()),
        confidence_change=float(np.abs(np.diff(moved.confidence_NR)).mean()),
        nll=Difference(value=float(nll), low=float(nll_low), high=float(nll_high)),
        brier=Difference(value=float(brier), low=float(brier_low), high=float(brier_high)),
        reference_ece=calibration_error(moved.confidence_NR[:, 0], moved.right_NR[:, 0]),
        candidate_ece=calibration_error(moved.confidence_NR[:, 1], moved.right_NR[:, 1]),
        ece_null=null,
        ece_null_upper=null_upper,
    )


def _row(group: str, facts_N4: NDArray[np.bool_], margins: Margins, lower_confidence: float) -> GroupParity:
    num_images = len(facts_N4)
    was_right_N, is_right_N, flipped_N, clear_N = facts_N4.T
    b, c = int((was_right_N & ~is_right_N).sum()), int((~was_right_N & is_right_N).sum())
    lower, upper = loss_lower(b, c, num_images, lower_confidence), loss_upper(b, c, num_images)
    num_flips, margin = int(flipped_N.sum()), margins.of(group)
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
        mcnemar_p=mcnemar(b, c),
        verdict="PASS" if upper < margin else "FAIL" if lower > margin else "INCONCLUSIVE",
    )


def _decided(logits_NC: NDArray[np.floating]) -> NDArray[np.int64]:
    """The most likely class, -1 where a logit is not finite."""
    return np.where(np.isfinite(logits_NC).all(axis=1), logits_NC.argmax(axis=1), -1)


def _lead(logits_NC: NDArray[np.floating]) -> NDArray[np.float64]:
    """How far apart the two highest logits of each image are, as a share of the span; 0 where one is not finite."""
    finite_N = np.isfinite(logits_NC).all(axis=1)
    top_two_N2 = np.partition(np.where(finite_N[:, None], logits_NC, 0).astype(np.float64), -2, axis=1)[:, -2:]
    return np.asarray(np.ptp(top_two_N2, axis=1) / (span(logits_NC) or 1.0))
