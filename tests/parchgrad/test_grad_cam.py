"""The method `grad_cam`: both engines against the map oracle and pytorch-grad-cam; what it refuses."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import parchgrad
from parchgrad.errors import OptionError
from parchgrad.evaluation.baselines import grad_cam_maps
from parchgrad.explainer import Explainer
from parchgrad.grad_cam import grad_cam
from parchgrad.options import Options as Given
from parchgrad.runtimes.dense import DenseEngine
from parchgrad.tables import SelectionTable
from tests.oracles import maps
from tests.oracles.maps import Options
from tests.oracles.tolerance import assert_close, assert_each_close
from tests.parchgrad import networks, test_families
from tests.parchgrad.networks import batch, build, table_for
from tests.parchgrad.test_explainer import by_name, explain_with
from tests.parchgrad.test_seed_evidence import (
    ENGINES,
    REFUSED,
    TRACED,
    GlobalDepthwise,
    OneConvolution,
    Pooled,
    explainer_of,
)

ROOT = Path(__file__).parents[2]
SEEDS = ("logit", "probability_weighted_logit")


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stretched(cams):
    low, high = cams.amin((1, 2), keepdim=True), cams.amax((1, 2), keepdim=True)
    return (cams - low) / (high - low)


def test_with_global_average_pooling_it_is_the_positive_class_map():
    """Zhou et al. 2016, of which Grad-CAM is the generalisation."""
    head, values = drawn(6), drawn(2, 6, 5, 4, seed=1)
    gradients = (head / 20)[None, :, None, None].expand(2, 6, 5, 4)
    expected = torch.einsum("c,bchw->bhw", head, values).clamp(min=0) / 20
    assert_close(grad_cam(values, gradients, (5, 4)), expected, 1e-12)
    assert_close(grad_cam(values, gradients * 1e-30, (5, 4)) * 1e30, expected, 1e-12)
    enlarged = torch.from_numpy(maps.enlarged(expected[1].numpy(), 13, 9))
    assert_close(grad_cam(values, gradients, (13, 9))[1], enlarged, 1e-12)
    halves = grad_cam(values.half(), gradients.half(), (5, 4))
    assert halves.dtype == torch.float32
    assert_close(halves.double(), expected, 1e-2)


# --- the engines ---


@pytest.mark.parametrize("network", TRACED, ids=by_name)
def test_it_equals_the_oracle(network):
    model, images = build(network), batch(3)
    options = [
        Options(target=t, method="grad_cam", seed=s) for t, s in ((0, SEEDS[0]), (3, SEEDS[1]), (None, SEEDS[0]))
    ]
    expected, answers = maps.explain_batch(model, table_for(model), images, options)
    for engine in ENGINES:
        if engine != "dense" and network in (networks.ReusedConvolution, networks.ReusedBeforePooling):
            continue  # cannot be pruned
        found = explain_with(explainer_of(engine, model, table_for(model)), images, options)
        assert_each_close(found.attributions, expected, 1e-8)
        assert_each_close(found.logits, [answer.logits for answer in answers], 1e-8)
        assert found.targets.tolist() == [answer.target for answer in answers]
        assert found.layers_used.tolist() == found.identity_layers.tolist() == [0, 0, 0]
        assert [one.rule for one in found.options] == [False] * 3
        assert bool(found.covered.all())
        assert bool(found.completeness_gap.isnan().all())


# As pytorch-grad-cam is told where the last map is: what gives it, as the table in docs/evidence.md says.
LAYERS = {"squeezenet1_1": "classifier.2", "mobilenet_v2": "features", "resnet18": "layer4", "vgg11_bn": "avgpool"}


@pytest.mark.parametrize("name", LAYERS)
def test_with_families_it_equals_pytorch_grad_cam(name, monkeypatch):
    pytest.importorskip("pytorch_grad_cam")
    model, targets = test_families.network(name), [2, 2]
    images = torch.rand(2, 3, 65, 97, generator=torch.Generator().manual_seed(3)).double()
    table = SelectionTable.random(model, test_families.CLASSES, 0)
    dense = Explainer(model, table, backward="dense").explain(images, targets, method="grad_cam").saliency()
    monkeypatch.setattr(DenseEngine, "at_last_map", lambda *given: 1 / 0)
    explainer = Explainer(model, table, backward="pruned")
    found = explainer.explain(images, targets, method="grad_cam").saliency()
    assert float(found.amax((1, 2)).min()) > 0
    assert_each_close(found, dense, 1e-8)
    assert_each_close(stretched(found), grad_cam_maps(explainer, LAYERS[name])(images, targets).double(), 1e-4)


def test_of_the_bundled_model_it_equals_pytorch_grad_cam():
    pytest.importorskip("pytorch_grad_cam")
    model = parchgrad.load_model(ROOT / "models/scenes")
    explainer = Explainer(model, parchgrad.load_table(ROOT / "selection_tables/scenes"))
    images = torch.rand(3, 3, 64, 80, generator=torch.Generator().manual_seed(0)) * 4 - 2
    found = explainer.explain(images, None, method="grad_cam")
    theirs = grad_cam_maps(explainer, "features")(images, found.targets.tolist())
    assert float(found.saliency().amax((1, 2)).min()) > 0
    assert_each_close(stretched(found.saliency()), theirs, 1e-3)


class Rectified(networks.Branching):
    """Its last ReLU and the pooling after it are one step of the pruned engine."""

    def forward(self, images):
        z = F.relu(self.join(F.relu(self.norm(self.stem(images)))))
        return self.head(F.max_pool2d(z, 6).flatten(1))


class OverwrittenFlat(networks.Branching):
    """Writes into its last map, through a view without places."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(12 * 36, networks.CLASSES)

    def forward(self, images):
        z = self.join(F.relu(self.norm(self.stem(images))))
        return self.head(torch.flatten(z, 1).relu_())


@pytest.mark.parametrize("network", [Pooled, Rectified, GlobalDepthwise, OneConvolution, OverwrittenFlat], ids=by_name)
def test_the_pruned_engine_takes_the_last_map_after_its_activation(network):
    model, images = build(network), batch(2)
    pruned, dense = (
        Explainer(model, table_for(model), backward=engine).explain(images, [1, 3], method="grad_cam").attributions
        for engine in ("pruned", "dense")
    )
    assert float(dense.amax((1, 2, 3)).min()) > 0
    assert_each_close(pruned, dense, 1e-10)
    if network not in (Pooled, Rectified):
        return
    with torch.no_grad():  # its pooling's gradient is the head's weight at the largest place
        z = F.relu(model.join(F.relu(model.norm(model.stem(images)))))
    weights = model.head.weight[[1, 3]] * (z.amax((2, 3)) > 0) / z[0, 0].numel()
    cam = F.relu((weights[:, :, None, None] * z).sum(1, keepdim=True))
    assert_each_close(pruned[:, 0], F.interpolate(cam, images.shape[2:], mode="bilinear")[:, 0].detach(), 1e-10)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_image_that_is_not_finite_leaves_its_mates_alone(engine):
    model, images = build(), batch(3)
    explainer = explainer_of(engine, model, table_for(model))
    expected = explainer.explain(images, 1, method="grad_cam").attributions
    images[1, 0, 3, 3] = math.nan
    found = explainer.explain(images, 1, method="grad_cam").attributions
    assert_each_close(found[[0, 2]], expected[[0, 2]], 1e-10)
    assert bool(found[1].isnan().any())


def test_changed_weights_are_seen():
    model, images = build(), batch(2)
    explainer = Explainer(model, table_for(model), backward="pruned")
    before = explainer.explain(images, 1, method="grad_cam").attributions
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert_each_close(explainer.explain(images, 1, method="grad_cam").attributions, 2 * before, 1e-10)


def test_under_autocast_it_is_the_same_up_to_its_precision():
    model = build(dtype=torch.float32)
    explainer, images = Explainer(model, table_for(model)), batch(2, dtype=torch.float32)
    expected = explainer.explain(images, 1, method="grad_cam").attributions
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = explainer.explain(images, 1, method="grad_cam").attributions
    assert found.dtype == expected.dtype == torch.float32
    assert_each_close(found, expected, 0.1)


# --- what it is to a caller ---


def test_polarities_are_of_the_same_value_in_every_colour():
    model = build()
    found = Explainer(model, table_for(model)).explain(batch(2), 1, method="grad_cam")
    cam = found.attributions[:, 0]
    assert torch.equal(found.attributions, cam[:, None].expand(2, 3, 12, 12))
    assert_close(found.saliency("mean_abs"), cam, 1e-12)
    assert_close(found.saliency("positive"), 3 * cam, 1e-12)
    assert float(found.saliency("negative").max()) == 0


def test_the_table_is_not_asked():
    model = build()
    table = table_for(model, covered=(0,), quantile=0.4, selection="instance")
    explainer = Explainer(model, table)
    found = explainer.explain(batch(2), 3, method=["grad_cam", "gradient"], rule=[None, False])
    alone = Explainer(model, table_for(model)).explain(batch(2)[:1], 3, method="grad_cam")
    assert_close(found.attributions[0], alone.attributions[0], 1e-10)
    assert found.options[0].rule is False
    with pytest.raises(parchgrad.errors.UncoveredTargetError):
        explainer.explain(batch(2), 3, method=["grad_cam", "gradient"], selection="class")


def test_it_has_no_seed_of_evidence():
    with pytest.raises(
        OptionError, match="'seed' is 'evidence'; allowed: logit, probability_weighted_logit with method"
    ):
        Given(method="grad_cam", seed="evidence")


@pytest.mark.parametrize("network", REFUSED, ids=by_name)
def test_a_network_without_a_last_map_is_refused_by_name(network):
    model = build(network)
    explainer = Explainer(model, table_for(model))
    explainer.require_statistics([Given(method="grad_cam")], (3, 12, 12), look=False)  # nothing is known yet
    methods = "gradient, input_x_gradient, integrated_gradients, smoothgrad, guided_backprop; "
    message = "Option 'method' is 'grad_cam'; allowed: " + methods + REFUSED[network]
    with pytest.raises(OptionError, match=message) as caught:
        explainer.explain(batch(2), 1, rule=False, method=["gradient", "grad_cam"])
    assert (caught.value.option, caught.value.value) == ("method", "grad_cam")
    with pytest.raises(OptionError, match=message):
        explainer.require_statistics([Given(method="grad_cam")], (3, 12, 12), look=False)
    explainer.explain(batch(2), 1, rule=False)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_model_is_left_alone(engine):
    model = build(networks.InPlaceRelu).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images = batch(2)
    before = images.clone()
    explainer_of(engine, model, table_for(model)).explain(images, 1, method="grad_cam")
    assert torch.equal(images, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())

    assert model.training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
