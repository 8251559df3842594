"""Every hostile file, posted to the running service: a right answer or a 4xx with a code, at a bounded cost."""

import threading
import time
from pathlib import Path

import pytest

from service.errors import STATUS
from service.schemas import ErrorAnswer, ExplainAnswer
from tests.service.conftest import files, picture, png
from tests.service.serving import Server
from tests.service.test_images import REFUSED, REFUSED_SUITE

MAX_EXTRA_BYTES = 600_000_000


class Sampler(threading.Thread):
    """The most resident memory the workers were seen at."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.most, self._server, self._over = 0, server, threading.Event()

    def run(self) -> None:
        workers = self._server.workers()
        while not self._over.is_set():
            self.most = max(self.most, sum(worker.memory_info().rss for worker in workers))
            time.sleep(0.002)

    def finish(self) -> int:
        self._over.set()
        self.join()
        return self.most


def test_every_file_is_answered_right_or_with_a_4xx(server: Server, bad_images: Path) -> None:
    server.client.post("/explain", files=files(png(picture())))  # the worker has done everything once
    idle = server.resident_bytes()
    sampler = Sampler(server)
    sampler.start()
    expected = {**REFUSED, **REFUSED_SUITE}
    paths = [path for folder in (bad_images, bad_images / "pngsuite") for path in sorted(folder.glob("*.*"))]
    assert len(paths) > 200
    for path in paths:
        response = server.client.post("/explain", files={"image": (path.name, path.read_bytes())})
        if path.name in expected:
            code = ErrorAnswer.model_validate_json(response.text).error.code
            assert (path.name, code, response.status_code) == (path.name, expected[path.name], STATUS[code])
            assert 400 <= response.status_code < 500
        else:
            assert response.status_code == 200, (path.name, response.text)
            (result,) = ExplainAnswer.model_validate_json(response.text).results
            assert result.status == "ok", path.name
    assert sampler.finish() - idle < MAX_EXTRA_BYTES
    assert server.client.post("/explain", files=files(png(picture()))).status_code == 200


def test_bombs_in_company_cost_no_more(server: Server, bad_images: Path) -> None:
    """All of them at once from eight callers, with good pictures between: the good ones are answered."""
    bombs = [path.read_bytes() for path in sorted(bad_images.glob("bomb_*"))]
    good, idle = png(picture()), server.resident_bytes()
    expected = server.client.post("/explain", files=files(good)).json()["results"][0]["predictions"]
    sampler = Sampler(server)
    sampler.start()
    failures: list[object] = []

    def caller() -> None:
        results = server.client.post("/explain", files=files(*bombs, good)).json()["results"]
        if any(one["status"] != "error" for one in results[:-1]) or results[-1]["status"] != "ok":
            failures.append(results)
        elif [one["index"] for one in results[-1]["predictions"]] != [one["index"] for one in expected]:
            failures.append(results[-1])

    callers = [threading.Thread(target=caller) for _ in range(8)]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    assert not failures
    assert sampler.finish() - idle < MAX_EXTRA_BYTES


@pytest.mark.parametrize("name", ["tiny_1x5000.png", "tiny_5000x1.png", "tiny_1x1.png"])
def test_odd_shapes_are_drawn_too(server: Server, bad_images: Path, name: str) -> None:
    response = server.client.post(
        "/explain", files=files((bad_images / name).read_bytes()), headers={"Accept": "image/png"}
    )
    assert response.headers["content-type"] == "image/png"


def test_a_worker_full_of_large_images_still_answers(server: Server) -> None:
    """Four pictures at the pixel limit at once: decoded one after another, and /livez does not wait for them."""
    from PIL import Image

    large, idle = png(Image.new("RGB", (7000, 7000), "navy")), server.resident_bytes()
    sampler = Sampler(server)
    sampler.start()
    post = {"target": server.client.post, "args": ("/predict",), "kwargs": {"files": files(large)}}
    callers = [threading.Thread(**post) for _ in range(4)]
    for one in callers:
        one.start()
    longest = 0.0
    while any(one.is_alive() for one in callers):
        start = time.perf_counter()
        assert server.client.get("/livez").status_code == 200
        longest = max(longest, time.perf_counter() - start)
    extra = sampler.finish() - idle
    print(f"extra {extra / 1e6:.0f} MB, longest /livez {longest * 1e3:.0f} ms")
    assert extra < MAX_EXTRA_BYTES
