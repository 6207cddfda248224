"""The training methods by name: what a student minimises, with every parameter that a run records.

Shape legend: N images in the batch, C classes.
"""

from dataclasses import asdict, dataclass, fields
from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from ltkd.config import MethodConfig, Parameter
from ltkd.errors import UsageError
from ltkd.losses import GroupIndex, dkd_loss, kd_loss, ltkd_loss

# The papers warm up over 20 of 240 epochs; as a share it means the same in a recipe of any length.
WARM_UP = 20 / 240

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class Batch:
    """What a method sees of one step.

    Attributes:
        student_NC: Student logits.
        teacher_NC: Teacher logits; None when the method has no teacher.
        labels_N: True classes, int64.
        groups: The partition of the classes.
        progress: Share of the training's steps done so far, 0 to 1.
    """

    student_NC: Tensor
    teacher_NC: Tensor | None
    labels_N: Tensor
    groups: GroupIndex
    progress: float

    @property
    def teacher(self) -> Tensor:
        """The teacher's logits, for methods that have one."""
        assert self.teacher_NC is not None, "the training loop gives teacher logits where needs_teacher is true"
        return self.teacher_NC

    @property
    def cross_entropy(self) -> Tensor:
        """Cross-entropy of the labels, the mean over the batch."""
        return F.cross_entropy(self.student_NC.float(), self.labels_N)

    def warm_up(self, share: float) -> float:
        """A factor that rises linearly from 0 to 1 over the first ``share`` of the training."""
        return min(1.0, self.progress / share) if share > 0 else 1.0


@dataclass(frozen=True)
class CE:
    """Cross-entropy of the labels: how a teacher is trained, and a student without one."""

    needs_teacher: ClassVar[bool] = False

    def __call__(self, batch: Batch) -> Tensor:
        return batch.cross_entropy


@dataclass(frozen=True)
class KD:
    """``ce_weight * CE + kd_weight * temperature**2 * KL``."""

    temperature: Positive = 4.0
    ce_weight: NotNegative = 0.1
    kd_weight: NotNegative = 0.9
    needs_teacher: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> Tensor:
        distillation = kd_loss(batch.student_NC, batch.teacher, temperature=self.temperature)
        return self.ce_weight * batch.cross_entropy + self.kd_weight * distillation


@dataclass(frozen=True)
class DKD:
    """``CE + warm-up * temperature**2 * (alpha * TCKD + beta * NCKD)``; the warm-up is linear."""

    temperature: Positive = 4.0
    alpha: NotNegative = 1.0
    beta: NotNegative = 8.0
    warm_up: NotNegative = WARM_UP
    needs_teacher: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> Tensor:
        distillation = dkd_loss(
            batch.student_NC,
            batch.teacher,
            batch.labels_N,
            temperature=self.temperature,
            alpha=self.alpha,
            beta=self.beta,
        )
        return batch.cross_entropy + batch.warm_up(self.warm_up) * distillation


@dataclass(frozen=True)
class LTKD:
    """``CE + warm-up * temperature**2 * (alpha * cross-group + beta * within-group)``; the warm-up is linear."""

    temperature: Positive = 4.0
    alpha: NotNegative = 6.0
    beta: NotNegative = 1.0
    within_weight: NotNegative = 1.0
    target: Literal["uniform", "class-share"] = "uniform"
    warm_up: NotNegative = WARM_UP
    needs_teacher: ClassVar[bool] = True

    def __call__(self, batch: Batch) -> Tensor:
        distillation = ltkd_loss(
            batch.student_NC,
            batch.teacher,
            batch.groups,
            temperature=self.temperature,
            alpha=self.alpha,
            beta=self.beta,
            within_weight=self.within_weight,
            target=self.target,
        )
        return batch.cross_entropy + batch.warm_up(self.warm_up) * distillation


AnyMethod = CE | KD | DKD | LTKD

METHODS: dict[str, type[AnyMethod]] = {"ce": CE, "kd": KD, "dkd": DKD, "ltkd": LTKD}


def method_of(config: MethodConfig) -> AnyMethod:
    """The method that a configuration names.

    Raises:
        UsageError: The method or one of its parameters does not exist, or a value is of the wrong kind.
    """
    if config.name not in METHODS:
        raise UsageError(f"unknown method '{config.name}'; known: {', '.join(METHODS)}.")
    kind = METHODS[config.name]
    known = [field.name for field in fields(kind)]
    for name in config.parameters:
        if name not in known:
            raise UsageError(f"method '{config.name}' has no parameter '{name}'; it has: {', '.join(known) or 'none'}.")
    try:
        return TypeAdapter[AnyMethod](kind).validate_python(config.parameters)
    except ValidationError as reason:
        error = reason.errors()[0]
        field = ".".join(str(part) for part in error["loc"])
        raise UsageError(f"method '{config.name}': {field}={error['input']!r}: {error['msg']}.") from None


def method_config(name: str, changes: dict[str, Parameter] | None = None) -> MethodConfig:
    """A method's configuration with every parameter written out."""
    method = method_of(MethodConfig(name=name, parameters=changes or {}))
    return MethodConfig(name=name, parameters=asdict(method))
