import numpy as np
import pytest
import torch
from torch import nn

from ltkd.errors import UsageError
from ltkd.groups import ClassGroups
from ltkd.networks import MODELS, Normalise, build_network
from ltkd.task import Task


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("name", "expected"), [("resnet8x4", 1_233_540), ("resnet32x4", 7_433_860)])
def test_the_networks_of_the_benchmark_have_the_published_size(name: str, expected: int) -> None:
    assert num_parameters(build_network(name, num_classes=100, seed=0)) == expected


@pytest.mark.parametrize("size_px", [8, 24, 32, 33, 64])
def test_a_network_takes_images_of_any_size(size_px: int) -> None:
    with torch.inference_mode():
        logits = build_network("resnet8", 7, seed=0)(torch.rand(2, 3, size_px, size_px))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_a_network_is_as_deep_as_its_name_says(name: str) -> None:
    modules = list(build_network(name, 5, seed=0).modules())
    convolutions = sum(isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) for module in modules)
    assert f"resnet{convolutions + 1}" == name.removesuffix("x4")  # the classifier is a layer, a shortcut is not


def test_an_unknown_network_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown model 'resnet9'; known: resnet8, .*resnet32x4\."):
        build_network("resnet9", 10, seed=0)


def test_the_seed_decides_the_weights_and_the_random_state_of_the_caller_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_network("resnet8", 10, seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected)
    again, other = (build_network("resnet8", 10, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv.weight"], other["conv.weight"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA")
def test_the_random_state_of_the_gpu_is_left_alone() -> None:
    before = torch.cuda.get_rng_state()
    build_network("resnet8", 10, seed=1)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_normalising_is_subtracting_the_mean_and_dividing_by_the_deviation() -> None:
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    groups = ClassGroups(names=("a", "b"), group_of_class=(0, 1))
    task = Task(class_names=("x", "y"), train_counts=(1, 1), groups=groups, input_px=16, mean=mean, std=std)
    pixels = np.arange(2 * 16 * 16 * 3).reshape(2, 16, 16, 3).astype(np.uint8)  # every level in every channel
    expected = ((pixels / 255 - mean) / std).transpose(0, 3, 1, 2)
    normalised = Normalise(task)(torch.from_numpy(pixels))
    assert normalised.dtype == torch.float32
    # float32 values up to 2.1 by two rounded constants: some 1e-6
    np.testing.assert_allclose(normalised.numpy(), expected, atol=2e-6)
    assert not Normalise(task).state_dict()  # nothing for a file of weights
