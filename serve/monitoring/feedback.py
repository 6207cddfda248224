"""Online accuracy: clients send true labels of earlier answers; each group's accuracy is compared with certification.

An answer is named by a random id that only the response carries, and it belongs to the API key that asked for it: with
a guessable id, or one that the client chooses, a client could read and label the answers of others.

For each answer, its id, the predicted class, its group, its confidence and the name of the key are stored: no image, no
file name, no key. Everything is in memory, bounded in size, and lost on restart.
"""

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field, StrictInt, StrictStr

from ltkd.contract.calibration import Calibration, Proportion, expected_accuracy
from ltkd.contract.records import Record
from ltkd.contract.task import Task
from serve.engine.messages import PredictionFacts
from serve.monitoring.binomial import proportion
from serve.monitoring.prometheus import ModelMetrics
from serve.problems import ProblemError, make_problem

_ID_BYTES = 16  # random bytes of an answer id, which is their hexadecimal form


class FeedbackBody(Record):
    """The true label of one answer.

    Attributes:
        answer_id: The id that the answer carries.
        label: The true class, by name or by index.
    """

    answer_id: str = Field(min_length=1, max_length=128)
    label: StrictInt | StrictStr


class FeedbackReceipt(Record):
    """The feedback as it was counted.

    Attributes:
        answer_id: The id of the answer.
        model: Name of the model that computed the answer.
        version: Version of that model.
        predicted: The predicted class.
        label: The true class.
        group: The group of the true class.
        correct: Whether the predicted class is the true one.
    """

    answer_id: str
    model: str
    version: str
    predicted: str
    label: str
    group: str
    correct: bool


class GroupAccuracy(Record):
    """Accuracy in one group, of the answers with a known true label.

    Confidence intervals are exact, two-sided and 95 % (Clopper and Pearson), as in certification.

    Attributes:
        group: The name of the group.
        of_images: Share of right answers among the images whose true class is in this group (recall); None without any.
        of_predictions: Share of right answers among those that predicted this group (precision); None without any.
        certified: The accuracy that certification expects of the same predictions, given their confidence; None if it
            is unknown for one of them.
    """

    group: str
    of_images: Proportion | None
    of_predictions: Proportion | None
    certified: float | None


@dataclass(frozen=True)
class _LabelledAnswer:
    """One answer with a known true label."""

    true_group: int
    predicted_group: int
    right: bool
    expected: float | None


class FeedbackWindow:
    """The most recent answers of one served model with a known true label.

    Args:
        task: Class names and groups of the model.
        calibration: The certified calibration of each group.
        metrics: The model's metrics, which count the feedback.
        max_images: The size of the window, in answers.
    """

    def __init__(self, task: Task, calibration: Calibration, metrics: ModelMetrics, max_images: int) -> None:
        self.task = task
        self.metrics = metrics
        self._calibration = calibration
        self._answers: deque[_LabelledAnswer] = deque(maxlen=max_images)

    def add(self, prediction: PredictionFacts, label: int) -> bool:
        """Add an answer with its true label.

        Returns:
            Whether the answer was right.
        """
        right = prediction.label == label
        true_group = self.task.groups.group_of_class[label]
        expected = expected_accuracy(self._calibration[prediction.group], prediction.confidence)
        self._answers.append(_LabelledAnswer(true_group, prediction.group, right, expected.value if expected else None))
        self.metrics.count_feedback(true_group, right)
        return right

    def accuracy(self) -> tuple[GroupAccuracy, ...]:
        """The accuracy of each group in the window, in the order of the model's groups."""
        return tuple(self._group_accuracy(group, name) for group, name in enumerate(self.task.groups.names))

    def _group_accuracy(self, group: int, name: str) -> GroupAccuracy:
        of_images = [answer.right for answer in self._answers if answer.true_group == group]
        predicted = [answer for answer in self._answers if answer.predicted_group == group]
        expected = [answer.expected for answer in predicted if answer.expected is not None]
        return GroupAccuracy(
            group=name,
            of_images=proportion(sum(of_images), len(of_images)),
            of_predictions=proportion(sum(answer.right for answer in predicted), len(predicted)),
            certified=sum(expected) / len(expected) if expected and len(expected) == len(predicted) else None,
        )


@dataclass(slots=True)
class _StoredAnswer:
    """One answer, the name of the key that it belongs to, and whether it has a true label."""

    window: FeedbackWindow
    prediction: PredictionFacts
    owner: str
    labelled: bool = False


class Feedback:
    """Stores the most recent answers, and accepts their true labels.

    Args:
        max_images: The number of answers that are stored. The key with the most answers loses its oldest one first, so
            that a client with many requests does not displace the answers of the others.
    """

    def __init__(self, max_images: int) -> None:
        self._max_images = max_images
        self._answers: dict[str, _StoredAnswer] = {}
        self._ids_of: dict[str, deque[str]] = {}  # by owner, oldest first

    def remember(self, owner: str, window: FeedbackWindow, images: Sequence[PredictionFacts | None]) -> list[str]:
        """Store the answers of a request under new random ids.

        Args:
            owner: The name of the key that asked; empty if the service has no key file.
            window: The feedback window of the model that computed the answers.
            images: One entry per image; None for an image that was rejected.

        Returns:
            The id of each answer; empty for a rejected image.
        """
        random = os.urandom(_ID_BYTES * len(images)).hex()
        ids = [random[start : start + 2 * _ID_BYTES] for start in range(0, len(random), 2 * _ID_BYTES)]
        own = self._ids_of.setdefault(owner, deque())
        for number, prediction in enumerate(images):
            if prediction is None:
                ids[number] = ""
            else:
                self._answers[ids[number]] = _StoredAnswer(window, prediction, owner)
                own.append(ids[number])
        while len(self._answers) > self._max_images:
            del self._answers[max(self._ids_of.values(), key=len).popleft()]
        return ids

    def add_label(self, body: FeedbackBody, owner: str | None) -> FeedbackReceipt:
        """Count one true label.

        Args:
            body: The answer and its label.
            owner: The name of the key whose answers may be labelled; None for any.

        Raises:
            ProblemError: 404 if no such answer is stored, or if it belongs to another key: who sent the label must not
                learn which. 409 if it already has a label, 400 if the label is not a class of the model.
        """
        answer = self._answers.get(body.answer_id)
        if answer is None or owner not in (None, answer.owner):
            raise ProblemError(make_problem(404, self._not_stored(body.answer_id)))
        if answer.labelled:
            detail = f"the answer {body.answer_id} already has a true label; the first label counts."
            raise ProblemError(make_problem(409, detail))
        window = answer.window
        label = label_of(window.task, body.label)
        answer.labelled = True
        return FeedbackReceipt(
            answer_id=body.answer_id,
            model=window.metrics.labels.model,
            version=window.metrics.labels.version,
            predicted=window.task.class_names[answer.prediction.label],
            label=window.task.class_names[label],
            group=window.task.group_name(label),
            correct=window.add(answer.prediction, label),
        )

    def _not_stored(self, answer_id: str) -> str:
        return (
            f"no answer {answer_id!r} is stored for this client; the service keeps the last {self._max_images:,} "
            "answers since its start. Send its answer_id sooner, and with the API key that asked for the answer."
        )


def label_of(task: Task, label: int | str) -> int:
    """The index of a class that is given by name or by index.

    Raises:
        ProblemError: 400 if there is no such class.
    """
    if isinstance(label, str):
        if label in task.class_names:
            return task.class_names.index(label)
        detail = f"label is {label!r}, which is not a class of the model; GET /v1/model lists the classes."
        raise ProblemError(make_problem(400, detail))
    if not 0 <= label < len(task.class_names):
        detail = f"label is {label}, expected a class index from 0 to {len(task.class_names) - 1}, or a class name."
        raise ProblemError(make_problem(400, detail))
    return label
