"""The views of the layers against an oracle that notes what every convolution sees."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from parchgrad.errors import OptionError, UncoveredTargetError, UnsupportedModelError
from parchgrad.explainer import Explainer
from parchgrad.layer_views import layer_views
from parchgrad.options import Options
from parchgrad.tables import SelectionTable
from tests.oracles import layers, maps, rule, selection
from tests.oracles.tolerance import assert_close
from tests.parchgrad import networks
from tests.parchgrad.networks import batch, build, table_for

CASES = [
    pytest.param(network, options, id=f"{network.__name__}, {name}")
    for network, options, name in (
        (networks.Branching, {"quantile": 0.3}, "the paper's"),
        (networks.Branching, {"gamma": 2.0, "conserve": "exact", "layers": ("left", "join")}, "some layers"),
        (networks.InPlaceOnBranch, {"gamma": 0.5, "conserve": "none", "selection": "instance"}, "instance"),
        (networks.ReusedConvolution, {"quantile": 0.4, "layers": ("stem", "right", "join")}, "called twice"),
        (networks.ReusedBeforePooling, {"quantile": 0.4, "layers": ("stem", "right")}, "unchanged in the second call"),
        (networks.OnePosition, {"quantile": 0.3, "gamma": 3.0}, "maps of one position"),
        (networks.FunctionalRelu, {"alpha": 1e-300, "seed": "probability_weighted_logit"}, "nothing selected"),
        (networks.Hooked, {"rule": False}, "without the rule"),
    )
]


def oracle_options(options):
    values = dataclasses.asdict(options)
    return maps.Options(
        **{field.name: values[field.name] for field in dataclasses.fields(maps.Options) if field.name in values}
    )


def view_of(network, options, target=2, **asked):
    model, image = build(network), batch(1)[0]
    table = table_for(model)
    return layer_views(Explainer(model, table), image, target, options, **asked), model, table, image


@pytest.mark.parametrize(("network", "given"), CASES)
def test_every_number_is_the_oracles(network, given):
    options = Options(**given)
    view, model, table, image = view_of(network, options, channels=64)
    expected, ruled = layers.calls_of(model, table, image, oracle_options(options), view.target)
    without = dataclasses.replace(oracle_options(options), rule=False)
    plain_calls, plain = layers.calls_of(model, table, image, without, view.target)
    # Layers of a convolution that never ran on the way to the logits have no view.
    assert [layer.name for layer in view.layers] == [call.name for call in expected]
    assert_close(view.ruled, np.abs(ruled).mean(0), 1e-6)
    assert_close(view.plain, np.abs(plain).mean(0), 1e-6)
    for layer, call, other in zip(view.layers, expected, plain_calls, strict=True):
        assert_layer(layer, call, other.before, options, table.layers[layer.name], table)


def assert_layer(layer, call, plain, options, rows, table):
    assert layer.shape == call.output.shape
    assert layer.selected == tuple(np.flatnonzero(call.selected))
    energies = [(grads**2).sum((1, 2)) for grads in (plain, call.before, call.after)]
    found = layer.plain_energy, layer.before_energy, layer.after_energy
    assert_close(found, [one.sum() for one in energies], 1e-9)
    shares = [one / one.sum() if one.sum() else one for one in energies]
    found = layer.selected_plain_share, layer.selected_before_share, layer.selected_after_share
    assert_close(found, [share[call.selected].sum() for share in shares], 1e-9)
    high, low = call.before[call.selected].sum(0), call.before[[not one for one in call.selected]].sum(0)
    assert_close(layer.sum_selected, high, 1e-6)
    assert_close(layer.sum_unselected, low, 1e-6)
    assert_close(layer.sum_after, call.after.sum(0), 1e-6)
    assert layer.active is (layer.rule is not None) is (options.rule and layer.name in matched(options, table))
    if layer.rule is not None:
        assert_rule(layer.rule, call, options)
    assert [one.index for one in layer.channels if one.selected] == [i for i in strongest(call) if call.selected[i]]
    assert len(layer.channels) == len(call.output)
    for one in layer.channels:
        assert one.selected is bool(call.selected[one.index])
        assert_close(one.feature, selection.gap_feature(call.output)[one.index], 1e-9)
        if rows.std[one.index] > 0:
            assert_close(one.deviations, (one.feature - float(rows.mean[one.index])) / float(rows.std[one.index]))
        else:
            assert one.deviations is None
        assert one.rank == int(rows.rank[2, one.index])
        assert one.log_p == float(rows.log_p[2, one.index])
        assert_close([one.plain_share, one.before_share, one.after_share], [share[one.index] for share in shares], 1e-9)
        assert_close(one.activation, np.maximum(call.output[one.index], 0), 1e-6)
        assert_close(one.plain, plain[one.index], 1e-6)
        assert_close(one.before, call.before[one.index], 1e-6)
        assert_close(one.factor * one.before, call.after[one.index], 1e-6)


def matched(options, table):
    return [name for name in table.layers if "*" in options.layers or name in options.layers]


def strongest(call):
    features = selection.gap_feature(call.output)
    return sorted(range(len(features)), key=lambda i: (-features[i], i))


def assert_rule(found, call, options):
    m, n, k = rule.image_moments(call.before, call.selected)
    assert_close([found.m, found.n, found.k], [m, n, k], 1e-9)
    assert found.identity is (call.factors is None)
    high, low = call.factors or (1.0, 1.0)
    assert_close([found.selected_factor, found.unselected_factor], [high, low], 1e-9)
    assert_close(found.a * found.b, high, 1e-9)
    if call.factors and not math.isinf(options.gamma):
        assert_close([found.a, found.b], [options.gamma * math.sqrt(n / m), low], 1e-9)
    for sd, grads in ((found.sd_before, call.before), (found.sd_after, call.after)):
        total = grads.sum(0)
        assert_close(sd, math.sqrt(rule.moment(total, total)), 1e-6)


def test_the_explanation_and_its_view_are_one_way_back():
    """The pruned engine explains, the dense one is looked at."""
    model, image = build(dtype=torch.float32), batch(1, dtype=torch.float32)
    explainer = Explainer(model, table_for(model))
    assert explainer.backward == "pruned"
    view, explanation = layer_views(explainer, image[0]), explainer.explain(image)
    assert_close(view.ruled, explanation.saliency()[0], 1e-5)
    assert (view.target, view.identity_layers) == (int(explanation.targets), int(explanation.identity_layers))
    assert_close(view.probabilities, explanation.probabilities()[0], 1e-5)


@pytest.mark.parametrize("order", ["activation", "gradient", "table"])
def test_both_sides_are_shown_the_strongest_first(order):
    view, *_ = view_of(networks.Branching, Options(quantile=0.5), channels=5, order=order)
    everything, *_ = view_of(networks.Branching, Options(quantile=0.5), channels=64, order=order)
    of_order = {"activation": "feature", "gradient": "before_share", "table": "rank"}[order]
    for layer, whole in zip(view.layers, everything.layers, strict=True):
        assert [one.selected for one in layer.channels] == [True] * 3 + [False] * 2
        for side in (True, False):
            all_of_it = [one for one in whole.channels if one.selected is side]
            values = [getattr(one, of_order) for one in all_of_it]
            assert values == sorted(values, reverse=order != "table")
            shown = [one.index for one in layer.channels if one.selected is side]
            assert shown == [one.index for one in all_of_it][: len(shown)]


@pytest.mark.parametrize(("quantile", "expected"), [(0.1, [1, 7]), (1.0, [8, 0])], ids=["one", "all"])
def test_the_other_side_fills_what_one_does_not(quantile, expected):
    view, *_ = view_of(networks.Branching, Options(quantile=quantile), channels=8)
    stem = view.layers[0].channels
    assert [sum(one.selected for one in stem), sum(not one.selected for one in stem)] == expected


def test_large_maps_are_averaged_down():
    view, _, _, _ = view_of(networks.Branching, Options(), most_side=3)
    whole, _, _, _ = view_of(networks.Branching, Options())
    assert whole.layers[0].channels[0].activation.shape == (6, 6)
    for small, large in ((view.layers[0].sum_after, whole.layers[0].sum_after), (view.ruled, whole.ruled)):
        blocks = large.reshape(3, large.shape[0] // 3, 3, large.shape[1] // 3).mean((1, 3))
        assert_close(small, blocks, 1e-5)


def test_the_callers_model_is_untouched_and_another_explanation_undisturbed():
    model, images = build(), batch(2)
    before = copy.deepcopy(model.state_dict())
    explainer = Explainer(model.train(), table_for(model), backward="dense")
    first = explainer.explain(images).attributions
    layer_views(explainer, images[0])
    assert model.training
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(explainer.explain(images).attributions, first)


@pytest.mark.parametrize(
    ("options", "asked", "message"),
    [
        ({}, {"channels": 0}, r"'channels' is 0; allowed: an integer in 1\.\.64"),
        ({}, {"channels": True}, "'channels' is True"),
        ({}, {"order": "size"}, "'order' is 'size'; allowed: activation, gradient, table"),
        ({"method": "smoothgrad"}, {}, "'method' is 'smoothgrad'; allowed: gradient, input_x_gradient, guided"),
    ],
)
def test_what_cannot_be_shown_is_refused(options, asked, message):
    with pytest.raises(OptionError, match=message):
        view_of(networks.Branching, Options(**options), **asked)


def test_a_class_without_a_row_is_refused_where_the_table_is_asked():
    model, image = build(), batch(1)[0]
    predicted = int(model(image[None]).argmax())
    others = tuple(i for i in range(networks.CLASSES) if i != predicted)
    explainer = Explainer(model, table_for(model, covered=others))
    for target in (predicted, None):
        with pytest.raises(UncoveredTargetError, match="no row"):
            layer_views(explainer, image, target)
    view = layer_views(explainer, image, None, Options(selection="instance"))
    assert view.layers[0].channels[0].rank is None
    with pytest.raises(OptionError, match=f"'order' is 'table'; .* class {predicted} has no row"):
        layer_views(explainer, image, None, Options(selection="instance"), order="table")


def test_several_images_are_refused():
    model = build()
    explainer = Explainer(model, table_for(model))
    with pytest.raises(OptionError, match=r"one image, \(1, 3, h, w\)"):
        layer_views(explainer, batch(2))


class Windows(networks.Branching):
    """Looks at the image's halves side by side in one batch."""

    def forward(self, images):
        return super().forward(torch.cat(images.chunk(2, dim=3))).chunk(2)[0]


def test_a_layer_that_works_on_more_than_the_image_is_refused():
    model = build(Windows)
    explainer = Explainer(model, SelectionTable.random(model, 5, seed=0), backward="dense")
    with pytest.raises(UnsupportedModelError, match="expected it to work on it alone"):
        layer_views(explainer, batch(1)[0], 1)
