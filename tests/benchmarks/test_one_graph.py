"""The benchmark of the one graph on a tiny network: what its rows compute, its shares, its tables, its command."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchmarks import graph_families, one_graph
from benchmarks.graph_cases import SCENES, explained, explanation_call, of_network, session, subject, traced
from benchmarks.graph_families import Family, measured
from benchmarks.graph_profile import (
    FORWARD,
    MASKS,
    PARTS,
    POOLS,
    PRODUCTS,
    ROWS,
    SUMS,
    Profile,
    gradient_passes,
    noted_parts,
    profile,
)
from benchmarks.one_graph import Cell, Report, cells, markdown
from parchgrad import Explainer

CLASSES, SIZE = 5, 12


class Tiny(nn.Module):
    """BatchNorm, ReLUs, a max-pool, and an auxiliary convolution that takes no part."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3),
            nn.ReLU6(),
        )
        self.unused = nn.Conv2d(8, 2, 1)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return of_network("tiny", Tiny().eval().requires_grad_(False), SIZE, CLASSES)


@pytest.fixture
def nowhere(tmp_path):
    """A data folder without data."""
    return tmp_path / "data"


def test_a_table_has_the_convolutions_that_run(tiny):
    assert tiny.table.layer_names == ("body.0", "body.4")
    assert tiny.table.idle_layers == ("unused",)


def test_every_picture_has_a_class_of_its_own(tiny, nowhere):
    assert tiny.targets(4) == [0, 2, 4, 1]
    images = tiny.pictures(3, nowhere)
    assert images.shape == (3, 3, SIZE, SIZE)
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("backward", ["pruned", "dense"])
def test_the_graphs_explain_what_the_explainer_does(tiny, nowhere, backward):
    images, targets = tiny.pictures(3, nowhere), tiny.targets(3)
    call = explanation_call(session(explained(tiny, traced(tiny), backward)), images, targets)
    expected = Explainer(tiny.network, tiny.table).explain(images, targets, quantile=0.1, gamma=math.inf, layers=["*"])
    logits, saliency = (torch.from_numpy(one) for one in call())
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(saliency, expected.saliency(), rtol=1e-3, atol=1e-7)


def test_a_cell_has_every_row(tiny, nowhere):
    (one, two) = cells(tiny, (1, 2), 2, nowhere)
    assert (one.batch, two.batch) == (1, 2)
    assert all(set(cell.seconds) == set("abcde") for cell in (one, two))
    assert all(len(times) == 2 and min(times) > 0 for times in one.seconds.values())


def test_ratios_are_of_rounds_and_aims_are_judged():
    seconds = {"a": [1.0, 2.0, 1.0], "b": [1.0, 5.0, 3.0], "c": [4.0] * 3, "d": [2.0, 5.0, 4.0], "e": [2.0] * 3}
    cell = Cell("resnet18", 1, False, seconds)
    assert cell.ratios("b/a") == [1.0, 2.5, 3.0]
    assert cell.ratio("b/a") == 2.5
    assert cell.aims() == "b/a <= 1.8: missed; b/d <= 1.0: met"
    assert Cell("mobilenet_v2", 1, True, seconds).aims() == ""
    written = markdown(Report({"torch": "9"}, 7, [cell]))
    assert "7 interleaved rounds" in written
    assert "| resnet18* | 1000.0 | 3000.0 | 4000.0 | 4000.0 | 2000.0 | 2.50 (1.00-3.00) |" in written


def test_the_profile_finds_every_part(tiny):
    found = profile(tiny, 2, 2)
    assert tuple(found.prediction_parts) == tuple(found.explanation_parts) == PARTS
    assert found.prediction_parts[FORWARD] > 0
    assert found.prediction_parts[PRODUCTS] == found.prediction_parts[SUMS] == 0
    assert all(found.explanation_parts[part] > 0 for part in (FORWARD, PRODUCTS, ROWS, SUMS, POOLS))
    assert min(found.predict, found.explain, found.passes) > 0
    assert 0 < found.prediction_nodes < found.explanation_nodes


def test_every_node_belongs_to_who_wrote_it(tiny):
    prediction = traced(tiny)
    with noted_parts() as parts:
        explained(tiny, prediction, "pruned")
    found = {}
    for name, part in parts.items():
        found.setdefault(name.split("/")[-1].rpartition("_")[0], set()).add(part)
    assert found["ReduceSumSquare"] == {SUMS}
    assert found["ConvTranspose"] == found["Conv"] == found["Gemm"] == {PRODUCTS}
    assert found["SpaceToDepth"] == {POOLS}
    assert found["HardSigmoid"] == {MASKS, POOLS}
    assert ROWS in found["Gather"]


def test_the_floor_is_one_pass_over_every_convolutions_output(tiny):
    _, given = gradient_passes(traced(tiny), 2)
    shapes = sorted(value.shape for name, value in given.items() if name.startswith("gradient_"))
    assert shapes == [(2, 8, 12, 12), (2, 12, 4, 4)]


def test_the_floors_figures():
    parts = dict.fromkeys(PARTS, 0.0)
    found = Profile(
        "net", 1, 10.0, 30.0, 5.0, parts | {FORWARD: 8.0, MASKS: 2.0}, parts | {FORWARD: 8.0, POOLS: 7.5}, 4, 90
    )
    assert found.floor == 1.5
    assert found.selected == pytest.approx(1.58)
    written = markdown(Report({}, 7, profiles=[found]))
    assert "| pooling | 0.00 | 7.50 | 7.50 | 0.75 |" in written
    assert "| between nodes, less the profiler's own | 0.00 | 14.50 | 14.50 | 1.45 |" in written
    assert "| nodes run | 4 | 90 | 86 |  |" in written
    assert "| one graph, pruned | 30.00 | 3.00 |" in written


def test_a_family(tiny, nowhere):
    found = measured(tiny, 2, nowhere)
    assert found.why_not == ""
    assert found.logits < 1e-5
    assert len(found.maps) == len(found.rounding) == 3
    assert max(found.maps) < 1e-3
    assert found.file_mb > 0
    assert found.peak_mib > 100


def test_a_family_that_does_not_export(nowhere):
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES), nn.LogSigmoid()
    ).eval()  # fmt: skip
    found = measured(of_network("odd", network, SIZE, CLASSES), 2, nowhere)
    assert found.why_not
    (_, line) = graph_families.rows([found])
    assert line[2].startswith("does not export: ")


def test_the_bundled_package(nowhere):
    found = subject(SCENES, nowhere)
    assert found.trained
    assert found.native
    assert found.table.model_name == SCENES


def test_the_command(tmp_path, monkeypatch, tiny):
    """One whole run; the family, in a process of its own, is made up."""
    monkeypatch.setattr(one_graph, "subject", lambda name, data: tiny)
    monkeypatch.setattr(one_graph, "family", lambda name, runs, data: Family(name, why_not="it is made up"))
    files = [f"--{kind}={tmp_path / kind}" for kind in ("json", "markdown")]
    chosen = ["--models", "tiny", "--batches", "2", "--profile", "tiny", "--families", "--only", "odd"]
    ran = CliRunner().invoke(one_graph.main, [*chosen, *files])
    assert ran.exit_code == 0, ran.output
    assert "tiny: profile" in ran.stderr
    assert "Where the time goes: tiny, batch 2" in ran.stdout
    found = json.loads((tmp_path / "json").read_text())
    (cell,) = found["cells"]
    assert all(len(times) == 7 for times in cell["seconds"].values())
    assert "does not export: it is made up" in (tmp_path / "markdown").read_text()
