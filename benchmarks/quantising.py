"""What int8 does to a trained network: by the images that show it the ranges of its maps, by the bits of its weights.

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

from export.certification.margins import margins_for
from export.certification.splits import split_test_images
from export.conversion.fp32 import to_onnx
from export.conversion.int8 import Int8Config, balanced, collect_ranges
from export.conversion.int8_graph import plan_of, quantise
from export.conversion.int8_ranges import RULES, activation_histograms
from export.conversion.session import CPU, open_session, run
from ltkd.contract.task import Task
from ltkd.data.datasets import load_dataset
from ltkd.training.run_folder import open_run

CALIBRATION_IMAGES = 500

Losses = Mapping[str, tuple[float, float]]
"""Accuracy lost, a fraction, and mean divergence from fp32, by group and of ``all`` images."""


@dataclass(frozen=True)
class Subject:
    """A run's network and the images that say what int8 does to it.

    Attributes:
        fp32: The ONNX file.
        pool_NSS3: Images to calibrate with.
        pool_label_N: Their classes.
        images_NSS3: Images to measure on, none of them in the pool.
        label_N: Their classes.
        reference_NC: The fp32 model's logits of them.
        task: Classes and groups.
    """

    fp32: bytes
    pool_NSS3: NDArray[np.uint8]
    pool_label_N: NDArray[np.int64]
    images_NSS3: NDArray[np.uint8]
    label_N: NDArray[np.int64]
    reference_NC: NDArray[np.float32]
    task: Task


def subject_of(run_dir: Path, most_images: int) -> Subject:
    """Load a run and divide its test images: half to calibrate with, half to measure on."""
    found = open_run(run_dir)
    data = load_dataset(found.config.data)
    splits = split_test_images(data, margins_for("int8", {}, data.task.groups))
    pool = [splits.quantisation, splits.selection, splits.confidence]
    num_real = len(splits.certify.label_N) - splits.num_views
    real_N = balanced(splits.certify.label_N[:num_real], most_images)
    images_NSS3 = splits.certify.images[real_N]
    fp32 = to_onnx(found.load_network(), found.task)
    return Subject(
        fp32=fp32,
        pool_NSS3=np.concatenate([part.images[:] for part in pool]),
        pool_label_N=np.concatenate([part.label_N for part in pool]),
        images_NSS3=images_NSS3,
        label_N=splits.certify.label_N[real_N],
        reference_NC=run(open_session(fp32), images_NSS3),
        task=found.task,
    )


def draw(subject: Subject, kind: str, seed: int) -> NDArray[np.int64]:
    """Positions of calibration images: as many of every class, or as the training images are distributed."""
    random = np.random.default_rng(seed)
    order_N = random.permutation(len(subject.pool_label_N))
    if kind == "balanced":
        return order_N[balanced(subject.pool_label_N[order_N], CALIBRATION_IMAGES)]
    counts = np.array(subject.task.train_counts, dtype=float)
    chance_N = (counts / np.bincount(subject.pool_label_N, minlength=len(counts)))[subject.pool_label_N]
    size = min(CALIBRATION_IMAGES, len(order_N))
    return random.choice(len(order_N), size, replace=False, p=chance_N / chance_N.sum())


def losses_by_draw(subject: Subject, draws: int, say: Callable[[str], None]) -> dict[str, dict[str, list[Losses]]]:
    """What int8 loses, by the rule for ranges and by the kind of calibration images, draw by draw."""
    found: dict[str, dict[str, list[Losses]]] = {rule: {"balanced": [], "natural": []} for rule in RULES}
    for seed in range(draws):
        for kind in ("balanced", "natural"):
            say(f"{kind} calibration images, draw {seed + 1} of {draws}")
            source = collect_ranges(subject.fp32, subject.pool_NSS3[draw(subject, kind, seed)])
            for rule, seen in found.items():
                content = source.written(Int8Config(rule, per_channel=True))
                seen[kind].append(losses(subject, run(open_session(content), subject.images_NSS3)))
    return found


def losses_by_weights(subject: Subject, limit: int) -> tuple[dict[str, Losses], float]:
    """What int8 loses with weights up to a limit, on this processor and with exact sums.

    Returns:
        The losses by how it was computed, and the share of images that get another class than from exact sums.
    """
    maps = plan_of(onnx.load_model_from_string(subject.fp32).graph).stored
    seen = activation_histograms(subject.fp32, maps, subject.pool_NSS3[draw(subject, "balanced", 0)])
    ranges = {name: RULES["minmax"](spread) for name, spread in seen.items()}
    model = quantise(subject.fp32, ranges, per_channel=True, weight_limit=limit)
    content = model.SerializeToString(deterministic=True)
    here_NC, exact_NC = run(open_session(content), subject.images_NSS3), _exact(content, subject.images_NSS3)
    differing = float((here_NC.argmax(axis=1) != exact_NC.argmax(axis=1)).mean())
    return {"here": losses(subject, here_NC), "with exact sums": losses(subject, exact_NC)}, differing


def losses(subject: Subject, candidate_NC: NDArray[np.float32]) -> Losses:
    """What a candidate loses, given its logits."""
    groups = subject.task.groups
    right_N, kept_N = ((logits.argmax(1) == subject.label_N) for logits in (subject.reference_NC, candidate_NC))
    lost_N = right_N.astype(float) - kept_N
    was_NC, is_NC = (log_softmax(logits.astype(float), axis=1) for logits in (subject.reference_NC, candidate_NC))
    kl_N = (np.exp(was_NC) * (was_NC - is_NC)).sum(axis=1)
    group_N = groups.index[subject.label_N]
    chosen = {name: group_N == group for group, name in enumerate(groups.names)} | {"all": group_N >= 0}
    return {name: (float(lost_N[some].mean()), float(kl_N[some].mean())) for name, some in chosen.items()}


def _exact(content: bytes, images_NSS3: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits with every node by itself and integers read back as float32, so that no processor cuts a sum short."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return run(onnxruntime.InferenceSession(content, options, providers=[CPU]), images_NSS3)
