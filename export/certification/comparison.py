"""Compare the logits of a candidate with those of its reference, image by image.

The results (accuracy, class changes and confidence, by group and by class) are what the gates decide on.

Shape legend: N images, C classes, R reference and candidate.
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
"""The class of an image is clear if its two highest logits differ by more than this share of the span of the logits.

A logit error of half that size can change the class. In fp32, gate G1 allows errors of 1e-5 of the span. The largest
errors measured in ResNets and MobileNets were 2e-3 in fp16 and 1.4e-2 in int8.
"""
FLIP_INTERVALS = (0.0, 1e-3, 1e-2, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_CHUNK_IMAGES = 4096


def compare(
    reference_NC: NDArray[np.floating],
    candidate_NC: NDArray[np.floating],
    labels_N: NDArray[np.int64],
    groups: ClassGroups,
    margins: Margins,
    precision: Precision = "fp32",
) -> tuple[GroupParity, ...]:
    """Compare candidate and reference on each image: one row per group (by true class) and one for ``all``.

    If the highest logits are tied, the first class is the prediction. An image with a logit that is not finite counts
    as wrong; if only the candidate's logits are not finite, it counts as a clear flip.

    Args:
        reference_NC: Logits of the reference.
        candidate_NC: Logits of the candidate, on the same images.
        labels_N: True classes.
        groups: The partition of the classes.
        margins: The acceptable loss of accuracy.
        precision: Precision of the candidate; selects the threshold in CLEAR_MARGIN.
    """
    reference_N, candidate_N = _predicted(reference_NC), _predicted(candidate_NC)
    clear_N = (_top_two_gap(reference_NC) > CLEAR_MARGIN[precision]) | (candidate_N < 0)
    flipped_N = reference_N != candidate_N
    outcomes_N4 = np.stack([reference_N == labels_N, candidate_N == labels_N, flipped_N, flipped_N & clear_N], axis=1)
    group_N = groups.index[labels_N]
    # any single row can give FAIL, so the rows share the error probability (Bonferroni)
    confidence = 1 - (1 - CONFIDENCE) / (len(groups.names) + 1)
    rows = [_row(name, outcomes_N4[group_N == group], margins, confidence) for group, name in enumerate(groups.names)]
    rows.append(_row(ALL, outcomes_N4, margins, confidence))
    adjusted = holm([row.mcnemar_p for row in rows])
    return tuple(row.model_copy(update={"mcnemar_p": p}) for row, p in zip(rows, adjusted, strict=True))


def compare_classes(
    reference_NC: NDArray[np.floating], candidate_NC: NDArray[np.floating], labels_N: NDArray[np.int64], task: Task
) -> tuple[ClassParity, ...]:
    """Compare candidate and reference for each class, the class with the most training images first."""
    was_right_N, is_right_N = _predicted(reference_NC) == labels_N, _predicted(candidate_NC) == labels_N
    num_classes = len(task.class_names)
    counts, was_right, is_right, right_to_wrong, wrong_to_right = (
        np.bincount(labels_N[mask_N], minlength=num_classes).tolist()
        for mask_N in (
            np.ones(len(labels_N), dtype=np.bool_),
            was_right_N,
            is_right_N,
            was_right_N & ~is_right_N,
            ~was_right_N & is_right_N,
        )
    )
    p_values = [mcnemar_loss(b, c) for b, c in zip(right_to_wrong, wrong_to_right, strict=True)]
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
    labels_N: NDArray[np.int64],
    groups: ClassGroups,
) -> tuple[FlipsByMargin, ...]:
    """Count the images of each group that changed class, by how clear their class was to the reference."""
    flipped_N = _predicted(reference_NC) != _predicted(candidate_NC)
    interval_N = np.searchsorted(FLIP_INTERVALS[1:-1], _top_two_gap(reference_NC))  # intervals include the upper end
    group_N = groups.index[labels_N]

    def count_by_group(mask_N: NDArray[np.bool_]) -> tuple[int, ...]:
        return tuple(np.bincount(group_N[mask_N], minlength=len(groups.names)).tolist())

    return tuple(
        FlipsByMargin(
            above=above,
            up_to=up_to,
            num_images=count_by_group(interval_N == interval),
            num_flips=count_by_group((interval_N == interval) & flipped_N),
        )
        for interval, (above, up_to) in enumerate(itertools.pairwise(FLIP_INTERVALS))
    )


def compare_confidence(
    reference_NC: NDArray[np.floating],
    candidate_NC: NDArray[np.floating],
    labels_N: NDArray[np.int64],
    groups: ClassGroups,
) -> tuple[ConfidenceParity, ...]:
    """Measure how far the probabilities changed: one row per group (by true class) and one for ``all``.

    The values of a row are None if it has no images, or if a logit of its images is not finite.
    """
    shift = _probability_shift(reference_NC, candidate_NC, labels_N)
    group_N = groups.index[labels_N]
    by_group = [_confidence_row(name, shift.of(group_N == group)) for group, name in enumerate(groups.names)]
    return (*by_group, _confidence_row(ALL, shift))


def span(logits_NC: NDArray[np.floating]) -> float:
    """Highest minus lowest finite logit. Errors are given as a share of it, so networks can be compared."""
    finite = logits_NC[np.isfinite(logits_NC)]
    return float(np.ptp(finite)) if finite.size else 0.0


@dataclass(frozen=True)
class _ProbabilityShift:
    """The probabilities of each image before and after, reduced to what the report needs."""

    finite_N: NDArray[np.bool_]
    kl_N: NDArray[np.float64]
    confidence_NR: NDArray[np.float64]
    right_NR: NDArray[np.bool_]
    nll_NR: NDArray[np.float64]
    brier_NR: NDArray[np.float64]

    def of(self, mask_N: NDArray[np.bool_]) -> "_ProbabilityShift":
        """Select the images where ``mask_N`` is true."""
        return _ProbabilityShift(*(values[mask_N] for values in vars(self).values()))


def _probability_shift(
    reference_NC: NDArray[np.floating], candidate_NC: NDArray[np.floating], labels_N: NDArray[np.int64]
) -> _ProbabilityShift:
    chunks = []
    for start in range(0, max(len(labels_N), 1), _CHUNK_IMAGES):  # float64 probabilities need more memory than logits
        rows = slice(start, start + _CHUNK_IMAGES)
        chunks.append(vars(_chunk_shift(reference_NC[rows], candidate_NC[rows], labels_N[rows])).values())
    return _ProbabilityShift(*(np.concatenate(values) for values in zip(*chunks, strict=True)))


def _chunk_shift(
    reference_NC: NDArray[np.floating], candidate_NC: NDArray[np.floating], labels_N: NDArray[np.int64]
) -> _ProbabilityShift:
    finite_N = np.isfinite(reference_NC).all(axis=1) & np.isfinite(candidate_NC).all(axis=1)
    own = np.arange(len(labels_N)), labels_N
    log_NC = [
        log_softmax(np.where(finite_N[:, None], logits_NC, 0).astype(np.float64), axis=1)
        for logits_NC in (reference_NC, candidate_NC)
    ]
    probability_NC = [np.exp(log) for log in log_NC]
    brier = [np.square(probability).sum(axis=1) - 2 * probability[own] + 1 for probability in probability_NC]
    return _ProbabilityShift(
        finite_N=finite_N,
        kl_N=np.maximum((probability_NC[0] * (log_NC[0] - log_NC[1])).sum(axis=1), 0.0),
        confidence_NR=np.stack([probability.max(axis=1) for probability in probability_NC], axis=1),
        right_NR=np.stack([probability.argmax(axis=1) == labels_N for probability in probability_NC], axis=1),
        nll_NR=np.stack([-log[own] for log in log_NC], axis=1),
        brier_NR=np.stack(brier, axis=1),
    )


def _confidence_row(group: str, shift: _ProbabilityShift) -> ConfidenceParity:
    num_images = len(shift.kl_N)
    if not num_images or not shift.finite_N.all():
        field_names = ConfidenceParity.model_fields.keys() - {"group", "num_images"}
        return ConfidenceParity(group=group, num_images=num_images, **dict.fromkeys(field_names))
    change_N2 = np.stack([np.diff(shift.nll_NR)[:, 0], np.diff(shift.brier_NR)[:, 0]], axis=1)
    (nll, brier), ((nll_low, brier_low), (nll_high, brier_high)) = change_N2.mean(axis=0), bootstrap_means(change_N2)
    null, null_upper = calibration_error_null(shift.confidence_NR[:, 1])
    return ConfidenceParity(
        group=group,
        num_images=num_images,
        kl=float(shift.kl_N.mean()),
        confidence_change=float(np.abs(np.diff(shift.confidence_NR)).mean()),
        nll=Difference(value=float(nll), low=float(nll_low), high=float(nll_high)),
        brier=Difference(value=float(brier), low=float(brier_low), high=float(brier_high)),
        reference_ece=calibration_error(shift.confidence_NR[:, 0], shift.right_NR[:, 0]),
        candidate_ece=calibration_error(shift.confidence_NR[:, 1], shift.right_NR[:, 1]),
        ece_null=null,
        ece_null_upper=null_upper,
    )


def _row(group: str, outcomes_N4: NDArray[np.bool_], margins: Margins, lower_confidence: float) -> GroupParity:
    num_images = len(outcomes_N4)
    was_right_N, is_right_N, flipped_N, clear_N = outcomes_N4.T
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


def _predicted(logits_NC: NDArray[np.floating]) -> NDArray[np.int64]:
    """The class with the highest logit; -1 if a logit of the image is not finite."""
    return np.where(np.isfinite(logits_NC).all(axis=1), logits_NC.argmax(axis=1), -1)


def _top_two_gap(logits_NC: NDArray[np.floating]) -> NDArray[np.float64]:
    """Difference of the two highest logits of each image, as a share of the span; 0 if a logit is not finite."""
    finite_N = np.isfinite(logits_NC).all(axis=1)
    top_two_N2 = np.partition(np.where(finite_N[:, None], logits_NC, 0).astype(np.float64), -2, axis=1)[:, -2:]
    return np.asarray(np.ptp(top_two_N2, axis=1) / (span(logits_NC) or 1.0))
