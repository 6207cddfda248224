"""The three workloads of the service benchmarks. benchmarks/workloads.py makes them; this module needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """A network and the images sent to it.

    Attributes:
        network: Name of the network, as in ``ltkd train``.
        input_px: Side of its input.
        media_type: Media type of the images.
        slo_s: A response with a higher latency does not count as goodput.
    """

    network: str
    input_px: int
    media_type: str
    slo_s: float


WORKLOADS = {
    "resnet8": Workload("resnet8", 32, "image/png", slo_s=0.1),
    "resnet20": Workload("resnet20", 32, "image/png", slo_s=0.1),
    "photographs": Workload("torchvision/resnet18", 224, "image/jpeg", slo_s=1.0),
}
