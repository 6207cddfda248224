"""The configuration of a run: data, network, method, recipe and seed. ``config.json`` contains one RunConfig."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from ltkd.contract.preprocessing import FULL_DECODING, Resizing
from ltkd.contract.records import Record, VersionedRecord

Parameter = float | int | bool | str
ComputePrecision = Literal["float32", "bfloat16", "float16"]


class DataConfig(Record):
    """Which images are used, how imbalanced they are, and how the classes are grouped.

    Attributes:
        name: A key of ltkd.data.formats.DATASETS.
        root: Directory of the images; None if the data set does not need one.
        gamma: Size of the largest class divided by that of the smallest after sampling; None keeps all training images.
        holdout: Fraction of every class that is removed from the training set before the long-tailed subset is drawn.
            These images replace the test set, so that parameters can be chosen on them. 0 uses the whole training set
            and the test set.
        groups: ``share`` (33/34/33), ``count`` (many/medium/few), ``quantile:K`` or the path of a JSON mapping.
        input_px: Side of the square images; None takes the data set's own size.
        resizing: How image files are cropped and scaled to that side.
        skip_unreadable: Exclude image files that cannot be read instead of rejecting the data set.
        train_list: For a data set given by lists, a file with a line ``path label`` for each training image. The paths
            are relative to the root.
        test_list: The same for the test images.
    """

    name: str = "glyphs"
    root: Path | None = None
    gamma: float | None = Field(default=None, ge=1)
    holdout: float = Field(default=0.0, ge=0, lt=1)
    groups: str = "share"
    input_px: int | None = Field(default=None, gt=0)
    resizing: Resizing = FULL_DECODING
    skip_unreadable: bool = False
    train_list: Path | None = None
    test_list: Path | None = None


class Recipe(Record):
    """Epochs, batch size and optimiser settings. SGD with momentum; weight decay on every parameter.

    Attributes:
        schedule: ``one-cycle`` (linear increase over a quarter of the steps, then cosine decay to zero) or ``steps``
            (multiplied by 0.1 after each milestone).
        epochs: Number of epochs; 0 keeps the network's weights as they are.
        milestones: Epochs after which ``steps`` lowers the learning rate.
        eval_every: Epochs between two evaluations on the test set; the last epoch is always evaluated.
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
    """A method, by its key in ltkd.methods.registry.METHODS, with all of its parameters."""

    name: str
    parameters: dict[str, Parameter]


class Execution(Record):
    """The device, precision and number of processes of a training.

    Attributes:
        device: ``cpu`` or ``cuda``.
        precision: Precision of the forward passes, set by autocast; the loss and the weights are float32.
        compiled: Whether the passes are compiled with torch.compile.
        num_devices: Number of processes that share every batch.
    """

    device: str = "cpu"
    precision: ComputePrecision = "float32"
    compiled: bool = False
    num_devices: int = Field(default=1, gt=0)


class RunConfig(VersionedRecord):
    """Everything needed to repeat a run.

    Attributes:
        model: A name that ltkd.models.registry.model_builder accepts.
        weights_from: A file of initial weights; None starts with random weights.
        weights_from_sha256: SHA-256 of the initial weights.
        teacher: The teacher's run folder; None if the network is trained from labels only.
        teacher_weights_sha256: SHA-256 of the teacher's weights.
        teacher_views: Number of fixed augmented views per image, whose teacher logits are stored; None draws a new
            view each epoch.
        versions: Package name to version at training time.
    """

    schema_version: int = 2
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
