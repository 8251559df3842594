"""The BentoML service: endpoints and lifecycle, nothing else. `bentoml serve service.service:ParchGradService`.

This module is imported by BentoML's supervisor as well as by its workers: nothing here loads torch or a model
before a worker makes a `ParchGradService`.
"""

import os
from typing import Any, cast

import bentoml

from service import access, audit, connections, memory, metrics
from service.access import Gate
from service.app import Envelope, create_app
from service.draining import drain_on_sigterm
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
    ACCESS = access.Access.from_settings(SETTINGS)
except SettingsError as error:
    raise SystemExit(f"Error: {error}") from None
connections.install()
APP = create_app()


@bentoml.service(
    name="parchgrad",
    workers=SETTINGS.workers,
    # Deadlines are ours, an image each; BentoML's is only a backstop, as its answer has another form.
    traffic={"timeout": SETTINGS.max_timeout_ms / 1000 + 30},
    # BentoML labels its request metrics by raw path, without bound; /metrics is ours (metrics.py).
    metrics={"enabled": False},
    # Its access log decodes header bytes after the answer began, and cuts the answer when they are not UTF-8.
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(APP, path="/")
class ParchGradService:
    """CNN predictions with ParchGrad saliency maps."""

    def __init__(self) -> None:
        memory.share_one_arena()
        metrics.forget_dead_workers()
        self.pipeline = Pipeline(SETTINGS)
        APP.state.pipeline = self.pipeline
        self.grpc = GrpcServer(self.pipeline, ACCESS)

    @bentoml.on_startup  # type: ignore[untyped-decorator]  # BentoML does not type it
    async def start(self) -> None:
        await self.pipeline.start()
        await self.grpc.start()
        drain_on_sigterm(self.pipeline)

    async def __is_ready__(self) -> bool:
        return self.pipeline.ready

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]  # BentoML does not type it
    async def close(self) -> None:
        await self.grpc.close()
        await self.pipeline.close()


_service = cast(Any, ParchGradService)
_service.add_asgi_middleware(Envelope, routes=APP.routes)
_service.add_asgi_middleware(Gate, access=ACCESS)  # inside the envelope, around BentoML's own routes
