"""Write the int8 form of an fp32 ONNX file, with pairs of QuantizeLinear and DequantizeLinear nodes.

Activations are unsigned and weights are signed, the combination that ONNX Runtime multiplies fastest on x86. Weights
use seven bits, -64 to 64: a processor without VNNI adds two products in 16 bits, which eight-bit weights would
overflow, so the same file would give different logits on different machines. The pixels, the first layer with weights
and the classifier are computed in float32.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.conversion.graph import copy_of, layers_of, weighted_nodes
from export.conversion.int8_ranges import Range, scale_of

WEIGHT_LIMIT = 64
BIAS_LIMIT = 2**30
LARGEST_HALF = 65_504
MOVING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")
"""Operators that do not change values, so the output keeps the scale of the input."""
COMBINING = ("Add", "Concat", "AveragePool")
"""Operators that compute with integers if all their inputs are integers."""


@dataclass(frozen=True)
class Int8Plan:
    """Which parts of a graph are stored as integers and computed with integers.

    Attributes:
        layers: Names of the nodes whose weights are stored as integers.
        nodes: First outputs of all nodes that compute with integers.
        stored: Activations that are stored as integers, each mapped to the activation whose range it uses (usually
            itself).
        always: The stored activations that a node in ``nodes`` computes. All nodes that read them read the integers.
    """

    layers: tuple[str, ...]
    nodes: frozenset[str]
    stored: Mapping[str, str]
    always: frozenset[str]


def plan_quantisation(graph: GraphProto, float_layers: Collection[str] = ()) -> Int8Plan:
    """Decide which parts of a float32 graph become integers.

    Args:
        graph: Its batch normalisation must be folded into the convolutions.
        float_layers: Names of nodes that stay float, in addition to the first node with weights and the classifier.
    """
    inner = weighted_nodes(graph)[1:-1]
    layers = [node for node in inner if node.name not in float_layers and _has_integer_kernel(graph, node)]
    stored = {node.input[0]: node.input[0] for node in layers}
    names, nodes, always = {node.name for node in layers}, set(), set()
    for layer in layers_of(graph):
        node, output = layer.node, layer.output
        if node.name in names or (node.op_type in COMBINING and all(name in stored for name in node.input)):
            stored[output] = output
        elif node.op_type in MOVING and node.input[0] in always and output == node.output[0]:
            stored[output] = stored[node.input[0]]
        else:
            continue
        nodes.add(node.output[0])
        always.add(output)
    return Int8Plan(tuple(node.name for node in layers), frozenset(nodes), stored, frozenset(always))


def quantise(
    fp32: bytes,
    ranges: Mapping[str, Range],
    *,
    per_channel: bool,
    float_layers: Collection[str] = (),
    weight_limit: int = WEIGHT_LIMIT,
) -> ModelProto:
    """Store weights and activations as integers.

    Args:
        fp32: The ONNX file.
        ranges: The range of each activation that the plan stores.
        per_channel: Whether each output channel has its own scale.
        float_layers: As in ``plan_quantisation``.
        weight_limit: The largest integer weight; above 64, sums saturate on some processors.
    """
    model = onnx.load_model_from_string(fp32)
    plan = plan_quantisation(model.graph, float_layers)
    scales = {name: scale_of(ranges[source]) for name, source in plan.stored.items()}
    _Writer(model.graph, plan, scales, per_channel=per_channel, weight_limit=weight_limit).write()
    return model


class _Writer:
    """Rewrites the nodes of a graph. New names are short: in a small network they are a tenth of the file."""

    def __init__(
        self,
        graph: GraphProto,
        plan: Int8Plan,
        scales: Mapping[str, tuple[np.float32, np.uint8]],
        *,
        per_channel: bool,
        weight_limit: int,
    ) -> None:
        self.graph, self.plan, self.scales = graph, plan, scales
        self.per_channel, self.weight_limit = per_channel, weight_limit
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.float_layers = {node.name for node in weighted_nodes(graph)} - set(plan.layers)
        self.nodes: list[NodeProto] = []
        self.new_tensors: dict[str, TensorProto] = {}

    def write(self) -> None:
        """Replace the nodes and tensors of the graph."""
        for node in self.graph.node:
            integers = node.output[0] in self.plan.nodes
            source, outputs = node.input[0] if node.input else "", list(node.output)
            for place, name in enumerate(node.input):
                if name in self.plan.always or (integers and name in self.plan.stored):
                    node.input[place] = f"{name}.dq"
            if node.name in self.plan.layers:
                self._quantise_weights(node, float(self.scales[source][0]))
            elif node.name in self.float_layers:
                self._store_weights_in_half(node)
            self.nodes.append(node)
            if node.op_type == "MaxPool" and not integers:
                self._insert_relu_after(node)
            for name in outputs:
                self._quantise_activation(name)
        nodes = [copy_of(node) for node in self.nodes]
        read = {name for node in nodes for name in node.input}
        tensors = [copy_of(tensor) for name, tensor in {**self.weights, **self.new_tensors}.items() if name in read]
        for field in ("node", "initializer", "value_info"):
            self.graph.ClearField(field)
        self.graph.node.extend(nodes)
        self.graph.initializer.extend(tensors)

    def _quantise_activation(self, name: str) -> None:
        if name not in self.plan.stored:
            return
        scale, zero = self.scales[name]
        parameters = [self._tensor(f"{name}.s", np.array(scale)), self._tensor(f"{name}.z", np.array(zero))]
        self.nodes += [
            helper.make_node("QuantizeLinear", [name, *parameters], [f"{name}.q"]),
            helper.make_node("DequantizeLinear", [f"{name}.q", *parameters], [f"{name}.dq"]),
        ]

    def _insert_relu_after(self, pool: NodeProto) -> None:
        """Insert a Relu between a float pool and the QuantizeLinear of its output, if no value is negative.

        ONNX Runtime would otherwise swap the two nodes. It would quantise four times as many values and pool integers,
        which is ten times slower than pooling floats. It does not move QuantizeLinear past a Relu.
        """
        name = pool.output[0]
        if name in self.scales and self.scales[name][1] == 0:
            pool.output[0] = f"{name}.p"
            self.nodes.append(helper.make_node("Relu", [f"{name}.p"], [name]))

    def _quantise_weights(self, node: NodeProto, input_scale: float) -> None:
        """Store weights as int8, and the bias as int32 with the scale of the products that it is added to."""
        weight = numpy_helper.to_array(self.weights[node.input[1]])
        bias = numpy_helper.to_array(self.weights[node.input[2]]) if len(node.input) > 2 else None
        axis = _channel_axis(node)
        highest_K = np.abs(weight).max(axis=tuple(other for other in range(weight.ndim) if other != axis))
        scale_K = highest_K.astype(np.float64) / self.weight_limit
        if bias is not None:  # in a channel of tiny weights, the scale must be large enough for the bias to fit
            scale_K = np.maximum(scale_K, np.abs(bias) / (input_scale * BIAS_LIMIT))
        if not self.per_channel:
            scale_K = np.full_like(scale_K, scale_K.max())
        scale_K = np.where(scale_K > 0, scale_K, 1).astype(np.float32)
        shape = [-1 if other == axis else 1 for other in range(weight.ndim)]
        steps = np.rint(weight / scale_K.reshape(shape)).astype(np.int8)
        node.input[1] = self._integers(f"{node.output[0]}.w", steps, scale_K, axis)
        if bias is not None:
            bias_scale_K = scale_K * np.float32(input_scale)
            bias_steps_K = np.rint(bias / bias_scale_K).astype(np.int32)
            node.input[2] = self._integers(f"{node.output[0]}.b", bias_steps_K, bias_scale_K, 0)

    def _store_weights_in_half(self, node: NodeProto) -> None:
        """Store float weights in float16 to halve their size; the node still computes in float32."""
        for place, name in enumerate(node.input):
            weight = numpy_helper.to_array(self.weights[name]) if name in self.weights else np.zeros(0)
            if weight.ndim > 1 and np.abs(weight).max() <= LARGEST_HALF:
                self._tensor(f"{name}.h", weight.astype(np.float16))
                self.nodes.append(helper.make_node("Cast", [f"{name}.h"], [f"{name}.f"], to=TensorProto.FLOAT))
                node.input[place] = f"{name}.f"

    def _integers(self, name: str, steps: NDArray[np.signedinteger], scale_K: NDArray[np.float32], axis: int) -> str:
        scale = scale_K if self.per_channel else scale_K[0]
        inputs = [self._tensor(f"{name}.q", steps), self._tensor(f"{name}.s", np.asarray(scale))]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.dq"], axis=axis))
        return f"{name}.dq"

    def _tensor(self, name: str, values: NDArray[np.generic]) -> str:
        self.new_tensors[name] = numpy_helper.from_array(values, name)
        return name


def _has_integer_kernel(graph: GraphProto, node: NodeProto) -> bool:
    """Whether ONNX Runtime can compute a node with weights in integers."""
    constant = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    if any(name not in constant for name in node.input[1:]) or node.input[0] in constant:
        return False
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "Gemm":
        return attributes.get("alpha", 1) == 1 and attributes.get("beta", 1) == 1 and not attributes.get("transA", 0)
    return node.op_type == "Conv" or (node.op_type == "MatMul" and constant[node.input[1]] == 2)


def _channel_axis(node: NodeProto) -> int:
    """The axis of the weights that indexes output channels."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1
