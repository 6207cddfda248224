"""LitServe: batching in its inference process, requests through its fast queue."""

from typing import Annotated

import litserve
import numpy as np
from fastapi import Body
from numpy.typing import NDArray

from benchmarks.peers.model import MAX_BATCH, PORT, WAIT_MS, ClassifyResponse, classify_batch, decode, open_session


class Classify(litserve.LitAPI):
    """The API; it reads the raw body, which is cheaper for LitServe than a form."""

    def setup(self, device: str) -> None:
        self.session = open_session()

    def decode_request(self, request: Annotated[bytes, Body(media_type="image/*")]) -> NDArray[np.uint8]:
        return decode(request)

    def batch(self, inputs: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        return inputs

    def predict(self, inputs: list[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[ClassifyResponse] | ClassifyResponse:
        """With a batch size of 1, LitServe passes a single image instead of a list."""
        return (
            classify_batch(self.session, inputs)
            if isinstance(inputs, list)
            else classify_batch(self.session, [inputs])[0]
        )

    def unbatch(self, output: list[ClassifyResponse]) -> list[ClassifyResponse]:
        return output

    def encode_response(self, output: ClassifyResponse) -> ClassifyResponse:
        return output


if __name__ == "__main__":
    api = Classify(max_batch_size=MAX_BATCH, batch_timeout=WAIT_MS / 1000, api_path="/classify")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(
        host="127.0.0.1",
        port=PORT,
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
        access_log=False,
    )
