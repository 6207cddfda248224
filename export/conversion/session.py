"""Open ONNX models and run them: metadata, validation, ONNX Runtime sessions on a named provider, batches.

The converters write the metadata defined here. The gates, ``ltkd parity`` and ``ltkd verify`` read and run models
through this module.

Shape legend: N images, S side in pixels, C classes.
"""

import contextlib
import io
import json
import re
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto, helper
from onnxruntime import InferenceSession, SessionOptions

from ltkd.contract.node_assignment import AssignedNode, GraphNode, check_assignment, read_graph
from ltkd.contract.preprocessing import FULL_DECODING
from ltkd.contract.resources import num_cores
from ltkd.contract.task import Task
from ltkd.data.image_files import Images
from ltkd.errors import BundleError, DeviceError, ImageError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
INPUT, OUTPUT = "image", "logits"
DOMAINS = ("", "ai.onnx")
MAX_BYTES = 1_000_000_000
BATCH_SIZE = 256
_FATAL_ONLY = 4  # ONNX Runtime raises errors as exceptions; logging them too would report them twice
INSTRUCTION_SETS = {  # names of the kernel's flags, fastest at int8 first
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512bw": "avx512",
    "avx2": "avx2",
    "i8mm": "i8mm",
    "asimddp": "dotprod",
}


def model_metadata(task: Task) -> dict[str, str]:
    """Build the metadata of an ONNX file as JSON texts: all that is needed to use the file without its bundle."""
    stated = {} if task.resizing == FULL_DECODING else {"resizing": task.resizing.model_dump(mode="json")}
    entries = {
        "class_names": task.class_names,
        "train_counts": task.train_counts,
        "groups": task.groups.model_dump(mode="json"),
        "preprocessing": {
            "outside": f"decode to RGB, centre square, resize to {task.input_px} x {task.input_px}",
            **stated,
            "inside": {"scale": "1/255", "mean": task.mean, "std": task.std},
        },
    }
    return {key: json.dumps(entry, ensure_ascii=False) for key, entry in entries.items()}


def read_model(content: bytes) -> ModelProto:
    """Parse and validate an untrusted ONNX file, before any runtime opens it.

    Raises:
        BundleError: The file is not an ONNX model, or it is too large, not self-contained, invalid, or uses unknown
            operators.
    """
    if len(content) > MAX_BYTES:
        raise BundleError(
            f"the model has {len(content):,} bytes, but at most {MAX_BYTES:,} are accepted; export a smaller one."
        )
    try:
        model = onnx.load_model_from_string(content)
    except Exception as reason:  # the parser's own error type differs between protobuf backends
        raise BundleError(f"the file is not an ONNX model ({_first_line(reason)}); export again.") from None
    external = [tensor.name for tensor in tensors_of(model.graph) if tensor.data_location == TensorProto.EXTERNAL]
    if external:
        raise BundleError(
            f"the weight {external[0]} is stored outside the model file; export with external_data=False."
        )
    function_domains = {function.domain for function in model.functions}
    unknown = sorted(({opset.domain for opset in model.opset_import} - set(DOMAINS)) | function_domains)
    if unknown:
        raise BundleError(
            f"the model uses operators of the domains {unknown}; only standard ONNX operators are accepted."
        )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as reason:
        raise BundleError(f"the ONNX checker rejects the model ({_first_line(reason)}); export again.") from None
    return model


def open_session(content: bytes, provider: str = CPU, *, tf32: bool = False) -> InferenceSession:
    """Open a model on a provider that computes everything that an image flows through.

    On CUDA, nodes that only compute shapes may run on the CPU (ltkd.contract.node_assignment).

    Args:
        content: The ONNX file.
        provider: CPU or CUDA.
        tf32: On CUDA, whether float32 may be shortened to TF32. Certification does not allow it.

    Raises:
        BundleError: ONNX Runtime cannot open the model.
        DeviceError: The provider does not work here, or an image would flow through a node on another provider.
    """
    if provider not in (CPU, CUDA):
        raise DeviceError(f"the provider '{provider}' is not supported; choose {CPU} or {CUDA}.")
    options = _session_options()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider == CUDA:
        session = _create_cuda_session(content, options, tf32=tf32)
    else:
        session = _create_session(content, options, CPU, {})
    check_provider(session, provider, content)
    return session


def check_provider(session: InferenceSession, provider: str, content: bytes) -> None:
    """Check that a session computes everything that an image flows through on the requested provider.

    Raises:
        DeviceError: It does not.
    """
    assigned = [
        AssignedNode(node.name, node.op_type, part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    check_assignment(assigned, provider, (lambda: read_graph(content), lambda: _rewritten_graph(content)))


def require_cuda() -> None:
    """Open a small model on CUDA.

    Raises:
        DeviceError: ONNX Runtime cannot run it there.
    """
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in (INPUT, OUTPUT)]
    graph = helper.make_graph([helper.make_node("Relu", [INPUT], [OUTPUT])], "relu", value[:1], value[1:])
    smallest = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    open_session(smallest.SerializeToString(), CUDA)


def cuda_works() -> bool:
    """Test whether ONNX Runtime can run a model on CUDA here."""
    try:
        require_cuda()
    except DeviceError:
        return False
    return True


def _create_cuda_session(content: bytes, options: SessionOptions, *, tf32: bool) -> InferenceSession:
    if CUDA not in onnxruntime.get_available_providers():
        raise _no_cuda("the installed ONNX Runtime was built without CUDA")
    onnxruntime.set_default_logger_severity(_FATAL_ONLY)  # the provider would log missing libraries
    missing = _preload_cuda_libraries()
    try:
        settings = {"use_tf32": str(int(tf32)), "cudnn_conv_algo_search": "HEURISTIC"}
        session = _create_session(content, options, CUDA, settings)
    except BundleError:
        open_session(content)  # raises if the model does not open on the CPU either, so CUDA is not the cause
        raise _no_cuda(missing or "ONNX Runtime cannot open the model there") from None
    if session.get_providers()[0] != CUDA:
        raise _no_cuda(missing or "its CUDA provider did not load")
    return session


def _session_options() -> SessionOptions:
    options = SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    options.intra_op_num_threads = num_cores()
    options.inter_op_num_threads = 1
    return options


def _rewritten_graph(content: bytes) -> list[GraphNode]:
    """Read the graph whose nodes ONNX Runtime assigns: after its basic optimisations, which create nodes."""
    options = _session_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        options.optimized_model_filepath = str(path)
        _create_session(content, options, CPU, {})
        return read_graph(path.read_bytes())


def _preload_cuda_libraries() -> str:
    """Load the CUDA libraries that are installed as Python packages, and name the first that is missing."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        onnxruntime.preload_dlls()
    return next((line.rstrip(".") for line in output.getvalue().splitlines() if line.startswith("Failed to load")), "")


def _create_session(
    content: bytes, options: SessionOptions, provider: str, settings: dict[str, str]
) -> InferenceSession:
    try:
        session = InferenceSession(content, options, providers=[(provider, settings)], enable_fallback=0)
    except Exception as reason:  # ONNX Runtime has a dozen error types without a common base class
        raise BundleError(f"ONNX Runtime cannot open the model ({_first_line(reason)}); export again.") from None
    session.disable_fallback()
    return session


def _no_cuda(cause: str) -> DeviceError:
    return DeviceError(
        f"asked for {CUDA}, but it does not work here: {cause}. It needs an NVIDIA GPU, onnxruntime-gpu (without "
        "onnxruntime installed beside it) and the CUDA and cuDNN libraries that it was built for."
    )


def instruction_set(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name the vector instructions with which this machine computes int8; ``unknown`` if they cannot be read."""
    try:
        match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:  # the file does not exist on macOS and Windows
        match = None
    flags = set(match[1].split()) if match else set()
    return next((name for flag, name in INSTRUCTION_SETS.items() if flag in flags), "unknown")


def run(session: InferenceSession, images: Images, batch_size: int = BATCH_SIZE) -> NDArray[np.float32]:
    """Compute logits [N, C] of any number of images, with one batch in memory at a time.

    Raises:
        BundleError: The model opens but does not run on these images.
    """
    starts = range(0, len(images), batch_size)
    try:
        batches = (images[start : start + batch_size] for start in starts)
        return np.concatenate([session.run([OUTPUT], {INPUT: images_NSS3})[0] for images_NSS3 in batches])
    except ImageError:  # an image file became unreadable, which is not an error of the model
        raise
    except Exception as reason:  # ONNX Runtime, as above
        sizes = sorted({min(batch_size, len(images) - start) for start in starts})
        raise BundleError(f"the model does not run on batches of {sizes} images ({_first_line(reason)}).") from None


def runtime_version() -> str:
    """Return the version of ONNX Runtime in use, whose package has one of several names."""
    return str(onnxruntime.__version__)


def tensors_of(graph: GraphProto) -> list[TensorProto]:
    """List every tensor of a graph, including those in attributes and subgraphs."""
    found = list(graph.initializer)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        found += [attribute.t, *attribute.tensors]
        for subgraph in (attribute.g, *attribute.graphs):
            found += tensors_of(subgraph)
    return found


def _first_line(reason: Exception) -> str:
    return str(reason).strip().partition("\n")[0][:200]
