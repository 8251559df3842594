"""The BentoML service: endpoints and lifecycle, nothing else. `bentoml serve service.service:ParchGradService`.

This module is imported by BentoML's supervisor as well as by its workers: nothing here loads torch or a model
before a worker makes a `ParchGradService`.
"""

import json
import os
from typing import Any, cast

import bentoml
from starlette.exceptions import HTTPException

from service import access, audit, connections, logs, memory, metrics, repository, tracing, versions
from service.access import Gate
from service.app import Envelope, create_app, error_body
from service.draining import drain_on_sigterm
from service.errors import ServiceError
from service.pipeline import Pipeline
from service.protocols import grpc_server
from service.protocols.grpc_server import GrpcServer
from service.settings import Settings, SettingsError

try:
    # Refused here, where the supervisor ends with the message, and not in a worker that it would start again and again.
    SETTINGS = Settings.from_environment(os.environ)
    access.check_bind(SETTINGS, access.bind_host())
    audit.check(SETTINGS)
    grpc_server.check(SETTINGS, access.bind_host())
    tracing.check(SETTINGS)
    ACCESS = access.Access.from_settings(SETTINGS)
    # Asked of the supervisor alone: a bento may be built without its models, and a worker that takes another's place
    # stays alive, and says on /readyz that what it began with is gone.
    if access.bind_host() is not None:
        versions.check(SETTINGS)
except SettingsError as error:
    raise SystemExit(f"Error: {error}") from None
connections.install(SETTINGS)
logs.install(SETTINGS)
APP = create_app()
APP.state.needs_key = not ACCESS.open


@bentoml.service(
    name="parchgrad",
    workers=SETTINGS.workers,
    # Deadlines are ours, an image each; BentoML's is only a backstop, as its answer has another form.
    traffic={"timeout": SETTINGS.max_timeout_ms / 1000 + 30},
    # BentoML labels its request metrics by raw path, without bound; /metrics is ours (metrics.py).
    metrics={"enabled": False},
    # Its access log decodes header bytes after the answer began, and cuts the answer when they are not UTF-8.
    logging={"access": {"enabled": False}},
    tracing=tracing.install(SETTINGS),
)
@bentoml.asgi_app(APP, path="/")
class ParchGradService:
    """CNN predictions with ParchGrad saliency maps."""

    def __init__(self) -> None:
        memory.share_one_arena()
        metrics.begin_worker(SETTINGS.max_queue, SETTINGS.workers)
        self.pipeline = Pipeline(SETTINGS)
        APP.state.pipeline = self.pipeline
        self.grpc = GrpcServer(self.pipeline, ACCESS)

    @bentoml.on_startup  # type: ignore[untyped-decorator]  # BentoML does not type it
    async def start(self) -> None:
        await self.pipeline.start()
        await self.grpc.start()
        drain_on_sigterm(self.pipeline)

    async def __is_ready__(self) -> bool:
        """Raises HTTPException where it is not: of False, BentoML's /readyz would say no more than that."""
        if not self.pipeline.ready:
            raise _not_ready(self.pipeline)
        return True

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]  # BentoML does not type it
    async def close(self) -> None:
        await self.grpc.close()
        await self.pipeline.close()
        await tracing.close()  # last: every request has ended


def _not_ready(pipeline: Pipeline) -> HTTPException:
    """Why, in our form of an error, which the envelope leaves as it is."""
    reason = pipeline.repository.failure or repository.STILL_LOADING
    error = ServiceError("not_ready", "The service is stopping." if pipeline.draining else reason)
    metrics.refused(error.code)
    headers = {"Content-Type": "application/json", **error.headers}
    return HTTPException(error.status, json.dumps(error_body("/readyz", error)), headers)


_service = cast(Any, ParchGradService)
_service.add_asgi_middleware(Envelope, routes=APP.routes)
_service.add_asgi_middleware(Gate, access=ACCESS)  # inside the envelope, around BentoML's own routes
