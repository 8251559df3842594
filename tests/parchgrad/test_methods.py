"""The rows of the comparison: each is what it says it is, and none can stop the others."""

import copy
import gc
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import parchgrad
from parchgrad.errors import OptionError
from parchgrad.evaluation import baselines
from parchgrad.evaluation.controls import random_control, shuffled_classes
from parchgrad.evaluation.methods import all_methods, setting_name, star
from parchgrad.evaluation.sanity import cascade, table_randomisation
from parchgrad.evaluation.tune import Grid
from parchgrad.explainer import Explainer
from parchgrad.options import Options
from parchgrad.preprocessing import Preprocessing
from tests.oracles.tolerance import assert_close, assert_each_close
from tests.parchgrad import networks
from tests.parchgrad.networks import batch, build, table_for

ROOT = Path(__file__).parents[2]
PREPROCESSING = Preprocessing(size=(12, 12), rule="stretch", mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
TARGETS = [1, 3, 0]
FIRST = ["random map", "centre Gaussian", "edge detector", "gradient", "input x gradient", "SmoothGrad",
         "integrated gradients", "guided backprop", "gradient, evidence", "Grad-CAM", "LRP", "ParchGrad",
         "ParchGrad, instance-wise"]  # fmt: skip
AVERAGED = "ParchGrad, integrated gradients"
EVIDENCE = "ParchGrad, evidence"
EVIDENCE_CONTROL = "ParchGrad, evidence, random channels"
CONTROLS = ["ParchGrad, random channels", "ParchGrad, other classes' channels"]
CLASS_WISE = {
    "ParchGrad",
    "ParchGrad, q 0.3",
    "ParchGrad, gamma 3",
    "ParchGrad, upper half of the layers",
    AVERAGED,
    *CONTROLS,
}


@pytest.fixture
def peers():
    pytest.importorskip("pytorch_grad_cam")
    pytest.importorskip("zennit")


def explainer_of(network=networks.Branching, seed=0, **defaults):
    model = build(network, seed)
    return Explainer(model, table_for(model, **{"quantile": 0.5, **defaults}))


def rows(explainer, **options):
    found, missing = all_methods(explainer, **{"preprocessing": PREPROCESSING, **options})
    return {method.name: method for method in found}, {row.name: row.reason for row in missing}


def test_the_rows_and_their_order(peers):
    explainer = explainer_of()
    settings = ["q 0.05", "q 0.3", "gamma 3", "upper half of the layers"]
    for _ in range(2):
        found, missing = all_methods(explainer, preprocessing=PREPROCESSING)
        assert missing == []
        assert [m.name for m in found] == [
            *FIRST,
            *(f"ParchGrad, {words}" for words in settings),
            AVERAGED,
            EVIDENCE,
            EVIDENCE_CONTROL,
            *CONTROLS,
        ]
    groups = [m.group for m in found]
    assert groups == ["baseline"] * 3 + ["gradient"] * 6 + ["peer"] * 2 + ["parchgrad"] * 8 + ["control"] * 3
    assert all(m.words.endswith(".") for m in found)
    assert all(m.source for m in found[1:])
    assert [m.library.partition(" ")[0] for m in found if m.group == "peer"] == ["grad-cam", "zennit"]


def test_every_row_is_the_method_it_names(peers):
    explainer, images = explainer_of(), batch(3)
    table = explainer.table
    found, _ = rows(explainer, steps=6, samples=4, seed=7)

    def ours(by=explainer, **options):
        return by.explain(images, TARGETS, **options).saliency()

    plain = {"rule": False, "selection": "class"}
    expected = {
        "random map": baselines.random_maps(7)(images, TARGETS),
        "centre Gaussian": baselines.centre_maps()(images, TARGETS),
        "edge detector": baselines.edge_maps(PREPROCESSING)(images, TARGETS),
        "SmoothGrad": ours(method="smoothgrad", samples=4, noise_seed=7, **plain),
        "guided backprop": ours(method="guided_backprop", **plain),
        "Grad-CAM": baselines.grad_cam_maps(explainer, "join")(images, TARGETS),
        "LRP": baselines.lrp_maps(explainer)(images, TARGETS),
        "ParchGrad": ours(),
        "ParchGrad, instance-wise": ours(selection="instance"),
        "ParchGrad, q 0.05": ours(quantile=0.05),
        "ParchGrad, q 0.3": ours(quantile=0.3),
        "ParchGrad, gamma 3": ours(gamma=3.0),
        "ParchGrad, upper half of the layers": ours(layers=table.layer_names[2:]),
        AVERAGED: ours(method="integrated_gradients", steps=6),
        "gradient, evidence": ours(seed="evidence", **plain),
        "ParchGrad, evidence": ours(seed="evidence"),
        "ParchGrad, evidence, random channels": ours(random_control(explainer, 7), seed="evidence"),
        "ParchGrad, random channels": ours(random_control(explainer, 7)),
        "ParchGrad, other classes' channels": ours(shuffled_classes(explainer, 7)),
    }
    assert len(table.layer_names) == 4
    for name, maps in expected.items():
        assert_each_close(found[name].maps(images, TARGETS), maps, 1e-10)
    assert set(found) - set(expected) == {"gradient", "input x gradient", "integrated gradients"}
    # No two rows are the same.
    every = [row.maps(images, TARGETS).double() for row in found.values()]
    for number, one in enumerate(every):
        assert all(float((one / one.sum() - two / two.sum()).abs().max()) > 1e-4 for two in every[:number])


def test_plain_rows_equal_captums():
    attr = pytest.importorskip("captum.attr")
    explainer, images, targets = explainer_of(), batch(3), torch.tensor(TARGETS)
    found, _ = rows(explainer, steps=6)
    model = explainer.model
    expected = {
        "gradient": attr.Saliency(model).attribute(images.clone().requires_grad_(), targets, abs=False),
        "input x gradient": attr.InputXGradient(model).attribute(images.clone().requires_grad_(), targets),
        "integrated gradients": attr.IntegratedGradients(model).attribute(images, target=targets, n_steps=6),
    }
    for name, attributions in expected.items():
        row = found[name]
        assert_each_close(row.maps(images, TARGETS), attributions.detach().abs().mean(1), 1e-7)
        if name != "gradient":
            assert row.attributions is not None
            assert_each_close(row.attributions(images, TARGETS), attributions.detach(), 1e-7)
    assert {name for name, row in found.items() if row.attributions is not None} == set(expected) - {"gradient"}


def test_plain_rows_do_not_take_the_slow_way_of_an_instance_wise_default(monkeypatch):
    explainer = explainer_of(selection="instance")
    assert explainer.backward == "pruned"
    found, _ = rows(explainer, steps=2, samples=2)

    def dense(*_):
        raise RuntimeError("the dense backward pass")

    monkeypatch.setattr(explainer._runtime._dense, "gradients", dense)
    with pytest.raises(RuntimeError, match="dense"):
        found["ParchGrad, instance-wise"].maps(batch(1), [1])
    for name in ("gradient", "input x gradient", "SmoothGrad", "integrated gradients"):
        assert found[name].maps(batch(1), [1]).shape == (1, 12, 12)


def test_a_target_without_a_row_is_not_answered_by_those_that_ask_the_table(peers):
    model = build()
    explainer = Explainer(model, table_for(model, covered=(0, 3), quantile=0.5))
    found, _ = rows(explainer)
    for name, row in found.items():
        answered = torch.isfinite(row.maps(batch(3), TARGETS)).flatten(1)
        assert torch.equal(answered.all(1), answered.any(1))
        asks = name in (EVIDENCE_CONTROL, *CONTROLS) or (row.group == "parchgrad" and "instance" not in name)
        assert answered.all(1).tolist() == [not asks, True, True], name


def test_parchgrads_options_are_what_made_its_maps():
    explainer, images = explainer_of(gamma=5.0, conserve="exact"), batch(3)
    found, _ = rows(explainer)
    for row in found.values():
        assert (row.explain is not None) == (row.group == "parchgrad")
        if row.explain is None:
            continue
        maps = explainer.explain(images, TARGETS, **row.explain).saliency()
        assert_close(row.maps(images, TARGETS), maps, 1e-12)
        assert row.options["conserve"] == "exact"
    similarity = table_randomisation(explainer, images, TARGETS, **found["ParchGrad, q 0.3"].explain)
    assert float(similarity.channels.max()) < 1.0


def test_the_same_of_another_network(peers):
    explainer, images = explainer_of(), batch(3)
    same, other = copy.deepcopy(explainer.model), build(seed=5)
    other_explainer = Explainer(other, explainer.table)
    found, _ = rows(explainer)
    for name, row in found.items():
        if row.group == "baseline":
            assert row.of is None
            continue
        before = row.maps(images, TARGETS)
        of_other = row.of(other)
        assert_close(row.of(same)(images, TARGETS), before, 1e-10)
        assert float((of_other(images, TARGETS) - before).abs().max()) > 1e-3 * float(before.max()), name
        assert_close(row.maps(images, TARGETS), before, 1e-10)
    row = found["ParchGrad, gamma 3"]
    expected = other_explainer.explain(images, TARGETS, gamma=3.0).saliency()
    assert_close(row.of(other)(images, TARGETS), expected, 1e-10)


def test_rows_can_be_randomised():
    explainer, images = explainer_of(), batch(2)
    found, _ = rows(explainer)
    row = found["ParchGrad"]
    result = cascade(row.of, explainer.model, images, [1, 3])
    assert result.similarity.shape == (len(result.layers), 2)
    assert float(result.similarity[-1].max()) < 0.95


def test_of_takes_a_network_that_is_frozen_and_leaves_it_alone(peers):
    explainer = explainer_of()
    network = copy.deepcopy(explainer.model).requires_grad_(False)
    state = copy.deepcopy(network.state_dict())
    for row in rows(explainer)[0].values():
        if row.of is not None:
            row.of(network)(batch(2), [1, 3])
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert hooks_of([*network.modules(), *explainer.model.modules()]) == 0


def hooks_of(parts):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) + len(part._backward_hooks) for part in parts)


def test_nothing_grows_with_the_number_of_pictures(peers):
    found, _ = rows(explainer_of(), steps=2, samples=2)

    def held():
        gc.collect()
        # By type: asking what an object is can wake those that only pretend to be it.
        things = gc.get_objects()
        parts = [thing for thing in things if issubclass(type(thing), nn.Module)]
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in things)
        return len(parts), hooks_of(parts), tensors

    def run():
        for row in found.values():
            row.maps(batch(2), [1, 3])

    run()
    run()
    before = held()
    for _ in range(4):
        run()
    assert all(after <= first for after, first in zip(held(), before, strict=True))


# What cannot be had


@pytest.mark.parametrize(("package", "name"), [("pytorch_grad_cam", "Grad-CAM"), ("zennit", "LRP")])
def test_a_missing_package_leaves_its_row_out_and_says_so(monkeypatch, peers, package, name):
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    found, missing = rows(explainer_of())
    assert list(missing) == [name]
    assert package in missing[name]
    assert "parchgrad[evaluate]" in missing[name]
    assert name not in found


def test_lrp_is_left_out_where_the_model_has_something_it_has_no_rule_for(peers):
    model = build(networks.OnePosition)
    found, missing = rows(Explainer(model, table_for(model, quantile=0.5)))
    assert "no rule" in missing["LRP"]
    assert "LRP" not in found
    assert found["Grad-CAM"].options == {"layer": "body"}


def test_grad_cam_is_left_out_where_no_layer_fits(peers):
    model = build(networks.ReusedBeforePooling)
    _, missing = rows(Explainer(model, table_for(model, quantile=0.5)))
    assert missing["Grad-CAM"].endswith("Name one with --cam-layer.")


def test_a_layer_named_for_grad_cam_is_taken_or_refused_at_once(peers):
    found, _ = rows(explainer_of(), cam_layer="stem")
    maps = baselines.grad_cam_maps(explainer_of(), "stem")(batch(3), TARGETS)
    assert_each_close(found["Grad-CAM"].maps(batch(3), TARGETS), maps, 1e-6)
    for network, layer in (
        (networks.Branching, "nowhere"),
        (networks.Branching, "head"),
        (networks.InPlaceRelu, "right"),
    ):
        with pytest.raises(OptionError, match=layer):
            rows(explainer_of(network), cam_layer=layer)


def test_a_bare_module_has_no_edges_and_no_default_layer(peers):
    found, missing = rows(explainer_of(), preprocessing=None)
    assert list(missing) == ["edge detector", "Grad-CAM"]
    assert "--cam-layer" in missing["Grad-CAM"]
    assert "Grad-CAM" in rows(explainer_of(), preprocessing=None, cam_layer="join")[0]
    assert "ParchGrad" in found


def test_a_packages_own_preprocessing_is_taken(peers):
    model = parchgrad.load_model(ROOT / "models/scenes")
    found, missing = all_methods(Explainer(model, parchgrad.load_table(ROOT / "selection_tables/scenes")))
    assert missing == []
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    by_name = {row.name: row for row in found}
    edges = baselines.edge_maps(model.preprocessing)(images, [0, 1])
    assert torch.equal(by_name["edge detector"].maps(images, [0, 1]), edges)
    assert by_name["Grad-CAM"].options == {"layer": "features"}


def test_tables_without_the_statistics_have_no_instance_wise_rows():
    explainer = explainer_of()
    table = replace(explainer.table, statistics_point="activation")
    grid = [replace(table.defaults, selection="instance", quantile=0.3), replace(table.defaults, quantile=0.3)]
    found, missing = rows(Explainer(explainer.model, table), grid=grid)
    instance = [name for name in missing if name.startswith("ParchGrad")]
    assert instance == ["ParchGrad, instance-wise", "ParchGrad, instance-wise, q 0.3"]
    assert "after the activation" in missing[instance[0]]
    assert [name for name in found if name.startswith("ParchGrad")] == [
        "ParchGrad",
        "ParchGrad, q 0.3",
        AVERAGED,
        EVIDENCE,
        EVIDENCE_CONTROL,
        *CONTROLS,
    ]


def test_a_table_of_one_class_has_no_other_classes_channels():
    model = build()
    found, missing = rows(Explainer(model, table_for(model, covered=(3,), quantile=0.5)))
    assert "two classes" in missing[CONTROLS[1]]
    assert CONTROLS[0] in found


# Settings and their names


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "ParchGrad"),
        ({"quantile": 0.05}, "ParchGrad, q 0.05"),
        ({"selection": "instance", "quantile": 0.3}, "ParchGrad, instance-wise, q 0.3"),
        ({"gamma": 3.0, "conserve": "none"}, "ParchGrad, gamma 3, conserve none"),
        ({"layers": ("join*",)}, "ParchGrad, layers join*"),
        ({"layers": ("right", "join")}, "ParchGrad, upper half of the layers"),
        ({"layers": ("!stem",), "quantile": 0.2}, "ParchGrad, q 0.2, layers !stem"),
        ({"layers": ("[s][t][e][m]", "left*", "[j][o][i][n]", "join")}, "ParchGrad, 3 of 4 layers"),
        ({"normality_filter": True}, "ParchGrad, normality filter"),
        ({"quantile": {"stem": 0.5, "left": 0.5, "*": 0.1}}, "ParchGrad, q 0.5/0.1"),
        ({"quantile": {"stem": 0.2, "*": 0.1}}, "ParchGrad, q stem=0.2 *=0.1"),
        ({"quantile": {"stem": 0.2, "left": 0.3, "right": 0.4, "join": 0.6}}, "ParchGrad, q by layer 0.2-0.6"),
        # The same quantiles in other words.
        ({"quantile": {"*": 0.5}}, "ParchGrad"),
    ],
)
def test_a_name_says_what_differs_from_the_defaults(changes, name):
    explainer = explainer_of()
    base, names = explainer.table.defaults, explainer.table.layer_names
    assert setting_name(replace(base, **changes), base, names) == name


def test_the_other_way_round_is_said_too():
    explainer = explainer_of(layers=("join",), gamma=3.0)
    base, names = explainer.table.defaults, explainer.table.layer_names
    setting = replace(base, layers=("*",), gamma=math.inf)
    assert setting_name(setting, base, names) == "ParchGrad, gamma inf, all layers"


def test_settings_that_select_the_same_stand_once_and_others_of_one_name_are_numbered():
    explainer = explainer_of()
    base = explainer.table.defaults
    first = {"stem": 0.25, "left": 0.3, "right": 0.4, "join": 0.6}
    second = {"stem": 0.25, "left": 0.4, "right": 0.3, "join": 0.6}
    third = {"stem": 0.25, "left": 0.41, "right": 0.3, "join": 0.6}  # 3 of 8 channels, as in the second
    settings = [replace(base, quantile=q) for q in (first, second, first, third, 0.5, 0.51)]
    found, _ = rows(explainer, grid=settings)
    assert [name for name in found if "by layer" in name] == ["ParchGrad, q by layer 0.25-0.6",
                                                              "ParchGrad, q by layer 0.25-0.6 (2)"]  # fmt: skip
    assert "ParchGrad, q 0.51" not in found
    assert "ParchGrad, q 0.3" not in found


def test_a_grid_of_tune_is_a_grid_here():
    explainer = explainer_of()
    settings = Grid().settings(explainer.table)
    found, missing = rows(explainer, grid=settings)
    assert (
        sum(row.group == "parchgrad" for row in found.values()) == len(settings) + 3
    )  # instance-wise, averaged, evidence
    assert not [name for name in missing if name.startswith("ParchGrad")]


def test_a_setting_that_is_no_option_is_refused_at_once():
    explainer = explainer_of()
    for changes in ({"quantile": 2.0}, {"layers": ("nowhere*",)}, {"conserve": "all"}, {"quantile": {"stem": 0.5}}):
        with pytest.raises(OptionError):
            rows(explainer, grid=[replace(explainer.table.defaults, **changes)])


@pytest.mark.parametrize(
    "defaults",
    [{}, {"selection": "instance"}, {"quantile": {"stem": 0.4, "*": 0.7}}, {"layers": ("!stem",)}, {"gamma": 3.0},
     {"layers": ("join",)}],
)  # fmt: skip
def test_the_star_is_valid_whatever_the_defaults(defaults):
    explainer = explainer_of(**defaults)
    settings = star(explainer.table)
    assert all(setting.selection == "class" for setting in settings)
    for setting in settings:
        Options(quantile=setting.quantile, gamma=setting.gamma, layers=setting.layers)
        explainer.explain(batch(1), [0], quantile=setting.quantile, gamma=setting.gamma, layers=setting.layers)
    found, _ = rows(explainer)
    parchgrad = [name for name, row in found.items() if row.group == "parchgrad"]
    assert parchgrad[:2] == ["ParchGrad", "ParchGrad, instance-wise"]
    assert ("ParchGrad, gamma 3" in parchgrad) == (defaults.get("gamma") != 3.0)
    maps = found["ParchGrad"].maps(batch(2), [0, 1])
    assert_close(maps, explainer.explain(batch(2), [0, 1], selection="class").saliency(), 1e-12)
    gradient = found["gradient"].maps(batch(2), [0, 1])
    assert_close(gradient, explainer.explain(batch(2), [0, 1], rule=False).saliency(), 1e-10)
    assert bool(maps.isfinite().all())
