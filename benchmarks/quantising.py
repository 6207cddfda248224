"""Losses of int8 on a trained network, by the choice of the calibration images and by the number of weight bits.

Part of benchmarks/export.py.

Shape legend: N images, S side in pixels, C classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from scipy.special import log_softmax

from export.certification.accuracy_margins import margins_for
from export.certification.splits import split_test_images
from export.conversion.fp32 import to_onnx
from export.conversion.int8 import Int8Config, balanced_rows, collect_ranges
from export.conversion.int8_graph import plan_quantisation, quantise
from export.conversion.int8_ranges import RULES, activation_histograms
from export.conversion.session import CPU, open_session, run
from ltkd.contract.task import Task
from ltkd.data.datasets import load_dataset
from ltkd.training.run_folder import open_run

CALIBRATION_IMAGES = 500

Losses = Mapping[str, tuple[float, float]]
"""Loss of accuracy (a fraction) and mean KL divergence from fp32, by group and for ``all`` images."""


@dataclass(frozen=True)
class QuantisationInputs:
    """A trained network, and the images for calibration and measurement.

    Attributes:
        fp32: The ONNX file.
        pool_NSS3: Images for calibration.
        pool_label_N: Their classes.
        images_NSS3: Images for measurement; none of them is in the pool.
        labels_N: Their classes.
        reference_NC: Their logits from the fp32 model.
        task: Classes and groups.
    """

    fp32: bytes
    pool_NSS3: NDArray[np.uint8]
    pool_label_N: NDArray[np.int64]
    images_NSS3: NDArray[np.uint8]
    labels_N: NDArray[np.int64]
    reference_NC: NDArray[np.float32]
    task: Task


def load_inputs(run_dir: Path, most_images: int) -> QuantisationInputs:
    """Load a run and split its test images: one half for calibration, one half for measurement."""
    found = open_run(run_dir)
    data = load_dataset(found.config.data)
    splits = split_test_images(data, margins_for("int8", {}, data.task.groups))
    pool = [splits.quantisation, splits.selection, splits.confidence]
    num_real = len(splits.certify.labels_N) - splits.num_views
    real_N = balanced_rows(splits.certify.labels_N[:num_real], most_images)
    images_NSS3 = splits.certify.images[real_N]
    fp32 = to_onnx(found.load_network(), found.task)
    return QuantisationInputs(
        fp32=fp32,
        pool_NSS3=np.concatenate([part.images[:] for part in pool]),
        pool_label_N=np.concatenate([part.labels_N for part in pool]),
        images_NSS3=images_NSS3,
        labels_N=splits.certify.labels_N[real_N],
        reference_NC=run(open_session(fp32), images_NSS3),
        task=found.task,
    )


def draw_calibration_images(inputs: QuantisationInputs, kind: str, seed: int) -> NDArray[np.int64]:
    """Positions of calibration images: balanced over the classes, or distributed like the training images."""
    random = np.random.default_rng(seed)
    order_N = random.permutation(len(inputs.pool_label_N))
    if kind == "balanced":
        return order_N[balanced_rows(inputs.pool_label_N[order_N], CALIBRATION_IMAGES)]
    counts = np.array(inputs.task.train_counts, dtype=float)
    probability_N = (counts / np.bincount(inputs.pool_label_N, minlength=len(counts)))[inputs.pool_label_N]
    size = min(CALIBRATION_IMAGES, len(order_N))
    return random.choice(len(order_N), size, replace=False, p=probability_N / probability_N.sum())


def losses_by_draw(
    inputs: QuantisationInputs, draws: int, report: Callable[[str], None]
) -> dict[str, dict[str, list[Losses]]]:
    """Losses of int8 by the rule for the ranges and by the kind of calibration images, one per draw."""
    found: dict[str, dict[str, list[Losses]]] = {rule: {"balanced": [], "natural": []} for rule in RULES}
    for seed in range(draws):
        for kind in ("balanced", "natural"):
            report(f"{kind} calibration images, draw {seed + 1} of {draws}")
            source = collect_ranges(inputs.fp32, inputs.pool_NSS3[draw_calibration_images(inputs, kind, seed)])
            for rule, by_kind in found.items():
                content = source.to_onnx_bytes(Int8Config(rule, per_channel=True))
                by_kind[kind].append(losses(inputs, run(open_session(content), inputs.images_NSS3)))
    return found


def losses_by_weights(inputs: QuantisationInputs, limit: int) -> tuple[dict[str, Losses], float]:
    """Losses of int8 with a weight limit, on this processor and with exact sums.

    Returns:
        The losses by way of computation, and the share of images whose class differs between the two.
    """
    maps = plan_quantisation(onnx.load_model_from_string(inputs.fp32).graph).stored
    histograms = activation_histograms(
        inputs.fp32, maps, inputs.pool_NSS3[draw_calibration_images(inputs, "balanced", 0)]
    )
    ranges = {name: RULES["minmax"](histogram) for name, histogram in histograms.items()}
    model = quantise(inputs.fp32, ranges, per_channel=True, weight_limit=limit)
    content = model.SerializeToString(deterministic=True)
    here_NC, exact_NC = run(open_session(content), inputs.images_NSS3), _exact_logits(content, inputs.images_NSS3)
    differing = float((here_NC.argmax(axis=1) != exact_NC.argmax(axis=1)).mean())
    return {"here": losses(inputs, here_NC), "with exact sums": losses(inputs, exact_NC)}, differing


def losses(inputs: QuantisationInputs, candidate_NC: NDArray[np.float32]) -> Losses:
    """The losses of a candidate, from its logits."""
    groups = inputs.task.groups
    reference_right_N, candidate_right_N = (
        (logits.argmax(1) == inputs.labels_N) for logits in (inputs.reference_NC, candidate_NC)
    )
    lost_N = reference_right_N.astype(float) - candidate_right_N
    reference_logp_NC, candidate_logp_NC = (
        log_softmax(logits.astype(float), axis=1) for logits in (inputs.reference_NC, candidate_NC)
    )
    kl_N = (np.exp(reference_logp_NC) * (reference_logp_NC - candidate_logp_NC)).sum(axis=1)
    group_N = groups.index[inputs.labels_N]
    by_group = {name: group_N == group for group, name in enumerate(groups.names)} | {"all": group_N >= 0}
    return {name: (float(lost_N[rows_N].mean()), float(kl_N[rows_N].mean())) for name, rows_N in by_group.items()}


def _exact_logits(content: bytes, images_NSS3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits with unfused nodes and integers converted to float32, so that no processor saturates a sum."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return run(onnxruntime.InferenceSession(content, options, providers=[CPU]), images_NSS3)
