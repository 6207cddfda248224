"""Toys for the tests of the service: a bundle small enough to compute by hand, toy engines and running services."""

import atexit
import io
import json
import os
import re
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
    file_record,
    staged_bundle,
)
from ltkd.contract.calibration import Abstention, Calibration, ConfidenceBin, GroupCalibration, Proportion, SetThreshold
from ltkd.contract.class_groups import ClassGroups
from ltkd.contract.node_assignment import NodeAssignment
from ltkd.contract.preprocessing import Resizing
from ltkd.contract.records import write_record
from ltkd.contract.task import Task
from serve.api.app import Application, create_app
from serve.engine.decode_queue import PixelLimits
from serve.engine.large_images import large_image_decoder
from serve.engine.message_loop import LargeDecoder, serve_connection
from serve.http.service import Service
from serve.pool.dispatcher import EnginePool
from serve.pool.engine_process import ChildProcess, connected_sockets
from serve.server import Server
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
    resizing=Resizing(),
)


def layer_weights() -> NDArray[np.float32]:
    """The weights of the toy network's only layer. Each pixel has its own, so a rotated image gets another answer."""
    return np.random.default_rng(7).normal(0, 0.2, (SIZE_PX * SIZE_PX * 3, len(CLASS_NAMES))).astype(np.float32)


def expected_logits(images_NSS3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The logits of the toy network, computed in NumPy."""
    unit_NF = images_NSS3.reshape(len(images_NSS3), -1).astype(np.float32) / np.float32(255)
    return np.asarray(unit_NF @ layer_weights(), np.float32)


def toy_pixels(seed: int = 0, height_px: int = SIZE_PX, width_px: int = SIZE_PX) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)


def encoded(pixels: NDArray[np.uint8] | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb_png(side_px: int = 20_000) -> bytes:
    """A valid black 1-bit PNG: tens of kilobytes that decode to hundreds of megabytes."""
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
    """A network with the usual layers: normalisation, two convolutions, pooling and a classifier."""
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
    """The logits that ONNX Runtime computes with a model."""
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"image": images_NSS3})[0], np.float32)


def write_toy_bundle(
    path: Path,
    golden_shift: float = 0.0,
    model: onnx.ModelProto | None = None,
    precisions: Sequence[Precision] = ("fp32",),
) -> Path:
    """Write a complete bundle of the toy network.

    Args:
        path: Directory of the bundle.
        golden_shift: Added to the golden logits, to create a mismatch.
        model: A network to use instead of the toy.
        precisions: The certified precisions; each has the same network.
    """
    images = np.stack([toy_pixels(seed) for seed in range(6)])
    try:
        logits = expected_logits(images) if model is None else logits_of(model, images)
    except Exception:  # the network cannot be run; a test needs such a bundle
        logits = expected_logits(images)
    golden = Golden(images, np.arange(6), dict.fromkeys(precisions, logits + np.float32(golden_shift)))
    with staged_bundle(path) as stage:
        for precision in precisions:
            (stage / MODEL_FILES[precision]).write_bytes((model or toy_model()).SerializeToString())
        (stage / GOLDEN_FILE).write_bytes(golden.to_bytes())
        for file in (PARITY_FILE, REPORT_FILE, CARD_FILE):
            (stage / file).write_text("{}")
        records = [file_record(stage / file) for file in (PARITY_FILE, REPORT_FILE, CARD_FILE, GOLDEN_FILE)]
        manifest = toy_manifest(file_record(stage / MODEL_FILES["fp32"]), *records)
        certified = {
            precision: CertifiedModel(
                **file_record(stage / MODEL_FILES[precision]).model_dump(),
                provider="CPUExecutionProvider",
                calibration=toy_calibration(),
            )
            for precision in precisions
        }
        write_record(stage / MANIFEST_FILE, manifest.model_copy(update={"precisions": certified}))
    return path


def toy_calibration(temperature: float = 1.0) -> Calibration:
    """A calibration with round numbers.

    The expected accuracy is 0.25 up to a confidence of 0.5 and 0.75 above; predictions below 0.4 are abstentions.
    """

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
    """The toy network without ONNX Runtime; with ``fails`` it raises an unexpected error."""

    manifest: Manifest
    precision: Precision = "fp32"
    provider: str = "ToyProvider"
    nodes: NodeAssignment = field(default_factory=lambda: NodeAssignment(num_nodes={"ToyProvider": 1}))
    fails: bool = False
    seconds_of: Mapping[int, float] = field(default_factory=lambda: dict.fromkeys((1, 2, 4, 8, 16, 32), 0.001))

    def logits(self, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> NDArray[np.float32]:
        if self.fails:
            raise RuntimeError("a secret internal detail")
        return expected_logits(np.stack(list(images)))


def toy_engine(fails: bool = False) -> ToyEngine:
    nothing = FileRecord(path="model.onnx", sha256="f" * 64, num_bytes=0)
    return ToyEngine(toy_manifest(*[nothing] * 5), fails=fails)


class BlockedEngine(ToyEngine):
    """Blocks every run until ``go`` is set, and records the batch sizes.

    Attributes:
        begun: Set when a run has begun.
        go: Set by the test to let runs finish.
        sizes: Images of each run.
    """

    begun: threading.Event
    go: threading.Event
    sizes: list[int]

    def logits(self, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> NDArray[np.float32]:
        self.sizes.append(len(images))
        self.begun.set()
        assert self.go.wait(30)
        return super().logits(images)


def blocked_engine() -> BlockedEngine:
    engine = BlockedEngine(toy_engine().manifest)
    engine.begun, engine.go, engine.sizes = threading.Event(), threading.Event(), []
    return engine


def toy_process(
    engine: ToyEngine,
    settings: Settings | None = None,
    num_threads: int = 1,
    large_decoder: LargeDecoder = large_image_decoder,
) -> ChildProcess:
    """A toy engine process: a thread of this process, so that tests can block and inspect it."""
    settings = settings or Settings()
    ours, theirs = connected_sockets()
    limits = PixelLimits(settings.max_pixels, settings.max_request_pixels)
    thread = threading.Thread(
        target=serve_connection, args=(theirs, engine, limits, 0.0, num_threads, large_decoder), daemon=True
    )
    thread.start()

    def kill() -> None:
        with suppress(OSError):
            theirs.shutdown(socket.SHUT_RDWR)

    return ChildProcess(ours, kill, os.getpid())


def without_ids(body: bytes) -> bytes:
    """The body of a response of ``/v1/classify`` without the ids of its answers, which are random."""
    return re.sub(rb'"answer_id":"[0-9a-f]{32}",', b"", body)


@cache
def toy_bundle() -> Path:
    """The toy bundle that all tests share; they must not change it."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return write_toy_bundle(folder / "toy")


def toy_service(
    engine: ToyEngine | None = None, settings: Settings | None = None, processes: Iterator[ChildProcess] | None = None
) -> Service:
    """A service with a toy engine.

    Args:
        engine: The engine of every engine process.
        settings: By default the default settings without a delay at shutdown.
        processes: Engine processes to use, in order, instead of toy ones.
    """
    engine = engine or toy_engine()
    settings = settings or Settings(delay_seconds=0)

    def start_process() -> ChildProcess:
        return next(processes) if processes else toy_process(engine, settings)

    async def start_pool(_: Path) -> EnginePool:
        return await EnginePool.start([start_process], settings)

    return Service(toy_bundle(), settings, start_pool)


def toy_app(engine: ToyEngine | None = None, settings: Settings | None = None) -> Application:
    """The application with a toy engine."""
    return create_app(toy_service(engine, settings))


@contextmanager
def running(app: FastAPI, lifespan: str = "on", *, other_server: bool = False) -> Iterator[httpx.Client]:
    """Run the application in a real server on a free local port, and give a client of it.

    Args:
        app: The application, or a part of the API without a service.
        lifespan: ``off`` does not start the service.
        other_server: Run it as any ASGI server would, without the limits of ``serve.http.connection``.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    if isinstance(app, Application) and not other_server:
        server: uvicorn.Server = Server(app, app.service)
        server.config.lifespan = lifespan  # type: ignore[assignment]
    else:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", access_log=False))
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
    """A service that runs in its own process.

    Attributes:
        process: The server process.
        url: Its address.
        greeting: The line that it printed when it had started.
    """

    process: "subprocess.Popen[str]"
    url: str
    greeting: str

    def peak_bytes(self) -> int:
        """The sum of the peak memory of the server process and its engine processes (Linux)."""
        return sum(_kibibytes(pid, "VmHWM") for pid in self.pids())

    def resident_bytes(self) -> int:
        """The sum of their current memory (Linux)."""
        return sum(_kibibytes(pid, "VmRSS") for pid in self.pids())

    def pids(self) -> list[int]:
        """The ids of the server process, its engine processes, and theirs for large images (Linux)."""
        pids = [self.process.pid]
        for pid in pids:  # it grows
            with suppress(FileNotFoundError, ProcessLookupError):  # a process or thread has ended meanwhile
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    pids += [int(child) for child in (thread / "children").read_text().split()]
        return pids


def _kibibytes(pid: int, name: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name))


SERVE = """
import json
import sys
from pathlib import Path
from serve.main import serve
from serve.server import Server
from serve.settings import read_settings
serve(Path(sys.argv[1]), read_settings({"port": 0, "delay_seconds": 0} | json.loads(sys.argv[2])))
"""


@contextmanager
def served(bundle: Path, prelude: str = "", **settings: float) -> Iterator[Served]:
    """Run ``serve`` in a fresh process, after the code of ``prelude``, and stop it with SIGTERM."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LTKD_")}
    process = subprocess.Popen(
        [sys.executable, "-c", prelude + SERVE, str(bundle), json.dumps(settings)],
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
