"""The upper limit of one core: decode images and run the model in one process, without HTTP.

    python -m benchmarks.ceiling MODEL SIZE_PX SECONDS IMAGE...

Prints JSON with the images per second for every batch size. The best batch size is measured a second time, because the
maximum of several noisy values is biased upwards. The JSON also has the latency with arrivals at 80 % of that speed.
The loop does what a service must do for each image if requests cost nothing: decode the images one by one, stack them,
run the session. benchmarks/serving.py compares the service with it.
"""

import bisect
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # must be set before the import of onnxruntime

import numpy as np
import onnxruntime as ort

from benchmarks.load import poisson, quantile_of, uniform
from ltkd.contract.image_decoding import decode_image
from ltkd.contract.preprocessing import Preprocessing

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
SHARE = 0.8


def images_per_s(session: ort.InferenceSession, files: list[bytes], size_px: int, batch: int, seconds: float) -> float:
    """Decode and run batches for some seconds, after one batch of warm-up."""
    num_images = 0
    begin = time.perf_counter()
    while num_images <= batch or time.perf_counter() - begin < seconds:
        if num_images == batch:
            begin = time.perf_counter()
        decode_and_run(session, files, size_px, num_images, batch)
        num_images += batch
    return (num_images - batch) / (time.perf_counter() - begin)


def p99_ratio(
    session: ort.InferenceSession, files: list[bytes], size_px: int, due_s: Sequence[float], single_image_s: float
) -> float:
    """The p99 of the latency from the due times, divided by the time for a single image.

    The loop takes all images that are due, up to the largest batch. It never sleeps, so it has no wake-up delay.
    """
    latencies_s: list[float] = []
    begin = time.perf_counter()
    while len(latencies_s) < len(due_s):
        num_due = bisect.bisect_right(due_s, time.perf_counter() - begin) - len(latencies_s)
        if num_due == 0:
            continue
        batch = min(num_due, max(BATCH_SIZES))
        decode_and_run(session, files, size_px, len(latencies_s), batch)
        now_s = time.perf_counter() - begin
        latencies_s += [now_s - due for due in due_s[len(latencies_s) : len(latencies_s) + batch]]
    return quantile_of(latencies_s, 0.99) / single_image_s


def decode_and_run(session: ort.InferenceSession, files: list[bytes], size_px: int, first: int, batch: int) -> None:
    """Decode a batch and run the model on it."""
    contents = [files[(first + number) % len(files)] for number in range(batch)]
    pixels_NSS3 = np.stack([decode_image(content, Preprocessing(input_px=size_px)).pixels_SS3 for content in contents])
    session.run(["logits"], {"image": pixels_NSS3})


def main() -> None:
    """Measure every batch size, and the latency at 80 % of the best."""
    model, size_px, seconds, *images = sys.argv[1:]
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    files = [Path(image).read_bytes() for image in images]
    by_size = {size: images_per_s(session, files, int(size_px), size, float(seconds)) for size in BATCH_SIZES}
    best = images_per_s(session, files, int(size_px), max(by_size, key=by_size.__getitem__), 2 * float(seconds))
    rate, open_s = SHARE * best, 2 * float(seconds)
    p99_ratios = {
        arrivals: p99_ratio(session, files, int(size_px), due_s, 1 / by_size[1])
        for arrivals, due_s in {"even": uniform(rate, open_s), "poisson": poisson(rate, open_s)}.items()
    }
    print(json.dumps({"images_per_s": by_size, "best": best, "p99_over_alone": p99_ratios}))


if __name__ == "__main__":
    main()
