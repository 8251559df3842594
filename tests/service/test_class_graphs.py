"""The class graph's routes: what they answer of the bundled model's graph, and that none is served that is not its."""

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

import parchgrad
from parchgrad import class_graph
from parchgrad.labels import class_index
from service.app import create_app
from service.settings import Settings
from tests.service.serving import PROJECT_ROOT

BUNDLED = PROJECT_ROOT / "selection_tables" / "scenes" / "1"


class Version:
    """What the routes use of a served version."""

    name, version = "scenes", "1"

    def __init__(self, table: Any) -> None:
        labels = table.labels
        model = SimpleNamespace(
            name=self.name, version=self.version, weights_sha256=table.weights_sha256, labels=labels,
            class_index=lambda target: class_index(target, labels),
        )  # fmt: skip
        self.engine = SimpleNamespace(model=model, table=table)


class Service:
    """The app over a copy of the bundled table's folder; `loads`: the threads that opened a graph."""

    def __init__(self, tables: Path, loads: list[threading.Thread]) -> None:
        self.folder = tables / "scenes" / "1"
        shutil.copytree(BUNDLED, self.folder)
        self.loads = loads
        self.table = parchgrad.load_table(self.folder)
        self.reload()
        self._app = create_app()
        self._app.state.pipeline = SimpleNamespace(settings=Settings(tables_dir=tables), repository=self)

    def reload(self) -> None:
        self.served = Version(self.table)

    @contextmanager
    def use(self, name: str, version: str | None = None) -> Iterator[Version]:
        yield self.served

    def ask(self, *paths: str, **headers: str) -> list[httpx.Response]:
        """All of them at once."""

        async def asked() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                gets = (client.get(f"/models/scenes/class-graph{path}", headers=headers) for path in paths)
                return await asyncio.gather(*gets)

        return asyncio.run(asked())

    def edit(self, **changed: Any) -> None:
        path = self.folder / class_graph.graph.MANIFEST_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    loads: list[threading.Thread] = []
    load = class_graph.load

    def counted(*args: Any) -> class_graph.ClassGraph:
        loads.append(threading.current_thread())
        return load(*args)

    monkeypatch.setattr(class_graph, "load", counted)
    return Service(tmp_path / "tables", loads)


def test_it_is_told_what_a_class_is_made_of(service: Service) -> None:
    whole, few = (
        one.json() for one in service.ask("/classes/umbrella?nodes=500&edges=2000", "/classes/9?nodes=20&edges=3")
    )
    graph = class_graph.load(service.folder, service.table)
    told = graph.class_view(9)
    assert [(node["layer"], node["channel"]) for node in whole["nodes"]] == [(n.layer, n.channel) for n in told.nodes]
    assert whole["nodes_in_all"] == few["nodes_in_all"] == len(told.nodes)
    places = {(node.layer, node.channel): at for at, node in enumerate(told.nodes)}
    assert [(e["source"], e["target"]) for e in whole["edges"]] == [
        (places[e.source], places[e.target]) for e in told.edges
    ]
    assert (len(few["nodes"]), len(few["edges"])) == (20, 3)
    assert [e["weight"] for e in few["edges"]] == sorted((e["weight"] for e in few["edges"]), reverse=True)


def test_two_classes_and_a_channel(service: Service) -> None:
    summary, pair, umbrella = (one.json() for one in service.ask("", "/classes/9/against/cup", "/classes/9?nodes=500"))
    assert [one["label"] for one in summary["classes"]] == list(service.table.labels)
    assert pair["b"] == {"index": 1, "label": "cup"}
    selected = {(layer["layer"], c) for layer in pair["layers"] for c in [*layer["shared"], *layer["only_a"]]}
    assert selected == {(node["layer"], node["channel"]) for node in umbrella["nodes"]}
    node = umbrella["nodes"][-1]
    (channel,) = service.ask(f"/channels/{node['layer']}/{node['channel']}")
    mine = [one for one in channel.json()["classes"] if one["index"] == 9]
    assert [(one["strength"], one["log_p"]) for one in mine] == [(node["strength"], node["log_p"])]


def test_exemplars_are_a_picture_that_is_asked_for_once(service: Service) -> None:
    node = service.ask("/classes/9?nodes=1")[0].json()["nodes"][0]
    path = f"/exemplars/{node['layer']}/{node['channel']}"
    (first,) = service.ask(path)
    assert first.headers["content-type"] == "image/webp"
    assert "private" in first.headers["cache-control"]
    assert first.content == class_graph.load(service.folder, service.table).exemplars(node["layer"], node["channel"])
    (again,) = service.ask(path, **{"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_a_graph_is_opened_once_a_version_and_never_on_the_event_loop(service: Service) -> None:
    assert {one.status_code for one in service.ask("", "/classes/1", "/classes/2")} == {200}
    service.ask("")
    assert len(service.loads) == 1
    assert threading.main_thread() not in service.loads
    service.reload()
    service.ask("")
    assert len(service.loads) == 2


def test_without_a_graph_the_command_is_named_and_one_built_meanwhile_is_found(service: Service) -> None:
    manifest = service.folder / class_graph.graph.MANIFEST_FILE
    content = manifest.read_text()
    manifest.unlink()
    (answer,) = service.ask("/classes/1")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "no_class_graph"
    assert "parchgrad class-graph build scenes --data" in answer.json()["error"]["message"]
    manifest.write_text(content)
    assert service.ask("/classes/1")[0].status_code == 200


@pytest.mark.parametrize("changed", [{"table_sha256": "0" * 64}, {"tensors_sha256": "1" * 64}])
def test_another_tables_graph_and_a_damaged_one_are_refused(service: Service, changed: dict[str, str]) -> None:
    assert service.ask("")[0].status_code == 200
    service.edit(**changed)
    (answer,) = service.ask("")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_class_graph")
    message = answer.json()["error"]["message"]
    assert next(iter(changed.values())) in message
    assert str(service.folder.parents[2]) not in message  # where our folders are is nobody's business


@pytest.mark.parametrize(
    ("path", "status", "code", "word"),
    [
        ("/classes/umbrela", 422, "unknown_class", "umbrella"),
        ("/classes/10", 422, "unknown_class", "0..9"),
        ("/classes/1/against/nothing", 422, "unknown_class", "nothing"),
        ("/classes/1?nodes=0", 422, "option_invalid", "nodes"),
        ("/classes/1?edges=2&edges=3", 422, "option_invalid", "once"),
        ("?nodes=3", 422, "unknown_field", "nodes"),
        ("/channels/nowhere/1", 422, "option_invalid", "nowhere"),
        ("/channels/features.0.0/x", 422, "option_invalid", "number"),
        ("/exemplars/features.0.0/24", 422, "option_invalid", "23"),
    ],
)  # fmt: skip
def test_what_there_is_not_is_said(service: Service, path: str, status: int, code: str, word: str) -> None:
    (answer,) = service.ask(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert word in answer.json()["error"]["message"]


def test_without_exemplars_the_way_to_them_is_named(service: Service) -> None:
    service.edit(exemplars=None)
    answer, channel = service.ask("/exemplars/features.0.0/1", "/channels/features.0.0/1")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert "--exemplars" in answer.json()["error"]["message"]
    assert channel.json()["exemplars"] == 0
