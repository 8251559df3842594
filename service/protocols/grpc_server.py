"""The gRPC server of a worker: its address and limits, started and drained with the worker. No methods (grpc_calls.py).

`grpc` is imported where the server is switched on, and nowhere else. Every worker listens on the same port; the
kernel shares the connections out.
"""

import importlib.util
import logging
import os
import socket
from typing import TYPE_CHECKING

import click

from service.access import Access, check_bind
from service.pipeline import Pipeline
from service.settings import PREFIX, Settings, SettingsError

if TYPE_CHECKING:
    import grpc

log = logging.getLogger("bentoml.parchgrad.grpc")  # beneath BentoML's logger, which has the handlers

PORT = f"{PREFIX}GRPC_PORT"
SPARE_CALLS = 32  # beside those that carry an image: they ask for health and metadata, or are told the queue is full


def check(settings: Settings, host: str | None) -> None:
    """Raises SettingsError where the port is asked for and cannot be served at `host`; None: it is not known here."""
    if not settings.grpc_port:
        return
    port = str(settings.grpc_port)
    if importlib.util.find_spec("grpc") is None:
        raise SettingsError(PORT, port, "0, or the package grpc, which `pip install 'parchgrad[grpc]'` brings")
    if host is None:
        return
    context = click.get_current_context(silent=True)
    if context is not None and context.params.get("ssl_certfile"):
        raise SettingsError(
            PORT, port, "0 where --ssl-certfile is given: gRPC has no TLS here, and keys would be sent in the open"
        )
    # The workers share the port, and would share it with another service as well, each answering for half of it.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection of an earlier run may linger
        try:
            probe.bind((host, settings.grpc_port))
        except OSError as error:
            raise SettingsError(PORT, port, f"a port that is free at {host} ({error.strerror})") from None


class GrpcServer:
    """The Open Inference Protocol over gRPC, or nothing where the setting is 0."""

    def __init__(self, pipeline: Pipeline, access: Access) -> None:
        self._pipeline, self._access = pipeline, access
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listen beside HTTP, on its address. Called on the event loop. Raises SettingsError."""
        settings = self._pipeline.settings
        if not settings.grpc_port:
            return
        import grpc

        from service.protocols.grpc_calls import Calls

        host = http_host()
        check_bind(settings, host)
        self._server = grpc.aio.server(
            handlers=[Calls(self._pipeline, self._access).handler()],
            options=_options(settings),
            maximum_concurrent_rpcs=settings.max_queue + SPARE_CALLS,
        )
        address = f"[{host}]:{settings.grpc_port}" if ":" in host else f"{host}:{settings.grpc_port}"
        try:
            self._server.add_insecure_port(address)
        except RuntimeError:
            raise SettingsError(PORT, str(settings.grpc_port), f"a port that is free at {host}") from None
        await self._server.start()
        log.info("gRPC at %s.", address)

    async def close(self) -> None:
        """Take no more calls and let those that began end; they have until the longest deadline there is."""
        if self._server is not None:
            await self._server.stop(self._pipeline.settings.max_timeout_ms / 1000)


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 1),
        ("grpc.max_receive_message_length", settings.max_body_bytes),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a few bytes could be a message of any size
        # A caller that is gone without a word is noticed, and what it asked for withdrawn.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # clients may ask as often whether we are there
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def http_host() -> str:
    """The address this worker's HTTP socket is bound to; loopback where there is none.

    BentoML tells a worker only the socket's descriptor, on its command line, which is click's.
    """
    context = click.get_current_context(silent=True)
    descriptor = context.params.get("fd") if context is not None else None
    if descriptor is None:
        return "127.0.0.1"
    with socket.socket(fileno=os.dup(descriptor)) as http:
        return str(http.getsockname()[0])
