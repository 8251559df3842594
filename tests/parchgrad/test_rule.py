"""The gradient rule against the loop oracle, and the properties method.md section 2 promises."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from parchgrad.rule import channel_factors, scale_channels
from tests.oracles import rule
from tests.oracles.tolerance import assert_close, assert_each_close, relative_l2

GAMMAS = [0.0, 0.3, 1.0, 3.0, math.inf]
CONSERVES = ["independent", "exact", "none"]
SPATIAL = {"1x1": (1, 1), "2x3": (2, 3), "7x5": (7, 5), "1d": (6,), "3d": (2, 3, 2)}
SCALES = [1.0, 1e-4, 1e-20, 1e-25]


def example(batch=3, channels=6, spatial=(4, 5), seed=0, dtype=torch.float64):
    """A gradient with correlated channels, and a selection with both sides filled in every image."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(batch, channels, *spatial, generator=generator, dtype=torch.float64)
    grad = grad + 0.7 * torch.randn(batch, 1, *spatial, generator=generator, dtype=torch.float64) + 0.2
    selected = torch.rand(batch, channels, generator=generator) < 0.4
    selected[:, 0], selected[:, 1] = True, False
    return grad.to(dtype), selected


def total_variance(grad):
    """Per image, what conservation conserves: Var of the sum over all channels."""
    return [rule.moment(g, g) for g in grad.double().sum(1).numpy()]


@pytest.mark.parametrize("spatial", SPATIAL.values(), ids=SPATIAL.keys())
@pytest.mark.parametrize("conserve", CONSERVES)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_equals_the_loop_oracle(gamma, conserve, spatial):
    for seed in range(3):
        grad, selected = example(spatial=spatial, seed=seed)
        expected = rule.scale_batch(grad, selected, [gamma] * 3, [conserve] * 3)
        assert_each_close(scale_channels(grad, selected, gamma, conserve), expected, 1e-12)


@pytest.mark.parametrize("conserve", CONSERVES)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_factors_say_what_scaling_does(gamma, conserve):
    grad, selected = example()
    selected[1] = True
    factors = channel_factors(grad, selected, gamma, conserve)
    assert factors.identity.tolist() == [False, True, False]
    for image in range(3):
        expected = rule.image_factors(grad[image].numpy(), selected[image], gamma, conserve) or (1.0, 1.0)
        assert_close([factors.selected[image], factors.unselected[image]], expected, 1e-12)


def test_exact_differs_from_independent_where_the_sides_are_correlated():
    """Guards the grid above: were K zero in the examples, `exact` would prove nothing."""
    grad, selected = example()
    one = scale_channels(grad, selected, 2.0, "independent")
    assert relative_l2(scale_channels(grad, selected, 2.0, "exact"), one) > 0.05


def test_worked_example_by_hand():
    """S_H = (1, -1): M = 1; S_L = (2, -2): N = 4; K = 2; gamma 3 gives a = 6."""
    grad = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]], dtype=torch.float64)
    selected = torch.tensor([[True, False]])
    b = math.sqrt(5 / 40)
    assert_close(scale_channels(grad, selected, 3.0), [[[6 * b, -6 * b], [2 * b, -2 * b]]], 1e-15)
    b = math.sqrt((1 + 4 + 4) / (36 + 4 + 24))
    assert_close(scale_channels(grad, selected, 3.0, "exact"), [[[6 * b, -6 * b], [2 * b, -2 * b]]], 1e-15)
    assert_close(scale_channels(grad, selected, 3.0, "none"), [[[6, -6], [2, -2]]], 1e-15)
    root5 = math.sqrt(5)
    assert_close(scale_channels(grad, selected, math.inf), [[[root5, -root5], [0, 0]]], 1e-15)
    assert_close(scale_channels(grad, selected, math.inf, "exact"), [[[3, -3], [0, 0]]], 1e-15)
    assert_close(scale_channels(grad, selected, math.inf, "none"), [[[1, -1], [0, 0]]], 1e-15)


def test_one_position_uses_the_second_moment_and_its_sign_does_not_matter():
    grad = torch.tensor([[[[3.0]], [[-4.0]]]], dtype=torch.float64)
    selected = torch.tensor([[True, False]])
    assert_close(scale_channels(grad, selected, math.inf), [[[[5.0]], [[0.0]]]], 1e-15)


@pytest.mark.parametrize("scale", SCALES, ids=lambda s: f"x{s:g}")
@pytest.mark.parametrize("conserve", CONSERVES)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_scaling_the_gradient_scales_the_result(dtype, gamma, conserve, scale):
    """1e-20 squared is below float32's smallest number: squares must be taken of normalised sums."""
    grad, selected = example(dtype=dtype)
    expected = scale_channels(grad, selected, gamma, conserve).double() * scale
    assert not bool(channel_factors(grad * scale, selected, gamma, conserve).identity.any())
    assert_each_close(
        scale_channels(grad * scale, selected, gamma, conserve), expected, 1e-14 if dtype.itemsize == 8 else 1e-5
    )


@pytest.mark.parametrize("scale", [1e18, 1e30], ids=lambda s: f"x{s:g}")
def test_large_gradients_do_not_overflow(scale):
    grad, selected = example(dtype=torch.float32)
    for gamma in (2.0, math.inf):
        expected = scale_channels(grad, selected, gamma).double() * scale
        assert_each_close(scale_channels(grad * scale, selected, gamma), expected, 1e-5)


@pytest.mark.parametrize("conserve", CONSERVES)
@pytest.mark.parametrize("gamma", [1e12, 1e25], ids=lambda g: f"{g:g}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_huge_finite_gamma_tends_to_infinite_gamma(dtype, gamma, conserve):
    """a squared overflows float32 at gamma 1e20; the conserved limit is finite all the same."""
    if conserve == "none":
        pytest.skip("b = 1: the selected side grows with gamma, there is no limit")
    grad, selected = example(dtype=dtype)
    expected = scale_channels(grad.double(), selected, math.inf, conserve)
    assert_each_close(scale_channels(grad, selected, gamma, conserve), expected, 1e-5)


@pytest.mark.parametrize("conserve", CONSERVES)
@pytest.mark.parametrize("spatial", [(4, 5), (1, 1)], ids=["4x5", "1x1"])
def test_neutral_gamma_is_the_identity(spatial, conserve):
    grad, selected = example(spatial=spatial)
    moments = [rule.image_moments(g, s) for g, s in zip(grad.numpy(), selected, strict=True)]
    gamma = torch.tensor([math.sqrt(m / n) for m, n, _ in moments], dtype=torch.float64)
    assert_each_close(scale_channels(grad, selected, gamma, conserve), grad, 1e-12)


def test_smaller_gamma_weakens_the_selected_side():
    grad, selected = example()
    share = []
    for gamma in (0.0, 0.5, 1.0, 2.0, 8.0, math.inf):
        factors = channel_factors(grad, selected, gamma)
        share.append(factors.selected / (factors.selected + factors.unselected))
    assert all(bool((low < high).all()) for low, high in pairwise(share))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("conserve", ["none", "independent", "exact"])
def test_finite_gamma_sets_the_ratio_of_the_sides(gamma, conserve):
    """sd of the selected side's sum is gamma times the other's, whatever b is."""
    grad, selected = example()
    scaled = scale_channels(grad, selected, gamma, conserve)
    for image in range(3):
        m, n, _ = rule.image_moments(scaled[image].numpy(), selected[image])
        assert math.sqrt(m / n) == pytest.approx(gamma, rel=1e-12)


@given(
    seed=st.integers(0, 10_000),
    gamma=st.one_of(st.floats(0.0, 20.0), st.just(math.inf)),
    positions=st.sampled_from([(1, 1), (1, 2), (3, 3), (5, 2)]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_exact_conserves_the_variance_of_the_sum(seed, gamma, positions):
    grad, selected = example(seed=seed, spatial=positions)
    scaled = scale_channels(grad, selected, gamma, "exact")
    # Where nearly all cancels (after << a^2 M + N) rounding is amplified; 1e-12 of 1e16 digits leaves 1e-5.
    assert_each_close(total_variance(scaled), total_variance(grad), 1e-5)


@given(seed=st.integers(0, 10_000), gamma=st.one_of(st.floats(0.0, 20.0), st.just(math.inf)))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_independent_conserves_the_variance_where_the_sides_are_uncorrelated(seed, gamma):
    generator = torch.Generator().manual_seed(seed)
    sums, _ = torch.linalg.qr(torch.cat([torch.ones(9, 1), torch.randn(9, 2, generator=generator)], 1).double())
    high, low = sums[:, 1] * 3.0, sums[:, 2] * 0.7  # orthogonal to the constant and to one another: K = 0
    split = torch.rand(9, generator=generator).double()
    grad = torch.stack([high * split, high * (1 - split), low + split, -split]).reshape(1, 4, 3, 3)
    selected = torch.tensor([[True, True, False, False]])
    scaled = scale_channels(grad, selected, gamma, "independent")
    assert_close(total_variance(scaled), total_variance(grad), 1e-10)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_mixed_batch_equals_one_by_one_and_the_oracle(seed):
    generator = np.random.default_rng(seed)
    grad, selected = example(batch=5, seed=seed)
    selected[int(generator.integers(5))] = bool(generator.integers(2))
    gammas = [float(g) for g in generator.choice(GAMMAS, 5)]
    conserves = [str(c) for c in generator.choice(CONSERVES, 5)]
    together = scale_channels(grad, selected, torch.tensor(gammas, dtype=torch.float64), conserves)
    alone = torch.cat([scale_channels(grad[i : i + 1], selected[i : i + 1], gammas[i], conserves[i]) for i in range(5)])
    assert_each_close(together, alone, 1e-13)
    assert_each_close(together, rule.scale_batch(grad, selected, gammas, conserves), 1e-10)


def test_permuting_channels_permutes_the_result():
    grad, selected = example()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    for gamma in (2.0, math.inf):
        expected = scale_channels(grad, selected, gamma)[:, order]
        assert_each_close(scale_channels(grad[:, order], selected[:, order], gamma), expected, 1e-13)


@pytest.mark.parametrize("conserve", CONSERVES)
@pytest.mark.parametrize("gamma", [2.0, math.inf])
@pytest.mark.parametrize("fill", [False, True], ids=["none-selected", "all-selected"])
def test_an_empty_side_passes_unchanged(fill, gamma, conserve):
    grad, selected = example()
    selected[1] = fill
    assert channel_factors(grad, selected, gamma, conserve).identity.tolist() == [False, True, False]
    scaled = scale_channels(grad, selected, gamma, conserve)
    assert torch.equal(scaled[1], grad[1])
    assert not torch.equal(scaled[0], grad[0])


def two_sided(high, low):
    """One image, one selected and one unselected channel with these values at the positions."""
    return torch.tensor([[high, low]], dtype=torch.float64), torch.tensor([[True, False]])


DEGENERATE = {
    "all-zero": ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], True, True, True),
    "selected-zero": ([0.0, 0.0, 0.0], [1.0, 2.0, 4.0], True, True, True),
    "selected-constant": ([0.1, 0.1, 0.1], [1.0, 2.0, 4.0], True, True, True),
    "selected-far-below": ([1e-7, 3e-7, 0.0], [1.0, 2.0, 4.0], True, True, True),
    "selected-just-above": ([1e-5, 3e-5, 0.0], [1.0, 2.0, 4.0], False, False, False),
    "unselected-zero": ([1.0, 2.0, 4.0], [0.0, 0.0, 0.0], True, False, False),
    "unselected-constant": ([1.0, 2.0, 4.0], [0.3, 0.3, 0.3], True, False, False),
    "unselected-far-below": ([1.0, 2.0, 4.0], [1e-7, 3e-7, 0.0], True, False, False),
    "sum-cancels": ([1.0, 2.0, 4.0], [-1.0, -2.0, -4.0], False, False, True),
    "both-constant": ([0.1, 0.1, 0.1], [0.7, 0.7, 0.7], True, True, True),
}


@pytest.mark.parametrize("scale", SCALES, ids=lambda s: f"x{s:g}")
@pytest.mark.parametrize("case", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_degenerate_sides(case, scale):
    """Identity for (finite gamma, infinite gamma, exact) where the formula would divide by nothing."""
    high, low, finite, infinite, exact = case
    grad, selected = two_sided(high, low)
    grad = grad * scale
    for gamma, conserve, identity in (
        (2.0, "independent", finite),
        (2.0, "none", finite),
        (math.inf, "independent", infinite),
        (math.inf, "none", infinite),
        (math.inf, "exact", exact),
    ):
        factors = channel_factors(grad, selected, gamma, conserve)
        assert factors.identity.tolist() == [identity], (gamma, conserve)
        scaled = scale_channels(grad, selected, gamma, conserve)
        assert_close(scaled, rule.scale_batch(grad, selected, [gamma], [conserve]), 1e-12)
        assert torch.equal(scaled, grad) or not identity
        assert bool(torch.isfinite(scaled).all())


def test_exact_passes_unchanged_where_the_scaled_sum_cancels():
    """S_L = -2 S_H and gamma = 1: after scaling the two sides cancel exactly, no b restores the sum."""
    grad, selected = two_sided([1.0, 2.0, 4.0], [-2.0, -4.0, -8.0])
    assert channel_factors(grad, selected, 1.0, "exact").identity.tolist() == [True]
    assert torch.equal(scale_channels(grad, selected, 1.0, "exact"), grad)
    assert channel_factors(grad, selected, 1.0, "independent").identity.tolist() == [False]


def test_a_constant_gradient_is_degenerate_in_float32_too():
    """What global pooling sends back: equal at every position, so that only rounding differs."""
    values = torch.rand(1, 64, 1, 1, generator=torch.Generator().manual_seed(0)) - 0.3
    grad = values.expand(1, 64, 13, 13).contiguous()
    selected = torch.arange(64)[None] < 7
    assert channel_factors(grad, selected, math.inf).identity.tolist() == [True]
    assert torch.equal(scale_channels(grad, selected, 3.0), grad)


@pytest.mark.parametrize("gamma", [0.5, 2.0, math.inf])
@pytest.mark.parametrize("scale", [1.0, 1e-6], ids=lambda s: f"x{s:g}")
def test_a_vanishing_total_is_degenerate_in_float32_too(scale, gamma):
    """A convolution followed by LayerNorm: its channels' gradients sum to nothing but rounding."""
    grad = torch.randn(8, 96, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grad = (scale * (grad - grad.mean(1, keepdim=True))).float()
    selected = torch.arange(96).expand(8, 96) < 9
    assert channel_factors(grad.double(), selected, gamma, "exact").identity.all()
    assert channel_factors(grad, selected, gamma, "exact").identity.all()
    assert not channel_factors(grad, selected, gamma, "independent").identity.any()


@pytest.mark.parametrize("gamma", [2.0, math.inf])
def test_never_writes_into_its_inputs(gamma):
    grad, selected = example()
    before = grad.clone(), selected.clone()
    scaled = scale_channels(grad, selected, gamma)
    assert torch.equal(grad, before[0])
    assert torch.equal(selected, before[1])
    scaled.zero_()
    assert torch.equal(grad, before[0]), "the result shares the gradient's memory"


def test_an_identity_result_does_not_share_memory_with_a_gradient_it_would_corrupt():
    grad, selected = example()
    selected[:] = True
    before = grad.clone()
    scale_channels(grad, selected, math.inf).mul_(2)
    assert torch.equal(grad, before)


def test_expanded_and_strided_gradients():
    grad, selected = example(spatial=(1, 1))
    wide = grad.expand(3, 6, 4, 5)
    assert_each_close(
        scale_channels(wide, selected, 2.0), rule.scale_batch(wide, selected, [2.0] * 3, ["independent"] * 3)
    )
    grad, selected = example(spatial=(4, 5))
    last = grad.to(memory_format=torch.channels_last)
    assert_each_close(scale_channels(last, selected, 2.0), scale_channels(grad, selected, 2.0), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 300.0], ids=lambda s: f"x{s:g}")
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("gamma", [0.5, 3.0, math.inf])
def test_narrow_types_and_autocast(gamma, autocast, scale, dtype):
    """Variances in float32 or wider: squares of 300 x 40 channels overflow float16, those of 1e-4 vanish."""
    grad, selected = example(channels=40, spatial=(6, 6))
    grad = (grad * scale).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        factors = channel_factors(grad, selected, gamma)
        scaled = scale_channels(grad, selected, gamma)
    assert scaled.dtype == dtype
    assert factors.selected.dtype.itemsize >= 4
    for image in range(3):
        expected = rule.image_factors(grad[image].double().numpy(), selected[image], gamma, "independent")
        assert_close([factors.selected[image], factors.unselected[image]], expected, 1e-5)
    assert_each_close(
        scaled,
        rule.scale_batch(grad.double(), selected, [gamma] * 3, ["independent"] * 3),
        4 * torch.finfo(dtype).eps + (1e-3 if dtype == torch.float16 and scale < 1 else 0.0),
    )


def test_needs_no_value_on_the_host(monkeypatch):
    """No .item(), no bool(tensor): the rule must not make a device wait. Fake tensors have no values to look at."""

    def refuse(*_):
        raise AssertionError("a tensor's value was read on the host")

    for name in ("item", "tolist", "__bool__", "__float__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    grad, selected = example()
    for gamma in (2.0, math.inf, torch.full((3,), 2.0)):
        for conserve in (*CONSERVES, CONSERVES):
            scale_channels(grad, selected, gamma, conserve)
    monkeypatch.undo()
    with FakeTensorMode():
        out = scale_channels(torch.empty(2, 5, 3, 4), torch.empty(2, 5, dtype=torch.bool), torch.empty(2), "exact")
    assert out.shape == (2, 5, 3, 4)


def test_works_under_no_grad_inference_mode_and_builds_no_graph():
    grad, selected = example()
    expected = scale_channels(grad, selected, 2.0)
    with torch.inference_mode():
        assert torch.equal(scale_channels(grad, selected, 2.0), expected)
    with torch.no_grad():
        assert not scale_channels(grad.requires_grad_(), selected, 2.0).requires_grad


@pytest.mark.parametrize("wrong", ["sometimes", ["exact", "none"], ["exact", "none", "sometimes"]], ids=str)
def test_unknown_conserve_is_refused(wrong):
    grad, selected = example()
    with pytest.raises(ValueError, match=r"conserve is .*expected one of"):
        scale_channels(grad, selected, 2.0, wrong)


class Sequential(nn.Module):
    """Purely sequential and piecewise linear: convolutions, ReLU, max-pooling, a linear head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 5, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.LazyLinear(4),
        )

    def forward(self, images):
        return self.body(images)


@pytest.mark.parametrize("gamma", [0.5, 3.0, math.inf])
@pytest.mark.parametrize("conserve", ["independent", "exact"])
def test_in_a_sequential_network_conservation_only_rescales_each_image(conserve, gamma):
    """Holds for the oracle's mechanism with the library's rule: a factor per image and layer commutes with the rest."""
    torch.manual_seed(0)
    model = Sequential().double()
    images = torch.randn(2, 3, 14, 14, dtype=torch.float64)
    model(images)
    generator = torch.Generator().manual_seed(1)

    def run(mode):
        handles = []
        generator.manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                selected = torch.rand(2, module.out_channels, generator=generator) < 0.5
                selected[:, 0], selected[:, 1] = True, False

                def hook(_, __, z, selected=selected):
                    z.register_hook(lambda grad: scale_channels(grad, selected, gamma, mode))

                handles.append(module.register_forward_hook(hook))
        leaf = images.clone().requires_grad_()
        (found,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
        for handle in handles:
            handle.remove()
        return found

    plain, conserved = run("none"), run(conserve)
    for one, other in zip(plain, conserved, strict=True):
        factor = float((one * other).sum() / (one * one).sum())
        assert factor > 0
        assert abs(factor - 1) > 1e-3
        assert_close(other, one * factor, 1e-10)
