"""The routes of /v1: classification, model information and health checks."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, Field, ValidationError

from ltkd.contract import preprocessing
from ltkd.contract.bundle import Manifest
from ltkd.contract.image_decoding import FORMATS, MAX_HEADER_PIXELS
from ltkd.contract.node_assignment import NodeAssignment
from ltkd.contract.records import Record
from serve.api.openapi import CLASSIFY_BODY, KEY_STATUSES, problem_responses
from serve.engine.answers import Answers, ModelRef
from serve.http.bodies import read_images
from serve.http.service import TIMEOUT_HEADER, Service, server_timing
from serve.pool.model_repository import UnavailableModel


class Preprocessing(preprocessing.Preprocessing):
    """How an image is prepared for the network. ``max_pixels`` counts them as they are decoded."""

    formats: tuple[str, ...]
    max_pixels: int
    max_header_pixels: int
    rules: str


class ModelFacts(Record):
    """A served model: where it runs, which images it accepts and the manifest of its bundle."""

    model: ModelRef
    version: str
    nodes: NodeAssignment
    preprocessing: Preprocessing
    manifest: Manifest


class Alive(Record):
    """The server process is running."""

    status: str = "alive"


class Ready(Record):
    """At least one model answers. It has reproduced its golden samples.

    Attributes:
        models: The models that answer.
        unavailable: The model versions that do not, and why.
    """

    status: str = "ready"
    models: tuple[ModelRef, ...]
    unavailable: tuple[UnavailableModel, ...]


ModelName = Annotated[str | None, Query(description="Name of the model; not needed if only one is served")]
ModelVersion = Annotated[str | None, Query(description="Version of the model; by default the highest")]


class ClassifyQuery(BaseModel):
    """The query parameters of ``POST /v1/classify``."""

    top_k: int | None = Field(default=None, ge=1)
    model: str | None = None
    version: str | None = None


def classify_routes(service: Service) -> APIRouter:
    """Create the route that classifies."""
    settings = service.settings

    class ClassifyRoute(APIRoute):
        """A route that FastAPI describes but that reads its parameters itself, because FastAPI takes 0.1 ms for it."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            async def handle(request: Request) -> Response:
                authorization = request.headers.get("authorization", "")
                service.keys.authorise(authorization, "classify", context=request.state.context)
                query = _query(request)
                timeout = request.headers.get(TIMEOUT_HEADER, "")
                return await classify(request, query.top_k or settings.top_k, query.model, query.version, timeout)

            return handle

    router = APIRouter(tags=["classify"], route_class=ClassifyRoute)

    @router.post(
        "/v1/classify",
        summary="Classify one image or many",
        dependencies=[Depends(service.keys.requires("classify"))],
        openapi_extra=CLASSIFY_BODY,
        response_model=Answers,
        responses=problem_responses(*KEY_STATUSES, 400, 404, 408, 413, 415, 422, 500, 503, 504),
    )
    async def classify(
        request: Request,
        top_k: Annotated[
            int, Query(ge=1, description="Number of classes to list, or all if there are fewer")
        ] = settings.top_k,
        model: ModelName = None,
        version: ModelVersion = None,
        timeout: Annotated[
            str, Header(alias=TIMEOUT_HEADER, description="Seconds after which the client no longer needs the response")
        ] = "",
    ) -> Response:
        service.require_accepting()
        context = request.state.context
        deadline = service.deadline(context, timeout)
        served = service.models.find(model, version)
        with served.in_use():
            contents = await read_images(request, settings)
            top_k = min(top_k, len(served.pool.manifest.task.class_names))
            result = await served.pool.classify(contents, top_k, deadline)
        body = service.response_body(served, result, context)
        headers = {"X-Ltkd-Provider": served.pool.provider, "Server-Timing": server_timing(result.stage_seconds)}
        return Response(body, media_type="application/json", headers=headers)

    return router


def _query(request: Request) -> ClassifyQuery:
    if not request.scope["query_string"]:
        return _NO_QUERY
    try:
        return ClassifyQuery.model_validate(dict(request.query_params))
    except ValidationError as error:
        first, *_ = error.errors()
        raise RequestValidationError([{**first, "loc": ("query", *first["loc"])}]) from None


_NO_QUERY = ClassifyQuery()


def model_routes(service: Service) -> APIRouter:
    """Create the routes for model information and health checks."""
    router = APIRouter(tags=["operate"])
    key = Depends(service.keys.requires())

    @router.get(
        "/v1/model",
        summary="A model, where it runs and which images it accepts",
        dependencies=[key],
        responses=problem_responses(*KEY_STATUSES, 400, 404),
    )
    async def model_facts(model: ModelName = None, version: ModelVersion = None) -> ModelFacts:
        served = service.models.find(model, version)
        manifest = served.pool.manifest
        return ModelFacts(
            model=served.ref,
            version=served.key.version,
            nodes=served.pool.nodes,
            preprocessing=_preprocessing(manifest.task.preprocessing, service.settings.max_pixels),
            manifest=manifest,
        )

    @router.get("/livez", summary="Whether the server process is running")
    async def livez() -> Alive:
        return Alive()

    @router.get("/readyz", summary="Whether any model answers", responses=problem_responses(503))
    async def readyz() -> Ready:
        service.require_ready()
        return Ready(
            models=tuple(served.ref for served in service.models.all() if served.pool.alive),
            unavailable=service.models.unavailable(),
        )

    return router


def _preprocessing(model: preprocessing.Preprocessing, max_pixels: int) -> Preprocessing:
    rules = (
        "EXIF orientation is applied, the first frame counts, transparency is laid on white, 16-bit grey is scaled "
        f"to 8 bit, everything becomes RGB; {model.rule}; normalisation is in the graph"
    )
    return Preprocessing(
        **dict(model), formats=FORMATS, max_pixels=max_pixels, max_header_pixels=MAX_HEADER_PIXELS, rules=rules
    )
