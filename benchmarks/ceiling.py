"""The most that one core can do: decode and run in one process, without HTTP.

    python -m benchmarks.ceiling MODEL SIZE_PX SECONDS IMAGE...

prints JSON: of every batch size, images a second. The loop is what a service would have to do for each image if
requests cost nothing: decode them one by one, stack them, run the session.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before it is imported

import numpy as np
import onnxruntime as ort

from ltkd.images import decode_image

BATCH_SIZES = (1, 2, 4, 8, 16, 32)


def images_per_s(session: ort.InferenceSession, files: list[bytes], size_px: int, batch: int, seconds: float) -> float:
    """Decode and run batches for some seconds, after one that warms up."""
    done = 0
    begin = time.perf_counter()
    while done <= batch or time.perf_counter() - begin < seconds:
        if done == batch:
            begin = time.perf_counter()
        chosen = [files[(done + number) % len(files)] for number in range(batch)]
        pixels_NSS3 = np.stack([decode_image(content, size_px).pixels_SS3 for content in chosen])
        session.run(["logits"], {"image": pixels_NSS3})
        done += batch
    return (done - batch) / (time.perf_counter() - begin)


def main() -> None:
    """Measure every batch size."""
    model, size_px, seconds, *images = sys.argv[1:]
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    files = [Path(image).read_bytes() for image in images]
    found = {size: images_per_s(session, files, int(size_px), size, float(seconds)) for size in BATCH_SIZES}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
