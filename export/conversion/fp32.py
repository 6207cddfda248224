"""Convert a PyTorch network and its task to one self-contained fp32 ONNX file: uint8 pixels in, logits out.

The modules fp16 and int8 start from this file.

Shape legend: N images (dynamic), S side in pixels, C classes.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import onnx
import torch
import torch.nn.functional as F
from onnx import AttributeProto, GraphProto, ModelProto
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from export.conversion.session import INPUT, OUTPUT, model_metadata
from ltkd.contract.task import Task
from ltkd.models.registry import Normalise

OPSET, IR_VERSION = 18, 10
BATCH = "N"


def to_onnx(network: nn.Module, task: Task) -> bytes:
    """Convert a network to ONNX with its preprocessing in the graph.

    The input is ``image``, uint8 [N, S, S, 3]; the output is ``logits``, float32 [N, C]. Equal networks give equal
    bytes, and the file contains no paths of this machine. The network is not modified: a copy is moved to the CPU and
    put into evaluation mode.

    Args:
        network: Takes normalised float32 [N, 3, S, S] and returns logits [N, C].
        task: Its preprocessing is written into the graph, its classes into the metadata.

    Raises:
        torch.onnx.OnnxExporterError: The network cannot be traced; the traceback names the line in its code.
        onnx.checker.ValidationError: The exporter wrote an invalid model.
    """
    pixels_to_logits = PixelsToLogits(copy.deepcopy(network).cpu().float(), task).eval()
    two_images = torch.zeros(2, task.input_px, task.input_px, 3, dtype=torch.uint8)
    program = torch.onnx.export(
        pixels_to_logits,
        (two_images,),
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: BATCH},),
        external_data=False,
        verbose=False,
    )
    assert program is not None
    model = program.model_proto
    model.ir_version = IR_VERSION
    _strip(model)
    onnx.helper.set_model_props(model, model_metadata(task))
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


class PixelsToLogits(Normalise):
    """A network that applies its own preprocessing to uint8 pixels."""

    def __init__(self, network: nn.Module, task: Task) -> None:
        super().__init__(task)
        self.network = network

    def forward(self, pixels_NSS3: Tensor) -> Tensor:
        """Compute raw logits [N, C] from uint8 pixels."""
        normalised_N3SS = super().forward(pixels_NSS3)
        with _PlainPooling():
            logits_NC: Tensor = self.network(normalised_N3SS)
        return logits_NC


class _PlainPooling(TorchFunctionMode):
    """Replaces adaptive pooling to one pixel by the equivalent mean.

    With a dynamic batch, torch exports adaptive pooling followed by flatten as an emulation of strides, which
    quantisation tools do not support.
    """

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Tensor:
        if func is F.adaptive_avg_pool2d:
            image, size = [*args, *(kwargs or {}).values()]
            if isinstance(image, Tensor) and size in (1, (1, 1), [1, 1]):
                return image.mean((2, 3), keepdim=True)
        return func(*args, **(kwargs or {}))


def _strip(model: ModelProto) -> None:
    """Remove what the exporter recorded about the source code: stack traces with local paths and module names."""
    model.doc_string = ""
    del model.metadata_props[:]
    _strip_graph(model.graph)


def _strip_graph(graph: GraphProto) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:]
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    for node in graph.node:
        _strip_node(node)


def _strip_node(node: onnx.NodeProto) -> None:
    node.doc_string = ""
    del node.metadata_props[:]
    for attribute in node.attribute:
        attribute.doc_string = ""
        if attribute.type == AttributeProto.GRAPH:
            _strip_graph(attribute.g)
        for graph in attribute.graphs:
            _strip_graph(graph)
