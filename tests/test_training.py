import math

import numpy as np
import pytest
import torch
from training_toys import RECIPE, ToyNet, toy_data

from ltkd.config import Recipe
from ltkd.errors import DeviceError, TrainingError
from ltkd.methods import CE, KD, LTKD, AnyMethod
from ltkd.networks import Normalise
from ltkd.recipes import RECIPES
from ltkd.training import EpochReport, augment, device_of, learning_rate, predict, train

CPU = torch.device("cpu")


def trained(
    method: AnyMethod, recipe: Recipe = RECIPE, seed: int = 0, peak: float | None = None
) -> tuple[ToyNet, list[EpochReport]]:
    torch.manual_seed(1)
    network = ToyNet()
    teacher = ToyNet() if method.needs_teacher else None
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    recipe = recipe if peak is None else recipe.model_copy(update={"peak_learning_rate": peak})
    return network, list(train(network, optimizer, toy_data(), method, recipe, teacher=teacher, seed=seed, device=CPU))


def test_a_network_learns_colours_and_reports_every_epoch() -> None:
    _, reports = trained(CE(), RECIPE.model_copy(update={"epochs": 12}))
    assert [report.epoch for report in reports] == list(range(1, 13))
    assert reports[-1].loss < reports[0].loss / 2
    assert reports[-1].accuracy is not None
    assert reports[-1].accuracy["all"] >= 0.9
    assert list(reports[-1].accuracy) == ["head", "medium", "tail", "all"]


def test_the_test_set_is_looked_at_as_often_as_the_recipe_says_and_after_the_last_epoch() -> None:
    _, reports = trained(CE(), RECIPE.model_copy(update={"epochs": 5, "eval_every": 2}))
    assert [report.accuracy is not None for report in reports] == [False, True, False, True, True]


@pytest.mark.parametrize("method", [CE(), KD(), LTKD()])
def test_the_same_seed_gives_the_same_weights_to_the_bit_and_another_seed_others(method: AnyMethod) -> None:
    first, again, other = (trained(method, seed=seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_teacher_is_not_changed() -> None:
    torch.manual_seed(0)
    network, teacher = ToyNet(), ToyNet()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    list(train(network, optimizer, toy_data(), LTKD(), RECIPE, teacher=teacher, seed=0, device=CPU))
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_a_loss_that_explodes_stops_with_the_epoch_and_the_rate() -> None:
    with pytest.raises(TrainingError, match=r"became (nan|inf) in epoch \d+, at learning rate .*; lower the recipe"):
        trained(CE(), peak=1e30)


def test_one_cycle_rises_over_a_quarter_and_falls_to_nearly_zero() -> None:
    recipe = RECIPE.model_copy(update={"epochs": 10, "peak_learning_rate": 0.2})
    rates = [learning_rate(recipe, step, steps_per_epoch=10) for step in range(100)]
    assert max(rates) == rates[25] == pytest.approx(0.2)
    assert rates[:26] == sorted(set(rates[:26]))
    assert rates[25:] == sorted(set(rates[25:]), reverse=True)
    assert 0 < rates[-1] < 0.2 / 500


def test_the_papers_schedule_divides_by_ten_after_each_milestone() -> None:
    recipe = RECIPES["paper"]()
    at = [learning_rate(recipe, epoch * 7, steps_per_epoch=7) for epoch in (0, 149, 150, 180, 210, 239)]
    assert at == pytest.approx([0.05, 0.05, 0.005, 0.0005, 0.00005, 0.00005])


@pytest.mark.parametrize("mirror", [False, True])
def test_augmentation_crops_from_a_black_border_and_mirrors_half_where_allowed(mirror: bool) -> None:
    pixels = torch.randint(1, 255, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    out = augment(pixels.expand(400, 16, 16, 3).contiguous(), mirror, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(pixels, (0, 0, 2, 2, 2, 2))
    crops = {padded[top : top + 16, left : left + 16].numpy().tobytes() for top in range(5) for left in range(5)}
    plain = [image.numpy().tobytes() for image in out if image.numpy().tobytes() in crops]
    mirrored = [image for image in out.flip(2) if image.contiguous().numpy().tobytes() in crops]
    assert len(plain) + len(mirrored) == 400
    assert set(plain) == crops
    # 400 fair coins: five standard deviations are 50
    assert abs(len(mirrored) - 200) < 50 if mirror else not mirrored


def test_predicting_leaves_the_network_in_its_mode_and_its_statistics() -> None:
    data = toy_data()
    network = torch.nn.Sequential(Normalise(data.task), ToyNet()).train()
    before = network[1].bn.running_mean.clone()
    once, again = predict(network, data.test_images), predict(network, data.test_images)
    assert network.training
    assert torch.equal(network[1].bn.running_mean, before)
    np.testing.assert_array_equal(once, again)


def test_a_smaller_batch_than_the_recipes_trains_too() -> None:
    data = toy_data(train_counts=(3, 2, 1))
    network = ToyNet()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    recipe = RECIPE.model_copy(update={"batch_size": 64})
    reports = list(train(network, optimizer, data, CE(), recipe, teacher=None, seed=0, device=CPU))
    assert math.isfinite(reports[-1].loss)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none_is_refused() -> None:
    with pytest.raises(DeviceError, match="asked for cuda, but torch sees no CUDA device; give --device cpu"):
        device_of("cuda")
    assert device_of("auto") == CPU
