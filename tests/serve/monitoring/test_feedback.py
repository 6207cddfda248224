"""Feedback: true labels for earlier answers, and the accuracy of each group."""

import re
from collections.abc import Sequence

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


def send_label(feedback: Feedback, answer_id: str, label: int | str, owner: str | None = "") -> FeedbackReceipt:
    return feedback.add_label(FeedbackBody(answer_id=answer_id, label=label), owner)


def rejection(feedback: Feedback, answer_id: str, label: int | str = 0, owner: str | None = "") -> tuple[int, str]:
    with pytest.raises(ProblemError) as caught:
        send_label(feedback, answer_id, label, owner)
    return caught.value.problem.status, caught.value.problem.detail


def stored(feedback: Feedback, ids: Sequence[str]) -> list[bool]:
    """Whether each answer is stored: an unknown label gets 404 without an answer and 400 with one."""
    return [rejection(feedback, answer_id, "zebra", None)[0] == 400 for answer_id in ids]


def test_a_label_is_given_by_name_or_by_index() -> None:
    feedback, window = Feedback(10), toy_window()
    first, second = feedback.remember("", window, [answered(FOX), answered(FOX)])
    assert send_label(feedback, first, "fox") == FeedbackReceipt(
        answer_id=first, model="toy", version="2", predicted="fox", label="fox", group="tail", correct=True
    )
    assert send_label(feedback, second, ANT) == FeedbackReceipt(
        answer_id=second, model="toy", version="2", predicted="fox", label="ant", group="head", correct=False
    )


def test_every_answer_has_an_id_of_128_random_bits_that_is_safe_in_a_url() -> None:
    feedback, window = Feedback(10_000), toy_window()
    ids = [name for _ in range(100) for name in feedback.remember("", window, [answered(FOX)] * 10)]
    assert len(set(ids)) == 1000
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in ids)
    bits = [f"{int(name, 16):0128b}" for name in ids]
    # 1000 fair coins: 500 +- 6 standard deviations of 16; a constant prefix or a counter is far outside
    assert all(400 < sum(bit[place] == "1" for bit in bits) < 600 for place in range(128))


def test_an_image_that_was_rejected_has_no_id() -> None:
    feedback = Feedback(10)
    assert [bool(name) for name in feedback.remember("", toy_window(), [None, answered(FOX), None])] == [
        False, True, False,
    ]  # fmt: skip


def test_a_number_in_a_string_is_a_class_name() -> None:
    feedback = Feedback(10)
    (name,) = feedback.remember("", toy_window(), [answered(FOX)])
    assert rejection(feedback, name, "5")[0] == 400


def test_an_answer_that_is_not_stored_is_404_and_the_message_has_the_number_of_stored_answers() -> None:
    feedback = Feedback(1234)
    status, detail = rejection(feedback, "a")
    assert status == 404
    assert "1,234" in detail


def test_an_answer_to_another_key_is_rejected_as_if_it_did_not_exist() -> None:
    feedback, window = Feedback(10), toy_window()
    own, labelled = feedback.remember("owner", window, [answered(FOX), answered(FOX)])
    send_label(feedback, labelled, "fox", "owner")
    unknown = "0" * 32
    expected = rejection(feedback, unknown, "fox", "other")
    for name in (own, labelled):
        for label in ("fox", "zebra", 99):
            status, detail = rejection(feedback, name, label, "other")
            assert (status, detail.replace(name, unknown)) == expected
    assert send_label(feedback, own, "fox", "owner").correct


def test_no_owner_stands_for_all_owners() -> None:
    feedback = Feedback(10)
    (name,) = feedback.remember("owner", toy_window(), [answered(FOX)])
    assert send_label(feedback, name, "fox", None).correct
    assert rejection(feedback, name, "fox", "owner")[0] == 409


def test_a_second_label_for_an_answer_is_409_and_the_first_one_counts() -> None:
    feedback, window = Feedback(10), toy_window()
    (name,) = feedback.remember("", window, [answered(FOX)])
    send_label(feedback, name, "fox")
    assert rejection(feedback, name, "ant")[0] == 409
    assert [group.of_images.n for group in window.accuracy() if group.of_images] == [1]


@pytest.mark.parametrize(("label", "hint"), [("foxx", "/v1/model"), (6, "0 to 5"), (-1, "0 to 5")])
def test_a_label_that_is_not_a_class_is_400_and_can_be_corrected(label: int | str, hint: str) -> None:
    feedback = Feedback(10)
    (name,) = feedback.remember("", toy_window(), [answered(FOX)])
    status, detail = rejection(feedback, name, label)
    assert status == 400
    assert hint in detail
    assert send_label(feedback, name, "fox").correct


def test_the_oldest_answers_are_removed_first_and_their_number_is_bounded() -> None:
    feedback, window = Feedback(5), toy_window()
    ids = [name for _ in range(3) for name in feedback.remember("", window, [answered(FOX), answered(ANT)])]
    assert stored(feedback, ids) == [False] + 5 * [True]
    many = feedback.remember("", window, [answered(FOX)] * 7)  # more images than the limit
    assert stored(feedback, [*ids, *many]) == 8 * [False] + 5 * [True]


def test_a_client_with_many_answers_does_not_displace_the_answers_of_others() -> None:
    feedback, window = Feedback(10), toy_window()
    quiet = feedback.remember("quiet", window, [answered(FOX)] * 3)
    noisy = [name for _ in range(50) for name in feedback.remember("noisy", window, [answered(ANT)] * 4)]
    assert stored(feedback, quiet) == 3 * [True]
    assert sum(stored(feedback, noisy)) == 7
    quiet += [name for _ in range(50) for name in feedback.remember("quiet", window, [answered(FOX)])]
    assert sum(stored(feedback, quiet)) == sum(stored(feedback, noisy)) == 5


def test_accuracy_is_reported_by_true_group_by_predicted_group_and_as_certified() -> None:
    feedback, window = Feedback(100), toy_window()
    answers = [  # predicted, true, confidence; the toy's certified accuracy is 0.25 up to one half and 0.75 above
        (ANT, ANT, 0.9), (BEE, ANT, 0.3), (ANT, ELK, 0.9), (FOX, FOX, 0.9), (ANT, BEE, 0.5),
    ]  # fmt: skip
    for predicted, true, confidence in answers:
        (name,) = feedback.remember("", window, [answered(predicted, confidence)])
        send_label(feedback, name, true)
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
    (name,) = feedback.remember("", old, [answered(FOX)])
    feedback.remember("", new, [answered(CAT)])
    send_label(feedback, name, "ant")
    assert all(group.of_images is None for group in new.accuracy())
