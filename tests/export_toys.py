"""A small network that trains in a second, and functions that damage its ONNX file, for the tests of export."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper
from torch import Tensor, nn

from export.conversion.fp32 import to_onnx
from ltkd.contract.class_groups import ClassGroups
from ltkd.contract.task import Task

TASK = Task(
    class_names=("ant", "bee", "cat", "dog", "eel", "fox"),
    train_counts=(600, 300, 100, 50, 10, 5),
    groups=ClassGroups(names=("head", "medium", "tail"), group_of_class=(0, 0, 1, 1, 2, 2)),
    input_px=8,
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.25, 0.3),
)
TAIL_CLASSES = TASK.groups.members("tail")


class TinyNet(nn.Module):
    """Convolution, batch normalisation, pooling and classifier: a small network with the usual risks of an export."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = norm or nn.BatchNorm2d(12)
        self.classifier = nn.Linear(12, 6)

    def forward(self, image: Tensor) -> Tensor:
        hidden: Tensor = self.norm(self.conv(image))
        logits: Tensor = self.classifier(torch.relu(hidden).mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Toy:
    network: nn.Module
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    candidate: bytes


@functools.cache
def toy() -> Toy:
    """A trained network that classifies most but not all of 10,000 images correctly; 600 are of tail classes."""
    images, labels = coloured_images([2350, 2350, 2350, 2350, 300, 300], seed=0)
    network = trained(*coloured_images([200] * 6, seed=1))
    return Toy(network, images, labels, to_onnx(network, TASK))


def coloured_images(counts: list[int], seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images of noise around one colour per class."""
    rng = np.random.default_rng(seed)
    colours = np.array([[200, 80, 60], [60, 80, 200], [80, 190, 60], [180, 180, 60], [60, 180, 180], [120, 120, 120]])
    labels = np.repeat(np.arange(6), counts)
    cast = rng.normal(0, 28, (len(labels), 1, 1, 3))
    pixels = colours[labels][:, None, None, :] + cast + rng.normal(0, 20, (len(labels), 8, 8, 3))
    return pixels.clip(0, 255).astype(np.uint8), labels


def trained(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> nn.Module:
    torch.manual_seed(0)
    network = TinyNet()
    mean, std = torch.tensor(TASK.mean), torch.tensor(TASK.std)
    pixels = ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(pixels), torch.from_numpy(labels)).backward()
        optimizer.step()
    return network.eval()


def damaged(candidate: bytes, name: str, damage: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> bytes:
    """The same model with one weight changed."""

    def change(model: ModelProto) -> None:
        (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
        changed = np.ascontiguousarray(damage(numpy_helper.to_array(weight).copy()), dtype=np.float32)
        weight.CopyFrom(numpy_helper.from_array(changed, name))

    return edited(candidate, change)


def edited(candidate: bytes, change: Callable[[ModelProto], None]) -> bytes:
    """The same model after any change to its protobuf."""
    model = onnx.load_model_from_string(candidate)
    change(model)
    return bytes(model.SerializeToString())
