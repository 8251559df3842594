"""A network as a graph of calls (torch.fx), in which nothing happens in place; or the reason why it is none."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from parchgrad.errors import UnsupportedModelError
from parchgrad.layers import is_convolution

# torch.fx replaces nn.Module.__call__ for the whole process while it traces; two at once would put back each
# other's replacement.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Trace:
    """A network's calls, from its one input to its logits."""

    graph: fx.Graph
    convolutions: tuple[str, ...]  # those called on something that depends on the images, as often as they are


def trace(module: nn.Module) -> Trace:
    """The calls of `module`, a private view; convolutions are calls of their own, and nothing happens in place.

    Raises UnsupportedModelError, with the reason, for a network whose calls depend on its values, that has hooks, or
    that writes into a tensor which is read through a view later or outlives the call.
    """
    for name, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks:
            raise UnsupportedModelError(f"Module '{name}' has forward hooks, which a traced network would not run.")
        if "forward" in vars(part):
            raise UnsupportedModelError(f"Module '{name}' has a forward of its own, not that of its class.")
    try:
        with _ONE_AT_A_TIME, torch.inference_mode(False), torch.enable_grad():
            graph = _Tracer().trace(module)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModelError(f"The network's calls cannot be traced: {reason}") from error
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1 or str(inputs[0].target).startswith("*"):
        raise UnsupportedModelError("The network takes more than one input.")
    modules = dict(module.named_modules())
    _undo_in_place(graph, modules)
    found = _convolutions(graph, modules)
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output") and node.target is not torch._assert:
            graph.erase_node(node)
    return Trace(graph, found)


def _convolutions(graph: fx.Graph, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    found: list[str] = []
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
            if node.op == "call_module" and is_convolution(modules[str(node.target)]):
                found.append(str(node.target))
    return tuple(found)


class _Tracer(fx.Tracer):
    # Otherwise buffers would be read, and written into, while tracing: they are values of the call, like weights.
    proxy_buffer_attributes = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        # Under no_grad, and in an autograd.Function's forward: its calls would be traced without what they say of
        # the gradient.
        if not torch.is_grad_enabled():
            raise UnsupportedModelError("it computes without a gradient, or by an autograd.Function of its own.")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_convolution(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # Other threads' modules pass through here too while this one traces; theirs have no proxies.
        values = list(args) + list(kwargs.values())
        if not any(isinstance(value, fx.Proxy) for value in _flat(values)):
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


class _Proxy(fx.Proxy):
    """A value that records `a += b` as the write into `a` that it is; fx makes `a = a + b` of it."""

    def _write(self, function: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> Any:
        return self._write(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._write(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._write(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._write(operator.itruediv, other)

    def __ifloordiv__(self, other: Any) -> Any:
        return self._write(operator.ifloordiv, other)

    def __imod__(self, other: Any) -> Any:
        return self._write(operator.imod, other)

    def __ipow__(self, other: Any) -> Any:
        return self._write(operator.ipow, other)


def is_size(node: fx.Node) -> bool:
    """Whether a call asks for a tensor's size or kind, and so gives no tensor."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel", "ndimension")
    return node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device")


def _flat(values: Any) -> list[Any]:
    if isinstance(values, (list, tuple)):
        return [leaf for value in values for leaf in _flat(value)]
    return [values]


_IN_PLACE_FUNCTIONS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    torch.relu_: torch.relu,
    F.relu_: F.relu,
}

# Calls whose result shares no memory with what they were given.
_FRESH_MODULES = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.Linear,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
)
_FRESH_FUNCTIONS = {operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, torch.cat, torch.add}
_FRESH_FUNCTIONS |= {F.relu, torch.relu, F.relu6, F.silu, F.hardswish, torch.sigmoid, torch.tanh, F.gelu, F.hardtanh}
_FRESH_METHODS = {"relu", "add", "mul", "sub", "div", "clamp", "mean", "sum", "sigmoid", "tanh", "clone"}


def _undo_in_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Every write into a tensor becomes a new tensor, which those read who read the old one afterwards.

    Refused where another is read afterwards that may share its memory: a view, or what it is a view of.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    memory: dict[fx.Node, fx.Node] = {}  # the first node in whose memory a node's result may lie
    groups: dict[fx.Node, list[fx.Node]] = {}
    numbers: set[fx.Node] = set()  # results that are no tensors, into which nothing is written
    for node in graph.nodes:
        written = _written(node, modules)
        _make_fresh(node)
        no_tensor = node.all_input_nodes and numbers.issuperset(node.all_input_nodes)
        if is_size(node) or (no_tensor and written is None):
            numbers.add(node)
            memory[node], groups[node] = node, [node]
            continue
        if isinstance(written, fx.Node):
            root = memory[written]
            for user in list(written.users):
                if order[user] > order[node]:  # reads what was written
                    user.replace_input_with(written, node)
            if any(order[user] > order[node] for member in groups[root] for user in member.users if user is not node):
                raise UnsupportedModelError(
                    f"'{node.name}' writes into a tensor that is read through another afterwards."
                )
            if any(member.op == "get_attr" for member in groups[root]):
                raise UnsupportedModelError(f"'{node.name}' writes into a tensor that the network keeps.")
        parents = [] if _is_fresh(node, modules) or written is not None else [memory[p] for p in node.all_input_nodes]
        root = parents[0] if parents else node
        for other in parents[1:]:  # may lie in either: one group from here on
            if other is not root:
                for member in groups.pop(other):
                    memory[member] = root
                    groups[root].append(member)
        memory[node] = root
        groups.setdefault(root, []).append(node)


def _written(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    """What the call writes into, or None. Raises UnsupportedModelError where it has no equal that does not write."""
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    if node.op == "call_module":
        return first if getattr(modules[str(node.target)], "inplace", False) else None
    if node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__"):
        if not hasattr(torch.Tensor, str(node.target)[:-1]):
            raise UnsupportedModelError(f"'{node.name}' calls {node.target}, which writes into its tensor.")
        return first
    if node.op == "call_function":
        if node.target is operator.setitem or "out" in node.kwargs:
            raise UnsupportedModelError(f"'{node.name}' writes into a part of a tensor.")
        if node.target in _IN_PLACE_FUNCTIONS or node.kwargs.get("inplace"):
            return first
        name = getattr(node.target, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            raise UnsupportedModelError(f"'{node.name}' calls {name}, which writes into its tensor.")
    return None


def _make_fresh(node: fx.Node) -> None:
    if node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__"):
        node.target = str(node.target)[:-1]
    elif node.op == "call_function":
        node.target = _IN_PLACE_FUNCTIONS.get(node.target, node.target)
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}


def _is_fresh(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _FRESH_MODULES)
    if node.op == "call_function":
        return node.target in _FRESH_FUNCTIONS
    return node.op == "call_method" and node.target in _FRESH_METHODS
