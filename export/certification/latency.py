"""Measure the latency of several models in turn, so that other load on the machine affects all of them equally.

Shape legend: N images, B in the batch, S side in pixels.
"""

import time
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from export.conversion.session import INPUT, OUTPUT
from export.schema import Latency
from ltkd.data.image_files import Images

BATCHES = (1, 32)
MOST_REPEATS, LEAST_REPEATS = 50, 3
SECONDS = 2.0

Name = TypeVar("Name", bound=str)


def measure(
    sessions: Mapping[Name, InferenceSession], images: Images, seconds: float = SECONDS
) -> dict[Name, tuple[Latency, ...]]:
    """Time every model on batches of 1 and of 32 images, in rounds in which each model runs once.

    Args:
        sessions: Sessions by name of the model.
        images: At least one real image. Images are repeated if there are fewer than a batch needs.
        seconds: Time limit for each batch size, after one warm-up round. At least three rounds are timed even if they
            take longer.
    """
    first_NSS3 = images[: max(BATCHES)]
    times: dict[Name, list[Latency]] = {name: [] for name in sessions}
    for batch in BATCHES:
        images_BSS3 = np.resize(first_NSS3, (batch, *first_NSS3.shape[1:]))
        rounds = [_round(sessions, images_BSS3)]
        end = time.perf_counter() + seconds
        while len(rounds) <= LEAST_REPEATS or (len(rounds) <= MOST_REPEATS and time.perf_counter() < end):
            rounds.append(_round(sessions, images_BSS3))
        for name, latencies in times.items():
            low, median, high = np.percentile([times_ms[name] for times_ms in rounds[1:]], (25, 50, 75)).tolist()
            latencies.append(Latency(batch=batch, median_ms=median, low_ms=low, high_ms=high))
    return {name: tuple(latencies) for name, latencies in times.items()}


def _round(sessions: Mapping[Name, InferenceSession], images_BSS3: NDArray[np.uint8]) -> dict[Name, float]:
    """Run each model once and return the times in milliseconds."""
    times_ms = {}
    for name, session in sessions.items():
        start = time.perf_counter()
        session.run([OUTPUT], {INPUT: images_BSS3})
        times_ms[name] = 1000 * (time.perf_counter() - start)
    return times_ms
