"""Every torchvision CNN family, random weights, explained and in float64 equal to the map oracle."""

import warnings

import pytest
import torch
import torchvision
from torch import nn

from parchgrad.explainer import Explainer
from parchgrad.tables import SelectionTable
from tests.oracles import maps
from tests.oracles.maps import Options
from tests.oracles.tolerance import assert_each_close, relative_l2

CLASSES = 4

# The smallest input each allows (AlexNet's and VGG's poolings, Inception's unpadded stem).
FAMILIES = {
    "alexnet": 63,
    "vgg11_bn": 32,
    "resnet18": 33,
    "resnext50_32x4d": 32,
    "squeezenet1_1": 33,
    "densenet121": 32,
    "googlenet": 33,
    "inception_v3": 75,
    "mobilenet_v2": 33,
    "mobilenet_v3_small": 33,
    "efficientnet_b0": 32,
    "regnet_y_400mf": 33,
    "shufflenet_v2_x0_5": 33,
    "mnasnet0_5": 33,
    "convnext_tiny": 33,
}

NO_RELU = ("efficientnet_b0", "convnext_tiny")  # SiLU and GELU

# At these sizes the last maps have one position, where the selected channels' sum may nearly cancel (M of 1e-6 of
# M + N): the rule then multiplies rounding by a thousand, in any implementation. By relative L2, else 1e-3.
ILL_CONDITIONED = {"densenet121": 2.0, "efficientnet_b0": 0.1, "regnet_y_400mf": 0.01}


def network(name):
    """The family's network as torchvision makes it, with BatchNorm that is not the identity, in float64."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # googlenet and inception warn of their slow initialisation
        model = torchvision.models.get_model(name, weights=None, num_classes=CLASSES)
    if name in ("alexnet", "vgg11_bn"):  # their fully connected layers hold a gigabyte and no convolution
        wide = next(module for module in model.classifier if isinstance(module, nn.Linear)).in_features
        model.classifier = nn.Sequential(
            nn.Linear(wide, 32), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(32, CLASSES)
        )
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0.0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
        if isinstance(module, torchvision.models.convnext.CNBlock):
            # Its 1e-6 squared is the rule's threshold for "exact": which side of it would be a matter of rounding.
            nn.init.constant_(module.layer_scale, 0.5)
        if isinstance(module, nn.Conv2d):  # torchvision's own start lets the signal of the deep ones die away
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, 0.0, (2.0 / fan_in) ** 0.5, generator=generator)
    return model.double().eval()


def running_layers(model, image):
    """The convolutions that run in eval mode; auxiliary heads do not."""
    seen, handles = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(lambda *_, name=name: seen.append(name)))
    with torch.no_grad():
        model(image)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(("name", "size"), FAMILIES.items(), ids=FAMILIES.keys())
def test_family_equals_the_oracle(name, size):
    model = network(name)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    running = running_layers(model, images)
    auxiliary = [n for n, module in model.named_modules() if isinstance(module, nn.Conv2d) and n not in running]
    assert bool(auxiliary) is (name in ("googlenet", "inception_v3"))
    table = SelectionTable.random(model, CLASSES, 0, idle_layers=auxiliary)
    first = Options(target=1, quantile=0.3)
    method = "input_x_gradient" if name in NO_RELU else "guided_backprop"
    second = Options(target=2, quantile=0.3, gamma=2.0, conserve="exact", method=method)
    found = Explainer(model, table).explain(
        images,
        [1, 2],
        quantile=0.3,
        gamma=[first.gamma, 2.0],
        conserve=["independent", "exact"],
        method=["gradient", method],
    )
    expected, answers = maps.explain_batch(model, table, images, [first, second])
    assert_each_close(found.attributions, expected, 1e-8)
    assert_each_close(found.logits, [answer.logits for answer in answers], 1e-8)
    assert found.identity_layers.tolist() == [answer.identity_layers for answer in answers]
    assert found.layers_used.tolist() == [len(running)] * 2, "every convolution that runs, and no other"
    assert float(found.attributions.abs().amax((1, 2, 3)).min()) > 0
    narrow = Explainer(model.float(), table).explain(images[:1].float(), 1, quantile=0.3)
    assert relative_l2(narrow.attributions[0], expected[0]) < ILL_CONDITIONED.get(name, 1e-3)
    plain = Explainer(model.double(), table).explain(images, [1, 2], rule=False).attributions
    assert all(relative_l2(one, other) > 0.01 for one, other in zip(found.attributions, plain, strict=True))
