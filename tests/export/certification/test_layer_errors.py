import copy
import functools

import numpy as np
import onnx
import pytest
import torch
from export_toys import TAIL_CLASSES, TASK, damaged, edited, toy
from numpy.typing import NDArray
from onnx import ModelProto
from quantise_toys import labelled_images, small_net, small_onnx

from export.certification.layer_errors import find_layer_errors, first_above_rounding
from export.conversion.fp16 import to_fp16
from export.conversion.fp32 import to_onnx
from export.conversion.graph import layers_of
from export.conversion.int8 import Int8Config, collect_ranges
from export.schema import LayerError

IMAGES = labelled_images(30, seed=7).images[:]


@functools.cache
def in_precision(precision: str, fp32: bytes) -> bytes:
    """Convert to another precision. The int8 ranges are those of the undamaged network."""
    if precision == "int8":
        source = collect_ranges(small_onnx(), labelled_images(120, seed=2).images[:])
        return type(source)(fp32, source.ranges, source.calibration).to_onnx_bytes(
            Int8Config("minmax", per_channel=True)
        )
    return to_fp16(fp32) if precision == "fp16" else fp32


def damaged_name(errors: tuple[LayerError, ...]) -> str | None:
    first = first_above_rounding(errors)
    return first.layer if first else None


def node_of(weight: str) -> str:
    nodes = onnx.load_model_from_string(small_onnx()).graph.node
    return next(node.name for node in nodes if weight in node.input)


def with_zero_channels(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    weight[:5] = 0
    return weight


PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])


@PRECISIONS
def test_a_correct_candidate_has_no_layer_above_rounding(precision: str) -> None:
    errors = find_layer_errors(small_onnx(), in_precision(precision, small_onnx()), IMAGES)
    assert damaged_name(errors) is None
    assert len(errors) >= 8
    # seven-bit weights have the coarsest rounding
    assert max(layer.error for layer in errors) < 0.1


@PRECISIONS
def test_a_damaged_weight_in_a_middle_layer_is_the_only_layer_found(precision: str) -> None:
    broken = damaged(small_onnx(), "network.second.0.weight", with_zero_channels)
    errors = find_layer_errors(small_onnx(), in_precision(precision, broken), IMAGES)
    assert damaged_name(errors) == node_of("network.second.0.weight")
    rounding = max(
        layer.error for layer in find_layer_errors(small_onnx(), in_precision(precision, small_onnx()), IMAGES)
    )
    assert [layer.layer for layer in errors if layer.error > 2 * rounding + 1e-6] == [
        node_of("network.second.0.weight")
    ]


@PRECISIONS
def test_damaged_rows_of_the_classifier_are_found(precision: str) -> None:
    def without_tail(weight: NDArray[np.float32]) -> NDArray[np.float32]:
        weight[TAIL_CLASSES] = 0
        return weight

    broken = damaged(small_onnx(), "network.classifier.weight", without_tail)
    errors = find_layer_errors(small_onnx(), in_precision(precision, broken), IMAGES)
    assert damaged_name(errors) == errors[-1].layer == node_of("network.classifier.weight")


def test_a_double_normalisation_is_found_before_the_first_weights() -> None:
    broken = damaged(small_onnx(), "scale", lambda scale: scale / 255)
    assert damaged_name(find_layer_errors(small_onnx(), broken, IMAGES)) == "node_mul"


def test_values_that_are_not_finite_give_a_finite_error() -> None:
    broken = damaged(small_onnx(), "network.first.0.weight", lambda weight: weight * np.nan)
    errors = find_layer_errors(small_onnx(), broken, IMAGES)
    assert damaged_name(errors) == node_of("network.first.0.weight")
    assert all(np.isfinite(layer.error) for layer in errors)


def test_layers_are_in_the_order_of_the_graph_with_their_operators() -> None:
    errors = find_layer_errors(small_onnx(), small_onnx(), IMAGES)
    assert [layer.operator for layer in errors] == [
        "Cast", "Mul", "Add", "Conv", "MaxPool", "Conv", "Conv", "Add", "Conv", "Conv", "ReduceMean", "Gemm",
    ]  # fmt: skip
    assert {layer.error for layer in errors} == {0.0}


def test_an_activation_function_belongs_to_the_layer_before_it() -> None:
    layers = layers_of(onnx.load_model_from_string(small_onnx()).graph)
    assert "Relu" not in {layer.node.op_type for layer in layers}
    assert "Clip" not in {layer.node.op_type for layer in layers}


def test_an_unrelated_file_has_no_matching_layers() -> None:
    assert find_layer_errors(small_onnx(), toy().candidate, IMAGES) == ()
    assert first_above_rounding(()) is None


def test_a_file_with_equal_names_and_other_shapes_has_no_matching_layers() -> None:
    class Wider(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 20, 3, padding=1)
            self.classifier = torch.nn.Linear(20, 6)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.classifier(torch.relu(self.conv(image)).mean((2, 3)))  # type: ignore[no-any-return]

    images = toy().images[:20]
    assert find_layer_errors(toy().candidate, to_onnx(Wider(), TASK), images) == ()


def test_renamed_layers_do_not_match() -> None:
    def rename(model: ModelProto) -> None:
        for node in model.graph.node:
            node.input[:] = [name.replace("getitem", "other") for name in node.input]
            node.output[:] = [name.replace("getitem", "other") for name in node.output]
        model.graph.ClearField("value_info")

    assert find_layer_errors(small_onnx(), edited(small_onnx(), rename), IMAGES) == ()


def test_if_all_weights_differ_the_first_layer_is_named() -> None:
    torch.manual_seed(5)
    network = copy.deepcopy(small_net())
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn_like(weight))
    errors = find_layer_errors(small_onnx(), to_onnx(network, TASK), IMAGES)
    assert damaged_name(errors) == node_of("network.stem.0.weight")
