"""The service on a GPU: every batch size with and without CUDA graphs, against the loop that costs nothing else.

    python -m benchmarks.cuda [--workloads A,B] [--seconds S]

Writes docs/benchmarks/cuda.json and prints a table. Of each workload (benchmarks/workloads.py) it takes the float32
bundle, has the service's engine prove CUDA on the golden samples, and measures in images a second, by batch size:

    loop        session.run on arrays: what a program without a service does
    bound       as the engine runs it: input and output bound to the device
    graph       one CUDA graph a batch size, replayed; its logits must be those of the loop

and the service itself over HTTP, with connections that fill its batches. Without CUDA it says why and ends with 2.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks.circumstances import circumstances
from benchmarks.load import closed_loop
from benchmarks.servers import ROOT, ours_running
from benchmarks.serving import Asked, listed, workloads_made
from benchmarks.shapes import WORKLOADS
from ltkd.contract.bundle import open_bundle
from ltkd.contract.image_decoding import decode_image
from ltkd.errors import DeviceError
from serve.engine.session import CUDA, CUDA_OPTIONS, OnnxEngine, batch_sizes, open_engine

OUT = ROOT / "docs" / "benchmarks" / "cuda.json"
MAX_BATCH, CONNECTIONS = 32, 96
TOLERANCE = 1e-3  # of the span of the logits: another order of summation, not another network

Run = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""uint8 [N, S, S, 3] to logits, float32 [N, C]."""


def replayed(session: ort.InferenceSession, size: int, shape: Sequence[int], num_classes: int, device: str) -> Run:
    """Runs of one batch size on memory of the device that stays where it is, which is what a CUDA graph needs.

    Args:
        session: Made with ``enable_cuda_graph`` where the device is ``cuda``.
        size: Images in a batch.
        shape: Of an image.
        num_classes: C.
        device: ``cuda``; ``cpu`` runs the same without a graph.
    """
    image = ort.OrtValue.ortvalue_from_numpy(np.zeros((size, *shape), np.uint8), device, 0)
    logits = ort.OrtValue.ortvalue_from_numpy(np.zeros((size, num_classes), np.float32), device, 0)
    bound = session.io_binding()
    bound.bind_ortvalue_input("image", image)
    bound.bind_ortvalue_output("logits", logits)
    options = ort.RunOptions()
    if device == "cuda":
        options.add_run_config_entry("gpu_graph_id", str(size))

    def run(image_NSS3: NDArray[np.uint8]) -> NDArray[np.float32]:
        image.update_inplace(image_NSS3)
        session.run_with_iobinding(bound, options)
        logits_NC: NDArray[np.float32] = logits.numpy()
        return logits_NC

    return run


def images_per_s(run: Run, batch_NSS3: NDArray[np.uint8], seconds: float) -> float:
    """Run a batch again and again, after three times that warm up."""
    for _ in range(3):
        run(batch_NSS3)
    done, begin = 0, time.perf_counter()
    while (taken := time.perf_counter() - begin) < seconds or not done:
        run(batch_NSS3)
        done += len(batch_NSS3)
    return done / taken if taken else float(done)


def speeds(
    engine: OnnxEngine,
    graphs: ort.InferenceSession,
    image_NSS3: NDArray[np.uint8],
    seconds: float,
    device: str = "cuda",
) -> dict[int, dict[str, float]]:
    """Images a second by batch size and way.

    Raises:
        ValueError: A graph gives other logits than the loop.
    """
    num_classes = len(engine.manifest.task.class_names)
    found: dict[int, dict[str, float]] = {}
    for size in batch_sizes(MAX_BATCH):
        batch_NSS3 = np.ascontiguousarray(np.resize(image_NSS3, (size, *image_NSS3.shape[1:])))
        graph = replayed(graphs, size, image_NSS3.shape[1:], num_classes, device)

        def loop(image_NSS3: NDArray[np.uint8]) -> NDArray[np.float32]:
            logits_NC: NDArray[np.float32] = engine.session.run(["logits"], {"image": image_NSS3})[0]
            return logits_NC

        expected_NC = loop(batch_NSS3)
        difference = float(np.abs(graph(batch_NSS3) - expected_NC).max())
        if not difference <= TOLERANCE * float(np.ptp(expected_NC)):
            raise ValueError(f"at batch size {size} the graph's logits differ by {difference:.3g} from the loop's")
        ways: Mapping[str, Run] = {"loop": loop, "bound": engine.logits, "graph": graph}
        found[size] = {name: images_per_s(run, batch_NSS3, seconds) for name, run in ways.items()}
    return found


def served_per_s(asked: Asked, seconds: float) -> float:
    """Right answers a second over HTTP; the service starts on CUDA or not at all."""
    bundle, media_type = asked.folder / "same", asked.workload.media_type
    with ours_running(bundle, asked.images[0], media_type, {"LTKD_DEVICE": "cuda"}, core=None) as running:
        seen = running.asked_alone(asked.images, media_type)
        questions = [running.question(image, media_type, one) for image, one in zip(asked.images, seen, strict=True)]
        return closed_loop(running.address, questions, connections=CONNECTIONS, seconds=10 * seconds).goodput()


def measured(asked: Asked, seconds: float) -> dict[str, object]:
    """Everything about one workload.

    Raises:
        DeviceError: CUDA does not work here.
    """
    bundle = open_bundle(asked.folder / "same")
    engine = open_engine(bundle, "cuda", max_batch=MAX_BATCH)
    graphs = ort.InferenceSession(
        bundle.model_path("fp32"), providers=[(CUDA, {**CUDA_OPTIONS, "enable_cuda_graph": "1"})]
    )
    pixels = [decode_image(image, asked.workload.input_px).pixels_SS3 for image in asked.images[:MAX_BATCH]]
    return {
        "provider": engine.provider,
        "images_per_s": speeds(engine, graphs, np.stack(pixels), seconds),
        "served_per_s": served_per_s(asked, seconds),
    }


def table(name: str, found: Mapping[str, object]) -> str:
    """A workload for people."""
    by_size = found["images_per_s"]
    assert isinstance(by_size, dict)
    lines = [f"{name}, {found['provider']}; over HTTP {found['served_per_s']:,.0f}/s", ""]
    lines += ["| batch | loop /s | bound /s | graph /s | graph over bound |", "|---|---|---|---|---|"]
    for size, ways in by_size.items():
        cells = [f"{ways[way]:,.0f}" for way in ("loop", "bound", "graph")]
        lines.append(f"| {size} | {' | '.join(cells)} | {ways['graph'] / ways['bound']:.2f} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Measure and report; the exit code is 2 where there is no CUDA."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__.partition("\n")[0])
    parser.add_argument("--workloads", type=listed(WORKLOADS), default=list(WORKLOADS), help=", ".join(WORKLOADS))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each batch size and way")
    given = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            asked = workloads_made(given.workloads, Path(folder))
            found = {name: measured(each, given.seconds) for name, each in asked.items()}
    except DeviceError as reason:
        print(reason, file=sys.stderr)
        return 2
    for name, each in found.items():
        print(table(name, each))
    about = circumstances("python -m benchmarks.cuda", ("onnxruntime-gpu", "numpy"))
    OUT.write_text(json.dumps({**about, "workloads": found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
