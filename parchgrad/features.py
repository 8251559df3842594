"""GAP features of a network's convolutions: one number an image and channel (method.md, Words)."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from parchgrad.errors import OptionError, UnsupportedModelError
from parchgrad.layers import convolutions
from parchgrad.runtimes.view import gap_features, private_view


class GapNetwork:
    """A model that answers with the GAP features of its convolutions.

    `layers` are the convolutions to look at, all of which must run in prediction. `point` is where: at the
    `convolution`'s own output, or as near after the `activation` as each layer comes (`points_reached`). `points` are
    those that must be reached, layer by layer; without them, those of the first images.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[str],
        device: torch.device | None,
        point: str = "convolution",
        points: Mapping[str, str] | None = None,
    ) -> None:
        self._module = private_view(module, device)
        self._device = device
        self._dtype = next(p for p in self._module.parameters() if p.is_floating_point()).dtype
        self._layers = tuple(layers)
        self._found: dict[str, Tensor] = {}
        self._following = _Following() if point == "activation" else None
        self._points = None if points is None else dict(points)
        for name in self._layers:
            self._module.get_submodule(name).register_forward_hook(self._hook(name))

    @property
    def points(self) -> dict[str, str]:
        """Layer -> the point it reaches, known from the first images on; empty at the convolution's own output."""
        return dict(self._points or {})

    def features(self, images: Tensor) -> Tensor:
        """GAP features `(B, N)` of normalised `images` `(B, 3, h, w)`, layers side by side, on the CPU.

        Raises UnsupportedModelError for a layer that did not run, or reached another point than before.
        """
        self._found.clear()
        with torch.inference_mode(), self._following or nullcontext():
            self._module(images.to(self._device, self._dtype))
        for name in self._layers:
            if name not in self._found:
                raise UnsupportedModelError(f"Layer '{name}' took no part in the model's forward pass.")
        if self._following is not None:
            self._take_reached(self._following)
        gap = torch.cat([self._found[name] for name in self._layers], dim=1).cpu()
        self._found.clear()
        return gap

    def _hook(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            _require_first(name, self._found)
            self._found[name] = _gap_in_cache(output) if output.device.type == "cpu" else gap_features(output)
            if self._following is not None:
                self._following.follow(name, output, self._found[name])

        return hook

    def _take_reached(self, following: _Following) -> None:
        reached = {name: following.reached(name) for name in self._layers}
        points = {name: value.point for name, value in reached.items()}
        expected = points if self._points is None else self._points
        for name, point in points.items():
            if point != expected.get(name):
                raise UnsupportedModelError(
                    f"Layer '{name}' was followed to its {point} for these images, before to its {expected.get(name)}; "
                    "its features do not add up."
                )
        self._points = points
        self._found.update({name: value.feature for name, value in reached.items()})


# Numbers that stay in a core's cache together.
_IN_CACHE = 1 << 18


def _gap_in_cache(output: Tensor) -> Tensor:
    """`gap_features` a few images at a time: on a processor, fresh memory for a whole batch's ReLU is what costs."""
    gap = output.new_empty(output.shape[:2])
    together = max(1, _IN_CACHE // output[0].numel())
    scratch = torch.empty_like(output[:together])
    for start in range(0, len(output), together):
        images = output[start : start + together]
        positive = torch.clamp(images, min=0, out=scratch[: len(images)])
        torch.mean(positive.flatten(2), 2, out=gap[start : start + together])
    return gap


def running_layers(module: nn.Module, image: Tensor) -> tuple[str, ...]:
    """The convolutions that run in prediction, in registration order, found by one pass of `image` `(1, 3, h, w)`.

    Others serve training only, such as auxiliary heads. Raises UnsupportedModelError for one that runs twice: its
    feature would be ambiguous.
    """
    view = private_view(module)
    seen: dict[str, Tensor] = {}
    names = tuple(convolutions(module))

    def hook(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def note(module: nn.Module, args: object, output: Tensor) -> None:
            _require_first(name, seen)
            seen[name] = output

        return note

    for name in names:
        view.get_submodule(name).register_forward_hook(hook(name))
    weights = next(p for p in view.parameters() if p.is_floating_point())
    with torch.inference_mode():
        view(image.to(weights.device, weights.dtype))
    return tuple(name for name in names if name in seen)


def points_reached(module: nn.Module, layers: Sequence[str], image: Tensor) -> dict[str, str]:
    """Where the feature of each layer is taken under the statistics point `activation`, by one pass of `image`.

    - `activation`: mean of what the network's own elementwise activation makes of the output, normalised or not.
    - `normalisation`: no activation alone follows, as before a residual sum: mean of ReLU of the normalised output.
    - `convolution`: neither: mean of ReLU of the convolution's own output.

    Raises OptionError where every layer is a `convolution`, and UnsupportedModelError as `GapNetwork`.
    """
    network = GapNetwork(module, layers, None, "activation")
    # Two images: in a batch of one, a reshape of images into channels cannot be told from one that keeps both.
    network.features(torch.cat([image, image]))
    if set(network.points.values()) <= {"convolution"}:
        raise OptionError(
            "statistics_point", "activation", "'convolution', as no layer leads to an activation or normalisation alone"
        )
    return network.points


def _require_first(name: str, seen: dict[str, Tensor]) -> None:
    if name in seen:
        raise UnsupportedModelError(
            f"Layer '{name}' runs twice in one forward pass; its GAP feature would be ambiguous."
        )


# What is followed, by the names of ATen's operators; the same with an underscore works in place.

_NORMALISATIONS = frozenset(
    {"batch_norm", "_batch_norm_impl_index", "native_batch_norm", "_native_batch_norm_legit"}
    | {"_native_batch_norm_legit_no_training", "_batch_norm_no_update", "cudnn_batch_norm", "miopen_batch_norm"}
    | {"group_norm", "native_group_norm", "instance_norm", "layer_norm", "native_layer_norm"}
    | {"rms_norm", "_fused_rms_norm"}
)
_ACTIVATIONS = frozenset(
    {"relu", "relu6", "hardtanh", "leaky_relu", "prelu", "_prelu_kernel", "rrelu", "elu", "celu", "selu", "threshold"}
    | {"silu", "hardswish", "mish", "gelu", "softplus", "sigmoid", "hardsigmoid", "log_sigmoid", "tanh", "erf"}
    | {"clamp", "clamp_min", "clamp_max", "clip", "hardshrink", "softshrink"}
)
# Of one value alone and numbers, these may be parts of an activation written by hand, such as z * sigmoid(z).
_ARITHMETIC = frozenset(
    {"add", "sub", "rsub", "mul", "div", "neg", "pow", "square", "subtract", "multiply", "divide", "true_divide"}
)
_WEIGHTED = frozenset({"prelu", "_prelu_kernel"})  # take weights beside the value

# Change nothing in prediction, or the type or the memory only.
_DROPOUTS = frozenset({"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout"})
_SAME = frozenset({"contiguous", "clone", "to", "_to_copy", "type_as", "alias", "detach", "lift_fresh", *_DROPOUTS})
# The numbers in the same order under another shape.
_RESHAPES = frozenset(
    {"view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "view_as", "reshape_as"}
    | {"squeeze", "unsqueeze"}
)
_PERMUTATIONS = frozenset(
    {"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "mT", "mH", "adjoint"}
)  # fmt: skip


@dataclass(eq=False)
class _Value:
    """A tensor that depends on one layer's output alone, and what became of it."""

    layer: str
    tensor: Callable[[], Tensor | None]  # a weak reference, so that following holds no memory
    batch: int  # axis of the images
    channel: int  # axis of the channels
    point: str
    feature: Tensor  # (B, C)
    base: _Value | None = None  # for what is elementwise: the value it is made of
    activated: bool = True  # whether an activation is in it, or none is needed: a feature may be taken here
    leads_to: list[_Value] = field(default_factory=list)
    leaves: bool = False  # whether something else reads it or writes into it


class _Following(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows each convolution's output through normalisation to its activation.

    Below Python, it sees modules, functions, exported programs and scripts alike, and what writes where.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values: dict[str, list[_Value]] = {}  # by layer, in order of computation
        self._by_id: dict[int, _Value] = {}
        self._by_storage: dict[int, list[_Value]] = {}

    def __enter__(self) -> _Following:
        for known in (self._values, self._by_id, self._by_storage):
            known.clear()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def follow(self, name: str, output: Tensor, feature: Tensor) -> None:
        """Begin with the `output` `(B, C, *spatial)` of layer `name`."""
        self._add(_Value(name, weakref.ref(output), 0, 1, "convolution", feature), output)

    def reached(self, name: str) -> _Value:
        """The last value which everything made of the layer's output is made of."""
        values = self._values[name]
        gates = [value for value in values[1:] if value.activated and not _leaves(values[0], without=value)]
        return [values[0], *gates][-1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        followed = [value for tensor in _tensors((args, kwargs)) if (value := self._value(tensor))]
        result = func(*args, **kwargs)
        self._note_writes(func, args, kwargs)
        if followed:
            self._note(_operator(func), followed, args, kwargs, result)
        return result

    def _note(
        self, operator: str, followed: list[_Value], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        if not isinstance(first, Tensor) and not operator.endswith("_"):
            return  # a size, or a check
        made = None
        if operator and isinstance(first, Tensor) and args and isinstance(args[0], Tensor):
            name = operator.removesuffix("_") if first is args[0] else operator
            if name in _SAME and first is args[0] and not _drops(name, args, kwargs):
                return
            value = self._value(args[0])
            if name in _ACTIVATIONS or name in _ARITHMETIC:
                made = self._elementwise(name, args, kwargs, first)
            elif value is not None and value.base is None and len(followed) == 1:
                made = _step(name, value, args, kwargs, first)
        if made is None:
            for value in followed:
                value.leaves = True
            return
        for value in followed:
            if first is args[0] and value.tensor() is first:
                value.tensor = _gone  # it is written over
            value.leads_to.append(made)
        self._add(made, first)

    def _elementwise(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> _Value | None:
        """What an elementwise operation on values made of one value alone, and numbers, gives."""
        values = [self._value(tensor) for tensor in _tensors((args[:1] if name in _WEIGHTED else args, kwargs))
                  if tensor.dim()]  # fmt: skip
        known = [value for value in values if value is not None]
        bases = {id(value.base or value) for value in known}
        if len(known) != len(values) or len(bases) != 1:
            return None
        base = known[0].base or known[0]
        if any(isinstance(arg, Tensor) and arg.dim() and arg.shape != result.shape for arg in args) and (
            name not in _WEIGHTED
        ):
            return None
        activated = name in _ACTIVATIONS or any(value.base and value.activated for value in known)
        feature = _means(_images_first(result, base.batch, base.channel)) if activated else base.feature
        return _Value(
            base.layer, weakref.ref(result), base.batch, base.channel, "activation", feature, base, activated
        )  # fmt: skip

    def _note_writes(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Where an operation writes through memory it shares with a value, the value is no longer the layer's alone."""
        schema = getattr(func, "_schema", None)
        if schema is None or not schema.is_mutable:
            return
        for place, argument in enumerate(schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in _tensors(args[place] if place < len(args) else kwargs.get(argument.name)):
                if self._value(tensor) is None:
                    for value in self._by_storage.get(_storage(tensor), ()):
                        value.leaves |= value.tensor() is not None

    def _value(self, tensor: Tensor) -> _Value | None:
        value = self._by_id.get(id(tensor))
        return value if value is not None and value.tensor() is tensor else None

    def _add(self, value: _Value, tensor: Tensor) -> None:
        values = self._values.setdefault(value.layer, [])
        # Of the convolution's own type, whatever the network computes in.
        value.feature = value.feature.to((values or [value])[0].feature.dtype)
        values.append(value)
        self._by_id[id(tensor)] = value
        self._by_storage.setdefault(_storage(tensor), []).append(value)


def _step(name: str, value: _Value, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> _Value | None:
    """What a normalisation, or an operation that moves numbers only, makes of a value; None for any other."""
    if not isinstance(args[0], Tensor) or value.tensor() is not args[0]:
        return None
    batch: int | None = value.batch
    channel: int | None = value.channel
    point, feature = value.point, value.feature
    if name in _NORMALISATIONS and result.shape == args[0].shape:
        point, feature = "normalisation", gap_features(_images_first(result, value.batch, value.channel))
    elif name in _SAME and result.shape == args[0].shape and not _drops(name, args, kwargs):
        pass
    elif name in _RESHAPES and result.numel() == args[0].numel() and result.dtype == args[0].dtype:
        batch, channel = (_axis_after(args[0].shape, axis, result.shape) for axis in (value.batch, value.channel))
    elif name in _PERMUTATIONS:
        batch, channel = (_axis_of(args[0].shape, axis, name, args, kwargs) for axis in (value.batch, value.channel))
    else:
        return None
    if batch is None or channel is None or batch == channel or result is args[0]:
        return None
    return _Value(value.layer, weakref.ref(result), batch, channel, point, feature)


def _leaves(value: _Value, without: _Value) -> bool:
    """Whether something made of `value`, or the network's answer, does not go through `without`."""
    waiting, seen = [value], {id(without)}
    while waiting:
        made = waiting.pop()
        if id(made) in seen:
            continue
        seen.add(id(made))
        if made.leaves or not made.leads_to:
            return True
        waiting += made.leads_to
    return False


def _operator(func: Any) -> str:
    """ATen's name of an operator; empty for any other, and for one that writes into a result that is given."""
    if getattr(func, "namespace", "") != "aten" or func._schema.overload_name.endswith("out"):
        return ""
    return str(func.overloadpacket.__name__)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _drops(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it is a dropout at work: `(input, p, train)`."""
    return name in _DROPOUTS and kwargs.get("train", args[2] if len(args) > 2 else True) is not False


def _axis_after(before: Sequence[int], axis: int, after: Sequence[int]) -> int | None:
    """Where an axis lies once the numbers, in the same order, have another shape; None where it is split or joined."""
    for place, size in enumerate(after):
        if size == before[axis] and math.prod(after[:place]) == math.prod(before[:axis]):
            return place
    return None


def _axis_of(shape: Sequence[int], axis: int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Where an axis lies after a permutation, tried on a shape whose sizes name its axes."""
    named = torch.empty(tuple(range(1, len(shape) + 1)), device="meta")
    permuted = getattr(torch.ops.aten, name)(named, *args[1:], **kwargs)
    return list(permuted.shape).index(axis + 1)


def _images_first(tensor: Tensor, batch: int, channel: int) -> Tensor:
    """`(B, C, n)`, or more axes after C."""
    first = tensor.movedim((batch, channel), (0, 1))
    return first if first.dim() > 2 else first[..., None]


def _means(images: Tensor) -> Tensor:
    return images.flatten(2).mean(dim=2)


def _storage(tensor: Tensor) -> int:
    # Where it lies, not which object it is: memory shared with another library has several.
    return tensor.untyped_storage().data_ptr()


def _gone() -> None:
    return None
