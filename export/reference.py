"""The network itself, as torch runs it: what a candidate is held against.

Shape legend: N images, S side in pixels, C classes.
"""

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ltkd.errors import RunError
from ltkd.files import Images
from ltkd.task import Task

BATCH_SIZE = 256


def torch_logits(network: nn.Module, task: Task, images: Images, dtype: torch.dtype) -> NDArray[np.floating]:
    """Logits [N, C] of the network in evaluation mode, computed in ``dtype`` on the CPU.

    The pixels are normalised here step by step, so that an error in the exported graph's folded form shows.

    Raises:
        RunError: A logit is not finite.
    """
    judge = copy.deepcopy(network).cpu().to(dtype).eval()
    mean, std = (torch.tensor(values, dtype=dtype).view(1, 3, 1, 1) for values in (task.mean, task.std))
    batches = []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH_SIZE):
            pixels_NSS3 = torch.from_numpy(images[start : start + BATCH_SIZE])
            normalised_N3SS = (pixels_NSS3.permute(0, 3, 1, 2).to(dtype) / 255 - mean) / std
            batches.append(judge(normalised_N3SS).numpy())
    logits_NC = np.concatenate(batches)
    if not np.isfinite(logits_NC).all():
        first = int(np.argmin(np.isfinite(logits_NC).all(axis=1)))
        raise RunError(f"the network gives logits that are not finite (image {first}); train it again.")
    return logits_NC
