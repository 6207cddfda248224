"""Online accuracy: callers tell the true label of an answer, and each group's accuracy is held against certification.

What is remembered of an answer is its request id, the predicted class, its group and its confidence: no image, no
file name, no key. All of it is bounded and in memory; a restart forgets it.
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
from serve.problems import ProblemError, problem_of


class FeedbackBody(Record):
    """The true label of one answered image.

    Attributes:
        request_id: The ``X-Request-ID`` of the answer.
        image: Place of the image in that request.
        label: True class, by name or by index.
    """

    request_id: str = Field(min_length=1, max_length=128)
    image: int = Field(default=0, ge=0)
    label: StrictInt | StrictStr


class FeedbackTaken(Record):
    """What the feedback was counted as.

    Attributes:
        request_id: Of the answer.
        image: Place of the image in that request.
        model: Name of the model that had answered.
        version: Its version.
        predicted: The class that was answered.
        label: The true class.
        group: The group of the true class.
        correct: Whether they are the same.
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
    """Accuracy in one group, of the answers whose true label was told.

    Intervals are exact, two-sided and of 95 % (Clopper and Pearson), as those of certification.

    Attributes:
        group: Its name.
        of_images: Share of right answers among the images that truly are of this group (recall); None without any.
        of_predictions: Share of right answers among those that predicted this group (precision); None without any.
        certified: What certification expects of these same predictions, given their confidence; None where it knows
            nothing of one of them.
    """

    group: str
    of_images: Proportion | None
    of_predictions: Proportion | None
    certified: float | None


@dataclass(frozen=True)
class _Told:
    """One answer whose true label is known."""

    true_group: int
    predicted_group: int
    right: bool
    expected: float | None


class FeedbackWindow:
    """The answers of one served model whose true label was told, the most recent ones.

    Args:
        task: Class names and groups of the model.
        calibration: What was certified of each group.
        meter: Counts them for Prometheus.
        max_images: Answers it holds.
    """

    def __init__(self, task: Task, calibration: Calibration, meter: ModelMetrics, max_images: int) -> None:
        self.task = task
        self.meter = meter
        self._calibration = calibration
        self._told: deque[_Told] = deque(maxlen=max_images)

    def tell(self, seen: PredictionFacts, label: int) -> bool:
        """Take in the true label of an answer, and say whether the answer was right."""
        right = seen.label == label
        true_group = self.task.groups.group_of_class[label]
        expected = expected_accuracy(self._calibration[seen.group], seen.confidence)
        self._told.append(_Told(true_group, seen.group, right, expected.value if expected else None))
        self.meter.count_feedback(true_group, right)
        return right

    def accuracy(self) -> tuple[GroupAccuracy, ...]:
        """The accuracy of each group so far, in the order of the model's groups."""
        return tuple(self._group(group, name) for group, name in enumerate(self.task.groups.names))

    def _group(self, group: int, name: str) -> GroupAccuracy:
        of_images = [told.right for told in self._told if told.true_group == group]
        predicted = [told for told in self._told if told.predicted_group == group]
        expected = [told.expected for told in predicted if told.expected is not None]
        return GroupAccuracy(
            group=name,
            of_images=proportion(sum(of_images), len(of_images)),
            of_predictions=proportion(sum(told.right for told in predicted), len(predicted)),
            certified=sum(expected) / len(expected) if expected and len(expected) == len(predicted) else None,
        )


@dataclass
class _Answered:
    """One answered request."""

    ledger: FeedbackWindow
    images: Sequence[PredictionFacts | None]
    told: set[int] = field(default_factory=set)


class Feedback:
    """Remembers the most recent answers by request id, and takes in what their true labels were.

    Args:
        max_images: Answered images that are remembered; the oldest requests are forgotten first.
    """

    def __init__(self, max_images: int) -> None:
        self._max_images = max_images
        self._num_images = 0
        self._answered: OrderedDict[str, _Answered] = OrderedDict()

    def remember(self, request_id: str, ledger: FeedbackWindow, images: Sequence[PredictionFacts | None]) -> None:
        """Remember an answered request; where an id comes twice, the later answer is meant.

        Args:
            request_id: What the answer carried as ``X-Request-ID``.
            ledger: Of the model that answered.
            images: Its images; None in the place of one that was refused.
        """
        before = self._answered.pop(request_id, None)
        if before:
            self._num_images -= len(before.images)
        self._answered[request_id] = _Answered(ledger, images)
        self._num_images += len(images)
        while self._num_images > self._max_images:
            _, forgotten = self._answered.popitem(last=False)
            self._num_images -= len(forgotten.images)

    def take(self, body: FeedbackBody) -> FeedbackTaken:
        """Count one true label.

        Raises:
            ProblemError: 404 for an answer that is not remembered, 409 for one that was told already, 400 for a label
                that is no class of the model.
        """
        answered = self._answered.get(body.request_id)
        if answered is None:
            raise ProblemError(problem_of(404, self._forgotten(body.request_id)))
        seen = _image_of(answered.images, body)
        if body.image in answered.told:
            detail = f"image {body.image} of request {body.request_id} was told already; the first label counts."
            raise ProblemError(problem_of(409, detail))
        ledger = answered.ledger
        label = label_of(ledger.task, body.label)
        answered.told.add(body.image)
        return FeedbackTaken(
            request_id=body.request_id,
            image=body.image,
            model=ledger.meter.labels.model,
            version=ledger.meter.labels.version,
            predicted=ledger.task.class_names[seen.label],
            label=ledger.task.class_names[label],
            group=ledger.task.group_name(label),
            correct=ledger.tell(seen, label),
        )

    def _forgotten(self, request_id: str) -> str:
        return (
            f"no answer to request {request_id!r} is remembered; the last {self._max_images:,} answered images are, "
            "since this process started. Send the X-Request-ID that the answer carried, and send it sooner."
        )


def label_of(task: Task, label: int | str) -> int:
    """The index of a class that was named, or given as an index.

    Raises:
        ProblemError: 400, there is no such class.
    """
    if isinstance(label, str):
        if label in task.class_names:
            return task.class_names.index(label)
        near = difflib.get_close_matches(label, task.class_names, 1)
        hint = f"did you mean {near[0]!r}?" if near else "GET /v1/model lists them."
        raise ProblemError(problem_of(400, f"label is {label!r}, which is no class of the model; {hint}"))
    if not 0 <= label < len(task.class_names):
        detail = f"label is {label}, expected a class index from 0 to {len(task.class_names) - 1}, or a class name."
        raise ProblemError(problem_of(400, detail))
    return label


def _image_of(images: Sequence[PredictionFacts | None], body: FeedbackBody) -> PredictionFacts:
    if body.image >= len(images):
        detail = f"image is {body.image}, but request {body.request_id} had {len(images)}; the first is 0."
        raise ProblemError(problem_of(404, detail))
    seen = images[body.image]
    if seen is None:
        detail = f"image {body.image} of request {body.request_id} was refused, so there is no answer to judge."
        raise ProblemError(problem_of(404, detail))
    return seen
