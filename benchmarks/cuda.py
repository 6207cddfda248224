"""The service on a GPU: every batch size with and without CUDA graphs, compared with a plain loop.

    python -m benchmarks.cuda [--workloads A,B] [--seconds S]

Writes docs/benchmarks/cuda.json and prints a table. For the float32 bundle of each workload (benchmarks/workloads.py),
the engine of the service first checks CUDA on the golden samples. Then the images per second are measured by batch
size:

    loop        session.run on arrays, as a program without a service does
    bound       as the engine runs it: input and output bound to the device
    graph       one CUDA graph per batch size, replayed; its logits must agree with those of the loop

It also measures the service over HTTP, with enough connections to fill its batches. Before all that, it exports and
serves networks of several kinds on CUDA and lists which nodes run where (benchmarks/cuda_networks.py); if one of them
is refused, the exit code is 1. Without CUDA it prints the reason and exits with code 2.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks.cuda_networks import NETWORKS, check_networks, networks_table
from benchmarks.load import closed_loop
from benchmarks.run_metadata import run_metadata
from benchmarks.servers import ROOT, running_service
from benchmarks.serving import WorkloadInputs, comma_separated, make_workloads
from benchmarks.workload_specs import WORKLOADS
from export.conversion.session import require_cuda
from ltkd.contract.bundle import open_bundle
from ltkd.contract.image_decoding import decode_image
from ltkd.contract.preprocessing import Preprocessing
from ltkd.errors import DeviceError
from serve.engine.session import CUDA, CUDA_OPTIONS, OnnxEngine, batch_sizes, open_engine

OUT = ROOT / "docs" / "benchmarks" / "cuda.json"
MAX_BATCH, CONNECTIONS = 32, 96
TOLERANCE = 1e-3  # relative to the range of the logits: far above the effect of another order of summation

InferFunction = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""From uint8 [N, S, S, 3] to logits, float32 [N, C]."""


def fixed_memory_runner(
    session: ort.InferenceSession, size: int, shape: Sequence[int], num_classes: int, device: str
) -> InferFunction:
    """A function that runs one batch size on device memory with fixed addresses, as a CUDA graph requires.

    Args:
        session: Made with ``enable_cuda_graph`` if the device is ``cuda``.
        size: Images in a batch.
        shape: Shape of an image.
        num_classes: C.
        device: ``cuda``; ``cpu`` runs the same calls without a graph.
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


def images_per_s(run: InferFunction, batch_NSS3: NDArray[np.uint8], seconds: float) -> float:
    """Run a batch repeatedly, after three runs of warm-up."""
    for _ in range(3):
        run(batch_NSS3)
    num_images, begin = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds or not num_images:
        run(batch_NSS3)
        num_images += len(batch_NSS3)
    return num_images / elapsed if elapsed else float(num_images)


def speeds(
    engine: OnnxEngine,
    graphs: ort.InferenceSession,
    image_NSS3: NDArray[np.uint8],
    seconds: float,
    device: str = "cuda",
) -> dict[int, dict[str, float]]:
    """Images per second by batch size and way of running.

    Raises:
        ValueError: A graph gives other logits than the loop.
    """
    num_classes = len(engine.manifest.task.class_names)
    found: dict[int, dict[str, float]] = {}
    for size in batch_sizes(MAX_BATCH):
        batch_NSS3 = np.ascontiguousarray(np.resize(image_NSS3, (size, *image_NSS3.shape[1:])))
        graph = fixed_memory_runner(graphs, size, image_NSS3.shape[1:], num_classes, device)

        def loop(image_NSS3: NDArray[np.uint8]) -> NDArray[np.float32]:
            logits_NC: NDArray[np.float32] = engine.session.run(["logits"], {"image": image_NSS3})[0]
            return logits_NC

        expected_NC = loop(batch_NSS3)
        difference = float(np.abs(graph(batch_NSS3) - expected_NC).max())
        if not difference <= TOLERANCE * float(np.ptp(expected_NC)):
            raise ValueError(f"at batch size {size} the graph's logits differ by {difference:.3g} from the loop's")
        ways: Mapping[str, InferFunction] = {"loop": loop, "bound": engine.logits, "graph": graph}
        found[size] = {name: images_per_s(run, batch_NSS3, seconds) for name, run in ways.items()}
    return found


def responses_per_s(inputs: WorkloadInputs, seconds: float) -> float:
    """Correct responses per second over HTTP; the service does not start if CUDA does not work."""
    bundle, media_type = inputs.folder / "same", inputs.workload.media_type
    with running_service(bundle, inputs.images[0], media_type, {"LTKD_DEVICE": "cuda"}, core=None) as running:
        predictions = running.predict_one_by_one(inputs.images, media_type)
        requests = [
            running.request(image, media_type, prediction)
            for image, prediction in zip(inputs.images, predictions, strict=True)
        ]
        return closed_loop(running.address, requests, connections=CONNECTIONS, seconds=10 * seconds).goodput()


def measure_workload(inputs: WorkloadInputs, seconds: float) -> dict[str, object]:
    """Measure one workload.

    Raises:
        DeviceError: CUDA does not work here.
    """
    bundle = open_bundle(inputs.folder / "same")
    engine = open_engine(bundle, "cuda", max_batch=MAX_BATCH)
    graphs = ort.InferenceSession(
        bundle.model_path("fp32"), providers=[(CUDA, {**CUDA_OPTIONS, "enable_cuda_graph": "1"})]
    )
    preprocessing = Preprocessing(input_px=inputs.workload.input_px)
    pixels = [decode_image(image, preprocessing).pixels_SS3 for image in inputs.images[:MAX_BATCH]]
    return {
        "provider": engine.provider,
        "images_per_s": speeds(engine, graphs, np.stack(pixels), seconds),
        "served_per_s": responses_per_s(inputs, seconds),
    }


def table(name: str, found: Mapping[str, object]) -> str:
    """The results of a workload as a Markdown table."""
    by_size = found["images_per_s"]
    assert isinstance(by_size, dict)
    lines = [f"{name}, {found['provider']}; over HTTP {found['served_per_s']:,.0f}/s", ""]
    lines += ["| batch | loop /s | bound /s | graph /s | graph over bound |", "|---|---|---|---|---|"]
    for size, ways in by_size.items():
        cells = [f"{ways[way]:,.0f}" for way in ("loop", "bound", "graph")]
        lines.append(f"| {size} | {' | '.join(cells)} | {ways['graph'] / ways['bound']:.2f} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Measure and write the report; the exit code is 1 if a network is refused and 2 without CUDA."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--workloads", type=comma_separated(WORKLOADS), default=list(WORKLOADS), help=", ".join(WORKLOADS)
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds per batch size and way of running")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            require_cuda()
            networks = check_networks(NETWORKS, Path(folder, "networks"))
            inputs = make_workloads(arguments.workloads, Path(folder))
            results = {name: measure_workload(workload, arguments.seconds) for name, workload in inputs.items()}
    except DeviceError as reason:
        print(reason, file=sys.stderr)
        return 2
    print(networks_table(networks))
    for name, result in results.items():
        print(table(name, result))
    listed = [{**asdict(one), "nodes": one.nodes and one.nodes.model_dump()} for one in networks]
    metadata = run_metadata("python -m benchmarks.cuda", ("onnxruntime-gpu", "numpy"))
    OUT.write_text(json.dumps({**metadata, "networks": listed, "workloads": results}, indent=2) + "\n")
    return 1 if any(one.nodes is None for one in networks) else 0


if __name__ == "__main__":
    sys.exit(main())
