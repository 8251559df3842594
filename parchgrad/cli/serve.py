"""`parchgrad serve`: the service from the checkout."""

from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path

import click


@click.command("serve", context_settings={"ignore_unknown_options": True})
@click.option("--port", type=click.IntRange(1, 65535), default=3000, show_default=True)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Any other address needs keys ('parchgrad key new NAME') or PARCHGRAD_ALLOW_ANONYMOUS=true.",
)
@click.argument("bentoml_arguments", nargs=-1, type=click.UNPROCESSED)
def serve(port: int, host: str, bentoml_arguments: tuple[str, ...]) -> None:
    """Serve over HTTP from the checkout (`bentoml serve`); further arguments go to bentoml."""
    command = ["bentoml", "serve", SERVICE, "--host", host, "--port", str(port), *bentoml_arguments]
    executable = Path(sys.executable).with_name("bentoml")
    if not executable.is_file():
        raise click.ClickException("bentoml is not installed here; install parchgrad[service].")
    if not Path("service/service.py").is_file():
        raise click.ClickException("No folder 'service' here; run this from the project's checkout.")
    _check_address(host, port)
    # bentoml would otherwise report its use to its makers.
    os.execve(executable, command, {"BENTOML_DO_NOT_TRACK": "true", **os.environ})


def _check_address(host: str, port: int) -> None:
    """Raises ClickException where nothing can listen at this address; bentoml would show where in it that failed."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection of an earlier run may linger
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"{host}:{port} is in use by another process; choose another --port."
        else:
            message = f"{host}:{port} is no address to listen at here ({error.strerror})."
        raise click.ClickException(message) from None


SERVICE = "service.service:ParchGradService"
