"""Feedback: true labels for earlier answers, and the accuracy of each group."""

import pytest
from serve_toys import GROUPS, TASK, toy_calibration

from serve.engine.messages import PredictionFacts
from serve.monitoring.drift import Window
from serve.monitoring.feedback import Feedback, FeedbackBody, FeedbackReceipt, FeedbackWindow
from serve.monitoring.prometheus import ModelLabels, Telemetry
from serve.problems import ProblemError

ANT, BEE, CAT, ELK, FOX = 0, 1, 2, 4, 5


def answered(label: int, confidence: float = 0.75) -> PredictionFacts:
    return PredictionFacts(
        group=GROUPS.group_of_class[label], label=label, confidence=confidence, decision="accept", set_size=1
    )


def toy_window(max_images: int = 100) -> FeedbackWindow:
    labels = ModelLabels("toy", "2", "fp32", "ToyProvider", "f" * 64)
    metrics = Telemetry().add_model(labels, GROUPS.names, Window(toy_calibration(), 10))
    return FeedbackWindow(TASK, toy_calibration(), metrics, max_images)


def send_label(feedback: Feedback, request_id: str, label: int | str, image: int = 0) -> FeedbackReceipt:
    return feedback.add_label(FeedbackBody(request_id=request_id, label=label, image=image))


def rejection(feedback: Feedback, request_id: str, label: int | str = 0, image: int = 0) -> tuple[int, str]:
    with pytest.raises(ProblemError) as caught:
        send_label(feedback, request_id, label, image)
    return caught.value.problem.status, caught.value.problem.detail


def test_a_label_is_given_by_name_or_by_index() -> None:
    feedback, window = Feedback(10), toy_window()
    feedback.remember("a", window, [answered(FOX), answered(FOX)])
    assert send_label(feedback, "a", "fox") == FeedbackReceipt(
        request_id="a", image=0, model="toy", version="2", predicted="fox", label="fox", group="tail", correct=True
    )
    assert send_label(feedback, "a", ANT, image=1) == FeedbackReceipt(
        request_id="a", image=1, model="toy", version="2", predicted="fox", label="ant", group="head", correct=False
    )


def test_a_number_in_a_string_is_a_class_name() -> None:
    feedback = Feedback(10)
    feedback.remember("a", toy_window(), [answered(FOX)])
    assert rejection(feedback, "a", "5")[0] == 400


def test_an_answer_that_is_not_stored_is_404_and_the_message_has_the_number_of_stored_images() -> None:
    feedback = Feedback(1234)
    status, detail = rejection(feedback, "a")
    assert status == 404
    assert "1,234" in detail


def test_a_second_label_for_an_image_is_409_and_the_first_one_counts() -> None:
    feedback, window = Feedback(10), toy_window()
    feedback.remember("a", window, [answered(FOX)])
    send_label(feedback, "a", "fox")
    assert rejection(feedback, "a", "ant")[0] == 409
    assert [group.of_images.n for group in window.accuracy() if group.of_images] == [1]


@pytest.mark.parametrize(("label", "hint"), [("foxx", "'fox'"), ("zebra", "/v1/model"), (6, "0 to 5"), (-1, "0 to 5")])
def test_a_label_that_is_not_a_class_is_400_and_can_be_corrected(label: int | str, hint: str) -> None:
    feedback = Feedback(10)
    feedback.remember("a", toy_window(), [answered(FOX)])
    status, detail = rejection(feedback, "a", label)
    assert status == 400
    assert hint in detail
    assert send_label(feedback, "a", "fox").correct


def test_an_image_that_was_rejected_or_does_not_exist_is_404() -> None:
    feedback = Feedback(10)
    feedback.remember("a", toy_window(), [None, answered(FOX)])
    assert "was rejected" in rejection(feedback, "a", image=0)[1]
    assert rejection(feedback, "a", image=2) == (404, "image is 2, but request a had 2 images; the first is 0.")


def test_the_oldest_requests_are_removed_first_and_the_number_of_images_is_bounded() -> None:
    feedback, window = Feedback(5), toy_window()
    for name in ("a", "b", "c"):
        feedback.remember(name, window, [answered(FOX), answered(ANT)])
    assert rejection(feedback, "a")[0] == 404
    assert send_label(feedback, "b", "fox").correct
    feedback.remember("large", window, [answered(FOX)] * 6)  # more images than the limit
    assert {rejection(feedback, name)[0] for name in ("a", "b", "c", "large")} == {404}


def test_a_repeated_request_id_refers_to_the_latest_answer() -> None:
    feedback, window = Feedback(2), toy_window()
    for label in (ANT, FOX, FOX, FOX):
        feedback.remember("same", window, [answered(label)])
    assert send_label(feedback, "same", "fox").correct


def test_accuracy_is_reported_by_true_group_by_predicted_group_and_as_certified() -> None:
    feedback, window = Feedback(100), toy_window()
    answers = [  # predicted, true, confidence; the toy's certified accuracy is 0.25 up to one half and 0.75 above
        (ANT, ANT, 0.9), (BEE, ANT, 0.3), (ANT, ELK, 0.9), (FOX, FOX, 0.9), (ANT, BEE, 0.5),
    ]  # fmt: skip
    for number, (predicted, true, confidence) in enumerate(answers):
        feedback.remember(str(number), window, [answered(predicted, confidence)])
        send_label(feedback, str(number), true)
    head, medium, tail = window.accuracy()
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
    window = toy_window(max_images=3)
    for label in (ANT, FOX, FOX, FOX):
        window.add(answered(FOX), label)
    head, _, tail = window.accuracy()
    assert head.of_images is None
    assert tail.of_predictions is not None
    assert (tail.of_predictions.value, tail.of_predictions.n) == (1.0, 3)


def test_feedback_for_a_replaced_model_does_not_count_for_its_replacement() -> None:
    feedback, old, new = Feedback(10), toy_window(), toy_window()
    feedback.remember("a", old, [answered(FOX)])
    feedback.remember("b", new, [answered(CAT)])
    send_label(feedback, "a", "ant")
    assert all(group.of_images is None for group in new.accuracy())
