"""BentoML: a batching API in one worker. BentoML expects a list per request, so the raw body becomes a list of one."""

from typing import Annotated

import bentoml
from pydantic import BeforeValidator, WithJsonSchema

from benchmarks.peers.model import MAX_BATCH, WAIT_MS, ClassifyResponse, classify_batch, decode, open_session

Bodies = Annotated[list[bytes], BeforeValidator(lambda body: [body]), WithJsonSchema({"type": "string"})]


@bentoml.service(
    workers=1, threads=1, traffic={"timeout": 60}, metrics={"enabled": False}, logging={"access": {"enabled": False}}
)
class Classify:
    """The service."""

    def __init__(self) -> None:
        self.session = open_session()

    @bentoml.api(route="/classify", batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=round(WAIT_MS))
    def classify(self, images: Bodies, /) -> list[ClassifyResponse]:
        """Classify a batch."""
        return classify_batch(self.session, [decode(content) for content in images])
