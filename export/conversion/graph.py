"""Helpers for reading and editing ONNX graphs: find layers, nodes with weights and the users of a tensor."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
ACTIVATIONS = ("Relu", "Clip")
Message = TypeVar("Message", ModelProto, NodeProto, TensorProto)


@dataclass(frozen=True)
class Layer:
    """A node together with the activation that follows it, which runtimes compute as one operation.

    The activation belongs to the layer only if no other node reads the output of ``node``.

    Attributes:
        node: The node itself.
        output: Name of the layer's output tensor, after the activation.
    """

    node: NodeProto
    output: str


def layers_of(graph: GraphProto) -> list[Layer]:
    """List the layers of a graph, in the order of the graph."""
    users = users_of(graph.node)
    layers: list[Layer] = []
    absorbed: set[str] = set()
    for node in graph.node:
        if node.output[0] in absorbed:
            continue
        following = users.get(node.output[0], [])
        fused = len(following) == 1 and following[0].op_type in ACTIVATIONS and node.op_type not in ACTIVATIONS
        output = following[0].output[0] if fused else node.output[0]
        absorbed.add(output)
        layers.append(Layer(node, output))
    return layers


def weighted_nodes(graph: GraphProto) -> list[NodeProto]:
    """List the nodes that multiply by weights, in the order of the graph; the last one is the classifier."""
    constant = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # weights may be stored as integers or in half precision and converted first
        if node.op_type in ("DequantizeLinear", "Cast") and node.input[0] in constant:
            constant.add(node.output[0])
    return [node for node in graph.node if node.op_type in WEIGHTED and constant.intersection(node.input)]


def users_of(nodes: Iterable[NodeProto]) -> dict[str, list[NodeProto]]:
    """Map the name of each tensor to the nodes that read it."""
    users: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            users.setdefault(name, []).append(node)
    return users


def copy_of(message: Message) -> Message:
    """Copy a protobuf message, so that it stays valid when the model that contains it is cleared."""
    copied = type(message)()
    copied.CopyFrom(message)
    return copied
