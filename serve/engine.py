"""The engine: a certified model on the device that was asked for, proved on its golden samples.

Shape legend: N images, S side in pixels, C classes, M golden samples.
"""

import contextlib
import ctypes
import io
import logging
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ltkd.bundle import GOLDEN_TOLERANCE, Bundle, Golden, Manifest, Precision
from ltkd.cores import num_cores
from ltkd.errors import BundleError, DeviceError

Device = Literal["auto", "cpu", "cuda"]
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CUDA_OPTIONS = {
    "cudnn_conv_algo_search": "HEURISTIC",  # EXHAUSTIVE searches half a second for every new batch size
    "arena_extend_strategy": "kSameAsRequested",
    "use_tf32": "0",  # the gates certified float32, not a shortened one
}
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

    def logits(self, images_NSS3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The logits of a batch, float32 [N, C]."""


@dataclass(frozen=True)
class OnnxEngine:
    """A bundle's model in an ONNX Runtime session."""

    manifest: Manifest
    precision: Precision
    provider: str
    session: ort.InferenceSession

    def logits(self, images_NSS3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The logits of a batch, float32 [N, C]. One caller at a time."""
        logits_NC: NDArray[np.float32] = self.session.run(["logits"], {"image": images_NSS3})[0]
        return logits_NC


def open_engine(bundle: Bundle, device: Device = "auto") -> OnnxEngine:
    """Load a bundle's float32 model and replay its golden samples on the device that will answer.

    Args:
        bundle: An opened bundle: its hashes have been checked.
        device: ``cuda`` runs on CUDA or not at all; ``auto`` takes CUDA where it works, else the CPU.

    Raises:
        DeviceError: ``cuda`` was asked for and does not work.
        BundleError: The model cannot be run, or does not give the logits that were certified.
    """
    ort.set_default_logger_severity(_SILENT)
    session = open_session(bundle.model_path("fp32"), device)
    engine = OnnxEngine(bundle.manifest, "fp32", session.get_providers()[0], session)
    replay(engine, bundle.golden())
    return engine


def open_session(model_path: Path, device: Device) -> ort.InferenceSession:
    """Load a model on a device; what runs is ``get_providers()[0]``, never a silent second choice."""
    if device == "cuda":
        return _cuda_session(model_path)
    if device == "auto" and num_cuda_devices() > 0:
        try:
            return _cuda_session(model_path)
        except DeviceError as reason:
            _log.warning("--device auto takes the CPU: %s", reason)
    return _cpu_session(model_path)


def replay(engine: Engine, golden: Golden) -> None:
    """Hold the engine's logits against those that were certified.

    Raises:
        BundleError: They differ.
    """
    expected_MC = golden.logits[engine.precision]
    num_classes = len(engine.manifest.task.class_names)
    if expected_MC.shape != (len(golden.images_MSS3), num_classes):
        raise BundleError(
            f"the golden samples have logits of shape {list(expected_MC.shape)}, expected "
            f"[{len(golden.images_MSS3)}, {num_classes}] as in the manifest; export again."
        )
    try:
        seen_MC = engine.logits(golden.images_MSS3)
    except Exception as reason:  # ONNX Runtime's errors have no family of their own
        raise BundleError(f"the model cannot run its golden samples ({_one_line(reason)}); export again.") from None
    if seen_MC.shape != expected_MC.shape:
        raise BundleError(
            f"the model gives logits of shape {list(seen_MC.shape)} for the golden samples, "
            f"expected {list(expected_MC.shape)}; export again."
        )
    allowed = GOLDEN_TOLERANCE[engine.precision] * max(1.0, float(np.abs(expected_MC).max(initial=0)))
    difference = float(np.abs(seen_MC - expected_MC).max(initial=0))
    if not difference <= allowed:  # written so that NaN is refused too
        raise BundleError(
            f"on {engine.provider} the golden samples give logits that differ by {difference:.3g} from the certified "
            f"ones, at most {allowed:.3g} is rounding; export again on this machine, or start with another --device."
        )


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


def _cpu_session(model_path: Path) -> ort.InferenceSession:
    return _session(model_path, [CPU], _session_options())


def _cuda_session(model_path: Path) -> ort.InferenceSession:
    if CUDA not in ort.get_available_providers():
        raise _no_cuda("the installed ONNX Runtime was built without CUDA")
    if num_cuda_devices() == 0:
        raise _no_cuda("there is no NVIDIA GPU or driver")
    missing = _preload()
    options = _session_options()
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


def _session_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_cores()
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
