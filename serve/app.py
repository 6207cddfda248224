"""The HTTP service around an engine."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import ltkd
from ltkd.bundle import Manifest
from ltkd.images import FORMATS
from ltkd.records import Record
from serve.answers import Answer, Answers, ModelRef, Refused, model_ref
from serve.bodies import read_images
from serve.classifier import Classifier
from serve.engine import Engine
from serve.envelope import Envelope
from serve.openapi import CLASSIFY_BODY, problem_responses
from serve.problems import (
    ProblemError,
    answer_http,
    answer_problem,
    answer_validation,
    problem_of,
)
from serve.settings import Settings
from serve.telemetry import MEDIA_TYPE, Telemetry


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
    preprocessing: Preprocessing
    manifest: Manifest


class Alive(Record):
    """The process answers."""

    status: str = "alive"


class Ready(Record):
    """The model is proved on its golden samples and answers."""

    status: str = "ready"
    model: ModelRef


@dataclass
class Readiness:
    """Whether requests are taken: from the end of the start to the beginning of the stop."""

    ready: bool = False

    def require(self) -> None:
        """Let a request pass, or answer 503.

        Raises:
            ProblemError: The service is starting or stopping.
        """
        if not self.ready:
            raise ProblemError(problem_of(503, "the service is not ready; try again."), {"Retry-After": "1"})


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The service, handed everything it uses; it is ready once the server has started it."""
    telemetry = Telemetry(model_ref(engine), engine.manifest.task.groups.names)
    classifier = Classifier(engine, settings.max_pixels, settings.max_requests)
    readiness = Readiness()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        readiness.ready = True
        yield
        readiness.ready = False
        classifier.close()

    app = FastAPI(
        title="ltkd",
        summary="Classifies images and says which group of classes each answer fell in.",
        version=ltkd.__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's page loads scripts from another host; /openapi.json is served
        redoc_url=None,
        exception_handlers={
            ProblemError: answer_problem,
            HTTPException: answer_http,
            RequestValidationError: answer_validation,
        },
    )
    app.add_middleware(Envelope, provider=engine.provider, telemetry=telemetry)
    app.include_router(classification(engine, settings, classifier, telemetry, readiness))
    app.include_router(operations(engine, settings, telemetry, readiness))
    return app


def classification(
    engine: Engine, settings: Settings, classifier: Classifier, telemetry: Telemetry, readiness: Readiness
) -> APIRouter:
    """The route that classifies."""
    router = APIRouter(tags=["classify"])
    model = model_ref(engine)

    @router.post(
        "/v1/classify",
        summary="Classify one image or many",
        openapi_extra=CLASSIFY_BODY,
        responses=problem_responses(400, 408, 413, 415, 422, 429, 500, 503),
    )
    async def classify(
        request: Request,
        response: Response,
        top_k: Annotated[int, Query(ge=1, description="Classes to list; at most all of them are")] = settings.top_k,
    ) -> Answers:
        readiness.require()
        with classifier.admitted():
            classified = await classifier.classify(await read_images(request, settings), top_k)
        telemetry.watch(classified.results, classified.stage_seconds)
        timing = [f"{stage};dur={seconds * 1000:.2f}" for stage, seconds in classified.stage_seconds.items()]
        response.headers["Server-Timing"] = ", ".join(timing)
        return Answers(model=model, results=tuple(some_answered(classified.results)))

    return router


def operations(engine: Engine, settings: Settings, telemetry: Telemetry, readiness: Readiness) -> APIRouter:
    """The routes for those who run the service."""
    router = APIRouter(tags=["operate"])
    model = model_ref(engine)
    taken = Preprocessing(formats=FORMATS, input_px=engine.manifest.task.input_px, max_pixels=settings.max_pixels)

    @router.get("/v1/model", summary="The model, where it runs and what it takes")
    async def facts() -> ModelFacts:
        return ModelFacts(model=model, preprocessing=taken, manifest=engine.manifest)

    @router.get("/livez", summary="Whether the process answers")
    async def livez() -> Alive:
        return Alive()

    @router.get("/readyz", summary="Whether requests are taken", responses=problem_responses(503))
    async def readyz() -> Ready:
        readiness.require()
        return Ready(model=model)

    @router.get("/metrics", summary="What Prometheus reads", response_class=Response)
    async def metrics() -> Response:
        return Response(telemetry.exposition(), media_type=MEDIA_TYPE)

    return router


def some_answered(results: list[Answer | Refused]) -> list[Answer | Refused]:
    """The results, if at least one image could be used.

    Raises:
        ProblemError: None could; the first problem speaks for all.
    """
    problems = [result.error for result in results if isinstance(result, Refused)]
    if len(problems) < len(results):
        return results
    first = problems[0]
    if len(problems) == 1:
        raise ProblemError(first)
    detail = f"none of the {len(problems)} images could be used; the first: {first.detail}"
    raise ProblemError(problem_of(first.status, detail))
