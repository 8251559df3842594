"""A little of everything callers send, good and bad, through every HTTP protocol; the bundled model's own scenes."""

import base64
import io
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Self

import httpx
from PIL import Image

from scenes.generator import sample

Ask = Callable[[httpx.Client, bytes], httpx.Response]


def scenes(count: int = 12) -> list[bytes]:
    """Held-out scenes, encoded."""
    made = []
    for index in range(count):
        buffer = io.BytesIO()
        Image.fromarray(sample("test", index, 128).image).save(buffer, "PNG")
        made.append(buffer.getvalue())
    return made


def _native(route: str, image: bytes | None = None, copies: int = 1, **options: str) -> Ask:
    def ask(client: httpx.Client, scene: bytes) -> httpx.Response:
        files = [("image", ("scene.png", scene if image is None else image, "image/png"))] * copies
        return client.post(route, files=files, params=options)

    return ask


def _v1(verb: str) -> Ask:
    def ask(client: httpx.Client, scene: bytes) -> httpx.Response:
        encoded = {"image": {"b64": base64.b64encode(scene).decode()}}
        return client.post(f"/v1/models/scenes:{verb}", json={"instances": [encoded]})

    return ask


def _v2(client: httpx.Client, scene: bytes) -> httpx.Response:
    encoded = base64.b64encode(scene).decode()
    body = {
        "inputs": [{"name": "image_bytes", "datatype": "BYTES", "shape": [1], "data": [encoded]}],
        "outputs": [{"name": "probabilities"}],
    }
    return client.post("/v2/models/scenes/infer", json=body)


# Status -> what brings it about; most of it good.
MIX: tuple[tuple[int, Ask], ...] = (
    (200, _native("/predict")),
    (200, _native("/explain", saliency="none")),
    (200, _native("/predict", copies=3)),
    (200, _native("/explain", saliency="none", copies=2)),
    (200, _native("/explain", saliency="none", quantile="0.3")),
    (200, _v1("predict")),
    (200, _v1("explain")),
    (200, _v2),
    (200, lambda client, scene: client.get("/models")),
    (400, _native("/predict", image=b"")),
    (415, _native("/explain", image=b"no image at all")),
    (422, _native("/explain", quantile="7")),
    (404, _native("/predict", model="nobody")),
    (404, lambda client, scene: client.get("/elsewhere")),
    (200, _native("/explain", saliency="none")),
)
LATE: Ask = _native("/explain", saliency="none", method="smoothgrad", timeout_ms="1")
MANY: Ask = _native("/explain", saliency="none", copies=4)


class Traffic:
    """Counts what was answered otherwise than expected, (expected, found)."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client = httpx.Client(base_url=url, timeout=120)
        self._scenes = scenes()
        self.wrong: Counter[tuple[int, int]] = Counter()
        self.flooded: Counter[int] = Counter()

    @contextmanager
    def mixed(self) -> Iterator[None]:
        """One of `MIX` after the other, in a thread, for as long as the block lasts."""
        over = threading.Event()

        def send() -> None:
            for scene, (status, ask) in zip(itertools.cycle(self._scenes), itertools.cycle(MIX), strict=False):
                if over.wait(0.02):
                    return
                found = ask(self._client, scene).status_code
                if found != status:
                    self.wrong[status, found] += 1

        thread = threading.Thread(target=send)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def once(self, ask: Ask) -> int:
        return ask(self._client, self._scenes[0]).status_code

    @contextmanager
    def flood(self, callers: int) -> Iterator[None]:
        """So many callers, each asking for four maps again and again.

        Each time by a connection of its own: one that is kept stays with its worker, and where most of them happen to
        be one worker's the other has nothing to do.
        """
        over = threading.Event()
        fresh = httpx.Client(base_url=self._url, timeout=120, limits=httpx.Limits(max_keepalive_connections=0))

        def send() -> None:
            for scene in itertools.cycle(self._scenes):
                if over.is_set():
                    return
                self.flooded[MANY(fresh, scene).status_code] += 1

        with fresh, ThreadPoolExecutor(callers) as pool:
            jobs = [pool.submit(send) for _ in range(callers)]
            try:
                yield
            finally:
                over.set()
            for job in jobs:
                job.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._client.close()
