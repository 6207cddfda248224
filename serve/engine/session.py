"""The engine: a certified model on the device that was asked for, proved on its golden samples.

Shape legend: N images, S side in pixels, C classes, M golden samples.
"""

import contextlib
import ctypes
import io
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ltkd.contract.bundle import GOLDEN_TOLERANCE, Bundle, Golden, Manifest, Precision
from ltkd.contract.resources import num_cores
from ltkd.errors import BundleError, DeviceError
from serve.engine.messages import Device

Images = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]
"""uint8 [N, S, S, 3], or N times [S, S, 3]."""
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CUDA_OPTIONS = {
    "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE searches half a second for every new batch size
    "arena_extend_strategy": "kSameAsRequested",
    "use_tf32": "0",  # the gates certified float32, not a shortened one
}
LONGEST_RUN_SECONDS = 0.1
_SLOW_SECONDS = 0.02  # of a run on a CPU: beside that, what only the first one does is little
FASTEST: dict[str, tuple[Precision, ...]] = {"cuda": ("fp16", "fp32"), "cpu": ("int8", "fp32")}
_SILENT = 4  # ONNX Runtime's errors come as exceptions too; printed, they would say everything twice

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """What the service needs of a model: the facts it shows, and logits."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""

    @property
    def precision(self) -> Precision:
        """Which of the bundle's models runs."""

    @property
    def provider(self) -> str:
        """The execution provider that really runs it, as ONNX Runtime names it."""

    @property
    def seconds_of(self) -> Mapping[int, float]:
        """The batch sizes that are run, and how long each takes."""

    def logits(self, images: Images) -> NDArray[np.float32]:
        """The logits of a batch, float32 [N, C]."""


@dataclass(frozen=True)
class OnnxEngine:
    """A bundle's model in an ONNX Runtime session.

    A GPU runs batches of a few sizes, which are warm before the first request, and smaller ones padded to them; rows do
    not see each other, so what pads them changes nothing. A CPU pays for every row, and for a new shape nothing worth
    mentioning: it runs every size as it is.
    """

    manifest: Manifest
    precision: Precision
    provider: str
    seconds_of: Mapping[int, float]
    session: ort.InferenceSession

    def logits(self, images: Images) -> NDArray[np.float32]:
        """The logits of a batch, float32 [N, C]. One caller at a time."""
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
        else:  # bound, the runtime copies once in each direction and does not look for a place every time
            bound = self.session.io_binding()
            bound.bind_cpu_input("image", batch_NSS3)
            bound.bind_output("logits")
            self.session.run_with_iobinding(bound)
            logits_NC = bound.copy_outputs_to_cpu()[0]
        return logits_NC[:num]


def open_engine(
    bundle: Bundle,
    device: Device = "auto",
    precision: Precision | None = None,
    num_threads: int | None = None,
    max_batch: int = 32,
) -> OnnxEngine:
    """Load a bundle's model, make it warm and replay its golden samples on the device that will answer.

    Args:
        bundle: An opened bundle: its hashes have been checked.
        device: ``cuda`` runs on CUDA or not at all; ``auto`` takes CUDA where it works, else the CPU.
        precision: One of the bundle's; None takes the fastest that is certified, of those for the device.
        num_threads: How many cores the CPU may use for a run; None takes all that this process has.
        max_batch: The largest batch to run.

    Raises:
        DeviceError: ``cuda`` was asked for and does not work.
        BundleError: The model cannot be run, or does not give the logits that were certified.
    """
    ort.set_default_logger_severity(_SILENT)
    num_threads = num_threads or num_cores()
    if device == "auto" and num_cuda_devices() > 0:
        try:
            return _proved(_loaded(bundle, "cuda", precision, num_threads), bundle.golden(), max_batch)
        except DeviceError as reason:
            _log.warning("--device auto takes the CPU: %s", reason)
    loaded = _loaded(bundle, "cuda" if device == "cuda" else "cpu", precision, num_threads)
    return _proved(loaded, bundle.golden(), max_batch)


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """The sizes that are made warm: powers of two, and the largest."""
    return (*(2**power for power in range(max_batch.bit_length()) if 2**power < max_batch), max_batch)


def _proved(engine: OnnxEngine, golden: Golden, max_batch: int) -> OnnxEngine:
    """The engine with every warm batch size run on golden samples, and every sample run.

    On a CPU large batches of a large network gain nothing and keep everybody in them waiting, so sizes that would
    take longer than LONGEST_RUN_SECONDS are left out, but for one image; what the sizes between take is interpolated.

    Raises:
        BundleError: What the network gives is not what was certified.
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
    """Hold the engine's logits of some golden samples against those that were certified.

    Returns:
        How long the run took; on a CPU how long its threads worked, which other programs do not change.

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
        seen_NC = engine.logits(images_NSS3)
    except Exception as reason:  # ONNX Runtime's errors have no family of their own
        raise BundleError(f"the model cannot run its golden samples ({_one_line(reason)}); export again.") from None
    seconds = max(clock() - started, 1e-6) / num_threads
    if seen_NC.shape != expected_NC.shape:
        raise BundleError(
            f"the model gives logits of shape {list(seen_NC.shape)} for the golden samples, "
            f"expected {list(expected_NC.shape)}; export again."
        )
    allowed = GOLDEN_TOLERANCE[engine.precision] * max(1.0, float(np.abs(certified_MC).max()))
    difference = float(np.abs(seen_NC - expected_NC).max())
    if not difference <= allowed:  # written so that NaN is refused too
        raise BundleError(
            f"on {engine.provider} the golden samples, {len(rows)} at a time, give logits that differ by "
            f"{difference:.3g} from the certified ones, at most {allowed:.3g} is rounding; export again on this "
            "machine, or start with another --device."
        )
    return seconds


def _loaded(
    bundle: Bundle, device: Literal["cpu", "cuda"], precision: Precision | None, num_threads: int
) -> OnnxEngine:
    certified = bundle.manifest.precisions
    chosen = precision if precision else next(name for name in FASTEST[device] if name in certified)
    path = bundle.model_path(chosen)
    options = _session_options(num_threads)
    session = _cuda_session(path, options) if device == "cuda" else _session(path, [CPU], options)
    return OnnxEngine(bundle.manifest, chosen, session.get_providers()[0], {}, session)


def num_cuda_devices() -> int:
    """How many NVIDIA GPUs the driver offers; 0 without a driver. ONNX Runtime is not asked, it would complain."""
    count = ctypes.c_int(0)
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
            return 0
    except (OSError, AttributeError):
        return 0
    return count.value


def both_runtimes() -> bool:
    """Whether onnxruntime and onnxruntime-gpu are installed together, over each other's files."""
    installed = 0
    for package in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(package)
            installed += 1
    return installed == 2


def _cuda_session(model_path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    if CUDA not in ort.get_available_providers():
        raise _no_cuda("the installed ONNX Runtime was built without CUDA")
    if num_cuda_devices() == 0:
        raise _no_cuda("there is no NVIDIA GPU or driver")
    missing = _preload()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = _session(model_path, [(CUDA, CUDA_OPTIONS)], options)
    except BundleError as reason:
        raise _no_cuda(missing or str(reason).rstrip(".")) from None
    if session.get_providers()[0] != CUDA:
        raise _no_cuda(missing or "its CUDA provider did not load")
    return session


def _preload() -> str:
    """Load the CUDA and cuDNN libraries that lie in Python packages; the answer is the first that is missing."""
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
    options.log_severity_level = _SILENT
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the decoder needs the cores too
    return options


def _session(
    model_path: Path, providers: list[str | tuple[str, dict[str, str]]], options: ort.SessionOptions
) -> ort.InferenceSession:
    try:
        session = ort.InferenceSession(model_path, sess_options=options, providers=providers, enable_fallback=0)
    except Exception as reason:  # ONNX Runtime's errors have no family of their own
        raise BundleError(
            f"{model_path} cannot be loaded by ONNX Runtime {ort.__version__} ({_one_line(reason)}); "
            "install the version of constraints.txt or export again."
        ) from None
    session.disable_fallback()
    seen = [(node.name, node.type) for node in session.get_inputs()], [node.name for node in session.get_outputs()]
    if seen != ([("image", "tensor(uint8)")], ["logits"]):
        raise BundleError(
            f"{model_path} takes {seen[0]} and gives {seen[1]}, expected image tensor(uint8) and logits; export again."
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
