"""Distillation losses as pure functions of logits.

Every function takes raw logits of any float dtype and computes in float32 (float64 stays float64). The result is
finite for any finite logits, and no gradient flows to the teacher. All computation stays in the log domain: no log of
a softmax, no division of probabilities.

Shape legend: N images in the batch, C classes, K class groups.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ltkd.contract.class_groups import ClassGroups


class GroupIndex(nn.Module):
    """A partition of the classes as buffers, which move with their module between devices.

    Args:
        groups: The partition; every group is non-empty.
    """

    class_group_C: Tensor
    member_KC: Tensor
    other_KC: Tensor

    def __init__(self, groups: ClassGroups) -> None:
        super().__init__()
        class_group_C = torch.tensor(groups.group_of_class)
        group_K1 = torch.arange(len(groups.names)).unsqueeze(1)
        self.register_buffer("class_group_C", class_group_C, persistent=False)
        self.register_buffer("member_KC", group_K1 == class_group_C, persistent=False)
        self.register_buffer("other_KC", group_K1 != class_group_C, persistent=False)

    @property
    def num_groups(self) -> int:
        """The number of groups, K."""
        return self.member_KC.shape[0]

    def logsumexp(self, logits_NC: Tensor) -> Tensor:
        """Log of the summed exponentials of each group's logits, [N, K]."""
        return logits_NC.unsqueeze(1).masked_fill(self.other_KC, -torch.inf).logsumexp(2)

    def sum(self, values_NC: Tensor) -> Tensor:
        """Sum of each group's values, [N, K]."""
        # not a matrix product, because autocast would run it in half precision
        return values_NC.new_zeros(len(values_NC), self.num_groups).index_add(1, self.class_group_C, values_NC)


@dataclass(frozen=True)
class GroupKL:
    """The pieces of a distillation KL that is split by class group.

    Attributes:
        student_log_mass_NK: Log of the probability that the student assigns to each group.
        teacher_log_mass_NK: The same for the teacher.
        within_NK: KL between teacher and student inside each group, unweighted.
    """

    student_log_mass_NK: Tensor
    teacher_log_mass_NK: Tensor
    within_NK: Tensor


def group_kl(student_NC: Tensor, teacher_NC: Tensor, groups: GroupIndex, *, temperature: float) -> GroupKL:
    """Split the distillation KL by class group.

    The chain rule gives ``KL(t || s) = KL(mass_t || mass_s) + sum_k mass_t,k * within_k``. Plain distillation
    keeps those weights, so a teacher that under-rates the tail passes that bias to the student.

    Args:
        student_NC: Raw student logits.
        teacher_NC: Raw teacher logits.
        groups: The partition of the classes.
        temperature: Softmax temperature, dimensionless, > 0.
    """
    student_NC, teacher_NC = _scaled(student_NC, teacher_NC, temperature)
    student_NK, teacher_NK = groups.logsumexp(student_NC), groups.logsumexp(teacher_NC)
    student_log_q_NC = student_NC - student_NK.index_select(1, groups.class_group_C)
    teacher_log_q_NC = teacher_NC - teacher_NK.index_select(1, groups.class_group_C)
    return GroupKL(
        student_log_mass_NK=student_NK - student_NC.logsumexp(1, keepdim=True),
        teacher_log_mass_NK=teacher_NK - teacher_NC.logsumexp(1, keepdim=True),
        within_NK=groups.sum(_kl_terms(teacher_log_q_NC, student_log_q_NC)),
    )


def ltkd_loss(
    student_NC: Tensor,
    teacher_NC: Tensor,
    groups: GroupIndex,
    *,
    temperature: float = 4.0,
    alpha: float = 6.0,
    beta: float = 1.0,
    within_weight: float | None = 1.0,
    calibrate: bool = True,
    target: Literal["uniform", "class-share"] = "uniform",
    teacher_mass_K: Tensor | None = None,
) -> Tensor:
    """Distil a balanced student from a biased teacher.

    The loss is ``temperature**2 * (alpha * cross + beta * within)``. *cross* is the KL between the group masses. The
    teacher's masses are first rescaled so that every group has the same total over the batch. *within* is the KL inside
    the groups with one constant weight. This is the distillation term only; add the cross-entropy of the labels.

    In data-parallel training (``torch.distributed`` is initialised) the teacher's masses are summed over all ranks. N
    ranks with b images each then have the same gradients as one rank with N * b images. Every rank must call this
    function at every step.

    Source: S. Kim, "Distilling Balanced Knowledge from a Biased Teacher", CVPR 2026, arXiv 2506.18496.

    Args:
        student_NC: Raw student logits.
        teacher_NC: Raw teacher logits.
        groups: The partition of the classes; any K >= 2.
        temperature: Softmax temperature, dimensionless, > 0.
        alpha: Weight of the cross-group term.
        beta: Weight of the within-group term.
        within_weight: The constant that replaces the teacher's group masses; None keeps the masses, as plain
            distillation does.
        calibrate: Whether the teacher's group masses are rescaled. False with ``within_weight=None`` and
            ``alpha = beta`` is plain distillation.
        target: Total of each group after rescaling: the same for every group, or proportional to the group's share of
            the classes.
        teacher_mass_K: The teacher's group masses to divide by, up to a common factor: a running average or a prior,
            for small batches. None uses the sums over this batch on all ranks.

    Returns:
        A scalar, the mean over the batch.
    """
    split = group_kl(student_NC, teacher_NC, groups, temperature=temperature)
    log_target_NK = split.teacher_log_mass_NK
    if calibrate:
        if teacher_mass_K is None:
            log_sum_K = _log_sum_over_ranks(split.teacher_log_mass_NK)
        else:
            log_sum_K = teacher_mass_K.to(log_target_NK).log()
        log_scale_K = -log_sum_K
        if target == "class-share":
            log_scale_K = log_scale_K + groups.member_KC.sum(1).to(log_scale_K).log()
        log_target_NK = F.log_softmax(log_target_NK + log_scale_K, dim=1)
    cross_N = _kl_terms(log_target_NK, split.student_log_mass_NK).sum(1)
    weight = split.teacher_log_mass_NK.exp() if within_weight is None else within_weight
    within_N = (weight * split.within_NK).sum(1)
    return temperature**2 * (alpha * cross_N + beta * within_N).mean()


class LTKDLoss(nn.Module):
    """``ltkd_loss`` as a module for your own training loop, with a running average of the teacher's group masses.

    Before the first step in training mode the average is uniform, so nothing is rescaled.

    Args:
        groups: The partition of the classes.
        momentum: Share of the old average kept at each step, 0 <= momentum < 1; 0 uses each batch's own masses.
        temperature: As in ``ltkd_loss``, like ``alpha``, ``beta`` and ``within_weight``.
    """

    average_mass_K: Tensor

    def __init__(
        self,
        groups: ClassGroups,
        *,
        temperature: float = 4.0,
        alpha: float = 6.0,
        beta: float = 1.0,
        within_weight: float | None = 1.0,
        momentum: float = 0.0,
    ) -> None:
        super().__init__()
        self.groups = GroupIndex(groups)
        self.temperature, self.alpha, self.beta = temperature, alpha, beta
        self.within_weight, self.momentum = within_weight, momentum
        self.register_buffer("average_mass_K", torch.zeros(self.groups.num_groups))

    def forward(self, student_NC: Tensor, teacher_NC: Tensor) -> Tensor:
        """The distillation term for one batch; in training mode the running average is updated first."""
        if self.training and self.momentum:
            log_mass_NK = F.log_softmax(self.groups.logsumexp(teacher_NC.detach().float() / self.temperature), dim=1)
            batch_mass_K = _log_sum_over_ranks(log_mass_NK).softmax(0)
            # torch.where instead of a Python condition, which would wait for the device
            keep = torch.where(self.average_mass_K.any(), self.momentum, 0.0)
            self.average_mass_K.copy_(keep * self.average_mass_K + (1 - keep) * batch_mass_K)
        mass_K = torch.where(self.average_mass_K.any(), self.average_mass_K, 1.0) if self.momentum else None
        return ltkd_loss(
            student_NC,
            teacher_NC,
            self.groups,
            temperature=self.temperature,
            alpha=self.alpha,
            beta=self.beta,
            within_weight=self.within_weight,
            teacher_mass_K=mass_K,
        )


def kd_loss(student_NC: Tensor, teacher_NC: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Plain distillation: ``temperature**2 * KL(teacher || student)``, the mean over the batch.

    Source: Hinton, Vinyals, Dean, arXiv 1503.02531.
    """
    student_NC, teacher_NC = _scaled(student_NC, teacher_NC, temperature)
    terms_NC = _kl_terms(F.log_softmax(teacher_NC, dim=1), F.log_softmax(student_NC, dim=1))
    return temperature**2 * terms_NC.sum(1).mean()


def dkd_loss(
    student_NC: Tensor,
    teacher_NC: Tensor,
    labels_N: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Decoupled distillation: the KL between the labelled class and the rest, and the KL inside the rest.

    Source: Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679.

    Args:
        student_NC: Raw student logits.
        teacher_NC: Raw teacher logits.
        labels_N: True classes, int64.
        temperature: Softmax temperature, dimensionless, > 0.
        alpha: Weight of the two-way KL between the labelled class and the rest (TCKD).
        beta: Weight of the KL inside the rest (NCKD).
    """
    student_NC, teacher_NC = _scaled(student_NC, teacher_NC, temperature)
    labelled_NC = F.one_hot(labels_N, student_NC.shape[1]).bool()
    student_log_N2, student_log_rest_NC = _labelled_and_rest(student_NC, labelled_NC)
    teacher_log_N2, teacher_log_rest_NC = _labelled_and_rest(teacher_NC, labelled_NC)
    tckd_N = _kl_terms(teacher_log_N2, student_log_N2).sum(1)
    nckd_N = _kl_terms(teacher_log_rest_NC, student_log_rest_NC).sum(1)
    return temperature**2 * (alpha * tckd_N + beta * nckd_N).mean()


def bkd_loss(student_NC: Tensor, teacher_NC: Tensor, class_weight_C: Tensor, *, temperature: float = 2.0) -> Tensor:
    """Balanced distillation: plain distillation from teacher probabilities multiplied by class weights.

    Source: Zhang et al., "Balanced Knowledge Distillation for Long-Tailed Learning", arXiv 2104.10510.

    Args:
        student_NC: Raw student logits.
        teacher_NC: Raw teacher logits.
        class_weight_C: Positive weights, such as ``effective_number_weights``; a common factor cancels.
        temperature: Softmax temperature, dimensionless, > 0.
    """
    student_NC, teacher_NC = _scaled(student_NC, teacher_NC, temperature)
    target_NC = F.log_softmax(teacher_NC + class_weight_C.to(teacher_NC).log(), dim=1)
    return temperature**2 * _kl_terms(target_NC, F.log_softmax(student_NC, dim=1)).sum(1).mean()


def effective_number_weights(train_count_C: Tensor, *, beta: float = 0.9999) -> Tensor:
    """Class weights ``(1 - beta) / (1 - beta**n)``, scaled to a mean of 1 over the training images; float64 [C].

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, arXiv 1901.05555.
    """
    weight_C = (1 - beta) / -torch.expm1(train_count_C.double() * math.log(beta))
    return weight_C * train_count_C.sum() / (weight_C * train_count_C).sum()


def log_prior(train_count_C: Tensor) -> Tensor:
    """Log of each class's share of the training images, float64 [C]."""
    return (train_count_C.double() / train_count_C.sum()).log()


def adjusted_cross_entropy(
    logits_NC: Tensor,
    labels_N: Tensor,
    log_prior_C: Tensor,
    *,
    strength: float = 1.0,
    class_weight_C: Tensor | None = None,
) -> Tensor:
    """Logit-adjusted cross-entropy; with strength 1 it is the balanced softmax.

    The log prior is added to the logits in training only, so the plain logits are correct for balanced classes.
    Sources: Menon et al., arXiv 2007.07314; Ren et al., arXiv 2007.10740.

    Args:
        logits_NC: Raw logits.
        labels_N: True classes, int64.
        log_prior_C: ``log_prior`` of the training counts.
        strength: Factor of the log prior; 0 is plain cross-entropy.
        class_weight_C: Each image's loss is multiplied by the weight of its class; the result is the plain mean over
            the batch.
    """
    logits_NC = logits_NC.to(torch.promote_types(logits_NC.dtype, torch.float32))
    if strength:
        logits_NC = logits_NC + strength * log_prior_C.to(logits_NC)
    if class_weight_C is None:
        return F.cross_entropy(logits_NC, labels_N)
    return (class_weight_C[labels_N] * F.cross_entropy(logits_NC, labels_N, reduction="none")).mean()


def without_prior(logits_NC: Tensor, log_prior_C: Tensor, *, strength: float = 1.0) -> Tensor:
    """Subtract ``strength`` times the log prior from logits: post-hoc logit adjustment, for a teacher or a prediction.

    Source: Menon et al., "Long-Tail Learning via Logit Adjustment", arXiv 2007.07314.
    """
    return logits_NC - strength * log_prior_C.to(logits_NC) if strength else logits_NC


def _scaled(student_NC: Tensor, teacher_NC: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Divide both logits by the temperature, in float32 or wider, and detach the teacher's."""
    dtype = torch.promote_types(student_NC.dtype, torch.float32)
    return student_NC.to(dtype) / temperature, teacher_NC.detach().to(dtype) / temperature


def _log_sum_over_ranks(log_mass_NK: Tensor) -> Tensor:
    """Log of the masses summed over the batch and, in distributed training, over all ranks; [K]."""
    log_sum_K = log_mass_NK.logsumexp(0)
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return log_sum_K
    gathered = [torch.empty_like(log_sum_K) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, log_sum_K.contiguous())
    return torch.stack(gathered).logsumexp(0)  # gathered, not reduced, so that the masses stay in the log domain


def _kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``p * (log p - log q)``, elementwise, from finite logarithms."""
    return log_p.exp() * (log_p - log_q)


def _labelled_and_rest(logits_NC: Tensor, labelled_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities of (labelled, rest), [N, 2], and of each class given that it is not the labelled one, [N, C].

    In the second tensor the labelled class is 0 for every network, so it adds nothing to a KL between two networks.
    """
    labelled_N1 = logits_NC.masked_fill(~labelled_NC, -torch.inf).logsumexp(1, keepdim=True)
    rest_N1 = logits_NC.masked_fill(labelled_NC, -torch.inf).logsumexp(1, keepdim=True)
    log_two_N2 = F.log_softmax(torch.cat([labelled_N1, rest_N1], dim=1), dim=1)
    return log_two_N2, (logits_NC - rest_N1).masked_fill(labelled_NC, 0.0)
