"""What every peer serves: the same model file in the same runtime, the same pixels, one answer.

A peer is a process that gets its orders from variables, because most of them start processes of their own:

    PEER_MODEL      the ONNX file: uint8 [N, S, S, 3] to float32 logits [N, C]
    PEER_SIZE_PX    S
    PEER_PORT       where it listens on this machine
    PEER_MAX_BATCH  images in one run of the session
    PEER_WAIT_MS    how long a batch that is not full waits for more

Batch and wait of each peer are those with which it did best here (benchmarks/serving.py has them). Each takes the bytes
of one image as the body of a POST and answers with the JSON of ``answers``. One thread: the peers get one core.
"""

import os
from collections.abc import Sequence

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before it is imported

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ltkd.contract.image_decoding import decode_image

SIZE_PX, PORT = int(os.environ["PEER_SIZE_PX"]), int(os.environ["PEER_PORT"])
MAX_BATCH, WAIT_MS = int(os.environ["PEER_MAX_BATCH"]), float(os.environ["PEER_WAIT_MS"])
TOP_K = 5

Ranked = dict[str, int | float]
Answer = dict[str, list[Ranked]]


def open_session() -> ort.InferenceSession:
    """The session, with the options that our own engine has."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(os.environ["PEER_MODEL"], options, providers=["CPUExecutionProvider"])
    for size in (1, MAX_BATCH):
        session.run(["logits"], {"image": np.zeros((size, SIZE_PX, SIZE_PX, 3), np.uint8)})
    return session


def decoded(content: bytes) -> NDArray[np.uint8]:
    """The pixels of an image, uint8 [S, S, 3], by the decoder that training and parity share."""
    return decode_image(content, SIZE_PX).pixels_SS3


def answers(session: ort.InferenceSession, images: Sequence[NDArray[np.uint8]]) -> list[Answer]:
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
