"""The HTTP service: its routes, and how they are put together."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import ltkd
from serve.api.openapi import describe
from serve.api.operations import operations
from serve.api.v1 import classification, facts
from serve.api.v2 import open_inference
from serve.http.middleware import RequestMiddleware, answer_http, answer_problem, answer_validation
from serve.http.service import Service
from serve.problems import ProblemError


def create_app(service: Service) -> FastAPI:
    """The service, handed everything it uses; it is ready once the server has started it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[dict[str, Service], None]:
        await service.start()
        yield {"service": service}  # the protocol that answers the usual request by itself finds it there
        await service.close()

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
    app.add_middleware(RequestMiddleware, service=service)
    app.include_router(classification(service))
    app.include_router(facts(service))
    app.include_router(operations(service.models, service.telemetry, service.feedback, service.keys))
    key = Depends(service.keys.requires("classify"))
    app.include_router(
        open_inference(
            service.models,
            service.settings,
            service.require_ready,
            service.require_accepting,
            lambda request, served, classified: service.note(served, classified, request.state.asked),
            guards=[key],
        )
    )
    describe(app)
    return app
