"""The rows of `benchmarks.peers` on tiny networks: each gives what it says; and how they are measured and shown."""

import json
import sys

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn

from benchmarks import peers
from benchmarks.measuring import Memory, can_measure_memory
from benchmarks.peer_memory import peak_memory
from benchmarks.peer_methods import (
    EAGER,
    GRADIENT,
    OURS,
    PEERS,
    PREDICTIONS,
    SCENES,
    Case,
    Row,
    all_rows,
    case_of,
    row_named,
    shared_copy,
)
from benchmarks.peer_report import Cell, ClassMemory, Curve, Line, Report, draw, markdown, show, show_rest
from benchmarks.published import prepared, published_maps
from parchgrad import Explainer, SelectionTable

CLASSES = 5


class Residual(nn.Module):
    """Strides, BatchNorm, groups, a gate of one position, in-place ReLUs and a skip connection."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(inplace=True))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.features = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, images):
        z = self.stem(images)
        z = self.left(z) * self.gate(z) + z
        return self.head(self.features(z).mean((2, 3)))


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    network = Residual().eval().requires_grad_(False)
    nn.init.uniform_(network.stem[1].weight, 0.5, 1.5)
    network.stem[1].running_mean.normal_(0.0, 0.3)
    table = SelectionTable.random(network, CLASSES, seed=0)
    return Case(network, table, torch.randn(3, 3, 12, 12), CLASSES, "features")


@pytest.fixture(scope="module")
def gradient(case):
    return row_named(GRADIENT).build(case)(case.targets)


def relative(found, expected):
    """Largest difference over the largest value, image by image; the worst."""
    found, expected = found.flatten(1), expected.flatten(1)
    return float(((found - expected).abs().amax(1) / expected.abs().amax(1)).max())


def test_the_batch_mixes_classes(case):
    assert len(set(case.targets)) == len(case.targets)
    assert len(set(case_of(SCENES, 8).targets)) == 8


@pytest.mark.parametrize("row", [row for row in PREDICTIONS if "compiled" not in row.name], ids=lambda row: row.name)
def test_every_prediction_is_the_networks(case, row):
    logits = row.build(case)(case.targets)
    assert relative(logits, case.network(case.images)) < 1e-5


@pytest.mark.parametrize("row", [*PEERS, *OURS], ids=lambda row: row.name)
def test_every_row_gives_one_map_an_image(case, row):
    found = row.build(case)(case.targets)
    assert found.shape in ((3, 3, 12, 12), (3, 12, 12))
    assert found.isfinite().all()
    assert (found.flatten(1).abs().amax(1) > 0).any()


@pytest.mark.parametrize("name", ["zennit Gradient", "ours, plain gradient"])
def test_the_gradients_are_one_gradient(case, gradient, name):
    assert relative(row_named(name).build(case)(case.targets), gradient) < 1e-5


def test_captums_saliency_is_its_magnitude(case, gradient):
    assert relative(row_named("captum Saliency").build(case)(case.targets), gradient.abs()) < 1e-5


def test_grad_cam_is_the_same_with_less_to_do(case):
    both = ["pytorch-grad-cam GradCAM", "pytorch-grad-cam, frozen below"]
    one, other = (row_named(name).build(case)(case.targets) for name in both)
    assert torch.allclose(one, other, atol=1e-5)


def test_dense_and_pruned_and_published_give_one_map(case):
    names = ["ours, dense, q = 0.1", "ours, pruned, q = 0.1", "published procedure, q = 0.1"]
    dense, pruned, published = (row_named(name).build(case)(case.targets) for name in names)
    assert relative(pruned, dense) < 1e-5
    assert relative(published, dense) < 1e-5


@pytest.mark.parametrize("quantile", [0.05, 0.3, 1.0])
def test_the_published_procedure_is_the_dense_rule(case, quantile):
    found = published_maps(prepared(case.network, case.table), case.images, case.targets, quantile)
    explainer = Explainer(case.network, case.table, backward="dense")
    expected = explainer.explain(case.images, case.targets, quantile=quantile).attributions
    assert relative(found, expected) < 1e-5


def test_signals_and_gradients_are_of_an_ordinary_size():
    """Uncalibrated, this network's logits are below 1e-12."""
    case = case_of("efficientnet_b0", 1, classes=10)
    assert not any(module.training for module in case.network.modules())
    logits = case.network(case.images)
    gradient = row_named(GRADIENT).build(case)(case.targets)
    assert 1e-3 < float(logits.abs().max()) < 1e3
    assert 1e-8 < float(gradient.abs().max()) < 1e3


def test_no_row_leaves_anything_on_the_network(case):
    parameters = {name: (id(p), p.clone()) for name, p in case.network.named_parameters()}
    for row in (*PREDICTIONS[:3], *PEERS, *OURS):
        row.build(case)(case.targets)
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in case.network.modules())
    for name, p in case.network.named_parameters():
        before, value = parameters[name]
        assert id(p) == before
        assert torch.equal(p, value)
        assert not p.requires_grad
        assert p.grad is None


def test_a_shared_copy_takes_no_memory(case):
    copied = shared_copy(case.network, parameters_require_grad=True)
    assert all(
        a.data_ptr() == b.data_ptr()
        for a, b in zip(copied.state_dict().values(), case.network.state_dict().values(), strict=True)
    )
    assert all(p.requires_grad for p in copied.parameters())


def test_a_peer_that_is_missing_is_a_row_without_figures(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "zennit.attribution", None)  # importing it raises
    rows = tuple(row_named(name) for name in (EAGER, "zennit Gradient", GRADIENT))
    found = peers.cell(case, rows, "tiny", runs=7, row_seconds=60)
    assert found.line("zennit Gradient").note.startswith("not installed")
    assert not found.line("zennit Gradient").seconds
    assert len(found.line(GRADIENT).ratios) == 7


def test_a_peer_that_takes_too_long_is_left_out_and_ours_never_is(case):
    found = peers.cell(case, tuple(row for row in all_rows() if "compiled" not in row.name), "tiny", 7, row_seconds=0)
    for line in found.lines:
        assert line.note.startswith("left out: 8 calls") == (line.kind == "peer"), line.name
        assert bool(line.seconds) == (line.kind != "peer")


def test_ratios_are_to_the_fastest_prediction_round_by_round(case):
    def slow(case):
        return lambda targets: [row_named(EAGER).build(case)(targets) for _ in range(20)]

    rows = (Row("slow", "prediction", 20, slow), row_named(EAGER), row_named(GRADIENT))
    found = peers.cell(case, rows, "tiny", 7, 60)
    assert found.fastest == EAGER
    assert found.line(EAGER).ratios == [1.0] * 7
    gradient = found.line(GRADIENT)
    assert gradient.ratios == [g / p for g, p in zip(gradient.seconds, found.line(EAGER).seconds, strict=True)]


@pytest.mark.skipif(not can_measure_memory(), reason="no high-water mark of memory here")
def test_memory_of_a_row():
    rows = [EAGER, GRADIENT, "pytorch-grad-cam GradCAM"]
    found = peak_memory(SCENES, 8, rows)
    assert set(found) == set(rows)
    network = case_of(SCENES, 1).network
    weights = sum(p.numel() for p in network.parameters()) * 4 / 2**20
    # The first convolution's output of the batch is the least a prediction holds at once.
    least = 8 * 24 * 64 * 64 * 4 / 2**20
    assert least < found[EAGER].peak < found[GRADIENT].peak
    # Grad-CAM keeps a gradient for each parameter.
    assert found["pytorch-grad-cam GradCAM"].held > 0.9 * weights > 3 * found[EAGER].held


def made_up():
    lines = [
        Line(EAGER, "prediction", [1.0] * 7, [1.0] * 7, Memory(0.0, 10.0)),
        Line("captum Saliency", "peer", [9.0] * 7, [8.0, 9.0, 9.0, 9.0, 9.0, 9.0, 10.0], Memory(1.0, 29.0)),
        Line("zennit Gradient", "peer", note="not installed: No module named 'zennit'"),
        Line(GRADIENT, "gradient", [2.0] * 7, [2.0] * 7, Memory(5.0, 15.0)),
    ]
    cells = [Cell("tiny", batch, EAGER, lines) for batch in (1, 8)]
    classes = [ClassMemory("tiny", 8, 1000, GRADIENT, Memory(1.0, 2.0))]
    curves = [Curve("tiny", "batch", (1, 2), {GRADIENT: [[2.0, 3.0, 4.0], [2.5, 2.5, 2.5]]})]
    return Report({"python": "3.11"}, 7, cells, classes, curves)


def test_the_tables(tmp_path):
    report = made_up()
    console = Console(width=160, record=True, file=(tmp_path / "text").open("w"))
    show(console, report.cells[0])
    show_rest(console, report)
    text = console.export_text()
    console.file.close()
    assert "9.00" in text
    assert "8.00-10.00" in text
    assert "not installed" in text
    assert "█" in text
    written = markdown(report)
    assert "| captum Saliency | 9.00 (8.00-10.00) |" in written
    assert "| captum Saliency | 30; 3.00; 1.50 |" in written
    assert "- tiny, batch 8: zennit Gradient: not installed" in written
    assert "| tiny, batch 8 | 1000 | autograd gradient | 1.0 | 3.0 |" in written
    assert "| autograd gradient | 3.00 (2.00-4.00) | 2.50 (2.50-2.50) |" in written


@pytest.mark.parametrize("name", ["chart.svg", "chart.png"])
def test_the_chart(tmp_path, name):
    draw(made_up(), tmp_path / name)
    assert (tmp_path / name).stat().st_size > 5000


def test_the_command(tmp_path, monkeypatch):
    """One whole run, but for the memory, of the bundled network's cheapest rows."""
    monkeypatch.setattr(peers, "PREDICTIONS", PREDICTIONS[:2])
    monkeypatch.setattr(peers, "PEERS", PEERS[:1])
    monkeypatch.setattr(peers, "OURS", OURS[:3])
    files = [f"--{kind}={tmp_path / kind}" for kind in ("json", "markdown")]
    ran = CliRunner().invoke(peers.main, ["--models", SCENES, "--batches", "2", "--no-memory", *files])
    assert ran.exit_code == 0, ran.output
    found = json.loads((tmp_path / "json").read_text())
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0] or found["versions"]["torch"]
    (cell,) = found["cells"]
    assert [line["name"] for line in cell["lines"]] == [row.name for row in (*PREDICTIONS[:2], *PEERS[:1], *OURS[:3])]
    assert all(len(line["seconds"]) == 7 for line in cell["lines"])
    assert "| captum Saliency |" in (tmp_path / "markdown").read_text()
