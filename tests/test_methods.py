import pytest
import torch

from ltkd.config import MethodConfig
from ltkd.errors import UsageError
from ltkd.groups import ClassGroups
from ltkd.losses import GroupIndex, kd_loss, ltkd_loss
from ltkd.methods import METHODS, Batch, method_config, method_of

GROUPS = GroupIndex(ClassGroups(names=("head", "tail"), group_of_class=(0, 0, 1)))


def batch(progress: float) -> Batch:
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 3, generator=random)
    return Batch(student, teacher, torch.tensor([0, 1, 2, 0]), GROUPS, progress)


def test_a_configuration_writes_out_every_parameter_and_gives_the_same_method_back() -> None:
    for name in METHODS:
        config = method_config(name)
        assert method_of(config) == METHODS[name]()
        assert method_of(MethodConfig.model_validate_json(config.model_dump_json())) == METHODS[name]()


def test_texts_from_the_command_line_become_numbers() -> None:
    assert method_config("ltkd", {"alpha": "3"}).parameters["alpha"] == 3.0


def test_an_unknown_method_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown method 'lktd'; known: ce, kd, dkd, ltkd"):
        method_config("lktd")


def test_an_unknown_parameter_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'kd' has no parameter 'alpha'; it has: temperature, ce_weight, kd_weight"):
        method_config("kd", {"alpha": "3"})


@pytest.mark.parametrize(("name", "value"), [("temperature", "0"), ("alpha", "-1"), ("target", "flat"), ("beta", "x")])
def test_a_parameter_out_of_range_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"method 'ltkd': .*{name}='{value}'"):
        method_config("ltkd", {name: value})


def test_kd_weighs_labels_and_teacher() -> None:
    seen = batch(0.5)
    expected = 0.1 * seen.cross_entropy + 0.9 * kd_loss(seen.student_NC, seen.teacher)
    torch.testing.assert_close(METHODS["kd"]()(seen), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["dkd", "ltkd"])
def test_the_distillation_term_warms_up_linearly_over_a_twelfth_of_the_training(name: str) -> None:
    method = METHODS[name]()
    start, middle, full, later = (method(batch(progress)).item() for progress in (0.0, 1 / 24, 1 / 12, 1.0))
    assert start == pytest.approx(batch(0.0).cross_entropy.item())
    assert middle - start == pytest.approx((full - start) / 2, rel=1e-5)  # float32
    assert later == full


def test_ltkd_adds_the_cross_entropy_of_the_labels() -> None:
    seen = batch(1.0)
    expected = seen.cross_entropy + ltkd_loss(seen.student_NC, seen.teacher, GROUPS)
    torch.testing.assert_close(METHODS["ltkd"]()(seen), expected, rtol=0, atol=0)
