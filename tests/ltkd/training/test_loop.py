import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_toys import CPU, RECIPE, ToyNet, toy_data, toy_train_state, toy_training

from ltkd.config import ComputePrecision, Execution, Recipe
from ltkd.errors import DeviceError, TrainingError
from ltkd.methods.registry import BKD, CE, KD, LTKD, LossInputs, LTKDPlus, Method
from ltkd.models.registry import Normalise
from ltkd.recipes import RECIPES
from ltkd.training.loop import EpochReport, predict
from ltkd.training.run import resolve_device
from ltkd.training.schedules import learning_rate


def trained(
    method: Method, recipe: Recipe = RECIPE, seed: int = 0, peak: float | None = None, execution: Execution = CPU
) -> tuple[nn.Module, list[EpochReport]]:
    torch.manual_seed(1)
    state = toy_train_state()
    teacher = ToyNet() if method.needs_teacher else None
    recipe = recipe if peak is None else recipe.model_copy(update={"peak_learning_rate": peak})
    reports = toy_training(state, method, recipe=recipe, seed=seed, teacher=teacher, execution=execution)
    return state.student.network, reports


def test_a_network_learns_colours_and_reports_every_epoch() -> None:
    _, reports = trained(CE(), RECIPE.model_copy(update={"epochs": 12}))
    assert [report.epoch for report in reports] == list(range(1, 13))
    assert reports[-1].loss < reports[0].loss / 2
    assert reports[-1].accuracy is not None
    assert reports[-1].accuracy["all"] >= 0.9
    assert list(reports[-1].accuracy) == ["head", "medium", "tail", "all"]


def test_the_test_set_is_evaluated_at_the_recipes_interval_and_after_the_last_epoch() -> None:
    _, reports = trained(CE(), RECIPE.model_copy(update={"epochs": 5, "eval_every": 2}))
    assert [report.accuracy is not None for report in reports] == [False, True, False, True, True]


@pytest.mark.parametrize("method", [CE(), KD(), BKD(), LTKDPlus()])
def test_the_same_seed_gives_the_same_weights_to_the_bit_and_another_seed_others(method: Method) -> None:
    first, again, other = (trained(method, seed=seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_teacher_is_not_changed() -> None:
    torch.manual_seed(0)
    teacher = ToyNet()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    toy_training(toy_train_state(), LTKD(), teacher=teacher)
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_the_error_for_a_diverging_loss_has_the_step_batch_and_learning_rate() -> None:
    with pytest.raises(
        TrainingError,
        match=r"became (nan|inf) in epoch \d+, step \d+, at learning rate .* on a batch of \d training images "
        r"\(the first: number \d+, .*\)\. Losses before it: .*\. Likely cause: the loss was rising .*lower the",
    ):
        trained(CE(), peak=1e5)


def test_a_damaged_teacher_is_the_likely_cause_of_a_first_loss_that_is_not_finite() -> None:
    teacher = ToyNet()
    teacher.classifier.bias.data[1] = math.nan
    with pytest.raises(
        TrainingError, match=r"epoch 1, step 1, .*before it: none\. Likely cause: .* weights of teacher"
    ):
        toy_training(toy_train_state(), KD(), teacher=teacher)


def test_the_likely_cause_of_a_sudden_loss_that_is_not_finite_is_the_images() -> None:
    class Sudden(ToyNet):
        calls = 0

        def forward(self, image: Tensor) -> Tensor:
            self.calls += self.training
            logits = super().forward(image)
            return logits * math.inf if self.calls == 4 else logits

    with pytest.raises(TrainingError, match=r"epoch 1, step 4, .*Likely cause: it happened suddenly: check the"):
        toy_training(toy_train_state(Sudden()), CE())


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_learns_colours_and_keeps_float32_weights(precision: ComputePrecision) -> None:
    recipe = RECIPE.model_copy(update={"epochs": 12})
    execution = Execution(device="cpu", precision=precision)
    network, reports = trained(LTKDPlus(), recipe, execution=execution)
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())
    assert reports[-1].loss < reports[0].loss


def test_methods_get_the_share_of_the_steps_done() -> None:
    progress = []

    class RecordingCE(CE):
        def __call__(self, batch: LossInputs) -> Tensor:
            progress.append(batch.progress)
            return super().__call__(batch)

    toy_training(toy_train_state(), RecordingCE())
    assert progress == pytest.approx(np.arange(20) / 20)


def test_one_cycle_rises_over_a_quarter_and_falls_to_nearly_zero() -> None:
    recipe = RECIPE.model_copy(update={"epochs": 10, "peak_learning_rate": 0.2})
    rates = [learning_rate(recipe, step, steps_per_epoch=10) for step in range(100)]
    assert max(rates) == rates[25] == pytest.approx(0.2)
    assert rates[:26] == sorted(set(rates[:26]))
    assert rates[25:] == sorted(set(rates[25:]), reverse=True)
    assert 0 < rates[-1] < 0.2 / 500


def test_the_papers_schedule_divides_by_ten_after_each_milestone() -> None:
    recipe = RECIPES["paper"]()
    rates = [learning_rate(recipe, epoch * 7, steps_per_epoch=7) for epoch in (0, 149, 150, 180, 210, 239)]
    assert rates == pytest.approx([0.05, 0.05, 0.005, 0.0005, 0.00005, 0.00005])


def test_predict_does_not_change_the_mode_and_statistics_of_the_network() -> None:
    data = toy_data()
    network = torch.nn.Sequential(Normalise(data.task), ToyNet()).train()
    before = network[1].bn.running_mean.clone()
    once, again = predict(network, data.test_images), predict(network, data.test_images)
    assert network.training
    assert torch.equal(network[1].bn.running_mean, before)
    np.testing.assert_array_equal(once, again)


def test_a_data_set_smaller_than_the_batch_size_can_be_trained_on() -> None:
    recipe = RECIPE.model_copy(update={"batch_size": 64})
    reports = toy_training(toy_train_state(), CE(), data=toy_data(train_counts=(3, 2, 1)), recipe=recipe)
    assert math.isfinite(reports[-1].loss)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_requesting_cuda_without_a_device_raises_an_error() -> None:
    with pytest.raises(DeviceError, match="cuda was requested, but torch finds no CUDA device; give --device cpu"):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")
