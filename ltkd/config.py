"""What defines a run: data, network, method, recipe and seed. ``config.json`` holds one RunConfig."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from ltkd.records import Record, VersionedRecord

Parameter = float | int | bool | str


class DataConfig(Record):
    """Which images, how long their tail is, and how the classes are grouped.

    Attributes:
        name: A key of ltkd.data.DATASETS.
        root: Directory of the images, where the data set has one.
        gamma: Largest over smallest class after sampling; None keeps the training set as it is.
        holdout: Share of every class that is taken out of the training set, before its tail is cut, and stands in
            for the test set: what parameters are chosen on. 0 uses the whole training set and the test set.
        groups: ``share`` (33/34/33), ``count`` (many/medium/few), ``quantile:K`` or the path of a JSON mapping.
        input_px: Side of the square images; None takes the data set's own size.
    """

    name: str = "glyphs"
    root: Path | None = None
    gamma: float | None = Field(default=None, ge=1)
    holdout: float = Field(default=0.0, ge=0, lt=1)
    groups: str = "share"
    input_px: int | None = Field(default=None, gt=0)


class Recipe(Record):
    """How long and how fast a network is trained. SGD with momentum; weight decay on every parameter.

    Attributes:
        schedule: ``one-cycle`` (linear up over a quarter of the steps, cosine down to zero) or ``steps``
            (times 0.1 after each milestone).
        milestones: Epochs after which ``steps`` lowers the rate.
        eval_every: Epochs between two looks at the test set; the last epoch is always looked at.
    """

    name: str
    epochs: int = Field(gt=0)
    batch_size: int = Field(default=64, gt=0)
    peak_learning_rate: float = Field(gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    schedule: Literal["one-cycle", "steps"]
    milestones: tuple[int, ...] = ()
    eval_every: int = Field(default=1, gt=0)


class MethodConfig(Record):
    """A key of ltkd.losses.METHODS with all of its parameters."""

    name: str
    parameters: dict[str, Parameter]


class RunConfig(VersionedRecord):
    """Everything needed to repeat a run.

    Attributes:
        model: A key of ltkd.networks.MODELS.
        teacher: The teacher's run folder; None when a network learns from labels alone.
        teacher_weights_sha256: Which weights the teacher had.
        versions: Package name to version at training time.
    """

    data: DataConfig
    model: str
    method: MethodConfig
    recipe: Recipe
    seed: int
    device: str
    teacher: Path | None = None
    teacher_weights_sha256: str | None = None
    versions: dict[str, str]
