"""Each gate is tested with the faults that it must detect."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_toys import TAIL_CLASSES, TASK, TinyNet, damaged, edited, toy
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from scipy.stats import entropy
from torch import nn
from training_toys import toy_data

from export.certification.accuracy_margins import MARGINS, margins_for
from export.certification.comparison import compare, compare_classes, compare_confidence, flips_by_margin
from export.certification.gates import ROUNDING_SHARE, confidence, decisions, host, numeric, structure, task_accuracy
from export.certification.reference import torch_logits
from export.certification.splits import find_duplicates, split_test_images
from export.conversion.fp16 import to_fp16
from export.conversion.fp32 import to_onnx
from export.conversion.session import model_metadata, open_session, run
from export.schema import Gate, GroupParity, Margins
from ltkd.contract.bundle import Precision
from ltkd.contract.calibration import softmax
from ltkd.errors import UsageError

LOOSE = Margins(overall=0.2, group=0.5)
BIAS, WEIGHT, CONV = "network.classifier.bias", "network.classifier.weight", "network.conv.weight"


def structure_of(candidate: bytes) -> Gate:
    return structure(candidate, TASK, toy().images[::500])


@functools.cache
def reference_logits() -> NDArray[np.floating]:
    return torch_logits(toy().network, TASK, toy().images, torch.float32)


def rows_of(candidate: bytes, precision: Precision = "fp32") -> dict[str, GroupParity]:
    logits = run(open_session(candidate), toy().images)
    rows = compare(reference_logits(), logits, toy().labels, TASK.groups, MARGINS[precision], precision)
    return {row.group: row for row in rows}


def numeric_of(candidate: bytes) -> Gate:
    images = toy().images[::40]
    oracle, in_float32 = (torch_logits(toy().network, TASK, images, dtype) for dtype in (torch.float64, torch.float32))
    return numeric(oracle, in_float32, run(open_session(candidate), images))


def logits_for(predicted: list[int]) -> NDArray[np.float32]:
    return np.eye(6, dtype=np.float32)[predicted] * 10


# G0 structure


def test_a_correct_export_passes_every_gate() -> None:
    rows = tuple(rows_of(toy().candidate).values())
    assert structure_of(toy().candidate) == Gate(name="G0 structure", verdict="PASS")
    assert numeric_of(toy().candidate).verdict == "PASS"
    assert decisions(rows) == Gate(name="G2 decisions", verdict="PASS")
    assert task_accuracy(rows) == Gate(name="G3 task", verdict="PASS")


def test_a_declared_fixed_batch_size_fails_the_structure() -> None:
    def freeze(model: ModelProto) -> None:
        for value in (model.graph.input[0], model.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_value = 2

    gate = structure_of(edited(toy().candidate, freeze))
    assert gate.verdict == "FAIL"
    assert any("N dynamic" in finding for finding in gate.findings)
    assert any("does not run on batches of [1]" in finding for finding in gate.findings)


def test_a_fixed_batch_size_inside_the_graph_fails_the_structure() -> None:
    def freeze(model: ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array([2, 6]), "frozen"))
        model.graph.node[-1].output[0] = "unfrozen"
        model.graph.node.append(helper.make_node("Reshape", ["unfrozen", "frozen"], ["logits"]))

    gate = structure_of(edited(toy().candidate, freeze))
    assert gate.verdict == "FAIL"
    assert any("does not run on batches" in finding for finding in gate.findings)


def test_batch_norm_in_training_mode_fails_the_structure() -> None:
    batch_statistics = nn.BatchNorm2d(12, track_running_stats=False)
    gate = structure_of(to_onnx(TinyNet(batch_statistics), TASK))
    assert gate.verdict == "FAIL"
    assert gate.findings == tuple(
        f"in a batch of {size} images the logits differ from those of the same images run one at a time."
        for size in (2, 3, 17)
    )


def test_weights_whose_bytes_look_like_a_path_are_not_reported() -> None:
    path_like = np.frombuffer(b"/root/job/net.py" + bytes(8), dtype=np.float32)
    assert structure_of(damaged(toy().candidate, BIAS, lambda _: path_like)).verdict == "PASS"


def test_functions_defined_in_the_model_fail_the_structure() -> None:
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


def test_class_names_in_another_order_fail_the_structure() -> None:
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
    assert "is stored outside the model file" in gate.findings[0]


def test_operators_of_an_unknown_domain_fail_the_structure() -> None:
    def import_domain(model: ModelProto) -> None:
        model.opset_import.append(helper.make_opsetid("com.example", 1))

    assert "com.example" in structure_of(edited(toy().candidate, import_domain)).findings[0]


def test_a_node_with_a_missing_input_fails_the_structure() -> None:
    def disconnect(model: ModelProto) -> None:
        model.graph.node[-1].input[0] = "nowhere"

    gate = structure_of(edited(toy().candidate, disconnect))
    assert gate.verdict == "FAIL"
    assert "checker" in gate.findings[0]


def test_bytes_that_are_not_a_model_fail_the_structure() -> None:
    for content in (b"", b"no model", toy().candidate[:300]):
        assert structure_of(content).verdict == "FAIL"


def test_another_output_name_fails_the_structure() -> None:
    def rename(model: ModelProto) -> None:
        model.graph.node[-1].output[0] = model.graph.output[0].name = "scores"

    gate = structure_of(edited(toy().candidate, rename))
    assert "expected logits" in gate.findings[0]


@functools.cache
def in_int8() -> bytes:
    """The toy network with its convolution quantised by ONNX Runtime's own quantiser."""

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter([{"image": toy().images[::200]}])

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            return next(self._batches, None)

    with tempfile.TemporaryDirectory() as folder:
        quantised = Path(folder) / "int8.onnx"
        quantize_static(
            onnx.load_model_from_string(toy().candidate),
            quantised,
            Images(),
            activation_type=QuantType.QUInt8,
            op_types_to_quantize=["Conv"],
        )
        return quantised.read_bytes()


def test_half_precision_and_int8_pass_the_structure_too() -> None:
    half = to_fp16(toy().candidate)
    assert structure(half, TASK, toy().images[::500], "fp16") == Gate(name="G0 structure", verdict="PASS")
    assert b"QuantizeLinear" in in_int8()
    model = onnx.load_model_from_string(in_int8())
    onnx.helper.set_model_props(model, model_metadata(TASK))  # the quantiser adds its own entry
    gate = structure(model.SerializeToString(), TASK, toy().images[::500], "int8")
    assert gate == Gate(name="G0 structure", verdict="PASS")


def test_a_fixed_batch_size_inside_an_int8_graph_fails_the_structure() -> None:
    def freeze(model: ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array([2, 6]), "frozen"))
        (last,) = [node for node in model.graph.node if "logits" in node.output]
        last.output[0] = "unfrozen"
        model.graph.node.append(helper.make_node("Reshape", ["unfrozen", "frozen"], ["logits"]))

    gate = structure(edited(in_int8(), freeze), TASK, toy().images[::500], "int8")
    assert any("does not run on batches" in finding for finding in gate.findings)


@pytest.mark.parametrize("precision", ROUNDING_SHARE)
def test_batch_norm_in_training_mode_fails_the_structure_in_every_precision(precision: Precision) -> None:
    batch_statistics = to_onnx(TinyNet(nn.BatchNorm2d(12, track_running_stats=False)), TASK)
    gate = structure(batch_statistics, TASK, toy().images[::500], precision)
    assert [finding.partition(" images")[0] for finding in gate.findings] == [
        f"in a batch of {size}" for size in (2, 3, 17)
    ]


# G1 numeric


def test_an_error_larger_than_float32_rounding_fails_the_numeric_gate() -> None:
    gate = numeric_of(damaged(toy().candidate, BIAS, lambda bias: bias + 1e-2))
    assert gate.verdict == "FAIL"
    assert "is 0.01; " in gate.findings[0]


def test_a_single_logit_that_is_not_finite_fails_the_numeric_gate() -> None:
    assert numeric_of(damaged(toy().candidate, BIAS, lambda bias: bias * [1, 1, 1, 1, 1, np.nan])).verdict == "FAIL"


def test_a_constant_network_passes_the_numeric_gate() -> None:
    zeros = np.zeros((4, 6))
    assert numeric(zeros, zeros.astype(np.float32), zeros.astype(np.float32)).verdict == "PASS"


# G2 decisions


def test_a_changed_class_of_a_clear_image_fails_the_decisions() -> None:
    before, after = logits_for([0] * 2000 + [4]), logits_for([0] * 2000 + [5])
    gate = decisions(compare(before, after, np.array([0] * 2000 + [3]), TASK.groups, MARGINS["fp32"]))
    assert gate.verdict == "FAIL"
    assert gate.findings[0].startswith("medium: 1 of 1 images changed class (95 % upper bound 100 %), 1 of them")


def test_ties_may_be_broken_either_way_and_are_counted() -> None:
    tied = np.zeros((1000, 6), dtype=np.float32)
    tied[:, 0] = tied[:, 1] = 5
    broken = tied.copy()
    broken[:100, 1] += 1e-6  # less than the rounding of a span of 5 in float32 sums
    labels = np.tile([0, 1], 500)
    rows = compare(tied, broken, labels, TASK.groups, MARGINS["fp32"])
    assert decisions(rows).verdict == "PASS"
    assert [(row.num_flips, row.num_clear_flips) for row in rows] == [(100, 0), (0, 0), (0, 0), (100, 0)]
    assert (rows[0].right_to_wrong, rows[0].wrong_to_right) == (50, 50)


def test_a_logit_that_is_not_finite_counts_as_a_clear_flip_and_as_wrong() -> None:
    before = np.zeros((3, 6), dtype=np.float32)  # all classes are tied, so no image is clear
    after = before.copy()
    after[1, 5] = np.inf
    overall = compare(before, after, np.zeros(3, dtype=np.int64), TASK.groups, MARGINS["fp32"])[-1]
    assert (overall.num_flips, overall.num_clear_flips, overall.right_to_wrong) == (1, 1, 1)


def test_a_clear_flip_is_only_listed_in_int8_and_fails_the_other_precisions() -> None:
    before, after = logits_for([0] * 2000 + [4]), logits_for([0] * 2000 + [5])
    labels = np.array([0] * 2000 + [3])
    gates: dict[Precision, Gate] = {
        precision: decisions(compare(before, after, labels, TASK.groups, margins, precision), precision)
        for precision, margins in MARGINS.items()
    }
    assert {precision: gate.verdict for precision, gate in gates.items()} == {
        "fp32": "FAIL", "fp16": "FAIL", "int8": "PASS"
    }  # fmt: skip
    assert gates["int8"].findings == gates["fp32"].findings


@pytest.mark.parametrize(("lead", "clear_to"), [(0.002, ["fp32"]), (0.02, ["fp32", "fp16"]), (0.06, list(MARGINS))])
def test_the_coarser_a_precision_rounds_the_fewer_images_count_as_clear(lead: float, clear_to: list[str]) -> None:
    before, after = np.zeros((2, 50, 6), dtype=np.float32)
    before[:, 0], before[:, 1], after[:, 1] = 1, 1 - lead, 1
    counted = {
        precision: compare(before, after, np.zeros(50, dtype=np.int64), TASK.groups, margins, precision)[-1]
        for precision, margins in MARGINS.items()
    }
    assert [precision for precision, row in counted.items() if row.num_clear_flips == 50] == clear_to
    assert {row.num_flips for row in counted.values()} == {50}


def test_flips_are_counted_by_how_clear_the_image_was() -> None:
    before, after = np.zeros((2, 4, 6), dtype=np.float32)
    before[:, 0] = after[:, 0] = 10
    before[:3, 1] = [10, 9.95, 9.5]  # differences of 0, 0.005, 0.05 and (last image) 1 of the span
    after[:2, 1] = 11
    after[3, 2] = 12
    found = flips_by_margin(before, after, np.array([0, 0, 2, 4]), TASK.groups)
    by_end = {interval.up_to: (interval.num_images, interval.num_flips) for interval in found}
    assert {end: counts for end, counts in by_end.items() if any(counts[0])} == {
        0.001: ((1, 0, 0), (1, 0, 0)), 0.01: ((1, 0, 0), (1, 0, 0)), 0.05: ((0, 1, 0), (0, 0, 0)),
        1.0: ((0, 0, 1), (0, 0, 1)),
    }  # fmt: skip
    assert [interval.above for interval in found[1:]] == [interval.up_to for interval in found[:-1]]


# G3 task


@pytest.mark.parametrize(("precision", "lost"), [("fp32", 12), ("fp16", 18), ("int8", 30)])
def test_damaged_tail_rows_of_the_classifier_fail_the_tail_though_the_average_passes(
    precision: Precision, lost: int
) -> None:
    logits = reference_logits()
    tail = np.flatnonzero((toy().labels >= min(TAIL_CLASSES)) & (logits.argmax(axis=1) == toy().labels))
    lead = np.sort(logits[tail].max(axis=1) - logits[tail][:, : min(TAIL_CLASSES)].max(axis=1))
    lowered_by = (
        lead[lost - 1] + lead[lost]
    ) / 2  # ``lost`` of 600 tail images become wrong: too few to show among 10,000

    def lower_the_tail(bias: NDArray[np.float32]) -> NDArray[np.float32]:
        bias[TAIL_CLASSES] -= lowered_by
        return bias

    rows = rows_of(damaged(toy().candidate, BIAS, lower_the_tail), precision)
    assert rows["tail"].right_to_wrong == lost
    assert {name: row.verdict for name, row in rows.items()} == {
        "head": "PASS", "medium": "PASS", "tail": "FAIL", "all": "PASS"
    }  # fmt: skip
    gate = task_accuracy(tuple(rows.values()))
    assert gate.verdict == "FAIL"
    assert gate.findings[0].startswith(f"tail: {lost} predictions became wrong and 0 became correct. The accuracy fell")


def test_reduced_weights_of_the_tail_classes_fail_the_tail() -> None:
    def reduce(weight: NDArray[np.float32]) -> NDArray[np.float32]:
        weight[TAIL_CLASSES] *= 0.9
        return weight

    rows = rows_of(damaged(toy().candidate, WEIGHT, reduce))
    assert (rows["tail"].verdict, task_accuracy(tuple(rows.values())).verdict) == ("FAIL", "FAIL")


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
def test_a_wrong_computation_fails_the_numeric_decisions_and_task_gates(fault: str) -> None:
    candidate = FAULTS[fault]()
    rows = tuple(rows_of(candidate).values())
    assert structure_of(candidate).verdict == "PASS"  # gate G0 cannot detect the fault
    assert (numeric_of(candidate).verdict, decisions(rows).verdict, task_accuracy(rows).verdict) == ("FAIL",) * 3


def test_a_group_without_images_is_inconclusive_at_any_margin() -> None:
    predicted = [0, 2] * 3000
    margins = Margins(overall=0.999, group=0.999)
    rows = compare(logits_for(predicted), logits_for(predicted), np.array(predicted), TASK.groups, margins)
    assert [row.verdict for row in rows] == ["PASS", "PASS", "INCONCLUSIVE", "PASS"]
    assert (rows[2].num_images, rows[2].loss, rows[2].reference_accuracy) == (0, None, None)
    gate = task_accuracy(rows)
    assert gate.verdict == "INCONCLUSIVE"
    assert gate.findings == ("tail: there are no images of this group, so its accuracy cannot be tested.",)


def test_with_too_few_images_the_finding_gives_the_number_that_is_needed() -> None:
    predicted = [0, 2] * 1000 + [4] * 60
    rows = compare(logits_for(predicted), logits_for(predicted), np.array(predicted), TASK.groups, MARGINS["fp32"])
    gate = task_accuracy(rows)
    assert gate.verdict == "INCONCLUSIVE"
    assert gate.findings == (
        "tail: 60 images cannot rule out a loss of up to 4.89 percentage points; the margin is 0.5 percentage points. "
        "If no accuracy is lost, about 601 images are enough.",
    )


def test_a_candidate_better_than_its_reference_passes_the_task() -> None:
    labels = np.array([0, 2, 4] * 800)
    before, after = labels.copy(), labels.copy()
    before[:300] = 5
    rows = compare(logits_for(before.tolist()), logits_for(after.tolist()), labels, TASK.groups, MARGINS["fp32"])
    assert task_accuracy(rows).verdict == "PASS"
    assert all(row.loss is not None and row.loss_upper_limit < 0 for row in rows)


def test_one_failing_group_outweighs_an_inconclusive_one() -> None:
    labels = np.array([0] * 3000 + [2] * 1000)
    after = labels.copy()
    after[3000:3100] = 0
    rows = compare(logits_for(labels.tolist()), logits_for(after.tolist()), labels, TASK.groups, MARGINS["fp32"])
    assert [row.verdict for row in rows] == ["PASS", "FAIL", "INCONCLUSIVE", "FAIL"]
    assert task_accuracy(rows).verdict == "FAIL"


def test_images_that_are_also_in_another_split_fail_the_task_even_without_a_loss() -> None:
    splits = split_test_images(toy_data(num_test=40), LOOSE)
    selection = np.concatenate([splits.selection.images[:], splits.certify.images[:3]])
    others = {"quantisation": splits.quantisation.images, "selection": selection}
    found = find_duplicates(splits.certify.images, splits.num_views, others)
    assert found == ("3 certification images are also in the selection split, so they influenced the candidate.",)
    good = compare(logits_for([0] * 3000), logits_for([0] * 3000), np.zeros(3000, np.int64), TASK.groups, LOOSE)[:1]
    assert (task_accuracy(good).verdict, task_accuracy(good, duplicates=found).verdict) == ("PASS", "FAIL")
    assert task_accuracy(good, duplicates=found).findings == found


def test_a_duplicate_certification_image_is_reported_unless_it_is_a_view() -> None:
    images = np.asarray(toy_data(num_test=5).test_images)
    twice = np.concatenate([images, images[2:4]])
    assert find_duplicates(twice, 2, {}) == ()
    assert find_duplicates(twice, 0, {}) == (
        "2 certification images are duplicates, but would count as independent images.",
    )


def test_a_significant_loss_within_the_margin_is_an_alarm_and_not_a_failure() -> None:
    labels = np.zeros(3000, dtype=np.int64)
    after = labels.copy()
    after[:12] = 1
    rows = compare(logits_for(labels.tolist()), logits_for(after.tolist()), labels, TASK.groups, MARGINS["int8"])
    gate = task_accuracy(rows[:1])
    assert rows[0].mcnemar_p == pytest.approx(4 * 2 * 0.5**12)  # Holm: the smaller of four rows counts fourfold
    assert gate.verdict == "PASS"
    assert gate.findings[0].startswith("head: alarm: 12 predictions became wrong and 0 became correct. McNemar's test")
    better = compare(logits_for(after.tolist()), logits_for(labels.tolist()), labels, TASK.groups, MARGINS["int8"])
    assert task_accuracy(better[:1]).findings == ()


def test_a_single_class_with_a_significant_loss_is_flagged() -> None:
    labels = np.repeat(np.arange(6), 300)
    after = labels.copy()
    after[900:915] = 0  # of dog
    after[0:3], after[300:303] = 1, 0  # differences that occur by chance
    classes = compare_classes(logits_for(labels.tolist()), logits_for(after.tolist()), labels, TASK)
    assert [row.label for row in classes] == list(TASK.class_names)  # most frequent first
    assert [row.label for row in classes if row.flagged] == ["dog"]
    assert classes[3].p_value == pytest.approx(0.5**15)
    assert (classes[3].reference_accuracy, classes[3].candidate_accuracy) == (1, 0.95)
    rows = compare(logits_for(labels.tolist()), logits_for(after.tolist()), labels, TASK.groups, LOOSE)
    gate = task_accuracy(rows, classes)
    assert gate.verdict == "PASS"
    assert gate.findings[-1].startswith("alarm: 1 of 6 classes lost accuracy: dog (")


def test_classes_are_sorted_by_frequency_and_may_have_no_images() -> None:
    rare_first = TASK.model_copy(update={"train_counts": (5, 10, 50, 100, 300, 600)})
    classes = compare_classes(logits_for([5]), logits_for([0]), np.array([5]), rare_first)
    assert [row.train_count for row in classes] == [600, 300, 100, 50, 10, 5]
    assert [row.num_images for row in classes] == [1, 0, 0, 0, 0, 0]
    assert (classes[1].reference_accuracy, classes[1].p_value, classes[1].flagged) == (None, 1, False)


def test_margins_are_replaced_by_name_and_the_others_keep_their_defaults() -> None:
    margins = margins_for("int8", {"tail": 0.05, "all": 0.004}, TASK.groups)
    assert [margins.of(name) for name in (*TASK.groups.names, "all")] == [0.02, 0.02, 0.05, 0.004]
    assert margins_for("fp16", {}, TASK.groups) == MARGINS["fp16"]
    rows = compare(logits_for([0]), logits_for([0]), np.zeros(1, np.int64), TASK.groups, margins)
    assert [row.margin for row in rows] == [0.02, 0.02, 0.05, 0.004]


def test_a_margin_for_an_unknown_group_or_outside_0_to_1_is_rejected() -> None:
    with pytest.raises(
        UsageError, match=r"given for 'rare', which is not a group; choose from head, medium, tail, all\.$"
    ):
        margins_for("fp32", {"rare": 0.1}, TASK.groups)
    for margin in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(UsageError, match=r"the margin of tail is .* expected more than 0"):
            margins_for("fp32", {"tail": margin}, TASK.groups)


# G4 confidence


def test_equal_probabilities_give_no_finding_and_no_change() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (600, 6))
    labels = np.arange(600) % 6
    rows = compare_confidence(
        logits, logits + 3.0, labels, TASK.groups
    )  # adding a constant to all logits changes no probability
    assert confidence(rows) == Gate(name="G4 confidence", verdict="PASS")
    assert [row.num_images for row in rows] == [200, 200, 200, 600]
    for row in rows:
        assert row.kl == pytest.approx(0, abs=1e-12) and row.confidence_change == pytest.approx(0, abs=1e-12)
        assert row.nll is not None and row.nll.value == pytest.approx(0, abs=1e-12)


def test_the_measures_of_confidence_agree_with_their_definitions() -> None:
    random = np.random.default_rng(1)
    before, after = random.normal(0, 2, (2, 60, 6))
    labels = np.full(60, 4)
    tail, overall = compare_confidence(before, after, labels, TASK.groups)[2:]
    p, q = (softmax(logits) for logits in (before, after))
    assert tail.model_copy(update={"group": "all"}) == overall
    assert tail.nll is not None and tail.brier is not None
    # the same formulas, computed in another way in float64
    assert tail.kl == pytest.approx(np.mean([entropy(*pair) for pair in zip(p, q, strict=True)]), rel=1e-9)
    assert tail.confidence_change == pytest.approx(np.abs(q.max(axis=1) - p.max(axis=1)).mean(), rel=1e-9)
    assert tail.nll.value == pytest.approx((np.log(p[:, 4]) - np.log(q[:, 4])).mean(), rel=1e-9)
    target = np.eye(6)[labels]
    brier = ((q - target) ** 2).sum(axis=1) - ((p - target) ** 2).sum(axis=1)
    assert tail.brier.value == pytest.approx(brier.mean(), rel=1e-9)
    assert tail.brier.low < tail.brier.value < tail.brier.high
    assert tail.ece_null is not None and tail.ece_null_upper is not None and tail.ece_null < tail.ece_null_upper


def test_an_overconfident_candidate_is_reported_but_does_not_fail() -> None:
    random = np.random.default_rng(2)
    before = random.normal(0, 1, (900, 6))
    labels = np.array([random.choice(6, p=row) for row in softmax(before)])
    gate = confidence(compare_confidence(before, 6 * before, labels, TASK.groups))
    assert gate.verdict == "PASS"
    assert [finding.partition(" by ")[0] for finding in gate.findings][-2:] == [
        "all: the negative log likelihood rose", "all: the Brier score rose"
    ]  # fmt: skip


def test_a_probability_that_is_not_finite_fails_the_confidence_gate() -> None:
    before = np.zeros((8, 6), dtype=np.float32)
    after = before.copy()
    after[5, 2] = np.nan
    rows = compare_confidence(before, after, np.array([0, 0, 0, 0, 4, 4, 4, 4]), TASK.groups)
    assert [row.kl for row in rows] == [
        0,
        None,
        None,
        None,
    ]  # head has no change, medium no images, tail and all a logit that is not finite
    gate = confidence(rows)
    assert gate.verdict == "FAIL"
    assert gate.findings == (
        "tail: the probabilities of some of the 4 images are not finite.",
        "all: the probabilities of some of the 8 images are not finite.",
    )


# G5 host


def test_a_host_with_the_logits_of_certification_passes() -> None:
    golden = toy().images[::900]
    gate = host(open_session(toy().candidate), golden, run(open_session(toy().candidate), golden), "fp32")
    assert gate.verdict == "PASS"
    assert gate.findings[0].startswith("the logits of 12 golden images differ by up to 0 from those at certification; ")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_host_with_a_wrong_computation_fails(fault: str) -> None:
    golden = toy().images[::900]
    expected = run(open_session(toy().candidate), golden)
    assert host(open_session(FAULTS[fault]()), golden, expected, "fp32").verdict == "FAIL"


def test_a_host_with_another_model_or_other_images_fails() -> None:
    golden = toy().images[::900]
    session, expected = open_session(toy().candidate), run(open_session(toy().candidate), golden)
    assert "gives logits of shape [12, 6]" in host(session, golden, expected[:, :5], "fp32").findings[0]
    assert "does not run" in host(session, golden[..., :2], expected, "fp32").findings[0]
