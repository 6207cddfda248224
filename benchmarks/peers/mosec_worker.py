"""mosec: HTTP server in Rust, and one Python worker that decodes and runs batches."""

import sys

from mosec import Server, Worker

from benchmarks.peers.model import MAX_BATCH, PORT, WAIT_MS, ClassifyResponse, classify_batch, decode, open_session


class Classify(Worker):
    """The worker."""

    def __init__(self) -> None:
        super().__init__()
        self.session = open_session()

    def deserialize(self, data: bytes) -> bytes:
        return bytes(data)

    def forward(self, data: list[bytes] | bytes) -> list[ClassifyResponse] | ClassifyResponse:
        """With a batch size of 1, mosec passes a single image instead of a list."""
        if isinstance(data, list):
            return classify_batch(self.session, [decode(content) for content in data])
        return classify_batch(self.session, [decode(data)])[0]


if __name__ == "__main__":
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", str(PORT), "--timeout", "60000", "--log-level", "warning"]
    server = Server()
    server.append_worker(Classify, num=1, max_batch_size=MAX_BATCH, max_wait_time=round(WAIT_MS), route="/classify")
    server.run()
