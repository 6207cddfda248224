"""The engine: a certified model in an ONNX Runtime session on the requested device, verified on its golden samples.

Engine processes (``serve.engine.message_loop``) and ``serve.classify_files`` open it.

Shape legend: N images, S side in pixels, C classes, M golden samples.
"""

import contextlib
import io
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ltkd.contract.bundle import GOLDEN_TOLERANCE, Bundle, Golden, Manifest, Precision
from ltkd.contract.node_assignment import AssignedNode, GraphNode, NodeAssignment, check_assignment, read_graph
from ltkd.contract.resources import num_cores
from ltkd.errors import BundleError, DeviceError
from serve.engine.devices import num_cuda_devices, parse_device, require_gpu

Images = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]
"""uint8 [N, S, S, 3], or N times [S, S, 3]."""
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CUDA_OPTIONS = {
    "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE searches half a second for every new batch size
    "arena_extend_strategy": "kSameAsRequested",
    "use_tf32": "0",  # the gates certified float32; TF32 has fewer bits
}
LONGEST_RUN_SECONDS = 0.1
_SLOW_SECONDS = 0.02  # on a CPU; in a run this long, the extra work of a first run hardly matters
FASTEST: dict[str, tuple[Precision, ...]] = {"cuda": ("fp16", "fp32"), "cpu": ("int8", "fp32")}
_LOG_FATAL_ONLY = 4  # ONNX Runtime also raises its errors; printed as well, every message would appear twice

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """The interface of an engine: the facts that the service publishes, and the logits."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""

    @property
    def precision(self) -> Precision:
        """Which of the bundle's models runs."""

    @property
    def provider(self) -> str:
        """The execution provider that really runs it, by ONNX Runtime's name."""

    @property
    def nodes(self) -> NodeAssignment:
        """How many of the model's nodes run on which provider."""

    @property
    def seconds_of(self) -> Mapping[int, float]:
        """The batch sizes that are run, and how long each takes."""

    def logits(self, images: Images) -> NDArray[np.float32]:
        """The logits of a batch, float32 [N, C]."""


@dataclass(frozen=True)
class OnnxEngine:
    """A bundle's model in an ONNX Runtime session.

    A GPU runs only a few batch sizes, which are warmed up before the first request, and other batches are padded to
    one of them. Rows are independent, so padding does not change the result. A CPU runs every batch size without
    padding: there every row costs time, and a new shape costs next to nothing.
    """

    manifest: Manifest
    precision: Precision
    provider: str
    nodes: NodeAssignment
    seconds_of: Mapping[int, float]
    session: ort.InferenceSession

    def logits(self, images: Images) -> NDArray[np.float32]:
        """The logits of a batch, float32 [N, C]. Not thread-safe."""
        if not len(images):
            return np.zeros((0, len(self.manifest.task.class_names)), np.float32)
        largest = max(self.seconds_of)
        parts = [self._run(images[first : first + largest]) for first in range(0, len(images), largest)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _run(self, images: Images) -> NDArray[np.float32]:
        num = len(images)
        size = min(size for size in self.seconds_of if size >= num)
        batch_NSS3 = np.empty((size, *images[0].shape), np.uint8)
        batch_NSS3[num:] = 0
        for row, pixels_SS3 in enumerate(images):
            batch_NSS3[row] = pixels_SS3
        if self.provider == CPU:
            logits_NC: NDArray[np.float32] = self.session.run(["logits"], {"image": batch_NSS3})[0]
        else:  # with bound buffers, the runtime copies once in each direction and does not allocate for every run
            binding = self.session.io_binding()
            binding.bind_cpu_input("image", batch_NSS3)
            binding.bind_output("logits")
            self.session.run_with_iobinding(binding)
            logits_NC = binding.copy_outputs_to_cpu()[0]
        return logits_NC[:num]


def open_engine(
    bundle: Bundle,
    device: str = "auto",
    precision: Precision | None = None,
    num_threads: int | None = None,
    max_batch: int = 32,
) -> OnnxEngine:
    """Load a bundle's model, warm it up and verify its golden samples on the device that will serve it.

    Args:
        bundle: An opened bundle: its hashes have been checked.
        device: ``cuda`` runs on CUDA or fails; ``auto`` uses CUDA if it works, else the CPU. ``:INDEX`` after them
            chooses the GPU, by default the first.
        precision: One of the bundle's precisions; None uses the fastest certified one for the device.
        num_threads: How many CPU cores a run may use; None uses all cores of this process.
        max_batch: The largest batch size to run.

    Raises:
        UsageError: There is no such kind of device.
        DeviceError: ``cuda`` was requested and does not work.
        BundleError: The model cannot be run, or its logits differ from the certified ones.
    """
    ort.set_default_logger_severity(_LOG_FATAL_ONLY)
    num_threads = num_threads or num_cores()
    kind, index = parse_device(device)
    if kind == "auto" and num_cuda_devices() > 0:
        try:
            return _verified(_load(bundle, index or 0, precision, num_threads), bundle.golden(), max_batch)
        except DeviceError as reason:
            _log.warning("--device auto uses the CPU: %s", reason)
    engine = _load(bundle, (index or 0) if kind == "cuda" else None, precision, num_threads)
    return _verified(engine, bundle.golden(), max_batch)


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """The batch sizes that are warmed up: powers of two, and the largest."""
    return (*(2**power for power in range(max_batch.bit_length()) if 2**power < max_batch), max_batch)


def _verified(engine: OnnxEngine, golden: Golden, max_batch: int) -> OnnxEngine:
    """The engine with measured batch sizes, after it has reproduced every golden sample.

    Every size of ``batch_sizes`` is run and timed on golden samples. On a CPU a large batch of a large network is no
    faster per image and delays all of its images, so sizes that would take longer than LONGEST_RUN_SECONDS are left
    out, except a batch of one. The times of the sizes in between are interpolated.

    Raises:
        BundleError: The logits differ from the certified ones.
    """
    seconds_of: dict[int, float] = {}
    seconds_each = 0.0
    num_run, num = 0, len(golden.labels_M)
    for size in batch_sizes(max_batch):
        if engine.provider == CPU and size * seconds_each > LONGEST_RUN_SECONDS:
            break
        rows = np.arange(num_run, num_run + size) % num
        num_run += size
        resized = replace(engine, seconds_of={size: 0.0})
        seconds = _replay(resized, golden, rows)
        if seconds < _SLOW_SECONDS or engine.provider != CPU:  # the first run of a shape allocates and searches
            seconds = min(_replay(resized, golden, rows) for _ in range(2))
        seconds_of[size], seconds_each = seconds, seconds / size
    if engine.provider == CPU:
        sizes = range(1, max(seconds_of) + 1)
        between = np.interp(sizes, list(seconds_of), list(seconds_of.values())).tolist()
        seconds_of = dict(zip(sizes, between, strict=True))
    engine = replace(engine, seconds_of=seconds_of)
    if num_run < num:
        _replay(engine, golden, np.arange(num_run, num))
    return engine


def _replay(engine: OnnxEngine, golden: Golden, rows: NDArray[np.intp]) -> float:
    """Compare the engine's logits of some golden samples with the certified ones.

    Returns:
        How long the run took, in seconds. On a CPU it is the CPU time per thread, which does not depend on other
        programs.

    Raises:
        BundleError: They differ.
    """
    clock, num_threads = time.perf_counter, 1
    if engine.provider == CPU:
        clock, num_threads = time.process_time, engine.session.get_session_options().intra_op_num_threads
    certified_MC = golden.logits[engine.precision]
    images_NSS3, expected_NC = golden.images_MSS3[rows], certified_MC[rows]
    started = clock()
    try:
        logits_NC = engine.logits(images_NSS3)
    except Exception as reason:  # ONNX Runtime's errors have no common base class
        raise BundleError(f"the model cannot run its golden samples ({_one_line(reason)}); export again.") from None
    seconds = max(clock() - started, 1e-6) / num_threads
    if logits_NC.shape != expected_NC.shape:
        raise BundleError(
            f"the model returns logits of shape {list(logits_NC.shape)} for the golden samples, "
            f"expected {list(expected_NC.shape)}; export again."
        )
    allowed = GOLDEN_TOLERANCE[engine.precision] * max(1.0, float(np.abs(certified_MC).max()))
    difference = float(np.abs(logits_NC - expected_NC).max())
    if not difference <= allowed:  # written so that NaN fails too
        raise BundleError(
            f"on {engine.provider} the logits of the golden samples, in a batch of {len(rows)}, differ by "
            f"{difference:.3g} from the certified ones; rounding explains at most {allowed:.3g}. Export again on this "
            "machine, or start with another --device."
        )
    return seconds


def _load(bundle: Bundle, gpu: int | None, precision: Precision | None, num_threads: int) -> OnnxEngine:
    """Load a model on a GPU, or on the CPU if ``gpu`` is None."""
    certified = bundle.manifest.precisions
    fastest = FASTEST["cpu" if gpu is None else "cuda"]
    chosen = precision if precision else next(name for name in fastest if name in certified)
    path = bundle.model_path(chosen)
    options = _session_options(num_threads)
    session = _session(path, [CPU], options) if gpu is None else _cuda_session(path, gpu, options)
    provider = session.get_providers()[0]
    nodes = node_assignment(session, provider, path)
    return OnnxEngine(bundle.manifest, chosen, provider, nodes, {}, session)


def both_runtimes() -> bool:
    """Whether onnxruntime and onnxruntime-gpu are both installed; they overwrite each other's files."""
    installed = 0
    for package in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(package)
            installed += 1
    return installed == 2


def _cuda_session(model_path: Path, gpu: int, options: ort.SessionOptions) -> ort.InferenceSession:
    if CUDA not in ort.get_available_providers():
        raise _no_cuda("the installed ONNX Runtime was built without CUDA")
    if num_cuda_devices() == 0:
        raise _no_cuda("there is no NVIDIA GPU or driver")
    require_gpu(gpu, num_cuda_devices())
    missing = _preload_libraries()
    try:
        session = _session(model_path, [(CUDA, {**CUDA_OPTIONS, "device_id": str(gpu)})], options)
    except BundleError as reason:
        raise _no_cuda(missing or str(reason).rstrip(".")) from None
    if session.get_providers()[0] != CUDA:
        raise _no_cuda(missing or "its CUDA provider did not load")
    return session


def node_assignment(session: ort.InferenceSession, provider: str, model_path: Path) -> NodeAssignment:
    """Where the nodes of a session run.

    Raises:
        DeviceError: An image would flow through a node on another provider.
    """
    assigned = [
        AssignedNode(node.name, node.op_type, part.ep_name)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    graphs = (lambda: read_graph(model_path.read_bytes()), lambda: _rewritten_graph(model_path))
    return check_assignment(assigned, provider, graphs)


def _rewritten_graph(model_path: Path) -> list[GraphNode]:
    """The graph whose nodes ONNX Runtime assigns to providers: after its basic optimisations, which create nodes."""
    options = _session_options(num_threads=1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, model_path.name)
        options.optimized_model_filepath = str(path)
        _session(model_path, [CPU], options)
        return read_graph(path.read_bytes())


def _preload_libraries() -> str:
    """Load the CUDA and cuDNN libraries from Python packages, and return the message about the first missing one."""
    printed = io.StringIO()
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(printed):
            ort.preload_dlls()
    lines = printed.getvalue().splitlines()
    return next((line.rstrip(".") for line in lines if line.startswith("Failed to load")), "")


def _session_options(num_threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_FATAL_ONLY
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the image decoder needs the cores too
    return options


def _session(
    model_path: Path, providers: list[str | tuple[str, dict[str, str]]], options: ort.SessionOptions
) -> ort.InferenceSession:
    try:
        session = ort.InferenceSession(model_path, sess_options=options, providers=providers, enable_fallback=0)
    except Exception as reason:  # ONNX Runtime's errors have no common base class
        raise BundleError(
            f"{model_path} cannot be loaded by ONNX Runtime {ort.__version__} ({_one_line(reason)}); "
            "install the version in constraints.txt or export again."
        ) from None
    session.disable_fallback()
    inputs = [(node.name, node.type) for node in session.get_inputs()]
    outputs = [node.name for node in session.get_outputs()]
    if (inputs, outputs) != ([("image", "tensor(uint8)")], ["logits"]):
        raise BundleError(
            f"{model_path} has inputs {inputs} and outputs {outputs}, expected image tensor(uint8) and logits; "
            "export again."
        )
    return session


def _no_cuda(cause: str) -> DeviceError:
    advice = "onnxruntime and onnxruntime-gpu are both installed: keep only the second. " if both_runtimes() else ""
    return DeviceError(
        f"asked for cuda, but ONNX Runtime would run on {CPU}: {cause}. {advice}"
        "CUDA needs onnxruntime-gpu with the CUDA and cuDNN libraries it was built for. "
        "To accept the CPU, start with --device cpu."
    )


def _one_line(reason: Exception) -> str:
    return " ".join(str(reason).split())
