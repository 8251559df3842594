"""service/traffic.py and traffic_history.py: what is kept of traffic, of all workers, and how it is compared."""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

import parchgrad
from parchgrad.activation_histograms import BINS, EDGES, FEWEST_IMAGES, counts, normal
from parchgrad.drift import LayerDrift
from parchgrad.errors import ClassGraphError
from scenes.generator import sample
from service import metrics, traffic, watching
from service.app import create_app
from service.settings import Settings
from service.traffic_history import OTHER, SPANS, Bucket, Cell, History, forget
from tests.service.conftest import COVERED, LABELS, Home, picture, png
from tests.service.serving import PROJECT_ROOT
from tests.service.test_watching import Bench

IMAGES = [png(picture(seed)) for seed in range(FEWEST_IMAGES + 2)]
LAYERS = ("first", "second")


class Asked(Bench):
    """A pipeline whose GET /traffic is asked over the app."""

    def traffic(self, **params: str) -> httpx.Response:
        app = create_app()
        app.state.pipeline = self.pipeline

        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
                return await client.get("/traffic", params=params)

        return self.runner.run(ask())


@pytest.fixture
def asked(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Asked]]:
    monkeypatch.setattr(watching, "REST", 0.0)
    made: list[Asked] = []

    def make(**options: Any) -> Asked:
        chosen: Any = {**home.settings, "self_test": False, "timeout_ms": 60_000, **options}
        made.append(Asked(Settings(**chosen)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_what_was_looked_at_is_told_by_layer_and_class(asked: Callable[..., Asked]) -> None:
    one = asked(watch_rate=1)
    engine = one.pipeline.repository.listing()[0].engine
    expected = {index: np.zeros((26, BINS), int) for index in (1, 2)}
    gini = []
    for number, image in enumerate(IMAGES):
        index = 1 if number < FEWEST_IMAGES else 2
        outcome = one.answered(image, target=str(index))
        for i, layer in enumerate(engine.drift(outcome.prepared.tensor, index).values()):
            expected[index][i] += counts(layer.z)
        gini.append(outcome.first.figures.gini)  # type: ignore[union-attr]
    one.answered(IMAGES[0], target="1", quantile="0.3")  # looked at; its map is of other options

    answer = one.traffic().json()
    assert (answer["images"], answer["workers"], answer["images_of_others"]) == (len(IMAGES) + 1, 1, 0)
    assert answer["layers"] == list(engine.layer_names)
    assert [(seen.get("index"), seen["images"]) for seen in answer["classes"]] == [(None, 13), (1, 11), (2, 2)]
    assert answer["classes"][2]["divergence"] == [None] * 26  # of two images nothing is said
    assert None not in answer["classes"][1]["divergence"] + answer["classes"][1]["bound"]
    assert "note" not in answer
    by_name = {figure["name"]: figure for figure in answer["figures"]}
    assert by_name["gini"]["maps"] == by_name["gradient_agreement"]["maps"] == len(IMAGES)
    assert by_name["gini"]["quantiles"][2] == pytest.approx(np.quantile(gini, 0.5, method="inverted_cdf"), abs=0.0051)
    assert sum(bucket["maps"] for bucket in by_name["gini"]["history"]) == len(IMAGES)

    second = one.traffic(**{"class": LABELS[2], "span": "day"}).json()
    assert second["chosen"]["index"] == 2
    assert [layer["live"] for layer in second["distributions"]] == expected[2].tolist()
    assert second["distributions"][0]["reference"] == pytest.approx(normal(), abs=1e-6)
    assert second["chosen"]["reference"] == "normal"
    assert second["bucket_seconds"] * len(second["history"]) == 24 * 3600
    assert sum(bucket["images"] for bucket in second["history"]) == 2
    assert answer["edges"] == EDGES.tolist()


def test_where_nothing_is_looked_at_it_is_said_and_what_is_wrong_is_refused(asked: Callable[..., Asked]) -> None:
    one = asked(watch_rate=0)
    one.answered(IMAGES[0], target="1")
    answer = one.traffic().json()
    assert "PARCHGRAD_WATCH_RATE" in answer["note"]
    assert (answer["images"], answer["figures"][0]["maps"]) == (0, 1)
    assert answer["chosen"]["divergence"] == [None] * 26
    for code, params in (
        ("unknown_model", {"model": "resnet"}), ("unknown_version", {"version": "7"}),
        ("unknown_class", {"class": "nothing"}), ("target_not_in_table", {"class": str(COVERED)}),
        ("option_invalid", {"span": "week"}), ("unknown_field", {"spam": "1"}),
    ):  # fmt: skip
        refused = one.traffic(**params)
        assert (refused.status_code < 500, refused.json()["error"]["code"]) == (True, code)


def drift(*values: float) -> dict[str, LayerDrift]:
    return {name: LayerDrift(0.0, 0.0, np.array(values)) for name in LAYERS}


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


def history(clock: Clock, most: int = 2, pid: int | None = None, identity: str = "net") -> History:
    made = History(LAYERS, most, identity, clock)
    made._pid = str(pid or os.getpid())
    return made


def totals(buckets: dict[int, Bucket]) -> tuple[dict[int, int], int]:
    """Images by class as kept, and values of the first layer."""
    images: dict[int, int] = {}
    values = 0
    for bucket in buckets.values():
        for index, cell in bucket.cells.items():
            images[index] = images.get(index, 0) + cell.images.total()
            values += int(cell.counts[0].sum())
    return images, values


def test_workers_add_up_and_those_that_are_gone_do_not_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    mine, other, dead, old = (
        history(clock, pid=pid, identity=identity)
        for pid, identity in ((None, "net"), (os.getppid(), "net"), (2**22 + 1, "net"), (1, "before"))
    )
    for index in (0, 0, 1):
        mine.looked(index, drift(0.5, 1.5))
    for index in (1, 1, 1, 1, 2):  # together 1 and 0 have the most images: 2 is folded into the others
        other.looked(index, drift(0.5))
    other.mapped({"gini": 0.903, "border_share": float("nan")})
    dead.looked(0, drift(0.5))
    old.looked(0, drift(0.5))
    for one in (other, dead, old):
        one.share(tmp_path, "tiny-1")
        assert not one.changed
    mine.looked(0, drift(9.0))
    mine.share(tmp_path, "tiny-1")  # its own file is not read again
    (tmp_path / f"traffic-{os.getppid()}-hour-{int(clock() // 120) - 1}-tiny-1.npz").write_bytes(b"PK\3\4 half of it")
    (tmp_path / f"traffic-{os.getppid()}-hour-1-tiny-10.npz").write_bytes(b"another version's")
    for span in SPANS:
        buckets, workers = mine.together(span, tmp_path, "tiny-1")
        assert workers == 3
        assert totals(buckets) == ({0: 3, 1: 5, OTHER: 1}, 12)
        assert sum(bucket.figures["gini"][90] for bucket in buckets.values() if bucket.figures) == 1
    assert "cannot be read" in caplog.text
    assert not list(tmp_path.glob(f"traffic-{2**22 + 1}-*"))
    clock.now += 90_000
    other.looked(1, drift(0.5))
    other.share(tmp_path, "tiny-1")  # its files of before are taken away
    assert len(list(tmp_path.glob(f"traffic-{os.getppid()}-*-tiny-1.npz"))) == 2
    assert totals(mine.together("day", tmp_path, "tiny-1")[0]) == ({1: 1}, 1)
    forget(tmp_path)
    assert not list(tmp_path.glob(f"traffic-{os.getpid()}-*"))


def test_what_is_kept_is_bounded_and_no_image(tmp_path: Path) -> None:
    """Whatever classes come for however long: so many buckets, of the classes that are kept and the others."""
    clock = Clock()
    one = history(clock, most=3)
    for number in range(1200):
        clock.now += 97
        one.looked(number % 500, drift(*range(5)))
        one.mapped({"gini": 0.5})
    held = [bucket for ring in one._buckets.values() for bucket in ring.values()]
    cells = [cell for bucket in held for cell in bucket.cells.values()]
    assert len(held) <= 30 + 24
    assert max(len(bucket.cells) for bucket in held) <= 4
    assert sum(cell.counts.nbytes + cell.squares.nbytes for cell in cells) <= 54 * 4 * len(LAYERS) * 384
    assert all(values.nbytes == 404 for bucket in held for values in bucket.figures.values())
    assert not one.over
    one.share(tmp_path, "tiny-1")
    with np.load(next(tmp_path.iterdir())) as written:
        assert set(written.files) == {"identity", "classes", "counts", "squares", "images", "figures", "values"}
    clock.now += 90_000
    assert one.over


def test_the_other_workers_are_told_and_forgotten(
    asked: Callable[..., Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "SHARE_REST", 0.0)
    monkeypatch.setattr(metrics, "workers_folder", lambda: tmp_path)
    one = asked(watch_rate=1)

    async def shared() -> None:
        assert one.watch._sharing is not None
        await asyncio.gather(one.watch._sharing)

    one.answered(IMAGES[0], target="1")
    one.runner.run(shared())
    names = {
        path.name.split("-", 2)[2].partition("-")[0] for path in tmp_path.glob(f"traffic-{os.getpid()}-*-tiny-1.npz")
    }
    assert names == set(SPANS)
    one.runner.run(one.watch.close())
    assert not list(tmp_path.glob("traffic-*"))


class Graph:
    """What a class graph holds of the table's images."""

    def __init__(self, layers: tuple[str, ...], by_class: dict[int, np.ndarray[Any, Any]]) -> None:
        self.layers, self.classes, self._by_class = layers, tuple(by_class), by_class
        self.reference_edges = EDGES

    def images(self, index: int) -> int:
        return int(self._by_class[index][0].sum()) // (index + 1)  # as if a class had its index + 1 channels

    def reference_counts(self, index: int) -> np.ndarray[Any, Any]:
        return self._by_class[index]


def test_classes_together_are_compared_with_as_many_of_each() -> None:
    rows = np.zeros((2, 1, BINS), int)
    rows[0, 0, 3], rows[1, 0, 7] = 10, 1000
    graph: Any = Graph(("a",), {0: rows[0], 1: rows[1]})
    reference = traffic.Reference(("a",), graph)
    found, kind = reference.mixed({0: 6, 1: 1})  # three times as many values: an image of class 1 has two
    assert kind == "table's images"
    assert (found / found.sum())[0, [3, 7]] == pytest.approx([0.75, 0.25])
    assert found.sum() == pytest.approx(1 / (0.75**2 / 10 + 0.25**2 / 1000))  # of as many values it is as uncertain
    mixed, kind = reference.mixed({0: 1, 5: 1})
    assert kind == "mixed"
    assert mixed[0] / mixed.sum() == pytest.approx((np.eye(BINS)[3] + normal()) / 2)
    assert traffic.Reference(("a",), None).mixed({0: 2})[1] == "normal"


@pytest.mark.parametrize("wrong", ["edges", "layers", "damaged", None])
def test_the_class_graphs_counts_are_the_reference_where_they_fit(
    asked: Callable[..., Asked], monkeypatch: pytest.MonkeyPatch, wrong: str | None
) -> None:
    one = asked(watch_rate=1)
    layers = one.pipeline.repository.listing()[0].engine.layer_names
    graph = Graph(tuple(reversed(layers)), {1: np.eye(26, BINS, dtype=int)})
    if wrong == "edges":
        graph.reference_edges = EDGES + 1
    if wrong == "layers":
        graph.layers = graph.layers[1:]

    def load(folder: Path, table: Any) -> Graph:
        assert folder.parts[-2:] == ("tiny", "1")
        if wrong == "damaged":
            raise ClassGraphError("It is damaged.")
        return graph

    monkeypatch.setattr("parchgrad.class_graph.load", load)
    answer = one.traffic(**{"class": "1"}).json()
    fits = wrong is None
    assert ("reference_note" in answer) is not fits
    assert answer["chosen"]["reference"] == ("table's images" if fits else "normal")
    assert answer["distributions"][0]["reference"] == pytest.approx(np.eye(BINS)[25] if fits else normal(), abs=1e-6)


def test_shifted_scenes_are_seen_as_drift_and_others_are_not() -> None:
    """The bundled model: counts of the table's kind of scenes against held-out ones, clean and darkened."""
    model = parchgrad.load_model(PROJECT_ROOT / "models" / "scenes")
    explainer = parchgrad.Explainer(model, parchgrad.load_table(PROJECT_ROOT / "selection_tables" / "scenes", model))

    def histograms(first: int, images: int, light: float = 1.0) -> Cell:
        pictures = [sample("test", first + i, model.preprocessing.size[0]).image * light for i in range(images)]
        tensors = [model.preprocessing.apply(Image.fromarray(one.astype(np.uint8)))[0] for one in pictures]
        total = History(explainer.layer_names, 1, "")
        for tensor in tensors:
            index = int(explainer.predict(tensor[None]).argmax())
            total.looked(0, explainer.drift(tensor[None], [index])[0])
        (bucket, *_) = total._buckets["day"].values()
        return bucket.cells[0]

    graph: Any = Graph(explainer.layer_names, {0: histograms(0, 100).counts})
    reference = traffic.Reference(explainer.layer_names, graph)
    beyond = []
    for light in (1.0, 0.4):
        found, _, bound = traffic._compared(histograms(500, 30, light), reference)
        beyond.append(int((found > bound).sum()))
    assert beyond[0] <= 1
    assert beyond[1] >= 10
