"""ReviewKD: a student's feature maps, fused from the deepest up, learn to be the teacher's.

Source: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044.

Shape legend: N images in the batch, D channels, M channels inside the fusion, H and W sides of a map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltkd.errors import UsageError
from ltkd.models.registry import MODELS, seeded

# every other network of MODELS has three stages and the embedding
FIVE_LEVELS = ("resnet50", "mobilenetv2")
MOST_MIDDLE_CHANNELS = 512


def review_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """The hierarchical context loss, summed over the levels.

    At each level it is the mean squared difference of the whole maps and of the maps averaged to 4, 2 and 1 px, as far
    as those are smaller than the map. The whole map weighs 1 and every next one half of the one before; the weights
    used are scaled to a sum of 1. Computed in float32 (float64 stays float64).

    Args:
        student_features: The student's maps [N, D, H, W], any float dtype; an embedding [N, D] is a map of 1 px.
        teacher_features: The teacher's, of the same shapes. No gradient flows into them.

    Returns:
        A scalar, a mean over the batch.
    """
    losses = [
        _context_loss(_as_map(student), _as_map(teacher.detach()))
        for student, teacher in zip(student_features, teacher_features, strict=True)
    ]
    return torch.stack(losses).sum()


def _context_loss(student_NDHW: Tensor, teacher_NDHW: Tensor) -> Tensor:
    assert student_NDHW.shape == teacher_NDHW.shape, "a fusion brings the student's maps to the teacher's shapes"
    dtype = torch.promote_types(student_NDHW.dtype, torch.float32)
    # pooling is linear: the difference of two averages is the average of the difference
    difference = student_NDHW.to(dtype) - teacher_NDHW.to(dtype)
    loss, weight, total = difference.square().mean(), 1.0, 1.0
    for size_px in (4, 2, 1):
        if size_px < difference.shape[2]:
            weight /= 2
            total += weight
            loss = loss + weight * F.adaptive_avg_pool2d(difference, size_px).square().mean()
    return loss / total


@dataclass(frozen=True)
class FeatureShape:
    """One of a network's features.

    Attributes:
        channels: D.
        size_px: H and W, which are equal; 1 for an embedding.
    """

    channels: int
    size_px: int


class ReviewFusion(nn.Module):
    """Brings a student's features to the shapes of a teacher's; trained with the student, then thrown away.

    From the deepest level to the shallowest, each level is fused with what the deeper ones handed on and predicts
    the teacher's map of that level. Inside it has as many channels as the student's embedding, at most 512.

    Args:
        student: Shapes of the student's features, shallow to deep, the last an embedding.
        teacher: The same of the teacher, as many.
    """

    def __init__(self, student: Sequence[FeatureShape], teacher: Sequence[FeatureShape]) -> None:
        super().__init__()
        middle = min(MOST_MIDDLE_CHANNELS, student[-1].channels)
        deepest = len(student) - 1
        self.levels = nn.ModuleList(
            FusionLevel(taught.channels, middle, teaching, fuses=number < deepest)
            for number, (taught, teaching) in enumerate(zip(student, teacher, strict=True))
        )

    @classmethod
    def between(cls, student: nn.Module, teacher: nn.Module, input_px: int, *, seed: int = 0) -> Self:
        """A new fusion for two networks, whose weights and modes are left as they are.

        Args:
            student: Has ``features`` and ``classifier`` (``FeatureNetwork``).
            teacher: The same.
            input_px: Side of the images.
            seed: Decides the initial weights; the caller's random state is left as it was.

        Raises:
            UsageError: One has no features, or they have different numbers of levels.
        """
        shapes_of_student = feature_shapes(student, input_px, "student")
        shapes_of_teacher = feature_shapes(teacher, input_px, "teacher")
        if len(shapes_of_student) != len(shapes_of_teacher):
            raise UsageError(
                f"the student's features have {len(shapes_of_student)} levels, the teacher's {len(shapes_of_teacher)}; "
                f"they can be compared level by level only: {' and '.join(FIVE_LEVELS)} have 5, the other networks of "
                "ltkd 4."
            )
        with seeded(seed):
            return cls(shapes_of_student, shapes_of_teacher)

    def forward(self, student_features: Sequence[Tensor]) -> list[Tensor]:
        """Maps of the teacher's shapes, shallow to deep, and last an embedding [N, D]."""
        predicted: list[Tensor] = []
        handed_on = None
        for level, features in zip(reversed(self.levels), reversed(student_features), strict=True):
            prediction, handed_on = level(_as_map(features), handed_on)
            predicted.append(prediction)
        return [*predicted[:0:-1], predicted[0].flatten(1)]


class FusionLevel(nn.Module):
    """One level of the fusion.

    Args:
        channels: D of the student's map.
        middle: M.
        teacher: Shape of the teacher's map.
        fuses: Whether a deeper level hands something on.
    """

    def __init__(self, channels: int, middle: int, teacher: FeatureShape, *, fuses: bool) -> None:
        super().__init__()
        self.size_px = teacher.size_px
        self.reduce = nn.Sequential(nn.Conv2d(channels, middle, 1, bias=False), _Norm(middle))
        self.attend = nn.Conv2d(2 * middle, 2, 1) if fuses else None
        self.predict = nn.Sequential(
            nn.Conv2d(middle, teacher.channels, 3, padding=1, bias=False), _Norm(teacher.channels)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.attend:
                # a=1 as in the authors' code: what follows is a normalisation, not a ReLU
                nn.init.kaiming_uniform_(module.weight, a=1)

    def forward(self, features_NDHW: Tensor, handed_on: Tensor | None) -> tuple[Tensor, Tensor]:
        """The predicted map of the teacher, and what is handed on to the next shallower level."""
        fused_NMHW: Tensor = self.reduce(features_NDHW)
        if self.attend is not None:
            assert handed_on is not None, "only the deepest level has nothing handed on"
            deeper_NMHW = F.interpolate(handed_on, fused_NMHW.shape[2:], mode="nearest")
            attention_N2HW = self.attend(torch.cat([fused_NMHW, deeper_NMHW], dim=1)).sigmoid()
            fused_NMHW = fused_NMHW * attention_N2HW[:, :1] + deeper_NMHW * attention_N2HW[:, 1:]
        if fused_NMHW.shape[2] != self.size_px:
            fused_NMHW = F.interpolate(fused_NMHW, (self.size_px, self.size_px), mode="nearest")
        return self.predict(fused_NMHW), fused_NMHW


class _Norm(nn.BatchNorm2d):
    """Batch normalisation that takes its running averages where a batch has one value a channel.

    An embedding of a last batch of one image has; a variance of one value would stop the training.
    """

    def forward(self, image: Tensor) -> Tensor:
        if self.training and image.numel() == self.num_features:
            return F.batch_norm(image, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(image)


def feature_shapes(network: nn.Module, input_px: int, who: str = "network") -> list[FeatureShape]:
    """Shapes of a network's features for images of a size; nothing about the network changes.

    Args:
        network: Has ``features`` and ``classifier`` (``FeatureNetwork``).
        input_px: Side of the images.
        who: What a message calls the network.

    Raises:
        UsageError: It has no such features.
    """
    features, classifier = getattr(network, "features", None), getattr(network, "classifier", None)
    shown = None
    # where torchvision has a module of this name, it gives one map
    if callable(features) and callable(classifier) and not isinstance(features, nn.Module):
        some = next(network.parameters())
        modes = {module: module.training for module in network.modules()}
        try:
            with torch.no_grad():
                shown = network.eval().features(some.new_zeros(1, 3, input_px, input_px))  # type: ignore[operator]
        finally:
            for module, mode in modes.items():
                module.training = mode
    if not isinstance(shown, list) or [feature.ndim for feature in shown] != [4] * (len(shown) - 1) + [2]:
        raise UsageError(
            f"the {who} ({type(network).__name__}) does not show feature maps, which this method compares; these "
            f"networks do: {', '.join(MODELS)}. One of your own needs features(image), a list of maps [N, D, H, W] and "
            "last the embedding [N, D], and classifier."
        )
    return [FeatureShape(feature.shape[1], _as_map(feature).shape[2]) for feature in shown]


def _as_map(features: Tensor) -> Tensor:
    """An embedding [N, D] as a map of 1 px; a map as it is."""
    return features[:, :, None, None] if features.ndim == 2 else features
