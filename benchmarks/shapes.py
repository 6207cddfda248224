"""The three workloads by name: what is asked of a service. benchmarks/workloads.py makes them; this needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """What is asked for.

    Attributes:
        network: As ``ltkd train`` names it.
        input_px: Side of its input.
        media_type: Of the images.
        slo_s: An answer that takes longer is of no use.
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
