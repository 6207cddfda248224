"""What an image flows through must run on the GPU; shapes may be computed elsewhere."""

import functools
from collections.abc import Callable

import onnx
import pytest
import torchvision
from assignment_toys import assigned_nodes, model_with_a_dynamic_shape
from export_toys import TASK, toy
from onnx import helper
from torch import nn

from export.conversion.fp16 import to_fp16
from export.conversion.fp32 import to_onnx
from ltkd.contract.node_assignment import (
    AssignedNode,
    GraphNode,
    NodeAssignment,
    check_assignment,
    read_graph,
)
from ltkd.errors import DeviceError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
SHAPE_OPERATORS = {"Shape", "Slice", "Concat"}
NETWORKS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "resnet18": (torchvision.models.resnet18, 32),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, 32),
    "vit_b_16": (functools.partial(torchvision.models.vit_b_16, image_size=32), 32),
    "swin_t": (torchvision.models.swin_t, 64),
}


def check(graph: list[GraphNode], nodes: list[AssignedNode]) -> NodeAssignment:
    return check_assignment(nodes, CUDA, [lambda: graph])


def planted(graph: list[GraphNode], *on_cpu: str) -> list[AssignedNode]:
    return [AssignedNode(node.name, node.operator, CPU if node.name in on_cpu else CUDA) for node in graph]


def test_the_graph_that_is_read_is_that_of_the_onnx_package() -> None:
    for content in (toy().candidate, to_fp16(toy().candidate), model_with_a_dynamic_shape().SerializeToString()):
        expected = [
            GraphNode(node.name, node.op_type, tuple(node.input), tuple(node.output))
            for node in onnx.load_model_from_string(content).graph.node
        ]
        assert read_graph(content) == expected != []


def test_nodes_that_only_compute_a_shape_may_run_on_the_cpu_and_are_listed() -> None:
    graph = read_graph(model_with_a_dynamic_shape().SerializeToString())
    assert check(graph, planted(graph)) == NodeAssignment(num_nodes={CUDA: 9})
    assert check(graph, planted(graph, "slice", "concat")) == NodeAssignment(
        num_nodes={CUDA: 7, CPU: 2}, shape_nodes=("slice (Slice)", "concat (Concat)")
    )
    assert check(graph, planted(graph, "shape", "slice", "concat")).num_nodes == {CUDA: 6, CPU: 3}


@pytest.mark.parametrize("name", ["cast", "to_planes", "relu", "from_planes", "reshape", "classifier"])
def test_a_node_that_the_image_flows_through_must_run_on_cuda(name: str) -> None:
    graph = read_graph(model_with_a_dynamic_shape().SerializeToString())
    with pytest.raises(
        DeviceError, match=rf"1 of 9 nodes compute with the image .* on CPUExecutionProvider: {name} \("
    ):
        check(graph, planted(graph, name, "slice"))


def test_the_error_has_one_line_and_names_the_first_nodes() -> None:
    graph = read_graph(model_with_a_dynamic_shape().SerializeToString())
    with pytest.raises(DeviceError) as error:
        check(graph, planted(graph, *(node.name for node in graph)))
    message = str(error.value)
    assert "cast (Cast), to_planes (Transpose), relu (Relu) and 3 more" in message and "\n" not in message


def test_a_node_that_is_in_no_graph_or_has_an_ambiguous_name_is_refused_on_the_cpu() -> None:
    graph = read_graph(model_with_a_dynamic_shape().SerializeToString())
    for extra in (AssignedNode("Gather", "Gather", CPU), AssignedNode("shape", "Conv", CPU)):
        with pytest.raises(DeviceError, match=rf"{extra.name} \({extra.operator}\)"):
            check(graph, [*planted(graph), extra])
    nameless = [GraphNode("", "Mul", ("image", "x"), ("y",)), GraphNode("", "Mul", ("z", "z"), ("z2",))]
    with pytest.raises(DeviceError, match=r"a node without a name \(Mul\)"):
        check(nameless, [AssignedNode("", "Mul", CUDA), AssignedNode("", "Mul", CPU)])


def test_control_flow_counts_as_reading_the_image_because_its_body_may() -> None:
    graph = [
        GraphNode("if", "If", ("condition",), ("branch",)),
        GraphNode("add", "Add", ("branch", "one"), ("logits",)),
    ]
    for name in ("if", "add"):
        with pytest.raises(DeviceError, match=name):
            check(graph, planted(graph, name))


def test_the_graph_is_read_only_if_a_node_runs_elsewhere_and_a_further_one_only_for_nodes_not_in_the_first() -> None:
    graph = read_graph(model_with_a_dynamic_shape().SerializeToString())
    calls: list[str] = []

    def first() -> list[GraphNode]:
        calls.append("file")
        return graph

    def second() -> list[GraphNode]:
        calls.append("rewritten")
        return [*graph, GraphNode("Gather", "Gather", ("shape", "order"), ("sizes",))]

    check_assignment(planted(graph), CUDA, [first, second])
    assert calls == []
    check_assignment(planted(graph, "slice"), CUDA, [first, second])
    assert calls == ["file"]
    check_assignment([*planted(graph, "slice"), AssignedNode("Gather", "Gather", CPU)], CUDA, [first, second])
    assert calls == ["file", "file", "rewritten"]


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_the_rule_holds_for_the_graphs_of_real_networks_with_a_dynamic_batch(network: str) -> None:
    build, size_px = NETWORKS[network]
    content = to_onnx(build(num_classes=6), TASK.model_copy(update={"input_px": size_px}))
    graph = read_graph(content)
    nodes = [AssignedNode(node.name, node.op_type, CUDA) for node in assigned_nodes(content)]
    floats = _float_tensors(content)
    shapes = [node for node in graph if node.operator in SHAPE_OPERATORS and not floats.intersection(node.outputs)]
    shape_names = {node.name for node in shapes} & {node.name for node in nodes}

    def moved(*names: str) -> list[AssignedNode]:
        return [node._replace(provider=CPU) if node.name in names else node for node in nodes]

    assert check(graph, nodes) == NodeAssignment(num_nodes={CUDA: len(nodes)})
    assert len(check(graph, moved(*shape_names)).shape_nodes) == len(shape_names)
    assert (network == "vit_b_16") == bool(shape_names)  # it computes shapes from the batch size; the others do not
    operators = {"Conv", "Softmax", "Cast", "MatMul", "Gemm", "LayerNormalization", "Reshape", "Relu", "HardSigmoid"}
    on_path = [node for node in nodes if node.operator in operators]
    assert {"Conv", "Cast"} <= {node.operator for node in on_path}
    assert ("Softmax" in {node.operator for node in on_path}) == (network in ("vit_b_16", "swin_t"))
    last_of_each = {node.operator: node for node in on_path}.values()
    first_of_each = {node.operator: node for node in reversed(on_path)}.values()
    for node in (*first_of_each, *last_of_each):
        with pytest.raises(DeviceError, match=rf"\({node.operator}\)"):
            check(graph, moved(node.name, *shape_names))


def _float_tensors(content: bytes) -> set[str]:
    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(content))
    float_types = (helper.TensorProto.FLOAT, helper.TensorProto.BOOL)
    return {value.name for value in model.graph.value_info if value.type.tensor_type.elem_type in float_types}
