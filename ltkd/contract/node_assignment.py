"""Which execution provider runs each node of an ONNX model, and whether the image stays on the requested one.

ONNX Runtime assigns nodes to the CPU if the requested provider has no kernel for them, which is not what was requested.
It also does so on purpose, which is harmless: a shape that depends on the batch size is computed on the CPU, because
providers read shapes there. The difference is whether the image flows through the node.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ltkd.contract.records import Record
from ltkd.errors import DeviceError

INPUT = "image"
SHAPE_OPERATORS = frozenset({"Shape", "Size"})
"""They read the shape of a tensor and not its values."""
CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""Their bodies may read any tensor of the graph without naming it as an input."""
_NUM_SHOWN = 3
_MODEL_GRAPH, _GRAPH_NODE = 7, 1  # field numbers in onnx.proto
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OPERATOR = 1, 2, 3, 4


class GraphNode(NamedTuple):
    """A node of an ONNX graph, with the names of the tensors that it reads and writes."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class AssignedNode(NamedTuple):
    """A node of the graph that ONNX Runtime runs, with the provider that runs it."""

    name: str
    operator: str
    provider: str


class NodeAssignment(Record):
    """Where the nodes of a model run.

    Attributes:
        num_nodes: Provider to its number of nodes, before each provider fuses its own.
        shape_nodes: The nodes on other providers than the requested one, as ``name (operator)``. They compute shapes.
    """

    num_nodes: dict[str, int]
    shape_nodes: tuple[str, ...] = ()


def check_assignment(
    assigned: Sequence[AssignedNode], provider: str, graphs: Sequence[Callable[[], Sequence[GraphNode]]]
) -> NodeAssignment:
    """Check that everything that an image flows through runs on the requested provider.

    Nodes are found in a graph by name and operator. A node that is in none of the graphs counts as one that the image
    flows through, because nothing is known about its inputs.

    Args:
        assigned: The nodes as ONNX Runtime assigned them.
        provider: The requested provider.
        graphs: Functions that read the model's graph, with its nodes in topological order. Usually the first one reads
            the model file and the second one the graph that ONNX Runtime made of it. A function is called only if
            there are nodes on other providers that the graphs before it do not explain.

    Raises:
        DeviceError: The image would flow through a node on another provider.
    """
    elsewhere = wrong = [node for node in assigned if node.provider != provider]
    for read in graphs:
        if wrong:
            shapes = _shape_nodes(read())
            wrong = [node for node in wrong if (node.name, node.operator) not in shapes]
    if wrong:
        more = f" and {len(wrong) - _NUM_SHOWN} more" if len(wrong) > _NUM_SHOWN else ""
        raise DeviceError(
            f"asked for {provider}, but {len(wrong)} of {len(assigned)} nodes compute with the image and would run on "
            f"{' and '.join(sorted({node.provider for node in wrong}))}: "
            f"{', '.join(_shown(node) for node in wrong[:_NUM_SHOWN])}{more}. The installed ONNX Runtime cannot run "
            "them there; choose another precision, or run the model on the CPU."
        )
    num_nodes = Counter(node.provider for node in assigned)
    return NodeAssignment(num_nodes=dict(num_nodes), shape_nodes=tuple(map(_shown, elsewhere)))


def read_graph(model: bytes | memoryview) -> list[GraphNode]:
    """Read the nodes of a valid ONNX file; weights are skipped. The service has no package that reads ONNX files.

    Args:
        model: The file, in the wire format of protocol buffers.
    """
    nodes = []
    for graph in _fields(memoryview(model), _MODEL_GRAPH):
        for node in _fields(graph, _GRAPH_NODE):
            name = "".join(_texts(node, _NODE_NAME))
            operator = "".join(_texts(node, _NODE_OPERATOR))
            nodes.append(GraphNode(name, operator, _texts(node, _NODE_INPUT), _texts(node, _NODE_OUTPUT)))
    return nodes


def _shape_nodes(graph: Sequence[GraphNode]) -> frozenset[tuple[str, str]]:
    """Name and operator of the nodes that no value of an image reaches; ambiguous names are left out."""
    flows = {INPUT}
    reached, others = set(), set()
    for node in graph:
        key = (node.name, node.operator)
        reads_values = node.operator not in SHAPE_OPERATORS
        if reads_values and (node.operator in CONTROL_FLOW or not flows.isdisjoint(node.inputs)):
            flows.update(node.outputs)
            reached.add(key)
        else:
            others.add(key)
    return frozenset(others - reached)


def _shown(node: AssignedNode) -> str:
    return f"{node.name or 'a node without a name'} ({node.operator})"


def _texts(message: memoryview, field: int) -> tuple[str, ...]:
    return tuple(str(text, "utf-8") for text in _fields(message, field))


def _fields(message: memoryview, wanted: int) -> Iterator[memoryview]:
    """The contents of a field that has a length, such as a text or a message, each time that it occurs."""
    at = 0
    while at < len(message):
        key, at = _integer(message, at)
        field, wire_type = key >> 3, key & 7
        if wire_type == 2:  # a length, then so many bytes
            length, at = _integer(message, at)
            if field == wanted:
                yield message[at : at + length]
            at += length
        elif wire_type == 0:
            _, at = _integer(message, at)
        else:  # 1 has 64 bits, 5 has 32
            at += 8 if wire_type == 1 else 4


def _integer(message: memoryview, at: int) -> tuple[int, int]:
    """A number of variable length, and the position after it."""
    number, shift = 0, 0
    while True:
        byte = message[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
