"""Sanity checks: against captum, loops and closed forms; methods that ignore the input, the model or the table."""

import copy
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from parchgrad.errors import OptionError, UncoveredTargetError, UnsupportedModelError
from parchgrad.evaluation.controls import random_control, shuffled_classes
from parchgrad.evaluation.sanity import (
    cascade,
    completeness_gap,
    entropy_rise,
    histogram_entropy,
    max_sensitivity,
    table_randomisation,
)
from parchgrad.explainer import Explainer
from tests.oracles.tolerance import assert_close
from tests.parchgrad import networks
from tests.parchgrad.factories import small
from tests.parchgrad.networks import CLASSES, batch, build, table_for


def gradient_maps(network):
    """|gradient| of the target's logit, summed over the colours."""

    def maps(images, targets):
        here = images.clone().requires_grad_()
        logits = network(here)
        (grad,) = torch.autograd.grad(logits[range(len(here)), targets].sum(), here)
        return grad.abs().sum(1)

    return maps


def magnitude(images, targets):
    """A method that ignores the model."""
    return images.abs().sum(1)


def noise_of(seed, samples, shape, radius):
    """The documented noise: uniform, one sample after the other from one generator, the same for all images."""
    generator = np.random.default_rng(seed)
    return [torch.from_numpy(generator.uniform(-radius, radius, shape)) for _ in range(samples)]


def test_max_sensitivity_equals_captums():
    metrics = pytest.importorskip("captum.metrics")
    model, images, targets = build(networks.Smooth), batch(3), [1, 3, 0]
    method = gradient_maps(model)
    found = max_sensitivity(method, images, targets, radius=0.3, samples=7, seed=4, batch_size=2)
    assert found.radius == 0.3
    assert found.samples == 7
    noise = torch.stack(noise_of(4, 7, (3, 12, 12), 0.3))

    def explain(inputs, target):
        with torch.enable_grad():
            if isinstance(inputs, tuple):  # captum wants back what it gives
                return (method(inputs[0], target.tolist()),)
            return method(inputs, target.tolist())

    # captum repeats each image 7 times, one after the other.
    expected = metrics.sensitivity_max(
        explain,
        images,
        perturb_func=lambda repeated: repeated + noise.repeat(len(repeated) // 7, 1, 1, 1),
        n_perturb_samples=7,
        target=torch.tensor(targets),
    )
    assert_close(found.largest, expected, 1e-10)
    assert float(found.largest.min()) > 0.01


def test_max_sensitivity_of_a_linear_map_is_its_noise_over_its_size():
    """The map doubles one colour: the change is the noise's norm there, over the image's."""
    images = batch(4)
    found = max_sensitivity(lambda x, _: 2 * x[:, 1], images, [0] * 4, radius=0.1, samples=5, seed=2, batch_size=3)
    largest = max(float(e[1].norm()) for e in noise_of(2, 5, (3, 12, 12), 0.1))
    assert_close(found.largest, [largest / float(image[1].norm()) for image in images], 1e-12)


def test_max_sensitivity_does_not_depend_on_batches_or_scale_and_grows_with_samples():
    method, images, targets = gradient_maps(build(networks.Smooth)), batch(3), [1, 3, 0]
    whole = max_sensitivity(method, images, targets).largest
    parts = [max_sensitivity(method, images[i : i + 1], targets[i : i + 1]).largest for i in range(3)]
    assert_close(np.concatenate(parts), whole, 1e-12)
    scaled = max_sensitivity(lambda x, t: 1e-4 * method(x, t), images, targets).largest
    assert_close(scaled, whole, 1e-10)
    assert bool((max_sensitivity(method, images, targets, samples=30).largest >= whole).all())
    assert bool((max_sensitivity(method, images, targets, seed=1).largest != whole).all())


def test_max_sensitivity_at_its_ends():
    images = batch(3)
    assert max_sensitivity(lambda x, _: torch.ones(len(x), 4, 4), images, [0] * 3).largest.tolist() == [0.0] * 3
    assert max_sensitivity(magnitude, images, [0] * 3, radius=0.0).largest.tolist() == [0.0] * 3
    generator = torch.Generator().manual_seed(0)
    fresh = max_sensitivity(lambda x, _: torch.rand(len(x), 200, 200, generator=generator), images, [0] * 3, samples=2)
    assert_close(fresh.largest, [math.sqrt(1 / 2)] * 3, 0.02)
    held = [torch.tensor([[[0.0]], [[math.inf]], [[1.0]]]), torch.tensor([[[1.0]], [[math.inf]], [[math.nan]]])]
    odd = max_sensitivity(lambda *_: held.pop(0), images, [0] * 3, samples=1)
    assert np.isnan(odd.largest).all()
    for wrong in ({"radius": -1.0}, {"radius": math.nan}, {"samples": 0}):
        with pytest.raises(OptionError):
            max_sensitivity(magnitude, images, [0] * 3, **wrong)


# Completeness


def test_completeness_gap_equals_captums_convergence_delta():
    attr = pytest.importorskip("captum.attr")
    model, images, targets = build(), batch(3), [1, 3, 0]
    baseline = batch(1, seed=9)[0]
    attributions, delta = attr.IntegratedGradients(model).attribute(
        images,
        baselines=baseline[None],
        target=torch.tensor(targets),
        n_steps=6,
        return_convergence_delta=True,
    )
    found = completeness_gap(attributions, model, images, targets, baseline=baseline, batch_size=2)
    assert_close(found.gap, delta, 1e-10)
    with torch.no_grad():
        rise = [
            float(model(image[None])[0, target] - model(baseline[None])[0, target])
            for image, target in zip(images, targets, strict=True)
        ]
    assert_close(found.relative, np.abs(delta.numpy()) / np.abs(rise), 1e-10)
    assert float(found.relative.min()) > 1e-6


def test_completeness_gap_equals_the_explainers_own():
    model, images, targets = build(), batch(3), [1, 3, 0]
    explainer = Explainer(model, table_for(model))
    explained = explainer.explain(images, targets, rule=False, method="integrated_gradients", steps=5)
    found = completeness_gap(explained.attributions, explainer.predict, images, targets)
    assert_close(found.gap, explained.completeness_gap, 1e-10)


def test_completeness_of_a_linear_network():
    """weight x (image - baseline) is complete; half of it lacks half; nothing lacks all; no rise has no share."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, CLASSES)).double()
    images, targets = batch(3, size=4), [1, 3, 0]
    baselines = batch(3, size=4, seed=3)
    parts = model[1].weight[targets].detach().view(3, 3, 4, 4) * (images - baselines)
    for share, lacking in ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0), (2.0, 1.0)):
        found = completeness_gap(share * parts, model, images, targets, baseline=baselines)
        np.testing.assert_allclose(found.relative, lacking, atol=1e-12)
    same = completeness_gap(parts, model, images, targets, baseline=images)
    assert np.isnan(same.relative).all()
    assert_close(same.gap, parts.sum((1, 2, 3)), 1e-12)


# Random parameters


def test_histogram_entropy_equals_scipys_of_counts_by_hand():
    values = np.random.default_rng(0).exponential(size=(13, 17))
    low, high = values.min(), values.max()
    counts = [0] * 20
    for value in values.ravel():
        counts[min(int((value - low) / (high - low) * 20), 19)] += 1
    assert histogram_entropy(values, 20) == pytest.approx(scipy.stats.entropy(counts), rel=1e-12)
    assert histogram_entropy(1e-12 * values, 20) == pytest.approx(histogram_entropy(values, 20), rel=1e-12)
    reference = np.histogram(values, 100)[0]
    assert histogram_entropy(values) == pytest.approx(scipy.stats.entropy(reference), rel=1e-12)


def test_histogram_entropy_at_its_ends():
    assert histogram_entropy(np.full((4, 4), 2.0)) == 0.0
    assert histogram_entropy(np.arange(1000.0)) == pytest.approx(math.log(100))
    assert histogram_entropy(np.eye(10)) == pytest.approx(-0.1 * math.log(0.1) - 0.9 * math.log(0.9))
    assert math.isnan(histogram_entropy([[1.0, math.nan]]))
    assert math.isnan(histogram_entropy([[1.0, math.inf]]))


def test_a_method_that_ignores_the_model_survives_its_randomisation():
    model, images = build(), batch(3)
    asked = []

    def maps_of(network):
        asked.append(network)
        return magnitude

    rise = entropy_rise(maps_of, model, images, [0, 1, 2])
    assert rise.rise.tolist() == [0.0] * 3
    assert_close(rise.entropy, [histogram_entropy(one) for one in magnitude(images, None)], 1e-12)
    found = cascade(maps_of, model, images, [0, 1, 2])
    assert found.layers == ("head", "join", *found.layers[2:4], "norm", "stem")
    assert set(found.layers[2:4]) == {"left", "right"}
    assert_close(found.similarity, np.ones((6, 3)), 1e-12)
    assert all(network is not model for network in asked)


def test_the_cascade_keeps_what_the_step_before_drew_and_leaves_what_is_below():
    model, images = build(), batch(2)
    states = []

    def maps_of(network):
        states.append({key: value.clone() for key, value in network.state_dict().items()})
        return gradient_maps(network)

    before = copy.deepcopy(model.state_dict())
    found = cascade(maps_of, model, images, [0, 1], seed=3)
    model_state, *steps = states
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value)
        assert torch.equal(model_state[key], value)
    for depth, state in enumerate(steps, start=1):
        drawn = set(found.layers[:depth])
        for key, value in state.items():
            layer = key.rpartition(".")[0]
            if layer in drawn and key != "norm.num_batches_tracked":
                assert not torch.equal(value, before[key]), key
            elif layer not in drawn:
                assert torch.equal(value, before[key]), key
            if depth > 1 and layer in found.layers[: depth - 1]:
                assert torch.equal(value, steps[depth - 2][key]), key
    states.clear()
    entropy_rise(maps_of, model, images, [0, 1], seed=3)
    assert all(torch.equal(value, steps[-1][key]) for key, value in states[1].items())


def test_the_cascade_of_the_gradient_by_hand():
    """Two linear layers: the gradient is the product of their matrices, with the new head and then all new."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3 * 5 * 5, 6, bias=False)
            self.head = nn.Linear(6, CLASSES, bias=False)

        def forward(self, images):
            return self.head(self.first(images.flatten(1)))

    model, images, targets = build(Linear), batch(2, size=5), [1, 4]
    networks_seen = []

    def maps_of(network):
        networks_seen.append(network)
        return gradient_maps(network)

    found = cascade(maps_of, model, images, targets)
    assert found.layers == ("head", "first")

    def closed(head, first):
        return (head @ first)[targets].detach().view(2, 3, 25).abs().sum(1)

    ours = closed(model.head.weight, model.first.weight)
    _, top, every = networks_seen
    assert torch.equal(top.first.weight, model.first.weight)
    for step, network in enumerate((top, every)):
        theirs = closed(network.head.weight, network.first.weight)
        expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(theirs, ours, strict=True)]
        assert_close(found.similarity[step], expected, 1e-10)


def test_entropy_rise_is_the_relative_change_of_entropy():
    model, images, targets = build(), batch(5, size=20), [1, 3, 0, 2, 4]
    kept = []

    def maps_of(network):
        kept.append(gradient_maps(network)(images, targets))
        return gradient_maps(network)

    found = entropy_rise(maps_of, model, images, targets, batch_size=2)
    before, after = ([scipy.stats.entropy(np.histogram(one, 100)[0]) for one in maps] for maps in kept)
    assert_close(found.entropy, before, 1e-10)
    assert_close(found.randomised, after, 1e-10)
    assert_close(found.rise, [(b - a) / a for a, b in zip(before, after, strict=True)], 1e-8)
    assert float(np.abs(found.rise).min()) > 0
    # A map without entropy has no relative rise.
    flat = entropy_rise(lambda _: lambda x, t: torch.ones(len(x), 4, 4), model, images, targets)
    assert np.isnan(flat.rise).all()


def test_randomisation_is_repeatable_and_leaves_the_global_generator_alone():
    model, images = build(), batch(2)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    one = cascade(gradient_maps, model, images, [0, 1], seed=5)
    assert torch.equal(torch.rand(3), expected)
    again = cascade(gradient_maps, model, images, [0, 1], seed=5, batch_size=1)
    other = cascade(gradient_maps, model, images, [0, 1], seed=6)
    assert_close(again.similarity, one.similarity, 1e-12)
    assert np.abs(other.similarity - one.similarity).max() > 0.01


def test_parameters_of_modules_that_cannot_draw_them_are_shuffled():
    class Scaled(networks.Branching):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(0.5, 2.0, 12)[:, None, None])

        def forward(self, images):
            z = torch.relu(self.norm(self.stem(images)))
            return self.head((torch.relu(self.join(z)) * self.scale).mean((2, 3)))

    model = build(Scaled)
    seen = []

    def maps_of(network):
        seen.append(network)
        return gradient_maps(network)

    found = cascade(maps_of, model, batch(1), [0])
    # The network itself starts first; 'left' and 'right' do not run.
    assert found.layers == ("head", "join", "norm", "stem", "")
    assert torch.equal(seen[-2].scale, model.scale)
    assert not torch.equal(seen[-1].scale, model.scale)
    assert torch.equal(seen[-1].scale.flatten().sort().values, model.scale.flatten())
    assert_close(seen[-1].head.weight.detach(), seen[-2].head.weight.detach(), 1e-15)


def test_a_computed_weight_is_randomised_too():
    model = build(networks.Parametrized)
    seen = []

    def maps_of(network):
        seen.append(network)
        return gradient_maps(network)

    entropy_rise(maps_of, model, batch(1), [0])
    assert not torch.allclose(seen[1].join.weight, model.join.weight, rtol=0.1)


def test_a_network_without_parameters_is_refused():
    with pytest.raises(UnsupportedModelError, match="no parameters"):
        cascade(lambda _: magnitude, nn.Flatten(), batch(1), [0])


def test_parchgrad_itself_can_be_checked():
    model = small(CLASSES).double().eval()
    table = table_for(model, quantile=0.4)

    def maps_of(network):
        explainer = Explainer(network, table)
        return lambda images, targets: explainer.explain(images, targets).saliency()

    found = cascade(maps_of, model, batch(2), [0, 1])
    assert found.similarity.shape == (4, 2)
    assert float(found.similarity[-1].max()) < 0.95


# Random tables


def test_shuffled_classes_have_each_others_rows():
    model = build()
    table = table_for(model, covered=(4, 0, 2))
    for seed in range(5):
        control = shuffled_classes(Explainer(model, table), seed).table
        assert control.classes == table.classes
        taken = set()
        for row in range(3):
            (source,) = [
                other
                for other in range(3)
                if all(torch.equal(control.layers[n].rank[row], table.layers[n].rank[other]) for n in table.layers)
            ]
            assert source != row
            for name, layer in table.layers.items():
                assert torch.equal(control.layers[name].log_p[row], layer.log_p[source])
                assert torch.equal(control.layers[name].mean, layer.mean)
            taken.add(source)
        assert taken == {0, 1, 2}
        control.check_values()
    one = table_for(model, covered=(3,))
    with pytest.raises(OptionError, match="two classes"):
        shuffled_classes(Explainer(model, one), 0)


def test_table_randomisation_is_the_similarity_of_the_controls_maps():
    model = build()
    explainer, images, targets = Explainer(model, table_for(model, quantile=0.3)), batch(4), [1, 3, 0, 2]
    found = table_randomisation(explainer, images, targets, draw=2, batch_size=3, quantile=0.2, reduction="max_abs")
    ours = explainer.explain(images, targets, quantile=0.2).saliency("max_abs")
    for similarity, control in (
        (found.classes, shuffled_classes(explainer, 2)),
        (found.channels, random_control(explainer, 2)),
    ):
        theirs = control.explain(images, targets, quantile=0.2).saliency("max_abs")
        expected = [
            scipy.stats.spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(ours, theirs, strict=True)
        ]
        assert_close(similarity, expected, 1e-8)
        assert float(similarity.min()) < 0.95


def test_maps_that_do_not_ask_the_table_survive_it():
    model = build()
    explainer, images, targets = Explainer(model, table_for(model)), batch(2), [1, 3]
    for options in ({"rule": False}, {"selection": "instance"}, {"quantile": 1.0}):
        found = table_randomisation(explainer, images, targets, **options)
        assert_close(found.classes, [1.0, 1.0], 1e-9)
        assert_close(found.channels, [1.0, 1.0], 1e-9)


def test_a_target_the_table_does_not_cover_is_refused():
    model = build()
    with pytest.raises(UncoveredTargetError):
        table_randomisation(Explainer(model, table_for(model, covered=(0, 2))), batch(1), [1])
