"""The network itself, as torch runs it: what a candidate is held against.

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
    """What candidates are held against: its answers to the certify images, computed once.

    Attributes:
        task: Classes and groups.
        certify: Images that chose nothing.
        logits_NC: The reference's logits of them.
        sample_M: Images of which the exact logits are known.
        copies: What is wrong with the certify images, as gates.copied finds it.
        oracle_MC: Their logits in float64; none where the reference is itself a file.
        onnx: A sound fp32 file of the reference, to find the layer in which a candidate errs; None where there is none.
    """

    task: Task
    certify: LabelledImages
    logits_NC: NDArray[np.floating]
    sample_M: NDArray[np.int64]
    copies: tuple[str, ...]
    oracle_MC: NDArray[np.floating] | None
    onnx: bytes | None


def reference_of(network: nn.Module, task: Task, splits: Splits, fp32: bytes | None) -> Reference:
    """The network's own answers to the certify images.

    Raises:
        RunError: They are not finite.
    """
    certify = splits.certify
    sample_M = spread_over_groups(certify.label_N, task.groups, NUMERIC_IMAGES // len(task.groups.names) or 1)
    others: dict[str, Images] = {name: part.images for name, part in splits.parts.items() if name != "certify"}
    return Reference(
        task=task,
        certify=certify,
        logits_NC=torch_logits(network, task, certify.images, torch.float32),
        sample_M=sample_M,
        copies=find_duplicates(certify.images, splits.num_views, others),
        oracle_MC=torch_logits(network, task, certify.images[sample_M], torch.float64),
        onnx=fp32,
    )


def torch_logits(network: nn.Module, task: Task, images: Images, dtype: torch.dtype) -> NDArray[np.floating]:
    """Logits [N, C] of the network in evaluation mode, computed in ``dtype`` on the CPU.

    The pixels are normalised here step by step, so that an error in the exported graph's folded form shows.

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


def spread_over_groups(label_N: NDArray[np.int64], groups: ClassGroups, per_group: int) -> NDArray[np.int64]:
    """Positions of up to ``per_group`` images of each group, evenly over its classes; the same every time."""
    by_class_N = np.argsort(label_N, kind="stable")
    picked = []
    for group in range(len(groups.names)):
        members = by_class_N[groups.index[label_N[by_class_N]] == group]
        steps = np.linspace(0, len(members), min(per_group, len(members)), endpoint=False).astype(np.int64)
        picked.append(members[steps])
    return np.concatenate(picked)
