"""The routes for operators: metrics, statistics per class group, feedback with true labels, and reloading."""

import asyncio
import logging
import signal
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from ltkd.contract.records import Record
from ltkd.errors import LtkdError
from serve.api.openapi import FEEDBACK_BODY, KEY_STATUSES, problem_responses
from serve.http.api_keys import Key, Keys
from serve.http.bodies import BodyLimits, read_record
from serve.monitoring.drift import WindowReport
from serve.monitoring.feedback import Feedback, FeedbackBody, FeedbackReceipt, GroupAccuracy
from serve.monitoring.prometheus import MEDIA_TYPE, Telemetry
from serve.pool.model_repository import AnyEngineClient, ModelReloaded, ModelRepository, Reloaded
from serve.problems import ProblemError, make_problem

_log = logging.getLogger(__name__)


class GroupsReport(Record):
    """Recent predictions of a model per class group, and how often they were right.

    Attributes:
        model: Name of the model.
        version: Its version.
        window: Its most recent predictions, compared with those of certification.
        feedback: Its accuracy on the answers whose true label was reported.
    """

    model: str
    version: str
    window: WindowReport
    feedback: tuple[GroupAccuracy, ...]


def operations(
    models: ModelRepository[AnyEngineClient], telemetry: Telemetry, feedback: Feedback, keys: Keys, limits: BodyLimits
) -> APIRouter:
    """Create the routes for operators."""
    router = APIRouter(tags=["operate"])
    metrics_key, admin_key = Depends(keys.requires("metrics")), Depends(keys.requires("admin"))

    @router.get(
        "/metrics",
        summary="Metrics in the format of Prometheus",
        response_class=Response,
        dependencies=[metrics_key],
        responses=problem_responses(*KEY_STATUSES),
    )
    async def metrics() -> Response:
        return Response(telemetry.exposition(), media_type=MEDIA_TYPE)

    @router.get(
        "/v1/groups",
        summary="Recent predictions per class group, compared with those of certification",
        dependencies=[metrics_key],
        responses=problem_responses(*KEY_STATUSES, 400, 404),
    )
    async def groups(
        model: Annotated[str | None, Query(description="Name of the model; not needed if only one is served")] = None,
        version: Annotated[str | None, Query(description="Version of the model; by default the highest")] = None,
    ) -> GroupsReport:
        served = models.find(model, version)
        name, number = served.key
        return GroupsReport(
            model=name, version=number, window=served.metrics.window.report(), feedback=served.feedback.accuracy()
        )

    @router.post(
        "/v1/feedback",
        summary="Report the true label of an answer",
        description="An answer can be labelled by the key that asked for it, or by a key with the role feedback. The "
        "service keeps id, predicted class, group and confidence of the most recent answers, and the name of the key, "
        "in memory. It does not keep images.",
        openapi_extra=FEEDBACK_BODY,
        responses=problem_responses(*KEY_STATUSES, 400, 404, 408, 409, 413, 415),
    )
    async def tell(
        request: Request, key: Annotated[Key, Depends(keys.requires("classify", "feedback"))]
    ) -> FeedbackReceipt:
        owner = None if "feedback" in key.roles else key.name
        return feedback.add_label(await read_record(request, FeedbackBody, limits), owner)

    @router.post(
        "/v1/admin/reload",
        summary="Look for new or changed bundles, verify them and serve them",
        dependencies=[admin_key],
        responses=problem_responses(*KEY_STATUSES, 409),
    )
    async def reload() -> Reloaded:
        try:
            reloaded = await reload_all(models, keys)
        except LtkdError as reason:
            raise ProblemError(make_problem(409, str(reason))) from None
        return require_success(reloaded)

    return router


async def reload_all(models: ModelRepository[AnyEngineClient], keys: Keys) -> Reloaded:
    """Reload the API keys, then the models.

    Raises:
        LtkdError: The key file cannot be used; keys and models are not changed.
    """
    keys.reload()
    return await models.reload()


def require_success(reloaded: Reloaded) -> Reloaded:
    """Return the result of a reload if every bundle could be loaded.

    Raises:
        ProblemError: 409, some bundles could not be loaded; the detail has the reasons.
    """
    failed: list[ModelReloaded] = [model for model in reloaded.models if model.outcome == "failed"]
    if failed:
        reasons = " ".join(f"{model.name} version {model.version}: {model.reason}" for model in failed)
        raise ProblemError(make_problem(409, f"some bundles could not be loaded. {reasons}"))
    return reloaded


def reload_on_hangup(models: ModelRepository[AnyEngineClient], keys: Keys) -> None:
    """Reload whenever this process receives SIGHUP, on systems that have this signal.

    A signal that came during the start, which serve/main.py notes, is obeyed now. Call it on the event loop.
    """
    loop = asyncio.get_running_loop()
    running: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        try:
            await reload_all(models, keys)
        except LtkdError as reason:
            _log.error("the reload failed and changed nothing: %s", reason)

    def on_hangup() -> None:
        task = loop.create_task(reload())
        running.add(task)
        task.add_done_callback(running.discard)

    if hasattr(signal, "SIGHUP"):
        during_start = signal.getsignal(signal.SIGHUP)
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
        if getattr(during_start, "noted", False):  # a HangupNote
            on_hangup()
