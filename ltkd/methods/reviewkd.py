"""ReviewKD: distillation by feature maps.

The student's maps are fused from the deepest level upwards and trained to match the teacher's maps.

Source: Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044.

Shape legend: N images in the batch, D channels, M channels inside the fusion, H and W height and width of
a map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltkd.errors import UsageError
from ltkd.models.registry import MODELS, seeded

# every other network of MODELS has four levels: three stages and the embedding
FIVE_LEVELS = ("resnet50", "mobilenetv2")
MAX_MIDDLE_CHANNELS = 512


def review_loss(student_features: Sequence[Tensor], teacher_features: Sequence[Tensor]) -> Tensor:
    """The hierarchical context loss, summed over the levels.

    The loss of a level is a weighted sum of mean squared differences: of the whole maps, and of the maps averaged to 4,
    2 and 1 px where these are smaller than the map. The whole map has the weight 1 and each further size half the
    weight of the size before it. The weights are scaled to a sum of 1. Computed in float32 (float64 stays float64).

    Args:
        student_features: The student's maps [N, D, H, W], any float dtype; an embedding [N, D] is a map of 1 px.
        teacher_features: The teacher's maps, of the same shapes. No gradient flows into them.

    Returns:
        A scalar, a mean over the batch.
    """
    losses = [
        _context_loss(_as_map(student), _as_map(teacher.detach()))
        for student, teacher in zip(student_features, teacher_features, strict=True)
    ]
    return torch.stack(losses).sum()


def _context_loss(student_NDHW: Tensor, teacher_NDHW: Tensor) -> Tensor:
    assert student_NDHW.shape == teacher_NDHW.shape, "the fusion must give the student's maps the teacher's shapes"
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
    """The shape of one level of a network's features.

    Attributes:
        channels: D.
        size_px: H and W, which are equal; 1 for the embedding.
    """

    channels: int
    size_px: int


class ReviewFusion(nn.Module):
    """Convert a student's features to the shapes of a teacher's; trained with the student, then discarded.

    From the deepest level to the shallowest, each level is fused with the result of the deeper levels and predicts the
    teacher's map of that level. The fusion has as many channels as the student's embedding, at most 512.

    Args:
        student: Shapes of the student's features, from shallow to deep; the last is the embedding.
        teacher: Shapes of the teacher's features, of the same number.
    """

    def __init__(self, student: Sequence[FeatureShape], teacher: Sequence[FeatureShape]) -> None:
        super().__init__()
        middle = min(MAX_MIDDLE_CHANNELS, student[-1].channels)
        deepest = len(student) - 1
        self.levels = nn.ModuleList(
            FusionLevel(student_shape.channels, middle, teacher_shape, fuses=number < deepest)
            for number, (student_shape, teacher_shape) in enumerate(zip(student, teacher, strict=True))
        )

    @classmethod
    def between(cls, student: nn.Module, teacher: nn.Module, input_px: int, *, seed: int = 0) -> Self:
        """Create the fusion for two networks; their weights and modes do not change.

        Args:
            student: Has ``features`` and ``classifier`` (``FeatureNetwork``).
            teacher: Has ``features`` and ``classifier`` too.
            input_px: Side of the images.
            seed: Determines the initial weights; the caller's random state does not change.

        Raises:
            UsageError: A network has no features, or the networks have different numbers of levels.
        """
        student_shapes = feature_shapes(student, input_px, "student")
        teacher_shapes = feature_shapes(teacher, input_px, "teacher")
        if len(student_shapes) != len(teacher_shapes):
            raise UsageError(
                f"the student's features have {len(student_shapes)} levels, the teacher's {len(teacher_shapes)}; "
                f"choose networks with the same number of levels: {' and '.join(FIVE_LEVELS)} have 5, the other "
                "networks of ltkd have 4."
            )
        with seeded(seed):
            return cls(student_shapes, teacher_shapes)

    def forward(self, student_features: Sequence[Tensor]) -> list[Tensor]:
        """Maps in the teacher's shapes, from shallow to deep; the last is the embedding [N, D]."""
        predicted: list[Tensor] = []
        deeper = None
        for level, features in zip(reversed(self.levels), reversed(student_features), strict=True):
            prediction, deeper = level(_as_map(features), deeper)
            predicted.append(prediction)
        return [*predicted[:0:-1], predicted[0].flatten(1)]


class FusionLevel(nn.Module):
    """One level of the fusion.

    Args:
        channels: D of the student's map.
        middle: M.
        teacher: Shape of the teacher's map.
        fuses: Whether the level is fused with the result of a deeper level.
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
                # a=1 as in the authors' code, because the next layer is a normalisation, not a ReLU
                nn.init.kaiming_uniform_(module.weight, a=1)

    def forward(self, features_NDHW: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """The predicted map of the teacher, and the fused map for the next shallower level."""
        fused_NMHW: Tensor = self.reduce(features_NDHW)
        if self.attend is not None:
            assert deeper is not None, "only the deepest level has no deeper map"
            deeper_NMHW = F.interpolate(deeper, fused_NMHW.shape[2:], mode="nearest")
            attention_N2HW = self.attend(torch.cat([fused_NMHW, deeper_NMHW], dim=1)).sigmoid()
            fused_NMHW = fused_NMHW * attention_N2HW[:, :1] + deeper_NMHW * attention_N2HW[:, 1:]
        if fused_NMHW.shape[2] != self.size_px:
            fused_NMHW = F.interpolate(fused_NMHW, (self.size_px, self.size_px), mode="nearest")
        return self.predict(fused_NMHW), fused_NMHW


class _Norm(nn.BatchNorm2d):
    """Batch normalisation that uses its running statistics when a batch has one value per channel.

    This happens for the embedding when the last batch has one image. The variance of one value does not exist, and
    torch would raise an error.
    """

    def forward(self, image: Tensor) -> Tensor:
        if self.training and image.numel() == self.num_features:
            return F.batch_norm(image, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(image)


def feature_shapes(network: nn.Module, input_px: int, role: str = "network") -> list[FeatureShape]:
    """Shapes of a network's features for images of one size; the network does not change.

    Args:
        network: Has ``features`` and ``classifier`` (``FeatureNetwork``).
        input_px: Side of the images.
        role: How error messages refer to the network.

    Raises:
        UsageError: The network has no such features.
    """
    features, classifier = getattr(network, "features", None), getattr(network, "classifier", None)
    outputs = None
    # torchvision networks may have a module of this name, which returns one map
    if callable(features) and callable(classifier) and not isinstance(features, nn.Module):
        parameter = next(network.parameters())
        modes = {module: module.training for module in network.modules()}
        try:
            with torch.no_grad():
                outputs = network.eval().features(parameter.new_zeros(1, 3, input_px, input_px))  # type: ignore[operator]
        finally:
            for module, mode in modes.items():
                module.training = mode
    if not isinstance(outputs, list) or [feature.ndim for feature in outputs] != [4] * (len(outputs) - 1) + [2]:
        raise UsageError(
            f"the {role} ({type(network).__name__}) does not return feature maps, which this method compares; these "
            f"networks do: {', '.join(MODELS)}. A network of your own needs features(image), which returns "
            "a list of maps [N, D, H, W] and the embedding [N, D] last, and classifier(embedding)."
        )
    return [FeatureShape(feature.shape[1], _as_map(feature).shape[2]) for feature in outputs]


def _as_map(features: Tensor) -> Tensor:
    """Return an embedding [N, D] as a map of 1 px, and a map unchanged."""
    return features[:, :, None, None] if features.ndim == 2 else features
