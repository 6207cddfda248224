"""Search for the int8 configuration of a network that loses least accuracy in its worst class group.

int8_ranges measures the activations, int8_graph writes the quantised file, and this module chooses between the
configurations. It chooses on the selection images and never uses the certification images.

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

from export.conversion.int8_graph import plan_quantisation, quantise
from export.conversion.int8_ranges import RULES, Range, activation_histograms
from export.conversion.session import open_session, run
from export.schema import QuantisationTrial
from ltkd.contract.class_groups import ClassGroups
from ltkd.data.image_files import LabelledImages

CALIBRATION_IMAGES = 1024
SENSITIVITY_IMAGES = 256
TOLERATED_LOSS = 0.005
"""Accuracy that the worst group may lose on the selection images before layers are kept in float: a quarter of the
default margin, because the loss on these images is itself uncertain."""


def search_int8(
    fp32: bytes,
    quantisation: LabelledImages,
    selection: LabelledImages,
    groups: ClassGroups,
    on_trial: Callable[[QuantisationTrial], None] = lambda trial: None,
    tolerated_loss: float = TOLERATED_LOSS,
) -> tuple[bytes, tuple[QuantisationTrial, ...]]:
    """Find the int8 configuration of a network that loses least accuracy in its worst group.

    Every rule for the ranges of activations is tried, with one weight scale per channel and with one per tensor. If the
    best configuration still loses more than ``tolerated_loss``, the layers that cause the largest errors are kept in
    float: one, then two, four, eight and so on.

    Args:
        fp32: The ONNX file.
        quantisation: Images that determine the ranges; up to 1,024 are used, balanced over the classes.
        selection: Images on which the configurations are compared.
        groups: The partition of the classes.
        on_trial: Called with the result of each configuration.
        tolerated_loss: The acceptable loss of the worst group, a fraction.

    Returns:
        The ONNX file, whose metadata describe the configuration and the calibration images, and all trials. Equal
        arguments give equal bytes.
    """
    source = collect_ranges(fp32, quantisation.images[balanced_rows(quantisation.labels_N, CALIBRATION_IMAGES)])
    evaluator = Int8Evaluator(selection, run(open_session(fp32), selection.images), groups)
    trials: dict[Int8Config, QuantisationTrial] = {}

    def loss_of(config: Int8Config) -> float:
        trials[config] = evaluator.evaluate(config, source.to_onnx_bytes(config))
        on_trial(trials[config])
        return trials[config].worst_group_loss

    for config in (Int8Config(rule, per_channel) for rule in RULES for per_channel in (True, False)):
        loss_of(config)
    if trials[_best(trials)].worst_group_loss > tolerated_loss:
        mixed_configs = _with_float_layers(source, evaluator, _best(trials))
        next((config for config in mixed_configs if loss_of(config) <= tolerated_loss), None)
    best = _best(trials)
    marked = (trial.model_copy(update={"chosen": config == best}) for config, trial in trials.items())
    return source.to_onnx_bytes(best), tuple(marked)


def balanced_rows(labels_N: NDArray[np.int64], at_most: int) -> NDArray[np.int64]:
    """Choose positions of images, equally many of each class while there are any. The choice is deterministic."""
    by_class_N = np.argsort(labels_N, kind="stable")
    sorted_N = labels_N[by_class_N]
    rank_N = np.arange(len(labels_N)) - np.searchsorted(sorted_N, sorted_N)  # 0 for the first image of every class
    return np.sort(by_class_N[np.argsort(rank_N, kind="stable")[:at_most]])


@dataclass(frozen=True)
class Int8Config:
    """One way to quantise a network to int8.

    Attributes:
        rule: How ranges are computed from the calibration images, a key of RULES.
        per_channel: Whether each output channel has its own weight scale.
        float_layers: Names of layers that stay float, in addition to the first layer and the classifier.
    """

    rule: str
    per_channel: bool
    float_layers: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.rule}, {'per channel' if self.per_channel else 'per tensor'}, balanced"


@dataclass(frozen=True)
class CalibratedModel:
    """A network and the ranges of its activations: all that is needed to write it in any int8 configuration.

    Attributes:
        fp32: The ONNX file.
        ranges: For each rule, the range of each activation.
        calibration: Metadata on the calibration images.
    """

    fp32: bytes
    ranges: Mapping[str, Mapping[str, Range]]
    calibration: Mapping[str, str | int]

    def to_onnx_bytes(self, config: Int8Config) -> bytes:
        """Write the ONNX file of a configuration."""
        model = quantise(
            self.fp32, self.ranges[config.rule], per_channel=config.per_channel, float_layers=config.float_layers
        )
        metadata = {"form": str(config), "float_layers": config.float_layers, "calibration": dict(self.calibration)}
        entry = model.metadata_props.add()
        entry.key, entry.value = "int8", json.dumps(metadata)
        content: bytes = model.SerializeToString(deterministic=True)
        return content


def collect_ranges(fp32: bytes, images_MSS3: NDArray[np.uint8]) -> CalibratedModel:
    """Run a network on the calibration images once, and compute the ranges for all configurations."""
    graph = onnx.load_model_from_string(fp32).graph
    histograms = activation_histograms(fp32, plan_quantisation(graph).stored, images_MSS3)
    ranges = {
        rule: {activation: range_of(histogram) for activation, histogram in histograms.items()}
        for rule, range_of in RULES.items()
    }
    sha256 = hashlib.sha256(images_MSS3.tobytes()).hexdigest()
    return CalibratedModel(fp32, ranges, {"num_images": len(images_MSS3), "sha256": sha256})


@dataclass(frozen=True)
class Int8Evaluator:
    """Measures the loss of int8 models on labelled images.

    Attributes:
        selection: The images.
        reference_NC: Logits of the fp32 model on these images.
        groups: The partition of the classes.
    """

    selection: LabelledImages
    reference_NC: NDArray[np.floating]
    groups: ClassGroups

    def evaluate(self, config: Int8Config, content: bytes) -> QuantisationTrial:
        """Measure how much accuracy an int8 model loses, and in which group it loses most."""
        labels_N, candidate_NC = self.selection.labels_N, run(open_session(content), self.selection.images)
        lost_N = (self.reference_NC.argmax(axis=1) == labels_N).astype(float) - (
            candidate_NC.argmax(axis=1) == labels_N
        )
        reference_NC = log_softmax(self.reference_NC.astype(np.float64), axis=1)
        kl_N = (np.exp(reference_NC) * (reference_NC - log_softmax(candidate_NC.astype(np.float64), axis=1))).sum(
            axis=1
        )
        group_N = self.groups.index[labels_N]
        losses = {
            name: float(lost_N[group_N == group].mean())
            for group, name in enumerate(self.groups.names)
            if (group_N == group).any()
        }
        worst = max(losses, key=lambda name: losses[name])
        return QuantisationTrial(
            configuration=str(config),
            float_layers=config.float_layers,
            worst_group=worst,
            worst_group_loss=losses[worst],
            overall_loss=float(lost_N.mean()),
            kl=max(float(kl_N[group_N == group].mean()) for group in np.unique(group_N)),
            chosen=False,
        )

    def subset(self, num_images: int) -> "Int8Evaluator":
        """Return an evaluator on at most ``num_images`` of the images, balanced over the classes."""
        rows_M = balanced_rows(self.selection.labels_N, num_images)
        selection = LabelledImages(self.selection.images[rows_M], self.selection.labels_N[rows_M])
        return Int8Evaluator(selection, self.reference_NC[rows_M], self.groups)


def _best(trials: Mapping[Int8Config, QuantisationTrial]) -> Int8Config:
    return min(trials, key=lambda config: (trials[config].worst_group_loss, trials[config].kl))


def _with_float_layers(source: CalibratedModel, evaluator: Int8Evaluator, config: Int8Config) -> Iterator[Int8Config]:
    """Vary a configuration by keeping more and more layers in float, the most sensitive layers first.

    The sensitivity of a layer is the divergence from fp32 when it is the only quantised layer.
    """
    quick_evaluator = evaluator.subset(SENSITIVITY_IMAGES)
    layers = plan_quantisation(onnx.load_model_from_string(source.fp32).graph).layers
    sensitivity = {}
    for layer in layers:
        only_layer = replace(config, float_layers=tuple(other for other in layers if other != layer))
        sensitivity[layer] = quick_evaluator.evaluate(only_layer, source.to_onnx_bytes(only_layer)).kl
    ranked = sorted(layers, key=lambda layer: -sensitivity[layer])
    num_float = 1
    while num_float < len(ranked):
        yield replace(config, float_layers=tuple(ranked[:num_float]))
        num_float *= 2
