"""The pruned explanation graph of every torchvision family, of real weights and of the bundled model, in ONNX Runtime.

Against the dense PyTorch engine in the same float32. Both round; where a rounding falls on the other side of a kink,
or of equal maxima, a path through the network is another one: of a family's images the median is judged strictly.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms import functional as transforms

from parchgrad.explainer import Explainer
from parchgrad.graph.explanation import explanation_graph
from parchgrad.graph.prediction import trace_prediction
from parchgrad.models import load_model
from parchgrad.tables import SelectionTable, load_table
from tests.oracles.tolerance import relative_l2
from tests.parchgrad import test_families
from tests.parchgrad.graphs import INFINITY, Session

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"

# The smallest member of each (MobileNetV2 is below, with real weights), at a size where its last maps have more
# than one position where that is quick.
FAMILIES = {
    "alexnet": 96,
    "vgg11_bn": 64,
    "resnet18": 64,
    "squeezenet1_1": 64,
    "densenet121": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "shufflenet_v2_x0_5": 64,
    "mnasnet0_5": 64,
    "convnext_tiny": 64,
}
# Its gates' maps have one position, where the selected channels' sum may nearly cancel: the rule then multiplies
# rounding, in any implementation (PyTorch's float32 is as far from its own float64).
ILL_CONDITIONED = {"regnet_y_400mf": 0.1}
TARGETS, QUANTILE, GAMMA = [1, -1, 3], [0.1, 0.3, 0.5], [INFINITY, INFINITY, 2.0]


def network(name):
    """In float32. AlexNet and VGG pool to the size they have here: pooling to more positions has no rule."""
    model = test_families.network(name).float()
    if name in ("alexnet", "vgg11_bn"):
        generator = torch.Generator().manual_seed(3)
        positions = model.avgpool.output_size[0] ** 2
        first = model.classifier[0]
        model.avgpool = nn.AdaptiveAvgPool2d(2)
        model.classifier[0] = nn.Linear(first.in_features // positions * 4, first.out_features)
        nn.init.normal_(model.classifier[0].weight, 0.0, 0.05, generator=generator)
    return model


def differences(found, expected):
    """Of each image's map, by relative L2; everything else must agree."""
    assert found["target"].tolist() == expected.targets.tolist()
    assert found["covered"].all()
    assert relative_l2(found["logits"], expected.logits) <= 1e-4
    maps = zip(found["attributions"], found["saliency"], expected.attributions, expected.saliency(), strict=True)
    return [max(relative_l2(a, b), relative_l2(s, t)) for a, s, b, t in maps]


@pytest.mark.parametrize(("name", "size"), FAMILIES.items(), ids=FAMILIES.keys())
def test_family_is_as_dense(name, size):
    model = network(name)
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2))
    running = test_families.running_layers(model, images[:1])
    idle = [n for n, module in model.named_modules() if isinstance(module, nn.Conv2d) and n not in running]
    table = SelectionTable.random(model, test_families.CLASSES, 0, idle_layers=idle)
    prediction = trace_prediction(model, (size, size), False)
    assert sorted(prediction.layers.values()) == sorted(running)
    expected = Explainer(model, table, backward="dense").explain(images, TARGETS, quantile=QUANTILE, gamma=GAMMA)
    found = Session(explanation_graph(prediction, table))(images.numpy(), TARGETS, QUANTILE, GAMMA)
    off = differences(found, expected)
    assert np.median(off) <= ILL_CONDITIONED.get(name, 1e-3), off
    assert found["identity_layers"].tolist() == expected.identity_layers.tolist()
    assert float(expected.attributions.abs().amax((1, 2, 3)).min()) > 0


# --- real weights -------------------------------------------------------------------------------------------------

here = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data: real weights and photographs are not here")


@lru_cache
def photographs(number):
    """Imagenette's validation photographs as networks see them, `(number, 3, 224, 224)`, one of each folder in turn."""
    folders = sorted(folder for folder in (DATA / "imagenette" / "val").iterdir() if folder.is_dir())
    found = []
    for i in range(number):
        path = sorted(folders[i % len(folders)].iterdir())[i // len(folders)]
        with Image.open(path) as picture:
            image = transforms.center_crop(transforms.resize(picture.convert("RGB"), 232), 224)
        pixels = transforms.to_tensor(image)
        found.append(transforms.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return torch.stack(found)


@here
@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v2"])
def test_real_weights_are_as_dense(name):
    model = torchvision.models.get_model(name, weights=None).eval()
    model.load_state_dict(torch.load(DATA / "weights" / f"{name}.pth", weights_only=True))
    table = SelectionTable.random(model, 1000, 0)
    session = Session(explanation_graph(trace_prediction(model, (224, 224), False), table))
    explainer = Explainer(model, table, backward="dense")
    targets, quantile = [-1, 5, 207, -1, 701, -1, 0, 999], [0.1, 0.3, 1.0, 0.05, 0.1, 0.5, 0.1, 0.25]
    gamma = [INFINITY, INFINITY, 2.0, INFINITY, 3.0, 0.0, INFINITY, INFINITY]
    images = photographs(8)
    expected = explainer.explain(images, targets, quantile=quantile, gamma=gamma)
    together = session(images.numpy(), targets, quantile, gamma)
    off = differences(together, expected)
    assert np.median(off) <= 1e-4, off
    assert max(off) <= 1e-2, off
    assert together["identity_layers"].tolist() == expected.identity_layers.tolist()
    for batch in (1, 3):
        found = session(images[:batch].numpy(), targets[:batch], quantile[:batch], gamma[:batch])
        for i in range(batch):
            assert relative_l2(found["attributions"][i], together["attributions"][i]) <= 1e-3


# --- the bundled model --------------------------------------------------------------------------------------------


def test_bundled_scenes_in_their_own_sizes():
    """`resize: native`: one graph, and pictures as large as they come."""
    model = load_model(ROOT / "models" / "scenes")
    table = load_table(ROOT / "selection_tables" / "scenes", model)
    native = model.preprocessing.rule == "native"
    assert native
    session = Session(explanation_graph(trace_prediction(model.module, (96, 96), native), table))
    explainer = Explainer(model, table, backward="dense")
    targets = [0, -1, 1]
    for number, size in enumerate([(48, 64), (65, 51), (96, 96), (63, 63), (97, 70)]):
        images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(number))
        images = nn.functional.avg_pool2d(images, 5, 1, 2) * 3  # more like a picture than noise is
        expected = explainer.explain(images, targets, quantile=QUANTILE, gamma=GAMMA)
        found = session(images.numpy(), targets, QUANTILE, GAMMA)
        off = differences(found, expected)
        assert np.median(off) <= 1e-4, (size, off)
        assert found["identity_layers"].tolist() == expected.identity_layers.tolist()
