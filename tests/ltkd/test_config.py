import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from ltkd.config import DataConfig, Execution, MethodConfig, Recipe, RunConfig

CONFIG = RunConfig(
    data=DataConfig(name="folder", root=Path("photos"), gamma=50, input_px=32),
    model="resnet8",
    method=MethodConfig(name="ltkd", parameters={"alpha": 6.0, "beta": 1, "warm_up": True, "target": "uniform"}),
    recipe=Recipe(name="steps", epochs=3, peak_learning_rate=0.1, schedule="steps", milestones=(1, 2)),
    seed=0,
    execution=Execution(device="cpu"),
    teacher=Path("runs/teacher"),
    versions={"ltkd": "0.0.0"},
)


def test_a_configuration_keeps_its_values_and_types_in_a_round_trip_through_json() -> None:
    loaded = RunConfig.model_validate_json(CONFIG.model_dump_json())
    assert loaded == CONFIG
    assert list(map(type, loaded.method.parameters.values())) == [float, int, bool, str]


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("data", "gamma", 0.5),
        ("data", "gama", 10),
        ("data", "input_px", 0),
        ("recipe", "epochs", -1),
        ("recipe", "schedule", "cosine"),
    ],
)
def test_an_invalid_configuration_is_rejected(part: str, field: str, value: object) -> None:
    content = json.loads(CONFIG.model_dump_json())
    content[part][field] = value
    with pytest.raises(ValidationError, match=field):
        RunConfig.model_validate(content)
