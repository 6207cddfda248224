"""True labels that come later: which answers they can be told of, and what becomes of them."""

import pytest
from serve_toys import GROUPS, TASK, toy_calibration

from serve.engine.messages import PredictionFacts
from serve.monitoring.drift import Window
from serve.monitoring.feedback import Feedback, FeedbackBody, FeedbackTaken, FeedbackWindow
from serve.monitoring.prometheus import ModelLabels, Telemetry
from serve.problems import ProblemError

ANT, BEE, CAT, ELK, FOX = 0, 1, 2, 4, 5


def answered(label: int, confidence: float = 0.75) -> PredictionFacts:
    return PredictionFacts(
        group=GROUPS.group_of_class[label], label=label, confidence=confidence, decision="accept", set_size=1
    )


def toy_ledger(max_images: int = 100) -> FeedbackWindow:
    window = Window(toy_calibration(), 10)
    meter = Telemetry().meter(ModelLabels("toy", "2", "fp32", "ToyProvider", "f" * 64), GROUPS.names, window)
    return FeedbackWindow(TASK, toy_calibration(), meter, max_images)


def tell(feedback: Feedback, request_id: str, label: int | str, image: int = 0) -> FeedbackTaken:
    return feedback.take(FeedbackBody(request_id=request_id, label=label, image=image))


def refusal(feedback: Feedback, request_id: str, label: int | str = 0, image: int = 0) -> tuple[int, str]:
    with pytest.raises(ProblemError) as caught:
        tell(feedback, request_id, label, image)
    return caught.value.problem.status, caught.value.problem.detail


def test_a_label_is_told_by_name_or_by_index() -> None:
    feedback, ledger = Feedback(10), toy_ledger()
    feedback.remember("a", ledger, [answered(FOX), answered(FOX)])
    assert tell(feedback, "a", "fox") == FeedbackTaken(
        request_id="a", image=0, model="toy", version="2", predicted="fox", label="fox", group="tail", correct=True
    )
    assert tell(feedback, "a", ANT, image=1) == FeedbackTaken(
        request_id="a", image=1, model="toy", version="2", predicted="fox", label="ant", group="head", correct=False
    )


def test_a_number_as_text_is_a_name() -> None:
    feedback = Feedback(10)
    feedback.remember("a", toy_ledger(), [answered(FOX)])
    assert refusal(feedback, "a", "5")[0] == 400


def test_an_answer_that_is_not_remembered_is_404_and_the_window_is_named() -> None:
    feedback = Feedback(1234)
    status, detail = refusal(feedback, "a")
    assert status == 404
    assert "1,234" in detail


def test_the_same_image_twice_is_409_and_the_first_label_counts() -> None:
    feedback, ledger = Feedback(10), toy_ledger()
    feedback.remember("a", ledger, [answered(FOX)])
    tell(feedback, "a", "fox")
    assert refusal(feedback, "a", "ant")[0] == 409
    assert [group.of_images.n for group in ledger.accuracy() if group.of_images] == [1]


@pytest.mark.parametrize(("label", "hint"), [("foxx", "'fox'"), ("zebra", "/v1/model"), (6, "0 to 5"), (-1, "0 to 5")])
def test_a_label_that_is_no_class_is_400_and_can_be_told_again(label: int | str, hint: str) -> None:
    feedback = Feedback(10)
    feedback.remember("a", toy_ledger(), [answered(FOX)])
    status, detail = refusal(feedback, "a", label)
    assert status == 400
    assert hint in detail
    assert tell(feedback, "a", "fox").correct


def test_an_image_that_was_refused_or_not_there_is_404() -> None:
    feedback = Feedback(10)
    feedback.remember("a", toy_ledger(), [None, answered(FOX)])
    assert "was refused" in refusal(feedback, "a", image=0)[1]
    assert refusal(feedback, "a", image=2) == (404, "image is 2, but request a had 2; the first is 0.")


def test_the_oldest_requests_are_forgotten_first_and_memory_is_bounded_in_images() -> None:
    feedback, ledger = Feedback(5), toy_ledger()
    for name in ("a", "b", "c"):
        feedback.remember(name, ledger, [answered(FOX), answered(ANT)])
    assert refusal(feedback, "a")[0] == 404
    assert tell(feedback, "b", "fox").correct
    feedback.remember("large", ledger, [answered(FOX)] * 6)  # more than can be remembered at all
    assert {refusal(feedback, name)[0] for name in ("a", "b", "c", "large")} == {404}


def test_of_a_request_id_that_comes_twice_the_later_answer_is_meant() -> None:
    feedback, ledger = Feedback(2), toy_ledger()
    for label in (ANT, FOX, FOX, FOX):
        feedback.remember("same", ledger, [answered(label)])
    assert tell(feedback, "same", "fox").correct


def test_accuracy_is_told_by_true_group_and_by_predicted_group_beside_the_certified_one() -> None:
    feedback, ledger = Feedback(100), toy_ledger()
    told = [  # predicted, true, confidence; the toy's certified accuracy is 0.25 up to one half and 0.75 above
        (ANT, ANT, 0.9), (BEE, ANT, 0.3), (ANT, ELK, 0.9), (FOX, FOX, 0.9), (ANT, BEE, 0.5),
    ]  # fmt: skip
    for place, (predicted, true, confidence) in enumerate(told):
        feedback.remember(str(place), ledger, [answered(predicted, confidence)])
        tell(feedback, str(place), true)
    head, medium, tail = ledger.accuracy()
    assert head.of_images is not None
    assert (head.of_images.value, head.of_images.n) == (1 / 3, 3)
    assert head.of_predictions is not None
    assert (head.of_predictions.value, head.of_predictions.n) == (1 / 4, 4)
    assert head.of_predictions.low < 1 / 4 < head.of_predictions.high
    assert head.certified == (0.75 + 0.25 + 0.75 + 0.25) / 4
    assert (medium.of_images, medium.of_predictions, medium.certified) == (None, None, None)
    assert tail.of_images is not None
    assert (tail.of_images.value, tail.of_images.n, tail.certified) == (1 / 2, 2, 0.75)


def test_only_the_most_recent_labels_count() -> None:
    ledger = toy_ledger(max_images=3)
    for label in (ANT, FOX, FOX, FOX):
        ledger.tell(answered(FOX), label)
    head, _, tail = ledger.accuracy()
    assert head.of_images is None
    assert tail.of_predictions is not None
    assert (tail.of_predictions.value, tail.of_predictions.n) == (1.0, 3)


def test_feedback_on_a_model_that_was_replaced_does_not_count_for_its_successor() -> None:
    feedback, old, new = Feedback(10), toy_ledger(), toy_ledger()
    feedback.remember("a", old, [answered(FOX)])
    feedback.remember("b", new, [answered(CAT)])
    tell(feedback, "a", "ant")
    assert all(group.of_images is None for group in new.accuracy())
