"""The routes of /v2: the Open Inference Protocol, version 2, which clients of Triton and KServe use.

The supported extensions are binary tensor data, classification, model configuration and the index of the model
repository extension. serve/api/v2_tensors.py reads and writes the tensors, serve/api/v2_metadata.py describes the
models.
"""

import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Annotated, Any, Protocol, TypeVar

import numpy as np
from fastapi import APIRouter, Depends, Header, Request, Response, params
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from numpy.typing import NDArray
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from ltkd.contract.bundle import Manifest
from serve.api.openapi import INFER_BODY, INFER_RESPONSES, KEY_STATUSES, problem_responses
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
from serve.http.bodies import JSON, BodyLimits, parsed, read_body
from serve.http.middleware import problem_response, validation_problem
from serve.pool.pending_requests import RequestResult
from serve.problems import Content, Problem, ProblemError, make_problem

JSON_LENGTH = "Inference-Header-Content-Length"
_TAG = "Open Inference Protocol"
_UNLOCKED = problem_responses(*KEY_STATUSES, 400, media_type=JSON)
NameAndVersion = tuple[str, str | None]
"""The name of a model and its version; None stands for the highest version."""


class Engine(Protocol):
    """The part of EnginePool that these routes use."""

    @property
    def manifest(self) -> Manifest:
        """The manifest of the bundle."""

    @property
    def alive(self) -> bool:
        """Whether it can answer now."""

    @property
    def reason(self) -> str:
        """Why it cannot answer; empty if it can."""

    async def infer(
        self, contents: Sequence[Content], output: OutputKind, top_k: int, deadline: float
    ) -> RequestResult:
        """Compute the output that ``output`` names for each image; ``deadline`` is a time of ``time.monotonic``.

        Raises:
            ProblemError: The request was rejected or could not be answered.
        """


class Key(Protocol):
    """Identifies a model version."""

    @property
    def name(self) -> str:
        """The name of the model."""

    @property
    def version(self) -> str:
        """The version of the model."""


class Servable(Protocol):
    """A model version that is served."""

    @property
    def key(self) -> Key:
        """Its name and version."""

    @property
    def pool(self) -> Engine:
        """The engine processes of this version."""

    def in_use(self) -> AbstractContextManager[None]:
        """Keep this version running until the block ends, even if a reload replaces it."""


Servable_co = TypeVar("Servable_co", bound=Servable, covariant=True)


class RepositoryProtocol(Protocol[Servable_co]):
    """The models that are served."""

    def find(self, name: str | None = None, version: str | None = None) -> Servable_co:
        """Find a model version; by default the highest.

        Raises:
            ProblemError: There is no such model.
        """

    def all(self) -> Sequence[Servable_co]:
        """Every version of every model."""


class ProtocolRoute(APIRoute):
    """A route that sends problems as ``application/json``: clients of the protocol accept no other media type."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler so that the problems it raises are answered here."""
        handle = super().get_route_handler()

        async def handle_with_problems(request: Request) -> Response:
            try:
                return await handle(request)
            except ProblemError as error:
                return problem_response(error.problem, error.headers, JSON)
            except RequestValidationError as error:
                return problem_response(validation_problem(error), media_type=JSON)

        return handle_with_problems


def open_inference(
    repository: RepositoryProtocol[Servable_co],
    limits: BodyLimits,
    require_ready: Callable[[], None],
    require_accepting: Callable[[], None],
    deadline_of: Callable[[Request], float],
    on_result: Callable[[Request, Servable_co, RequestResult], Sequence[str]],
    guards: Sequence[params.Depends] = (),
) -> APIRouter:
    """Create the routes of the protocol.

    Args:
        repository: The models that are served.
        limits: Limits on bodies.
        require_ready: Raises a ProblemError unless load balancers should send requests here.
        require_accepting: Raises a ProblemError if the service accepts no requests.
        deadline_of: By when a request must be answered, on the clock of ``time.monotonic``.
        on_result: Called with every successful result. Returns the id of each answer, empty for an image without one.
        guards: Dependencies of every route except the two health checks. They raise a ProblemError to reject a request.
    """
    router = APIRouter(tags=[_TAG], route_class=ProtocolRoute)
    guarded = APIRouter(prefix="/v2", route_class=ProtocolRoute, dependencies=guards)

    @router.get("/v2/health/live", summary="Whether the server process is running")
    async def live() -> Live:
        return Live()

    @router.get(
        "/v2/health/ready",
        summary="Whether any model answers",
        responses=problem_responses(503, media_type=JSON),
    )
    async def ready() -> ServerReady:
        require_ready()
        return ServerReady()

    @guarded.get("", summary="The server and its extensions", responses=_UNLOCKED)
    async def server_metadata() -> ServerMetadata:
        return ServerMetadata()

    @guarded.post("/repository/index", summary="Every version of every model", responses=_UNLOCKED)
    async def index() -> list[IndexEntry]:
        return [
            IndexEntry(
                name=served.key.name,
                version=served.key.version,
                state="READY" if served.pool.alive else "UNAVAILABLE",
                reason=served.pool.reason,
            )
            for served in repository.all()
        ]

    async def highest_version(model: str) -> NameAndVersion:
        return model, None

    async def given_version(model: str, version: str) -> NameAndVersion:
        return model, version

    for path, key_of in (("/models/{model}", highest_version), ("/models/{model}/versions/{version}", given_version)):
        _add_model_routes(guarded, path, key_of, repository, limits)
        _add_inference(guarded, path, key_of, repository, limits, require_accepting, deadline_of, on_result)
    router.include_router(guarded)
    return router


def _add_model_routes(
    router: APIRouter,
    path: str,
    key_of: Callable[..., Awaitable[NameAndVersion]],
    repository: RepositoryProtocol[Servable_co],
    limits: BodyLimits,
) -> None:
    unknown = problem_responses(*KEY_STATUSES, 400, 404, 503, media_type=JSON)

    @router.get(path, summary="Inputs and outputs of a model", responses=unknown)
    async def model_metadata(key: Annotated[NameAndVersion, Depends(key_of)]) -> ModelMetadata:
        served = repository.find(*key)
        name = served.key.name
        versions = tuple(each.key.version for each in repository.all() if each.key.name == name)
        return metadata_of(served.pool.manifest.task, name, versions)

    @router.get(f"{path}/ready", summary="Whether a model answers", responses=unknown)
    async def model_ready(key: Annotated[NameAndVersion, Depends(key_of)]) -> ModelReady:
        served = repository.find(*key)
        if not served.pool.alive:
            name, version = served.key.name, served.key.version
            detail = f"model {name} version {version} is not ready ({served.pool.reason}); try again."
            raise ProblemError(make_problem(503, detail), {"Retry-After": "1"})
        return ModelReady(name=served.key.name)

    @router.get(f"{path}/config", summary="The configuration of a model in Triton's format", responses=unknown)
    async def model_config(key: Annotated[NameAndVersion, Depends(key_of)]) -> ModelConfig:
        served = repository.find(*key)
        return config_of(served.pool.manifest.task, served.key.name, limits.max_images)


def _add_inference(
    router: APIRouter,
    path: str,
    key_of: Callable[..., Awaitable[NameAndVersion]],
    repository: RepositoryProtocol[Servable_co],
    limits: BodyLimits,
    require_accepting: Callable[[], None],
    deadline_of: Callable[[Request], float],
    on_result: Callable[[Request, Servable_co, RequestResult], Sequence[str]],
) -> None:

    @router.post(
        f"{path}/infer",
        summary="Compute the logits, or the best classes, of one image or many",
        openapi_extra=INFER_BODY,
        response_class=Response,
        responses=INFER_RESPONSES
        | problem_responses(*KEY_STATUSES, 400, 404, 408, 413, 415, 422, 500, 503, 504, media_type=JSON),
    )
    async def infer(
        request: Request,
        key: Annotated[NameAndVersion, Depends(key_of)],
        json_bytes: Annotated[
            Annotated[int, Field(ge=0)] | SkipJsonSchema[None],
            Header(alias=JSON_LENGTH, description="Number of bytes of JSON at the start of the body"),
        ] = None,
    ) -> Response:
        require_accepting()
        deadline = deadline_of(request)
        served = repository.find(*key)
        with served.in_use():
            task = served.pool.manifest.task
            body = await read_body(request, limits)
            parse = partial(parse_request, body, json_bytes, task, limits.max_images)
            infer_request = await parsed(request, body, parse)
            result = await _run(served.pool, infer_request, deadline)
        logits_NC = _logits(result.results)
        answer_ids = on_result(request, served, result)
        response = build_response(infer_request, logits_NC, answer_ids, task, served.key.name, served.key.version)
        if response.json_bytes is None:
            return Response(response.body, media_type=JSON)
        headers = {JSON_LENGTH: str(response.json_bytes)}
        return Response(response.body, headers=headers, media_type="application/octet-stream")


async def _run(engine: Engine, request: InferRequest, deadline: float) -> RequestResult:
    """Compute the logits of the images of a request."""
    if request.timeout_seconds is not None:
        deadline = min(deadline, time.monotonic() + request.timeout_seconds)
    if isinstance(request.images, np.ndarray):
        pixels = [pixels_SS3.tobytes() for pixels_SS3 in request.images]
        return await engine.infer(pixels, OutputKind.LOGITS_OF_PIXELS, 1, deadline)
    return await engine.infer(request.images, OutputKind.LOGITS, 1, deadline)


def _logits(results: Sequence[bytes | Problem]) -> NDArray[np.float32]:
    """Logits, float32 [N, C]. The protocol has no error per image, so the first problem is raised."""
    rows = []
    for number, logits_C in enumerate(results, 1):
        if isinstance(logits_C, Problem):
            where = f"image {number} of {len(results)}: " if len(results) > 1 else ""
            raise ProblemError(make_problem(logits_C.status, where + logits_C.detail))
        rows.append(np.frombuffer(logits_C, np.float32))
    return np.stack(rows)
