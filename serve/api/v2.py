"""The Open Inference Protocol, version 2, over HTTP: what clients of Triton and KServe speak.

With the binary tensor data, classification and model configuration extensions, and the index of the model repository
extension. Tensors are read and written in serve/api/v2_tensors.py; here are the routes.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np
from fastapi import APIRouter, Depends, Header, Request, Response, params
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from numpy.typing import NDArray
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from ltkd.contract.bundle import Manifest
from serve.api.openapi import INFER_BODY, INFER_RESPONSES, problem_responses
from serve.api.v2_metadata import (
    IndexEntry,
    Live,
    ModelConfig,
    ModelMetadata,
    ModelReady,
    ServerMetadata,
    ServerReady,
    config_of,
    metadata_of,
)
from serve.api.v2_tensors import InferRequest, build_response, parse_request
from serve.engine.messages import OutputKind
from serve.http.bodies import JSON, BodyLimits, read_whole
from serve.http.middleware import problem_response, validation_problem
from serve.pool.engine_process import RequestResult
from serve.problems import Content, Problem, ProblemError, problem_of

JSON_LENGTH = "Inference-Header-Content-Length"
_TAG = "Open Inference Protocol"
_UNLOCKED = problem_responses(400, 401, media_type=JSON)
Named = tuple[str, str | None]
"""The name of a model and, if one is asked for, its version."""


class Engine(Protocol):
    """What the protocol needs of an engine process."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""

    async def ask(self, contents: Sequence[Content], wanted: OutputKind, top_k: int, deadline: float) -> RequestResult:
        """What ``wanted`` says of images; ``deadline`` on the clock of ``time.monotonic``.

        Raises:
            ProblemError: There is no answer.
        """


class Key(Protocol):
    """By what a model version is found."""

    @property
    def name(self) -> str:
        """Of the model."""

    @property
    def version(self) -> str:
        """Of the model, too."""


class Servable(Protocol):
    """A model version that is served."""

    @property
    def key(self) -> Key:
        """Its name and version."""

    @property
    def worker(self) -> Engine:
        """What answers."""

    def held(self) -> AbstractContextManager[None]:
        """Keep it answering, whatever a reload does."""


Servable_co = TypeVar("Servable_co", bound=Servable, covariant=True)


class RepositoryProtocol(Protocol[Servable_co]):
    """The models that are served."""

    def find(self, name: str | None = None, version: str | None = None) -> Servable_co:
        """One model; the newest version where none is named.

        Raises:
            ProblemError: There is no such model.
        """

    def all(self) -> Sequence[Servable_co]:
        """Every version of every model."""


class InferenceLimits(BodyLimits, Protocol):
    """What the settings say of inference requests."""

    @property
    def timeout_seconds(self) -> float:
        """A request that is not answered within this time gets 504; it may ask for less."""


class ProtocolRoute(APIRoute):
    """A route whose problems are called ``application/json``: clients of the protocol look for no other type."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, with the problems that it raises answered here."""
        handle = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                return await handle(request)
            except ProblemError as error:
                return problem_response(error.problem, error.headers, JSON)
            except RequestValidationError as error:
                return problem_response(validation_problem(error), media_type=JSON)

        return answered


def open_inference(
    catalogue: RepositoryProtocol[Servable_co],
    limits: InferenceLimits,
    require_ready: Callable[[], None],
    require_accepting: Callable[[], None],
    note: Callable[[Request, Servable_co, RequestResult], None],
    guards: Sequence[params.Depends] = (),
) -> APIRouter:
    """The routes of the protocol.

    Args:
        catalogue: The models that are served.
        limits: Of bodies and of time.
        require_ready: Raises a ProblemError unless load balancers should send requests here.
        require_accepting: Raises a ProblemError when no requests are taken.
        note: Told of every answer.
        guards: Dependencies of every route but the two probes; they raise a ProblemError for who is not let in.
    """
    whole = APIRouter(tags=[_TAG], route_class=ProtocolRoute)
    router = APIRouter(prefix="/v2", route_class=ProtocolRoute, dependencies=guards)

    @whole.get("/v2/health/live", summary="Whether the process answers")
    async def live() -> Live:
        return Live()

    @whole.get(
        "/v2/health/ready", summary="Whether requests are taken", responses=problem_responses(503, media_type=JSON)
    )
    async def ready() -> ServerReady:
        require_ready()
        return ServerReady()

    @router.get("", summary="The server and its extensions", responses=_UNLOCKED)
    async def server_metadata() -> ServerMetadata:
        return ServerMetadata()

    @router.post("/repository/index", summary="Every version of every model", responses=_UNLOCKED)
    async def index() -> list[IndexEntry]:
        return [IndexEntry(name=one.key.name, version=one.key.version) for one in catalogue.all()]

    async def newest(model: str) -> Named:
        return model, None

    async def versioned(model: str, version: str) -> Named:
        return model, version

    for path, named in (("/models/{model}", newest), ("/models/{model}/versions/{version}", versioned)):
        _describe(router, path, named, catalogue, limits)
        _infer(router, path, named, catalogue, limits, require_accepting, note)
    whole.include_router(router)
    return whole


def _describe(
    router: APIRouter,
    path: str,
    named: Callable[..., Awaitable[Named]],
    catalogue: RepositoryProtocol[Servable_co],
    limits: InferenceLimits,
) -> None:
    unknown = problem_responses(400, 401, 404, 503, media_type=JSON)

    @router.get(path, summary="What a model takes and gives", responses=unknown)
    async def model_metadata(key: Annotated[Named, Depends(named)]) -> ModelMetadata:
        served = catalogue.find(*key)
        name = served.key.name
        versions = tuple(one.key.version for one in catalogue.all() if one.key.name == name)
        return metadata_of(served.worker.manifest.task, name, versions)

    @router.get(f"{path}/ready", summary="Whether a model takes requests", responses=unknown)
    async def model_ready(key: Annotated[Named, Depends(named)]) -> ModelReady:
        return ModelReady(name=catalogue.find(*key).key.name)

    @router.get(f"{path}/config", summary="A model in Triton's words", responses=unknown)
    async def model_config(key: Annotated[Named, Depends(named)]) -> ModelConfig:
        served = catalogue.find(*key)
        return config_of(served.worker.manifest.task, served.key.name, limits.max_images)


def _infer(
    router: APIRouter,
    path: str,
    named: Callable[..., Awaitable[Named]],
    catalogue: RepositoryProtocol[Servable_co],
    limits: InferenceLimits,
    require_accepting: Callable[[], None],
    note: Callable[[Request, Servable_co, RequestResult], None],
) -> None:
    one_at_a_time = asyncio.Lock()  # a tensor in JSON takes some thirty times its size while it is read

    @router.post(
        f"{path}/infer",
        summary="Logits, or the best classes, of one image or many",
        openapi_extra=INFER_BODY,
        response_class=Response,
        responses=INFER_RESPONSES
        | problem_responses(400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504, media_type=JSON),
    )
    async def infer(
        request: Request,
        key: Annotated[Named, Depends(named)],
        json_bytes: Annotated[
            Annotated[int, Field(ge=0)] | SkipJsonSchema[None],
            Header(alias=JSON_LENGTH, description="How much of the body is JSON, if not all of it"),
        ] = None,
    ) -> Response:
        require_accepting()
        served = catalogue.find(*key)
        with served.held():
            task = served.worker.manifest.task
            body = await read_whole(request, limits)
            async with one_at_a_time:
                asked = await asyncio.to_thread(parse_request, body, json_bytes, task, limits.max_images)
            classified = await _ask(served.worker, asked, limits.timeout_seconds)
        logits_NC = _logits(classified.results)
        note(request, served, classified)
        written = build_response(asked, logits_NC, task, served.key.name, served.key.version)
        if written.json_bytes is None:
            return Response(written.body, media_type=JSON)
        headers = {JSON_LENGTH: str(written.json_bytes)}
        return Response(written.body, headers=headers, media_type="application/octet-stream")


async def _ask(engine: Engine, asked: InferRequest, timeout_seconds: float) -> RequestResult:
    """What became of the images of a request."""
    seconds = timeout_seconds if asked.timeout_seconds is None else min(timeout_seconds, asked.timeout_seconds)
    deadline = time.monotonic() + seconds
    if isinstance(asked.images, np.ndarray):
        pixels = [pixels_SS3.tobytes() for pixels_SS3 in asked.images]
        return await engine.ask(pixels, OutputKind.LOGITS_OF_PIXELS, 1, deadline)
    return await engine.ask(asked.images, OutputKind.LOGITS, 1, deadline)


def _logits(results: Sequence[bytes | Problem]) -> NDArray[np.float32]:
    """Logits, float32 [N, C]; the protocol has no place for an image that failed among others."""
    rows = []
    for number, logits_C in enumerate(results, 1):
        if isinstance(logits_C, Problem):
            where = f"image {number} of {len(results)}: " if len(results) > 1 else ""
            raise ProblemError(problem_of(logits_C.status, where + logits_C.detail))
        rows.append(np.frombuffer(logits_C, np.float32))
    return np.stack(rows)
