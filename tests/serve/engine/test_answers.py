"""Answers against an independent computation, their JSON, and their independence of the batch."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from serve_toys import CLASS_NAMES, GROUPS, TASK, toy_calibration, toy_engine

from ltkd.contract.bundle import Manifest
from ltkd.contract.calibration import Calibration, Proportion, calibrated_probabilities, expected_accuracy
from ltkd.contract.class_groups import groups_by_share
from ltkd.contract.task import Task
from serve.engine.answers import (
    NOT_FINITE,
    Answer,
    AnswerBuilder,
    Answers,
    ClassProbability,
    ModelRef,
    Predictions,
    PredictionSet,
    RejectedImage,
    ServedAnswer,
    answers_json,
    rejected_image_json,
    served_answer_json,
)
from serve.problems import make_problem

LOGITS_NC = np.array([[0.0, 1.0, 2.0, 0.5, 3.0, -1.0], [9.0, 8.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
TEMPERATURES = (0.5, 1.0, 2.5)


def manifest(calibration: Calibration | None = None, task: Task = TASK) -> Manifest:
    """The toy manifest, with another temperature for each group."""
    toy = toy_engine().manifest
    if calibration is None:
        calibration = tuple(
            group.model_copy(update={"temperature": temperature})
            for group, temperature in zip(toy_calibration(), TEMPERATURES, strict=True)
        )
    model = toy.precisions["fp32"].model_copy(update={"calibration": calibration})
    return toy.model_copy(update={"task": task, "precisions": {"fp32": model}})


BUILDER = AnswerBuilder(manifest(), "fp32")


def answered(logits_NC: NDArray[np.float32], top_k: int = 6, builder: AnswerBuilder = BUILDER) -> list[Answer]:
    results = builder.records(builder.predict(logits_NC), [top_k] * len(logits_NC), [()] * len(logits_NC))
    assert all(isinstance(result, Answer) for result in results)
    return [result for result in results if isinstance(result, Answer)]


def test_an_answer_equals_a_direct_computation_in_numpy() -> None:
    predictions = BUILDER.predict(LOGITS_NC)
    first, second = BUILDER.records(predictions, [2, 2], [("one",), ()])
    assert isinstance(first, Answer) and isinstance(second, Answer)
    # the prediction is in the tail, so the tail's temperature applies to all classes
    unnormalised_C = np.exp(LOGITS_NC[0].astype(float) / 2.5)
    assert (first.label, first.class_index, first.group, first.warnings) == ("elk", 4, "tail", ("one",))
    assert (second.label, second.group, second.warnings) == ("ant", "head", ())
    # float64 on both sides, sums of six terms
    assert first.probability == pytest.approx((unnormalised_C / unnormalised_C.sum())[4], abs=1e-12)
    assert first.group_confidence["head"] == pytest.approx((unnormalised_C / unnormalised_C.sum())[:2].sum(), abs=1e-12)
    assert [entry.label for entry in first.top_k] == ["elk", "cat"]


def test_probabilities_equal_those_of_the_calibration_fit() -> None:
    expected_NC = calibrated_probabilities(LOGITS_NC, GROUPS, np.array(TEMPERATURES))
    for row, answer in enumerate(answered(LOGITS_NC)):
        assert {entry.class_index: entry.probability for entry in answer.top_k} == dict(enumerate(expected_NC[row]))


def test_group_confidence_sums_to_one_and_splits_every_probability() -> None:
    for answer in answered(LOGITS_NC):
        assert tuple(answer.group_confidence) == GROUPS.names
        # float64 rounding of a few terms
        assert sum(answer.group_confidence.values()) == pytest.approx(1, abs=1e-12)
        whole = answer.within_group_probability * answer.group_confidence[answer.group]
        assert whole == pytest.approx(answer.probability, abs=1e-12)


def test_a_top_k_above_the_number_of_classes_lists_all_classes() -> None:
    (answer,) = answered(LOGITS_NC[:1], 99)
    assert sorted(entry.label for entry in answer.top_k) == sorted(CLASS_NAMES)
    ranked = [entry.probability for entry in answer.top_k]
    assert ranked == sorted(ranked, reverse=True)


def test_extreme_logits_give_finite_probabilities() -> None:
    (answer,) = answered(np.array([[3e38, 0, 0, 0, 0, -3e38]], np.float32))
    assert answer.within_group_probability == 1
    assert answer.group_confidence["tail"] == 0


def test_no_images_give_no_answers() -> None:
    predictions = BUILDER.predict(np.zeros((0, 6), np.float32))
    assert (BUILDER.records(predictions, [], []), BUILDER.json(predictions, [], [])) == ([], [])


def with_confidence(confidence: float) -> NDArray[np.float32]:
    """Logits that give the first class about this probability at temperature one; the other classes share the rest."""
    other = (1 - confidence) / 5
    return np.log(np.array([[confidence] + [other] * 5])).astype(np.float32)


@pytest.mark.parametrize(
    ("confidence", "decision", "accuracy"), [(0.3, "abstain", 0.25), (0.45, "accept", 0.25), (0.6, "accept", 0.75)]
)
def test_decision_and_expected_accuracy_are_those_of_the_predicted_group(
    confidence: float, decision: str, accuracy: float
) -> None:
    builder = AnswerBuilder(manifest(toy_calibration()), "fp32")
    (answer,) = answered(with_confidence(confidence), builder=builder)
    assert (answer.group, answer.decision, answer.threshold, answer.target_precision) == ("head", decision, 0.4, 0.7)
    assert answer.expected_accuracy == Proportion(value=accuracy, low=accuracy - 0.1, high=accuracy + 0.1, n=40)


def test_expected_accuracy_equals_the_calibration_at_every_bin_edge() -> None:
    builder, (head, *_) = AnswerBuilder(manifest(toy_calibration()), "fp32"), toy_calibration()
    rules = builder._groups[0]
    for confidence in (0.0, 0.5, float(np.nextafter(0.5, 1)), 1.0):
        expected = expected_accuracy(head, confidence)
        as_json = json.loads(b'{"x":{' + rules.expected_json(confidence) + b"}")["expected_accuracy"]
        assert as_json == (None if expected is None else expected.model_dump())


def test_values_that_were_not_certified_are_null() -> None:
    unknown = tuple(
        group.model_copy(
            update={
                "expected_accuracy": (),
                "abstention": group.abstention.model_copy(update={"threshold": None, "precision": None}),
                "prediction_set": group.prediction_set.model_copy(update={"coverage": None}),
            }
        )
        for group in toy_calibration()
    )
    (answer,) = answered(with_confidence(0.99), builder=AnswerBuilder(manifest(unknown), "fp32"))
    assert (answer.expected_accuracy, answer.decision, answer.threshold) == (None, "no_guarantee", None)
    assert answer.prediction_set.coverage == {"head": None, "medium": None, "tail": None}


def test_a_prediction_set_selects_each_class_by_the_threshold_of_its_own_group() -> None:
    least = {"head": 0.35, "medium": None, "tail": 0.04}
    calibration = tuple(
        group.model_copy(
            update={"prediction_set": group.prediction_set.model_copy(update={"least_probability": least[group.group]})}
        )
        for group in toy_calibration()
    )
    logits_NC = np.log(np.array([[0.4, 0.3, 0.01, 0.14, 0.1, 0.05]])).astype(np.float32)
    (answer,) = answered(logits_NC, builder=AnswerBuilder(manifest(calibration), "fp32"))
    # head: only ant reaches 0.35; medium: there is no threshold, so all classes; tail: both reach 0.04
    assert answer.prediction_set.labels == ("ant", "dog", "elk", "fox", "cat")
    assert answer.prediction_set.target_coverage == 0.9
    assert answer.prediction_set.coverage == {"head": 0.875, "medium": 0.875, "tail": 0.875}


def test_equal_logits_are_ranked_by_index_whatever_the_sign_of_zero() -> None:
    logits_NC = np.array([[-0.0, 0.0, -1.0, 0.0, -0.0, -2.0]], np.float32)
    (answer,) = answered(logits_NC)
    assert [entry.class_index for entry in answer.top_k] == [0, 1, 3, 4, 2, 5]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_images_with_non_finite_logits_are_rejected_and_the_others_answered(value: float) -> None:
    logits_NC = np.vstack([LOGITS_NC[:1], np.full((1, 6), value, np.float32), LOGITS_NC[1:]])
    predictions = BUILDER.predict(logits_NC)
    first, rejected, second = BUILDER.records(predictions, [5] * 3, [()] * 3)
    assert [first, second] == BUILDER.records(BUILDER.predict(LOGITS_NC), [5] * 2, [()] * 2)
    assert isinstance(rejected, RejectedImage) and rejected.error.status == 500
    texts = BUILDER.json(predictions, [5] * 3, [()] * 3)
    assert json.loads(texts[1]) == json.loads(rejected.model_dump_json())


LOGITS = st.integers(0, 9).flatmap(
    lambda num: hnp.arrays(
        np.float32, (num, 6), elements=st.floats(-50, 50, width=32) | st.sampled_from([0.0, -0.0, 3e38, -3e38])
    )
)


def record_of(predictions: Predictions, row: int, top_k: int, warnings: tuple[str, ...]) -> Answer:
    """An answer, computed record by record."""
    calibration = manifest().precisions["fp32"].calibration
    group = calibration[predictions.groups[row]]
    ranked = [
        ClassProbability(label=TASK.class_names[index], class_index=index, group=TASK.group_name(index), probability=p)
        for index, p in zip(
            predictions.order_NC[row, :top_k].tolist(), predictions.probability_NC[row, :top_k].tolist(), strict=True
        )
    ]
    return Answer(
        **ranked[0].model_dump(),
        within_group_probability=predictions.within(row),
        group_confidence=dict(zip(GROUPS.names, predictions.mass_NK[row].tolist(), strict=True)),
        expected_accuracy=expected_accuracy(group, predictions.confidences[row]),
        decision=predictions.decisions[row],
        threshold=group.abstention.threshold,
        target_precision=group.abstention.target_precision,
        prediction_set=PredictionSet(
            labels=tuple(TASK.class_names[index] for index in predictions.sets[row]),
            target_coverage=min(each.prediction_set.target_coverage for each in calibration),
            coverage={
                each.group: each.prediction_set.coverage.value if each.prediction_set.coverage else None
                for each in calibration
            },
        ),
        top_k=tuple(ranked),
        warnings=warnings,
    )


@given(LOGITS, st.data())
def test_the_fast_json_equals_the_json_of_the_records(logits_NC: NDArray[np.float32], data: st.DataObject) -> None:
    num = len(logits_NC)
    top_k = data.draw(st.lists(st.integers(1, 9), min_size=num, max_size=num))
    warnings = data.draw(st.lists(st.lists(st.text(), max_size=2).map(tuple), min_size=num, max_size=num))
    predictions = BUILDER.predict(logits_NC)
    records = [
        record_of(predictions, row, top_k[row], warnings[row])
        if predictions.finite[row]
        else RejectedImage(error=make_problem(500, NOT_FINITE))
        for row in range(num)
    ]
    texts = BUILDER.json(predictions, top_k, warnings)
    assert [json.loads(text) for text in texts] == [json.loads(record.model_dump_json()) for record in records]
    assert BUILDER.records(predictions, top_k, warnings) == records


@given(LOGITS)
def test_an_answer_is_the_same_alone_and_in_any_batch(logits_NC: NDArray[np.float32]) -> None:
    whole = BUILDER.json(BUILDER.predict(logits_NC), [6] * len(logits_NC), [()] * len(logits_NC))
    for row, text in enumerate(whole):
        assert BUILDER.json(BUILDER.predict(logits_NC[row : row + 1]), [6], [()]) == [text]


@pytest.mark.parametrize("num_classes", [3, 10, 100, 1000])
def test_an_answer_with_many_classes_is_the_same_to_the_last_bit_in_any_batch(num_classes: int) -> None:
    counts = tuple(range(num_classes + 5, 5, -1))
    rng = np.random.default_rng(3)
    shuffled = tuple(rng.permutation(counts).tolist())
    task = task_of(shuffled)
    builder = AnswerBuilder(manifest(task=task), "fp32")
    logits_NC = rng.normal(0, 4, (33, num_classes)).astype(np.float32)
    whole = builder.json(builder.predict(logits_NC), [5] * 33, [()] * 33)
    for first, past in ((0, 1), (7, 15), (20, 33)):
        part = builder.json(builder.predict(logits_NC[first:past]), [5] * (past - first), [()] * (past - first))
        assert part == whole[first:past]
    strided = builder.predict(np.asfortranarray(logits_NC))
    assert builder.json(strided, [5] * 33, [()] * 33) == whole
    mass_NK = task.groups.mass(calibrated_probabilities(logits_NC, task.groups, np.array(TEMPERATURES)))
    # float64 sums of up to a thousand terms, in another order
    np.testing.assert_allclose(builder.predict(logits_NC).mass_NK, mass_NK, atol=1e-12)


def task_of(counts: tuple[int, ...]) -> Task:
    names = tuple(f"class {index}" for index in range(len(counts)))
    return TASK.model_copy(update={"class_names": names, "train_counts": counts, "groups": groups_by_share(counts)})


def test_names_that_json_must_escape_are_escaped() -> None:
    names = ('a "quoted" one', "back\\slash", "line\nbreak", "größe", "\u2028", "percent %b %d")
    builder = AnswerBuilder(manifest(task=TASK.model_copy(update={"class_names": names})), "fp32")
    (text,) = builder.json(builder.predict(LOGITS_NC[:1]), [6], [("a % sign",)])
    assert sorted(entry["label"] for entry in json.loads(text)["top_k"]) == sorted(names)
    assert json.loads(text)["warnings"] == ["a % sign"]


def test_the_response_body_equals_the_json_of_its_record() -> None:
    model = ModelRef(name="toy", version="1", precision="fp32", provider="ToyProvider", sha256="f" * 64)
    problem = make_problem(415, "not an image")
    predictions = BUILDER.predict(LOGITS_NC)
    first, second = BUILDER.records(predictions, [5, 5], [(), ()])
    answers = [ServedAnswer(answer_id=name, **dict(record)) for name, record in (("a1", first), ("b2", second))]
    results = (*answers, RejectedImage(error=problem))
    first_json, second_json = BUILDER.json(predictions, [5, 5], [(), ()])
    texts = [
        served_answer_json("a1", first_json), served_answer_json("b2", second_json), rejected_image_json(problem)
    ]  # fmt: skip
    body = answers_json(model.model_dump_json().encode(), texts)
    assert json.loads(body) == json.loads(Answers(model=model, results=results).model_dump_json())
    assert Answers.model_validate_json(body) == Answers(model=model, results=results)
