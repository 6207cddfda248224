import numpy as np
import pytest
from serve_toys import CLASS_NAMES, GROUPS, TASK

from serve.answers import answers

LOGITS_NC = np.array([[0.0, 1.0, 2.0, 0.5, 3.0, -1.0], [9.0, 8.0, 0.0, 0.0, 0.0, 0.0]], np.float32)


def test_an_answer_is_what_numpy_computes_directly() -> None:
    first, second = answers(LOGITS_NC, TASK, 2, [("one",), ()])
    probability_NC = np.exp(LOGITS_NC.astype(float)) / np.exp(LOGITS_NC.astype(float)).sum(axis=1, keepdims=True)
    assert (first.label, first.class_index, first.group, first.warnings) == ("elk", 4, "tail", ("one",))
    assert (second.label, second.group, second.warnings) == ("ant", "head", ())
    # float64 on both sides, sums of six terms
    assert first.probability == pytest.approx(probability_NC[0, 4], abs=1e-12)
    assert second.group_confidence["head"] == pytest.approx(probability_NC[1, :2].sum(), abs=1e-12)
    assert [entry.label for entry in first.top_k] == ["elk", "cat"]


def test_group_confidence_sums_to_one_and_splits_every_probability() -> None:
    for answer in answers(LOGITS_NC, TASK, 6, [(), ()]):
        assert tuple(answer.group_confidence) == GROUPS.names
        # float64 rounding of a few terms
        assert sum(answer.group_confidence.values()) == pytest.approx(1, abs=1e-12)
        whole = answer.within_group_probability * answer.group_confidence[answer.group]
        assert whole == pytest.approx(answer.probability, abs=1e-12)


def test_more_classes_than_there_are_lists_all_of_them() -> None:
    (answer,) = answers(LOGITS_NC[:1], TASK, 99, [()])
    assert sorted(entry.label for entry in answer.top_k) == sorted(CLASS_NAMES)
    ranked = [entry.probability for entry in answer.top_k]
    assert ranked == sorted(ranked, reverse=True)


def test_certainty_beyond_float_range_stays_finite() -> None:
    (answer,) = answers(np.array([[3e4, 0, 0, 0, 0, -3e4]], np.float32), TASK, 6, [()])
    assert answer.within_group_probability == 1
    assert answer.group_confidence["tail"] == 0


def test_no_images_give_no_answers() -> None:
    assert answers(np.zeros((0, 6), np.float32), TASK, 5, []) == []
