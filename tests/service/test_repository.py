"""Several models with versions in one service: chosen by request, changed while requests run, given back."""

import concurrent.futures
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torchvision import models

import parchgrad
from parchgrad import golden
from parchgrad.preprocessing import Preprocessing
from tests.service.conftest import Home, files, picture, png
from tests.service.serving import Server, serving
from tests.service.test_server import refused

TOKEN = "the operator's token"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
IMAGE = files(png(picture()))


@dataclass(frozen=True)
class Shelf:
    """A model repository on disk that tests change while a server runs."""

    root: Path

    @property
    def settings(self) -> dict[str, object]:
        admin = hashlib.sha256(TOKEN.encode()).hexdigest()
        return {
            "models_dir": self.root / "models", "tables_dir": self.root / "tables", "graphs_dir": self.root / "graphs",
            "model": "tiny", "threads": 1, "drain_ms": 0, "admin_keys": f"ops:{admin}",
        }  # fmt: skip

    def add(self, name: str, seed: int, architecture: str = "squeezenet1_1") -> str:
        """A new version, of other random weights; returns its number."""
        torch.manual_seed(seed)
        network = models.get_model(architecture, weights=None, num_classes=10)
        folder = parchgrad.add_model(
            name, architecture=architecture, weights=network.state_dict(), labels=[f"thing {i}" for i in range(10)],
            preprocessing=Preprocessing(size=(64, 64), rule="shorter_side", resize=72), models_dir=self.root / "models",
        )  # fmt: skip
        model = parchgrad.load_model(folder)
        table = self.root / "tables" / name / folder.name
        parchgrad.SelectionTable.random(model, 8, seed=seed).save(table)
        golden.record(parchgrad.Explainer(model, parchgrad.load_table(table, model)), table)
        return folder.name

    def logits(self, name: str, version: str) -> Any:
        model = parchgrad.load_model(self.root / "models" / name / version)
        tensor, _ = model.preprocessing.apply(picture())
        with torch.no_grad():
            return model.module(tensor[None])[0]


@pytest.fixture
def shelf(home: Home, tmp_path: Path) -> Shelf:
    """The tiny model as version 1, and nothing else."""
    shutil.copytree(home.root / "models", tmp_path / "models")
    shutil.copytree(home.root / "tables", tmp_path / "tables")
    return Shelf(tmp_path)


@pytest.fixture
def server(shelf: Shelf) -> Iterator[Server]:
    with serving(shelf.root / "home", settings=shelf.settings) as running:
        yield running


def change(server: Server, name: str, what: str) -> httpx.Response:
    return server.client.post(f"/v2/repository/models/{name}/{what}", headers=ADMIN)


def index(server: Server) -> dict[tuple[str, str], str]:
    states = server.client.post("/v2/repository/index").json()
    return {(state["name"], state["version"]): state["state"] for state in states}


def identity(server: Server, **fields: str) -> dict[str, Any]:
    answer = server.client.post("/explain", files=IMAGE, data=fields)
    assert answer.status_code == 200, answer.text
    model: dict[str, Any] = answer.json()["model"]
    return model


def test_models_and_versions_are_chosen_by_request(shelf: Shelf) -> None:
    shelf.add("tiny", 1)
    shelf.add("other", 2)
    settings = {**shelf.settings, "models": "*", "versions": "all"}
    with serving(shelf.root / "home", settings=settings) as server:
        assert index(server) == {("tiny", "1"): "READY", ("tiny", "2"): "READY", ("other", "1"): "READY"}
        assert identity(server)["version"] == "2"  # the newest
        for name, version in (("tiny", "1"), ("tiny", "2"), ("other", "1")):
            asked = {"model": name, "version": version, "saliency": "none", "top_k": "10"}
            answer = server.client.post("/explain", files=IMAGE, data=asked).json()
            assert (answer["model"]["name"], answer["model"]["version"]) == (name, version)
            expected = shelf.logits(name, version).softmax(0)
            for one in answer["results"][0]["predictions"]:
                assert one["probability"] == pytest.approx(float(expected[one["index"]]), rel=1e-4)
        listed = server.client.get("/models").json()
        assert listed["default"] == "tiny"
        assert {(m["name"], m["version"]) for m in listed["models"]} == set(index(server))
        assert server.client.get("/models/tiny?version=1").json()["version"] == "1"
        post = server.client.post
        refused(post("/predict", files=IMAGE, data={"model": "absent"}), 404, "unknown_model")
        refused(post("/predict", files=IMAGE, data={"model": "../tiny"}), 404, "unknown_model")
        message = refused(post("/predict", files=IMAGE, data={"version": "3"}), 404, "unknown_version")
        assert message == "Model 'tiny' has no version '3'; it has '2', '1'."
        refused(post("/predict", files=IMAGE, data={"version": ["1", "2"]}), 422, "option_invalid")


def test_a_new_version_takes_over_without_a_dropped_request(shelf: Shelf, server: Server) -> None:
    """While callers go on, version 2 is added and loaded: every answer is right for the version that it names."""
    expected = {"1": shelf.logits("tiny", "1").softmax(0)}
    done = threading.Event()
    answers: list[Any] = []

    def call() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not done.is_set():
                answers.append(client.post("/explain", files=IMAGE, data={"saliency": "none", "top_k": "1"}))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(call) for _ in range(4)]
        try:
            version = shelf.add("tiny", 1)
            expected[version] = shelf.logits("tiny", version).softmax(0)
            for _ in range(3):  # to version 2, then twice the same again
                before = len(answers)
                assert change(server, "tiny", "load").status_code == 200
                while len(answers) < before + 8:
                    time.sleep(0.01)
        finally:
            done.set()
        for caller in callers:
            caller.result()
    assert {answer.status_code for answer in answers} == {200}
    seen = [answer.json()["model"]["version"] for answer in answers]
    assert set(seen) == {"1", "2"}
    for version, answer in zip(seen, answers, strict=True):
        (one,) = answer.json()["results"][0]["predictions"]
        assert one["probability"] == pytest.approx(float(expected[version][one["index"]]), rel=1e-4)
    assert index(server) == {("tiny", "2"): "READY"}
    refused(server.client.post("/predict", files=IMAGE, data={"version": "1"}), 404, "unknown_version")


def test_a_version_that_fails_leaves_the_old_one_at_work(shelf: Shelf, server: Server) -> None:
    before = identity(server)
    shelf.add("tiny", 1)
    table = shelf.root / "tables" / "tiny" / "2"
    (shelf.root / "tables" / "tiny" / "1" / "golden.safetensors").rename(table / "golden.safetensors")
    answer = change(server, "tiny", "load")
    assert answer.status_code == 409
    assert "olden record" in answer.json()["error"]
    assert identity(server) == before
    assert server.client.get("/readyz").status_code == 200
    assert index(server) == {("tiny", "1"): "READY"}


def test_unload_and_load_again(shelf: Shelf, server: Server) -> None:
    shelf.add("other", 2)
    refused_v2 = server.client.post("/v2/repository/models/other/load")
    assert refused_v2.status_code in (401, 403)  # no key
    assert change(server, "other", "load").status_code == 200
    assert identity(server, model="other")["name"] == "other"
    assert server.metric("parchgrad_model_info", model="other") == 1
    assert change(server, "other", "unload").status_code == 200
    refused(server.client.post("/predict", files=IMAGE, data={"model": "other"}), 404, "unknown_model")
    assert server.metric("parchgrad_model_info", model="other") == 0
    assert change(server, "other", "unload").status_code == 404
    for name in ("absent", "..", "%2e%2e%2ftiny", "a" * 300):
        assert change(server, name, "load").status_code == 404
    body = {"parameters": {"config": "{}"}}
    assert server.client.post("/v2/repository/models/tiny/load", headers=ADMIN, json=body).status_code == 422
    assert identity(server)["name"] == "tiny"
    assert change(server, "tiny", "unload").status_code == 200
    refused(server.client.post("/predict", files=IMAGE), 404, "unknown_model")
    assert server.client.get("/readyz").status_code == 200
    assert server.metric("parchgrad_ready_workers") == 1


def test_who_changed_what_is_in_the_audit_log(shelf: Shelf) -> None:
    log = shelf.root / "audit.jsonl"
    with serving(shelf.root / "home", settings={**shelf.settings, "audit_log": log}) as server:
        assert change(server, "tiny", "load").status_code == 200
        assert change(server, "absent", "load").status_code == 404
        assert change(server, "tiny", "unload").status_code == 200
        lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["action"], line["model"], line["status"], line["caller"]) for line in lines] == [
        ("load", "tiny", "ok", "ops"), ("load", "absent", "unknown_model", "ops"), ("unload", "tiny", "ok", "ops")
    ]  # fmt: skip
    assert {line["route"] for line in lines} == {
        "/v2/repository/models/{name}/load", "/v2/repository/models/{name}/unload"
    }  # fmt: skip


def test_unload_while_the_first_load_runs(shelf: Shelf) -> None:
    """It waits for the load, and then the model is gone for good."""
    with serving(shelf.root / "home", settings=shelf.settings, wait_ready=False) as server:
        assert change(server, "tiny", "unload").status_code == 200
        refused(server.client.post("/predict", files=IMAGE), 404, "unknown_model")
        assert index(server) == {}
        assert change(server, "tiny", "load").status_code == 200
        assert identity(server)["name"] == "tiny"


def test_readiness_is_counted_after_the_failed_one_is_unloaded(shelf: Shelf) -> None:
    shelf.add("other", 2)
    (shelf.root / "tables" / "other" / "1" / "golden.safetensors").unlink()
    with serving(shelf.root / "home", settings={**shelf.settings, "models": "other"}, wait_ready=False) as server:
        for _ in range(300):
            if "UNAVAILABLE" in index(server).values():
                break
            time.sleep(0.1)
        assert identity(server)["name"] == "tiny"
        assert server.client.get("/readyz").status_code == 503
        assert server.metric("parchgrad_ready_workers") == 0
        assert change(server, "other", "unload").status_code == 200
        assert server.client.get("/readyz").status_code == 200
        assert server.metric("parchgrad_ready_workers") == 1


def test_memory_is_given_back(shelf: Shelf, server: Server) -> None:
    """VGG-11 takes some 500 MB; once it is unloaded most of that is free again, and a second time costs nothing new."""
    shelf.add("large", 3, "vgg11")
    idle = server.resident_bytes()
    after = []
    for _ in range(2):
        assert change(server, "large", "load").status_code == 200
        loaded = server.resident_bytes()
        assert change(server, "large", "unload").status_code == 200
        for _ in range(100):  # given back in the background, after the last request
            if server.resident_bytes() < idle + (loaded - idle) / 4:
                break
            time.sleep(0.1)
        after.append(server.resident_bytes())
    assert loaded - idle > 300e6
    assert max(after) < idle + (loaded - idle) / 4


def test_all_workers_follow(shelf: Shelf) -> None:
    shelf.add("other", 2)
    with serving(shelf.root / "home", settings={**shelf.settings, "workers": 2}) as server:
        for _ in range(300):
            if server.metric("parchgrad_ready_workers") == 2:
                break
            time.sleep(0.2)

        def statuses(name: str) -> set[int]:
            found = set()
            for _ in range(20):
                with httpx.Client(base_url=server.url, timeout=60) as fresh:  # a connection of its own: either worker
                    found.add(fresh.post("/predict", files=IMAGE, data={"model": name}).status_code)
            return found

        assert statuses("other") == {404}
        assert change(server, "other", "load").status_code == 200
        assert statuses("other") == {200}
        killed = server.workers()[0]
        killed.kill()  # the one that takes its place begins with what was loaded
        killed.wait()
        seen = set()
        while len(server.workers()) < 2 or statuses("other") != {200}:
            seen |= statuses("other")
        assert seen <= {200, 503}  # loading, perhaps; never unknown
        with httpx.Client(base_url=server.url, timeout=60) as fresh:
            assert fresh.post("/v2/repository/models/other/unload", headers=ADMIN).status_code == 200
        assert statuses("other") == {404}
        assert server.stop() == 0
