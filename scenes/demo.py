"""The demonstration: serves the bundled model, POSTs sample pictures, and draws what comes back.

`python -m scenes.demo` (or `make demo`). Everything goes over HTTP, as any client's requests would.
"""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from parchgrad.cli.serve import SERVICE
from parchgrad.evaluation.maps import mass_share
from parchgrad.render import overlay
from scenes.generator import mosaic, sample
from scenes.objects import CLASSES

ROOT = Path(__file__).resolve().parent.parent

# Held-out scenes and mosaics, picked by eye among the first twenty; a mosaic is explained for two targets.
SCENES = (9, 13, 14, 15)
MOSAICS = (3, 9)

STARTING_TRIES = 600  # times 0.2 s
STOPPING_SECONDS = 60


@dataclass(frozen=True)
class Question:
    """A picture, the class to explain in it, and the visible pixels of that class's object."""

    name: str
    image: NDArray[np.uint8]
    target: int
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Reply:
    """What the service said: the prediction and both maps `(h, w)`, and ParchGrad's overlay as PNG."""

    prediction: str
    probability: float
    gradient: NDArray[np.float32]
    parchgrad: NDArray[np.float32]
    overlay: bytes


def questions() -> list[Question]:
    """The sample pictures; each mosaic comes twice, for two of the four classes in it."""
    asked = []
    for index in SCENES:
        scene = sample("test", index, 128)
        asked.append(Question(f"scene_{index}", scene.image, scene.label, scene.mask))
    for index in MOSAICS:
        made = mosaic(index, "test", 128)
        for place in (0, 3):
            name = f"mosaic_{index}_{CLASSES[made.labels[place]]}"
            asked.append(Question(name, made.image, made.labels[place], made.masks[place]))
    return asked


@contextmanager
def server(port: int | None = None) -> Iterator[str]:
    """The service in a process of its own on a free loopback port, ready; stopped again at the end."""
    port = port or _free_port()
    command = [sys.executable, "-m", "bentoml", "serve", SERVICE, "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"BENTOML_DO_NOT_TRACK": "true"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=STOPPING_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(client: httpx.Client, question: Question) -> Reply:
    """Explain one picture twice, by the plain gradient and by ParchGrad, and fetch the overlay."""
    image = {"image": ("image.png", _png(question.image), "image/png")}
    options = {"target": CLASSES[question.target], "saliency": "float32"}
    plain = _json(client.post("/explain", files=image, data=options | {"rule": "false"}))
    ours = _json(client.post("/explain", files=image, data=options))
    drawn = client.post("/explain", files=image, data=options, headers={"Accept": "image/png"}).raise_for_status()
    best = ours["predictions"][0]
    return Reply(best["label"], best["probability"], _map(plain), _map(ours), drawn.content)


def contact_sheet(pairs: list[tuple[Question, Reply]], path: Path) -> None:
    """One row a picture: image, plain gradient, ParchGrad."""
    from matplotlib.figure import Figure

    columns = ("image", "plain gradient", "ParchGrad")
    per_row = 2
    rows = -(-len(pairs) // per_row)
    figure = Figure(figsize=(2.05 * 3 * per_row + 0.5, 2.32 * rows + 0.3), dpi=88, layout="constrained")
    grid = figure.subplots(rows, 3 * per_row, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, (question, reply) in enumerate(pairs):
        row, first = divmod(number, per_row)
        cells = grid[row, 3 * first : 3 * first + 3]
        pictures = (question.image, _drawn(question, reply.gradient), _drawn(question, reply.parchgrad))
        for axes, picture in zip(cells, pictures, strict=True):
            axes.imshow(picture, interpolation="lanczos")
        cells[0].set_title(f"“{CLASSES[question.target]}”", fontsize=10, fontweight="bold")
        for axes, name, saliency in zip(cells[1:], columns[1:], (reply.gradient, reply.parchgrad), strict=True):
            axes.set_title(f"{name}: {mass_share(saliency, question.mask):.0%}", fontsize=10)
    figure.suptitle("Share of each map on the object asked for", fontsize=11)
    figure.savefig(path)


@click.command(help="Serve the bundled model, explain sample pictures over HTTP, and write pictures to OUT.")
@click.option("--out", default=Path("out"), show_default=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--port", type=int, help="Port to serve on.  [default: a free one]")
def main(out: Path, port: int | None) -> None:
    console = Console(width=110)
    out.mkdir(parents=True, exist_ok=True)
    asked = questions()
    with (
        console.status("starting the service"),
        server(port) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        replies = [ask(client, question) for question in asked]
    pairs = list(zip(asked, replies, strict=True))
    view = Table("picture", "target", "prediction", "probability", "on target: gradient", "ParchGrad")
    for question, reply in pairs:
        (out / f"{question.name}.png").write_bytes(_png(question.image))
        (out / f"{question.name}.overlay.png").write_bytes(reply.overlay)
        shares = [f"{mass_share(m, question.mask):.2f}" for m in (reply.gradient, reply.parchgrad)]
        view.add_row(question.name, CLASSES[question.target], reply.prediction, f"{reply.probability:.2f}", *shares)
    contact_sheet(pairs, out / "contact_sheet.png")
    console.print(view)
    console.print(f"{len(pairs)} pictures, their overlays and contact_sheet.png are in {out}/")


def _drawn(question: Question, saliency: NDArray[np.float32]) -> NDArray[np.uint8]:
    return overlay(question.image, saliency, mode="grayscale", smooth=1.0)


def _map(result: dict[str, Any]) -> NDArray[np.float32]:
    saliency = result["explanation"]["saliency"]
    values = np.frombuffer(base64.b64decode(saliency["data"]), "<f4")
    return values.reshape(saliency["shape"])


def _json(response: httpx.Response) -> dict[str, Any]:
    """The single result of an answer. Raises click.ClickException with the service's own words."""
    if response.status_code != 200:
        raise click.ClickException(f"the service answered {response.status_code}: {response.text}")
    result: dict[str, Any] = response.json()["results"][0]
    return result


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(STARTING_TRIES):
        if process.poll() is not None:
            raise click.ClickException(f"the service stopped while starting, exit status {process.returncode}")
        try:
            if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise click.ClickException("the service did not become ready")


if __name__ == "__main__":
    main()
