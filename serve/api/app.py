"""Build the FastAPI application from the routes of this package and the service (serve/http/service.py)."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import ltkd
from serve.api.openapi import describe
from serve.api.operations import operations
from serve.api.v1 import classify_routes, model_routes
from serve.api.v2 import open_inference
from serve.http.middleware import RequestMiddleware, answer_http, answer_problem, answer_validation
from serve.http.service import Service
from serve.monitoring.tracing import add_tracing
from serve.problems import ProblemError


def create_app(service: Service) -> FastAPI:
    """Create the application around a service. Its lifespan starts and closes the service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        await service.start()
        yield
        await service.close()

    app = FastAPI(
        title="ltkd",
        summary="Classifies images and reports the class group of each answer.",
        version=ltkd.__version__,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's documentation page loads scripts from another host; /openapi.json is served
        redoc_url=None,
        redirect_slashes=False,  # a redirect would point to whatever host the request names
        exception_handlers={
            ProblemError: answer_problem,
            HTTPException: answer_http,
            RequestValidationError: answer_validation,
        },
    )
    app.add_middleware(RequestMiddleware, service=service)
    add_tracing(app)
    app.include_router(classify_routes(service))
    app.include_router(model_routes(service))
    app.include_router(operations(service.models, service.telemetry, service.feedback, service.keys, service.settings))
    key = Depends(service.keys.requires("classify"))
    app.include_router(
        open_inference(
            service.models,
            service.settings,
            service.require_ready,
            service.require_accepting,
            lambda request, served, result: service.record(served, result, request.state.context),
            guards=[key],
        )
    )
    describe(app)
    return app
