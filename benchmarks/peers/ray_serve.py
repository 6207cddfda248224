"""Ray Serve: one replica that batches requests, behind the Ray proxy."""

import time

import ray
from ray import serve
from starlette.requests import Request

from benchmarks.peers.model import MAX_BATCH, PORT, WAIT_MS, ClassifyResponse, classify_batch, decode, open_session


@serve.deployment(num_replicas=1, max_ongoing_requests=128, ray_actor_options={"num_cpus": 0})
class Classify:
    """The replica."""

    def __init__(self) -> None:
        self.session = open_session()

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=WAIT_MS / 1000)
    async def classify(self, contents: list[bytes]) -> list[ClassifyResponse]:
        """Classify a batch."""
        return classify_batch(self.session, [decode(content) for content in contents])

    async def __call__(self, request: Request) -> ClassifyResponse:
        response: ClassifyResponse = await self.classify(await request.body())
        return response


if __name__ == "__main__":
    ray.init(include_dashboard=False, num_cpus=1, logging_level="warning", object_store_memory=100 * 2**20)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT}, logging_config={"enable_access_log": False})
    serve.run(Classify.bind(), route_prefix="/classify")
    while True:
        time.sleep(60)
