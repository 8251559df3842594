"""The captum-style face: captum's conventions, and with the rule off captum's own numbers."""

import pytest
import torch
from torch import nn

from parchgrad.attribution import ParchGrad
from parchgrad.errors import OptionError
from parchgrad.explainer import Explainer
from tests.oracles.tolerance import assert_close, assert_each_close
from tests.parchgrad.networks import Branching, batch, build, table_for
from tests.parchgrad.test_explainer import callers_model, snapshot

attr = pytest.importorskip("captum.attr", reason="captum is a development dependency")


class Modules(Branching):
    """ReLU as separate modules: captum's guided backpropagation sees no others."""

    def __init__(self):
        super().__init__()
        self.acts = nn.ModuleList([nn.ReLU(), nn.ReLU(), nn.ReLU()])

    def forward(self, images):
        z = self.acts[0](self.norm(self.stem(images)))
        z = self.acts[1](self.left(z) + self.right(z) + z)
        return self.head(self.acts[2](self.join(z)).mean((2, 3)))


@pytest.fixture
def model():
    return build(Modules)


TARGETS = [1, 4, 0]


@pytest.mark.parametrize(
    "target", [2, TARGETS, tuple(TARGETS), torch.tensor(TARGETS)], ids=["int", "list", "tuple", "tensor"]
)
def test_gradient_equals_captums_saliency(model, target):
    expected = attr.Saliency(model).attribute(
        batch(3).requires_grad_(), target=list(target) if isinstance(target, tuple) else target, abs=False
    )
    found = ParchGrad(model, table_for(model)).attribute(batch(3), target=target, rule=False)
    assert_each_close(found, expected, 1e-10)


def test_abs_is_captums_abs(model):
    expected = attr.Saliency(model).attribute(batch(3).requires_grad_(), target=TARGETS)
    found = ParchGrad(model, table_for(model)).attribute(batch(3), target=TARGETS, abs=True, rule=False)
    assert_each_close(found, expected, 1e-10)


def test_input_x_gradient_equals_captums(model):
    expected = attr.InputXGradient(model).attribute(batch(3).requires_grad_(), target=TARGETS)
    found = ParchGrad(model, table_for(model)).attribute(
        batch(3), target=TARGETS, method="input_x_gradient", rule=False
    )
    assert_each_close(found, expected, 1e-10)


@pytest.mark.parametrize("steps", [1, 7, 25])
def test_integrated_gradients_equal_captums(model, steps):
    expected = attr.IntegratedGradients(model).attribute(
        batch(3), target=TARGETS, n_steps=steps, method="gausslegendre"
    )
    found = ParchGrad(model, table_for(model)).attribute(
        batch(3), target=TARGETS, method="integrated_gradients", steps=steps, rule=False
    )
    assert_each_close(found, expected, 1e-6)  # captum keeps its step sizes in float32


def test_integrated_gradients_from_a_baseline_equal_captums(model):
    start = batch(3, seed=8)
    expected = attr.IntegratedGradients(model).attribute(batch(3), start, target=TARGETS, n_steps=5)
    found = ParchGrad(model, table_for(model)).attribute(
        batch(3), target=TARGETS, method="integrated_gradients", steps=5, rule=False, baseline=start
    )
    assert_each_close(found, expected, 1e-6)


@pytest.mark.filterwarnings("ignore:Setting backward hooks on ReLU")
def test_guided_backprop_equals_captums(model):
    expected = attr.GuidedBackprop(model).attribute(batch(3).requires_grad_(), target=TARGETS)
    found = ParchGrad(model, table_for(model)).attribute(batch(3), target=TARGETS, method="guided_backprop", rule=False)
    assert_each_close(found, expected, 1e-10)


def test_with_the_rule_it_is_the_explainers_attribution(model):
    table = table_for(model, quantile=0.3)
    explainer = Explainer(model, table, backward="dense")
    expected = explainer.explain(batch(3), TARGETS, gamma=2.0)
    assert torch.equal(ParchGrad(model, table).attribute(batch(3), target=TARGETS, gamma=2.0), expected.attributions)
    predicted = ParchGrad(model, table).attribute(batch(3))
    assert torch.equal(predicted, explainer.explain(batch(3)).attributions)


def test_inputs_may_require_grad_and_stay_as_they_were():
    model = callers_model(Modules)
    before = snapshot(model)
    inputs = batch(2).requires_grad_()
    found = ParchGrad(model, table_for(model)).attribute(inputs, target=1)
    assert inputs.grad is None
    assert not found.requires_grad
    assert snapshot(model) == before


def test_the_model_is_taken_as_it_is_at_each_call(model):
    face = ParchGrad(model, table_for(model))
    first = face.attribute(batch(1), target=1)
    model.head.weight.data = model.head.weight.data * 2.0  # another tensor, not an in-place change
    assert_close(face.attribute(batch(1), target=1), 2 * first, 1e-10)


def test_unknown_options_are_refused(model):
    with pytest.raises(OptionError, match="Option 'gamma'"):
        ParchGrad(model, table_for(model)).attribute(batch(1), target=1, gamma=-1.0)
    with pytest.raises(TypeError, match="gama"):
        ParchGrad(model, table_for(model)).attribute(batch(1), target=1, gama=1.0)
