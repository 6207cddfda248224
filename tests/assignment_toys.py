"""A model for which ONNX Runtime creates a node that computes a shape, and sessions with planted assignments."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, cast

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
SIZE_PX = 8


def model_with_a_dynamic_shape() -> onnx.ModelProto:
    """A network that computes the shape of a Reshape from the batch size.

    ONNX Runtime cancels the two Transpose nodes and inserts a Gather after Shape instead, which is not in this file.
    """
    weights = np.random.default_rng(0).normal(0, 0.2, (SIZE_PX * SIZE_PX * 3, 6)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["float"], "cast", to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["float"], ["planes"], "to_planes", perm=[0, 3, 1, 2]),
            helper.make_node("Relu", ["planes"], ["hidden"], "relu"),
            helper.make_node("Shape", ["hidden"], ["shape"], "shape"),
            helper.make_node("Slice", ["shape", "zero", "one"], ["batch"], "slice"),
            helper.make_node("Concat", ["batch", "rest"], ["flat_shape"], "concat", axis=0),
            helper.make_node("Transpose", ["hidden"], ["back"], "from_planes", perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", ["back", "flat_shape"], ["flat"], "reshape"),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"], "classifier"),
        ],
        "dynamic",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", SIZE_PX, SIZE_PX, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 6])],
        [
            numpy_helper.from_array(np.array([0], np.int64), "zero"),
            numpy_helper.from_array(np.array([1], np.int64), "one"),
            numpy_helper.from_array(np.array([-1], np.int64), "rest"),
            numpy_helper.from_array(weights, "weights"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model


class PlantedNode(NamedTuple):
    name: str
    op_type: str


class PlantedPart(NamedTuple):
    ep_name: str
    nodes: Sequence[PlantedNode]

    def get_nodes(self) -> Sequence[PlantedNode]:
        return self.nodes


class PlantedSession(NamedTuple):
    """The part of a session that says which provider runs which node."""

    parts: Sequence[PlantedPart]

    def get_provider_graph_assignment_info(self) -> Sequence[PlantedPart]:
        return self.parts


def assigned_nodes(content: bytes) -> list[PlantedNode]:
    """The nodes that ONNX Runtime assigns to providers, after it has rewritten the graph."""
    options = SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    session = InferenceSession(content, options, providers=[CPU])
    parts = session.get_provider_graph_assignment_info()
    return [PlantedNode(node.name, node.op_type) for part in parts for node in part.get_nodes()]


def cuda_session(content: bytes, on_cpu: Collection[str] | Callable[[PlantedNode], bool]) -> InferenceSession:
    """A session of a model that runs on CUDA, except the nodes with these operators."""
    chosen = on_cpu if callable(on_cpu) else lambda node: node.op_type in on_cpu
    parts = [PlantedPart(CPU if chosen(node) else CUDA, [node]) for node in assigned_nodes(content)]
    return cast(InferenceSession, PlantedSession(parts))
