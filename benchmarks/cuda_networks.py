"""Whether networks of several kinds are certified and served on CUDA, and which of their nodes run on the CPU.

``python -m benchmarks.cuda`` runs this first. Each network is exported in float32 and float16 with a dynamic batch.
Then export opens it on the device, as the gates do, and ``ltkd serve`` serves it there, which replays the golden
samples and gives the assignment of the nodes at /v1/model. A refusal is a result too, with its reason.

Shape legend: N images, S side in pixels.
"""

import json
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.servers import NotStartedError, running_service
from benchmarks.workload_specs import WORKLOADS, Workload
from benchmarks.workloads import NUM_CLASSES, encode_image, task_of, write_bundle
from export.conversion.fp16 import to_fp16
from export.conversion.fp32 import to_onnx
from export.conversion.session import CPU, CUDA, open_session, run
from ltkd.contract.bundle import Golden, Precision
from ltkd.contract.image_decoding import decode_image
from ltkd.contract.node_assignment import NodeAssignment
from ltkd.errors import DeviceError
from ltkd.models.registry import build_network

NETWORKS = {
    name: replace(WORKLOADS["photographs"], network=f"torchvision/{name}")
    for name in ("resnet18", "mobilenet_v3_small", "vit_b_16", "swin_t")
}
"""With and without shapes that depend on the batch size."""
NUM_IMAGES = 12


@dataclass(frozen=True)
class NetworkResult:
    """What became of one network in one precision.

    Attributes:
        network: Its name.
        precision: Number format of its weights.
        nodes: Where its nodes run in the service; None if it was refused.
        reason: Why it was refused; empty if it is served.
    """

    network: str
    precision: Precision
    nodes: NodeAssignment | None
    reason: str = ""


def check_networks(
    networks: Mapping[str, Workload],
    folder: Path,
    device: Literal["auto", "cuda"] = "cuda",
    precisions: Sequence[Precision] = ("fp32", "fp16"),
) -> list[NetworkResult]:
    """Export and serve each network on a device, in each precision.

    Args:
        networks: Name to network and size of its input.
        folder: Where bundles are written.
        device: ``auto`` makes the same calls on a machine without a GPU.
        precisions: ``fp32``, ``fp16`` or both.
    """
    results = []
    for name, workload in networks.items():
        task = task_of(workload)
        fp32 = to_onnx(build_network(workload.network, NUM_CLASSES, seed=0), task)
        images = [encode_image(number, workload) for number in range(NUM_IMAGES)]
        for precision in precisions:
            model = fp32 if precision == "fp32" else to_fp16(fp32)
            pixels_NSS3 = np.stack([decode_image(image, task.preprocessing).pixels_SS3 for image in images])
            try:
                logits_NC = run(open_session(model, CUDA if device == "cuda" else CPU), pixels_NSS3)
                bundle = folder / name / precision
                golden = Golden(pixels_NSS3, logits_NC.argmax(axis=1), {"fp32": logits_NC, precision: logits_NC})
                write_bundle(bundle, task, {"fp32": fp32, precision: model}, golden)
                nodes = served_nodes(bundle, images[0], workload.media_type, device, precision)
                results.append(NetworkResult(name, precision, nodes))
            except (DeviceError, NotStartedError) as reason:
                results.append(NetworkResult(name, precision, None, str(reason)))
    return results


def served_nodes(bundle: Path, image: bytes, media_type: str, device: str, precision: Precision) -> NodeAssignment:
    """Serve a bundle on a device, have it classify an image, and read where its nodes run.

    Raises:
        NotStartedError: The service does not start on the device.
    """
    variables = {"LTKD_DEVICE": device, "LTKD_PRECISION": precision}
    with running_service(bundle, image, media_type, variables, core=None) as running:
        host, port = running.address
        with urllib.request.urlopen(f"http://{host}:{port}/v1/model", timeout=30) as response:
            return NodeAssignment.model_validate(json.load(response)["nodes"])


def networks_table(results: Sequence[NetworkResult]) -> str:
    """The results as a Markdown table."""
    lines = ["| network | precision | nodes | of these, nodes that compute shapes elsewhere |", "|---|---|---|---|"]
    for result in results:
        if result.nodes is None:
            cells = [f"refused: {result.reason}", ""]
        else:
            counts = ", ".join(f"{num} {provider}" for provider, num in sorted(result.nodes.num_nodes.items()))
            cells = [counts, ", ".join(result.nodes.shape_nodes) or "none"]
        lines.append(f"| {result.network} | {result.precision} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
