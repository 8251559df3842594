"""What a method must beat: maps that know nothing of the model, and maps by other libraries' methods."""

from __future__ import annotations

import hashlib
import math
import operator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, fx, nn

from parchgrad.errors import OptionError, UnsupportedModelError, missing_package
from parchgrad.evaluation.maps import Maps
from parchgrad.explainer import Explainer
from parchgrad.preprocessing import Preprocessing
from parchgrad.runtimes.pruned.tracing import is_size, trace
from parchgrad.runtimes.view import private_view
from parchgrad.tables import network_of

LUMINANCE = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601


def random_maps(seed: int = 0, smooth: float = 0.0) -> Maps:
    """Noise uniform in 0..1, drawn from `seed` and the image's own values: batches and order do not matter.

    `smooth` is the standard deviation of a Gaussian that blurs it, as a share of the shorter side, 0 for none; what
    is blurred is stretched to 0..1 again, or it would be nearly flat. What every measure gives for such a map is the
    level of chance. Values that differ only beyond float32 are the same image. Raises OptionError.
    """
    if not 0 <= smooth < math.inf:
        raise OptionError("smooth", smooth, "a number of at least 0")

    def one(image: Tensor) -> Tensor:
        content = image.detach().cpu().float().contiguous().numpy().tobytes()
        entropy = int.from_bytes(hashlib.sha256(content).digest(), "big")
        height, width = image.shape[1:]
        noise = np.random.default_rng([seed, entropy]).random((height, width))
        if smooth > 0:
            noise = ndimage.gaussian_filter(noise, smooth * min(height, width))
            spread = np.ptp(noise)
            noise = (noise - noise.min()) / spread if spread > 0 else np.ones_like(noise)
        return torch.from_numpy(noise)

    return lambda images, targets: torch.stack([one(image) for image in images]).to(images.device)


def centre_maps(sigma: float = 0.25) -> Maps:
    """A Gaussian in the middle, 1 at its centre: photographers put things there.

    The centre model of the MIT saliency benchmark (Judd, Durand, Torralba 2012), stretched to the image's aspect:
    `sigma` is its standard deviation as a share of each side; a quarter is our choice. Raises OptionError.
    """
    if not 0 < sigma < math.inf:
        raise OptionError("sigma", sigma, "a number above 0")

    def bell(side: int) -> Tensor:
        place = (torch.arange(side, dtype=torch.float64) + 0.5) / side - 0.5
        return torch.exp(-(place**2) / (2 * sigma**2))

    def maps(images: Tensor, targets: list[int]) -> Tensor:
        height, width = images.shape[2:]
        one = torch.outer(bell(height), bell(width)).to(images.device)
        return one.expand(len(images), -1, -1).clone()

    return maps


def edge_maps(preprocessing: Preprocessing) -> Maps:
    """An edge detector: the magnitude of Sobel's gradient of the luminance, of the image as it was before
    `preprocessing` normalised it.

    Adebayo et al. 2018 show that such a map looks like an explanation. The border is continued by its own pixels;
    the luminance is that of ITU-R BT.601, 0..1.
    """
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64)[:, None, None]
    std = torch.tensor(preprocessing.std, dtype=torch.float64)[:, None, None]
    weights = torch.tensor(LUMINANCE, dtype=torch.float64)

    def one(image: Tensor) -> Tensor:
        grey = torch.einsum("c,chw->hw", weights, image.detach().cpu().double() * std + mean).numpy()
        down, across = (ndimage.sobel(grey, axis, mode="nearest") for axis in (0, 1))
        return torch.from_numpy(np.hypot(down, across))

    return lambda images, targets: torch.stack([one(image) for image in images]).to(images.device)


def grad_cam_maps(explainer: Explainer, layer: str) -> Maps:
    """Grad-CAM (Selvaraju et al. 2017) at the output of module `layer`, by the package grad-cam.

    Each map is stretched to 0..1, as captum's is not, so that its smallest value is always 0.
    Raises OptionError for a layer that is not there, does not run, or gives no (B, C, h, w); MissingPackageError
    without the package. float32.
    """
    try:
        from pytorch_grad_cam import GradCAM  # type: ignore[import-untyped]
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise missing_package("Grad-CAM", error) or error from error
    network = private_view(network_of(explainer.model), explainer.device)
    try:
        module = network.get_submodule(layer)
    except AttributeError as error:
        raise OptionError("layer", layer, "the dotted name of a module of the model") from error

    def maps(images: Tensor, targets: list[int]) -> Tensor:
        ran = []

        def start(_: nn.Module, __: object, output: object) -> Tensor:
            if not isinstance(output, Tensor) or output.dim() != 4:
                raise OptionError("layer", layer, "a module whose output is (B, C, h, w)")
            ran.append(output)
            return output.detach().requires_grad_()  # nobody asks for gradients further down

        def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
            return output.clone()  # an in-place activation after it would overwrite what grad-cam has kept

        def check(*_: object) -> None:
            if not ran:
                raise OptionError("layer", layer, "a module that runs in prediction")

        here = images.to(explainer.device, copy=True)
        method = GradCAM(network, [module])
        handles = [
            module.register_forward_hook(start, prepend=True),
            module.register_forward_hook(keep),
            network.register_forward_hook(check),
        ]
        try:
            return torch.from_numpy(method(here, [ClassifierOutputTarget(target) for target in targets]))
        finally:
            for handle in handles:
                handle.remove()
            method.activations_and_grads.release()

    return maps


def lrp_maps(explainer: Explainer, epsilon: float = 1e-6) -> Maps:
    """Layer-wise relevance propagation by zennit: its EpsilonPlus, that is z+ in convolutions, epsilon in linear
    layers (Bach et al. 2015; Montavon et al. 2019), BatchNorm merged into the layer before it.

    Relevance starts as the target's logit, so that evidence for the class is positive whatever the logit's sign. The
    map is the sum over the colours, where it is positive (the "pos,sum" pooling of Arras, Osman, Samek 2022).
    zennit has rules for modules only: sums, means and activations that are calls of functions are made modules first,
    from the network's trace. Raises UnsupportedModelError for a network that cannot be traced or computes something
    there is no rule for, such as a product of two activations; MissingPackageError without zennit.
    """
    try:
        from zennit.attribution import Gradient  # type: ignore[import-untyped]
        from zennit.canonizers import NamedMergeBatchNorm  # type: ignore[import-untyped]
        from zennit.composites import EpsilonPlus  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise missing_package("LRP", error) or error from error
    network, merges = _of_modules(private_view(network_of(explainer.model), explainer.device))
    composite = EpsilonPlus(epsilon=epsilon, canonizers=[NamedMergeBatchNorm(merges)])
    method = Gradient(network, composite)

    def maps(images: Tensor, targets: list[int]) -> Tensor:
        here = images.to(explainer.device, copy=True)
        chosen = torch.tensor(targets, device=here.device)

        def start(logits: Tensor) -> Tensor:
            return logits.detach() * F.one_hot(chosen, logits.shape[1])

        relevance: Tensor = method(here, start)[1]
        return relevance.detach().sum(dim=1).clamp(min=0)

    return maps


# Calls that relevance passes as the gradient does: they move values, or keep or drop each.
_PASSING_FUNCTIONS = {torch.flatten, torch.cat, F.dropout, F.max_pool2d, torch.reshape, operator.getitem, torch._assert}
_PASSING_METHODS = {"flatten", "view", "reshape", "contiguous", "clone"}
_PASSING_MODULES = (nn.Dropout, nn.Dropout2d, nn.Identity, nn.Flatten, nn.MaxPool2d, nn.AdaptiveMaxPool2d)
_SUMS = {operator.add, torch.add, "add"}
_MEANS = {torch.mean, "mean"}
# Calls of functions or methods, and the module that does the same.
_ACTIVATIONS: dict[Any, type[nn.Module]] = {
    torch.relu: nn.ReLU, F.relu: nn.ReLU, "relu": nn.ReLU, F.relu6: nn.ReLU6, F.silu: nn.SiLU, F.gelu: nn.GELU,
    F.hardswish: nn.Hardswish, torch.tanh: nn.Tanh, "tanh": nn.Tanh, torch.sigmoid: nn.Sigmoid, "sigmoid": nn.Sigmoid,
}  # fmt: skip


def _of_modules(view: nn.Module) -> tuple[nn.Module, list[tuple[tuple[str], str]]]:
    """`view` with everything that needs a rule a module, and which layer's name each BatchNorm merges into."""
    from zennit.layer import Sum  # type: ignore[import-untyped]

    graph = trace(view).graph
    modules = dict(view.named_modules())
    merges = []
    seen: set[str] = set()

    def put(node: fx.Node, module: nn.Module, value: Any) -> None:
        """Call `module` on `value` in the place of `node`, whose users read that instead."""
        name = f"rule_{len(view._modules)}"
        view.add_module(name, module)
        with graph.inserting_before(node):
            new = graph.call_module(name, (value,))
        node.replace_all_uses_with(new)
        graph.erase_node(node)

    for node in list(graph.nodes):
        target, args = node.target, node.args
        if node.op in ("placeholder", "output") or is_size(node):
            continue
        if node.op == "call_module":
            merged = _check_module(node, str(target), modules, seen)
            if merged is not None:
                merges.append(((merged,), str(target)))
        elif target in _SUMS and not node.kwargs and all(_is_value(arg) for arg in args):
            with graph.inserting_before(node):
                both = graph.call_function(torch.stack, (list(args), -1))
            put(node, Sum(-1), both)
        elif target in _ACTIVATIONS and len(args) == 1 and set(node.kwargs) <= {"inplace"}:
            put(node, _ACTIVATIONS[target](), args[0])
        elif target is F.adaptive_avg_pool2d and len(args) == 2:
            put(node, nn.AdaptiveAvgPool2d(args[1]), args[0])
        elif target is F.avg_pool2d and not any(_is_value(arg) for arg in (*args[1:], *node.kwargs.values())):
            put(node, nn.AvgPool2d(*args[1:], **node.kwargs), args[0])
        elif target in _MEANS and (kept := _mean_over_positions(node)) is not None:
            pool = nn.AdaptiveAvgPool2d(1)
            put(node, pool if kept else nn.Sequential(pool, nn.Flatten()), args[0])
        elif target not in (_PASSING_METHODS if node.op == "call_method" else _PASSING_FUNCTIONS):
            shown = target if isinstance(target, str) else getattr(target, "__name__", repr(target))
            raise UnsupportedModelError(f"LRP has no rule for '{shown}', which the network calls as '{node.name}'.")
    return fx.GraphModule(view, graph), merges


def _check_module(node: fx.Node, name: str, modules: dict[str, nn.Module], seen: set[str]) -> str | None:
    """The name of the layer that a BatchNorm merges into, None for another module; raises UnsupportedModelError."""
    from torch.nn.utils.parametrize import is_parametrized
    from zennit.types import Activation, AvgPool, BatchNorm, Linear  # type: ignore[import-untyped]

    module = modules[name]
    what = f"'{name}' ({type(module).__name__})"
    if isinstance(module, _PASSING_MODULES) or (
        isinstance(module, Activation) and not isinstance(module, nn.MultiheadAttention)
    ):
        return None
    if not isinstance(module, (Linear, AvgPool, BatchNorm)):
        raise UnsupportedModelError(f"LRP has no rule for module {what}.")
    if name in seen:
        raise UnsupportedModelError(f"LRP needs every layer to run once; module {what} runs again.")
    seen.add(name)
    if is_parametrized(module):
        raise UnsupportedModelError(f"LRP needs weights that are parameters; those of module {what} are computed.")
    if not isinstance(module, BatchNorm):
        return None
    before = node.args[0]
    if isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1:
        mergeable = module.affine and module.running_mean is not None
        if mergeable and isinstance(modules.get(str(before.target)), Linear):
            return str(before.target)
    raise UnsupportedModelError(
        f"LRP merges a BatchNorm into the layer before it, whose only reader it is; module {what} has no such layer."
    )


def _is_value(argument: object) -> bool:
    return isinstance(argument, fx.Node) and not is_size(argument)


def _mean_over_positions(node: fx.Node) -> bool | None:
    """Whether a mean over the positions of (B, C, h, w) keeps their axes; None where it is over something else."""
    given = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | dict(node.kwargs)
    dim = given.pop("dim", None)
    kept = given.pop("keepdim", False)
    over = sorted(d for d in dim if isinstance(d, int)) if isinstance(dim, (tuple, list)) else None
    return bool(kept) if over in ([2, 3], [-2, -1]) and not given else None
