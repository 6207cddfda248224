"""The routes of /v1: classification, model information and health checks."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from ltkd.contract import preprocessing
from ltkd.contract.bundle import Manifest
from ltkd.contract.image_decoding import FORMATS, MAX_HEADER_PIXELS
from ltkd.contract.records import Record
from serve.api.openapi import CLASSIFY_BODY, problem_responses
from serve.engine.answers import Answers, ModelRef, model_ref
from serve.http.bodies import read_images
from serve.http.service import TIMEOUT_HEADER, Service, server_timing


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
    preprocessing: Preprocessing
    manifest: Manifest


class Alive(Record):
    """The server process is running."""

    status: str = "alive"


class Ready(Record):
    """Every model has reproduced its golden samples and accepts requests."""

    status: str = "ready"
    models: tuple[ModelRef, ...]


ModelName = Annotated[str | None, Query(description="Name of the model; not needed if only one is served")]
ModelVersion = Annotated[str | None, Query(description="Version of the model; by default the highest")]


def classify_routes(service: Service) -> APIRouter:
    """Create the route that classifies."""
    router = APIRouter(tags=["classify"])
    settings = service.settings

    @router.post(
        "/v1/classify",
        summary="Classify one image or many",
        openapi_extra=CLASSIFY_BODY,
        response_model=Answers,
        responses=problem_responses(400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504),
    )
    async def classify(
        request: Request,
        _: Annotated[str, Depends(service.keys.requires("classify"))],
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


def model_routes(service: Service) -> APIRouter:
    """Create the routes for model information and health checks."""
    router = APIRouter(tags=["operate"])
    key = Depends(service.keys.requires("classify"))

    @router.get(
        "/v1/model",
        summary="A model, where it runs and which images it accepts",
        dependencies=[key],
        responses=problem_responses(400, 401, 404),
    )
    async def model_facts(model: ModelName = None, version: ModelVersion = None) -> ModelFacts:
        served = service.models.find(model, version)
        manifest = served.pool.manifest
        return ModelFacts(
            model=model_ref(manifest, served.pool.precision, served.pool.provider),
            version=served.key.version,
            preprocessing=_preprocessing(manifest.task.preprocessing, service.settings.max_pixels),
            manifest=manifest,
        )

    @router.get("/livez", summary="Whether the server process is running")
    async def livez() -> Alive:
        return Alive()

    @router.get("/readyz", summary="Whether the service accepts requests", responses=problem_responses(503))
    async def readyz() -> Ready:
        service.require_ready()
        pools = [served.pool for served in service.models.all()]
        return Ready(models=tuple(model_ref(pool.manifest, pool.precision, pool.provider) for pool in pools))

    return router


def _preprocessing(model: preprocessing.Preprocessing, max_pixels: int) -> Preprocessing:
    rules = (
        "EXIF orientation is applied, the first frame counts, transparency is laid on white, 16-bit grey is scaled "
        f"to 8 bit, everything becomes RGB; {model.rule}; normalisation is in the graph"
    )
    return Preprocessing(
        **dict(model), formats=FORMATS, max_pixels=max_pixels, max_header_pixels=MAX_HEADER_PIXELS, rules=rules
    )
