"""The BentoML service: endpoints and lifecycle, nothing else. `bentoml serve service.service:ParchGradService`.

This module is imported by BentoML's supervisor as well as by its workers: nothing here loads torch or a model
before a worker makes a `ParchGradService`.
"""

import os
from typing import Any, cast

import bentoml

from service import metrics
from service.app import Envelope, create_app
from service.pipeline import Pipeline
from service.settings import Settings

SETTINGS = Settings.from_environment(os.environ)
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
        metrics.forget_dead_workers()
        self.pipeline = Pipeline(SETTINGS)
        APP.state.pipeline = self.pipeline

    async def __is_ready__(self) -> bool:
        return self.pipeline.ready

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]  # BentoML does not type it
    async def close(self) -> None:
        await self.pipeline.close()


cast(Any, ParchGradService).add_asgi_middleware(Envelope, routes=APP.routes)
