"""Each gate has a test that plants the fault it exists for."""

import functools

import numpy as np
import pytest
import torch
from export_toys import TAIL_CLASSES, TASK, TinyNet, damaged, edited, toy
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from export.candidate import open_session, run
from export.convert import to_onnx
from export.gates import FP32_MARGINS, Gate, GroupParity, Margins, compare, decisions, numeric, structure, task_accuracy
from export.reference import torch_logits

BIAS, WEIGHT, CONV = "network.classifier.bias", "network.classifier.weight", "network.conv.weight"


def structure_of(candidate: bytes) -> Gate:
    return structure(candidate, TASK, toy().images[::500])


@functools.cache
def reference_logits() -> NDArray[np.floating]:
    return torch_logits(toy().network, TASK, toy().images, torch.float32)


def rows_of(candidate: bytes) -> dict[str, GroupParity]:
    logits = run(open_session(candidate), toy().images)
    rows = compare(reference_logits(), logits, toy().labels, TASK.groups, FP32_MARGINS)
    return {row.group: row for row in rows}


def numeric_of(candidate: bytes) -> Gate:
    images = toy().images[::40]
    oracle, yardstick = (torch_logits(toy().network, TASK, images, dtype) for dtype in (torch.float64, torch.float32))
    return numeric(oracle, yardstick, run(open_session(candidate), images))


def logits_for(predicted: list[int]) -> NDArray[np.float32]:
    return np.eye(6, dtype=np.float32)[predicted] * 10


# G0 structure


def test_an_honest_export_passes_every_gate() -> None:
    rows = tuple(rows_of(toy().candidate).values())
    assert structure_of(toy().candidate) == Gate(name="G0 structure", verdict="PASS")
    assert numeric_of(toy().candidate).verdict == "PASS"
    assert decisions(rows) == Gate(name="G2 decisions", verdict="PASS")
    assert task_accuracy(rows) == Gate(name="G3 task", verdict="PASS")


def test_a_declared_fixed_batch_fails_the_structure() -> None:
    def freeze(model: ModelProto) -> None:
        for value in (model.graph.input[0], model.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_value = 2

    gate = structure_of(edited(toy().candidate, freeze))
    assert gate.verdict == "FAIL"
    assert any("N dynamic" in finding for finding in gate.findings)
    assert any("does not run on batches of [1]" in finding for finding in gate.findings)


def test_a_batch_frozen_inside_the_graph_fails_the_structure() -> None:
    def freeze(model: ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array([2, 6]), "frozen"))
        model.graph.node[-1].output[0] = "unfrozen"
        model.graph.node.append(helper.make_node("Reshape", ["unfrozen", "frozen"], ["logits"]))

    gate = structure_of(edited(toy().candidate, freeze))
    assert gate.verdict == "FAIL"
    assert any("does not run on batches" in finding for finding in gate.findings)


def test_normalising_by_the_batch_as_in_training_fails_the_structure() -> None:
    without_memory = nn.BatchNorm2d(12, track_running_stats=False)
    gate = structure_of(to_onnx(TinyNet(without_memory), TASK))
    assert gate.verdict == "FAIL"
    assert gate.findings == tuple(
        f"in a batch of {size} images the logits are not those of the images alone." for size in (2, 3, 17)
    )


def test_weights_that_happen_to_spell_a_path_are_no_leak() -> None:
    spelled = np.frombuffer(b"/root/job/net.py" + bytes(8), dtype=np.float32)
    assert structure_of(damaged(toy().candidate, BIAS, lambda _: spelled)).verdict == "PASS"


def test_functions_of_the_model_itself_fail_the_structure() -> None:
    def add_function(model: ModelProto) -> None:
        body = [helper.make_node("Neg", ["x"], ["y"])]
        model.functions.append(helper.make_function("com.example", "F", ["x"], ["y"], body, model.opset_import))

    assert "com.example" in structure_of(edited(toy().candidate, add_function)).findings[0]


def test_a_path_of_this_machine_fails_the_structure() -> None:
    def leak(model: ModelProto) -> None:
        entry = model.graph.node[3].metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.stack_trace", 'File "/srv/jobs/net.py", line 3, in forward'

    gate = structure_of(edited(toy().candidate, leak))
    assert gate.verdict == "FAIL"
    assert "/srv/jobs/net.py" in gate.findings[0]


def test_labels_in_another_order_fail_the_structure() -> None:
    swapped = TASK.model_copy(update={"class_names": ("bee", "ant", *TASK.class_names[2:])})
    gate = structure(toy().candidate, swapped, toy().images[:3])
    assert gate.verdict == "FAIL"
    assert "class_names" in gate.findings[0]


def test_weights_outside_the_file_fail_the_structure() -> None:
    def move_out(model: ModelProto) -> None:
        weight = model.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        entry = weight.external_data.add()
        entry.key, entry.value = "location", "model.onnx.data"

    gate = structure_of(edited(toy().candidate, move_out))
    assert gate.verdict == "FAIL"
    assert "lies outside the model file" in gate.findings[0]


def test_operators_of_an_unknown_domain_fail_the_structure() -> None:
    def import_domain(model: ModelProto) -> None:
        model.opset_import.append(helper.make_opsetid("com.example", 1))

    assert "com.example" in structure_of(edited(toy().candidate, import_domain)).findings[0]


def test_a_dangling_input_fails_the_structure() -> None:
    def unplug(model: ModelProto) -> None:
        model.graph.node[-1].input[0] = "nowhere"

    gate = structure_of(edited(toy().candidate, unplug))
    assert gate.verdict == "FAIL"
    assert "checker" in gate.findings[0]


def test_bytes_that_are_no_model_fail_the_structure() -> None:
    for content in (b"", b"no model", toy().candidate[:300]):
        assert structure_of(content).verdict == "FAIL"


def test_another_name_of_the_output_fails_the_structure() -> None:
    def rename(model: ModelProto) -> None:
        model.graph.node[-1].output[0] = model.graph.output[0].name = "scores"

    gate = structure_of(edited(toy().candidate, rename))
    assert "expected logits" in gate.findings[0]


# G1 numeric


def test_an_error_that_float32_does_not_explain_fails_the_numbers() -> None:
    gate = numeric_of(damaged(toy().candidate, BIAS, lambda bias: bias + 1e-2))
    assert gate.verdict == "FAIL"
    assert "is 0.01, " in gate.findings[0]


def test_a_single_logit_that_is_no_number_fails_the_numbers() -> None:
    assert numeric_of(damaged(toy().candidate, BIAS, lambda bias: bias * [1, 1, 1, 1, 1, np.nan])).verdict == "FAIL"


def test_a_constant_network_may_be_exported_without_error() -> None:
    zeros = np.zeros((4, 6))
    assert numeric(zeros, zeros.astype(np.float32), zeros.astype(np.float32)).verdict == "PASS"


# G2 decisions


def test_a_flip_of_a_clear_image_fails_the_decisions() -> None:
    before, after = logits_for([0] * 2000 + [4]), logits_for([0] * 2000 + [5])
    gate = decisions(compare(before, after, np.array([0] * 2000 + [3]), TASK.groups, FP32_MARGINS))
    assert gate.verdict == "FAIL"
    assert gate.findings[0].startswith("medium: 1 of 1 images changed class (at most 100 %), 1 of them")


def test_ties_may_break_either_way_and_are_counted() -> None:
    tied = np.zeros((1000, 6), dtype=np.float32)
    tied[:, 0] = tied[:, 1] = 5
    broken = tied.copy()
    broken[:100, 1] += 1e-6  # less than the rounding of a span of 5 in float32 sums
    labels = np.tile([0, 1], 500)
    rows = compare(tied, broken, labels, TASK.groups, FP32_MARGINS)
    assert decisions(rows).verdict == "PASS"
    assert [(row.num_flips, row.num_clear_flips) for row in rows] == [(100, 0), (0, 0), (0, 0), (100, 0)]
    assert (rows[0].right_to_wrong, rows[0].wrong_to_right) == (50, 50)


def test_a_logit_that_is_no_number_is_a_clear_flip_and_wrong() -> None:
    before = np.zeros((3, 6), dtype=np.float32)  # every class tied: nothing is clear
    after = before.copy()
    after[1, 5] = np.inf
    overall = compare(before, after, np.zeros(3, dtype=np.int64), TASK.groups, FP32_MARGINS)[-1]
    assert (overall.num_flips, overall.num_clear_flips, overall.right_to_wrong) == (1, 1, 1)


# G3 task


def test_damage_to_the_tail_alone_fails_the_tail_though_the_average_passes() -> None:
    logits = reference_logits()
    tail = np.flatnonzero((toy().labels >= min(TAIL_CLASSES)) & (logits.argmax(axis=1) == toy().labels))
    lead = np.sort(logits[tail].max(axis=1) - logits[tail][:, : min(TAIL_CLASSES)].max(axis=1))
    lowered_by = (lead[11] + lead[12]) / 2  # twelve images of 600 lose their class, of 10,000 nobody would notice

    def lower_the_tail(bias: NDArray[np.float32]) -> NDArray[np.float32]:
        bias[TAIL_CLASSES] -= lowered_by
        return bias

    rows = rows_of(damaged(toy().candidate, BIAS, lower_the_tail))
    assert rows["tail"].right_to_wrong == 12
    assert {name: row.verdict for name, row in rows.items()} == {
        "head": "PASS", "medium": "PASS", "tail": "FAIL", "all": "PASS"
    }  # fmt: skip
    gate = task_accuracy(tuple(rows.values()))
    assert gate.verdict == "FAIL"
    assert gate.findings[0].startswith("tail: 12 images became wrong and 0 right")


def swap_rows(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return rows[[1, 0, 2, 3, 4, 5]]


SCALE = np.array(TASK.std, dtype=np.float32).reshape(1, 3, 1, 1)
SHIFT = np.array(TASK.mean, dtype=np.float32).reshape(1, 3, 1, 1)
FAULTS = {
    "two classes swapped": lambda: damaged(damaged(toy().candidate, WEIGHT, swap_rows), BIAS, swap_rows),
    "BGR for RGB": lambda: damaged(toy().candidate, CONV, lambda kernel: kernel[:, ::-1]),
    "normalised twice": lambda: damaged(
        damaged(toy().candidate, "scale", lambda scale: scale / SCALE), "shift", lambda shift: (shift - SHIFT) / SCALE
    ),
    "not a number": lambda: damaged(toy().candidate, BIAS, lambda bias: bias * np.nan),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_computation_fails_numbers_decisions_and_task(fault: str) -> None:
    candidate = FAULTS[fault]()
    rows = tuple(rows_of(candidate).values())
    assert structure_of(candidate).verdict == "PASS"  # nothing to see from outside
    assert (numeric_of(candidate).verdict, decisions(rows).verdict, task_accuracy(rows).verdict) == ("FAIL",) * 3


def test_a_group_without_images_is_inconclusive_whatever_the_margin() -> None:
    predicted = [0, 2] * 3000
    margins = Margins(overall=0.999, group=0.999)
    rows = compare(logits_for(predicted), logits_for(predicted), np.array(predicted), TASK.groups, margins)
    assert [row.verdict for row in rows] == ["PASS", "PASS", "INCONCLUSIVE", "PASS"]
    assert (rows[2].num_images, rows[2].loss, rows[2].reference_accuracy) == (0, None, None)
    gate = task_accuracy(rows)
    assert gate.verdict == "INCONCLUSIVE"
    assert gate.findings == ("tail: there are no images of this group, so nothing is known about it.",)


def test_too_few_images_are_inconclusive_and_say_how_many_would_do() -> None:
    predicted = [0, 2] * 1000 + [4] * 60
    rows = compare(logits_for(predicted), logits_for(predicted), np.array(predicted), TASK.groups, FP32_MARGINS)
    gate = task_accuracy(rows)
    assert gate.verdict == "INCONCLUSIVE"
    assert gate.findings == (
        "tail: 60 images certify no margin below 4.32 %, the margin is 0.5 %. "
        "If nothing is lost, about 539 images certify it.",
    )


def test_a_candidate_better_than_its_reference_passes_the_task() -> None:
    labels = np.array([0, 2, 4] * 800)
    before, after = labels.copy(), labels.copy()
    before[:300] = 5
    rows = compare(logits_for(before.tolist()), logits_for(after.tolist()), labels, TASK.groups, FP32_MARGINS)
    assert task_accuracy(rows).verdict == "PASS"
    assert all(row.loss is not None and row.loss_upper_limit < 0 for row in rows)


def test_one_failing_group_outweighs_an_inconclusive_one() -> None:
    labels = np.array([0] * 3000 + [2] * 1000)
    after = labels.copy()
    after[3000:3100] = 0
    rows = compare(logits_for(labels.tolist()), logits_for(after.tolist()), labels, TASK.groups, FP32_MARGINS)
    assert [row.verdict for row in rows] == ["PASS", "FAIL", "INCONCLUSIVE", "FAIL"]
    assert task_accuracy(rows).verdict == "FAIL"
