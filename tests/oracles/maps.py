"""Attributions with nothing clever: a float64 copy of the model, one image at a time, one autograd call a gradient.

The rule is applied by replacing every convolution of the copy with one whose output passes through an
autograd function that runs the loop oracle. The copy's in-place operations are kept: autograd handles them.
"""

import contextlib
import copy
import fnmatch
import math
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tests.oracles import rule, selection
from tests.oracles.tolerance import array

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Options:
    """One image's options; the names of `Explainer.explain`. `quantile` may be a mapping layer glob -> number."""

    target: int | None = None
    method: str = "gradient"
    quantile: float | dict | None = 0.1
    alpha: float | None = None
    gamma: float = math.inf
    conserve: str = "independent"
    selection: str = "class"
    layers: tuple[str, ...] = ("*",)
    seed: str = "logit"
    rule: bool = True
    steps: int = 25
    noise: float = 0.15
    samples: int = 25
    noise_seed: int = 0
    normality_filter: bool = False


@dataclass
class Answer:
    """What the oracle found for one image: attribution (3, h, w) and how many layers the rule left unchanged."""

    logits: np.ndarray
    target: int
    attribution: np.ndarray
    identity_layers: int  # of the pass with the most
    layers_used: int


class Ruled(torch.autograd.Function):
    """Identity forward; backward runs the loop oracle on the one image's output gradient."""

    @staticmethod
    def forward(ctx, z, selected, options, calls):
        ctx.selected, ctx.options, ctx.calls = selected, options, calls
        return z.clone()

    @staticmethod
    def backward(ctx, grad):
        gamma, conserve = ctx.options.gamma, ctx.options.conserve
        ctx.calls.append(rule.image_factors(grad[0], ctx.selected, gamma, conserve) is None)
        scaled = rule.scale_image(grad[0], ctx.selected, gamma, conserve)
        return torch.from_numpy(scaled)[None], None, None, None


class RuledConvolution(nn.Module):
    """A convolution whose output gradient obeys the rule for one image."""

    def __init__(self, convolution, rows, target, options, quantile):
        super().__init__()
        self.convolution = convolution
        self.rows, self.target, self.options, self.quantile = rows, target, options, quantile
        self.ran = False
        self.calls = []  # of each backward call: did the gradient pass unchanged?

    def __getattr__(self, name):  # models may read .weight, .stride, ... of their convolutions
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("convolution"), name)

    def forward(self, images):
        self.ran = True
        z = self.convolution(images)
        selected = choose(self.rows, z[0].detach(), self.target, self.options, self.quantile)
        return Ruled.apply(z, selected, self.options, self.calls)


def choose(rows, z, target, options, quantile):
    """Selected channels of one image in one layer; `rows` is the table's LayerTable, z (channels, *spatial)."""
    normality = rows.normality_p if options.normality_filter else None
    if options.selection == "instance":
        return selection.by_instance(
            selection.gap_feature(z),
            rows.mean,
            rows.std,
            quantile=quantile,
            alpha=options.alpha,
            normality=normality,
        )
    row = rows.row_of[target]
    return selection.by_class(
        rows.log_p[row], rows.rank[row], quantile=quantile, alpha=options.alpha, normality=normality
    )


@dataclass
class Rows:
    """One layer's table, as float64 arrays, and which row holds which class."""

    log_p: np.ndarray
    rank: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    normality_p: np.ndarray | None
    row_of: dict


def layer_quantile(quantile, name):
    """The layer's quantile; in a mapping the first matching glob says it."""
    if not isinstance(quantile, dict):
        return quantile
    for pattern, value in quantile.items():
        if fnmatch.fnmatchcase(name, pattern):
            return value
    raise KeyError(name)


def ruled_copy(model, table, target, options):
    """(float64 copy of the model with the rule in every chosen convolution, the ruled convolutions)."""
    ruled = copy.deepcopy(model).double().eval()
    for parameter in ruled.parameters():
        parameter.requires_grad_(False)
    if not options.rule:
        return ruled, []
    replacements = {}
    for name, module in ruled.named_modules():
        chosen = any(fnmatch.fnmatchcase(name, pattern) for pattern in options.layers)
        if not isinstance(module, CONVOLUTIONS) or not chosen or name not in table.layers:
            continue
        quantile = None if options.alpha is not None else layer_quantile(options.quantile, name)
        replacements[id(module)] = RuledConvolution(module, rows_of(table, name), target, options, quantile)
    for parent in list(ruled.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in replacements:
                parent._modules[child_name] = replacements[id(child)]
    return ruled, list(replacements.values())


def rows_of(table, name):
    """The table's rows of one layer."""
    layer = table.layers[name]
    normality = None if layer.normality_p is None else array(layer.normality_p)
    row_of = {int(a_class): row for row, a_class in enumerate(table.classes)}
    return Rows(array(layer.log_p), array(layer.rank), array(layer.mean), array(layer.std), normality, row_of)


class GuidedRelu(torch.autograd.Function):
    """min(max(x, 0), top) that passes back only positive gradients, and only where 0 < x < top."""

    @staticmethod
    def forward(ctx, values, top):
        ctx.save_for_backward(values)
        ctx.top = top
        return torch.where(values > 0, values, torch.zeros_like(values)).minimum(torch.tensor(top, dtype=values.dtype))

    @staticmethod
    def backward(ctx, grad):
        (values,) = ctx.saved_tensors
        passes = (values > 0) & (values < ctx.top) & (grad > 0)
        return torch.where(passes, grad, torch.zeros_like(grad)), None


def guided(values, inplace=False, top=math.inf):
    """A guided ReLU; in place as autograd understands it."""
    if not inplace:
        return GuidedRelu.apply(values, top)
    return values.copy_(GuidedRelu.apply(values.clone(), top))


@contextlib.contextmanager
def guided_relus():
    """Every rectified linear unit, module or functional, becomes guided; the originals return on exit."""
    clamp, hardtanh = torch.Tensor.clamp, F.hardtanh

    def guided_(values):
        return guided(values, inplace=True)

    def guided_6(values, inplace=False):
        return guided(values, inplace, top=6.0)

    def guided_clamp(values, min=None, max=None):
        return guided(values) if min == 0 and max is None else clamp(values, min, max)

    def guided_hardtanh(values, min_val=-1.0, max_val=1.0, inplace=False):
        return guided(values, inplace, top=max_val) if min_val == 0 else hardtanh(values, min_val, max_val, inplace)

    with contextlib.ExitStack() as patches:
        for owner in (F, torch, torch.Tensor):
            patches.enter_context(mock.patch.object(owner, "relu", guided))
            if owner is not F:
                patches.enter_context(mock.patch.object(owner, "clamp", guided_clamp))
            patches.enter_context(mock.patch.object(owner, "relu_", guided_))
        patches.enter_context(mock.patch.object(F, "relu6", guided_6))
        patches.enter_context(mock.patch.object(F, "hardtanh", guided_hardtanh))
        yield


def seed_of(logits, target, seed):
    """The scalar that is differentiated: logits (1, classes)."""
    if seed == "logit":
        return logits[0, target]
    if seed == "probability_weighted_logit":
        return torch.softmax(logits, 1)[0, target] * logits[0, target]
    raise ValueError(seed)


def weighed(grad, values):
    """The gradient (1, channels, h, w) at `values`, each position times (evidence / mean evidence) squared."""
    _, channels, height, width = grad.shape
    evidence = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            total = sum(float(grad[0, k, y, x]) * float(values[0, k, y, x]) for k in range(channels))
            evidence[y, x] = max(0.0, total)
    if not np.isfinite(evidence).all() or not evidence.any():
        return grad
    return grad * torch.from_numpy((evidence / evidence.mean()) ** 2)


@contextlib.contextmanager
def places_read():
    """What is pooled or flattened, in order: the last with several positions is what the places are lost of."""
    read = []

    def noting(function):
        def call(values, *args, **kwargs):
            read.append(values)
            return function(values, *args, **kwargs)

        return call

    with contextlib.ExitStack() as patches:
        pooling = ((F, "adaptive_avg_pool2d"), (torch, "flatten"), (torch.Tensor, "flatten"), (torch.Tensor, "mean"))
        for owner, name in pooling:
            patches.enter_context(mock.patch.object(owner, name, noting(getattr(owner, name))))
        yield read


def back_to(leaf, logits, read, target, seed):
    """The seed's gradient at the image; in two halves where it is weighed in between."""
    if seed != "evidence":
        return torch.autograd.grad(seed_of(logits, target, seed), leaf)[0]
    place = [values for values in read if values.dim() == 4 and values.shape[2] * values.shape[3] > 1][-1]
    (there,) = torch.autograd.grad(logits[0, target], place, retain_graph=True)
    return torch.autograd.grad(place, leaf, weighed(there, place.detach()))[0]


def gradient(model, table, image, target, options):
    """d seed / d image, (3, h, w) float64, and how many layers passed it unchanged in that pass."""
    ruled, convolutions = ruled_copy(model, table, target, options)
    leaf = image.detach().double()[None].clone().requires_grad_(True)
    guide = guided_relus() if options.method == "guided_backprop" else contextlib.nullcontext()
    with torch.enable_grad(), guide:
        with places_read() as read:
            logits = ruled(leaf + 0.0)  # not a leaf inside the model: its first layer may work in place
        found = back_to(leaf, logits, read, target, options.seed)
    ran = [convolution for convolution in convolutions if convolution.ran]  # auxiliary heads do not, in eval mode
    return found[0], sum(all(convolution.calls) for convolution in ran), len(ran)


def grad_cam(model, image, target, options):
    """(3, height, width): the last map's channels, each times the mean of its gradient, where the sum is positive."""
    leaf = image[None].clone().requires_grad_(True)
    with torch.enable_grad(), places_read() as read:
        logits = copy.deepcopy(model).double().eval()(leaf + 0.0)
    place = [values for values in read if values.dim() == 4 and values.shape[2] * values.shape[3] > 1][-1]
    (there,) = torch.autograd.grad(seed_of(logits, target, options.seed), place)
    values, (_, channels, height, width) = place[0].detach().numpy(), place.shape
    cam = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            total = sum(float(there[0, k].sum()) / (height * width) * values[k, y, x] for k in range(channels))
            cam[y, x] = max(0.0, total)
    return np.stack([enlarged(cam, *image.shape[1:])] * 3)


def enlarged(cam, height, width):
    """Bilinear: between the four nearest places, each value in the middle of its own, the outermost ones beyond it."""
    found = np.zeros((height, width))
    rows, columns = cam.shape
    for y in range(height):
        for x in range(width):
            down = min(max((y + 0.5) * rows / height - 0.5, 0.0), rows - 1.0)
            right = min(max((x + 0.5) * columns / width - 0.5, 0.0), columns - 1.0)
            i, j = int(down), int(right)
            below, beside = min(i + 1, rows - 1), min(j + 1, columns - 1)
            upper = cam[i, j] * (1 - right + j) + cam[i, beside] * (right - j)
            lower = cam[below, j] * (1 - right + j) + cam[below, beside] * (right - j)
            found[y, x] = upper * (1 - down + i) + lower * (down - i)
    return found


def points(image, options):
    """[(point, weight), ...] whose gradients the method averages."""
    if options.method == "integrated_gradients":
        nodes, weights = np.polynomial.legendre.leggauss(options.steps)
        return [(image * (node + 1) / 2, weight / 2) for node, weight in zip(nodes, weights, strict=True)]
    if options.method == "smoothgrad":
        generator = torch.Generator().manual_seed(options.noise_seed)
        sd = options.noise * (float(image.max()) - float(image.min()))
        draws = [torch.randn(image.shape, generator=generator, dtype=torch.float32) for _ in range(options.samples)]
        return [(image + sd * draw.double(), 1 / options.samples) for draw in draws]
    return [(image, 1.0)]


def explain(model, table, image, options):
    """One image's `Answer`: image (3, h, w)."""
    image = image.detach().double()
    with torch.no_grad():
        logits = copy.deepcopy(model).double().eval()(image[None].clone())[0]
    target = int(logits.argmax()) if options.target in (None, -1) else int(options.target)
    if options.method == "grad_cam":
        return Answer(logits.numpy(), target, grad_cam(model, image, target, options), 0, 0)
    total, identity, used = torch.zeros_like(image), [], 0
    for point, weight in points(image, options):
        found, unchanged, used = gradient(model, table, point, target, options)
        total = total + weight * found
        identity.append(unchanged)
    if options.method in ("input_x_gradient", "integrated_gradients"):
        total = total * image
    return Answer(logits.numpy(), target, total.numpy(), max(identity), used)


def explain_batch(model, table, images, options):
    """`explain` for each image; `options` a list as long as the batch. (attributions (B, 3, h, w), answers)."""
    answers = [explain(model, table, image, option) for image, option in zip(images, options, strict=True)]
    return np.stack([answer.attribution for answer in answers]), answers
