from dataclasses import replace

import pytest
import torch

from ltkd.config import MethodConfig
from ltkd.contract.class_groups import ClassGroups, groups_by_quantile
from ltkd.contract.task import Task
from ltkd.errors import UsageError
from ltkd.methods.losses import GroupIndex, adjusted_cross_entropy, bkd_loss, kd_loss, ltkd_loss, without_prior
from ltkd.methods.registry import (
    BKD,
    CE,
    KD,
    LTKD,
    METHODS,
    ClassStatistics,
    LossInputs,
    LTKDPlus,
    ReviewKD,
    build_method,
    method_config,
)
from ltkd.methods.reviewkd import review_loss

TASK = Task(
    class_names=("a", "b", "c"),
    train_counts=(50, 20, 2),
    groups=ClassGroups(names=("head", "tail"), group_of_class=(0, 0, 1)),
    input_px=8,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
)
CLASSES = ClassStatistics(TASK)
STUDENT, TEACHER = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])


def batch(progress: float) -> LossInputs:
    return LossInputs(STUDENT, TEACHER, LABELS, CLASSES, progress)


def cross_entropy(strength: float = 0.0) -> torch.Tensor:
    return adjusted_cross_entropy(STUDENT, LABELS, CLASSES.log_prior_C, strength=strength)


def test_a_configuration_has_every_parameter_and_restores_the_same_method() -> None:
    for name in METHODS:
        config = method_config(name)
        assert build_method(config) == METHODS[name]()
        assert build_method(MethodConfig.model_validate_json(config.model_dump_json())) == METHODS[name]()


def test_strings_from_the_command_line_become_numbers() -> None:
    assert method_config("ltkd", {"alpha": "3"}).parameters["alpha"] == 3.0


def test_the_error_for_an_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown method 'lktd'; known: ce, kd, dkd, bkd, reviewkd, ltkd, ltkd_plus"):
        method_config("lktd")


def test_the_error_for_an_unknown_parameter_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'kd' has no parameter 'alpha'; it has: .*temperature, ce_weight, kd_weight"):
        method_config("kd", {"alpha": "3"})


@pytest.mark.parametrize(("name", "value"), [("temperature", "0"), ("alpha", "-1"), ("target", "flat"), ("beta", "x")])
def test_the_error_for_an_invalid_value_names_the_parameter(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"method 'ltkd': .*{name}='{value}'"):
        method_config("ltkd", {name: value})


def test_kd_weighs_labels_and_teacher() -> None:
    expected = 0.1 * cross_entropy() + 0.9 * kd_loss(STUDENT, TEACHER)
    torch.testing.assert_close(KD()(batch(0.5)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dkd", "reviewkd", "ltkd"])
def test_the_distillation_term_warms_up_linearly_over_a_twelfth_of_the_training(name: str) -> None:
    method = METHODS[name]()
    features = {"student_features": [STUDENT], "teacher_features": [TEACHER]}

    def loss(progress: float) -> float:
        return method(replace(batch(progress), **features)).item()

    start, middle, full, later = (loss(progress) for progress in (0.0, 1 / 24, 1 / 12, 1.0))
    assert start == pytest.approx(cross_entropy().item())
    assert middle - start == pytest.approx((full - start) / 2, rel=1e-5)  # float32
    assert later == full


def test_ltkd_adds_the_cross_entropy_of_the_labels() -> None:
    expected = cross_entropy() + ltkd_loss(STUDENT, TEACHER, CLASSES.groups)
    torch.testing.assert_close(LTKD()(batch(1.0)), expected, rtol=0, atol=0)


def test_bkd_weighs_the_teacher_by_the_effective_number_of_images() -> None:
    expected = cross_entropy() + bkd_loss(STUDENT, TEACHER, CLASSES.effective_weight_C)
    torch.testing.assert_close(BKD()(batch(1.0)), expected, rtol=0, atol=0)


def test_reviewkd_compares_features() -> None:
    inputs = replace(batch(1.0), student_features=[STUDENT], teacher_features=[TEACHER])
    expected = cross_entropy() + 2 * review_loss([STUDENT], [TEACHER])
    torch.testing.assert_close(ReviewKD(review_weight=2.0)(inputs), expected, rtol=0, atol=0)


def test_logit_adjustment_adds_the_prior_to_the_cross_entropy() -> None:
    torch.testing.assert_close(CE(logit_adjustment=1.0)(batch(0.5)), cross_entropy(strength=1.0), rtol=0, atol=0)


def test_classes_are_weighted_after_the_configured_share_of_the_training() -> None:
    method = CE(reweight_after=0.8)
    weighted = adjusted_cross_entropy(
        STUDENT, LABELS, CLASSES.log_prior_C, strength=0.0, class_weight_C=CLASSES.effective_weight_C
    )
    assert method(batch(0.79)) == cross_entropy()
    assert method(batch(0.8)) == weighted
    assert weighted != cross_entropy()
    assert CE()(batch(1.0)) == cross_entropy()


@pytest.mark.parametrize("name", ["kd", "dkd", "bkd", "ltkd"])
def test_teacher_calibration_subtracts_the_prior_from_the_teachers_logits(name: str) -> None:
    calibrated = replace(batch(1.0), teacher_NC=without_prior(TEACHER, CLASSES.log_prior_C, strength=0.7))
    found = build_method(method_config(name, {"teacher_calibration": 0.7}))(batch(1.0))
    torch.testing.assert_close(found, METHODS[name]()(calibrated), rtol=0, atol=0)


def test_ltkd_divides_the_classes_into_the_configured_number_of_groups() -> None:
    thirds = GroupIndex(groups_by_quantile(TASK.train_counts, 3))
    expected = cross_entropy() + ltkd_loss(STUDENT, TEACHER, thirds)
    torch.testing.assert_close(LTKD(num_groups=3)(batch(1.0)), expected, rtol=0, atol=0)
    assert LTKD(num_groups=3)(batch(1.0)) != LTKD()(batch(1.0))


def test_ltkd_plus_is_ltkd_with_other_defaults() -> None:
    parameters = method_config("ltkd_plus").parameters
    assert build_method(method_config("ltkd", parameters))(batch(1.0)) == LTKDPlus()(batch(1.0))
    assert parameters != method_config("ltkd").parameters
