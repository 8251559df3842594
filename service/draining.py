"""SIGTERM, in order: readiness goes, a while for the load balancer to see it, then the server stops accepting."""

import asyncio
import logging
import math
import signal
from collections.abc import Callable
from types import FrameType

import uvicorn

from service.pipeline import Pipeline
from service.settings import Settings

log = logging.getLogger(__name__)

Handler = Callable[[int, FrameType | None], object]


def drain_on_sigterm(pipeline: Pipeline) -> None:
    """Put the drain before the server's own handler, which closes the socket at once; a second signal goes through.

    Called on the event loop, in the process's main thread, after the server has set its handlers.
    """
    loop, seconds = asyncio.get_running_loop(), pipeline.settings.drain_ms / 1000
    stop = signal.getsignal(signal.SIGTERM)
    if not callable(stop):
        return  # nobody serves: under a test client the signal means what it always does
    handler: Handler = stop
    _bound_the_end(stop, pipeline.settings)

    def drain(number: int, frame: FrameType | None) -> None:
        if pipeline.draining or not seconds:
            handler(number, frame)
            return
        pipeline.drain()
        log.info("Draining for %g s before the last requests are taken.", seconds)
        loop.call_soon_threadsafe(loop.call_later, seconds, handler, number, None)

    signal.signal(signal.SIGTERM, drain)


def _bound_the_end(stop: object, settings: Settings) -> None:
    """Longer than any request may take: else one caller that never reads its answer keeps the process for ever."""
    server = getattr(stop, "__self__", None)  # the server whose handler it is
    if isinstance(server, uvicorn.Server) and server.config.timeout_graceful_shutdown is None:
        server.config.timeout_graceful_shutdown = math.ceil((settings.body_timeout_ms + settings.max_timeout_ms) / 1000)
