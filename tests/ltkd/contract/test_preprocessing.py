import pytest
from pydantic import ValidationError

from ltkd.contract.class_groups import ClassGroups
from ltkd.contract.preprocessing import FULL_DECODING, JpegScaling, Preprocessing, Resizing
from ltkd.contract.task import Task

TASK = Task(
    class_names=("ant", "bee"),
    train_counts=(9, 1),
    groups=ClassGroups(names=("common", "rare"), group_of_class=(0, 1)),
    input_px=224,
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
    resizing=Resizing(interpolation="bicubic", crop_ratio=224 / 256),
)


@pytest.mark.parametrize(
    ("jpeg_scaling", "crop_ratio", "min_px"),
    [("none", 1.0, None), ("twice", 1.0, 448), ("once", 1.0, 224), ("twice", 224 / 256, 512), ("once", 0.9, 249)],
)
def test_a_scaled_jpeg_keeps_the_size_in_the_part_that_is_used(
    jpeg_scaling: JpegScaling, crop_ratio: float, min_px: int | None
) -> None:
    preprocessing = Preprocessing(input_px=224, crop_ratio=crop_ratio, jpeg_scaling=jpeg_scaling)
    assert preprocessing.min_decoded_px == min_px


def test_a_task_states_its_preprocessing_and_one_of_before_decodes_in_full() -> None:
    content = TASK.model_dump(mode="json")
    assert Task.model_validate(content) == TASK
    assert TASK.preprocessing == Preprocessing(input_px=224, interpolation="bicubic", crop_ratio=0.875)
    del content["resizing"]
    before = Task.model_validate(content).preprocessing
    assert before == Preprocessing(input_px=224, interpolation="bilinear", crop_ratio=1.0, jpeg_scaling="none")
    assert Resizing() != FULL_DECODING  # new runs have another default than files without the field


@pytest.mark.parametrize("field", [{"crop_ratio": 0.09}, {"crop_ratio": 1.1}, {"interpolation": "x"}, {"crop": 1}])
def test_a_resizing_that_no_decoder_can_do_is_rejected(field: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Resizing.model_validate(field)


def test_the_rule_in_words_names_what_differs_from_the_plain_one() -> None:
    before = Preprocessing(input_px=8, **dict(FULL_DECODING))
    assert before.rule == "the centre square is resized bilinearly"
    assert before.description == f"decode to RGB and resize to 8 x 8 ({before.rule})"
    rule = TASK.preprocessing.rule
    assert rule.startswith("the centre square of 0.875 of the shorter side is resized bicubically")
    assert rule.endswith("if both sides keep 512 px")
