"""A bundle small enough to compute by hand, served by the real engine over real sockets."""

import atexit
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import httpx
import numpy as np
import onnx
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from PIL import Image

from ltkd.contract.bundle import (
    CARD_FILE,
    GOLDEN_FILE,
    MANIFEST_FILE,
    MODEL_FILES,
    PARITY_FILE,
    REPORT_FILE,
    CertifiedModel,
    FileRecord,
    Golden,
    Manifest,
    Precision,
    Provenance,
    record_of,
    staged_bundle,
)
from ltkd.contract.calibration import Abstention, Calibration, ConfidenceBin, GroupCalibration, Proportion, SetThreshold
from ltkd.contract.class_groups import ClassGroups
from ltkd.contract.image_decoding import MAX_PIXELS
from ltkd.contract.records import write_record
from ltkd.contract.task import Task
from serve.api.app import create_app
from serve.engine.message_loop import serve_line
from serve.http.fast_path import Connection
from serve.http.service import Service
from serve.pool.dispatcher import EnginePool
from serve.pool.engine_process import ChildProcess, connected_lines
from serve.settings import Settings

SIZE_PX = 8
CLASS_NAMES = ("ant", "bee", "cat", "dog", "elk", "fox")
GROUPS = ClassGroups(names=("head", "medium", "tail"), group_of_class=(0, 0, 1, 1, 2, 2))
TASK = Task(
    class_names=CLASS_NAMES,
    train_counts=(90, 80, 40, 30, 6, 5),
    groups=GROUPS,
    input_px=SIZE_PX,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def layer_weights() -> NDArray[np.float32]:
    """The toy network's only layer: every pixel has a say of its own, so turning an image changes the answer."""
    return np.random.default_rng(7).normal(0, 0.2, (SIZE_PX * SIZE_PX * 3, len(CLASS_NAMES))).astype(np.float32)


def expected_logits(images_NSS3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the toy network gives, in NumPy."""
    unit_NF = images_NSS3.reshape(len(images_NSS3), -1).astype(np.float32) / np.float32(255)
    return np.asarray(unit_NF @ layer_weights(), np.float32)


def toy_pixels(seed: int = 0, height_px: int = SIZE_PX, width_px: int = SIZE_PX) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)


def encoded(pixels: NDArray[np.uint8] | Image.Image, kind: str = "PNG", exif: Image.Exif | None = None) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **({} if exif is None else {"exif": exif}))
    return file.getvalue()


def bomb_png(side_px: int = 20_000) -> bytes:
    """A whole, valid black 1-bit PNG: tens of kilobytes that would become hundreds of megabytes."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (side_px + 7) // 8)
    rows = b"".join([packer.compress(row) for _ in range(side_px)]) + packer.flush()

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side_px, side_px, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def toy_model() -> onnx.ModelProto:
    weights = numpy_helper.from_array(layer_weights(), "weights")
    scale = numpy_helper.from_array(np.array(255, np.float32), "scale")
    flat = numpy_helper.from_array(np.array([0, -1], np.int64), "flat")
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["float", "scale"], ["unit"]),
            helper.make_node("Reshape", ["unit", "flat"], ["row"]),
            helper.make_node("MatMul", ["row", "weights"], ["logits"]),
        ],
        "toy",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", SIZE_PX, SIZE_PX, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(CLASS_NAMES)])],
        [weights, scale, flat],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def convolution() -> onnx.ModelProto:
    """A network with the layers of a real one: normalisation, two convolutions, pooling, a classifier."""
    random = np.random.default_rng(11)

    def weights(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(random.normal(0, 0.3, shape).astype(np.float32), name)

    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["float", "scale"], ["unit"]),
            helper.make_node("Transpose", ["unit"], ["planes"], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", ["planes", "first"], ["one"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["one"], ["two"]),
            helper.make_node("Conv", ["two", "second"], ["three"], pads=[1, 1, 1, 1], strides=[2, 2]),
            helper.make_node("Relu", ["three"], ["four"]),
            helper.make_node("GlobalAveragePool", ["four"], ["five"]),
            helper.make_node("Flatten", ["five"], ["six"]),
            helper.make_node("Gemm", ["six", "last", "bias"], ["logits"], transB=1),
        ],
        "convolution",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", SIZE_PX, SIZE_PX, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", len(CLASS_NAMES)])],
        [
            numpy_helper.from_array(np.array(255, np.float32), "scale"),
            weights("first", 16, 3, 3, 3), weights("second", 32, 16, 3, 3),
            weights("last", len(CLASS_NAMES), 32), weights("bias", len(CLASS_NAMES)),
        ],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def logits_of(model: onnx.ModelProto, images_NSS3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What ONNX Runtime gives for a model."""
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"image": images_NSS3})[0], np.float32)


def write_toy_bundle(
    path: Path,
    golden_shift: float = 0.0,
    model: onnx.ModelProto | None = None,
    precisions: Sequence[Precision] = ("fp32",),
) -> Path:
    """A whole bundle of the toy network.

    Args:
        path: Where it becomes.
        golden_shift: Added to the golden logits, to plant a mismatch.
        model: Another network than the toy.
        precisions: Under which names it is certified; it is the same network under each.
    """
    images = np.stack([toy_pixels(seed) for seed in range(6)])
    try:
        logits = expected_logits(images) if model is None else logits_of(model, images)
    except Exception:  # a network that cannot be run: that is what the test is about
        logits = expected_logits(images)
    golden = Golden(images, np.arange(6), dict.fromkeys(precisions, logits + np.float32(golden_shift)))
    with staged_bundle(path) as stage:
        for precision in precisions:
            (stage / MODEL_FILES[precision]).write_bytes((model or toy_model()).SerializeToString())
        (stage / GOLDEN_FILE).write_bytes(golden.to_bytes())
        for file in (PARITY_FILE, REPORT_FILE, CARD_FILE):
            (stage / file).write_text("{}")
        records = [record_of(stage / file) for file in (PARITY_FILE, REPORT_FILE, CARD_FILE, GOLDEN_FILE)]
        manifest = toy_manifest(record_of(stage / MODEL_FILES["fp32"]), *records)
        certified = {
            precision: CertifiedModel(
                **record_of(stage / MODEL_FILES[precision]).model_dump(),
                provider="CPUExecutionProvider",
                calibration=toy_calibration(),
            )
            for precision in precisions
        }
        write_record(stage / MANIFEST_FILE, manifest.model_copy(update={"precisions": certified}))
    return path


def toy_calibration(temperature: float = 1.0) -> Calibration:
    """Round figures: expected accuracy 0.25 up to a confidence of one half and 0.75 above, abstention below 0.4."""

    def share(value: float) -> Proportion:
        return Proportion(value=value, low=value - 0.1, high=value + 0.1, n=40)

    return tuple(
        GroupCalibration(
            group=group,
            temperature=temperature,
            expected_accuracy=(
                ConfidenceBin(above=0.0, up_to=0.5, accuracy=share(0.25)),
                ConfidenceBin(above=0.5, up_to=1.0, accuracy=share(0.75)),
            ),
            abstention=Abstention(target_precision=0.7, threshold=0.4, coverage=0.8, precision=share(0.75)),
            prediction_set=SetThreshold(
                target_coverage=0.9, least_probability=0.1, num_images=40, low=0.8, high=0.97, coverage=share(0.875)
            ),
            predicted_share=1 / 3,
            confidence_counts=(0, 0, 1, 2, 3, 4, 5, 4, 3, 2),
        )
        for group in GROUPS.names
    )


def toy_manifest(
    model: FileRecord, parity: FileRecord, report: FileRecord, card: FileRecord, golden: FileRecord
) -> Manifest:
    certified = CertifiedModel(**model.model_dump(), provider="CPUExecutionProvider", calibration=toy_calibration())
    return Manifest(
        name="toy",
        task=TASK,
        precisions={"fp32": certified},
        parity=parity,
        report=report,
        card=card,
        golden=golden,
        certified_on="six random images",
        source=Provenance(
            run="toy", config_sha256="0" * 64, weights_sha256="0" * 64, model="linear", method="none", versions={}
        ),
    )


@dataclass
class ToyEngine:
    """The toy network without ONNX Runtime; ``breaks`` makes it fail as a defect would."""

    manifest: Manifest
    precision: Precision = "fp32"
    provider: str = "ToyProvider"
    breaks: bool = False
    seconds_of: Mapping[int, float] = field(default_factory=lambda: dict.fromkeys((1, 2, 4, 8, 16, 32), 0.001))

    def logits(self, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> NDArray[np.float32]:
        if self.breaks:
            raise RuntimeError("a secret of the inside")
        return expected_logits(np.stack(list(images)))


def toy_engine(breaks: bool = False) -> ToyEngine:
    nothing = FileRecord(path="model.onnx", sha256="f" * 64, num_bytes=0)
    return ToyEngine(toy_manifest(*[nothing] * 5), breaks=breaks)


class HeldEngine(ToyEngine):
    """Holds every run until it is let go, and remembers how many images each had."""

    begun: threading.Event
    go: threading.Event
    sizes: list[int]

    def logits(self, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> NDArray[np.float32]:
        self.sizes.append(len(images))
        self.begun.set()
        assert self.go.wait(30)
        return super().logits(images)


def held_engine() -> HeldEngine:
    engine = HeldEngine(toy_engine().manifest)
    engine.begun, engine.go, engine.sizes = threading.Event(), threading.Event(), []
    return engine


def toy_process(engine: ToyEngine, max_pixels: int = MAX_PIXELS, num_threads: int = 1) -> ChildProcess:
    """An engine process that is a thread of this one, so that tests can hold it and look inside."""
    ours, theirs = connected_lines()
    thread = threading.Thread(target=serve_line, args=(theirs, engine, max_pixels, 0.0, num_threads), daemon=True)
    thread.start()

    def kill() -> None:
        with suppress(OSError):
            theirs.shutdown(socket.SHUT_RDWR)

    return ChildProcess(ours, kill, os.getpid())


@cache
def toy_bundle() -> Path:
    """A toy bundle for all tests that do not change it."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return write_toy_bundle(folder / "toy")


def toy_service(
    engine: ToyEngine | None = None, settings: Settings | None = None, processes: Iterator[ChildProcess] | None = None
) -> Service:
    """The service around a toy engine.

    Args:
        engine: What every engine process runs.
        settings: Otherwise the defaults, without a delay at the end.
        processes: The engine processes, one after another, instead.
    """
    engine = engine or toy_engine()
    settings = settings or Settings(delay_seconds=0)

    def start_process() -> ChildProcess:
        return next(processes) if processes else toy_process(engine, settings.max_pixels)

    async def start_worker(_: Path) -> EnginePool:
        return await EnginePool.start_with(start_process, settings)

    return Service(toy_bundle(), settings, start_worker)


def toy_app(engine: ToyEngine | None = None, settings: Settings | None = None) -> FastAPI:
    """The app around a toy engine."""
    return create_app(toy_service(engine, settings))


@contextmanager
def running(app: FastAPI, lifespan: str = "on") -> Iterator[httpx.Client]:
    """A client of the app behind a real server on a free port of this machine."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http=Connection, log_config=None, ws="none", access_log=False, lifespan=lifespan  # type: ignore[arg-type]
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@dataclass(frozen=True)
class Served:
    """A service in a process of its own."""

    process: "subprocess.Popen[str]"
    url: str
    greeting: str

    def peak_bytes(self) -> int:
        """The most memory that the front and its engine processes have held so far, each for itself (Linux)."""
        return sum(_kibibytes(pid, "VmHWM") for pid in self.pids())

    def resident_bytes(self) -> int:
        """The memory that they hold now (Linux)."""
        return sum(_kibibytes(pid, "VmRSS") for pid in self.pids())

    def pids(self) -> list[int]:
        """The front and its engine processes (Linux)."""
        pids = [self.process.pid]
        for thread in Path(f"/proc/{self.process.pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended meanwhile
                pids += [int(pid) for pid in (thread / "children").read_text().split()]
        return pids


def _kibibytes(pid: int, name: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))


_SERVE = """
import json
import sys
from pathlib import Path
from serve.main import serve
from serve.settings import read_settings
serve(Path(sys.argv[1]), read_settings({"port": 0, "delay_seconds": 0} | json.loads(sys.argv[2])))
"""


@contextmanager
def served(bundle: Path, **settings: float) -> Iterator[Served]:
    """The real thing: ``serve`` in a fresh process, from start to SIGTERM."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LTKD_")}
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, str(bundle), json.dumps(settings)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    try:
        greeting = process.stdout.readline()
        assert greeting, process.stderr.read()
        yield Served(process, next(word for word in greeting.split() if word.startswith("http://")), greeting)
    finally:
        process.terminate()
        process.communicate(timeout=60)
