"""POST /layers: the library's own numbers, its options, and the one path that every image takes."""

import asyncio
import base64
import io
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator

from parchgrad import layer_views as library
from parchgrad.layer_views import NetworkView, layer_views
from service import layers, schemas
from service.errors import ServiceError
from service.onnx_engine import OnnxEngine
from service.pipeline import Origin, Pipeline
from service.settings import Settings
from service.torch_engine import LAYER_SIDE, TorchEngine
from tests.oracles.tolerance import assert_close
from tests.service.conftest import Home, files, picture, png
from tests.service.serving import Server

PICTURE = png(picture(3))
ORIGIN = Origin("/layers", "test")


def ask(server: Server, image: bytes = PICTURE, **fields: str) -> dict[str, Any]:
    response = server.client.post("/layers", files=files(image), data=fields)
    assert response.status_code == 200, response.text[:300]
    answer: dict[str, Any] = response.json()
    return answer


def unstacked(stack: dict[str, Any]) -> np.ndarray[Any, Any]:
    values = np.frombuffer(base64.b64decode(stack["data"]), stack["dtype"]).reshape(stack["shape"])
    return values * np.array(stack["scales"])[:, None, None]


def test_the_answer_is_the_librarys(server: Server, home: Home) -> None:
    answer = ask(server, target="thing 3", quantile="0.2", gamma="2", channels="4", order="gradient")
    explainer = home.explainer()
    tensor, _ = explainer.model.preprocessing.array(picture(3))
    options = TorchEngine.options(_Holding(explainer), {"quantile": 0.2, "gamma": 2.0})
    view = layer_views(
        explainer, torch.from_numpy(tensor), 3, options, channels=4, order="gradient", most_side=LAYER_SIDE
    )
    assert answer["target"]["label"] == "thing 3"
    assert answer["options"]["gamma"] == 2.0
    assert answer["predictions"][0]["probability"] == pytest.approx(float(view.probabilities.max()), rel=1e-4)
    assert_close(unstacked(answer["maps"]), np.stack([view.plain, view.ruled]), 0.01)
    assert [one["name"] for one in answer["layers"]] == [one.name for one in view.layers]
    for found, layer in zip(answer["layers"], view.layers, strict=True):
        assert [one["index"] for one in found["channels"]] == [one.index for one in layer.channels]
        assert found["selected"] == list(layer.selected)
        assert layer.rule is not None
        assert found["rule"]["selected_factor"] == pytest.approx(layer.rule.selected_factor, rel=1e-3)
        assert found["selected_share"]["before"] == pytest.approx(layer.selected_before_share, rel=1e-3)
        sums = np.stack([layer.sum_selected, layer.sum_unselected, layer.sum_after])
        for name in ("activation", "plain", "before"):
            maps = np.stack([getattr(one, name) for one in layer.channels])
            assert_close(unstacked(found[name]), maps, 0.01)
        assert_close(unstacked(found["sums"]), sums, 0.01)


class _Holding:
    """So much of an engine as its options need."""

    def __init__(self, explainer: Any) -> None:
        self.explainer, self.table, self.layer_names = explainer, explainer.table, explainer.layer_names


def test_it_is_of_its_schema_and_lean(server: Server) -> None:
    described = server.client.get("/docs.json").json()
    schema = described["components"]["schemas"]["LayersAnswer"]
    response = server.client.post("/layers", content=PICTURE, headers={"Content-Type": "image/png"})
    Draft202012Validator({**schema, "components": described["components"]}).validate(response.json())
    assert response.headers["content-encoding"] == "gzip"
    assert int(response.headers["content-length"]) < 0.7 * len(response.content) < 400_000
    assert server.metric("parchgrad_requests_total", route="/layers", kind="explain", code="ok") >= 1


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"channels": "17"}, "option_invalid", "Option 'channels' is '17'; allowed: an integer in 1..16."),
        ({"order": "size"}, "option_invalid", "Option 'order' is 'size'; allowed: activation, gradient, table."),
        ({"target": "top:2"}, "option_invalid", "is 'top:2'; allowed: a class index, name or id, or predicted."),
        ({"target": "thing"}, "unknown_class", "Option 'target' is 'thing'"),
        ({"target": "9"}, "target_not_in_table", "has no row for target 9 (thing 9)"),
        ({"method": "smoothgrad"}, "option_invalid", "allowed: gradient, input_x_gradient, guided_backprop."),
        ({"quantile": "2"}, "option_invalid", "allowed: a number in (0, 1]."),
        ({"saliency": "png"}, "unknown_field", "Field 'saliency' is not an option of /layers"),
        ({"timeout_ms": "1"}, "deadline_exceeded", "No answer within 1 ms."),
    ],
)
def test_what_is_wrong_is_said(server: Server, fields: dict[str, str], code: str, message: str) -> None:
    response = server.client.post("/layers", files=files(PICTURE), data=fields)
    error = response.json()["error"]
    assert error["code"] == code
    assert message in error["message"]


def test_it_takes_one_image_and_answers_json(server: Server) -> None:
    two = server.client.post("/layers", files=files(PICTURE, PICTURE))
    assert (two.status_code, two.json()["error"]["code"]) == (413, "too_many_images")
    drawn = server.client.post("/layers", files=files(PICTURE), headers={"Accept": "image/png"})
    assert drawn.status_code == 406
    broken = server.client.post("/layers", files=files(PICTURE[:200]))
    assert broken.json()["error"]["code"] == "image_truncated"


def test_options_are_the_librarys() -> None:
    assert schemas.LAYER_METHODS == library.METHODS
    assert schemas.LAYER_ORDERS == library.ORDERS
    assert schemas.MAX_CHANNELS <= library.MOST_CHANNELS


def test_maps_are_stacked_by_their_own_largest() -> None:
    maps = [np.array([[-2.0, 1.0]], np.float32), np.zeros((1, 2), np.float32)]
    found = layers.stack(maps, signed=True)
    assert_close(unstacked(found.model_dump()), np.stack(maps), 0.01)
    assert base64.b64decode(found.data)[0] == 256 - 127


# --- the one path, in this process ---------------------------------------------------------------------------


class Bench:
    """A pipeline on one event loop, whose engine looks only once `gate` is open."""

    def __init__(self, home: Home, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.gate, self.looks = threading.Event(), 0
        real = TorchEngine.layers

        def waiting(engine: TorchEngine, *args: Any) -> NetworkView:
            self.looks += 1
            self.gate.wait()
            return real(engine, *args)

        monkeypatch.setattr(TorchEngine, "layers", waiting)
        self.runner = asyncio.Runner()
        chosen = {**home.settings, "self_test": False, "timeout_ms": 60_000, **options}
        self.pipeline = self.runner.run(self._made(Settings(**chosen)))

    async def _made(self, chosen: Settings) -> Pipeline:
        pipeline = Pipeline(chosen)
        await pipeline.start()
        while not pipeline.ready:
            await asyncio.sleep(0.01)
        return pipeline

    async def ask(self) -> bytes:
        with self.pipeline.repository.use() as served:
            upload = layers.Upload([io.BytesIO(PICTURE)], {})
            return await layers._looked(self.pipeline, served, upload, asyncio.get_running_loop().time(), ORIGIN)

    def close(self) -> None:
        self.gate.set()
        self.runner.run(self.pipeline.close())
        self.runner.close()


@pytest.fixture
def bench(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    made = Bench(home, monkeypatch, max_images=3, max_queue=3, shed_above=2)
    yield made
    made.close()


def test_it_counts_in_the_queue_and_gives_way_before_it_is_full(bench: Bench) -> None:
    async def crowd() -> list[Any]:
        first = [asyncio.ensure_future(bench.ask()) for _ in range(2)]
        await asyncio.sleep(0)
        while not bench.looks:
            await asyncio.sleep(0.005)
        refused = await asyncio.gather(bench.ask(), return_exceptions=True)
        bench.gate.set()
        return [*refused, *await asyncio.gather(*first)]

    refused, *answers = bench.runner.run(crowd())
    assert isinstance(refused, ServiceError)
    assert refused.code == "map_shed"
    assert all(answer.startswith(b'{"model"') for answer in answers)
    assert bench.pipeline._admitted == 0


def test_who_leaves_before_the_device_begins_costs_it_nothing(bench: Bench) -> None:
    async def leave() -> None:
        first = asyncio.ensure_future(bench.ask())
        while not bench.looks:
            await asyncio.sleep(0.005)
        second = asyncio.ensure_future(bench.ask())
        while not bench.pipeline.repository._map_lane._work_queue.qsize():  # type: ignore[attr-defined]
            await asyncio.sleep(0.005)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        bench.gate.set()
        await first

    bench.runner.run(leave())
    assert (bench.looks, bench.pipeline._admitted) == (1, 0)


def test_an_exported_graph_has_no_layers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchEngine, "no_network", OnnxEngine.no_network)
    with pytest.raises(
        ServiceError, match="/layers has nothing to show: 'tiny' is served from an exported graph"
    ) as it:
        bench.runner.run(bench.ask())
    assert it.value.code == "option_unsupported"
    assert bench.looks == 0


def test_a_gradient_that_overflows_is_an_error(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = layers._answer

    def overflowing(engine: Any, outcome: Any, view: NetworkView, request_id: str) -> bytes:
        view.ruled[0, 0] = np.inf
        return real(engine, outcome, view, request_id)

    monkeypatch.setattr(layers, "_answer", overflowing)
    bench.gate.set()
    with pytest.raises(ServiceError, match="overflows float32"):
        bench.runner.run(bench.ask())
