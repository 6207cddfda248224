"""Comparison of the losses with independent formulations in probabilities and float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ltkd.contract.class_groups import ClassGroups
from ltkd.methods.losses import (
    GroupIndex,
    LTKDLoss,
    adjusted_cross_entropy,
    bkd_loss,
    dkd_loss,
    effective_number_weights,
    group_kl,
    kd_loss,
    log_prior,
    ltkd_loss,
    without_prior,
)

# float64 sums of a few dozen terms: far above rounding, far below any real error
EXACT = {"atol": 1e-10, "rtol": 1e-10}
# the same sums in float32
FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}


COUNTS = torch.tensor([500, 300, 180, 110, 60, 40, 20, 12, 7, 5])


def partition(num_classes: int, num_groups: int) -> ClassGroups:
    names = tuple(f"g{group}" for group in range(num_groups))
    return ClassGroups(names=names, group_of_class=tuple(label % num_groups for label in range(num_classes)))


def random_logits(seed: int, num: int = 7, num_classes: int = 10, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(2, num, num_classes, generator=random, dtype=torch.float64)
    return student, teacher, torch.randint(0, num_classes, (num,), generator=random)


def probabilities(logits: Tensor, temperature: float) -> np.ndarray:
    exponential = np.exp(logits.numpy() / temperature)
    return exponential / exponential.sum(1, keepdims=True)


def plain_kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return (p * np.log(p / q)).sum(-1)


def reference_ltkd(
    student: Tensor, teacher: Tensor, groups: ClassGroups, temperature: float, target: np.ndarray
) -> tuple[float, float]:
    """Cross-group and within-group term, image by image, from the definition in probabilities."""
    p_student, p_teacher = probabilities(student, temperature), probabilities(teacher, temperature)
    members = [groups.members(name) for name in groups.names]
    mass_student = np.stack([p_student[:, inside].sum(1) for inside in members], axis=1)
    mass_teacher = np.stack([p_teacher[:, inside].sum(1) for inside in members], axis=1)
    scale = target / mass_teacher.sum(0)
    cross, within = [], []
    for image in range(len(student)):
        rebalanced = scale * mass_teacher[image]
        rebalanced /= rebalanced.sum()
        cross.append(plain_kl(rebalanced, mass_student[image]))
        within.append(
            sum(
                plain_kl(
                    p_teacher[image, inside] / mass_teacher[image, group],
                    p_student[image, inside] / mass_student[image, group],
                )
                for group, inside in enumerate(members)
            )
        )
    return float(np.mean(cross)), float(np.mean(within))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("num_groups", [2, 3, 10])
def test_ltkd_equals_its_definition_in_probabilities(num_groups: int, temperature: float) -> None:
    student, teacher, _ = random_logits(num_groups)
    groups = partition(10, num_groups)
    cross, within = reference_ltkd(student, teacher, groups, temperature, np.full(num_groups, 1 / num_groups))
    expected = temperature**2 * (6.0 * cross + 1.0 * within)
    found = ltkd_loss(student, teacher, GroupIndex(groups), temperature=temperature)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_the_class_share_target_weighs_groups_by_their_number_of_classes() -> None:
    student, teacher, _ = random_logits(1)
    groups = ClassGroups(names=("big", "small"), group_of_class=(0,) * 8 + (1,) * 2)
    cross, _ = reference_ltkd(student, teacher, groups, 4.0, np.array([0.8, 0.2]))
    found = ltkd_loss(student, teacher, GroupIndex(groups), beta=0.0, target="class-share")
    torch.testing.assert_close(found, torch.tensor(16 * 6 * cross, dtype=torch.float64), **EXACT)


@given(seed=st.integers(0, 10_000), temperature=st.floats(0.5, 10), num_groups=st.integers(2, 10))
@settings(max_examples=40, deadline=None)
def test_without_calibration_and_with_the_teachers_masses_ltkd_is_plain_distillation(
    seed: int, temperature: float, num_groups: int
) -> None:
    student, teacher, _ = random_logits(seed)
    whole = ltkd_loss(
        student.float(),
        teacher.float(),
        GroupIndex(partition(10, num_groups)),
        temperature=temperature,
        alpha=1.0,
        beta=1.0,
        within_weight=None,
        calibrate=False,
    )
    plain = kd_loss(student.float(), teacher.float(), temperature=temperature)
    # float32 rounding of 1e-6 times temperature**2, which is at most 100
    torch.testing.assert_close(whole, plain, atol=1e-4, rtol=1e-4)


def test_calibration_gives_every_group_the_same_weight_over_the_batch() -> None:
    # with equal teacher masses in every image the rescaled masses are exactly uniform, so a uniform student has no loss
    teacher = torch.tensor([[5.0, 0.0, 0.0], [5.0, 0.0, 0.0]])
    balanced = torch.zeros(2, 3)
    groups = GroupIndex(partition(3, 3))
    assert ltkd_loss(balanced, teacher, groups, beta=0.0).item() == pytest.approx(0, abs=1e-6)
    assert ltkd_loss(teacher, teacher, groups, beta=0.0).item() > 1


def test_a_common_factor_in_the_prior_cancels() -> None:
    student, teacher, _ = random_logits(2)
    groups, prior = GroupIndex(partition(10, 3)), torch.tensor([0.5, 0.3, 0.2])
    once = ltkd_loss(student, teacher, groups, teacher_mass_K=prior)
    times_64 = ltkd_loss(student, teacher, groups, teacher_mass_K=64 * prior)
    torch.testing.assert_close(once, times_64, **EXACT)


def test_the_masses_of_the_batch_as_a_prior_change_nothing() -> None:
    student, teacher, _ = random_logits(3)
    groups = partition(10, 3)
    mass = groups.mass(probabilities(teacher, 4.0)).sum(0)
    given_prior = ltkd_loss(student, teacher, GroupIndex(groups), teacher_mass_K=torch.from_numpy(mass))
    torch.testing.assert_close(given_prior, ltkd_loss(student, teacher, GroupIndex(groups)), **EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_kd_equals_its_definition_in_probabilities(seed: int) -> None:
    student, teacher, _ = random_logits(seed)
    expected = 16 * plain_kl(probabilities(teacher, 4.0), probabilities(student, 4.0)).mean()
    torch.testing.assert_close(kd_loss(student, teacher), torch.tensor(expected), **EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_dkd_equals_its_definition_in_probabilities(seed: int) -> None:
    student, teacher, labels = random_logits(seed)
    p_student, p_teacher = probabilities(student, 4.0), probabilities(teacher, 4.0)
    total = 0.0
    for image, label in enumerate(labels.tolist()):
        s, t = p_student[image, label], p_teacher[image, label]
        tckd = plain_kl(np.array([t, 1 - t]), np.array([s, 1 - s]))
        rest_t, rest_s = np.delete(p_teacher[image], label) / (1 - t), np.delete(p_student[image], label) / (1 - s)
        total += 1.0 * tckd + 8.0 * plain_kl(rest_t, rest_s)
    expected = torch.tensor(16 * total / len(labels), dtype=torch.float64)
    torch.testing.assert_close(dkd_loss(student, teacher, labels), expected, **EXACT)


def test_dkd_with_the_teachers_weight_of_the_rest_is_plain_distillation() -> None:
    student, teacher, _ = random_logits(4, num=1)
    label = torch.tensor([3])
    rest = float(1 - probabilities(teacher, 4.0)[0, 3])
    torch.testing.assert_close(dkd_loss(student, teacher, label, beta=rest), kd_loss(student, teacher), **EXACT)


def all_losses(student: Tensor, teacher: Tensor, labels: Tensor) -> list[Tensor]:
    groups = GroupIndex(partition(student.shape[1], 3))
    return [kd_loss(student, teacher), dkd_loss(student, teacher, labels), ltkd_loss(student, teacher, groups)]


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e10, 1e30])
def test_losses_and_gradients_are_finite_for_extreme_logits(scale: float) -> None:
    student, teacher, labels = random_logits(5)
    student = (scale * student).float().requires_grad_()
    for loss in all_losses(student, (scale * teacher).float(), labels):
        (gradient,) = torch.autograd.grad(loss, student)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher, labels = random_logits(6)
    student, teacher = student.to(dtype), teacher.to(dtype)
    for half, full in zip(
        all_losses(student, teacher, labels), all_losses(student.float(), teacher.float(), labels), strict=True
    ):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=0, atol=0)  # the same arithmetic


def test_autocast_does_not_lower_the_precision() -> None:
    student, teacher, labels = (tensor.float() if tensor.is_floating_point() else tensor for tensor in random_logits(7))
    plain = all_losses(student, teacher, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = all_losses(student, teacher, labels)
    for one, other in zip(plain, autocast, strict=True):
        torch.testing.assert_close(one, other, **FLOAT32)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher, labels = random_logits(8)
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    for loss in all_losses(student, teacher, labels):
        loss.backward()
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize("loss", ["kd", "dkd", "bkd", "ltkd", "adjusted"])
def test_the_gradient_matches_finite_differences(loss: str) -> None:
    student, teacher, labels = random_logits(9, num=3, num_classes=5)
    groups = GroupIndex(partition(5, 2))
    functions = {
        "kd": lambda s: kd_loss(s, teacher),
        "dkd": lambda s: dkd_loss(s, teacher, labels),
        "bkd": lambda s: bkd_loss(s, teacher, effective_number_weights(COUNTS[:5])),
        "ltkd": lambda s: ltkd_loss(s, teacher, groups),
        "adjusted": lambda s: adjusted_cross_entropy(s, labels, log_prior(COUNTS[:5])),
    }
    assert torch.autograd.gradcheck(functions[loss], student.requires_grad_())


def test_a_student_that_equals_its_teacher_has_no_within_group_loss() -> None:
    _, teacher, _ = random_logits(10)
    split = group_kl(teacher, teacher, GroupIndex(partition(10, 3)), temperature=4.0)
    torch.testing.assert_close(split.within_NK, torch.zeros_like(split.within_NK), **EXACT)


def test_every_class_as_its_own_group_and_single_images_work() -> None:
    student, teacher, _ = random_logits(11, num=1)
    groups = GroupIndex(partition(10, 10))
    split = group_kl(student, teacher, groups, temperature=1.0)
    torch.testing.assert_close(split.within_NK, torch.zeros(1, 10, dtype=torch.float64), **EXACT)
    assert torch.isfinite(ltkd_loss(student, teacher, groups))


def test_the_module_without_momentum_is_the_function() -> None:
    student, teacher, _ = random_logits(12)
    module = LTKDLoss(partition(10, 3), alpha=2.0).train()
    expected = ltkd_loss(student, teacher, GroupIndex(partition(10, 3)), alpha=2.0)
    torch.testing.assert_close(module(student, teacher), expected, **EXACT)


def test_the_modules_running_average_follows_the_teachers_masses() -> None:
    groups = partition(10, 3)
    module = LTKDLoss(groups, momentum=0.9).train()
    batches = [random_logits(seed) for seed in range(3)]
    masses = [groups.mass(probabilities(teacher, 4.0)).mean(0) for _, teacher, _ in batches]
    expected = masses[0]
    for mass in masses[1:]:
        expected = 0.9 * expected + 0.1 * mass
    for student, teacher, _ in batches:
        module(student, teacher)
    torch.testing.assert_close(module.average_mass_K.double(), torch.from_numpy(expected), **FLOAT32)
    module.eval()
    before = module.average_mass_K.clone()
    module(*batches[0][:2])
    assert torch.equal(module.average_mass_K, before)


def test_the_module_rescales_nothing_before_its_first_training_step() -> None:
    student, teacher, _ = random_logits(13)
    groups = partition(10, 3)
    expected = ltkd_loss(student, teacher, GroupIndex(groups), calibrate=False)
    torch.testing.assert_close(LTKDLoss(groups, momentum=0.9).eval()(student, teacher), expected, **EXACT)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_bkd_is_distillation_from_weighted_and_renormalised_probabilities(temperature: float) -> None:
    student, teacher, _ = random_logits(14)
    weight = (1 - 0.9999) / (1 - 0.9999 ** COUNTS.numpy().astype(float))
    target = probabilities(teacher, temperature) * weight
    target /= target.sum(1, keepdims=True)
    expected = temperature**2 * plain_kl(target, probabilities(student, temperature)).mean()
    found = bkd_loss(student, teacher, effective_number_weights(COUNTS), temperature=temperature)
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_effective_number_weights_average_to_one_over_the_images() -> None:
    weight = effective_number_weights(COUNTS)
    assert (weight * COUNTS).sum().item() == pytest.approx(COUNTS.sum().item())
    reference = [(1 - 0.9999) / (1 - 0.9999**count) for count in (500, 5)]
    assert (weight[9] / weight[0]).item() == pytest.approx(reference[1] / reference[0], rel=1e-10)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_adjusted_cross_entropy_multiplies_probabilities_by_the_prior(strength: float) -> None:
    logits, _, labels = random_logits(15)
    prior = COUNTS.numpy() / COUNTS.sum().item()
    weighted = np.exp(logits.numpy()) * prior**strength
    expected = -np.log(weighted[np.arange(7), labels.numpy()] / weighted.sum(1))
    found = adjusted_cross_entropy(logits, labels, log_prior(COUNTS), strength=strength)
    assert found.item() == pytest.approx(expected.mean(), rel=1e-10)
    weight = effective_number_weights(COUNTS)
    found = adjusted_cross_entropy(logits, labels, log_prior(COUNTS), strength=strength, class_weight_C=weight)
    assert found.item() == pytest.approx((weight.numpy()[labels.numpy()] * expected).mean(), rel=1e-10)


def test_logits_without_the_prior_rank_classes_by_likelihood() -> None:
    logits, _, _ = random_logits(16)
    likelihood = probabilities(logits, 1.0) / COUNTS.numpy()
    found = probabilities(without_prior(logits, log_prior(COUNTS)), 1.0)
    np.testing.assert_allclose(found, likelihood / likelihood.sum(1, keepdims=True), rtol=1e-10)
    assert without_prior(logits, log_prior(COUNTS), strength=0.0) is logits
