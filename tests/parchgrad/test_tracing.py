"""What the pruned engine can trace, what it refuses and why; and other threads meanwhile."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parchgrad.errors import UnsupportedModelError
from parchgrad.explainer import Explainer
from parchgrad.runtimes.pruned.program import Program
from parchgrad.runtimes.pruned.tracing import trace
from parchgrad.runtimes.view import private_view
from tests.oracles.tolerance import assert_close, assert_each_close
from tests.parchgrad import networks
from tests.parchgrad.networks import batch, build, table_for


class Small(nn.Module):
    """A convolution, what `between` does with its output, and a head; `between` is given by each case."""

    between = staticmethod(lambda self, z: z)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.register_buffer("offset", torch.ones(1, dtype=torch.float64))
        self.head = nn.Linear(8, networks.CLASSES)

    def forward(self, images):
        return self.head(self.between(self, self.stem(images)).mean((2, 3)))


def small(between):
    torch.manual_seed(0)
    return type("Case", (Small,), {"between": staticmethod(between)})().double().eval()


def branch_after_write(net, z):
    y = net.act(z)
    return y + z


def branch_before_write(net, z):
    y = z * 2.0
    z += 1.0
    return y + z


def old_after_iadd(net, z):
    y = z
    z += 1.0
    return y * z


def view_after_write(net, z):
    low = z[:, :4]
    z.mul_(2.0)
    return torch.cat((low, z[:, 4:]), 1)


def view_written(net, z):
    low = z.view(z.size(0), 8, -1)
    low.relu_()
    return z


def dropped_write(net, z):
    F.relu_(z)
    return z


def write_by_keyword(net, z):
    y = net.act(input=z)
    return y - z.abs()


def part_written(net, z):
    z[:, :4] = 0.0
    return z


def part_added(net, z):
    z[:, :4] += 1.0
    return z


def out_given(net, z):
    torch.add(z, 1.0, out=z)
    return z


def buffer_written(net, z):
    net.offset.add_(1.0)
    return z * net.offset


def buffer_counted(net, z):
    net.offset.add_(1.0)
    return z


def by_value(net, z):
    return z * 2.0 if z.mean() > 0 else z


def by_item(net, z):
    return z * float(z.sum())


def by_length(net, z):
    return torch.stack([one * 2.0 for one in z])


def filled(net, z):
    return z + torch.zeros_like(z).fill_(2.0)


def copied(net, z):
    y = torch.zeros_like(z)
    y.copy_(z)
    return y


def view_read_before(net, z):
    y = z[:, :4] * 0.5
    z.mul_(2.0).add_(1.0)
    z.relu_()
    return torch.cat((y, z), 1)[:, :8]


TRACED = [
    branch_after_write,
    branch_before_write,
    old_after_iadd,
    dropped_write,
    write_by_keyword,
    view_read_before,
]


class Halved(torch.autograd.Function):
    """The identity, by its own word half as steep."""

    @staticmethod
    def forward(ctx, z):
        return z * 1.0

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.5


def own_derivative(net, z):
    return Halved.apply(z) + z


def gate_without_gradient(net, z):
    with torch.no_grad():
        gate = torch.sigmoid(z.mean(1, keepdim=True))
    return z * gate


@torch.no_grad()
def without_gradient(z):
    return z.amax((2, 3), keepdim=True)


def function_without_gradient(net, z):
    return z - without_gradient(z)


def gradient_switched_off(net, z):
    torch.set_grad_enabled(False)
    gate = torch.sigmoid(z)
    torch.set_grad_enabled(True)
    return z * gate


REFUSED = {
    view_after_write: "writes into a tensor that is read through another afterwards",
    view_written: "writes into a tensor that is read through another afterwards",
    part_written: "cannot be traced: .*item assignment",
    part_added: "cannot be traced: .*item assignment",
    out_given: "writes into a part of a tensor",
    buffer_written: "writes into a tensor that the network keeps",
    buffer_counted: "writes into a tensor that the network keeps",
    by_value: "cannot be traced: symbolically traced variables cannot be used as inputs to control flow",
    by_item: "cannot be traced",
    own_derivative: "computes without a gradient, or by an autograd.Function",
    gate_without_gradient: "computes without a gradient, or by an autograd.Function",
    function_without_gradient: "computes without a gradient, or by an autograd.Function",
    gradient_switched_off: "computes without a gradient, or by an autograd.Function",
    by_length: "cannot be traced",
    filled: "'fill_' calls fill_, which writes into its tensor",
    copied: "'copy_' calls copy_, which writes into its tensor",
}


def assert_equal_engines(model, images):
    table = table_for(model)
    with torch.no_grad():
        expected = model(images.clone())
    for backward in ("pruned", "dense"):
        explainer = Explainer(model, table, backward=backward)
        assert_close(explainer.predict(images), expected, 1e-10)
    found, dense = (Explainer(model, table, backward=b).explain(images, 1, quantile=0.5) for b in ("pruned", "dense"))
    assert_each_close(found.attributions, dense.attributions, 1e-10)


@pytest.mark.parametrize("between", TRACED, ids=lambda f: f.__name__)
def test_writes_that_nobody_sees_are_traced(between):
    assert_equal_engines(small(between), batch(2))


@pytest.mark.parametrize(("between", "reason"), REFUSED.items(), ids=[b.__name__ for b in REFUSED])
def test_what_is_refused_and_why(between, reason):
    model = small(between)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=reason):
        trace(private_view(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "tracing wrote"
    explainer = Explainer(model, table_for(model))
    assert explainer.backward == "dense"
    with torch.no_grad():
        expected = small(between)(batch(1))
    assert_close(explainer.predict(batch(1)), expected, 1e-12)


KINDS = {
    networks.Branching: None,
    networks.InPlaceRelu: None,
    networks.ReusedRelu: None,
    networks.FunctionalRelu: None,
    networks.InPlaceOnBranch: None,
    networks.ReusedConvolution: "Layer 'right' is called 2 times in one prediction",
    networks.ReusedBeforePooling: "Layer 'right' is called 2 times in one prediction",
    networks.OnePosition: None,
    networks.Smooth: None,
    networks.OverwrittenInput: None,
    networks.ViewedOutput: "item assignment",
    networks.SlicedRelu: "writes into a tensor that is read through another afterwards",
    networks.Parametrized: None,
    networks.Hooked: "Module 'right' has forward hooks",
    networks.Transposed: None,
}


@pytest.mark.parametrize("network", networks.ALL, ids=lambda n: n.__name__)
def test_which_kinds_of_network_are_traced(network):
    model = build(network)
    explainer = Explainer(model, table_for(model))
    reason = KINDS[network]
    assert explainer.backward == ("pruned" if reason is None else "dense")
    assert reason is None or reason in explainer.dense_because


class TwoInputs(networks.Branching):
    def forward(self, images, other=None):
        return super().forward(images)


class AnyInputs(networks.Branching):
    def forward(self, *images):
        return super().forward(images[0])


class Dictionary(networks.Branching):
    def forward(self, images):
        return {"logits": super().forward(images)}


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (TwoInputs, "takes more than one input"),
        (AnyInputs, "takes more than one input"),
        (Dictionary, "answers with something else than one tensor"),
    ],
    ids=["two", "any", "dictionary"],
)
def test_other_inputs_and_answers_are_refused(network, reason):
    model = build(network)
    with pytest.raises(UnsupportedModelError, match=reason):
        Explainer(model, table_for(model), backward="pruned")


def test_a_module_with_a_forward_of_its_own_is_refused():
    """The trace would run, or fold, what its class does."""
    model = build()
    model.norm.forward = lambda z: z
    explainer = Explainer(model, table_for(model))
    assert explainer.dense_because == "Module 'norm' has a forward of its own, not that of its class."
    with torch.no_grad():
        assert_close(explainer.predict(batch(1)), model(batch(1)), 1e-12)


class Scaled(networks.Branching):
    """A buffer and a parameter of the network's own, read in its forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor(2.0))
        self.offset = nn.Parameter(torch.full((1, 3, 1, 1), 0.5))
        self.plain = torch.tensor(3.0, dtype=torch.float64)

    def forward(self, images):
        return super().forward(images * self.factor + self.offset * self.plain)


def test_buffers_and_parameters_are_read_at_every_call():
    model = build(Scaled)
    explainer = Explainer(model, table_for(model), backward="pruned")
    explainer.predict(batch(1))
    with torch.no_grad():
        model.factor.mul_(2.0)
        model.offset.mul_(-1.0)
        assert_close(explainer.predict(batch(1)), model(batch(1)), 1e-12)


def test_convolutions_that_see_no_image_are_none_of_the_rules():
    class Coded(networks.Branching):
        def __init__(self):
            super().__init__()
            self.code = nn.Parameter(torch.randn(1, 8, 4, 4))

        def forward(self, images):
            z = F.relu(self.norm(self.stem(images)))
            return self.head(F.relu(self.join(z)).mean((2, 3)) + self.right(self.code).mean())

    model = build(Coded)
    found = trace(private_view(model))
    assert found.convolutions == ("stem", "join")
    assert Program(found, private_view(model), ("stem", "join", "right")).layers == {"stem", "join"}
    for backward in ("pruned", "dense"):
        explainer = Explainer(model, table_for(model), backward=backward)
        with pytest.raises(UnsupportedModelError, match="Layer 'right' of table 'made-up' took no part"):
            explainer.explain(batch(1), 1, layers=("stem", "right"))


# --- other threads, while torch.fx has replaced nn.Module.__call__ for the whole process ---


class Waiting(networks.Branching):
    """Stops in the middle of being traced."""

    inside, go_on = threading.Event(), threading.Event()

    def forward(self, images):
        z = F.relu(self.norm(self.stem(images)))
        if isinstance(images, torch.fx.Proxy):
            self.inside.set()
            assert self.go_on.wait(60)
        return self.head(F.relu(self.join(z)).mean((2, 3)))


@pytest.fixture
def half_traced():
    """A network that another thread is in the middle of tracing, and what ends that: the finished explainer."""
    Waiting.inside.clear()
    Waiting.go_on.clear()
    model, found = build(Waiting), []
    tracing = threading.Thread(target=lambda: found.append(Explainer(model, table_for(model), backward="pruned")))
    tracing.start()
    assert Waiting.inside.wait(60)

    def finish():
        Waiting.go_on.set()
        tracing.join(60)
        assert not tracing.is_alive()
        return found[0]

    yield model, finish
    finish()


def test_other_modules_run_while_one_is_traced(half_traced):
    model, finish = half_traced
    other = build()
    images = batch(2).requires_grad_()
    expected = networks.Branching.forward(other, images)
    found = other(images)
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)
    found.sum().backward()
    assert images.grad.abs().sum() > 0
    with torch.no_grad():
        whole = model.stem(batch(2)), model.head(torch.ones(1, 12, dtype=torch.float64))
    assert all(type(one) is torch.Tensor for one in whole), "the traced model's own modules too"
    explainer = finish()
    with torch.no_grad():
        assert_close(explainer.predict(batch(2)), model(batch(2)), 1e-12)
    assert explainer.backward == "pruned"
    assert [node for node in trace(private_view(other)).graph.nodes if node.op == "placeholder"], "traced afterwards"


def test_an_explanation_goes_on_while_another_network_is_traced(half_traced):
    _, finish = half_traced
    other = build()
    dense = Explainer(other, table_for(other), backward="dense").explain(batch(2), 1)
    finish()
    expected = Explainer(other, table_for(other), backward="pruned").explain(batch(2), 1)
    assert_each_close(dense.attributions, expected.attributions, 1e-10)


def test_a_pruned_explanation_goes_on_while_another_network_is_traced():
    other = build()
    explainer = Explainer(other, table_for(other), backward="pruned")
    Waiting.inside.clear()
    Waiting.go_on.clear()
    model = build(Waiting)
    tracing = threading.Thread(target=lambda: Explainer(model, table_for(model), backward="pruned"))
    tracing.start()
    try:
        assert Waiting.inside.wait(60)
        found = explainer.explain(batch(2), 1).attributions  # the first call, which runs the network itself too
    finally:
        Waiting.go_on.set()
        tracing.join(60)
    assert_each_close(found, explainer.explain(batch(2), 1).attributions, 1e-12)
    assert explainer.backward == "pruned"


def test_one_network_is_traced_at_a_time(half_traced):
    """Two would each put back what the other had put in the place of nn.Module.__call__."""
    _, finish = half_traced
    other = threading.Thread(target=lambda: trace(private_view(build())))
    other.start()
    other.join(0.3)
    assert other.is_alive(), "waits"
    finish()
    other.join(60)
    assert not other.is_alive()


def test_explainers_are_built_by_eight_threads_at_once():
    models = [build(network) for network in (networks.Branching, networks.OnePosition, networks.Smooth) * 4]
    found = {}

    def made(i):
        explainer = Explainer(models[i], table_for(models[i]), backward="pruned")
        found[i] = explainer.predict(batch(1))

    threads = [threading.Thread(target=made, args=(i,)) for i in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    with torch.no_grad():
        for i, model in enumerate(models):
            assert_close(found[i], model(batch(1)), 1e-12)
