"""Answers: the predicted class of an image, its class group, and how reliable the prediction is.

The calibration of each group was measured when the model was certified (ltkd/contract/calibration.py); this module
applies it to logits. ``serve.engine.classifier`` and ``serve.classify_files`` use it.
Each row is computed on its own, so an answer is the same to the last bit alone and in any batch.

Shape legend: N images, C classes, K class groups.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from pydantic_core import to_json

from ltkd.contract.bundle import Manifest, Precision
from ltkd.contract.calibration import GroupCalibration, Proportion, least_probabilities, softmax, temperatures
from ltkd.contract.records import Record
from serve.problems import Problem, make_problem

Decision = Literal["accept", "abstain", "no_guarantee"]
DECISIONS: tuple[Decision, ...] = get_args(Decision)
NOT_FINITE = "the logits of this image are not finite; this model cannot classify it."


class ClassProbability(Record):
    """One class with its probability."""

    label: str
    class_index: int = Field(ge=0)
    group: str
    probability: float = Field(ge=0, le=1)


class PredictionSet(Record):
    """The classes that may be the true one.

    Attributes:
        labels: From the most probable to the least; empty if no class is as probable as true classes usually are.
        target_coverage: The share of images, in every group, whose true class should be in the set.
        coverage: The share that certification measured in each group; null if it was not measured.
    """

    labels: tuple[str, ...]
    target_coverage: float
    coverage: dict[str, float | None]


class Answer(ClassProbability):
    """The answer for one image.

    Attributes:
        label: The most probable class.
        group: The group of that class.
        probability: Its probability, calibrated for predictions of that group.
        within_group_probability: The class's share of its own group's probability: the confidence in the class,
            given the group.
        group_confidence: The probability of each group; they sum to 1.
        expected_accuracy: How often predictions of this group with such a probability were right; null if it is not
            known.
        decision: ``accept`` if the probability reaches the group's threshold, else ``abstain``; ``no_guarantee`` if
            certification found no threshold that gives the target precision.
        threshold: The least probability that is accepted in this group.
        target_precision: The share of accepted predictions that should be right.
        prediction_set: The classes that may be the true one.
        top_k: The most probable classes, most probable first.
        warnings: Changes made to the image that the client may not expect.
    """

    within_group_probability: float = Field(ge=0, le=1)
    group_confidence: dict[str, float]
    expected_accuracy: Proportion | None
    decision: Decision
    threshold: float | None
    target_precision: float
    prediction_set: PredictionSet
    top_k: tuple[ClassProbability, ...]
    warnings: tuple[str, ...]


class ServedAnswer(Answer):
    """An answer of the service, which can be named in feedback.

    Attributes:
        answer_id: A random id that names this answer in feedback.
    """

    answer_id: str = Field(min_length=1)


class RejectedImage(Record):
    """The result of an image that was rejected."""

    error: Problem


_RESULT: TypeAdapter[Answer | RejectedImage] = TypeAdapter(Answer | RejectedImage)


class ModelRef(Record):
    """Which model computed the answers, and which execution provider ran it."""

    name: str
    version: str
    precision: Precision
    provider: str
    sha256: str = Field(description="SHA-256 of the ONNX file")


class Answers(Record):
    """One result per image, in the order of the request."""

    model: ModelRef
    results: tuple[ServedAnswer | RejectedImage, ...]


def answers_json(model: bytes, results: Sequence[bytes]) -> bytes:
    """The body of a response, built from the JSON of its model and of its results."""
    return b'{"model":%b,"results":[%b]}' % (model, b",".join(results))


def served_answer_json(answer_id: str, answer: bytes) -> bytes:
    """A ``ServedAnswer`` in JSON, from its id and the JSON of the ``Answer``."""
    return b'{"answer_id":"%b",%b' % (answer_id.encode(), answer[1:])


def rejected_image_json(problem: Problem) -> bytes:
    """A ``RejectedImage`` in JSON."""
    return RejectedImage(error=problem).model_dump_json().encode()


@dataclass(frozen=True)
class Predictions:
    """The predictions for a batch.

    Attributes:
        probability_NC: Calibrated, float64, most probable class first.
        order_NC: The class indices in that order; equally probable classes are ordered by index.
        mass_NK: Probability of each group, float64.
        labels: The N predicted classes.
        groups: Their groups.
        confidences: Their probabilities.
        decisions: The decisions of the groups' thresholds.
        sets: The N prediction sets, most probable class first.
        finite: Whether the logits of each image were finite; if not, its other values are meaningless.
    """

    probability_NC: NDArray[np.float64]
    order_NC: NDArray[np.int64]
    mass_NK: NDArray[np.float64]
    labels: list[int]
    groups: list[int]
    confidences: list[float]
    decisions: list[Decision]
    sets: list[list[int]]
    finite: list[bool]

    def within(self, row: int) -> float:
        """The predicted class's share of its group's probability."""
        mass = float(self.mass_NK[row, self.groups[row]])
        return min(self.confidences[row] / mass, 1.0)  # a sum may be rounded below its largest part


class AnswerBuilder:
    """Turns the logits of one certified model into answers. The constructor prepares everything that is constant."""

    def __init__(self, manifest: Manifest, precision: Precision) -> None:
        task, calibration = manifest.task, manifest.precisions[precision].calibration
        self._class_names = task.class_names
        self._group_names = task.groups.names
        self._group_C = task.groups.index
        self._temperature_K = temperatures(calibration)
        self._least_C = least_probabilities(calibration, task.groups)
        self._by_group_C = np.argsort(self._group_C, kind="stable")
        self._starts_K = np.searchsorted(self._group_C[self._by_group_C], np.arange(len(self._group_names)))
        self._countdown_C = np.arange(len(self._class_names) - 1, -1, -1)
        self._groups = [_GroupRules(group) for group in calibration]
        self._target_coverage = min(group.prediction_set.target_coverage for group in calibration)
        self._coverage = {
            group.group: None if (coverage := group.prediction_set.coverage) is None else coverage.value
            for group in calibration
        }
        self._label_json = [to_json(name) for name in self._class_names]
        self._class_json = [
            b'{"label":%b,"class_index":%d,"group":%b,"probability":'
            % (to_json(name), index, to_json(task.group_name(index)))
            for index, name in enumerate(self._class_names)
        ]
        self._mass_json = [
            (b',"group_confidence":{' if group == 0 else b",") + to_json(name) + b":"
            for group, name in enumerate(self._group_names)
        ]
        self._coverage_json = b'],"target_coverage":%b,"coverage":%b},"top_k":[' % (
            to_json(self._target_coverage),
            to_json(self._coverage),
        )

    def predict(self, logits_NC: NDArray[np.float32]) -> Predictions:
        """The predictions for a batch of logits, float32 [N, C]."""
        logits_NC = np.ascontiguousarray(logits_NC)  # another memory layout would be summed in another order
        finite_N: NDArray[np.bool_] = np.asarray(np.isfinite(logits_NC).all(axis=1))
        if not finite_N.all():
            logits_NC = np.where(finite_N[:, None], logits_NC, np.float32(0))
        order_NC = self._ranked(logits_NC)
        first_N = order_NC[:, 0]
        group_N = self._group_C[first_N]
        probability_NC = softmax(np.asarray(logits_NC, np.float64) / self._temperature_K[group_N][:, None])
        mass_NK = np.add.reduceat(probability_NC[:, self._by_group_C], self._starts_K, axis=1)
        ranked_NC = probability_NC[np.arange(len(order_NC))[:, None], order_NC]
        in_set_NC = ranked_NC >= self._least_C[order_NC]
        groups, confidences = group_N.tolist(), ranked_NC[:, 0].tolist()
        return Predictions(
            probability_NC=ranked_NC,
            order_NC=order_NC,
            mass_NK=mass_NK,
            labels=first_N.tolist(),
            groups=groups,
            confidences=confidences,
            decisions=[self._groups[group].decision(p) for group, p in zip(groups, confidences, strict=True)],
            sets=_split(order_NC[in_set_NC].tolist(), in_set_NC.sum(axis=1).tolist()),
            finite=finite_N.tolist(),
        )

    def records(
        self, predictions: Predictions, top_k: Sequence[int], warnings: Sequence[tuple[str, ...]]
    ) -> list[Answer | RejectedImage]:
        """The answers of ``json`` as records."""
        return [_RESULT.validate_json(text) for text in self.json(predictions, top_k, warnings)]

    def json(self, predictions: Predictions, top_k: Sequence[int], warnings: Sequence[tuple[str, ...]]) -> list[bytes]:
        """An ``Answer`` or ``RejectedImage`` in JSON for each image; one without finite logits is rejected.

        The service calls this for every batch, so the JSON is built without the records.

        Args:
            predictions: Of N images.
            top_k: How many classes to list for each image; a number above C lists all of them.
            warnings: The decoder's warnings for each image.
        """
        return [
            self._answer_json(predictions, row, top_k[row], warnings[row])
            if finite
            else rejected_image_json(make_problem(500, NOT_FINITE))
            for row, finite in enumerate(predictions.finite)
        ]

    def _ranked(self, logits_NC: NDArray[np.float32]) -> NDArray[np.int64]:
        """Classes by descending logit, equal ones by index.

        It sorts unique integers, which is several times faster than a stable sort of floats. The bits of a float, with
        those below the sign inverted if it is negative, have the same order as the floats.
        """
        bits_NC = (logits_NC + np.float32(0)).view(np.int32)  # the sum makes -0.0 equal to 0.0
        ascending_NC = bits_NC ^ ((bits_NC >> 31) & np.int32(0x7FFFFFFF))
        key_NC = (ascending_NC.astype(np.int64) << 32) | self._countdown_C
        key_NC.sort(axis=1)
        order_NC: NDArray[np.int64] = len(self._class_names) - 1 - (key_NC[:, ::-1] & 0xFFFFFFFF)
        return order_NC

    def _answer_json(self, predictions: Predictions, row: int, top_k: int, warnings: tuple[str, ...]) -> bytes:
        rules = self._groups[predictions.groups[row]]
        indices = predictions.order_NC[row, :top_k].tolist()
        listed, mass = predictions.probability_NC[row, :top_k].tolist(), predictions.mass_NK[row].tolist()
        # one call for all numbers takes a tenth of the time
        numbers = to_json([predictions.within(row), *mass, *listed])[1:-1].split(b",")
        probabilities = numbers[1 + len(mass) :]
        parts = [self._class_json[indices[0]], probabilities[0], b',"within_group_probability":', numbers[0]]
        for name, share in zip(self._mass_json, numbers[1:], strict=False):
            parts += (name, share)
        parts += (
            rules.expected_json(predictions.confidences[row]),
            rules.decision_json[predictions.decisions[row]],
            b",".join([self._label_json[index] for index in predictions.sets[row]]),
            self._coverage_json,
            b",".join([self._class_json[i] + p + b"}" for i, p in zip(indices, probabilities, strict=True)]),
            b'],"warnings":[]}' if not warnings else b'],"warnings":%b}' % to_json(warnings),
        )
        return b"".join(parts)


class _GroupRules:
    """The calibration of one group, applied to a prediction, as JSON."""

    def __init__(self, group: GroupCalibration) -> None:
        self.threshold = group.abstention.threshold
        self.target_precision = group.abstention.target_precision
        self._up_to = [part.up_to for part in group.expected_accuracy]
        self._accuracy_json = [b'},"expected_accuracy":' + to_json(part.accuracy) for part in group.expected_accuracy]
        self.decision_json = {
            decision: b',"decision":%b,"threshold":%b,"target_precision":%b,"prediction_set":{"labels":['
            % (to_json(decision), to_json(self.threshold), to_json(self.target_precision))
            for decision in DECISIONS
        }

    def decision(self, confidence: float) -> Decision:
        if self.threshold is None:
            return "no_guarantee"
        return "accept" if confidence >= self.threshold else "abstain"

    def expected_json(self, confidence: float) -> bytes:
        """The same as ``ltkd.contract.calibration.expected_accuracy``."""
        found = bisect_left(self._up_to, confidence)
        return self._accuracy_json[found] if found < len(self._accuracy_json) else b'},"expected_accuracy":null'


def _split(flat: list[int], lengths: list[int]) -> list[list[int]]:
    remaining = iter(flat)
    return [list(islice(remaining, length)) for length in lengths]
