"""A small network with the layers that are hard to quantise, trained in seconds. Used by the tests of int8 and fp16."""

import functools

import numpy as np
import torch
from export_toys import TASK, coloured_images
from torch import Tensor, nn

from export.conversion.fp32 import to_onnx
from ltkd.data.image_files import LabelledImages
from ltkd.models.registry import Normalise


class SmallNet(nn.Module):
    """A stem, a pool, a residual block, a depthwise convolution with ReLU6, a linear bottleneck, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.first = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()
        )
        self.narrow = nn.Sequential(nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24))
        self.classifier = nn.Linear(24, 6)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.pool(self.stem(image))
        hidden = torch.relu(self.second(self.first(hidden)) + hidden)
        narrow: Tensor = self.narrow(self.depthwise(hidden))
        logits: Tensor = self.classifier(narrow.mean((2, 3)))
        return logits


@functools.cache
def small_net() -> nn.Module:
    images, labels = coloured_images([100] * 6, seed=1)
    torch.manual_seed(0)
    network = SmallNet()
    pixels = Normalise(TASK)(torch.from_numpy(images))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(pixels), torch.from_numpy(labels)).backward()
        optimizer.step()
    return network.eval()


@functools.cache
def small_onnx() -> bytes:
    return to_onnx(small_net(), TASK)


def labelled_images(num_images: int, seed: int) -> LabelledImages:
    """Return shuffled images with their labels, equally many of each class."""
    images, labels = coloured_images([num_images // 6] * 6, seed)
    order = np.random.default_rng(seed).permutation(len(labels))
    return LabelledImages(images[order], labels[order])
