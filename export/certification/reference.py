"""Run the original network in PyTorch to compute the reference logits that candidates are compared with.

Shape legend: N images, S side in pixels, C classes.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.certification.splits import Splits, find_duplicates
from ltkd.contract.class_groups import ClassGroups
from ltkd.contract.task import Task
from ltkd.data.image_files import Images, LabelledImages
from ltkd.errors import RunError

BATCH_SIZE = 256
NUMERIC_IMAGES = 256


@dataclass(frozen=True)
class Reference:
    """The model that candidates are compared with, and its logits of the certification images.

    Attributes:
        task: Classes and groups.
        certify: The certification images, which must not have influenced any candidate.
        logits_NC: Logits of the reference on these images.
        sample_M: Positions of the images for which float64 logits were computed.
        duplicates: Sentences on duplicates among the certification images, from ``find_duplicates``.
        float64_logits_MC: Logits of the sampled images in float64; None if the reference is itself an ONNX file.
        onnx: A correct fp32 ONNX file of the reference, used to locate the layer that causes a difference; None if
            there is no such file.
    """

    task: Task
    certify: LabelledImages
    logits_NC: NDArray[np.floating]
    sample_M: NDArray[np.int64]
    duplicates: tuple[str, ...]
    float64_logits_MC: NDArray[np.floating] | None
    onnx: bytes | None


def reference_of(network: nn.Module, task: Task, splits: Splits, fp32: bytes | None) -> Reference:
    """Compute the reference logits of a network on the certification images.

    Raises:
        RunError: The logits are not finite.
    """
    certify = splits.certify
    sample_M = spread_over_groups(certify.labels_N, task.groups, NUMERIC_IMAGES // len(task.groups.names) or 1)
    other_splits: dict[str, Images] = {name: part.images for name, part in splits.parts.items() if name != "certify"}
    return Reference(
        task=task,
        certify=certify,
        logits_NC=torch_logits(network, task, certify.images, torch.float32),
        sample_M=sample_M,
        duplicates=find_duplicates(certify.images, splits.num_views, other_splits),
        float64_logits_MC=torch_logits(network, task, certify.images[sample_M], torch.float64),
        onnx=fp32,
    )


def torch_logits(network: nn.Module, task: Task, images: Images, dtype: torch.dtype) -> NDArray[np.floating]:
    """Compute logits [N, C] of the network in evaluation mode, in ``dtype`` on the CPU.

    The pixels are normalised step by step. The exported graph uses a folded form, and a comparison shows errors in it.

    Raises:
        RunError: A logit is not finite.
    """
    network_copy = copy.deepcopy(network).cpu().to(dtype).eval()
    mean, std = (torch.tensor(values, dtype=dtype).view(1, 3, 1, 1) for values in (task.mean, task.std))
    batches = []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH_SIZE):
            pixels_NSS3 = torch.from_numpy(images[start : start + BATCH_SIZE])
            normalised_N3SS = (pixels_NSS3.permute(0, 3, 1, 2).to(dtype) / 255 - mean) / std
            batches.append(network_copy(normalised_N3SS).numpy())
    logits_NC = np.concatenate(batches)
    if not np.isfinite(logits_NC).all():
        first = int(np.argmin(np.isfinite(logits_NC).all(axis=1)))
        raise RunError(f"the network gives logits that are not finite (image {first}); train it again.")
    return logits_NC


def spread_over_groups(labels_N: NDArray[np.int64], groups: ClassGroups, per_group: int) -> NDArray[np.int64]:
    """Choose positions of up to ``per_group`` images of each group, spread evenly over its classes; deterministic."""
    by_class_N = np.argsort(labels_N, kind="stable")
    chosen = []
    for group in range(len(groups.names)):
        members = by_class_N[groups.index[labels_N[by_class_N]] == group]
        steps = np.linspace(0, len(members), min(per_group, len(members)), endpoint=False).astype(np.int64)
        chosen.append(members[steps])
    return np.concatenate(chosen)
