"""Measure the activations of a network and compute the range that an 8-bit integer should cover for each.

An activation is the output tensor of a layer. int8 calls this module on the calibration images; int8_graph turns the
ranges into scales and zero points.

Shape legend: N images, S side in pixels, B bins.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from export.conversion.session import INPUT, open_session
from ltkd.data.image_files import Images

LEVELS = 255
PERCENTILE = 0.9999
_BINS = 1 << 16
_BATCH_SIZE, _BATCH_PIXELS = 64, 200_000

Range = tuple[float, float]


@dataclass(frozen=True)
class ActivationHistogram:
    """Histogram of the values of one activation on the calibration images.

    Attributes:
        lowest: The lowest value.
        highest: The highest value.
        value_B: The centre of each non-empty bin, ascending.
        count_B: The number of values in each bin.
    """

    lowest: float
    highest: float
    value_B: NDArray[np.float64]
    count_B: NDArray[np.int64]


def activation_histograms(fp32: bytes, activations: Collection[str], images: Images) -> dict[str, ActivationHistogram]:
    """Run a model and build the histograms of some of its activations.

    The bins are the upper 16 bits of a float32. Each bin is at most 1/128 of its value wide, and no range has to be
    known beforehand, so one pass over the images is enough.

    Args:
        fp32: The ONNX file.
        activations: Names of float32 tensors in the file.
        images: A representative sample of the network's inputs.
    """
    if not activations:
        return {}
    model = onnx.load_model_from_string(fp32)
    outputs = {output.name for output in model.graph.output}
    names = sorted(activations)
    model.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names if name not in outputs
    )
    session = open_session(model.SerializeToString())
    counts_B = {name: np.zeros(_BINS, np.int64) for name in names}
    ends = dict.fromkeys(names, (np.inf, -np.inf))
    size_px = images[:1].shape[1]
    step = max(1, min(_BATCH_SIZE, _BATCH_PIXELS // size_px**2))
    for start in range(0, len(images), step):
        for name, values in zip(names, session.run(names, {INPUT: images[start : start + step]}), strict=True):
            upper = (values.ravel().view(np.uint32) >> 16).astype(np.intp)
            counts_B[name] += np.bincount(upper, minlength=_BINS)
            ends[name] = min(ends[name][0], float(values.min())), max(ends[name][1], float(values.max()))
    return {name: _to_histogram(*ends[name], counts_B[name]) for name in names}


def full_range(histogram: ActivationHistogram) -> Range:
    """Return the range of all values."""
    return histogram.lowest, histogram.highest


def percentile(histogram: ActivationHistogram) -> Range:
    """Return the range of the values without the outermost 0.01 % at either end."""
    share_B = np.cumsum(histogram.count_B) / histogram.count_B.sum()
    low, high = np.searchsorted(share_B, [1 - PERCENTILE, PERCENTILE])
    return float(histogram.value_B[low]), float(histogram.value_B[high])


def least_squares(histogram: ActivationHistogram) -> Range:
    """Return the part of the full range for which rounding and clipping together give the least mean square error."""
    ends = [(share * histogram.lowest, share * histogram.highest) for share in np.geomspace(0.1, 1, 60)]
    return min(ends, key=lambda end: _mean_square_error(histogram, end))


RULES: dict[str, Callable[[ActivationHistogram], Range]] = {
    "minmax": full_range,
    f"percentile {100 * PERCENTILE:g}": percentile,
    "least squares": least_squares,
}
"""Functions that compute a range from a histogram, by their name in reports."""


def scale_of(ends: Range) -> tuple[np.float32, np.uint8]:
    """Compute the scale and the zero point of unsigned 8-bit integers for a range, extended to include zero."""
    lowest, highest = min(ends[0], 0.0), max(ends[1], 0.0)
    scale = np.float32((highest - lowest) / LEVELS) or np.float32(1)
    return scale, np.uint8(np.clip(np.rint(-lowest / scale), 0, LEVELS))


def _mean_square_error(histogram: ActivationHistogram, ends: Range) -> float:
    scale, zero = float(scale_of(ends)[0]), float(scale_of(ends)[1])
    stored_B = np.clip(np.rint(histogram.value_B / scale) + zero, 0, LEVELS)
    error_B = (stored_B - zero) * scale - histogram.value_B
    return float((error_B**2 * histogram.count_B).sum())


def _to_histogram(lowest: float, highest: float, count_B: NDArray[np.int64]) -> ActivationHistogram:
    (upper_B,) = np.nonzero(count_B)
    low_half = np.where(
        upper_B << 16 & 0x7FFFFFFF == 0, 0, 0x8000
    )  # the bin of zero holds only zero, so it has no centre
    value_B = ((upper_B << 16) | low_half).astype(np.uint32).view(np.float32).astype(np.float64)
    order_B = np.argsort(value_B, kind="stable")
    return ActivationHistogram(lowest, highest, value_B[order_B], count_B[upper_B[order_B]])
