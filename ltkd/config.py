"""What defines a run: data, network, method, recipe and seed. ``config.json`` holds one RunConfig."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field

from ltkd.contract.records import Record, VersionedRecord
from ltkd.errors import UsageError

Parameter = float | int | bool | str
ComputePrecision = Literal["float32", "bfloat16", "float16"]


class DataConfig(Record):
    """Which images, how long their tail is, and how the classes are grouped.

    Attributes:
        name: A key of ltkd.data.formats.DATASETS.
        root: Directory of the images, where the data set has one.
        gamma: Largest over smallest class after sampling; None keeps the training set as it is.
        holdout: Share of every class that is taken out of the training set, before its tail is cut, and stands in
            for the test set: what parameters are chosen on. 0 uses the whole training set and the test set.
        groups: ``share`` (33/34/33), ``count`` (many/medium/few), ``quantile:K`` or the path of a JSON mapping.
        input_px: Side of the square images; None takes the data set's own size.
        skip_unreadable: Leave out image files that cannot be read, instead of refusing the data set.
        train_list: Lines of ``path label`` that name the training images below the root, where the data set is
            given by lists.
        test_list: The same of the test images.
    """

    name: str = "glyphs"
    root: Path | None = None
    gamma: float | None = Field(default=None, ge=1)
    holdout: float = Field(default=0.0, ge=0, lt=1)
    groups: str = "share"
    input_px: int | None = Field(default=None, gt=0)
    skip_unreadable: bool = False
    train_list: Path | None = None
    test_list: Path | None = None


class Recipe(Record):
    """How long and how fast a network is trained. SGD with momentum; weight decay on every parameter.

    Attributes:
        schedule: ``one-cycle`` (linear up over a quarter of the steps, cosine down to zero) or ``steps``
            (times 0.1 after each milestone).
        epochs: 0 takes a network as it is.
        milestones: Epochs after which ``steps`` lowers the rate.
        eval_every: Epochs between two looks at the test set; the last epoch is always looked at.
    """

    name: str
    epochs: int = Field(ge=0)
    batch_size: int = Field(default=64, gt=0)
    peak_learning_rate: float = Field(gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    schedule: Literal["one-cycle", "steps"]
    milestones: tuple[int, ...] = ()
    eval_every: int = Field(default=1, gt=0)


class MethodConfig(Record):
    """A key of ltkd.methods.registry.METHODS with all of its parameters."""

    name: str
    parameters: dict[str, Parameter]


class Execution(Record):
    """Where and how the passes of a training are made.

    Attributes:
        device: ``cpu`` or ``cuda``.
        precision: Of the forward passes, by autocast; the loss and the weights are float32.
        compiled: Whether torch.compile makes the passes.
        num_devices: Processes that share every batch.
    """

    device: str = "cpu"
    precision: ComputePrecision = "float32"
    compiled: bool = False
    num_devices: int = Field(default=1, gt=0)


class RunConfig(VersionedRecord):
    """Everything needed to repeat a run.

    Attributes:
        model: A name that ltkd.models.registry.model_of knows.
        weights_from: A file of weights that the network starts with; None starts with random ones.
        weights_from_sha256: Which weights these were.
        teacher: The teacher's run folder; None when a network learns from labels alone.
        teacher_weights_sha256: Which weights the teacher had.
        teacher_views: Fixed views of every image, whose teacher logits are kept; None draws a fresh one each epoch.
        versions: Package name to version at training time.
    """

    data: DataConfig
    model: str
    method: MethodConfig
    recipe: Recipe
    seed: int
    execution: Execution
    weights_from: Path | None = None
    weights_from_sha256: str | None = None
    teacher: Path | None = None
    teacher_weights_sha256: str | None = None
    teacher_views: int | None = Field(default=None, gt=0)
    versions: dict[str, str]


def demo() -> Recipe:
    """Glyphs on two CPU cores in a few minutes."""
    return Recipe(name="demo", epochs=12, batch_size=32, peak_learning_rate=0.1, schedule="one-cycle", eval_every=3)


def short() -> Recipe:
    """CIFAR-100-LT, a teacher and six students for three seeds, on two CPU cores in about two hours."""
    return Recipe(name="short", epochs=12, peak_learning_rate=0.1, schedule="one-cycle", eval_every=4)


def paper() -> Recipe:
    """The benchmark's full recipe for the residual networks (METHOD: 240 epochs, batch 64); for a GPU."""
    return Recipe(
        name="paper", epochs=240, peak_learning_rate=0.05, schedule="steps", milestones=(150, 180, 210), eval_every=1
    )


def adopt() -> Recipe:
    """No training: the network as its weights are, measured; for a teacher from elsewhere."""
    return Recipe(name="adopt", epochs=0, peak_learning_rate=0.1, schedule="one-cycle")


RECIPES: dict[str, Callable[[], Recipe]] = {"demo": demo, "short": short, "paper": paper, "adopt": adopt}


def find_recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        UsageError: The name is not in RECIPES.
    """
    if name not in RECIPES:
        raise UsageError(f"unknown recipe '{name}'; known: {', '.join(RECIPES)}.")
    return RECIPES[name]()
