import pytest
import torch
from torch import Tensor, nn

from export.certification.reference import torch_logits
from export.conversion.fp32 import to_onnx
from export.conversion.session import open_session, run
from ltkd.contract.class_groups import ClassGroups
from ltkd.contract.task import Task
from ltkd.models.cifar import resnet
from ltkd.models.registry import MODELS, build_network

PUBLISHED_SIZES = {
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_2": 2_255_156,
    "shufflenetv1": 949_258,
    "mobilenetv2": 812_836,
    "resnet50": 23_705_252,
}
# channels and side of the maps for a 32 px image, from the configurations of the distillation benchmarks
FEATURES = {
    "resnet20": [(16, 32), (32, 16), (64, 8), (64,)],
    "resnet8x4": [(64, 32), (128, 16), (256, 8), (256,)],
    "wrn_16_2": [(32, 32), (64, 16), (128, 8), (128,)],
    "wrn_40_1": [(16, 32), (32, 16), (64, 8), (64,)],
    "shufflenetv1": [(240, 16), (480, 8), (960, 4), (960,)],
    "mobilenetv2": [(12, 16), (16, 8), (48, 4), (160, 2), (1280,)],
    "resnet50": [(256, 32), (512, 16), (1024, 8), (2048, 4), (2048,)],
}


def on_meta(name: str) -> nn.Module:
    """A network on the meta device, which has shapes but no values."""
    with torch.device("meta"):
        return MODELS[name](100)


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_the_networks_of_the_benchmark_have_the_published_size(name: str) -> None:
    assert sum(parameter.numel() for parameter in on_meta(name).parameters()) == PUBLISHED_SIZES[name]


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("resnet") and name != "resnet50"])
def test_a_residual_network_is_as_deep_as_its_name_says(name: str) -> None:
    # the depth counts the classifier and no shortcuts
    assert f"resnet{num_convolutions(name) + 1}" == name.removesuffix("x4")


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("wrn")])
def test_a_wide_network_is_as_deep_as_its_name_says(name: str) -> None:
    # the depth 6n + 4 of the paper counts one shortcut per stage, even if there is none, and not the classifier
    assert f"wrn_{num_convolutions(name) + 3}" == name.rpartition("_")[0]


def num_convolutions(name: str) -> int:
    return sum(isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) for module in on_meta(name).modules())


@pytest.mark.parametrize("name", FEATURES)
def test_features_are_the_map_of_every_stage_and_the_embedding(name: str) -> None:
    features = on_meta(name).features(torch.zeros(2, 3, 32, 32, device="meta"))  # type: ignore[operator]
    assert [tuple(feature.shape) for feature in features] == [(2, *shape, *shape[1:]) for shape in FEATURES[name]]


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "shufflenetv1", "mobilenetv2"])
def test_the_logits_are_the_classifier_of_the_embedding_and_the_embedding_is_the_mean_of_an_active_map(
    name: str,
) -> None:
    network = build_network(name, 7, seed=0).eval()
    image = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        *maps, embedding = network.features(image)  # type: ignore[operator]
        assert torch.equal(network(image), network.classifier(embedding))  # type: ignore[operator]
        assert embedding.min() >= 0
        assert all(map_before_relu.min() < 0 for map_before_relu in maps)
        if name != "mobilenetv2":  # it has one more convolution after its last stage
            assert torch.equal(maps[-1].relu().mean((2, 3)), embedding)


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "shufflenetv1", "mobilenetv2"])
@pytest.mark.parametrize("size_px", [8, 33, 64])
def test_a_network_takes_images_of_any_size(name: str, size_px: int) -> None:
    with torch.inference_mode():
        logits = build_network(name, 7, seed=0)(torch.rand(2, 3, size_px, size_px))
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2"])
def test_a_network_takes_a_photograph(name: str) -> None:
    with torch.inference_mode():
        assert build_network(name, 7, seed=0).eval()(torch.rand(1, 3, 224, 224)).shape == (1, 7)


@pytest.mark.parametrize("name", ["resnet8", "resnet50", "wrn_16_2", "shufflenetv1", "mobilenetv2"])
def test_every_weight_gets_a_gradient(name: str) -> None:
    network = build_network(name, 3, seed=0)
    network(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []


def test_a_seed_gives_the_same_weights_as_in_existing_runs() -> None:
    network = resnet8_of_seed(0)
    torch.manual_seed(0)
    widths = [(3, 16, 3), (16, 16, 3), (16, 16, 3), (16, 32, 3), (32, 32, 3), (16, 32, 1)]
    widths += [(32, 64, 3), (64, 64, 3), (32, 64, 1)]
    convolutions = [nn.Conv2d(width_in, width, side, bias=False) for width_in, width, side in widths]
    classifier = nn.Linear(64, 10)
    expected = [nn.init.kaiming_normal_(convolution.weight, mode="fan_out") for convolution in convolutions]
    drawn = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    for weight, weight_expected in zip(drawn, expected, strict=True):
        assert torch.equal(weight, weight_expected)
    assert torch.equal(network.state_dict()["classifier.weight"], classifier.weight)


def resnet8_of_seed(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return resnet(10, depth=8, widths=(16, 16, 32, 64))


def test_the_weights_have_the_same_names_as_in_existing_runs() -> None:
    assert [name for name in resnet8_of_seed(0).state_dict() if not name.endswith("num_batches_tracked")] == [
        "conv.weight",
        *batch_norm("bn"),
        *block(0, shortcut=False),
        *block(1, shortcut=True),
        *block(2, shortcut=True),
        "classifier.weight",
        "classifier.bias",
    ]


def block(number: int, *, shortcut: bool) -> list[str]:
    names = ["conv1.weight", *batch_norm("bn1"), "conv2.weight", *batch_norm("bn2")]
    names += ["shortcut.0.weight", *batch_norm("shortcut.1")] if shortcut else []
    return [f"blocks.{number}.{name}" for name in names]


def batch_norm(name: str) -> list[str]:
    return [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]


def test_the_channels_of_a_shuffle_block_change_groups() -> None:
    network = build_network("shufflenetv1", 10, seed=0)
    recorded: list[Tensor] = []
    network.get_submodule("blocks.1.bn1").register_forward_hook(
        lambda module, image, normalised: recorded.append(normalised)
    )
    network.get_submodule("blocks.1.conv2").register_forward_pre_hook(
        lambda module, arguments: recorded.append(arguments[0])
    )
    network(torch.randn(2, 3, 16, 16))
    before, after = recorded[0].relu(), recorded[1]
    order = [group * 20 + channel for channel in range(20) for group in range(3)]  # 60 channels in 3 groups
    assert torch.equal(after, before[:, order])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wrn_16_2", "shufflenetv1", "mobilenetv2", "torchvision/resnet18"])
def test_a_network_can_be_exported(name: str) -> None:
    task = Task(
        class_names=("x", "y", "z"),
        train_counts=(9, 3, 1),
        groups=ClassGroups(names=("head", "tail"), group_of_class=(0, 1, 1)),
        input_px=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    network = build_network(name, 3, seed=0)
    with torch.no_grad():  # without updated running averages the logits would be very large
        for _ in range(20):
            network(torch.randn(8, 3, 32, 32))
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8).numpy()
    logits = run(open_session(to_onnx(network, task)), images)
    expected = torch_logits(network.eval(), task, images, torch.float64)
    # float32 against float64 through up to 50 layers: 1e-5 of the range of the logits; a wrong layer changes them by
    # 1e-1
    assert abs(logits - expected).max() <= 1e-4 * (expected.max() - expected.min())
