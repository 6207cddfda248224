"""The routes of /v1: classification and facts about models."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from ltkd.contract.bundle import Manifest
from ltkd.contract.image_decoding import FORMATS
from ltkd.contract.records import Record
from serve.api.openapi import CLASSIFY_BODY, problem_responses
from serve.engine.answers import Answers, ModelRef, model_ref
from serve.http.bodies import read_images
from serve.http.service import TIMEOUT_HEADER, Service, server_timing


class Preprocessing(Record):
    """What happens to an image before the network sees it."""

    formats: tuple[str, ...]
    input_px: int
    max_pixels: int
    rules: str = (
        "EXIF orientation is applied, the first frame counts, transparency is laid on white, 16-bit grey is scaled "
        "to 8 bit, everything becomes RGB; the centre square is resized bilinearly; normalisation is in the graph"
    )


class ModelFacts(Record):
    """The model that answers: where it runs, what it takes and all that its bundle says of it."""

    model: ModelRef
    version: str
    preprocessing: Preprocessing
    manifest: Manifest


class Alive(Record):
    """The process answers."""

    status: str = "alive"


class Ready(Record):
    """Every model is proved on its golden samples and answers."""

    status: str = "ready"
    models: tuple[ModelRef, ...]


ModelName = Annotated[str | None, Query(description="Name of the model; not needed where there is one")]
ModelVersion = Annotated[str | None, Query(description="Its version; the highest where it is not given")]


def classification(service: Service) -> APIRouter:
    """The route that classifies, in full; the usual request never gets here (serve/http/fast_path.py)."""
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
        top_k: Annotated[int, Query(ge=1, description="Classes to list; at most all of them are")] = settings.top_k,
        model: ModelName = None,
        version: ModelVersion = None,
        timeout: Annotated[
            str, Header(alias=TIMEOUT_HEADER, description="Seconds after which nobody needs the answer")
        ] = "",
    ) -> Response:
        service.require_accepting()
        asked = request.state.asked
        deadline = service.deadline(asked, timeout)
        served = service.models.find(model, version)
        with served.held():
            contents = await read_images(request, settings)
            top_k = min(top_k, len(served.worker.manifest.task.class_names))
            classified = await served.worker.classify(contents, top_k, deadline)
        body = service.answer(served, classified, asked)
        headers = {"X-Ltkd-Provider": served.worker.provider, "Server-Timing": server_timing(classified.stage_seconds)}
        return Response(body, media_type="application/json", headers=headers)

    return router


def facts(service: Service) -> APIRouter:
    """The routes that say what is served, and whether."""
    router = APIRouter(tags=["operate"])
    key = Depends(service.keys.requires("classify"))

    @router.get(
        "/v1/model",
        summary="A model, where it runs and what it takes",
        dependencies=[key],
        responses=problem_responses(400, 401, 404),
    )
    async def model_facts(model: ModelName = None, version: ModelVersion = None) -> ModelFacts:
        served = service.models.find(model, version)
        manifest = served.worker.manifest
        return ModelFacts(
            model=model_ref(manifest, served.worker.precision, served.worker.provider),
            version=served.key.version,
            preprocessing=Preprocessing(
                formats=FORMATS, input_px=manifest.task.input_px, max_pixels=service.settings.max_pixels
            ),
            manifest=manifest,
        )

    @router.get("/livez", summary="Whether the process answers")
    async def livez() -> Alive:
        return Alive()

    @router.get("/readyz", summary="Whether requests are taken", responses=problem_responses(503))
    async def readyz() -> Ready:
        service.require_ready()
        workers = [served.worker for served in service.models.all()]
        return Ready(models=tuple(model_ref(one.manifest, one.precision, one.provider) for one in workers))

    return router
