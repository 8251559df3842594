"""The pruned backward pass of a batch at once, as on a GPU, on the CPU: equal to the dense engine, and no waiting."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from parchgrad.architectures import build_network
from parchgrad.explainer import Explainer
from parchgrad.options import per_image
from parchgrad.runtimes.pruned import batched
from parchgrad.runtimes.pruned import engine as engine_module
from parchgrad.runtimes.pruned.batched import staged
from parchgrad.runtimes.pruned.engine import PrunedEngine
from parchgrad.runtimes.view import private_view
from parchgrad.tables import SelectionTable
from tests.oracles.tolerance import assert_each_close
from tests.parchgrad import networks

# float64 sums in another order; float32 by the rule's cancellations.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}

MIXED = {
    "quantile": [0.4, 0.4, 0.6, 1.0, 0.25],
    "gamma": [math.inf, math.inf, 2.0, math.inf, math.inf],
    "conserve": ["independent", "exact", "exact", "independent", "none"],
    "seed": ["logit", "probability_weighted_logit", "logit", "logit", "logit"],
}
TARGETS = [0, -1, 2, 3, -1]


class Kernels(nn.Module):
    """Every form of a pruned input gradient: strides, dilation, groups, depthwise, 1x1; rows that no window reads."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.norm = nn.BatchNorm2d(20)
        self.wide = nn.Conv2d(20, 24, (3, 5), padding=(1, 2), bias=False)
        self.strided = nn.Conv2d(24, 24, 3, stride=2, padding=1)
        self.strided_norm = nn.BatchNorm2d(24)
        self.dilated = nn.Conv2d(24, 24, 3, dilation=2, padding=2)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.depthwise_norm = nn.BatchNorm2d(24)
        self.depthwise_strided = nn.Conv2d(24, 24, 3, stride=2, groups=24)
        self.grouped = nn.Conv2d(24, 12, 3, padding=1, groups=3)
        self.point = nn.Conv2d(12, 20, 1)
        self.skip = nn.Conv2d(24, 20, 1, stride=2)
        self.gate = nn.Conv2d(20, 20, 1)
        self.head = nn.Linear(20, networks.CLASSES)

    def forward(self, images):
        z = F.relu6(self.norm(self.stem(images)))
        z = F.relu(self.strided_norm(self.strided(self.wide(z))))
        z = self.depthwise_norm(self.depthwise(F.silu(self.dilated(z)))).relu()
        z = F.silu(self.point(self.grouped(self.depthwise_strided(F.pad(z, (0, 3, 0, 3))))) + self.skip(z))
        z = z * torch.sigmoid(self.gate(z.mean((2, 3), keepdim=True)))
        return self.head(z.mean((2, 3)))


def explainer(model, table, **settings):
    """An Explainer whose engine takes batches at once, on the CPU."""
    made = Explainer(model, table, backward="pruned", **settings)
    made._runtime._pruned = PrunedEngine(private_view(model), table, together=True)
    return made


def assert_equal_to_dense(model, table, images, targets, tolerance, **options):
    found = explainer(model, table).explain(images, targets, **options)
    expected = Explainer(model, table, backward="dense").explain(images, targets, **options)
    assert_each_close(found.attributions, expected.attributions, tolerance)
    assert_each_close(found.logits, expected.logits, tolerance)
    assert found.targets.tolist() == expected.targets.tolist()
    assert found.identity_layers.tolist() == expected.identity_layers.tolist()
    return found


@pytest.fixture
def again(monkeypatch):
    """Which images went to the dense engine after all, call by call."""
    seen = []
    one_look = PrunedEngine.batch_gradients

    def counted(self, *args):
        found, left = one_look(self, *args)
        seen.append(left)
        return found, left

    monkeypatch.setattr(PrunedEngine, "batch_gradients", counted)
    return seen


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("network", [Kernels, networks.Branching, networks.OnePosition], ids=lambda n: n.__name__)
def test_mixed_batches_equal_the_dense_engine(network, dtype, again):
    model = networks.build(network, dtype=dtype)
    images = networks.batch(5, 18, dtype=dtype)
    assert_equal_to_dense(model, networks.table_for(model), images, TARGETS, TOLERANCE[dtype], **MIXED)
    assert again == [[]]


def test_each_image_of_a_mixed_batch_is_what_it_is_alone():
    model, images = networks.build(Kernels), networks.batch(5, 18)
    one = explainer(model, networks.table_for(model))
    together = one.explain(images, TARGETS, **MIXED)
    for i in range(5):
        alone = one.explain(images[i : i + 1], TARGETS[i], **{name: values[i] for name, values in MIXED.items()})
        assert_each_close(alone.attributions, together.attributions[i : i + 1], 1e-10)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "squeezenet1_1"])
def test_torchvision_networks_equal_the_dense_engine(name):
    torch.manual_seed(0)
    model = build_network(name, 4).double().eval()
    images = torch.randn(3, 3, 65, 65, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    table = SelectionTable.random(model, 4, 0)
    assert_equal_to_dense(model, table, images, [0, 1, -1], 1e-10, quantile=[0.1, 0.1, 0.25])


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small"])
def test_images_of_torchvision_networks_are_explained_once(name, again):
    """Also where a depthwise layer selects none of the channels that the layer below does."""
    torch.manual_seed(0)
    model = build_network(name, 50).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    images = torch.randn(4, 3, 64, 64)
    explainer(model, SelectionTable.random(model, 50, 0)).explain(images, [0, 1, 2, 3], quantile=0.1)
    assert again == [[]]


FORMS = (batched.by_product, batched.by_flipped, batched.by_transposed, batched.by_depthwise)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_is_taken_by_the_network_of_the_tests(form, monkeypatch):
    """And a wrong one would be seen."""
    model, images = networks.build(Kernels), networks.batch(5, 18)
    monkeypatch.setattr(batched, form.__name__, lambda *given: 1.01 * form(*given))
    with pytest.raises(AssertionError, match="of the largest"):
        assert_equal_to_dense(model, networks.table_for(model), images, TARGETS, 1e-10, **MIXED)


def test_an_image_that_passes_unchanged_in_a_layer_is_explained_densely(again):
    """The selected side has no variance there: pruned, nothing would be left of the gradient."""
    model = networks.build(Kernels)
    table = SelectionTable.random(model, networks.CLASSES, 0)
    images = networks.batch(4, 18)
    selected = table.layers["wide"].rank[1].argsort()[:4]
    with torch.no_grad():  # nothing reads what class 1 selects
        model.strided.weight[:, selected] = 0.0
    found = assert_equal_to_dense(model, table, images, [0, 1, 2, 1], 1e-10, quantile=0.2)
    assert again == [[1, 3]]
    assert found.identity_layers[1] == found.identity_layers[0] + 1


def test_a_layer_before_global_pooling_alone_passes_unchanged():
    class BeforePooling(networks.Branching):
        def forward(self, images):
            return self.head(self.join(F.relu(self.norm(self.stem(images)))).mean((2, 3)))

    model = networks.build(BeforePooling)
    table = networks.table_for(model)
    found = assert_equal_to_dense(
        model, table, networks.batch(3), [0, 1, 2], 1e-10, quantile=0.4, layers=["stem", "join"]
    )
    assert found.identity_layers.tolist() == [1, 1, 1]


@pytest.mark.parametrize("where", [[1], [0, 2]], ids=["one", "two"])
def test_images_that_are_not_finite_are_explained_densely(where, again):
    model, images = networks.build(Kernels), networks.batch(3, 18)
    table = networks.table_for(model)
    one = explainer(model, table)
    one.explain(images, [0, 1, 2], quantile=0.4)  # of a size that is known
    images[where, 0, 3, 3] = math.nan
    found = one.explain(images, [0, 1, 2], quantile=0.4)
    expected = Explainer(model, table, backward="dense").explain(images, [0, 1, 2], quantile=0.4)
    assert_each_close(found.attributions, expected.attributions, 1e-10)
    assert_each_close(found.logits, expected.logits, 1e-10)
    assert again == [[], where]


def test_options_whose_number_of_channels_depends_on_the_class_go_to_the_dense_engine():
    model, images = networks.build(Kernels), networks.batch(4, 18)
    options = {
        "alpha": [None, 0.05, None, None], "quantile": [0.3, None, 0.3, 0.3],
        "normality_filter": [False, False, True, False], "selection": ["class", "class", "class", "instance"],
    }  # fmt: skip
    assert_equal_to_dense(model, networks.table_for(model), images, [0, 1, 2, 3], 1e-10, **options)


def test_a_class_outside_the_table_passes_unchanged():
    model, images = networks.build(Kernels), networks.batch(3, 18)
    table = networks.table_for(model, covered=(0, 2, 3))
    found = assert_equal_to_dense(model, table, images, [0, 1, 2], 1e-10, quantile=0.4, uncovered="nan")
    assert found.attributions[1].isnan().all()


def test_some_layers_and_no_rule_at_all():
    model, images = networks.build(Kernels), networks.batch(3, 18)
    table = networks.table_for(model)
    options = {"quantile": 0.3, "rule": [True, False, True], "layers": [["*"], ["*"], ["wide", "point"]]}
    assert_equal_to_dense(model, table, images, [0, 1, 2], 1e-10, **options)
    assert_equal_to_dense(model, table, images, [0, 1, 2], 1e-10, rule=False)


def test_weights_changed_behind_pytorchs_back_are_seen_in_the_one_look():
    model, images = networks.build(Kernels), networks.batch(3, 18)
    table = networks.table_for(model)
    one = explainer(model, table)
    before = one.explain(images, [0, 1, 2], quantile=0.4)
    model.wide.weight.data.mul_(-1.0)
    found = one.explain(images, [0, 1, 2], quantile=0.4)
    expected = Explainer(model, table, backward="dense").explain(images, [0, 1, 2], quantile=0.4)
    assert_each_close(found.attributions, expected.attributions, 1e-10)
    assert not torch.allclose(found.attributions, before.attributions)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_statistics_are_float32(dtype, monkeypatch):
    """Half-precision maps are as far from float64's as the dense engine's."""
    model, images = networks.build(Kernels, dtype=torch.float32), networks.batch(3, 18, dtype=torch.float32)
    table = networks.table_for(model)
    sums = []
    measured = batched.side_sums
    monkeypatch.setattr(batched, "side_sums", lambda *given: sums.append((given[0], measured(*given))) or sums[-1][1])
    one = explainer(model, table)
    dense = Explainer(model, table, backward="dense")
    exact = dense.explain(images, [0, 1, 2], quantile=0.4).attributions
    with torch.autocast("cpu", dtype):
        found = one.explain(images, [0, 1, 2], quantile=0.4).attributions
        expected = dense.explain(images, [0, 1, 2], quantile=0.4).attributions
    assert {grad.dtype for grad, _ in sums} == {dtype}
    assert {one.dtype for _, one in sums} == {torch.float32}
    bound = 2 * float((expected - exact).norm() / exact.norm()) + 0.01
    assert float((found - exact).norm() / exact.norm()) < bound
    assert found.dtype == expected.dtype == torch.float32


class OnlyStaged(TorchDispatchMode):
    """Raises where a tensor is copied to the device other than by `staged`: a GPU's queue would be waited for."""

    def __init__(self):
        super().__init__()
        self.staging = False

    def staged(self, tensor, device):
        self.staging = True
        try:
            return staged(tensor, device)
        finally:
            self.staging = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            to = torch.device(kwargs.get("device") or "cpu")
            assert self.staging or to.type == "cpu", "a copy that waits"
        return func(*args, **kwargs)


@pytest.mark.parametrize("network", [Kernels, networks.Branching, networks.OnePosition], ids=lambda n: n.__name__)
def test_nothing_is_read_by_the_host_before_the_one_look(network, monkeypatch):
    """On the meta device, whose tensors have no values to read: a number asked of one, or a size that depends on
    one, raises."""
    model = networks.build(network)
    table = networks.table_for(model)
    plan = Explainer(model, table)._plan(per_image(5, table.defaults, MIXED))
    engine = PrunedEngine(private_view(model).to("meta"), table, together=True)
    compiled = engine._compiled
    compiled.confirmed[torch.Size((3, 18, 18))] = 5
    only_staged = OnlyStaged()
    monkeypatch.setattr(engine_module, "staged", only_staged.staged)
    monkeypatch.setattr(batched, "staged", only_staged.staged)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    images = networks.batch(5, 18).to("meta")
    with torch.no_grad(), only_staged:
        found, marks = engine._queued(compiled, images, torch.tensor(TARGETS), plan)
    assert found.gradients.shape == images.shape
    assert marks.shape == (6,)
    with pytest.raises(NotImplementedError, match="meta"):
        marks.tolist()
