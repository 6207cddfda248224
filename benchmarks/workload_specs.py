"""The workloads of the service benchmarks. benchmarks/workloads.py makes them; this module needs no torch."""

from dataclasses import dataclass

SLO_S = 2.0  # a response with a higher latency does not count as goodput


@dataclass(frozen=True)
class Workload:
    """A network and the images sent to it.

    Attributes:
        network: Name of the network, as in ``ltkd train``.
        input_px: Side of its input.
        media_type: Media type of the images.
        image_px: Width and height of the images.
        num_images: Number of images, which are sent in turn.
    """

    network: str
    input_px: int
    media_type: str
    image_px: tuple[int, int]
    num_images: int = 64


WORKLOADS = {
    "resnet8": Workload("resnet8", 32, "image/png", (32, 32)),
    "resnet20": Workload("resnet20", 32, "image/png", (32, 32)),
    "photographs": Workload("torchvision/resnet18", 224, "image/jpeg", (500, 375)),
    "12 MP": Workload("torchvision/resnet18", 224, "image/jpeg", (4000, 3000), num_images=16),  # 3 MB, as phones take
}
