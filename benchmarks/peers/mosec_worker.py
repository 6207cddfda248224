"""mosec: its HTTP front in Rust, one Python worker that decodes and runs batches."""

import sys

from mosec import Server, Worker

from benchmarks.peers.model import MAX_BATCH, PORT, WAIT_MS, Answer, answers, decoded, open_session


class Classify(Worker):
    """The worker."""

    def __init__(self) -> None:
        super().__init__()
        self.session = open_session()

    def deserialize(self, data: bytes) -> bytes:
        return bytes(data)

    def forward(self, data: list[bytes] | bytes) -> list[Answer] | Answer:
        """With a batch size of 1 there are no lists."""
        if isinstance(data, list):
            return answers(self.session, [decoded(content) for content in data])
        return answers(self.session, [decoded(data)])[0]


if __name__ == "__main__":
    sys.argv[1:] = ["--address", "127.0.0.1", "--port", str(PORT), "--timeout", "60000", "--log-level", "warning"]
    server = Server()
    server.append_worker(Classify, num=1, max_batch_size=MAX_BATCH, max_wait_time=round(WAIT_MS), route="/classify")
    server.run()
