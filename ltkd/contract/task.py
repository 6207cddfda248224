"""The task a model was trained for. Every run and bundle contains it, so later stages do not compute it again."""

from pydantic import Field, model_validator

from ltkd.contract.class_groups import ClassGroups
from ltkd.contract.preprocessing import FULL_DECODING, Preprocessing, Resizing
from ltkd.contract.records import VersionedRecord


class Task(VersionedRecord):
    """Class names, training counts, groups and preprocessing.

    Attributes:
        class_names: C names, in the order of the logits.
        train_counts: Number of training images of each class.
        groups: The partition of the classes.
        input_px: Width and height of the network's input in pixels.
        mean: Channel means of RGB scaled to 0..1; the exported graph contains the normalisation.
        std: Channel standard deviations of RGB scaled to 0..1.
        resizing: How image files are cropped and scaled to ``input_px``.
    """

    class_names: tuple[str, ...] = Field(min_length=2)
    train_counts: tuple[int, ...]
    groups: ClassGroups
    input_px: int = Field(gt=0)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resizing: Resizing = FULL_DECODING

    @model_validator(mode="after")
    def _sizes_agree(self) -> "Task":
        sizes = {len(self.class_names), len(self.train_counts), len(self.groups.group_of_class)}
        if len(sizes) != 1:
            raise ValueError("class_names, train_counts and groups must have the same length")
        return self

    @property
    def preprocessing(self) -> Preprocessing:
        """How an image file becomes the network's input, up to the normalisation, which is in the graph."""
        return Preprocessing(input_px=self.input_px, **dict(self.resizing))

    def group_name(self, label: int) -> str:
        """The name of the group that a class belongs to."""
        return self.groups.names[self.groups.group_of_class[label]]
