"""How far the values of a network's maps reach, and which part of that an 8-bit integer should cover.

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
    """The values of one map on the calibration images.

    Attributes:
        lowest: The lowest of them.
        highest: The highest of them.
        value_B: The middle of every bin that is not empty, ascending.
        count_B: How many values lie in it.
    """

    lowest: float
    highest: float
    value_B: NDArray[np.float64]
    count_B: NDArray[np.int64]


def activation_histograms(fp32: bytes, maps: Collection[str], images: Images) -> dict[str, ActivationHistogram]:
    """Run a model and count the values of some of its maps.

    The bins are the upper 16 bits of a float32, so that one pass over the images is enough: a bin is as wide as 1/128
    of its value or less, and no range has to be known beforehand.

    Args:
        fp32: The ONNX file.
        maps: Names of float32 tensors in it.
        images: Which stand for all that the network will see.
    """
    if not maps:
        return {}
    model = onnx.load_model_from_string(fp32)
    given = {output.name for output in model.graph.output}
    names = sorted(maps)
    model.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names if name not in given
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
    return {name: _spread(*ends[name], counts_B[name]) for name in names}


def whole(spread: ActivationHistogram) -> Range:
    """Everything that was seen."""
    return spread.lowest, spread.highest


def percentile(spread: ActivationHistogram) -> Range:
    """Everything but the outermost 0.01 % at either end."""
    share_B = np.cumsum(spread.count_B) / spread.count_B.sum()
    low, high = np.searchsorted(share_B, [1 - PERCENTILE, PERCENTILE])
    return float(spread.value_B[low]), float(spread.value_B[high])


def least_squares(spread: ActivationHistogram) -> Range:
    """The part of the whole for which rounding and cutting off together make the least mean square error."""
    ends = [(share * spread.lowest, share * spread.highest) for share in np.geomspace(0.1, 1, 60)]
    return min(ends, key=lambda end: _mean_square_error(spread, end))


RULES: dict[str, Callable[[ActivationHistogram], Range]] = {
    "minmax": whole,
    f"percentile {100 * PERCENTILE:g}": percentile,
    "least squares": least_squares,
}
"""How a range is taken from what was seen, by the name that reports give it."""


def scale_of(ends: Range) -> tuple[np.float32, np.uint8]:
    """Step and zero point of the unsigned 8-bit integers that cover a range, which is made to hold zero."""
    lowest, highest = min(ends[0], 0.0), max(ends[1], 0.0)
    scale = np.float32((highest - lowest) / LEVELS) or np.float32(1)
    return scale, np.uint8(np.clip(np.rint(-lowest / scale), 0, LEVELS))


def _mean_square_error(spread: ActivationHistogram, ends: Range) -> float:
    scale, zero = float(scale_of(ends)[0]), float(scale_of(ends)[1])
    stored_B = np.clip(np.rint(spread.value_B / scale) + zero, 0, LEVELS)
    error_B = (stored_B - zero) * scale - spread.value_B
    return float((error_B**2 * spread.count_B).sum())


def _spread(lowest: float, highest: float, count_B: NDArray[np.int64]) -> ActivationHistogram:
    (upper_B,) = np.nonzero(count_B)
    low_half = np.where(upper_B << 16 & 0x7FFFFFFF == 0, 0, 0x8000)  # zero itself is no middle of a bin
    value_B = ((upper_B << 16) | low_half).astype(np.uint32).view(np.float32).astype(np.float64)
    order_B = np.argsort(value_B, kind="stable")
    return ActivationHistogram(lowest, highest, value_B[order_B], count_B[upper_B[order_B]])
