import pytest
from pydantic import ValidationError

from ltkd.contract.class_groups import ClassGroups
from ltkd.contract.task import Task

TASK = Task(
    class_names=("ant", "bee", "cat"),
    train_counts=(9, 5, 1),
    groups=ClassGroups(names=("common", "rare"), group_of_class=(0, 0, 1)),
    input_px=8,
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
)


def test_the_group_name_of_a_class_is_found() -> None:
    assert [TASK.group_name(label) for label in range(3)] == ["common", "common", "rare"]


def test_a_task_is_unchanged_after_a_round_trip_through_json() -> None:
    assert Task.model_validate_json(TASK.model_dump_json()) == TASK


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("class_names", ("ant", "bee")),
        ("train_counts", (9, 5, 1, 1)),
        ("groups", ClassGroups(names=("a", "b"), group_of_class=(0, 1))),
        ("input_px", 0),
        ("mean", (0.5, 0.5)),
    ],
)
def test_a_task_with_inconsistent_fields_cannot_be_created(field: str, value: object) -> None:
    with pytest.raises(ValidationError):
        Task.model_validate({**dict(TASK), field: value})
