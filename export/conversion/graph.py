"""Reading and editing ONNX graphs: the layers with weights, the users of a tensor, copies."""

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
    """A node with the activation that follows it, if nothing else uses it; runtimes compute the two as one.

    Attributes:
        node: What computes.
        output: The map that leaves.
    """

    node: NodeProto
    output: str


def layers_of(graph: GraphProto) -> list[Layer]:
    """The layers of a graph in its order."""
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
    """The nodes that multiply with weights, in the order of the graph; the last one is the classifier."""
    constant = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # weights may be stored as integers or in half precision
        if node.op_type in ("DequantizeLinear", "Cast") and node.input[0] in constant:
            constant.add(node.output[0])
    return [node for node in graph.node if node.op_type in WEIGHTED and constant.intersection(node.input)]


def users_of(nodes: Iterable[NodeProto]) -> dict[str, list[NodeProto]]:
    """For every tensor the nodes that read it."""
    users: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            users.setdefault(name, []).append(node)
    return users


def copy_of(message: Message) -> Message:
    """A message that stays when the model that it was in is emptied."""
    copied = type(message)()
    copied.CopyFrom(message)
    return copied
