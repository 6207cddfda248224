"""Convert an fp32 ONNX file to fp16: half the bytes, and much faster on GPUs with fp16 arithmetic.

Half precision has a largest value of 65,504 and eleven significant bits. Pixels are therefore normalised in float32,
and the classifier (a few thousandths of the computation) stays float32, because logits rounded to eleven bits would
tie. No value is clipped: a weight or an activation outside the range becomes infinite, and the gates detect it.
"""

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, helper, numpy_helper

from export.conversion.graph import FLOAT, FLOAT16, copy_of, weighted_nodes
from ltkd.errors import BundleError

FLOAT_OPERATORS = ("Resize", "Range", "CumSum", "RandomNormalLike", "RandomUniformLike", "RoiAlign", "TopK")
"""Operators with an input or output that has to be float32."""


def to_fp16(fp32: bytes) -> bytes:
    """Convert a float32 ONNX file to float16.

    The input, the metadata and the node names stay the same, and the logits are float32. Equal files give equal bytes.

    Raises:
        BundleError: The model has control flow.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(fp32), strict_mode=True)
    graph = model.graph
    with_graphs = (AttributeProto.GRAPH, AttributeProto.GRAPHS)
    if any(attribute.type in with_graphs for node in graph.node for attribute in node.attribute):
        raise BundleError(
            "the model has control flow, which cannot be converted to fp16; export without fp16: --precisions int8."
        )
    float_names = _float_tensors(graph)
    half = _half_nodes(graph, float_names)
    _store_weights_in_half(graph, half)
    _cast_between(graph, half, float_names)
    graph.ClearField("value_info")
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def _float_tensors(graph: GraphProto) -> set[str]:
    values = [*graph.input, *graph.output, *graph.value_info]
    return {value.name for value in values if value.type.tensor_type.elem_type == FLOAT} | {
        tensor.name for tensor in graph.initializer if tensor.data_type == FLOAT
    }


def _half_nodes(graph: GraphProto, float_names: set[str]) -> set[str]:
    """Find the nodes that compute in float16, from the first weights up to the classifier, by their first output."""
    weighted = [node.output[0] for node in weighted_nodes(graph)]
    if not weighted:
        return set()
    inside: set[str] = set()  # tensors that depend on the first weights but not on the classifier
    after = {weighted[-1]}
    half = set()
    for node in graph.node:
        inputs = float_names.intersection(node.input)
        if node.output[0] in after or inputs & after:
            after.update(node.output)
        elif node.output[0] in weighted or inputs & inside:
            inside.update(node.output)
            if node.op_type not in FLOAT_OPERATORS:
                half.add(node.output[0])
    return half


def _store_weights_in_half(graph: GraphProto, half: set[str]) -> None:
    """Store a weight in float16 if only float16 nodes read it."""
    in_half = {name for node in graph.node if node.output[0] in half for name in node.input}
    in_float = {name for node in graph.node if node.output[0] not in half for name in node.input}
    for tensor in graph.initializer:
        if tensor.data_type == FLOAT and tensor.name in in_half - in_float:
            with np.errstate(over="ignore"):
                weight = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))


def _cast_between(graph: GraphProto, half: set[str], float_names: set[str]) -> None:
    """Insert a Cast wherever a tensor passes from one precision to the other."""
    types = dict.fromkeys(float_names, int(FLOAT))
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer if tensor.name in float_names}
    nodes: list[NodeProto] = []
    casts: dict[str, NodeProto] = {}

    def cast_to(name: str, type_: int) -> str:
        if types.get(name, type_) == type_:
            return name
        cast_name = f"{name}_{'half' if type_ == FLOAT16 else 'float'}"
        if cast_name not in casts:
            casts[cast_name] = helper.make_node("Cast", [name], [cast_name], f"cast_{cast_name}", to=type_)
            nodes.append(casts[cast_name])
        return cast_name

    for node in graph.node:
        type_ = FLOAT16 if node.output[0] in half else FLOAT
        node.input[:] = [cast_to(name, type_) for name in node.input]
        types |= {name: type_ for name in node.output if name in float_names}
        if type_ == FLOAT16 and node.op_type == "Cast":
            (to,) = node.attribute
            to.i = FLOAT16 if to.i == FLOAT else to.i
        nodes.append(node)
    nodes = [copy_of(node) for node in nodes]
    graph.ClearField("node")
    graph.node.extend(nodes)
