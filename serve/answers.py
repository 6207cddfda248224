"""Answers as records: what the network thinks, and which group of classes it thinks it in.

Shape legend: N images, C classes, K class groups.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ltkd.metrics import softmax
from ltkd.records import Record
from ltkd.task import Task
from serve.engine import Engine
from serve.problems import Problem


class ClassProbability(Record):
    """One class with its probability."""

    label: str
    class_index: int
    probability: float
    group: str


class Answer(ClassProbability):
    """What the model says of one image.

    Attributes:
        label: The most probable class.
        group: The group of that class.
        within_group_probability: The class's share of its own group's probability: how sure the model is once the
            group is settled.
        group_confidence: The probability of each group; they sum to 1.
        top_k: The most probable classes, most probable first.
        warnings: What was done to the image that its sender may not expect.
    """

    within_group_probability: float
    group_confidence: dict[str, float]
    top_k: tuple[ClassProbability, ...]
    warnings: tuple[str, ...]


class Refused(Record):
    """Stands in the place of an image that could not be used."""

    error: Problem


class ModelRef(Record):
    """Which model answered, and where it ran."""

    name: str
    precision: str
    provider: str
    sha256: str = Field(description="SHA-256 of the ONNX file")


class Answers(Record):
    """One result an image, in the order of the request."""

    model: ModelRef
    results: tuple[Answer | Refused, ...]


def model_ref(engine: Engine) -> ModelRef:
    """Which model an engine runs, and where."""
    manifest = engine.manifest
    sha256 = manifest.precisions[engine.precision].sha256
    return ModelRef(name=manifest.name, precision=engine.precision, provider=engine.provider, sha256=sha256)


def answers(
    logits_NC: NDArray[np.float32], task: Task, top_k: int, warnings: Sequence[tuple[str, ...]]
) -> list[Answer]:
    """Turn logits into answers.

    Args:
        logits_NC: Raw logits.
        task: Class names and groups.
        top_k: Classes to list, at most C are.
        warnings: What the decoder said of each of the N images.
    """
    probability_NC = softmax(logits_NC)
    mass_NK = task.groups.mass(probability_NC)
    order_NC = np.argsort(-probability_NC, axis=1, kind="stable")
    found = []
    for row, said in enumerate(warnings):
        first, *_ = ranked = [
            ClassProbability(
                label=task.class_names[index],
                class_index=index,
                probability=float(probability_NC[row, index]),
                group=task.group_name(index),
            )
            for index in order_NC[row, :top_k].tolist()
        ]
        confidence = dict(zip(task.groups.names, mass_NK[row].tolist(), strict=True))
        found.append(
            Answer(
                **first.model_dump(),
                within_group_probability=first.probability / confidence[first.group],
                group_confidence=confidence,
                top_k=tuple(ranked),
                warnings=said,
            )
        )
    return found
