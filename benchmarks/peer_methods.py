"""What `benchmarks.peers` compares: every way to a prediction and to a map, each as a call on one batch.

A row's call does the whole of it, a forward pass included, and returns what it found: logits `(B, K)` for a
prediction, otherwise an attribution `(B, 3, h, w)` or a map `(B, h, w)`.
"""

from __future__ import annotations

import copy
import itertools
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.published import prepared, published_maps
from parchgrad import Explainer, SelectionTable
from parchgrad.models import build_network

Call = Callable[[list[int]], Tensor]  # of the targets, one an image

PACKAGES = {"torch": "torch", "torchvision": "torchvision", "captum": "captum.attr", "grad-cam": "pytorch_grad_cam",
            "zennit": "zennit.attribution"}  # fmt: skip

SCENES = "scenes.network:scene_net"
MODELS = ("resnet18", "resnet50", "vgg16_bn", "squeezenet1_1", "mobilenet_v2", "efficientnet_b0")
QUANTILES = (0.05, 0.1, 0.2, 0.5)
IMAGES_PER_PASS = 8  # of captum's integrated gradients: without a bound all steps of all images are one batch


@dataclass(frozen=True)
class Case:
    """One network and one batch: images `(B, 3, h, w)`, targets of different classes."""

    network: nn.Module
    table: SelectionTable
    images: Tensor
    classes: int
    cam_layer: str  # whose output Grad-CAM draws: the last with positions
    targets: list[int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", [37 * image % self.classes for image in range(len(self.images))])


def case_of(model: str, batch: int, classes: int | None = None) -> Case:
    """`model` at its own size with weights and table drawn at random: neither changes what a call costs."""
    size = 128 if model == SCENES else 224
    classes = classes or (10 if model == SCENES else 1000)
    torch.manual_seed(0)
    network = build_network(model, classes).eval().requires_grad_(False)
    calibrate(network, torch.randn(2, 3, size, size))
    table = SelectionTable.random(network, classes, seed=0)
    cam_layer = "layer4" if model.startswith("resnet") else "features"
    return Case(network, table, torch.randn(batch, 3, size, size), classes, cam_layer)


def calibrate(network: nn.Module, images: Tensor) -> None:
    """Give BatchNorm the statistics of these images, as training would.

    Without them signals and gradients of a deep network of random weights leave the range of ordinary numbers, and
    a processor is many times slower with denormal ones.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum


KINDS = ("prediction", "peer", "gradient", "ours")


@dataclass(frozen=True)
class Row:
    """One line of the benchmark."""

    name: str
    kind: str  # one of KINDS
    predictions: float  # about how many predictions its call is worth: to foresee what a run takes
    build: Callable[[Case], Call]  # raises ImportError where the peer is not installed


def eager(case: Case) -> Call:
    @torch.inference_mode()
    def call(targets: list[int]) -> Tensor:
        return case.network(case.images)  # type: ignore[no-any-return]

    return call


def our_prediction(case: Case) -> Call:
    explainer = Explainer(case.network, case.table)
    return lambda targets: explainer.predict(case.images)


def folded_network(case: Case) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    return fuse(case.network).to(memory_format=torch.channels_last)  # a copy: batch normalisation is in its weights


def folded(case: Case) -> Call:
    network = folded_network(case)

    @torch.inference_mode()
    def call(targets: list[int]) -> Tensor:
        return network(case.images.to(memory_format=torch.channels_last))  # type: ignore[no-any-return]

    return call


def has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name)


def compiled(case: Case) -> Call:
    if not has_compiler():
        raise ImportError("no C++ compiler")
    import torch._inductor.config as inductor

    inductor.compile_threads = 1
    network = torch.compile(folded_network(case), dynamic=False)

    @torch.inference_mode()
    def call(targets: list[int]) -> Tensor:
        return network(case.images.to(memory_format=torch.channels_last))  # type: ignore[no-any-return]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch imports to compile deprecates itself
        call(case.targets)
    return call


def captum_saliency(case: Case) -> Call:
    from captum.attr import Saliency

    method = Saliency(case.network)
    return lambda targets: method.attribute(leaf(case), torch.tensor(targets))


def captum_integrated(case: Case) -> Call:
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(case.network)
    return lambda targets: method.attribute(
        leaf(case), target=torch.tensor(targets), n_steps=25, internal_batch_size=max(IMAGES_PER_PASS, len(targets))
    )


def captum_guided(case: Case) -> Call:
    from captum.attr import GuidedBackprop

    method = GuidedBackprop(shared_copy(case.network))  # it hangs hooks on the network

    def call(targets: list[int]) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it hangs them
            return method.attribute(leaf(case), torch.tensor(targets))  # type: ignore[no-any-return]

    return call


def grad_cam(case: Case) -> Call:
    """As its README shows it: parameters as a network is loaded, so their gradients are computed too."""
    return cam_of(case, shared_copy(case.network, parameters_require_grad=True))


def grad_cam_frozen(case: Case) -> Call:
    """The least it can do: nothing needs a gradient but the layer that is drawn."""
    network = shared_copy(case.network)
    network.get_submodule(case.cam_layer).register_forward_hook(lambda _, __, output: output.requires_grad_())
    return cam_of(case, network)


def cam_of(case: Case, network: nn.Module) -> Call:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    method = GradCAM(network, [network.get_submodule(case.cam_layer)])

    def call(targets: list[int]) -> Tensor:
        return torch.from_numpy(method(case.images, [ClassifierOutputTarget(target) for target in targets]))

    return call


def zennit_gradient(case: Case) -> Call:
    from zennit.attribution import Gradient

    method = Gradient(case.network)

    def call(targets: list[int]) -> Tensor:
        _, attribution = method(leaf(case), torch.eye(case.classes)[targets])
        return attribution  # type: ignore[no-any-return]

    return call


def published(case: Case) -> Call:
    network = prepared(case.network, case.table)
    return lambda targets: published_maps(network, case.images, targets, 0.1)


def autograd(case: Case) -> Call:
    def call(targets: list[int]) -> Tensor:
        images = leaf(case)
        logits = case.network(images)
        return torch.autograd.grad(logits.gather(1, torch.tensor(targets)[:, None]).sum(), images)[0]

    return call


def our_gradient(case: Case) -> Call:
    explainer = Explainer(case.network, case.table)
    return lambda targets: explainer.explain(case.images, targets, rule=False).attributions


def ours(backward: str, quantile: float) -> Callable[[Case], Call]:
    def build(case: Case) -> Call:
        explainer = Explainer(case.network, case.table, backward=backward)
        return lambda targets: explainer.explain(case.images, targets, quantile=quantile).attributions

    return build


def ours_unseen(case: Case) -> Call:
    """Each call explains classes that none has before, so that nothing kept by class can serve it."""
    explainer = Explainer(case.network, case.table, backward="pruned")
    classes = itertools.cycle(range(case.classes))

    def call(targets: list[int]) -> Tensor:
        unseen = list(itertools.islice(classes, len(targets)))
        return explainer.explain(case.images, unseen, quantile=0.1).attributions

    return call


def leaf(case: Case) -> Tensor:
    return case.images.clone().requires_grad_()


def shared_copy(network: nn.Module, parameters_require_grad: bool = False) -> nn.Module:
    """The network's modules once more, to be hooked; the weights are shared."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=parameters_require_grad) for p in network.parameters()}
    shared |= {id(b): b for b in network.buffers()}  # type: ignore[misc]
    return copy.deepcopy(network, shared)


EAGER = "network, eager"
GRADIENT = "autograd gradient"
INTEGRATED = "captum IntegratedGradients(25)"
PUBLISHED = "published procedure, q = 0.1"
DENSE = "ours, dense, q = 0.1"


def pruned_name(quantile: float) -> str:
    return f"ours, pruned, q = {quantile:g}"


PREDICTIONS = (
    Row(EAGER, "prediction", 1, eager),
    Row("Explainer.predict", "prediction", 1, our_prediction),
    Row("folded, channels_last", "prediction", 1, folded),
    Row("folded, channels_last, compiled", "prediction", 1, compiled),
)
PEERS = (
    Row("captum Saliency", "peer", 2.5, captum_saliency),
    Row(INTEGRATED, "peer", 65, captum_integrated),
    Row("captum GuidedBackprop", "peer", 2.5, captum_guided),
    Row("pytorch-grad-cam GradCAM", "peer", 3.5, grad_cam),
    Row("pytorch-grad-cam, frozen below", "peer", 1.2, grad_cam_frozen),
    Row("zennit Gradient", "peer", 2.5, zennit_gradient),
    Row(PUBLISHED, "peer", 5, published),
)
OURS = (
    Row(GRADIENT, "gradient", 2.5, autograd),
    Row("ours, plain gradient", "gradient", 2.5, our_gradient),
    Row(DENSE, "ours", 3, ours("dense", 0.1)),
    *(Row(pruned_name(q), "ours", 1.5, ours("pruned", q)) for q in QUANTILES),
    Row("ours, pruned, q = 0.1, new classes", "ours", 1.5, ours_unseen),
)


def all_rows() -> Iterator[Row]:
    yield from (*PREDICTIONS, *PEERS, *OURS)


def row_named(name: str) -> Row:
    return next(row for row in all_rows() if row.name == name)
