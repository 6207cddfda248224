"""The networks on which distillation papers compare methods, in their CIFAR form.

They take normalised float images [N, 3, S, S] of any size S >= 8 and return logits [N, C]. The stems are designed for
32 px; images of 224 px work but are slow. The map of the last stage is averaged with a plain ``mean((2, 3))``, because
adaptive pooling with a dynamic batch exports to a graph that quantisation tools reject.

Sources: He et al., arXiv 1512.03385 (ResNet); Zagoruyko and Komodakis, arXiv 1605.07146 (wide ResNet); Zhang et al.,
arXiv 1707.01083 (ShuffleNet); Sandler et al., arXiv 1801.04381 (MobileNetV2). Widths, strides and the shortcuts of the
wide networks are those of the usual distillation benchmark, so the numbers of parameters are the published ones.
"""

from itertools import accumulate, chain
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FeatureNetwork(Protocol):
    """A network that returns its intermediate maps, as feature distillation needs; every network here does.

    ``network(image)`` is ``network.classifier(network.features(image)[-1])``.
    """

    classifier: nn.Module

    def features(self, image: Tensor) -> list[Tensor]:
        """Return the map of every stage [N, D, H, W], shallow to deep, and then the pooled embedding [N, D].

        The maps are those before the last ReLU of each stage. Feature distillation matches these, because the negative
        values that ReLU removes show how far a unit is from being active. Wide networks normalise before they
        convolve, so their maps are taken after the normalisation that follows the stage. The stages of MobileNetV2 do
        not end with a ReLU.
        """


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut around them."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _projection(width_in, width, stride)

    def forward(self, image: Tensor) -> Tensor:
        """The map before the closing ReLU, halved in size when the block has stride 2."""
        hidden = F.relu(self.bn1(self.conv1(image)))
        return self.bn2(self.conv2(hidden)) + self.shortcut(image)  # type: ignore[no-any-return]


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones, at a quarter of the block's width, with a shortcut around them."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        narrow = width // 4
        self.conv1 = nn.Conv2d(width_in, narrow, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = nn.Conv2d(narrow, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.shortcut = _projection(width_in, width, stride)

    def forward(self, image: Tensor) -> Tensor:
        """The map before the closing ReLU, halved in size when the block has stride 2."""
        hidden = F.relu(self.bn1(self.conv1(image)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        return self.bn3(self.conv3(hidden)) + self.shortcut(image)  # type: ignore[no-any-return]


class ShuffleBlock(nn.Module):
    """Grouped 1x1 convolutions around a depthwise one; the channels change groups in between.

    With stride 2 the averaged input is concatenated with the new channels instead of added to them.

    Args:
        width_in: Channels of the input.
        width: Channels of the output.
        stride: 1 or 2.
        groups: Groups of the two 1x1 convolutions.
        groups_in: Groups of the first of them; 1 if the input is too narrow for groups.
    """

    def __init__(self, width_in: int, width: int, stride: int, *, groups: int, groups_in: int) -> None:
        super().__init__()
        new = width - width_in if stride == 2 else width
        narrow = new // 4
        self.stride, self.groups_in = stride, groups_in
        self.conv1 = nn.Conv2d(width_in, narrow, 1, groups=groups_in, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride, padding=1, groups=narrow, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)
        self.conv3 = nn.Conv2d(narrow, new, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(new)

    def forward(self, image: Tensor) -> Tensor:
        """The map before the closing ReLU, halved in size when the block has stride 2."""
        hidden = F.relu(self.bn1(self.conv1(image)))
        if self.groups_in > 1:
            hidden = torch.unflatten(hidden, 1, (self.groups_in, -1)).transpose(1, 2).flatten(1, 2)
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        new: Tensor = self.bn3(self.conv3(hidden))
        if self.stride == 1:
            return new + image
        return torch.cat([new, F.avg_pool2d(image, 3, stride=2, padding=1)], dim=1)


class ResidualNetwork(nn.Module):
    """A stem, stages of residual blocks with a ReLU after each, the mean over the map and a linear classifier.

    Args:
        num_classes: C.
        stem: The first convolution.
        stages: The blocks of every stage; a block returns its map before the ReLU.
        width: Channels of the last stage.
    """

    def __init__(self, num_classes: int, *, stem: nn.Conv2d, stages: list[list[nn.Module]], width: int) -> None:
        super().__init__()
        self.conv = stem
        self.bn = nn.BatchNorm2d(stem.out_channels)
        self.blocks = nn.ModuleList(chain.from_iterable(stages))
        self.stage_ends = frozenset(accumulate(len(stage) for stage in stages))
        self.classifier = nn.Linear(width, num_classes)

    def features(self, image: Tensor) -> list[Tensor]:
        """The maps of the stages before their last ReLU, and the pooled embedding."""
        maps = []
        hidden = F.relu(self.bn(self.conv(image)))
        for num_blocks, block in enumerate(self.blocks, start=1):
            summed = block(hidden)
            if num_blocks in self.stage_ends:
                maps.append(summed)
            hidden = F.relu(summed)
        return [*maps, hidden.mean((2, 3))]

    def forward(self, image: Tensor) -> Tensor:
        """Logits [N, C]."""
        return self.classifier(self.features(image)[-1])  # type: ignore[no-any-return]


def resnet(num_classes: int, *, depth: int, widths: tuple[int, int, int, int]) -> ResidualNetwork:
    """A CIFAR residual network of depth 6n + 2.

    Args:
        num_classes: C.
        depth: 6n + 2.
        widths: Channels of the stem and of the three stages.
    """
    blocks_per_stage, rest = divmod(depth - 2, 6)
    assert rest == 0, "the depth of these networks is 6n + 2"
    return _resnet(num_classes, BasicBlock, widths, (blocks_per_stage,) * 3)


def resnet50(num_classes: int) -> ResidualNetwork:
    """ResNet-50 with a 3x3 stem of stride 1 instead of the 7x7 stem and its pooling."""
    return _resnet(num_classes, Bottleneck, (64, 256, 512, 1024, 2048), (3, 4, 6, 3))


def shufflenet_v1(num_classes: int) -> ResidualNetwork:
    """ShuffleNet with 3 groups and a 1x1 stem of stride 1; every one of its three stages halves the map."""
    groups, widths = 3, (24, 240, 480, 960)
    stem = nn.Conv2d(3, widths[0], 1, bias=False)
    stages: list[list[nn.Module]] = []
    for stage, (width_in, width, num_blocks) in enumerate(zip(widths[:-1], widths[1:], (4, 8, 4), strict=True)):
        first = ShuffleBlock(width_in, width, 2, groups=groups, groups_in=1 if stage == 0 else groups)
        rest = [ShuffleBlock(width, width, 1, groups=groups, groups_in=groups) for _ in range(num_blocks - 1)]
        stages.append([first, *rest])
    return ResidualNetwork(num_classes, stem=stem, stages=stages, width=widths[-1])


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, normalised before each, with a shortcut around them.

    If the width changes, the shortcut is a 1x1 convolution of the normalised input, without normalisation after it.
    """

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False) if width_in != width else None

    def forward(self, image: Tensor, normalised: Tensor) -> Tensor:
        """The block's map, from its input and the same input after ``bn1``."""
        active = F.relu(normalised)
        hidden: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return hidden + (image if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """A wide residual network of depth 6n + 4.

    Args:
        num_classes: C.
        depth: 6n + 4.
        widening: Factor of the stages' widths, 16, 32 and 64.
    """

    def __init__(self, num_classes: int, *, depth: int, widening: int) -> None:
        super().__init__()
        blocks_per_stage, rest = divmod(depth - 4, 6)
        assert rest == 0, "the depth of these networks is 6n + 4"
        widths = (16, 16 * widening, 32 * widening, 64 * widening)
        self.conv = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            chain.from_iterable(_stages(PreActivationBlock, widths, (blocks_per_stage,) * 3)),
        )
        self.bn = nn.BatchNorm2d(widths[-1])
        self.classifier = nn.Linear(widths[-1], num_classes)
        self.stage_starts = (blocks_per_stage, 2 * blocks_per_stage)
        _initialise(self)
        nn.init.zeros_(self.classifier.bias)

    def features(self, image: Tensor) -> list[Tensor]:
        """The normalised maps of the stages before their ReLU, and the pooled embedding."""
        maps = []
        hidden = self.conv(image)
        for number, block in enumerate(self.blocks):
            normalised = block.bn1(hidden)  # type: ignore[operator]
            if number in self.stage_starts:
                maps.append(normalised)
            hidden = block(hidden, normalised)
        normalised = self.bn(hidden)
        return [*maps, normalised, F.relu(normalised).mean((2, 3))]

    def forward(self, image: Tensor) -> Tensor:
        """Logits [N, C]."""
        return self.classifier(self.features(image)[-1])  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """A depthwise 3x3 convolution at a multiple of the block's width; no ReLU follows the last convolution."""

    def __init__(self, width_in: int, width: int, stride: int, *, expansion: int) -> None:
        super().__init__()
        wide = expansion * width_in
        self.conv1 = nn.Conv2d(width_in, wide, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3 = nn.Conv2d(wide, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.adds_input = stride == 1 and width_in == width

    def forward(self, image: Tensor) -> Tensor:
        """The block's map, halved in size when it has stride 2."""
        hidden = F.relu(self.bn1(self.conv1(image)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        narrow: Tensor = self.bn3(self.conv3(hidden))
        return narrow + image if self.adds_input else narrow


class MobileNetV2(nn.Module):
    """MobileNetV2 for small images at half width: expansion 6, first convolution of stride 2.

    ``features`` divides it into four stages, one for each size of the map.
    """

    # for every stage, its groups of blocks: expansion, width, number of blocks, stride of the first block
    STAGES = (
        ((1, 8, 1, 1), (6, 12, 2, 1)),
        ((6, 16, 3, 2),),
        ((6, 32, 4, 2), (6, 48, 3, 1)),
        ((6, 80, 3, 2), (6, 160, 1, 1)),
    )

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        width_in, width_out = 16, 1280
        self.conv1 = nn.Conv2d(3, width_in, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_in)
        self.stages = nn.ModuleList()
        for stage in self.STAGES:
            blocks = []
            for expansion, width, num_blocks, stride in stage:
                for block in range(num_blocks):
                    blocks.append(InvertedResidual(width_in, width, stride if block == 0 else 1, expansion=expansion))
                    width_in = width
            self.stages.append(nn.Sequential(*blocks))
        self.conv2 = nn.Conv2d(width_in, width_out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.classifier = nn.Linear(width_out, num_classes)
        _initialise(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def features(self, image: Tensor) -> list[Tensor]:
        """The maps of the stages and the pooled embedding."""
        maps = []
        hidden = F.relu(self.bn1(self.conv1(image)))
        for stage in self.stages:
            hidden = stage(hidden)
            maps.append(hidden)
        return [*maps, F.relu(self.bn2(self.conv2(hidden))).mean((2, 3))]

    def forward(self, image: Tensor) -> Tensor:
        """Logits [N, C]."""
        return self.classifier(self.features(image)[-1])  # type: ignore[no-any-return]


def _projection(width_in: int, width: int, stride: int) -> nn.Module:
    """The shortcut of a block: the identity if the shape does not change, else a normalised 1x1 convolution."""
    if stride == 1 and width_in == width:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))


class _BlockType(Protocol):
    def __call__(self, width_in: int, width: int, stride: int) -> nn.Module: ...


def _resnet(
    num_classes: int, block: _BlockType, widths: tuple[int, ...], num_blocks: tuple[int, ...]
) -> ResidualNetwork:
    """A residual network with a 3x3 stem.

    The order of the random draws must not change, or a seed would give other weights.
    """
    stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
    network = ResidualNetwork(num_classes, stem=stem, stages=_stages(block, widths, num_blocks), width=widths[-1])
    _initialise(network)
    return network


def _stages(block: _BlockType, widths: tuple[int, ...], num_blocks: tuple[int, ...]) -> list[list[nn.Module]]:
    """The blocks of every stage; all but the first stage begin with stride 2. ``widths[0]`` is that of the stem."""
    stages = []
    for stage, (width_in, width, number) in enumerate(zip(widths[:-1], widths[1:], num_blocks, strict=True)):
        first = block(width_in, width, 2 if stage > 0 else 1)
        stages.append([first, *(block(width, width, 1) for _ in range(number - 1))])
    return stages


def _initialise(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
