"""The explainer against the map oracle; independence of batch-mates and threads; the caller's model untouched."""

import copy
import dataclasses
import gc
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parchgrad.errors import (
    AbandonedError,
    OptionError,
    ParchGradError,
    TableError,
    UncoveredTargetError,
    UnknownTargetError,
    UnsupportedModelError,
)
from parchgrad.explainer import Explainer
from parchgrad.methods import PIXELS_PER_PASS
from parchgrad.tables import SelectionTable
from tests.oracles import maps
from tests.oracles.maps import Options
from tests.oracles.tolerance import assert_close, assert_each_close, relative_l2
from tests.parchgrad import networks
from tests.parchgrad.networks import batch, build, table_for

KINKED = [network for network in networks.ALL if network is not networks.Smooth]


def by_name(network):
    return network.__name__


def options_of(option):
    """An oracle option as keyword arguments of `explain`."""
    given = dataclasses.asdict(option)
    given.pop("target")
    return given


def explain_with(explainer, images, options):
    """One `explain` call in which every image has its own entry of `options`."""
    columns = {name: [options_of(o)[name] for o in options] for name in options_of(options[0])}
    return explainer.explain(images, [o.target for o in options], **columns)


def assert_equals_oracle(model, table, images, options, relative=1e-8):
    explanation = explain_with(Explainer(model, table), images, options)
    expected, answers = maps.explain_batch(model, table, images, options)
    assert_each_close(explanation.attributions, expected, relative)
    assert_each_close(explanation.logits, [answer.logits for answer in answers], relative)
    assert explanation.targets.tolist() == [answer.target for answer in answers]
    assert explanation.identity_layers.tolist() == [answer.identity_layers for answer in answers]
    assert explanation.layers_used.tolist() == [answer.layers_used for answer in answers]
    assert float(np.abs(expected).max()) > 0
    return explanation


VARIANTS = {
    "plain": {"rule": False},
    "default": {},
    "quantile": {"quantile": 0.4},
    "quantile-one": {"quantile": 1.0},
    "quantile-schedule": {"quantile": {"stem": 0.5, "[lr]*": 0.3, "*": 0.2}},
    "alpha": {"alpha": 0.3},
    "alpha-nothing": {"alpha": 1e-30},
    "gamma-0": {"gamma": 0.0, "quantile": 0.3},
    "gamma-3": {"gamma": 3.0, "quantile": 0.3},
    "exact": {"conserve": "exact", "quantile": 0.3},
    "exact-gamma": {"conserve": "exact", "gamma": 0.5, "quantile": 0.3},
    "none": {"conserve": "none", "quantile": 0.3},
    "none-gamma": {"conserve": "none", "gamma": 3.0, "quantile": 0.3},
    "instance": {"selection": "instance", "quantile": 0.4},
    "instance-alpha": {"selection": "instance", "alpha": 0.4},
    "normality": {"normality_filter": True, "quantile": 0.6},
    "normality-instance": {"normality_filter": True, "selection": "instance", "quantile": 0.6},
    "layers": {"layers": ("left", "j*"), "quantile": 0.3},
    "probability": {"seed": "probability_weighted_logit", "quantile": 0.3},
    "guided-plain": {"method": "guided_backprop", "rule": False},
    "guided": {"method": "guided_backprop", "quantile": 0.4},
    "input-x": {"method": "input_x_gradient", "quantile": 0.3},
    "integrated": {"method": "integrated_gradients", "steps": 4, "quantile": 0.3, "gamma": 2.0},
    "integrated-instance": {"method": "integrated_gradients", "steps": 3, "selection": "instance", "quantile": 0.4},
    "smoothgrad": {"method": "smoothgrad", "samples": 3, "quantile": 0.3, "noise_seed": 5, "noise": 0.3},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_option_equals_the_oracle(variant):
    model = build()
    assert_equals_oracle(model, table_for(model), batch(2), [Options(target=t, **variant) for t in (1, None)])


def test_the_variants_differ_from_one_another():
    """Guards the test above: an option that changes nothing would be tested by nothing."""
    model = build()
    explainer, images = Explainer(model, table_for(model)), batch(2)
    found = {n: explain_with(explainer, images, [Options(target=1, **v)] * 2).attributions for n, v in VARIANTS.items()}
    alike = {("alpha-nothing", "plain"), ("quantile-one", "plain"), ("quantile-one", "alpha-nothing")}
    for one in found:
        for other in found:
            if one < other and (one, other) not in alike and (other, one) not in alike:
                assert relative_l2(found[one], found[other]) > 1e-3, (one, other)


@pytest.mark.parametrize("method", ["gradient", "guided_backprop"])
@pytest.mark.parametrize("gamma", [2.0, math.inf], ids=["finite", "infinite"])
@pytest.mark.parametrize("network", KINKED, ids=by_name)
def test_every_kind_of_network_equals_the_oracle(network, gamma, method):
    """In-place, reused and functional activations, in-place sums on a branch, views, a convolution used twice."""
    if network in (networks.ViewedOutput, networks.SlicedRelu) and method == "guided_backprop":
        pytest.skip("writes into a slice: see test_guided_backprop_refuses_what_it_cannot_see")
    model = build(network)
    options = [Options(target=t, method=method, gamma=gamma, quantile=0.3, layers=used(model)) for t in (0, 3)]
    assert_equals_oracle(model, table_for(model), batch(2), options)


@pytest.mark.parametrize("network", networks.ALL, ids=by_name)
def test_instance_wise_sees_the_convolutions_own_output(network):
    """GAP features are those of z itself, also where an in-place ReLU overwrites z or a BatchNorm follows."""
    model = build(network)
    options = [
        Options(target=2, selection="instance", quantile=0.4, gamma=g, layers=used(model)) for g in (1.0, math.inf)
    ]
    assert_equals_oracle(model, table_for(model), batch(2), options)


def used(model):
    """The convolutions that take part in the forward pass; the networks inherit some that do not."""
    seen, handles = [], []
    for name, module in model.named_modules():
        if isinstance(module, maps.CONVOLUTIONS):
            handles.append(module.register_forward_hook(lambda *_, name=name: seen.append(name)))
    with torch.no_grad():
        model(batch(1))
    for handle in handles:
        handle.remove()
    return tuple(dict.fromkeys(seen))


def test_the_plain_gradient_equals_finite_differences():
    """The oracle of the oracle: no autograd at all."""
    model, images = build(networks.InPlaceOnBranch), batch(1)
    found = Explainer(model, table_for(model)).explain(images, 2, rule=False).attributions[0]
    step = 1e-6
    for index in ((0, 3, 4), (2, 7, 1), (1, 0, 11)):
        up, down = images.clone(), images.clone()
        up[(0, *index)] += step
        down[(0, *index)] -= step
        with torch.no_grad():
            slope = (model(up)[0, 2] - model(down)[0, 2]) / (2 * step)
        assert float(found[index]) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)


def mixed():
    """A batch in which no two images agree on anything."""
    return [
        Options(target=0, quantile=0.2, layers=("left", "join")),
        Options(target=4, gamma=0.5, conserve="exact", quantile={"stem": 0.5, "*": 0.2}),
        Options(target=None, method="input_x_gradient", alpha=0.3, conserve="none", gamma=4.0),
        Options(target=2, method="integrated_gradients", steps=3, selection="instance", quantile=0.4),
        Options(target=1, method="smoothgrad", samples=2, noise=0.2, noise_seed=9, gamma=2.0),
        Options(target=3, method="guided_backprop", quantile=0.5, normality_filter=True),
        Options(target=0, rule=False),
        Options(target=1, rule=False, method="integrated_gradients", steps=5),
        Options(target=2, seed="probability_weighted_logit", selection="instance", alpha=0.5, gamma=1.5),
        Options(target=4, method="smoothgrad", samples=3, rule=False),
        Options(target=3, rule=False, method="guided_backprop"),
        Options(target=-1, quantile=1.0),
        Options(target=2, method="grad_cam", quantile=0.3, selection="instance"),
        Options(target=None, method="grad_cam", seed="probability_weighted_logit"),
    ]


def test_a_mixed_batch_equals_one_by_one_and_the_oracle():
    model, options = build(), mixed()
    table, images = table_for(model), batch(len(mixed()))
    explainer = Explainer(model, table)
    together = assert_equals_oracle(model, table, images, options)
    for i, option in enumerate(options):
        alone = explain_with(explainer, images[i : i + 1], [option])
        assert_close(together.attributions[i], alone.attributions[0], 1e-10)
        for name in ("targets", "identity_layers", "layers_used", "covered"):
            assert getattr(together, name)[i] == getattr(alone, name)[0], name
        assert_close(together.completeness_gap[i], alone.completeness_gap[0], 1e-6)


def test_a_mixed_batch_in_another_order_is_the_same_images():
    model, options = build(), mixed()
    explainer, images = Explainer(model, table_for(model)), batch(len(mixed()))
    order = list(np.random.default_rng(0).permutation(len(options)))
    one = explain_with(explainer, images, options)
    other = explain_with(explainer, images[order], [options[i] for i in order])
    assert_each_close(other.attributions, one.attributions[order], 1e-10)
    assert [o.method for o in other.options] == [options[i].method for i in order]


def test_one_value_stands_for_all_images_and_none_for_the_tables_default():
    model = build()
    table = table_for(model, quantile=0.4, gamma=2.0, conserve="exact", layers=("left", "right"))
    explainer, images = Explainer(model, table), batch(3)
    expected = explain_with(
        explainer, images, [Options(target=1, quantile=0.4, gamma=2.0, conserve="exact", layers=("left", "right"))] * 3
    )
    for given in (
        {},
        {"quantile": None},
        {"quantile": [None, 0.4, None]},
        {"gamma": torch.tensor([2.0] * 3)},
        {"gamma": np.array(2.0)},
        {"layers": ["left", "right"]},
        {"layers": [["left", "right"], None, "[lr]*"]},
    ):
        assert torch.equal(explainer.explain(images, 1, **given).attributions, expected.attributions), given
    assert expected.layers_used.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "targets",
    [2, "class 2", [2, 2, 2], (2, 2, 2), torch.tensor([2, 2, 2]), torch.tensor(2), np.array([2, 2, 2]), np.int64(2),
     ["class 2", 2, np.int32(2)]],
    ids=["int", "label", "list", "tuple", "tensor", "scalar-tensor", "array", "numpy-int", "mixed"],
)  # fmt: skip
def test_every_spelling_of_a_target(targets):
    model = build()
    explainer = Explainer(model, table_for(model))
    assert explainer.explain(batch(3), targets).targets.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "targets", [None, -1, [None, -1, None], torch.tensor([-1, -1, -1])], ids=["none", "minus-1", "list", "tensor"]
)
@pytest.mark.parametrize("method", ["gradient", "smoothgrad"])
def test_without_a_target_the_predicted_class_of_the_clean_image_is_explained(method, targets):
    model = build()
    explanation = Explainer(model, table_for(model)).explain(batch(3), targets, method=method, samples=2, noise=2.0)
    with torch.no_grad():
        assert explanation.targets.tolist() == model(batch(3)).argmax(1).tolist()


TARGETS = {
    "too-large": 5,
    "too-small": -2,
    "unknown-name": "cat",
    "fraction": 1.5,
    "bool": True,
    "nan": math.nan,
    "nested": [[1], 1, 1],
    "float-tensor": torch.tensor([1.5, 1.0, 1.0]),
    "number-too-large-as-text": "5",
    "negative-as-text": "-1",
    "object": [object()] * 3,
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_an_unknown_target_is_refused(target):
    model = build()
    explainer = Explainer(model, table_for(model))
    with pytest.raises(
        UnknownTargetError,
        match=r"^Option 'target' is .*; allowed: an index in 0\.\.4 or a class name, such as 'class 0'\.$",
    ):
        explainer.explain(batch(3), target)


@pytest.mark.parametrize("targets", [[1, 2], [], torch.tensor([1])], ids=["two", "none", "one"])
def test_a_wrong_number_of_targets_is_refused(targets):
    model = build()
    with pytest.raises(OptionError, match="allowed: one target, or one for each of the 3 images"):
        Explainer(model, table_for(model)).explain(batch(3), targets)


BAD = [
    ("method", "grad"),
    ("method", 3),
    ("method", ["gradient", "grad", "gradient"]),
    ("rule", "yes"),
    ("rule", 1),
    ("quantile", 0.0),
    ("quantile", 1.1),
    ("quantile", -0.1),
    ("quantile", math.nan),
    ("quantile", "0.1"),
    ("quantile", True),
    ("quantile", [0.1, 2.0, 0.1]),
    ("quantile", {"*": 0.0}),
    ("quantile", {}),
    ("alpha", 0.0),
    ("alpha", 1.5),
    ("alpha", math.nan),
    ("gamma", -1.0),
    ("gamma", -math.inf),
    ("gamma", math.nan),
    ("gamma", "inf"),
    ("conserve", "yes"),
    ("conserve", None.__class__),
    ("selection", "none"),
    ("seed", "probability"),
    ("steps", 0),
    ("steps", 2.5),
    ("steps", 10**6),
    ("samples", 0),
    ("samples", True),
    ("noise", -0.1),
    ("noise", math.inf),
    ("noise_seed", -1),
    ("noise_seed", 1.0),
    ("normality_filter", "no"),
    ("layers", "nothing*"),
    ("layers", ["left", "stme"]),
    ("layers", []),
    ("layers", 3),
    ("layers", [3, 3, 3]),
    ("uncovered", "ignore"),
    ("gamma", [1.0, 2.0]),
    ("quantile", torch.tensor([0.1, 0.2])),
]


@pytest.mark.parametrize(("option", "value"), BAD, ids=[f"{o}={v}" for o, v in BAD])
def test_a_bad_option_is_refused_by_name_value_and_what_is_allowed(option, value):
    model = build()
    with pytest.raises(OptionError, match=rf"^Option '{option}' is .*; allowed: .+\.$") as caught:
        Explainer(model, table_for(model)).explain(batch(3), 1, **{option: value})
    assert caught.value.option == option
    assert caught.value.allowed


@pytest.mark.parametrize("quantile", [{"left": 0.1}, {"stme": 0.1, "*": 0.1}], ids=["incomplete", "unknown"])
def test_a_quantile_schedule_must_fit_the_layers(quantile):
    model = build()
    with pytest.raises(OptionError, match=r"quantile|stme"):
        Explainer(model, table_for(model)).explain(batch(3), 1, quantile=quantile)


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 12, 12), torch.zeros(0, 3, 12, 12), torch.zeros(1, 3, 12, 12, dtype=torch.uint8)],
    ids=["no-batch-axis", "empty", "uint8"],
)  # fmt: skip
def test_images_of_the_wrong_kind_are_refused(images):
    model = build()
    explainer = Explainer(model, table_for(model))
    for call in (explainer.explain, explainer.predict):
        with pytest.raises(OptionError, match=r"Option 'images' is .*floating point of shape"):
            call(images)


def test_normality_filter_needs_a_table_that_tested_it():
    model = build()
    with pytest.raises(OptionError, match=r"normality_filter.*'random' holds no normality test"):
        Explainer(model, SelectionTable.random(model, 5, 0)).explain(batch(1), 1, normality_filter=True)


def test_an_uncovered_target_is_an_error_or_nan_for_that_image_alone():
    model = build()
    explainer = Explainer(model, table_for(model, covered=(4, 0, 2)))
    images = batch(4)
    with pytest.raises(UncoveredTargetError, match=r"no row for target 1 \(class 1\)"):
        explainer.explain(images, [4, 1, 2, 0])
    found = explainer.explain(
        images, [4, 1, 2, 0], uncovered="nan", method=["gradient", "gradient", "smoothgrad", "gradient"]
    )
    assert found.covered.tolist() == [True, False, True, True]
    assert found.attributions[1].isnan().all()
    assert found.attributions[[0, 2, 3]].isfinite().all()
    expected = explainer.explain(images[[0, 3]], [4, 0]).attributions
    assert_each_close(found.attributions[[0, 3]], expected, 1e-10)
    for given in ({"rule": False}, {"selection": "instance"}):
        assert explainer.explain(images, [4, 1, 2, 0], **given).attributions.isfinite().all()


def test_rows_of_a_partial_table_belong_to_their_classes():
    """Row i is not class i: the table covers 4, 0, 2 in this order."""
    model = build()
    table = table_for(model, covered=(4, 0, 2))
    assert_equals_oracle(model, table, batch(3), [Options(target=t, quantile=0.3) for t in (0, 2, 4)])


def test_a_table_with_too_few_labels_for_a_bare_module_is_refused_plainly():
    """The predicted class may lie outside the table's labels: an error of ours, no IndexError."""
    model = build()
    table = SelectionTable.random(model, [0], 0)
    with pytest.raises(ParchGradError):
        Explainer(model, table).explain(batch(3))


def test_a_table_with_too_many_labels_for_a_bare_module_is_refused_plainly():
    model = build()
    with pytest.raises(ParchGradError):
        Explainer(model, SelectionTable.random(model, 9, 0)).explain(batch(1), 7)


def test_a_table_of_another_network_is_refused():
    model = build()
    other = networks.Branching()
    other.right = nn.Conv2d(8, 24, 1)
    with pytest.raises(TableError, match="layer 'right'"):
        Explainer(model, table_for(other))


def test_layers_that_do_not_run_are_named():
    """A table row whose convolution takes no part would otherwise be a silent no."""
    model = build(networks.InPlaceRelu)  # never calls `right`
    with pytest.raises(UnsupportedModelError, match="'right'"):
        Explainer(model, table_for(model)).explain(batch(1), 1, layers="right")


def test_guided_backprop_refuses_what_it_cannot_see():
    smooth = build(networks.Smooth)
    with pytest.raises(UnsupportedModelError, match="ReLU"):
        Explainer(smooth, table_for(smooth)).explain(batch(1), 1, method="guided_backprop")
    sliced = build(networks.SlicedRelu)
    with pytest.raises(UnsupportedModelError, match="guided_backprop"):
        Explainer(sliced, table_for(sliced)).explain(batch(1), 1, method="guided_backprop", layers=used(sliced))


class Returns(networks.Branching):
    def forward(self, images):
        return {"logits": super().forward(images)}


class ReturnsMap(networks.Branching):
    def forward(self, images):
        return self.stem(images)


@pytest.mark.parametrize("network", [Returns, ReturnsMap], ids=by_name)
def test_a_model_that_returns_no_logits_is_refused(network):
    model = build(network)
    with pytest.raises(UnsupportedModelError, match=r"returned .*expected logits of shape"):
        Explainer(model, table_for(model)).explain(batch(2), 1)


def test_predict_is_the_models_own_answer():
    model = build()
    with torch.no_grad():
        expected = model(batch(3))
    explainer = Explainer(model, table_for(model))
    assert_close(explainer.predict(batch(3)), expected, 1e-12)
    assert torch.equal(Explainer(model, table_for(model), backward="dense").predict(batch(3)), expected)
    explanation = explainer.explain(batch(3), 1)
    assert_close(explanation.logits, expected, 1e-12)
    assert_close(explanation.probabilities(), expected.softmax(1), 1e-12)
    assert not explanation.attributions.requires_grad
    assert not explanation.logits.requires_grad


def test_reductions():
    model = build()
    explanation = Explainer(model, table_for(model)).explain(batch(2), 1)
    a = explanation.attributions.numpy()
    assert_close(explanation.saliency(), np.abs(a).mean(1), 1e-12)
    expected = {
        "mean_abs": np.abs(a).mean(1),
        "sum": a.sum(1),
        "max_abs": np.abs(a).max(1),
        "positive": np.maximum(a.sum(1), 0),
        "negative": np.maximum(-a.sum(1), 0),
    }
    for name, value in expected.items():
        assert_close(explanation.saliency(name), value, 1e-12)
    with pytest.raises(OptionError, match="Option 'reduction' is 'mean'; allowed: mean_abs"):
        explanation.saliency("mean")


def test_integrated_gradients_are_complete_without_the_rule():
    """Sum of the attribution = score at the image - score at the baseline, and the gap says so."""
    model = build(networks.Smooth)
    explainer, images = Explainer(model, table_for(model)), batch(3) * 0.5
    found = explainer.explain(images, [0, 1, 2], method="integrated_gradients", rule=False, steps=60)
    with torch.no_grad():
        rise = (model(images) - model(torch.zeros_like(images)))[range(3), range(3)]
    assert_close(found.attributions.sum((1, 2, 3)), rise, 1e-6)
    assert float(found.completeness_gap.abs().max()) < 1e-6 * float(rise.abs().max())
    few = explainer.explain(images, [0, 1, 2], method="integrated_gradients", rule=False, steps=1)
    assert_close(few.completeness_gap, few.attributions.sum((1, 2, 3)) - rise, 1e-9)
    assert float(few.completeness_gap.abs().max()) > 1e-4
    assert found.completeness_gap.shape == (3,)


def test_the_gap_is_nan_where_completeness_does_not_hold():
    model = build(networks.Smooth)
    explainer = Explainer(model, table_for(model))
    found = explainer.explain(
        batch(3),
        1,
        method=["integrated_gradients", "gradient", "integrated_gradients"],
        rule=[True, False, False],
        steps=3,
    )
    assert found.completeness_gap.isnan().tolist() == [True, True, False]


def test_a_baseline_of_ones_own():
    model = build(networks.Smooth)
    explainer, images = Explainer(model, table_for(model)), batch(2)
    start = torch.full((3, 12, 12), 0.7, dtype=torch.float64)
    found = explainer.explain(images, 1, method="integrated_gradients", rule=False, steps=60, baseline=start)
    with torch.no_grad():
        rise = model(images)[:, 1] - model(start[None])[:, 1]
    assert_close(found.attributions.sum((1, 2, 3)), rise, 1e-6)
    again = explainer.explain(
        images, 1, method="integrated_gradients", rule=False, steps=60, baseline=start.expand(2, 3, 12, 12)
    )
    assert torch.equal(again.attributions, found.attributions)


def test_a_baseline_of_the_wrong_shape_is_refused():
    model = build()
    with pytest.raises(OptionError, match="baseline"):
        Explainer(model, table_for(model)).explain(
            batch(2), 1, method="integrated_gradients", baseline=torch.zeros(3, 5, 5)
        )


def test_smoothgrad_noise_is_the_images_own():
    """Seeded, the same whatever the batch-mates; another seed gives another map; no noise is the gradient."""
    model = build()
    explainer, images = Explainer(model, table_for(model)), batch(3)
    global_state = torch.get_rng_state()
    one = explainer.explain(images, 1, method="smoothgrad", samples=4)
    assert torch.equal(torch.get_rng_state(), global_state), "the caller's random stream was used"
    assert torch.equal(one.attributions, explainer.explain(images, 1, method="smoothgrad", samples=4).attributions)
    other = explainer.explain(images, 1, method="smoothgrad", samples=4, noise_seed=[0, 1, 0]).attributions
    assert [relative_l2(a, b) > 1e-3 for a, b in zip(one.attributions, other, strict=True)] == [False, True, False]
    none = explainer.explain(images, 1, method="smoothgrad", samples=4, noise=0.0).attributions
    assert_each_close(none, explainer.explain(images, 1).attributions, 1e-10)


def passes_of(explainer, monkeypatch):
    """A list that grows with each pass of the points: the images `(n, 3, h, w)` that went through together."""
    passes, gradients, sums = [], explainer._runtime.gradients, explainer._runtime.sums

    def counted(images, targets, plan):
        passes.append(tuple(images.shape))
        return gradients(images, targets, plan)

    def counted_points(points, targets, plan):
        passes.append(tuple(points.images.shape))
        return sums(points, targets, plan)

    monkeypatch.setattr(explainer._runtime, "gradients", counted)
    monkeypatch.setattr(explainer._runtime, "sums", counted_points)
    return passes


LONG = [
    Options(target=1, method="smoothgrad", samples=37, noise=0.2, quantile=0.3),
    Options(target=2, method="integrated_gradients", steps=40, gamma=2.0),
    Options(target=0, method="integrated_gradients", steps=5, rule=False),
]


@pytest.mark.parametrize(
    ("points", "sizes"),
    [(1, [1] * 82), (16, [16] * 5 + [2]), (81, [81, 1]), (1000, [82])],
    ids=["one by one", "across images", "one more", "all"],
)
def test_points_of_several_images_go_through_the_network_together(points, sizes, monkeypatch):
    """Whatever goes together, the maps are the oracle's; and what goes together is bounded and full."""
    model = build()
    explainer, images = Explainer(model, table_for(model)), batch(3, size=8)
    passes = passes_of(explainer, monkeypatch)
    columns = {name: [options_of(o)[name] for o in LONG] for name in options_of(LONG[0])}
    found = explainer.explain(images, [o.target for o in LONG], **columns, pixels_per_pass=points * 64 + 63)
    expected, _ = maps.explain_batch(model, table_for(model), images, LONG)
    assert_each_close(found.attributions, expected)
    assert [shape[0] for shape in passes] == sizes
    assert found.complete.tolist() == [True] * 3


@pytest.mark.parametrize(("side", "points"), [(56, 256), (224, 16), (448, 4), (900, 1), (1200, 1)])
def test_a_pass_is_bounded_in_pixels_and_takes_one_point_at_least(side, points, monkeypatch):
    model = build()
    explainer = Explainer(model, table_for(model))
    passes = []

    def nothing(points, targets, plan):
        passes.append(len(points))
        return torch.zeros_like(points.images[:1]), torch.zeros(len(points), dtype=torch.long)

    monkeypatch.setattr(explainer._runtime, "sums", nothing)
    monkeypatch.setattr(explainer._runtime, "predict", lambda images: torch.zeros(len(images), 5))
    explainer.explain(batch(1, size=side), 1, method="integrated_gradients", steps=points + 1)
    assert passes == ([points, 1] if points > 1 else [1, 1])
    assert points * side**2 <= PIXELS_PER_PASS or points == 1


@pytest.mark.parametrize("method", ["integrated_gradients", "smoothgrad"])
def test_memory_does_not_grow_with_the_number_of_points(method, monkeypatch):
    """The most values in live tensors, weighed as each pass begins, are as many for 40 points as for 12."""
    model = build()
    explainer, images = Explainer(model, table_for(model)), batch(2, size=8)
    sums = explainer._runtime.sums

    def most(count):
        weights = []

        def weighed(points, targets, plan):
            gc.collect()
            weights.append(sum(held.numel() for held in gc.get_objects() if issubclass(type(held), torch.Tensor)))
            return sums(points, targets, plan)

        monkeypatch.setattr(explainer._runtime, "sums", weighed)
        explainer.explain(images, 1, method=method, steps=count, samples=count, pixels_per_pass=4 * 64)
        assert len(weights) == count / 2
        return max(weights)

    few = most(12)
    assert most(40) == few


def test_an_explanation_nobody_wants_ends_at_the_next_pass(monkeypatch):
    model = build()
    explainer, images = Explainer(model, table_for(model)), batch(2, size=8)
    for allowed in (0, 1, 7):
        with monkeypatch.context() as patched:
            passes = passes_of(explainer, patched)
            with pytest.raises(AbandonedError, match="None of the 2 images is wanted any more"):
                explainer.explain(
                    images,
                    1,
                    method="smoothgrad",
                    samples=40,
                    pixels_per_pass=4 * 64,
                    wanted=lambda: [len(passes) < allowed] * 2,  # noqa: B023 - asked within this turn
                )
            assert len(passes) == allowed
    with monkeypatch.context() as patched:
        passes = passes_of(explainer, patched)
        with pytest.raises(AbandonedError):
            explainer.explain(images, 1, wanted=lambda: [False, False])
        assert passes == []


def test_an_image_nobody_wants_costs_no_more_passes_and_its_mates_get_what_they_get_alone(monkeypatch):
    """Image 1 is given up after three passes; a later yes is too late; the others equal the oracle."""
    model = build()
    table = table_for(model)
    explainer, images = Explainer(model, table), batch(4, size=8)
    options = [
        Options(target=3, quantile=0.3),
        Options(target=1, method="smoothgrad", samples=37, noise=0.2, quantile=0.3),
        Options(target=2, method="integrated_gradients", steps=9, gamma=2.0),
        Options(target=0, method="integrated_gradients", steps=5, rule=False),
    ]
    passes = passes_of(explainer, monkeypatch)

    def wanted():
        return [True, len(passes) != 4, True, True]  # one pass of the gradient, three of the points

    columns = {name: [options_of(o)[name] for o in options] for name in options_of(options[0])}
    found = explainer.explain(images, [o.target for o in options], **columns, pixels_per_pass=4 * 64, wanted=wanted)
    assert [shape[0] for shape in passes] == [1, 4, 4, 4, 4, 4, 4, 2]  # 14 points after 12 of the 37
    assert found.complete.tolist() == [True, False, True, True]
    assert bool(found.attributions[1].isnan().all())
    expected, answers = maps.explain_batch(model, table, images, options)
    others = [0, 2, 3]
    assert_each_close(found.attributions[others], [expected[i] for i in others])
    assert_each_close(found.logits, [answer.logits for answer in answers])
    assert found.identity_layers[others].tolist() == [answers[i].identity_layers for i in others]
    alone = explain_with(explainer, images[3:], options[3:])
    assert_close(found.completeness_gap[3], alone.completeness_gap[0], 1e-6)


def test_what_is_done_stays_done_when_its_mates_are_given_up(monkeypatch):
    """The first image has its points before it is not wanted any more, the second never gets them."""
    model = build()
    explainer, images = Explainer(model, table_for(model)), batch(3, size=8)
    passes = passes_of(explainer, monkeypatch)
    found = explainer.explain(
        images,
        1,
        method=["integrated_gradients", "integrated_gradients", "gradient"],
        rule=False,
        steps=4,
        pixels_per_pass=4 * 64,
        wanted=lambda: [len(passes) < 2, len(passes) < 2, True],
    )
    assert [shape[0] for shape in passes] == [1, 4]
    assert found.complete.tolist() == [True, False, True]
    assert found.completeness_gap.isnan().tolist() == [False, True, True]
    monkeypatch.undo()
    plain = explainer.explain(images, 1, method=[o.method for o in found.options], rule=False, steps=4)
    assert_each_close(found.attributions[[0, 2]], plain.attributions[[0, 2]])


def test_being_asked_changes_nothing(monkeypatch):
    model, options = build(), mixed()
    explainer, images = Explainer(model, table_for(model)), batch(len(mixed()))
    columns = {name: [options_of(o)[name] for o in options] for name in options_of(options[0])}
    targets = [o.target for o in options]
    one = explainer.explain(images, targets, **columns)
    other = explainer.explain(images, targets, **columns, wanted=lambda: [True] * len(options))
    for name in ("logits", "attributions", "identity_layers", "covered", "complete"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert bool(one.complete.all())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"wanted": lambda: [True]}, "'wanted' is .*one bool for each of the 2 images"),
        ({"wanted": lambda: [True] * 3}, "'wanted'"),
        ({"pixels_per_pass": 0}, "'pixels_per_pass' is 0; allowed: an integer of at least 1"),
    ],
    ids=["too few", "too many", "no pixels"],
)
def test_a_wrong_number_of_wishes_or_pixels_is_refused(given, message):
    model = build()
    with pytest.raises(OptionError, match=message):
        Explainer(model, table_for(model)).explain(batch(2), 1, **given)


@pytest.mark.parametrize("network", KINKED, ids=by_name)
def test_float32_is_close_to_the_oracle_in_relative_l2(network):
    """Single paths may differ where a ReLU sits on the edge, hence the norm and not each pixel."""
    model = build(network, dtype=torch.float32)
    images = batch(2, dtype=torch.float32)
    options = [Options(target=t, quantile=0.3, layers=used(build(network))) for t in (0, 3)]
    found = explain_with(Explainer(model, table_for(model)), images, options)
    assert found.attributions.dtype == torch.float32
    expected, _ = maps.explain_batch(model, table_for(model), images, options)
    for one, other in zip(found.attributions, expected, strict=True):
        assert relative_l2(one, other) < 1e-3


@pytest.mark.parametrize("scale", [1e-4, 1e-12], ids=lambda s: f"x{s:g}")
def test_scaling_the_head_scales_the_map(scale):
    model = build(dtype=torch.float32)
    images = batch(2, dtype=torch.float32)
    table = table_for(model)
    expected = Explainer(model, table).explain(images, 1, gamma=[2.0, math.inf]).attributions
    with torch.no_grad():
        model.head.weight.mul_(scale)
        model.head.bias.mul_(scale)
    found = Explainer(model, table).explain(images, 1, gamma=[2.0, math.inf]).attributions
    assert_each_close(found.double() / scale, expected, 1e-4)


class Grid(networks.Branching):
    """Fully convolutional, no padding: any size of 5 and up."""


@pytest.mark.parametrize("gamma", [2.0, math.inf])
def test_conservation_matters_where_branches_merge(gamma):
    """In a sequential network it only rescales each image's map; on a residual network it changes the map."""

    def angle(network):
        model = build(network)
        explain = Explainer(model, table_for(model)).explain
        options = {"gamma": gamma, "quantile": 0.3, "layers": used(model)}
        one, other = (
            explain(batch(1), 1, conserve=c, **options).attributions.flatten() for c in ("none", "independent")
        )
        return 1 - float(torch.nn.functional.cosine_similarity(one, other, dim=0)), relative_l2(one, other)

    straight, scaled = angle(networks.InPlaceRelu)
    assert straight < 1e-12
    assert scaled > 1e-2
    assert angle(networks.Branching)[0] > 1e-3


def test_channels_last_images_and_weights():
    model = build()
    table, images = table_for(model), batch(2)
    expected = Explainer(model, table).explain(images, 1, gamma=[2.0, math.inf])
    model = model.to(memory_format=torch.channels_last)
    found = Explainer(model, table).explain(images.to(memory_format=torch.channels_last), 1, gamma=[2.0, math.inf])
    assert_each_close(found.attributions, expected.attributions, 1e-10)


@pytest.mark.parametrize("size", [(5, 5), (9, 14), (17, 6)], ids=str)
def test_any_size_and_aspect(size):
    model = build(Grid)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_equals_oracle(
        model, table_for(model), images, [Options(target=1, gamma=g, quantile=0.3) for g in (2.0, math.inf)]
    )


def snapshot(model):
    """Everything of the caller's model that an explanation could leave changed."""
    return {
        "training": [(name, module.training) for name, module in model.named_modules()],
        "hooks": [
            (name, kind, len(getattr(module, kind)))
            for name, module in model.named_modules()
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        ],
        "inplace": [(name, module.inplace) for name, module in model.named_modules() if hasattr(module, "inplace")],
        "requires_grad": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "grad": [
            (name, None if p.grad is None else (id(p.grad), p.grad.tolist())) for name, p in model.named_parameters()
        ],
        "state": [
            (name, id(value), value.dtype, value.tolist()) for name, value in model.state_dict(keep_vars=True).items()
        ],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "dict": [
            (name, {k: id(v) for k, v in vars(module).items() if not k.startswith("_")})
            for name, module in model.named_modules()
        ],
    }


def callers_model(network):
    """In train mode but one module, some parameters frozen, gradients waiting to be used."""
    model = build(network).train()
    first, *_, last = [module for module in model.modules() if not list(module.children())]
    last.eval()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    first.weight.requires_grad_(False)
    first.weight.grad = None
    return model


@pytest.mark.parametrize("network", networks.ALL, ids=by_name)
def test_the_callers_model_is_left_as_it_was(network):
    model = callers_model(network)
    before = snapshot(model)
    images = batch(2).requires_grad_()
    kept = images.detach().clone()
    explainer = Explainer(model, table_for(model))
    for method in ("gradient", "integrated_gradients", "smoothgrad"):
        found = explainer.explain(
            images, 1, method=method, steps=2, samples=2, layers=used(build(network)), selection="instance"
        )
        tensors = [value for value in vars(found).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) > 5
        assert not any(value.requires_grad for value in tensors)
    assert not explainer.predict(images).requires_grad
    assert snapshot(model) == before
    assert images.grad is None
    assert torch.equal(images.detach(), kept)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_callers_model_is_left_as_it_was_after_an_exception(where):
    class Failing(networks.InPlaceRelu):
        def forward(self, images):
            z = self.join(self.act(self.stem(images)))
            if where == "forward":
                raise RuntimeError("a failure inside the model")
            if z.requires_grad:
                z.register_hook(lambda grad: (_ for _ in ()).throw(RuntimeError("a failure inside the model")))
            return self.head(z.mean((2, 3)))

    model = callers_model(Failing)
    before = snapshot(model)
    explainer = Explainer(model, table_for(model))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="a failure inside the model"):
            explainer.explain(batch(2), 1, layers=("stem", "join"))
        assert snapshot(model) == before
    # and the explainer is of use again once the model is
    good = callers_model(networks.InPlaceRelu)
    explainer = Explainer(good, table_for(good))
    with pytest.raises(RuntimeError):
        explainer.explain(torch.zeros(1, 4, 12, 12, dtype=torch.float64), 1, layers=("stem", "left", "join"))
    assert_each_close(
        explainer.explain(batch(2), 1, layers=("stem", "left", "join")).attributions,
        Explainer(build(networks.InPlaceRelu), table_for(good))
        .explain(batch(2), 1, layers=("stem", "left", "join"))
        .attributions,
        1e-12,
    )


def test_train_mode_frozen_weights_and_dropout_change_nothing():
    class Dropping(networks.Branching):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, images):
            return self.head(self.drop(F.relu(self.join(F.relu(self.norm(self.stem(images)))))).mean((2, 3)))

    model = build(Dropping)
    table, layers = table_for(model), ("stem", "join")
    expected = Explainer(model, table).explain(batch(2), 1, layers=layers)
    statistics = model.norm.running_mean.clone()
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = Explainer(model, table).explain(batch(2), 1, layers=layers)
    assert torch.equal(found.attributions, expected.attributions)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(model.norm.running_mean, statistics)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("method", ["gradient", "integrated_gradients", "smoothgrad", "guided_backprop", "grad_cam"])
def test_the_callers_grad_mode_does_not_matter(method, mode):
    model = build(networks.FunctionalRelu)
    table = table_for(model)
    images = batch(2)
    expected = Explainer(model, table).explain(images, 1, method=method, steps=2, samples=2)
    with mode():
        inside = batch(2) + 0.0  # made in there: an inference tensor
        explainer = Explainer(model, table)
        for given in (images, inside):
            found = explainer.explain(given, 1, method=method, steps=2, samples=2)
            assert torch.equal(found.attributions, expected.attributions)
        assert not torch.is_grad_enabled()
    outside = explainer.explain(images, 1, method=method, steps=2, samples=2)
    assert torch.equal(outside.attributions, expected.attributions)
    assert torch.is_grad_enabled()


def test_under_autocast_the_map_is_the_same_up_to_its_precision():
    model = build(dtype=torch.float32)
    images = batch(2, dtype=torch.float32)
    explainer = Explainer(model, table_for(model))
    expected = explainer.explain(images, 1, quantile=0.4, gamma=[3.0, math.inf])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = explainer.explain(images, 1, quantile=0.4, gamma=[3.0, math.inf])
    assert found.identity_layers.tolist() == expected.identity_layers.tolist()
    for one, other in zip(found.attributions, expected.attributions, strict=True):
        assert relative_l2(one, other) < 0.2


def test_a_bfloat16_model_is_explained():
    model = build(dtype=torch.bfloat16)
    images = batch(2).to(torch.bfloat16)
    found = Explainer(model, table_for(model)).explain(images, 1, quantile=0.4, gamma=[3.0, math.inf])
    assert found.attributions.isfinite().all()
    wide = copy.deepcopy(model).double()
    expected = Explainer(wide, table_for(wide)).explain(images.double(), 1, quantile=0.4, gamma=[3.0, math.inf])
    for one, other in zip(found.attributions, expected.attributions, strict=True):
        assert relative_l2(one, other) < 0.2


def test_eight_threads_get_exactly_what_they_get_alone():
    """One explainer, one model; every thread its own target, method and options, all at once, several times."""
    model, options = build(networks.InPlaceRelu), mixed()[:8]
    layers = used(build(networks.InPlaceRelu))
    options = [dataclasses.replace(o, layers=layers) for o in options]
    explainer = Explainer(model, table_for(model))
    jobs = [(batch(2, seed=i), [o, dataclasses.replace(o, target=(i + 1) % 5)]) for i, o in enumerate(options)]
    alone = [explain_with(explainer, *job) for job in jobs]
    start = threading.Barrier(8)

    def work(i):
        start.wait()
        return [explain_with(explainer, *jobs[i]) for _ in range(6)]

    with ThreadPoolExecutor(8) as pool:
        for i, found in enumerate(pool.map(work, range(8))):
            for one in found:
                for name in ("attributions", "logits", "targets", "identity_layers"):
                    assert torch.equal(getattr(one, name), getattr(alone[i], name)), (i, name)


def test_threads_with_explainers_of_their_own_on_one_model():
    model = callers_model(networks.ReusedRelu)
    before = snapshot(model)
    tables = [table_for(model, seed=s) for s in range(8)]
    alone = [Explainer(model, t).explain(batch(1), 1).attributions for t in tables]
    with ThreadPoolExecutor(8) as pool:
        found = list(
            pool.map(lambda t: [Explainer(model, t).explain(batch(1), 1).attributions for _ in range(4)], tables)
        )
    for expected, several in zip(alone, found, strict=True):
        assert all(torch.equal(one, expected) for one in several)
    assert snapshot(model) == before


def test_a_failing_thread_leaves_the_others_alone():
    model = build()
    explainer = Explainer(model, table_for(model))
    expected = explainer.explain(batch(1), 1).attributions

    def work(i):
        if i % 2:
            with pytest.raises(RuntimeError):
                explainer.explain(torch.zeros(1, 4, 12, 12, dtype=torch.float64), 1)
            return True
        return torch.equal(explainer.explain(batch(1), 1).attributions, expected)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(32)))


def test_training_goes_on_between_explanations():
    """Weights changed in place show in the next explanation, and the caller's own backward is unaffected."""
    model = build().train()
    explainer = Explainer(model, table_for(model))
    explainer.explain(batch(2), 1)
    model(batch(4, seed=3)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    fresh = Explainer(copy.deepcopy(model), table_for(model)).explain(batch(2), 1)
    assert_each_close(explainer.explain(batch(2), 1).attributions, fresh.attributions, 1e-12)


def test_the_table_is_not_ignored():
    """Another table, another map; another class, another map."""
    model = build()
    images = batch(1)
    one, other = (Explainer(model, table_for(model, seed=s)).explain(images, 1).attributions for s in (0, 50))
    assert relative_l2(one, other) > 0.05


def test_a_backward_hook_of_the_callers_is_not_the_explanations():
    """It may zero every gradient, for the caller; the explanation is that of the model without it."""
    model = build()
    explainer = Explainer(model, table_for(model))
    expected = explainer.explain(batch(2), [0, 3]).attributions
    model.join.register_full_backward_hook(lambda _, grads, __: tuple(torch.zeros_like(g) for g in grads))
    assert_close(Explainer(model, table_for(model)).explain(batch(2), [0, 3]).attributions, expected, 0.0)


def test_a_module_reached_through_a_closure_is_refused():
    """The copy's function would go on calling the caller's own module, in the caller's training mode."""
    model = build()
    norm = torch.nn.BatchNorm2d(3)
    model.act = lambda x: torch.relu(norm(x))
    with pytest.raises(UnsupportedModelError, match="Attribute 'act' of module '' is a function with another module"):
        Explainer(model, table_for(model))


def test_a_schedule_need_only_name_the_layers_the_rule_acts_on():
    model = build()
    explainer = Explainer(model, table_for(model))
    one = explainer.explain(batch(2), [0, 3], layers="join", quantile={"join": 0.5})
    assert_close(one.attributions, explainer.explain(batch(2), [0, 3], layers="join", quantile=0.5).attributions, 0.0)


def test_numbers_may_be_numpys():
    model = build()
    explainer = Explainer(model, table_for(model))
    mine = explainer.explain(batch(1), np.int64(2), quantile=np.float64(0.5), gamma=np.float32(2))
    assert_close(mine.attributions, explainer.explain(batch(1), 2, quantile=0.5, gamma=2.0).attributions, 0.0)


@pytest.mark.parametrize("device", ["cuda:97", "nonsense"])
def test_a_device_that_is_not_there_is_refused(device):
    model = build()
    with pytest.raises(OptionError, match=f"Option 'device' is '{device}'"):
        Explainer(model, table_for(model), device)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 8, 8)), "'ndarray'; allowed: a torch.Tensor"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.float16), "float16; allowed: torch.float64, as the model's weights"),
    ],
    ids=["numpy", "half"],
)
def test_images_of_another_type_are_refused(images, message):
    model = build()
    with pytest.raises(OptionError, match=message):
        Explainer(model, table_for(model)).explain(images)
