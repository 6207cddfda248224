"""The candidate: what it says of itself; read defensively, opened on a named provider, run in batches.

Shape legend: N images, S side in pixels, C classes.
"""

import json

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto
from onnxruntime import InferenceSession, SessionOptions

from ltkd.errors import BundleError, DeviceError, ImageError
from ltkd.files import Images
from ltkd.task import Task

CPU = "CPUExecutionProvider"
INPUT, OUTPUT = "image", "logits"
DOMAINS = ("", "ai.onnx")
MAX_BYTES = 1_000_000_000
BATCH_SIZE = 256


def model_metadata(task: Task) -> dict[str, str]:
    """What the ONNX file says of itself, as JSON texts: enough to use it without the bundle around it."""
    facts = {
        "class_names": task.class_names,
        "train_counts": task.train_counts,
        "groups": task.groups.model_dump(mode="json"),
        "preprocessing": {
            "outside": f"decode to RGB, centre square, resize to {task.input_px} x {task.input_px}",
            "inside": {"scale": "1/255", "mean": task.mean, "std": task.std},
        },
    }
    return {key: json.dumps(fact, ensure_ascii=False) for key, fact in facts.items()}


def read_model(content: bytes) -> ModelProto:
    """Read an ONNX file that may come from anywhere, and check it, before any runtime sees it.

    Raises:
        BundleError: It is no ONNX model, too large, not self-contained, invalid, or uses unknown operators.
    """
    if len(content) > MAX_BYTES:
        raise BundleError(
            f"the model has {len(content):,} bytes, at most {MAX_BYTES:,} are read; export a smaller one."
        )
    try:
        model = onnx.load_model_from_string(content)
    except Exception as reason:  # the parser's own error type differs between protobuf backends
        raise BundleError(f"the file is no ONNX model ({_first_line(reason)}); export again.") from None
    outside = [tensor.name for tensor in tensors_of(model.graph) if tensor.data_location == TensorProto.EXTERNAL]
    if outside:
        raise BundleError(f"the weight {outside[0]} lies outside the model file; export with external_data=False.")
    own = {function.domain for function in model.functions}
    unknown = sorted(({opset.domain for opset in model.opset_import} - set(DOMAINS)) | own)
    if unknown:
        raise BundleError(f"the model uses operators of {unknown}; only those of standard ONNX are taken.")
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as reason:
        raise BundleError(f"the ONNX checker refuses the model ({_first_line(reason)}); export again.") from None
    return model


def open_session(content: bytes) -> InferenceSession:
    """Open a model on the CPU, with every node of it there.

    Raises:
        BundleError: ONNX Runtime cannot open the model.
        DeviceError: ONNX Runtime put a node elsewhere.
    """
    options = SessionOptions()
    options.log_severity_level = 4  # its errors arrive as exceptions; on the console they would be told twice
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = InferenceSession(content, options, providers=[CPU])
    except Exception as reason:  # ONNX Runtime has a dozen error types and no parent for them
        raise BundleError(f"ONNX Runtime cannot open the model ({_first_line(reason)}); export again.") from None
    elsewhere = {part.ep_name for part in session.get_provider_graph_assignment_info()} - {CPU}
    if elsewhere:
        raise DeviceError(f"asked for {CPU}, but ONNX Runtime put nodes on {', '.join(elsewhere)}; install it anew.")
    return session


def run(session: InferenceSession, images: Images, batch_size: int = BATCH_SIZE) -> NDArray[np.float32]:
    """Logits [N, C] of any number of images, of which one batch at a time is in memory.

    Raises:
        BundleError: The model opens but does not run on these images.
    """
    starts = range(0, len(images), batch_size)
    try:
        return np.concatenate([session.run([OUTPUT], {INPUT: images[at : at + batch_size]})[0] for at in starts])
    except ImageError:  # a file that became unreadable is not the model's fault
        raise
    except Exception as reason:  # as above
        sizes = sorted({min(batch_size, len(images) - at) for at in starts})
        raise BundleError(f"the model does not run on batches of {sizes} images ({_first_line(reason)}).") from None


def runtime_version() -> str:
    """Version of the ONNX Runtime at work; its package has one of several names."""
    return str(onnxruntime.__version__)


def tensors_of(graph: GraphProto) -> list[TensorProto]:
    """Every tensor of a graph, those in attributes and subgraphs too."""
    found = list(graph.initializer)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        found += [attribute.t, *attribute.tensors]
        for subgraph in (attribute.g, *attribute.graphs):
            found += tensors_of(subgraph)
    return found


def _first_line(reason: Exception) -> str:
    return str(reason).strip().partition("\n")[0][:200]
