"""What all peers share: the same model file, runtime, decoding library and response format.

A peer is configured by environment variables, because most peers start their own processes:

    PEER_MODEL      the ONNX file: uint8 [N, S, S, 3] to float32 logits [N, C]
    PEER_SIZE_PX    S
    PEER_PORT       the port on localhost
    PEER_MAX_BATCH  images in one run of the session
    PEER_WAIT_MS    how long an incomplete batch waits for more images

The batch size and the delay of each peer are those with which it was fastest here (see benchmarks/servers.py). Each
peer receives the bytes of one image as the body of a POST and responds with the JSON of ``classify_batch``. The session
has one thread, because each peer has one core.
"""

import io
import os
from collections.abc import Sequence

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # must be set before the import of onnxruntime

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from PIL import Image, ImageOps

SIZE_PX, PORT = int(os.environ["PEER_SIZE_PX"]), int(os.environ["PEER_PORT"])
MAX_BATCH, WAIT_MS = int(os.environ["PEER_MAX_BATCH"]), float(os.environ["PEER_WAIT_MS"])
TOP_K = 5

Ranked = dict[str, int | float]
ClassifyResponse = dict[str, list[Ranked]]


def open_session() -> ort.InferenceSession:
    """The session, with the same options as the engine of our service."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(os.environ["PEER_MODEL"], options, providers=["CPUExecutionProvider"])
    for size in (1, MAX_BATCH):
        session.run(["logits"], {"image": np.zeros((size, SIZE_PX, SIZE_PX, 3), np.uint8)})
    return session


def decode(content: bytes) -> NDArray[np.uint8]:
    """The pixels of an image, uint8 [S, S, 3], decoded as handlers usually do it: in full, then resized."""
    with Image.open(io.BytesIO(content)) as image:
        rgb = ImageOps.exif_transpose(image).convert("RGB")
        return np.asarray(ImageOps.fit(rgb, (SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR))


def classify_batch(session: ort.InferenceSession, images: Sequence[NDArray[np.uint8]]) -> list[ClassifyResponse]:
    """The five most probable classes of each image."""
    logits_NC = session.run(["logits"], {"image": np.stack(images)})[0]
    powers_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    probability_NC = powers_NC / powers_NC.sum(axis=1, keepdims=True)
    order_NK = np.argsort(-probability_NC, axis=1)[:, :TOP_K]
    ranked_NK = np.take_along_axis(probability_NC, order_NK, axis=1)
    return [
        {"top_k": [{"class_index": index, "probability": share} for index, share in zip(*row, strict=True)]}
        for row in zip(order_NK.tolist(), ranked_NK.tolist(), strict=True)
    ]
