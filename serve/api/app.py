"""Build the FastAPI application from the routes of this package and the service (serve/http/service.py)."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

import ltkd
from serve.api.openapi import describe
from serve.api.operations import operations
from serve.api.v1 import classify_routes, model_routes
from serve.api.v2 import open_inference
from serve.http.middleware import (
    RequestMiddleware,
    Shortcut,
    answer_error,
    answer_http,
    answer_problem,
    answer_validation,
)
from serve.http.service import TIMEOUT_HEADER, Service
from serve.monitoring.tracing import with_tracing
from serve.problems import ProblemError


class Application(FastAPI):
    """FastAPI with the middleware of this service around its own.

    Attributes:
        service: What all requests share.
        classify: The route that is answered without FastAPI's layers.
    """

    service: Service
    classify: APIRouter

    def build_middleware_stack(self) -> ASGIApp:
        """Build the layers around the routes, the outermost last."""
        app = Shortcut(super().build_middleware_stack(), self.classify)
        return with_tracing(RequestMiddleware(app, self.service))


def create_app(service: Service) -> Application:
    """Create the application around a service. Its lifespan starts and closes the service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        await service.start()
        yield
        await service.close()

    app = Application(
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
            Exception: answer_error,
        },
    )
    app.service, app.classify = service, classify_routes(service)
    app.include_router(app.classify)
    app.include_router(model_routes(service))
    app.include_router(operations(service.models, service.telemetry, service.feedback, service.keys, service.settings))
    key = Depends(service.keys.requires("classify"))
    app.include_router(
        open_inference(
            service.models,
            service.settings,
            service.require_ready,
            service.require_accepting,
            lambda request: service.deadline(request.state.context, request.headers.get(TIMEOUT_HEADER, "")),
            lambda request, served, result: service.record(served, result, request.state.context),
            guards=[key],
        )
    )
    describe(app)
    app.middleware_stack = app.build_middleware_stack()  # now: what cannot be built is an error at the start
    return app
