"""Online accuracy: clients send true labels of earlier answers; each group's accuracy is compared with certification.

For each answer, the request id, the predicted class, its group and its confidence are stored: no image, no file name,
no key. Everything is in memory, bounded in size, and lost on restart.
"""

import difflib
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import Field, StrictInt, StrictStr

from ltkd.contract.calibration import Calibration, Proportion, expected_accuracy
from ltkd.contract.records import Record
from ltkd.contract.task import Task
from serve.engine.messages import PredictionFacts
from serve.monitoring.binomial import proportion
from serve.monitoring.prometheus import ModelMetrics
from serve.problems import ProblemError, make_problem


class FeedbackBody(Record):
    """The true label of one answered image.

    Attributes:
        request_id: The ``X-Request-ID`` of the answer.
        image: Index of the image in that request, from 0.
        label: The true class, by name or by index.
    """

    request_id: str = Field(min_length=1, max_length=128)
    image: int = Field(default=0, ge=0)
    label: StrictInt | StrictStr


class FeedbackReceipt(Record):
    """The feedback as it was counted.

    Attributes:
        request_id: The ``X-Request-ID`` of the answer.
        image: Index of the image in that request, from 0.
        model: Name of the model that computed the answer.
        version: Version of that model.
        predicted: The predicted class.
        label: The true class.
        group: The group of the true class.
        correct: Whether the predicted class is the true one.
    """

    request_id: str
    image: int
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


@dataclass
class _AnsweredRequest:
    """One answered request, with the indices of the images that have a true label."""

    window: FeedbackWindow
    images: Sequence[PredictionFacts | None]
    labelled: set[int] = field(default_factory=set)


class Feedback:
    """Stores the most recent answers by request id, and accepts their true labels.

    Args:
        max_images: The number of answered images that are stored; the oldest requests are removed first.
    """

    def __init__(self, max_images: int) -> None:
        self._max_images = max_images
        self._num_images = 0
        self._answered: OrderedDict[str, _AnsweredRequest] = OrderedDict()

    def remember(self, request_id: str, window: FeedbackWindow, images: Sequence[PredictionFacts | None]) -> None:
        """Store an answered request; it replaces an earlier one with the same id.

        Args:
            request_id: The ``X-Request-ID`` of the answer.
            window: The feedback window of the model that computed the answer.
            images: One entry per image; None for an image that was rejected.
        """
        replaced = self._answered.pop(request_id, None)
        if replaced:
            self._num_images -= len(replaced.images)
        self._answered[request_id] = _AnsweredRequest(window, images)
        self._num_images += len(images)
        while self._num_images > self._max_images:
            _, oldest = self._answered.popitem(last=False)
            self._num_images -= len(oldest.images)

    def add_label(self, body: FeedbackBody) -> FeedbackReceipt:
        """Count one true label.

        Raises:
            ProblemError: 404 if the answer is not stored, 409 if it already has a label, 400 if the label is not a
                class of the model.
        """
        request = self._answered.get(body.request_id)
        if request is None:
            raise ProblemError(make_problem(404, self._not_stored(body.request_id)))
        prediction = _prediction_of(request.images, body)
        if body.image in request.labelled:
            detail = (
                f"image {body.image} of request {body.request_id} already has a true label; the first label counts."
            )
            raise ProblemError(make_problem(409, detail))
        window = request.window
        label = label_of(window.task, body.label)
        request.labelled.add(body.image)
        return FeedbackReceipt(
            request_id=body.request_id,
            image=body.image,
            model=window.metrics.labels.model,
            version=window.metrics.labels.version,
            predicted=window.task.class_names[prediction.label],
            label=window.task.class_names[label],
            group=window.task.group_name(label),
            correct=window.add(prediction, label),
        )

    def _not_stored(self, request_id: str) -> str:
        return (
            f"no answer to request {request_id!r} is stored; the service keeps the last {self._max_images:,} answered "
            "images since its start. Send the X-Request-ID of the answer, and send it sooner."
        )


def label_of(task: Task, label: int | str) -> int:
    """The index of a class that is given by name or by index.

    Raises:
        ProblemError: 400 if there is no such class.
    """
    if isinstance(label, str):
        if label in task.class_names:
            return task.class_names.index(label)
        near = difflib.get_close_matches(label, task.class_names, 1)
        hint = f"did you mean {near[0]!r}?" if near else "GET /v1/model lists the classes."
        raise ProblemError(make_problem(400, f"label is {label!r}, which is not a class of the model; {hint}"))
    if not 0 <= label < len(task.class_names):
        detail = f"label is {label}, expected a class index from 0 to {len(task.class_names) - 1}, or a class name."
        raise ProblemError(make_problem(400, detail))
    return label


def _prediction_of(images: Sequence[PredictionFacts | None], body: FeedbackBody) -> PredictionFacts:
    if body.image >= len(images):
        detail = f"image is {body.image}, but request {body.request_id} had {len(images)} images; the first is 0."
        raise ProblemError(make_problem(404, detail))
    prediction = images[body.image]
    if prediction is None:
        detail = f"image {body.image} of request {body.request_id} was rejected, so it has no answer to label."
        raise ProblemError(make_problem(404, detail))
    return prediction
