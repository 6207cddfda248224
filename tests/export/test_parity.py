"""Comparison of any two models: files of this project and of other tools, runs and bundles."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from export_toys import TAIL_CLASSES, TASK, damaged, edited, toy
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.parity import ComparedModel, common_resizing, compare_models, open_model, precision_of
from ltkd.contract.preprocessing import FULL_DECODING, Resizing
from ltkd.data.datasets import Dataset
from ltkd.errors import BundleError, UsageError

RECORDED = Path(__file__).parents[1] / "recorded"
MEAN, STD = np.array(TASK.mean, np.float32), np.array(TASK.std, np.float32)


def data() -> Dataset:
    images, labels = toy().images, toy().labels
    return Dataset(TASK, images[:0], labels[:0], images, labels, mirror=False)


def write_file(folder: Path, content: bytes, name: str = "model.onnx") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def with_damaged_tail() -> bytes:
    """Lower the biases of the tail classes. The average changes little, because only 600 of 10,000 images are tail."""

    def damage(bias_C: np.ndarray) -> np.ndarray:
        bias_C[TAIL_CLASSES] -= 100
        return bias_C

    return damaged(toy().candidate, "network.classifier.bias", damage)


def foreign_model(batch: int | str, names: tuple[str, str] = ("x", "scores"), side: int = 8) -> bytes:
    """A linear model as other tools write it: normalised float32 [N, 3, S, S], other names, no metadata."""
    weights = np.random.default_rng(3).normal(0, 1, (3 * side * side, 6)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", [names[0]], ["row"], axis=1),
            helper.make_node("MatMul", ["row", "weights"], [names[1]]),
        ],
        "foreign",
        [helper.make_tensor_value_info(names[0], TensorProto.FLOAT, [batch, 3, side, side])],
        [helper.make_tensor_value_info(names[1], TensorProto.FLOAT, [batch, 6])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def opened(folder: Path, content: bytes, name: str = "model.onnx") -> ComparedModel:
    return open_model(write_file(folder, content, name), TASK)


def test_a_model_compared_with_itself_passes_in_every_group(tmp_path: Path) -> None:
    model = opened(tmp_path, toy().candidate)
    report = compare_models(model, model, data(), {})
    (candidate,) = report.candidates
    assert report.verdict == "PASS"
    assert [row.group for row in candidate.groups] == ["head", "medium", "tail", "all"]
    assert [gate.name for gate in candidate.gates] == ["G2 decisions", "G3 task", "G4 confidence"]
    assert report.data.splits[0].num_images + report.data.num_duplicates == len(toy().labels)


def test_a_damaged_tail_fails_although_the_average_passes_and_the_layer_is_named(tmp_path: Path) -> None:
    report = compare_models(
        opened(tmp_path, toy().candidate), opened(tmp_path, with_damaged_tail(), "bad.onnx"), data(), {"all": 0.2}
    )
    (candidate,) = report.candidates
    verdicts = {row.group: row.verdict for row in candidate.groups}
    assert (report.verdict, verdicts["tail"], verdicts["all"]) == ("FAIL", "FAIL", "PASS")
    task = next(gate for gate in candidate.gates if gate.name == "G3 task")
    assert any("tail:" in finding for finding in task.findings)
    assert any("the difference arises in" in finding and "Gemm" in finding for finding in task.findings)


def test_given_margins_replace_the_defaults(tmp_path: Path) -> None:
    report = compare_models(
        opened(tmp_path, toy().candidate),
        opened(tmp_path, with_damaged_tail(), "bad.onnx"),
        data(),
        {"tail": 0.999, "all": 0.2},
    )
    assert report.verdict == "PASS"
    with pytest.raises(UsageError, match="tial"):
        compare_models(opened(tmp_path, toy().candidate), opened(tmp_path, toy().candidate), data(), {"tial": 0.1})


@pytest.mark.parametrize("batch", ["N", 1, 7])
def test_a_file_of_another_tool_gets_normalised_pixels_in_its_batch_size(tmp_path: Path, batch: int | str) -> None:
    images = toy().images[:17]
    logits_NC = opened(tmp_path, foreign_model(batch)).logits(images)
    normalised = ((images.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2).reshape(17, -1)
    weights = numpy_helper.to_array(onnx.load_model_from_string(foreign_model(batch)).graph.initializer[0])
    # sums of 192 float32 products of size 1 in another order
    np.testing.assert_allclose(logits_NC, normalised @ weights, atol=1e-3)


def without_classes(model: ModelProto) -> None:
    del model.metadata_props[:]


def other_order(model: ModelProto) -> None:
    names = next(entry for entry in model.metadata_props if entry.key == "class_names")
    names.value = json.dumps(list(reversed(TASK.class_names)))


def test_other_class_names_are_an_error_and_missing_class_names_are_accepted(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"class 0 is fox in the model and ant in the images"):
        opened(tmp_path, edited(toy().candidate, other_order))
    assert opened(tmp_path, edited(toy().candidate, without_classes)).precision == "fp32"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda: foreign_model("N", side=9),
            "expected one input: uint8 .N, 8, 8, 3. or normalised float32.*--input-px",
        ),
        (lambda: b"text", "not an ONNX model"),
    ],
)
def test_a_file_that_cannot_be_run_is_an_error_of_one_line(
    tmp_path: Path, content: Callable[[], bytes], message: str
) -> None:
    with pytest.raises((UsageError, BundleError), match=message) as error:
        opened(tmp_path, content())
    assert "\n" not in str(error.value)


def test_a_file_with_another_number_of_classes_is_an_error_when_it_is_run(tmp_path: Path) -> None:
    task = TASK.model_copy(update={"class_names": TASK.class_names[:5]})
    model = open_model(write_file(tmp_path, foreign_model("N")), task)
    with pytest.raises(BundleError, match=r"has shape \[4, 6\] for 4 images, expected logits \[4, 5\]"):
        model.logits(toy().images[:4])


def test_images_are_resized_as_the_runs_and_bundles_among_the_models_state(tmp_path: Path) -> None:
    before, file = RECORDED / "demo", write_file(tmp_path, toy().candidate)
    assert common_resizing(file, file) == Resizing()
    for models in ((before, file), (file, RECORDED / "run"), (before, RECORDED / "run")):
        assert common_resizing(*models) == FULL_DECODING
    new = tmp_path / "run"
    shutil.copytree(RECORDED / "run", new)
    task = json.loads((new / "task.json").read_text())
    (new / "task.json").write_text(json.dumps({**task, "resizing": {"crop_ratio": 0.875}}))
    assert common_resizing(new, file) == Resizing(crop_ratio=0.875)
    with pytest.raises(UsageError, match=r"resized differently \(.*crop_ratio=0\.875.*as an ONNX file"):
        common_resizing(before, new)


def test_a_missing_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a run, a bundle nor an ONNX file"):
        open_model(tmp_path / "nothing", TASK)


def test_the_precision_is_read_from_the_file() -> None:
    model = onnx.load_model_from_string(foreign_model("N"))
    assert precision_of(model) == "fp32"
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((2, 2), np.float16), "weights"))
    assert precision_of(model) == "fp16"
    model.graph.node.append(helper.make_node("QuantizeLinear", ["x", "s"], ["q"]))
    assert precision_of(model) == "int8"
