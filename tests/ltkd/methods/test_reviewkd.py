import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ltkd.errors import UsageError
from ltkd.methods.reviewkd import FIVE_LEVELS, FeatureShape, ReviewFusion, feature_shapes, review_loss
from ltkd.models.registry import MODELS, build_network

SHAPES = [(3, 5, 16, 16), (3, 7, 7, 7), (3, 4, 4, 4), (3, 6, 2, 2), (3, 9)]
PAIRS = [
    ("resnet20", "resnet8"),
    ("resnet32x4", "resnet8x4"),
    ("wrn_16_2", "shufflenetv1"),
    ("resnet50", "mobilenetv2"),
]


def random_maps(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in SHAPES]


def pooled(maps: NDArray[np.float64], size_px: int) -> NDArray[np.float64]:
    """Means over windows that cover the map; they overlap if the size does not divide the side."""
    side = maps.shape[2]
    windows = [slice(i * side // size_px, math.ceil((i + 1) * side / size_px)) for i in range(size_px)]
    return np.array([[maps[:, :, rows, columns].mean((2, 3)) for columns in windows] for rows in windows])


def expected_loss(student: list[Tensor], teacher: list[Tensor]) -> float:
    """The paper's loss, level by level, in float64."""
    total = 0.0
    for student_map, teacher_map in zip(student, teacher, strict=True):
        a, b = (
            np.asarray(feature.double().numpy()).reshape(*feature.shape[:2], *side(feature))
            for feature in (student_map, teacher_map)
        )
        errors = [((a - b) ** 2).mean()]
        errors += [((pooled(a, size) - pooled(b, size)) ** 2).mean() for size in (4, 2, 1) if size < a.shape[2]]
        weights = [0.5**place for place in range(len(errors))]
        total += float(np.dot(errors, weights)) / sum(weights)
    return total


def side(feature: Tensor) -> tuple[int, int]:
    return (feature.shape[2], feature.shape[3]) if feature.ndim == 4 else (1, 1)


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_is_the_one_of_the_paper(seed: int) -> None:
    student, teacher = random_maps(seed, torch.float64), random_maps(seed + 100, torch.float64)
    # float64 means of a few thousand terms near 1: 1e-12 is far above rounding, far below any real error
    assert review_loss(student, teacher).item() == pytest.approx(expected_loss(student, teacher), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_loss_is_computed_in_float32_for_maps_of_any_precision(dtype: torch.dtype) -> None:
    student, teacher = random_maps(0, dtype), random_maps(1, dtype)
    loss = review_loss(student, teacher)
    assert loss.dtype == torch.float32
    # the reference uses the same rounded maps, so only the rounding of float32 sums remains: about 1e-6
    assert loss.item() == pytest.approx(expected_loss(student, teacher), rel=1e-5)


def test_equal_maps_have_no_loss_and_no_gradient_reaches_the_teacher() -> None:
    student, teacher = ([maps.requires_grad_() for maps in random_maps(seed)] for seed in (0, 1))
    assert review_loss(student, student).item() == 0
    review_loss(student, teacher).backward()  # type: ignore[no-untyped-call]
    assert all(maps.grad is not None and maps.grad.abs().sum() > 0 for maps in student)
    assert all(maps.grad is None for maps in teacher)


def test_a_flat_embedding_is_a_map_of_one_pixel() -> None:
    student, teacher = torch.randn(3, 9), torch.randn(3, 9)
    assert torch.equal(review_loss([student], [teacher]), review_loss([student[:, :, None, None]], [teacher]))


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_the_fusion_gives_maps_of_the_teachers_shapes(teacher: str, student: str) -> None:
    image = torch.zeros(2, 3, 16, 16)
    student_network, teacher_network = (build_network(name, 5, seed=0).eval() for name in (student, teacher))
    with torch.inference_mode():
        student_maps, teacher_maps = (network.features(image) for network in (student_network, teacher_network))  # type: ignore[operator]
        predicted = ReviewFusion.between(student_network, teacher_network, 16).eval()(student_maps)
    assert [maps.shape for maps in predicted] == [maps.shape for maps in teacher_maps]


def test_the_fusion_has_as_many_channels_as_the_embedding_and_at_most_512() -> None:
    teacher = [FeatureShape(8, 4), FeatureShape(8, 1)]
    for embedding, middle in ((64, 64), (1280, 512)):
        fusion = ReviewFusion([FeatureShape(24, 8), FeatureShape(embedding, 1)], teacher)
        weights = ("reduce.0", (middle, 24, 1, 1)), ("attend", (2, 2 * middle, 1, 1)), ("predict.0", (8, middle, 3, 3))
        for name, shape in weights:
            assert fusion.get_parameter(f"levels.0.{name}.weight").shape == shape


def test_a_level_depends_on_its_own_and_the_deeper_features_only() -> None:
    shapes = [FeatureShape(4, 8), FeatureShape(6, 4), FeatureShape(6, 1)]
    fusion = ReviewFusion(shapes, shapes).eval()
    features = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4), torch.randn(2, 6)]
    before = fusion(features)
    features[1] = features[1] + 1
    changed = [not torch.equal(one, other) for one, other in zip(before, fusion(features), strict=True)]
    assert changed == [True, True, False]


def test_student_and_fusion_learn_and_the_teacher_does_not() -> None:
    student, teacher = build_network("resnet8", 5, seed=0), build_network("resnet14", 5, seed=1)
    fusion = ReviewFusion.between(student, teacher, 16)
    image = torch.randn(4, 3, 16, 16)
    loss = review_loss(fusion(student.features(image)), teacher.features(image))  # type: ignore[operator]
    loss.backward()  # type: ignore[no-untyped-call]
    untouched = {name for name, weight in student.named_parameters() if weight.grad is None}
    assert untouched == {"classifier.weight", "classifier.bias"}
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in fusion.parameters())
    assert all(weight.grad is None for weight in teacher.parameters())


def test_a_student_that_learns_from_the_fusion_comes_closer() -> None:
    student, teacher = build_network("resnet8", 5, seed=0), build_network("resnet14", 5, seed=1).eval()
    fusion = ReviewFusion.between(student, teacher, 16)
    optimizer = torch.optim.SGD([*student.parameters(), *fusion.parameters()], lr=0.05, momentum=0.9)
    image = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(12):
        loss = review_loss(fusion(student.features(image)), teacher.features(image))  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    # measured: 0.67; the teacher has random weights, so its maps cannot be predicted fully
    assert losses[-1] < 0.8 * losses[0]


def test_half_precision_gives_finite_losses_and_gradients_near_the_exact_ones() -> None:
    student, teacher = build_network("resnet8", 5, seed=0), build_network("resnet14", 5, seed=1).eval()
    fusion = ReviewFusion.between(student, teacher, 16)
    image = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    exact = review_loss(fusion(student.features(image)), teacher.features(image))  # type: ignore[operator]
    with torch.autocast("cpu", torch.bfloat16):
        loss = review_loss(fusion(student.features(image)), teacher.features(image))  # type: ignore[operator]
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.dtype == torch.float32
    # 8 bits of mantissa through some ten layers, averaged over thousands of values: a few percent
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in fusion.parameters())


def test_a_last_batch_of_one_image_can_be_trained_on() -> None:
    shapes = [FeatureShape(4, 8), FeatureShape(6, 1)]
    fusion = ReviewFusion(shapes, shapes).train()
    running_mean = fusion.get_buffer("levels.1.reduce.1.running_mean")
    fusion([torch.randn(4, 4, 8, 8), torch.randn(4, 6)])
    before = running_mean.clone()
    assert all(maps.isfinite().all() for maps in fusion([torch.randn(1, 4, 8, 8), torch.randn(1, 6)]))
    assert torch.equal(running_mean, before)


def test_feature_shapes_does_not_change_the_network() -> None:
    network = build_network("resnet8", 5, seed=0).train()
    network.bn.eval()  # type: ignore[union-attr]
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    assert feature_shapes(network, 32) == [
        FeatureShape(16, 32),
        FeatureShape(32, 16),
        FeatureShape(64, 8),
        FeatureShape(64, 1),
    ]
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


def test_the_seed_determines_the_fusion_and_the_callers_random_state_does_not_change() -> None:
    student, teacher = build_network("resnet8", 5, seed=0), build_network("resnet14", 5, seed=1)
    state = torch.get_rng_state()
    first, again, other = (ReviewFusion.between(student, teacher, 16, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["levels.0.reduce.0.weight"], other["levels.0.reduce.0.weight"])


class Plain(nn.Module):
    """A network whose features are one map, as in torchvision."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3))
        self.classifier = nn.Linear(4, 5)


class Unpooled(nn.Module):
    """A network whose features lack the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.classifier = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def features(self, image: Tensor) -> list[Tensor]:
        return [self.conv(image)]


@pytest.mark.parametrize("network", [nn.Sequential(), Plain(), Unpooled()], ids=["none", "torchvision's", "unpooled"])
def test_the_error_for_a_network_without_features_lists_the_networks_that_have_them(network: nn.Module) -> None:
    teacher = build_network("resnet8", 5, seed=0)
    with pytest.raises(
        UsageError, match=rf"^the student \({type(network).__name__}\) does not return .*: resnet8, .*mobi"
    ):
        ReviewFusion.between(network, teacher, 16)
    with pytest.raises(UsageError, match=r"^the teacher "):
        ReviewFusion.between(teacher, network, 16)


def test_the_error_for_different_numbers_of_levels_names_the_networks_that_fit() -> None:
    student, teacher = build_network("mobilenetv2", 5, seed=0), build_network("resnet8", 5, seed=0)
    with pytest.raises(
        UsageError, match=r"student's features have 5 levels, the teacher's 4; .*resnet50 and mobilenetv2"
    ):
        ReviewFusion.between(student, teacher, 16)


@pytest.mark.parametrize("name", MODELS)
def test_every_network_has_the_number_of_levels_given_in_the_error(name: str) -> None:
    with torch.device("meta"):
        assert len(feature_shapes(MODELS[name](5), 32)) == (5 if name in FIVE_LEVELS else 4)
