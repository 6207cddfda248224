"""The most that one core can do: decode and run in one process, without HTTP.

    python -m benchmarks.ceiling MODEL SIZE_PX SECONDS IMAGE...

prints JSON: of every batch size, images a second; the same again of the best of them, because the highest of several
noisy figures is too high; and with arrivals at 80 % of that, how late the loop is.
The loop is what a service would have to do for each image if requests cost nothing: decode them one by one, stack them,
run the session.
"""

import bisect
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before it is imported

import numpy as np
import onnxruntime as ort

from benchmarks.load import poisson, quantile_of, uniform
from ltkd.contract.image_decoding import decode_image

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
SHARE = 0.8


def images_per_s(session: ort.InferenceSession, files: list[bytes], size_px: int, batch: int, seconds: float) -> float:
    """Decode and run batches for some seconds, after one that warms up."""
    done = 0
    begin = time.perf_counter()
    while done <= batch or time.perf_counter() - begin < seconds:
        if done == batch:
            begin = time.perf_counter()
        run(session, files, size_px, done, batch)
        done += batch
    return (done - batch) / (time.perf_counter() - begin)


def lateness(
    session: ort.InferenceSession, files: list[bytes], size_px: int, due_s: Sequence[float], seconds_alone: float
) -> float:
    """The p99 of latency from the due times, over what an image takes alone, in the best loop there can be.

    It takes all that is due, up to the largest batch, and need not wake up: it never sleeps.
    """
    late_s: list[float] = []
    begin = time.perf_counter()
    while len(late_s) < len(due_s):
        num_due = bisect.bisect_right(due_s, time.perf_counter() - begin) - len(late_s)
        if num_due == 0:
            continue
        batch = min(num_due, max(BATCH_SIZES))
        run(session, files, size_px, len(late_s), batch)
        now_s = time.perf_counter() - begin
        late_s += [now_s - due for due in due_s[len(late_s) : len(late_s) + batch]]
    return quantile_of(late_s, 0.99) / seconds_alone


def run(session: ort.InferenceSession, files: list[bytes], size_px: int, first: int, batch: int) -> None:
    """Decode a batch and run it."""
    chosen = [files[(first + number) % len(files)] for number in range(batch)]
    pixels_NSS3 = np.stack([decode_image(content, size_px).pixels_SS3 for content in chosen])
    session.run(["logits"], {"image": pixels_NSS3})


def main() -> None:
    """Measure every batch size, and how late answers are at 80 % of the best."""
    model, size_px, seconds, *images = sys.argv[1:]
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    files = [Path(image).read_bytes() for image in images]
    found = {size: images_per_s(session, files, int(size_px), size, float(seconds)) for size in BATCH_SIZES}
    best = images_per_s(session, files, int(size_px), max(found, key=found.__getitem__), 2 * float(seconds))
    rate, open_s = SHARE * best, 2 * float(seconds)
    late = {
        arrivals: lateness(session, files, int(size_px), due_s, 1 / found[1])
        for arrivals, due_s in {"even": uniform(rate, open_s), "poisson": poisson(rate, open_s)}.items()
    }
    print(json.dumps({"images_per_s": found, "best": best, "p99_over_alone": late}))


if __name__ == "__main__":
    main()
