"""Faults of the running service: what a caller sees of each, and that it is what docs/service.md says.

No time is asserted here; `python -m benchmarks.service_faults` prints how long each recovery takes.
"""

import asyncio
import concurrent.futures
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

import parchgrad
from parchgrad import golden
from parchgrad.preprocessing import Preprocessing
from service.fleet import POLL_SECONDS, Fleet
from service.settings import Settings
from tests.service.conftest import COVERED, Home, files, picture, png
from tests.service.serving import PROJECT_ROOT, SERVICE, Server, environment, serving
from tests.service.test_batch_mates import Busy
from tests.service.test_repository import ADMIN, Shelf, change, index, shelf  # noqa: F401 - a fixture
from tests.service.test_server import Result, distance, explain, refused, saliency

PICTURES = [png(picture(seed)) for seed in range(4)]
TOLERANCE = 1e-4  # of a map in one batch to the same in another


# --- callers that go on until told to stop -------------------------------------------------------------------


@dataclass
class Calls:
    """What they got: (which picture, the answer), and connections that ended without an answer."""

    answers: list[tuple[int, httpx.Response]] = field(default_factory=list)
    lost: list[httpx.TransportError] = field(default_factory=list)

    def statuses(self) -> Counter[int]:
        return Counter(answer.status_code for _, answer in self.answers)

    def wait_for(self, more: int) -> None:
        """Until `more` answers have come since now."""
        enough = len(self.answers) + more
        while len(self.answers) < enough:
            time.sleep(0.01)

    def check(self, alone: Sequence[Result]) -> None:
        """Every answer received is right, or says that it is none."""
        for which, answer in self.answers:
            if answer.status_code == 200:
                (result,) = answer.json()["results"]
                assert distance(saliency(result), saliency(alone[which])) < TOLERANCE
                assert result["predictions"][0]["index"] == alone[which]["predictions"][0]["index"]
            else:
                refused(answer, 503, "not_ready")
                assert int(answer.headers["retry-after"]) >= 1


@contextmanager
def calling(server: Server, callers: int = 6, *, keep_alive: bool = True) -> Iterator[Calls]:
    """Maps asked for by `callers` threads; one that finds nobody listening waits a little before it asks again."""
    calls, over = Calls(), threading.Event()
    limits = httpx.Limits(max_keepalive_connections=None if keep_alive else 0)

    def call(number: int) -> None:
        which = number % len(PICTURES)
        with httpx.Client(base_url=server.url, timeout=120, limits=limits) as client:
            while not over.is_set():
                try:
                    answer = client.post("/explain", files=files(PICTURES[which]), data=ASKED)
                    calls.answers.append((which, answer))
                except httpx.TransportError as error:
                    calls.lost.append(error)
                    time.sleep(0.05)

    with concurrent.futures.ThreadPoolExecutor(callers) as pool:
        threads = [pool.submit(call, number) for number in range(callers)]
        try:
            yield calls
        finally:
            over.set()
        for thread in threads:
            thread.result()


ASKED = {"target": "1", "saliency": "float32"}


def expected(server: Server) -> list[Result]:
    return [explain(server, image, target="1") for image in PICTURES]


def wait_for_workers(server: Server, count: int) -> None:
    while len(server.workers()) != count or server.metric("parchgrad_ready_workers") != count:
        time.sleep(0.05)


# --- a worker killed -----------------------------------------------------------------------------------------


def test_a_killed_worker_costs_its_own_connections_and_nothing_else(home: Home, tmp_path: Path) -> None:
    chosen = {**home.settings, "workers": 2, "timeout_ms": 120_000}
    with serving(tmp_path / "home", settings=chosen) as server:
        wait_for_workers(server, 2)
        alone = expected(server)
        killed, other = server.workers()
        with calling(server, keep_alive=False) as calls:
            calls.wait_for(20)
            assert not calls.lost
            killed.kill()
            killed.wait()
            calls.wait_for(20)
            assert other in server.workers()
            wait_for_workers(server, 2)
            calls.wait_for(20)
        print(f"\n{calls.statuses()} and {len(calls.lost)} connections lost, of 6 callers at work")
        calls.check(alone)
        assert calls.statuses()[200] == len(calls.answers)  # the new worker is not asked before it is ready
        assert len(calls.lost) <= 6 + 6  # those it was computing, and those it had not yet accepted
        assert other in server.workers()
        assert killed.pid not in [worker.pid for worker in server.workers()]
        assert server.stop() == 0


def test_a_worker_takes_no_call_before_it_is_ready_while_another_is(home: Home, tmp_path: Path) -> None:
    """The server listens once this wait is over; the process with the number 1 plays the other worker."""

    def report(ready: bool) -> None:
        (tmp_path / "repository-1.json").write_text(json.dumps({"done": {}, "failures": {}, "ready": ready}))

    async def scenario() -> None:
        fleet = Fleet(Settings(**home.settings), tmp_path, lambda: None)  # type: ignore[arg-type]
        await fleet.wait_behind_others()  # nobody else is there
        report(False)
        await fleet.wait_behind_others()  # nor ready: somebody has to answer that it loads
        report(True)
        waiting = asyncio.ensure_future(fleet.wait_behind_others())
        for _ in range(3):
            await asyncio.sleep(POLL_SECONDS)
        assert not waiting.done()
        fleet.repository.start()
        await waiting
        assert fleet.repository.ready
        await fleet.repository.close()

    asyncio.run(scenario())


# --- SIGTERM -------------------------------------------------------------------------------------------------


def answered_by(server: Server, route: str, status: int) -> int:
    """How many answers the workers counted, after they have ended."""
    (folder,) = server.log.parent.glob("prometheus_multiproc_dir")
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    wanted = {"route": route, "status": str(status)}.items()
    samples = [sample for family in registry.collect() for sample in family.samples]
    counted = (one for one in samples if one.name == "parchgrad_requests_total" and wanted <= one.labels.items())
    return round(sum(one.value for one in counted))


@pytest.mark.parametrize(("workers", "keep_alive"), [(1, True), (1, False), (2, True)])
def test_sigterm_under_load_loses_nothing(home: Home, tmp_path: Path, workers: int, keep_alive: bool) -> None:
    """Readiness goes first, while requests are still taken; those at work end with 200, then everything ends with 0."""
    chosen = {**home.settings, "workers": workers, "drain_ms": 2000, "timeout_ms": 120_000}
    with serving(tmp_path / "home", settings=chosen) as server:
        wait_for_workers(server, workers)
        alone = expected(server)
        with calling(server, keep_alive=keep_alive) as calls:
            calls.wait_for(10)
            server.process.send_signal(signal.SIGTERM)
            while httpx.get(f"{server.url}/readyz").status_code == 200:
                time.sleep(0.01)
            refused(httpx.get(f"{server.url}/readyz"), 503, "not_ready")
            while_draining = httpx.post(f"{server.url}/predict", files=files(PICTURES[0]), timeout=60)
            assert while_draining.status_code == 200
            assert not calls.lost
            assert server.process.wait() == 0
        calls.check(alone)
        assert calls.statuses() == {200: len(calls.answers)}
        assert answered_by(server, "/explain", 200) == len(calls.answers) + len(alone)
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url)


def test_a_request_longer_than_the_drain_is_answered(home: Home, tmp_path: Path) -> None:
    with serving(tmp_path / "home", settings={**home.settings, "drain_ms": 50, "timeout_ms": 120_000}) as server:
        with Busy(server, 8) as busy:
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait() == 0
            assert busy.done() or busy.result().status_code == 200
        assert busy.result().status_code == 200
        assert all(one["status"] == "ok" for one in busy.result().json()["results"])


def test_a_caller_that_does_not_read_its_answers_keeps_nobody_from_ending(home: Home, tmp_path: Path) -> None:
    """They are larger than the buffers of two sockets, and the server would wait for their end for ever."""
    short = {"timeout_ms": 1000, "max_timeout_ms": 1000, "body_timeout_ms": 1000}
    with (
        serving(tmp_path / "home", settings={**home.settings, **short}) as server,
        raw_connection(server) as connection,
    ):
        size = len(server.client.get("/docs.json").content)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(b"GET /docs.json HTTP/1.1\r\nHost: x\r\n\r\n" * (20_000_000 // size))
        written = -1.0
        while written != (written := server.metric("parchgrad_requests_total", route="/docs.json")):
            time.sleep(0.5)
        assert written * size < 20_000_000
        assert server.stop() == 0


# --- callers that hang up ------------------------------------------------------------------------------------


def raw_connection(server: Server) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port or 80), timeout=60)


def raw_request(path: str, *images: bytes) -> bytes:
    request = httpx.Request("POST", f"http://x{path}", files=files(*images))
    body = request.read()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {request.headers['content-type']}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def hang_up(server: Server, content: bytes, *, reading: bool, resetting: bool) -> None:
    connection = raw_connection(server)
    with suppress(ConnectionError):  # a caller that is refused is closed first
        connection.sendall(content)
        if reading:
            connection.recv(1)
    if resetting:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def noise(side: int) -> bytes:
    """A picture that does not compress: 3 x side x side bytes."""
    return png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)))


POOL_THREADS = 40  # anyio's, which write the uploads that wait on disk


def test_two_thousand_callers_that_hang_up_leave_nothing_behind(shelf: Shelf) -> None:  # noqa: F811
    """In the head, in the body, before the answer, within it, with FIN and with RST; some bodies are on disk."""
    small, large = (raw_request("/explain?target=1", image) for image in (PICTURES[0], noise(1100)))
    partly = [small[:1], small[:40], small[:-10], large[: len(large) // 2]]
    ways = [(content, False) for content in (*partly, small, large)] + [(small, True)] * 2
    with serving(shelf.root / "home", settings=shelf.settings) as server:
        with concurrent.futures.ThreadPoolExecutor(32) as pool:  # everything once: threads, files, buffers
            list(pool.map(lambda _: server.client.post("/explain", files=files(PICTURES[0])), range(64)))
        (worker,) = server.workers()
        server.metric("parchgrad_in_flight_requests")
        descriptors, threads = worker.num_fds(), worker.num_threads()
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            gone = [
                pool.submit(hang_up, server, content, reading=reading, resetting=bool(number // len(ways) % 2))
                for number in range(2000)
                for content, reading in (ways[number % len(ways)],)
            ]
            for one in gone:
                one.result()
        while server.metric("parchgrad_in_flight_requests") > 1:  # this one
            time.sleep(0.05)
        assert server.metric("parchgrad_rejects_total", reason="client_closed_request") > 500
        assert server.metric("parchgrad_admitted_images") == 0
        assert server.metric("parchgrad_queue_depth_images") == 0
        assert explain(server, PICTURES[0])["explanation"]["status"] == "ok"
        while worker.num_fds() > descriptors:
            time.sleep(0.05)
        assert worker.num_threads() <= threads + POOL_THREADS
        assert change(server, "tiny", "unload").status_code == 200  # no request has kept its lease
        assert index(server) == {}
        assert change(server, "tiny", "load").status_code == 200
        assert server.workers() == [worker]
        assert server.stop() == 0


# --- memory --------------------------------------------------------------------------------------------------


@pytest.fixture
def large_inputs(shelf: Shelf) -> Shelf:  # noqa: F811
    """The tiny model, at the size of whatever picture comes."""
    tiny = parchgrad.load_model(shelf.root / "models" / "tiny")
    parchgrad.add_model(
        "sizes", architecture="squeezenet1_1", weights=tiny.module.state_dict(), labels=tiny.labels,
        preprocessing=Preprocessing(size=(64, 64), rule="native", max_side=4096), models_dir=shelf.root / "models",
    )  # fmt: skip
    model = parchgrad.load_model(shelf.root / "models" / "sizes")
    table = shelf.root / "tables" / "sizes" / "1"
    parchgrad.SelectionTable.random(model, COVERED, seed=0).save(table)
    golden.record(parchgrad.Explainer(model, parchgrad.load_table(table, model)), table)
    return shelf


def limit_memory(worker: psutil.Process, more: int | None) -> None:
    """`more` bytes of address space above what it has now; None: no limit."""
    most = resource.RLIM_INFINITY if more is None else worker.memory_info().vms + more
    worker.rlimit(psutil.RLIMIT_AS, (most, resource.RLIM_INFINITY))


@pytest.mark.skipif(not hasattr(psutil, "RLIMIT_AS"), reason="the system limits no other process's memory")
def test_want_of_memory_is_the_large_images_and_passes(large_inputs: Shelf) -> None:
    """A picture's map needs more than its prediction: the map is left out first, then it is 503; then all is well."""
    small, middle, huge = (png(picture(1, (side, side))) for side in (64, 1500, 3000))
    settings = {**large_inputs.settings, "model": "sizes", "timeout_ms": 120_000, "decode_workers": 1}
    with serving(large_inputs.root / "home", settings=settings) as server:
        post = server.client.post
        before = explain(server, small, target="1")
        for _ in range(3):
            post("/explain", files=files(*[small] * 8))
        assert post("/predict", files=files(middle)).status_code == 200  # the first of a size costs more
        (worker,) = server.workers()
        idle = server.resident_bytes()
        # The prediction needs 250 MB, this map, by autograd, 830; what was there before varies by 100.
        limit_memory(worker, 600_000_000)
        shed = post("/explain", files=files(middle), data={"target": "1", "method": "guided_backprop"})
        assert shed.status_code == 200, shed.text
        assert shed.json()["results"][0]["explanation"]["status"] == "shed"
        assert "memory" in shed.json()["results"][0]["explanation"]["reason"]
        for path in ("/predict", "/explain"):
            answer = post(path, files=files(huge))
            assert "memory" in refused(answer, 503, "out_of_memory")
            assert int(answer.headers["retry-after"]) >= 1
        mixed = post("/predict", files=files(small, huge)).json()["results"]
        assert [one["status"] for one in mixed] == ["ok", "error"]
        assert mixed[1]["error"]["code"] == "out_of_memory"
        assert np.array_equal(saliency(explain(server, small, target="1")), saliency(before))
        assert server.metric("parchgrad_out_of_memory_total", kind="explain") >= 2  # each batch is tried twice
        limit_memory(worker, None)
        assert explain(server, middle, target="1")["explanation"]["status"] == "ok"
        assert server.workers() == [worker]
        print(f"resident: {idle / 1e6:.0f} MB idle, {server.resident_bytes() / 1e6:.0f} MB afterwards")
        assert server.stop() == 0


# --- files under the running service -------------------------------------------------------------------------


def swapped(content: bytes) -> bytes:
    """As long, and another: every byte of the second half turned over."""
    half = len(content) // 2
    return content[:half] + bytes(255 - byte for byte in content[half:])


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "swapped": swapped,
}


def model_files(shelf: Shelf) -> list[Path]:  # noqa: F811
    return sorted(
        path
        for folder in ("models", "tables")
        for path in (shelf.root / folder / "tiny" / "1").rglob("*")
        if path.is_file()
    )


def test_files_damaged_under_the_running_service_change_no_answer(shelf: Shelf) -> None:  # noqa: F811
    """In place, as a copy that runs out of disk does. A load is refused with the reason; the old version goes on."""
    with serving(shelf.root / "home", settings=shelf.settings) as server:
        before = [explain(server, image) for image in PICTURES]
        (worker,) = server.workers()
        refusals = {}
        for path in model_files(shelf):
            whole = path.read_bytes()
            for name, damage in DAMAGES.items():
                path.write_bytes(damage(whole))  # the same inode
                answer = change(server, "tiny", "load")
                refusals[f"{path.name} {name}"] = (answer.status_code, answer.json().get("error"))
                after = [explain(server, image) for image in PICTURES]
                for one, other in zip(before, after, strict=True):
                    assert np.array_equal(saliency(one), saliency(other)), path
                    assert one["predictions"] == other["predictions"], path
            path.write_bytes(whole)
        for name, (status, reason) in refusals.items():
            print(f"\n{name}: {status} {reason}", end="")
        assert {status for status, _ in refusals.values()} == {409}
        assert server.client.get("/readyz").status_code == 200
        assert index(server) == {("tiny", "1"): "READY"}
        assert server.workers() == [worker]
        assert change(server, "tiny", "load").status_code == 200  # all files are whole again


@pytest.mark.parametrize("name", ["weights.safetensors", "table.safetensors"])
def test_a_service_does_not_begin_on_a_truncated_file(shelf: Shelf, name: str) -> None:  # noqa: F811
    (path,) = [path for path in model_files(shelf) if path.name == name]
    os.truncate(path, path.stat().st_size // 2)
    not_ready(shelf, "tiny", "sha256")


def test_a_service_does_not_begin_on_another_models_table(shelf: Shelf) -> None:  # noqa: F811
    shelf.add("other", 2)
    ours, theirs = (shelf.root / "tables" / name / "1" for name in ("tiny", "other"))
    for path in theirs.iterdir():
        (ours / path.name).write_bytes(path.read_bytes())
    not_ready(shelf, "tiny", "other")


def not_ready(shelf: Shelf, name: str, reason: str) -> None:  # noqa: F811
    """A server on this shelf is alive, not ready, and says why."""
    with serving(shelf.root / "home", settings=shelf.settings, wait_ready=False) as server:
        while server.client.post("/v2/repository/index").json()[0]["state"] == "LOADING":
            time.sleep(0.05)
        (state,) = server.client.post("/v2/repository/index").json()
        assert (state["name"], state["state"]) == (name, "UNAVAILABLE")
        assert reason in state["reason"], state
        refused(server.client.get("/readyz"), 503, "not_ready")
        answer = server.client.post("/explain", files=files(PICTURES[0]))
        assert refused(answer, 503, "not_ready") == state["reason"]
        assert server.client.get("/livez").status_code == 200
        assert server.stop() == 0


def test_a_table_of_another_model_is_not_loaded(shelf: Shelf) -> None:  # noqa: F811
    shelf.add("other", 2)
    with serving(shelf.root / "home", settings=shelf.settings) as server:
        before = explain(server, PICTURES[0])
        for path in (shelf.root / "tables" / "other" / "1").iterdir():
            (shelf.root / "tables" / "tiny" / "1" / path.name).write_bytes(path.read_bytes())
        answer = change(server, "tiny", "load")
        assert answer.status_code == 409
        assert "other" in answer.json()["error"]
        assert np.array_equal(saliency(explain(server, PICTURES[0])), saliency(before))


def test_one_bad_model_does_not_keep_a_good_one_from_serving(shelf: Shelf) -> None:  # noqa: F811
    shelf.add("other", 2)
    os.truncate(shelf.root / "models" / "other" / "1" / "weights.safetensors", 1000)
    settings = {**shelf.settings, "models": "other"}
    with serving(shelf.root / "home", settings=settings, wait_ready=False) as server:
        while "LOADING" in index(server).values():
            time.sleep(0.05)
        assert index(server) == {("other", ""): "UNAVAILABLE", ("tiny", "1"): "READY"}
        refused(server.client.get("/readyz"), 503, "not_ready")
        assert explain(server, PICTURES[0])["explanation"]["status"] == "ok"
        answer = server.client.post("/predict", files=files(PICTURES[0]), data={"model": "other"})
        assert "sha256" in refused(answer, 503, "not_ready")
        assert change(server, "other", "unload").status_code == 200  # on purpose: then the rest is ready
        assert server.client.get("/readyz").status_code == 200


def test_without_a_folder_of_models_it_says_so(shelf: Shelf) -> None:  # noqa: F811
    (shelf.root / "models").rename(shelf.root / "elsewhere")
    with (
        pytest.raises(RuntimeError, match=r"PARCHGRAD_MODELS_DIR='.*models': expected a folder that exists\."),
        serving(shelf.root / "home", settings=shelf.settings),
    ):
        pass


# --- full disks ----------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own of `size`; skips where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("required", [True, False])
def test_an_audit_log_without_room(home: Home, tmp_path: Path, required: bool) -> None:
    with small_disk(tmp_path / "disk", "32k") as disk:
        log = disk / "audit.jsonl"
        chosen = {**home.settings, "audit_log": log, "audit_required": str(required).lower()}
        with serving(tmp_path / "home", settings=chosen) as server:
            explain(server, PICTURES[0])
            (disk / "filler").write_bytes(b"-" * 20_000)
            with suppress(OSError), (disk / "more").open("wb", buffering=0) as filler:
                while True:
                    filler.write(b"-" * 1024)
            answers = [server.client.post("/explain", files=files(*PICTURES), data=ASKED) for _ in range(8)]
            late = answers[-4:]  # the last page of the log may still have had some room
            if required:
                for answer in late:
                    refused(answer, 503, "audit_unavailable")
                    assert int(answer.headers["retry-after"]) >= 1
                assert server.metric("parchgrad_audit_lost_total") == 0
            else:
                assert {answer.status_code for answer in answers} == {200}
                assert server.metric("parchgrad_audit_lost_total") >= 4 * len(late)
            assert server.client.get("/readyz").status_code == 200
            (disk / "filler").unlink()
            (disk / "more").unlink()
            lost = server.metric("parchgrad_audit_lost_total")
            after = server.client.post("/explain", files=files(*PICTURES), headers={"X-Request-Id": "after"})
            assert after.status_code == 200
            assert server.metric("parchgrad_audit_lost_total") == lost
            lines = [json.loads(line) for line in log.read_text().splitlines()]  # each whole
            assert [line["image"] for line in lines if line["request_id"] == "after"] == [0, 1, 2, 3]
            written = sum(answer.status_code == 200 for answer in answers) if required else 8 - lost / 4
            assert len(lines) == 1 + 4 * written + 4


def test_a_disk_too_small_for_the_uploads(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files above 1 MB wait on disk. Without room they are refused, the others go on, and the room comes back."""
    large = noise(1100)
    with small_disk(tmp_path / "disk", "5m") as disk:
        monkeypatch.setenv("TMPDIR", str(disk))
        with serving(tmp_path / "home", settings=home.settings) as server:
            assert server.client.post("/predict", files=files(large)).status_code == 200
            for _ in range(3):
                answer = server.client.post("/predict", files=files(*[large] * 3))
                refused(answer, 503, "storage_full")
                raw = server.client.post("/predict", content=large, headers={"Content-Type": "image/png"})
                assert raw.status_code == 200
            assert server.client.post("/predict", files=files(*PICTURES)).status_code == 200
            assert not [path for path in disk.rglob("*") if path.is_file()]


# --- starting ------------------------------------------------------------------------------------------------


def test_a_second_server_on_the_same_port_ends_and_leaves_the_first_alone(home: Home, tmp_path: Path) -> None:
    with serving(tmp_path / "home", settings=home.settings) as server:
        before = explain(server, PICTURES[0])
        counted = server.metric("parchgrad_batch_images_count", kind="explain")
        port = str(httpx.URL(server.url).port)
        for folder in ("other", "home"):
            second = subprocess.run(
                [sys.executable, "-m", "bentoml", "serve", SERVICE, "--host", "127.0.0.1", "--port", port],
                cwd=PROJECT_ROOT, env=environment(tmp_path / folder, **home.settings),
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert second.returncode != 0
            assert "in use" in second.stdout + second.stderr
            assert np.array_equal(saliency(explain(server, PICTURES[0])), saliency(before))
            assert server.client.get("/readyz").status_code == 200
            if folder == "other":  # in the same home it has emptied the first one's metrics, as docs/service.md says
                assert server.metric("parchgrad_batch_images_count", kind="explain") == counted + 1
        assert server.stop() == 0


# --- loading while requests fly ------------------------------------------------------------------------------


def test_loading_a_large_model_fails_no_request(shelf: Shelf) -> None:  # noqa: F811
    shelf.add("large", 3, "alexnet")
    settings = {**shelf.settings, "timeout_ms": 120_000}
    with serving(shelf.root / "home", settings=settings) as server:
        alone = expected(server)
        with calling(server, 3) as calls:
            calls.wait_for(10)
            assert change(server, "large", "load").status_code == 200
            calls.wait_for(10)
            assert change(server, "large", "unload").status_code == 200
            calls.wait_for(10)
        calls.check(alone)
        assert calls.statuses() == {200: len(calls.answers)}
        assert not calls.lost
