"""The training methods by name, with every parameter that a run records.

A method combines the loss functions of ``losses`` and ``reviewkd`` into the loss that a student minimises.

Shape legend: N images in the batch, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from ltkd.config import MethodConfig, Parameter
from ltkd.contract.class_groups import groups_by_quantile
from ltkd.contract.task import Task
from ltkd.errors import UsageError
from ltkd.methods.losses import (
    GroupIndex,
    adjusted_cross_entropy,
    bkd_loss,
    dkd_loss,
    effective_number_weights,
    kd_loss,
    log_prior,
    ltkd_loss,
    without_prior,
)
from ltkd.methods.reviewkd import review_loss

# The papers warm up over 20 of 240 epochs; a share can be used in a recipe of any length.
WARM_UP = 20 / 240

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class ClassStatistics(nn.Module):
    """The statistics of the classes that methods use, as buffers, which move with their module between devices.

    Attributes:
        groups: The partition into head, medium and tail.
        log_prior_C: Log of each class's share of the training images.
        effective_weight_C: Class weights by the effective number of images, with a mean of 1 over the training images.
    """

    log_prior_C: Tensor
    effective_weight_C: Tensor

    def __init__(self, task: Task) -> None:
        super().__init__()
        train_count_C = torch.tensor(task.train_counts)
        self.groups = GroupIndex(task.groups)
        self.register_buffer("log_prior_C", log_prior(train_count_C).float(), persistent=False)
        weight_C = effective_number_weights(train_count_C).float()
        self.register_buffer("effective_weight_C", weight_C, persistent=False)
        self._train_counts = task.train_counts
        self._quantiles: dict[int, GroupIndex] = {}

    def partition(self, num_groups: int) -> GroupIndex:
        """The task's own groups for 0, otherwise ``num_groups`` groups of nearly equal size by training count."""
        if num_groups == 0:
            return self.groups
        if num_groups not in self._quantiles:
            quantiles = GroupIndex(groups_by_quantile(self._train_counts, num_groups))
            self._quantiles[num_groups] = quantiles.to(self.log_prior_C.device)
        return self._quantiles[num_groups]


@dataclass(frozen=True)
class LossInputs:
    """The inputs of a method for one step.

    Attributes:
        student_NC: Student logits.
        teacher_NC: Teacher logits; None when the method has no teacher.
        labels_N: True classes, int64.
        classes: Groups, prior and weights of the classes.
        progress: Share of the training steps done so far, 0 to 1.
        student_features: Feature maps in the teacher's shapes, for methods that compare features.
        teacher_features: The teacher's feature maps.
    """

    student_NC: Tensor
    teacher_NC: Tensor | None
    labels_N: Tensor
    classes: ClassStatistics
    progress: float
    student_features: Sequence[Tensor] = ()
    teacher_features: Sequence[Tensor] = ()

    def warm_up(self, share: float) -> float:
        """A factor that rises linearly from 0 to 1 over the first ``share`` of the training."""
        return min(1.0, self.progress / share) if share > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all methods. Its parameters rebalance the cross-entropy that every method contains.

    Attributes:
        logit_adjustment: Factor of the log prior that is added to the logits in training; 1 is the balanced softmax.
        reweight_after: Share of the training after which classes are weighted by their effective number of images
            (deferred re-weighting, arXiv 1906.07413); 1 disables it.
    """

    logit_adjustment: NotNegative = 0.0
    reweight_after: Share = 1.0
    needs_teacher: ClassVar[bool] = False
    needs_features: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, batch: LossInputs) -> Tensor:
        """The loss of one step, a scalar."""

    def cross_entropy(self, batch: LossInputs) -> Tensor:
        """Cross-entropy of the labels, rebalanced by the parameters; the mean over the batch."""
        deferred = self.reweight_after < 1 and batch.progress >= self.reweight_after
        return adjusted_cross_entropy(
            batch.student_NC,
            batch.labels_N,
            batch.classes.log_prior_C,
            strength=self.logit_adjustment,
            class_weight_C=batch.classes.effective_weight_C if deferred else None,
        )


@dataclass(frozen=True, kw_only=True)
class CE(Method):
    """Cross-entropy of the labels: for teachers, and for students without a teacher."""

    def __call__(self, batch: LossInputs) -> Tensor:
        return self.cross_entropy(batch)


@dataclass(frozen=True, kw_only=True)
class Distillation(Method):
    """Base of the methods that have a teacher.

    Attributes:
        teacher_calibration: Factor of the log prior that is subtracted from the teacher's logits before they are used;
            0 leaves the logits unchanged.
    """

    teacher_calibration: NotNegative = 0.0
    needs_teacher: ClassVar[bool] = True

    def teacher(self, batch: LossInputs) -> Tensor:
        """The teacher's logits after ``teacher_calibration``."""
        assert batch.teacher_NC is not None, "the training loop must pass teacher logits when needs_teacher is true"
        return without_prior(batch.teacher_NC, batch.classes.log_prior_C, strength=self.teacher_calibration)


@dataclass(frozen=True, kw_only=True)
class KD(Distillation):
    """``ce_weight * CE + kd_weight * temperature**2 * KL``."""

    temperature: Positive = 4.0
    ce_weight: NotNegative = 0.1
    kd_weight: NotNegative = 0.9

    def __call__(self, batch: LossInputs) -> Tensor:
        distillation = kd_loss(batch.student_NC, self.teacher(batch), temperature=self.temperature)
        return self.ce_weight * self.cross_entropy(batch) + self.kd_weight * distillation


@dataclass(frozen=True, kw_only=True)
class DKD(Distillation):
    """``CE + warm-up * temperature**2 * (alpha * TCKD + beta * NCKD)``; the warm-up is linear."""

    temperature: Positive = 4.0
    alpha: NotNegative = 1.0
    beta: NotNegative = 8.0
    warm_up: NotNegative = WARM_UP

    def __call__(self, batch: LossInputs) -> Tensor:
        distillation = dkd_loss(
            batch.student_NC,
            self.teacher(batch),
            batch.labels_N,
            temperature=self.temperature,
            alpha=self.alpha,
            beta=self.beta,
        )
        return self.cross_entropy(batch) + batch.warm_up(self.warm_up) * distillation


@dataclass(frozen=True, kw_only=True)
class BKD(Distillation):
    """``CE + kd_weight * temperature**2 * KL`` from teacher probabilities times effective-number class weights."""

    temperature: Positive = 2.0
    kd_weight: NotNegative = 1.0

    def __call__(self, batch: LossInputs) -> Tensor:
        weight_C = batch.classes.effective_weight_C
        distillation = bkd_loss(batch.student_NC, self.teacher(batch), weight_C, temperature=self.temperature)
        return self.cross_entropy(batch) + self.kd_weight * distillation


@dataclass(frozen=True, kw_only=True)
class ReviewKD(Distillation):
    """``CE + warm-up * review_weight * review loss`` between feature maps; the warm-up is linear."""

    review_weight: NotNegative = 1.0
    warm_up: NotNegative = WARM_UP
    needs_features: ClassVar[bool] = True

    def __call__(self, batch: LossInputs) -> Tensor:
        review = review_loss(batch.student_features, batch.teacher_features)
        return self.cross_entropy(batch) + batch.warm_up(self.warm_up) * self.review_weight * review


@dataclass(frozen=True, kw_only=True)
class LTKD(Distillation):
    """``CE + warm-up * temperature**2 * (alpha * cross-group + beta * within-group)``; the warm-up is linear.

    Attributes:
        num_groups: Number of groups in the loss: 0 uses the task's own groups, K divides the classes into K groups of
            nearly equal size.
    """

    temperature: Positive = 4.0
    alpha: NotNegative = 6.0
    beta: NotNegative = 1.0
    within_weight: NotNegative = 1.0
    target: Literal["uniform", "class-share"] = "uniform"
    warm_up: NotNegative = WARM_UP
    num_groups: Annotated[int, Field(ge=0)] = 0

    def __call__(self, batch: LossInputs) -> Tensor:
        distillation = ltkd_loss(
            batch.student_NC,
            self.teacher(batch),
            batch.classes.partition(self.num_groups),
            temperature=self.temperature,
            alpha=self.alpha,
            beta=self.beta,
            within_weight=self.within_weight,
            target=self.target,
        )
        return self.cross_entropy(batch) + batch.warm_up(self.warm_up) * distillation


@dataclass(frozen=True, kw_only=True)
class LTKDPlus(LTKD):
    """LTKD with the balanced softmax: our best method, chosen on held-out training images (docs/lab-book.md)."""

    logit_adjustment: NotNegative = 1.0


METHODS: dict[str, type[Method]] = {
    "ce": CE,
    "kd": KD,
    "dkd": DKD,
    "bkd": BKD,
    "reviewkd": ReviewKD,
    "ltkd": LTKD,
    "ltkd_plus": LTKDPlus,
}


def build_method(config: MethodConfig) -> Method:
    """Build the method that a configuration names.

    Raises:
        UsageError: The method or one of its parameters does not exist, or a value is invalid.
    """
    if config.name not in METHODS:
        raise UsageError(f"unknown method '{config.name}'; known: {', '.join(METHODS)}.")
    method_class = METHODS[config.name]
    known = [field.name for field in fields(method_class)]
    for name in config.parameters:
        if name not in known:
            raise UsageError(f"method '{config.name}' has no parameter '{name}'; it has: {', '.join(known) or 'none'}.")
    try:
        return TypeAdapter(method_class).validate_python(config.parameters)
    except ValidationError as reason:
        error = reason.errors()[0]
        field = ".".join(str(part) for part in error["loc"])
        raise UsageError(f"method '{config.name}': {field}={error['input']!r}: {error['msg']}.") from None


def method_config(name: str, changes: dict[str, Parameter] | None = None) -> MethodConfig:
    """A method's configuration with every parameter written out."""
    method = build_method(MethodConfig(name=name, parameters=changes or {}))
    return MethodConfig(name=name, parameters=asdict(method))
