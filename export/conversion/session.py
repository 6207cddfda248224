"""The candidate: what it says of itself; read defensively, opened on a named provider, run in batches.

Shape legend: N images, S side in pixels, C classes.
"""

import contextlib
import io
import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto, helper
from onnxruntime import InferenceSession, SessionOptions

from ltkd.contract.resources import num_cores
from ltkd.contract.task import Task
from ltkd.data.image_files import Images
from ltkd.errors import BundleError, DeviceError, ImageError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
INPUT, OUTPUT = "image", "logits"
DOMAINS = ("", "ai.onnx")
MAX_BYTES = 1_000_000_000
BATCH_SIZE = 256
_SILENT = 4  # errors of ONNX Runtime arrive as exceptions; on the console they would be told twice
INSTRUCTION_SETS = {  # as the kernel names them, fastest at int8 first
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512bw": "avx512",
    "avx2": "avx2",
    "i8mm": "i8mm",
    "asimddp": "dotprod",
}


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


def open_session(content: bytes, provider: str = CPU, *, tf32: bool = False) -> InferenceSession:
    """Open a model on a provider, with every node of it there.

    Args:
        content: The ONNX file.
        provider: CPU or CUDA.
        tf32: On CUDA, whether float32 may be shortened to TF32; what is certified is not.

    Raises:
        BundleError: ONNX Runtime cannot open the model.
        DeviceError: The provider does not work here, or ONNX Runtime would put a node elsewhere.
    """
    if provider not in (CPU, CUDA):
        raise DeviceError(f"ltkd has no provider '{provider}'; it certifies on {CPU} and {CUDA}.")
    options = SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = num_cores()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = _on_cuda(content, options, tf32=tf32) if provider == CUDA else _opened(content, options, CPU, {})
    elsewhere = {part.ep_name for part in session.get_provider_graph_assignment_info()} - {provider}
    if elsewhere:
        raise DeviceError(
            f"asked for {provider}, but ONNX Runtime put nodes on {', '.join(elsewhere)}; install it anew."
        )
    return session


def cuda_works() -> bool:
    """Whether ONNX Runtime can run a model on CUDA here, found out by opening a small one."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in (INPUT, OUTPUT)]
    graph = helper.make_graph([helper.make_node("Relu", [INPUT], [OUTPUT])], "relu", value[:1], value[1:])
    smallest = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    try:
        open_session(smallest.SerializeToString(), CUDA)
    except DeviceError:
        return False
    return True


def _on_cuda(content: bytes, options: SessionOptions, *, tf32: bool) -> InferenceSession:
    if CUDA not in onnxruntime.get_available_providers():
        raise _no_cuda("the installed ONNX Runtime was built without CUDA")
    onnxruntime.set_default_logger_severity(_SILENT)  # the provider complains of missing libraries by itself
    missing = _preload()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = _opened(content, options, CUDA, {"use_tf32": str(int(tf32)), "cudnn_conv_algo_search": "HEURISTIC"})
    except BundleError:
        open_session(content)  # what does not open on the CPU either is the model's own fault
        raise _no_cuda(missing or "ONNX Runtime would run a part of the model on the CPU") from None
    if session.get_providers()[0] != CUDA:
        raise _no_cuda(missing or "its CUDA provider did not load")
    return session


def _preload() -> str:
    """Load the CUDA libraries that lie in Python packages; the answer is the first that is missing."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        onnxruntime.preload_dlls()
    return next((line.rstrip(".") for line in printed.getvalue().splitlines() if line.startswith("Failed to load")), "")


def _opened(content: bytes, options: SessionOptions, provider: str, settings: dict[str, str]) -> InferenceSession:
    try:
        session = InferenceSession(content, options, providers=[(provider, settings)], enable_fallback=0)
    except Exception as reason:  # ONNX Runtime has a dozen error types and no parent for them
        raise BundleError(f"ONNX Runtime cannot open the model ({_first_line(reason)}); export again.") from None
    session.disable_fallback()
    return session


def _no_cuda(cause: str) -> DeviceError:
    return DeviceError(
        f"asked for {CUDA}, which does not run here: {cause}. It needs an NVIDIA GPU, onnxruntime-gpu (without "
        "onnxruntime beside it) and the CUDA and cuDNN libraries that it was built for."
    )


def isa(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The vector instructions that decide how int8 is computed on this machine; ``unknown`` where it does not say."""
    try:
        said = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:  # neither macOS nor Windows has it
        said = None
    flags = set(said[1].split()) if said else set()
    return next((name for flag, name in INSTRUCTION_SETS.items() if flag in flags), "unknown")


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
