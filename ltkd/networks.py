"""Networks by name: the CIFAR residual networks that distillation papers compare on.

They take normalised float images [N, 3, S, S] of any size S >= 8 and give logits [N, C].
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltkd.errors import UsageError
from ltkd.task import Task


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False),
                nn.BatchNorm2d(width),
            )

    def forward(self, image: Tensor) -> Tensor:
        """Feature maps, halved in size when the block has stride 2."""
        hidden = F.relu(self.bn1(self.conv1(image)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(image))


class ResNet(nn.Module):
    """A CIFAR residual network of depth 6n + 2.

    Args:
        num_classes: C.
        depth: 6n + 2.
        widths: Channels of the stem and of the three stages.
    """

    def __init__(self, num_classes: int, *, depth: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        blocks_per_stage, rest = divmod(depth - 2, 6)
        assert rest == 0, "the depth of these networks is 6n + 2"
        self.conv = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        blocks = []
        width_in = widths[0]
        for stage, width in enumerate(widths[1:]):
            for block in range(blocks_per_stage):
                blocks.append(BasicBlock(width_in, width, stride=2 if stage > 0 and block == 0 else 1))
                width_in = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        """Logits [N, C]."""
        features = self.blocks(F.relu(self.bn(self.conv(image))))
        # a plain mean: adaptive pooling with a dynamic batch exports to a graph that quantisation tools reject
        return self.classifier(features.mean((2, 3)))  # type: ignore[no-any-return]


_NARROW = (16, 16, 32, 64)
_WIDE = (32, 64, 128, 256)

MODELS: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{depth}": partial(ResNet, depth=depth, widths=_NARROW) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet{depth}x4": partial(ResNet, depth=depth, widths=_WIDE) for depth in (8, 32)},
}


def model_of(name: str) -> Callable[[int], nn.Module]:
    """What builds a network of that name for a number of classes.

    Raises:
        UsageError: The name is not in MODELS.
    """
    if name not in MODELS:
        raise UsageError(f"unknown model '{name}'; known: {', '.join(MODELS)}.")
    return MODELS[name]


def build_network(name: str, num_classes: int, seed: int) -> nn.Module:
    """A freshly initialised network; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too, for the caller as well
        return model_of(name)(num_classes)


class Normalise(nn.Module):
    """Pixels to network input: uint8 [N, S, S, 3] to float32 [N, 3, S, S] with one multiply and one add."""

    scale: Tensor
    shift: Tensor

    def __init__(self, task: Task) -> None:
        super().__init__()
        mean, std = torch.tensor(task.mean).view(1, 3, 1, 1), torch.tensor(task.std).view(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, pixels_NSS3: Tensor) -> Tensor:
        """Normalised images, channels last in memory."""
        return pixels_NSS3.permute(0, 3, 1, 2).to(self.scale.dtype) * self.scale + self.shift
