"""Locate the layers in which a candidate ONNX file differs from its reference.

Used when a gate fails, to name the layer that causes the difference. An activation is the output tensor of a layer.

Shape legend: N images, S side in pixels.
"""

from collections.abc import Mapping, Sequence
from statistics import median_low

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from export.conversion.graph import FLOAT, FLOAT16, WEIGHTED, copy_of, layers_of, users_of, weighted_nodes
from export.conversion.session import INPUT, open_session
from export.schema import LayerError

ROUNDING_SHARE = 1e-4
ROUNDING_FACTOR = 5
DAMAGED_SHARE = 0.5
MOST = 1e3
"""The largest error that is reported; it also stands for values that are not finite."""

Activation = NDArray[np.float32]


def find_layer_errors(reference: bytes, candidate: bytes, images_NSS3: NDArray[np.uint8]) -> tuple[LayerError, ...]:
    """Measure the error of every layer of a candidate when the layer gets the reference's activations as its input.

    Errors are therefore not passed on from layer to layer, and a damaged layer is found by itself. Layers are matched
    by the names of their activations. Activations that int8 stores as integers are compared as stored.

    Args:
        reference: A correct float32 ONNX file of the network.
        candidate: Another file of the same network, in any precision.
        images_NSS3: Some images.

    Returns:
        The errors in the order of the graph. Empty if the layers with weights do not match, because the candidate is
        another network or was exported with other names.
    """
    reference_model, candidate_model = onnx.load_model_from_string(reference), onnx.load_model_from_string(candidate)
    reference_weighted, candidate_weighted = (
        {node.output[0]: node.op_type for node in weighted_nodes(model.graph)}
        for model in (reference_model, candidate_model)
    )
    if not reference_weighted or reference_weighted != candidate_weighted:
        return ()
    types = _element_types(reference_model)
    in_candidate = {name for node in candidate_model.graph.node for name in node.output}
    layers = [
        layer
        for layer in layers_of(reference_model.graph)
        if layer.output in in_candidate and types[layer.output] == FLOAT
    ]
    activations = _compute(reference_model, [layer.output for layer in layers], {INPUT: images_NSS3})
    try:
        candidate_activations = _compute_layer_by_layer(candidate_model, activations, images_NSS3)
    except (
        Exception
    ):  # a dozen types: the candidate does not accept the reference's activations, so it is another network
        return ()
    return tuple(
        LayerError(
            layer=layer.node.name,
            operator=layer.node.op_type,
            error=_relative_error(activations[layer.output], activation),
        )
        for layer, activation in zip(layers, candidate_activations, strict=True)
    )


def first_above_rounding(errors: Sequence[LayerError]) -> LayerError | None:
    """Return the first layer whose error is larger than rounding explains, or None.

    Rounding errors depend on the precision, so the threshold is a multiple of the median error of the inner layers with
    weights, which are rounded most. A relative error above DAMAGED_SHARE always counts as damage.
    """
    inner = [layer.error for layer in errors if layer.operator in WEIGHTED][1:-1]
    usual = ROUNDING_FACTOR * median_low(inner) if inner else 0.0
    rounding = min(max(ROUNDING_SHARE, usual), DAMAGED_SHARE)
    return next((layer for layer in errors if layer.error > rounding), None)


def _compute_layer_by_layer(
    model: ModelProto, activations: Mapping[str, Activation], images_NSS3: NDArray[np.uint8]
) -> list[Activation]:
    """Compute each activation of a model from the given activations of the layers before. Modifies the model."""
    graph, types, users = model.graph, _element_types(model), users_of(model.graph.node)
    feeds: dict[str, NDArray[np.generic]] = {graph.input[0].name: images_NSS3}
    before: list[NodeProto] = []
    after: list[NodeProto] = []
    outputs = []
    for name, activation in activations.items():
        given, output, store_nodes = f"{name}.given", name, _copy_of_quantise_nodes(name, users)
        graph.input.append(helper.make_tensor_value_info(given, FLOAT, activation.shape))
        feeds[given] = activation
        if store_nodes:
            after += store_nodes
            output = store_nodes[-1].output[0]
        if types[name] == FLOAT16:
            before.append(helper.make_node("Cast", [given], [f"{given}.half"], to=FLOAT16))
            after.append(helper.make_node("Cast", [output], [f"{output}.float"], to=FLOAT))
            given, output = f"{given}.half", f"{output}.float"
        for node in users.get(name, []):
            node.input[:] = [given if input_name == name else input_name for input_name in node.input]
        outputs.append(output)
    nodes = [copy_of(node) for node in (*before, *graph.node, *after)]
    graph.ClearField("node")
    graph.node.extend(nodes)
    return list(_compute(model, outputs, feeds).values())


def _copy_of_quantise_nodes(name: str, users: Mapping[str, list[NodeProto]]) -> list[NodeProto]:
    """Copy the two nodes that store an activation as integers and convert it back; empty if it is not stored so."""
    for quantise in users.get(name, []):
        dequantise = [node for node in users.get(quantise.output[0], []) if node.op_type == "DequantizeLinear"]
        if quantise.op_type == "QuantizeLinear" and dequantise:
            quantise_copy, dequantise_copy = copy_of(quantise), copy_of(dequantise[0])
            quantise_copy.output[0] = dequantise_copy.input[0] = f"{name}.own.q"
            dequantise_copy.output[0] = f"{name}.own"
            return [quantise_copy, dequantise_copy]
    return []


def _compute(
    model: ModelProto, names: Sequence[str], feeds: Mapping[str, NDArray[np.generic]]
) -> dict[str, Activation]:
    """Compute float32 tensors of a model, by name."""
    model = copy_of(model)
    model.graph.ClearField("output")
    model.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in names)
    session = open_session(model.SerializeToString())
    return dict(zip(names, session.run(list(names), dict(feeds)), strict=True))


def _element_types(model: ModelProto) -> dict[str, int]:
    """The element type of each tensor that a node computes, by name."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}


def _relative_error(reference: Activation, candidate: Activation) -> float:
    """Root mean square of the difference, divided by that of the reference; at most MOST."""
    difference = candidate.astype(np.float64) - reference
    error, size = (float(np.sqrt(np.mean(values**2))) for values in (difference, reference.astype(np.float64)))
    if error == 0:
        return 0.0
    return min(error / size, MOST) if size > 0 and np.isfinite(error) else MOST
