"""The routes for those who run the service: what it has seen, what was right, and the order to reload."""

import asyncio
import logging
import signal
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response

from ltkd.contract.records import Record
from ltkd.errors import LtkdError
from serve.api.openapi import problem_responses
from serve.http.api_keys import Keys
from serve.monitoring.drift import WindowReport
from serve.monitoring.feedback import Feedback, FeedbackBody, FeedbackTaken, GroupAccuracy
from serve.monitoring.prometheus import MEDIA_TYPE, Telemetry
from serve.pool.repository import AnyEngineClient, ModelReloaded, ModelRepository, Reloaded
from serve.problems import ProblemError, problem_of

_log = logging.getLogger(__name__)


class GroupsSeen(Record):
    """What a model has answered lately, group by group, and how often that was right.

    Attributes:
        model: Name of the model.
        version: Its version.
        window: Its most recent predictions, against those of certification.
        feedback: Its accuracy, of the answers whose true label was told.
    """

    model: str
    version: str
    window: WindowReport
    feedback: tuple[GroupAccuracy, ...]


def operations(
    models: ModelRepository[AnyEngineClient], telemetry: Telemetry, feedback: Feedback, keys: Keys
) -> APIRouter:
    """The routes, handed everything they use."""
    router = APIRouter(tags=["operate"])
    anyone_with_a_key, admin = Depends(keys.requires("classify")), Depends(keys.requires("admin"))

    @router.get(
        "/metrics",
        summary="What Prometheus reads",
        response_class=Response,
        dependencies=[anyone_with_a_key],
        responses=problem_responses(401),
    )
    async def metrics() -> Response:
        return Response(telemetry.exposition(), media_type=MEDIA_TYPE)

    @router.get(
        "/v1/groups",
        summary="What was predicted lately in each group, against what was certified",
        dependencies=[anyone_with_a_key],
        responses=problem_responses(400, 401, 404),
    )
    async def groups(
        model: Annotated[str | None, Query(description="Name of the model; not needed where there is one")] = None,
        version: Annotated[str | None, Query(description="Its version; the highest where it is not given")] = None,
    ) -> GroupsSeen:
        served = models.find(model, version)
        name, number = served.key
        return GroupsSeen(
            model=name, version=number, window=served.meter.window.report(), feedback=served.ledger.accuracy()
        )

    @router.post(
        "/v1/feedback",
        summary="Tell the true label of an answer",
        description="Of an answer the service remembers request id, predicted class, group and confidence, in memory "
        "and for the most recent answers only; images are not kept.",
        dependencies=[anyone_with_a_key],
        responses=problem_responses(400, 401, 404, 409),
    )
    async def tell(body: FeedbackBody) -> FeedbackTaken:
        return feedback.take(body)

    @router.post(
        "/v1/admin/reload",
        summary="Look for new bundles, and serve those that can be proved",
        dependencies=[admin],
        responses=problem_responses(401, 403, 409),
    )
    async def reload() -> Reloaded:
        try:
            reloaded = await reload_all(models, keys)
        except LtkdError as reason:
            raise ProblemError(problem_of(409, str(reason))) from None
        return answered(reloaded)

    return router


async def reload_all(models: ModelRepository[AnyEngineClient], keys: Keys) -> Reloaded:
    """Read the keys again, then the models.

    Raises:
        LtkdError: The key file cannot be used; keys and models stay as they are.
    """
    keys.read_again()
    return await models.reload()


def answered(reloaded: Reloaded) -> Reloaded:
    """What a reload did, if all that was offered is served now.

    Raises:
        ProblemError: Something could not be served, and why.
    """
    failed: list[ModelReloaded] = [done for done in reloaded.models if done.outcome == "failed"]
    if failed:
        told = " ".join(f"{done.name} version {done.version}: {done.reason}" for done in failed)
        raise ProblemError(problem_of(409, f"not everything that is offered can be served. {told}"))
    return reloaded


def reload_on_hangup(models: ModelRepository[AnyEngineClient], keys: Keys) -> None:
    """Reload whenever this process receives SIGHUP, where there is such a signal; called on the event loop."""
    loop = asyncio.get_running_loop()
    running: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        try:
            await reload_all(models, keys)
        except LtkdError as reason:
            _log.error("reload failed, nothing was changed: %s", reason)

    def on_hangup() -> None:
        task = loop.create_task(reload())
        running.add(task)
        task.add_done_callback(running.discard)

    if hasattr(signal, "SIGHUP"):
        loop.add_signal_handler(signal.SIGHUP, on_hangup)
