"""The search for int8: which ranges and scales keep the accuracy of every group, and which layers have to stay float.

Everything is chosen on the selection images; images that certify are not seen.

Shape legend: N images, C classes, M calibration images.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy.special import log_softmax

from export.conversion.int8_graph import plan_of, quantise
from export.conversion.int8_ranges import RULES, Range, activation_histograms
from export.conversion.session import open_session, run
from export.schema import QuantisationTrial
from ltkd.contract.class_groups import ClassGroups
from ltkd.data.image_files import LabelledImages

CALIBRATION_IMAGES = 1024
SENSITIVITY_IMAGES = 256
TOLERATED_LOSS = 0.005
"""Accuracy that the worst group may lose on the selection images before layers go back to float: a quarter of the
default margin, because what is seen there is uncertain too."""


def search_int8(
    fp32: bytes,
    quantisation: LabelledImages,
    selection: LabelledImages,
    groups: ClassGroups,
    on_trial: Callable[[QuantisationTrial], None] = lambda trial: None,
    tolerated_loss: float = TOLERATED_LOSS,
) -> tuple[bytes, tuple[QuantisationTrial, ...]]:
    """Find the int8 form of a network that loses least accuracy in the group where it loses most.

    Every rule for the ranges of maps is tried, with weights scaled by channel and by tensor. If the best form still
    loses more than is tolerated, the layers that do most damage go back to float: one, then two, four, eight and so on.

    Args:
        fp32: The ONNX file.
        quantisation: Images to take ranges from; up to 1,024 are used, as many of every class as there are.
        selection: Images to choose by.
        groups: The partition of the classes.
        on_trial: Told of every form when it was tried.
        tolerated_loss: What the worst group may lose, a fraction.

    Returns:
        The file, which says in its metadata how it was made, and all that was tried. Equal arguments give equal bytes.
    """
    source = collect_ranges(fp32, quantisation.images[balanced(quantisation.label_N, CALIBRATION_IMAGES)])
    scale = Int8Evaluator(selection, run(open_session(fp32), selection.images), groups)
    tried: dict[Int8Config, QuantisationTrial] = {}

    def loss_of(form: Int8Config) -> float:
        tried[form] = scale.weigh(form, source.written(form))
        on_trial(tried[form])
        return tried[form].worst_group_loss

    for form in (Int8Config(rule, per_channel) for rule in RULES for per_channel in (True, False)):
        loss_of(form)
    if tried[_best(tried)].worst_group_loss > tolerated_loss:
        next((form for form in _ladder(source, scale, _best(tried)) if loss_of(form) <= tolerated_loss), None)
    best = _best(tried)
    trials = (trial.model_copy(update={"chosen": form == best}) for form, trial in tried.items())
    return source.written(best), tuple(trials)


def balanced(label_N: NDArray[np.int64], at_most: int) -> NDArray[np.int64]:
    """Positions of images, as many of every class as of any other while there are any; the same every time."""
    by_class_N = np.argsort(label_N, kind="stable")
    sorted_N = label_N[by_class_N]
    turn_N = np.arange(len(label_N)) - np.searchsorted(sorted_N, sorted_N)  # 0 for the first image of every class
    return np.sort(by_class_N[np.argsort(turn_N, kind="stable")[:at_most]])


@dataclass(frozen=True)
class Int8Config:
    """One way to turn a network into int8.

    Attributes:
        rule: How ranges follow from the calibration images, a key of RULES.
        per_channel: Whether every output channel has weights of its own scale.
        float_layers: Layers that stay float, beside the first one and the classifier.
    """

    rule: str
    per_channel: bool
    float_layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.rule}, {'per channel' if self.per_channel else 'per tensor'}, balanced"


@dataclass(frozen=True)
class CalibratedModel:
    """A network and what its maps were on the calibration images: enough to write any int8 form of it.

    Attributes:
        fp32: The ONNX file.
        ranges: By rule, of every map.
        calibration: What the file shall say of the images.
    """

    fp32: bytes
    ranges: Mapping[str, Mapping[str, Range]]
    calibration: Mapping[str, str | int]

    def written(self, form: Int8Config) -> bytes:
        """The ONNX file of a form."""
        model = quantise(
            self.fp32, self.ranges[form.rule], per_channel=form.per_channel, float_layers=form.float_layers
        )
        made = {"form": str(form), "float_layers": form.float_layers, "calibration": dict(self.calibration)}
        entry = model.metadata_props.add()
        entry.key, entry.value = "int8", json.dumps(made)
        content: bytes = model.SerializeToString(deterministic=True)
        return content


def collect_ranges(fp32: bytes, images_MSS3: NDArray[np.uint8]) -> CalibratedModel:
    """Run a network on calibration images, once for all forms."""
    graph = onnx.load_model_from_string(fp32).graph
    found = activation_histograms(fp32, plan_of(graph).stored, images_MSS3)
    ranges = {name: {map_: rule(spread) for map_, spread in found.items()} for name, rule in RULES.items()}
    sha256 = hashlib.sha256(images_MSS3.tobytes()).hexdigest()
    return CalibratedModel(fp32, ranges, {"num_images": len(images_MSS3), "sha256": sha256})


@dataclass(frozen=True)
class Int8Evaluator:
    """What int8 forms are weighed with: images, and the fp32 model's logits of them."""

    part: LabelledImages
    reference_NC: NDArray[np.floating]
    groups: ClassGroups

    def weigh(self, form: Int8Config, content: bytes) -> QuantisationTrial:
        """How much accuracy a form loses, and in which group most."""
        label_N, candidate_NC = self.part.label_N, run(open_session(content), self.part.images)
        lost_N = (self.reference_NC.argmax(axis=1) == label_N).astype(float) - (candidate_NC.argmax(axis=1) == label_N)
        reference_NC = log_softmax(self.reference_NC.astype(np.float64), axis=1)
        kl_N = (np.exp(reference_NC) * (reference_NC - log_softmax(candidate_NC.astype(np.float64), axis=1))).sum(
            axis=1
        )
        group_N = self.groups.index[label_N]
        losses = {
            name: float(lost_N[group_N == group].mean())
            for group, name in enumerate(self.groups.names)
            if (group_N == group).any()
        }
        worst = max(losses, key=lambda name: losses[name])
        return QuantisationTrial(
            configuration=str(form),
            float_layers=form.float_layers,
            worst_group=worst,
            worst_group_loss=losses[worst],
            overall_loss=float(lost_N.mean()),
            kl=max(float(kl_N[group_N == group].mean()) for group in np.unique(group_N)),
            chosen=False,
        )

    def lighter(self, num_images: int) -> "Int8Evaluator":
        """The same with a few of the images, balanced over the classes."""
        some_M = balanced(self.part.label_N, num_images)
        part = LabelledImages(self.part.images[some_M], self.part.label_N[some_M])
        return Int8Evaluator(part, self.reference_NC[some_M], self.groups)


def _best(tried: Mapping[Int8Config, QuantisationTrial]) -> Int8Config:
    return min(tried, key=lambda form: (tried[form].worst_group_loss, tried[form].kl))


def _ladder(source: CalibratedModel, scale: Int8Evaluator, form: Int8Config) -> Iterator[Int8Config]:
    """The same form with more and more layers in float, first those that do most damage as the only integers."""
    few = scale.lighter(SENSITIVITY_IMAGES)
    layers = plan_of(onnx.load_model_from_string(source.fp32).graph).layers
    damage = {}
    for layer in layers:
        alone = replace(form, float_layers=tuple(other for other in layers if other != layer))
        damage[layer] = few.weigh(alone, source.written(alone)).kl
    ranked = sorted(layers, key=lambda layer: -damage[layer])
    num_float = 1
    while num_float < len(ranked):
        yield replace(form, float_layers=tuple(ranked[:num_float]))
        num_float *= 2
