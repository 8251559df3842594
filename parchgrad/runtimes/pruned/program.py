"""A network as a list of steps: predicts, and takes a gradient at the logits back to the images."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.ops import stochastic_depth

from parchgrad.errors import UnsupportedModelError
from parchgrad.runtimes.evidence_seed import extent, last_map, weighed
from parchgrad.runtimes.pruned import steps
from parchgrad.runtimes.pruned.activations import Activation, activation_of
from parchgrad.runtimes.pruned.batched import BatchRule
from parchgrad.runtimes.pruned.choice import LayerRule
from parchgrad.runtimes.pruned.convolution import AtOutput, Convolution
from parchgrad.runtimes.pruned.gradient import Channels, Gradient, channels_of, dense, total
from parchgrad.runtimes.pruned.tracing import Trace, is_size


@dataclass(frozen=True)
class _Line:
    """One step and where its values come from; `last` are the values nobody reads after it."""

    step: Any
    inputs: tuple[int, ...]
    output: int
    last: tuple[int, ...]


@dataclass(frozen=True)
class Weighing:
    """Where the gradient is weighed by its evidence on the way back: at the network's last map."""

    number: int  # of the value
    which: Tensor  # (B,) bool: of which images
    values: Tensor  # (B, C, h, w)

    def of(self, image: int) -> Weighing | None:
        one = slice(image, image + 1)
        return Weighing(self.number, self.which[one], self.values[one]) if bool(self.which[image]) else None

    def weighed(self, grad: Gradient) -> Gradient:
        if not isinstance(grad, Channels):
            return weighed(grad, self.values, self.which)
        found = []
        for i, (numbers, one) in enumerate(zip(grad.numbers, grad.values, strict=True)):
            here = self.values[i : i + 1] if numbers is None else channels_of(self.values, i, numbers)
            found.append(weighed(one, here, self.which[i : i + 1]))
        return Channels(grad.shape, grad.numbers, tuple(found))


@dataclass(frozen=True)
class Record:
    """A prediction, `(B, K)` where the network is sound, and what each line kept for the way back."""

    logits: Any
    kept: list[Any]
    weighing: Weighing | None = None

    def of(self, image: int) -> Record:
        """One image's part of it, where the program goes `by_image`."""
        kept = [steps.of_image(kept, image) for kept in self.kept]
        return Record(self.logits[image : image + 1], kept, None if self.weighing is None else self.weighing.of(image))


class Program:
    """`module`, a private view in eval mode, and its trace; `layers` of the table are where the rule may act.

    Holds copies of the weights as they are now, folded and packed. Raises UnsupportedModelError, with the reason,
    where the rule would act on a convolution that is called more than once.
    """

    def __init__(self, trace: Trace, module: nn.Module, layers: Sequence[str]) -> None:
        self._modules = dict(module.named_modules())
        for name in layers:
            times = trace.convolutions.count(name)
            if times > 1:
                raise UnsupportedModelError(f"Layer '{name}' is called {times} times in one prediction.")
        self.layers = frozenset(layers) & set(trace.convolutions)  # where the rule can act
        self._lines, self._answer = _Compiler(trace.graph, module, self._modules, self.layers).lines()
        self._values = 1 + max((line.output for line in self._lines), default=0)
        self._entry = _entry_of(self._lines, self._answer)  # the line's place

    @property
    def by_image(self) -> bool:
        """Whether a gradient can be taken back for one image of a record alone."""
        return all(line.step.by_image for line in self._lines)

    @property
    def entry(self) -> Convolution | None:
        """The convolution that alone reads the images; None where there is none."""
        return None if self._entry is None else self._lines[self._entry].step

    def row_bytes(self) -> dict[str, int]:
        """The size of the weights that a kept choice holds for each selected channel of each layer."""
        found = {}
        for line in self._lines:
            if isinstance(line.step, Convolution):
                weight = self._modules[line.step.name].get_parameter("weight")
                found[line.step.name] = weight.numel() // len(weight) * weight.element_size()
        return found

    def predict(self, images: Tensor) -> Any:
        """What the network answers to `(B, 3, h, w)`."""
        answer = images if self._answer == 0 else None
        for number, value in self._results(images):
            if number == self._answer:
                answer = value
        return answer

    def widest(self, images: Tensor) -> int:
        """The largest value on the way to the answer, in bytes."""
        results = (value for _, value in self._results(images))
        return max((one.numel() * one.element_size() for one in results if isinstance(one, Tensor)), default=0)

    def last_map(self, images: Tensor) -> int | None:
        """The number of the value at the network's last map, for images of this size; see `evidence.last_map`."""
        extents = {0: extent(images)} | {number: extent(value) for number, value in self._results(images)}
        return last_map([(line.output, line.inputs) for line in self._lines], extents, 0, self._answer)

    def is_whole(self, number: int) -> bool:
        """Whether a value is one of the network's own: it is not where its ReLU comes with the pooling after it."""
        readers = (line.step for line in self._lines if number in line.inputs)
        return not any(isinstance(step, steps.MaxPooling) and step.rectified for step in readers)

    def _results(self, images: Tensor) -> Iterator[tuple[int, Any]]:
        """Each step's number and result, in order; the program itself holds none longer than it is read."""
        values: list[Any] = [None] * self._values
        values[0] = images
        for line in self._lines:
            values[line.output] = line.step.run(*[values[i] for i in line.inputs])
            for i in line.last:
                values[i] = None
            yield line.output, values[line.output]

    def record(
        self,
        images: Tensor,
        outputs: Tensor | None = None,
        weigh_at: int | None = None,
        which: Tensor | None = None,
        first: int = 0,
    ) -> Record:
        """The answer, and what its gradient needs; `outputs` of the entry for these images, where they are known.

        `weigh_at`: the value at which the gradient of the images `which` `(B,)` bool is weighed by its evidence.
        `first`: the value before which nothing is kept, for a gradient that ends there.
        Raises UnsupportedModelError where a call is given tensors in a list or the like, through which no gradient
        would find its way back.
        """
        values: list[Any] = [None] * self._values
        values[0] = images
        kept: list[Any] = []
        weighing = None
        for number, line in enumerate(self._lines):
            given = [values[i] for i in line.inputs]
            if number < first:
                values[line.output] = line.step.run(*given)
                kept.append(None)
            elif outputs is not None and number == self._entry:
                values[line.output], mine = line.step.record_of(outputs, images.shape)
                kept.append(mine)
            elif isinstance(line.step, steps.Part):
                _require(isinstance(given[0], (tuple, list)), given)
                values[line.output] = line.step.run(*given)
                kept.append(None)
            else:
                if isinstance(line.step, steps.Other):
                    _require(all(isinstance(one, Tensor) or not _holds_tensors(one) for one in given), given)
                values[line.output], mine = line.step.record(*given)
                kept.append(mine)
            if line.output == weigh_at and which is not None:
                weighing = Weighing(weigh_at, which, values[weigh_at])
            for i in line.last:
                values[i] = None
        return Record(values[self._answer], kept, weighing)

    def pull(self, record: Record, seed: Tensor, rules: Mapping[str, LayerRule] | Mapping[str, BatchRule]) -> Tensor:
        """The gradient at the images from `seed`, that at the logits; what the record kept is given up on the way."""
        return dense(self._pulled(record, seed, rules, 0)[0])

    def pull_to_entry(self, record: Record, seed: Tensor, rules: Mapping[str, LayerRule]) -> AtOutput:
        """`pull` of one image, up to the entry convolution's output."""
        assert self._entry is not None
        line, kept = self._lines[self._entry], record.kept[self._entry]
        grad = self._pulled(record, seed, rules, self._entry + 1)[line.output]
        one: AtOutput = line.step.at_output(grad, kept, rules.get(line.step.name))
        return one

    def pull_to_last_map(self, record: Record, seed: Tensor) -> Tensor:
        """`pull`, without rules, up to the value at which the record would weigh; it is not weighed."""
        assert record.weighing is not None
        number, grads = record.weighing.number, {self._answer: seed}
        self._pull_lines(grads, record, {}, number, len(self._lines))
        return dense(grads[number])

    def _pulled(
        self, record: Record, seed: Tensor, rules: Mapping[str, LayerRule] | Mapping[str, BatchRule], first: int
    ) -> dict[int, Any]:
        """The gradients that lines from `first` on leave at the values before them."""
        grads: dict[int, Any] = {self._answer: seed}
        last, weighing = len(self._lines), record.weighing
        if weighing is not None:  # every path goes through its value, which line `number - 1` gives
            self._pull_lines(grads, record, rules, weighing.number, last)
            last = weighing.number
            if last in grads:
                grads[last] = weighing.weighed(grads[last])
        self._pull_lines(grads, record, rules, first, last)
        return grads

    def _pull_lines(
        self,
        grads: dict[int, Any],
        record: Record,
        rules: Mapping[str, LayerRule] | Mapping[str, BatchRule],
        first: int,
        last: int,
    ) -> None:
        """Lines `first..last - 1`, backwards: gradients at their results become such at what they were given."""
        for number in range(last - 1, first - 1, -1):
            line, kept = self._lines[number], record.kept[number]
            record.kept[number] = None
            grad = grads.pop(line.output, None)
            if grad is None:
                continue
            step = line.step
            if isinstance(step, steps.Part):
                several = grads.setdefault(line.inputs[0], {})
                several[step.number] = total(several.get(step.number), grad)
                continue
            if isinstance(step, (Convolution, _Ruled)):
                found: Sequence[Gradient | None] = (step.pull(grad, kept, rules.get(step.name)),)
            else:
                found = step.pull(grad, kept)
            for i, one in zip(line.inputs, found, strict=True):
                if one is not None:
                    grads[i] = total(grads.get(i), one)


class _Ruled:
    """A convolution of another kind than `Convolution` computes, under the rule, differentiated by autograd."""

    by_image = False

    def __init__(self, name: str, call: Callable[..., Any]) -> None:
        self.name = name
        self._other = steps.Other(call, [True])

    def run(self, x: Tensor) -> Any:
        return self._other.run(x)

    def record(self, x: Tensor) -> Any:
        return self._other.record(x)

    def pull(self, grad: Gradient, kept: Any, rule: LayerRule | BatchRule | None) -> Gradient | None:
        whole = dense(grad)
        if rule is not None:
            whole = rule.scaled(whole, range(len(whole)), None)
        return self._other.pull(whole, kept)[0]


class _Compiler:
    def __init__(
        self, graph: fx.Graph, module: nn.Module, modules: dict[str, nn.Module], layers: frozenset[str]
    ) -> None:
        self._graph, self._module, self._modules, self._layers = graph, module, modules, layers
        self._number: dict[fx.Node, int] = {}
        self._taken: set[fx.Node] = set()  # nodes that became part of an earlier step
        self._numbers: set[fx.Node] = set()  # nodes whose value is no tensor: sizes, and what is made of them
        self._constants: set[fx.Node] = set()  # nodes that do not depend on the images

    def lines(self) -> tuple[list[_Line], int]:
        found: list[tuple[Any, tuple[int, ...], int]] = []
        answer = -1
        for node in self._graph.nodes:
            if node.op == "placeholder":
                self._number[node] = 0
            elif node.op == "output":
                (result,) = node.args
                if not isinstance(result, fx.Node):
                    raise UnsupportedModelError("The network answers with something else than one tensor of logits.")
                answer = self._number[result]
            elif node in self._taken:
                continue
            else:
                if self._constants.issuperset(node.all_input_nodes):
                    self._constants.add(node)
                step, inputs, last = self._step(node)
                number = len(found) + 1
                found.append((step, tuple(self._number[i] for i in inputs), number))
                for part in (node, last):
                    self._number[part] = number
        return _with_last_reads(found, answer), answer

    def _step(self, node: fx.Node) -> tuple[Any, list[fx.Node], fx.Node]:
        """The step that begins with this node, its inputs, and the last node that is part of it."""
        inputs = list(node.all_input_nodes)
        module = self._modules[str(node.target)] if node.op == "call_module" else None
        only = len(inputs) == 1 and len(node.args) == 1 and not node.kwargs and node.args[0] is inputs[0]
        if type(module) is nn.Conv2d and only and _is_plain(module):
            return self._convolution(node, module)
        if module is not None and str(node.target) in self._layers and only:
            return _Ruled(str(node.target), module), inputs, node
        pooling = self._max_pooling(node)
        if pooling is not None:
            return pooling(rectified=False), inputs, node
        activation = activation_of(node, self._modules)
        if activation is not None:
            return self._activation(node, activation, inputs)
        if module is not None and only:
            simple = _simple(module)
            if simple is not None:
                return simple, inputs, node
        return self._function(node, inputs)

    def _convolution(self, node: fx.Node, module: nn.Conv2d) -> tuple[Any, list[fx.Node], fx.Node]:
        last = node
        norm = self._only_user(node)
        folded = None
        if norm is not None and norm.op == "call_module":
            candidate = self._modules[str(norm.target)]
            if type(candidate) is nn.BatchNorm2d and _has_statistics(candidate):
                folded, last = candidate, norm
        activation, last = self._following_activation(last)
        step = Convolution(str(node.target), module, folded, activation)
        return step, list(node.all_input_nodes), self._take(node, last)

    def _activation(
        self, node: fx.Node, activation: Activation, inputs: list[fx.Node]
    ) -> tuple[Any, list[fx.Node], fx.Node]:
        pooled = self._only_user(node) if activation.is_relu else None
        pooling = None if pooled is None else self._max_pooling(pooled)
        if pooling is not None and pooled is not None:
            return pooling(rectified=True), inputs, self._take(node, pooled)
        return steps.Elementwise(activation), inputs, node

    def _following_activation(self, node: fx.Node) -> tuple[Activation | None, fx.Node]:
        """The activation that alone reads a node, unless it goes with what follows it; and the last node of the two."""
        user = self._only_user(node)
        activation = None if user is None else activation_of(user, self._modules)
        if user is None or activation is None:
            return None, node
        next_user = self._only_user(user)
        if activation.is_relu and next_user is not None and self._max_pooling(next_user) is not None:
            return None, node
        return activation, user

    def _take(self, first: fx.Node, last: fx.Node) -> fx.Node:
        node = first
        while node is not last:
            (node,) = node.users
            self._taken.add(node)
        return last

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        users = list(node.users)
        return users[0] if len(users) == 1 and users[0].all_input_nodes.count(node) == 1 else None

    def _max_pooling(self, node: fx.Node) -> Callable[..., steps.MaxPooling] | None:
        if node.op == "call_module":
            pool = self._modules[str(node.target)]
            if type(pool) is nn.MaxPool2d and not pool.return_indices and len(node.args) == 1 and not node.kwargs:
                geometry = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
                return lambda rectified: steps.MaxPooling(*geometry, rectified=rectified)
        if node.op == "call_function" and node.target in (F.max_pool2d, torch.max_pool2d):
            names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
            given: dict[str, Any] = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
            given |= dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
            if not given.pop("return_indices", False) and len(given) == 6 and len(node.all_input_nodes) == 1:
                of_call = [given[name] for name in names[1:]]
                return lambda rectified: steps.MaxPooling(*of_call, rectified=rectified)
        return None

    def _function(self, node: fx.Node, inputs: list[fx.Node]) -> tuple[Any, list[fx.Node], fx.Node]:
        args, kwargs = node.args, node.kwargs
        if is_size(node) or (inputs and all(i in self._numbers for i in inputs)):
            self._numbers.add(node)
        if not self._numbers.isdisjoint(inputs):
            return self._other(node, inputs), inputs, node
        if node.op == "call_function" and not kwargs and len(args) == 2 and list(args) == inputs:
            if node.target in (operator.add, torch.add):
                activation, last = self._following_activation(node)
                return steps.Addition(activation), inputs, self._take(node, last)
            if node.target in (operator.mul, torch.mul):
                return steps.Product(), inputs, node
        if node.op == "call_function" and node.target in (torch.cat, torch.concat):
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if args and isinstance(args[0], (list, tuple)) and list(args[0]) == inputs and isinstance(dim, int):
                return steps.Concatenation(dim), inputs, node
        if node.target is operator.getitem and len(inputs) == 1 and args[0] is inputs[0] and isinstance(args[1], int):
            return steps.Part(args[1]), inputs, node
        if node.op in ("call_function", "call_method") and args and list(args[:1]) == inputs:
            if node.target in (torch.flatten, "flatten") and _flattens(args[1:], kwargs):
                return steps.Flatten(), inputs, node
            if node.target is F.adaptive_avg_pool2d and len(args) == 2 and not kwargs:
                return _adaptive_pooling(args[1]), inputs, node
            if node.target is F.avg_pool2d:
                names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
                defaults = (None, None, 0, False, True, None)
                given = dict(zip(names, defaults, strict=True)) | dict(zip(names, args[1:], strict=False)) | kwargs
                if set(given) == set(names):
                    geometry: list[Any] = [given[name] for name in names]
                    return steps.average_pooling(*geometry), inputs, node
            if node.target is stochastic_depth and (*args[3:], kwargs.get("training", True))[0] is False:
                return steps.Same(), inputs, node
            if node.target in (torch.mean, "mean") and set(kwargs) <= {"dim", "keepdim"}:
                dims: Any = args[1] if len(args) > 1 else kwargs.get("dim")
                keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
                if dims is not None and not isinstance(dims, int) and list(dims) in ([2, 3], [-2, -1], [3, 2]):
                    return steps.Mean(bool(keepdim)), inputs, node
        return self._other(node, inputs), inputs, node

    def _other(self, node: fx.Node, inputs: list[fx.Node]) -> steps.Other:
        return steps.Other(self._call(node, inputs), [i not in self._constants for i in inputs])

    def _call(self, node: fx.Node, inputs: list[fx.Node]) -> Callable[..., Any]:
        """The node's call as a function of its inputs' values."""
        if node.op == "get_attr":
            owner: Any = self._module
            for name in str(node.target).split("."):
                owner = getattr(owner, name)
            return lambda: owner
        target: Any = node.target
        if node.op == "call_module":
            target = self._modules[str(node.target)]
            if getattr(target, "inplace", False):
                target = copy.copy(target)
                target.inplace = False  # of the copy
        name = str(node.target)
        method = node.op == "call_method"

        def call(*values: Any) -> Any:
            of = dict(zip(inputs, values, strict=True))
            args = fx.map_arg(node.args, of.__getitem__)
            kwargs = fx.map_arg(node.kwargs, of.__getitem__)
            if method:
                return getattr(args[0], name)(*args[1:], **kwargs)
            return target(*args, **kwargs)

        return call


def _simple(module: nn.Module) -> Any:
    """The step of a module that is one by itself, or None."""
    kind = type(module)
    if kind in (nn.Dropout, nn.Dropout2d, nn.Identity):
        return steps.Same()
    if kind is nn.Linear:
        return steps.Linear(module)  # type: ignore[arg-type]
    if kind is nn.BatchNorm2d and _has_statistics(module):
        return steps.BatchNorm(module)  # type: ignore[arg-type]
    if isinstance(module, nn.AdaptiveAvgPool2d) and kind is nn.AdaptiveAvgPool2d:
        return _adaptive_pooling(module.output_size)
    if isinstance(module, nn.AvgPool2d) and kind is nn.AvgPool2d:
        geometry = (module.kernel_size, module.stride, module.padding, module.ceil_mode)
        return steps.average_pooling(*geometry, module.count_include_pad, module.divisor_override)
    if isinstance(module, nn.Flatten) and _flattens((module.start_dim, module.end_dim), {}):
        return steps.Flatten()
    return None


def _flattens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    given = {"start_dim": 0, "end_dim": -1, **dict(zip(("start_dim", "end_dim"), args, strict=False)), **kwargs}
    return bool(given == {"start_dim": 1, "end_dim": -1})


def _adaptive_pooling(size: Any) -> Any:
    if size in (1, (1, 1), [1, 1]):
        return steps.Mean(keepdim=True)
    return steps.adaptive_average_pooling(size)


def _is_plain(module: nn.Conv2d) -> bool:
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _has_statistics(norm: nn.Module) -> bool:
    return getattr(norm, "running_mean", None) is not None and getattr(norm, "running_var", None) is not None


def _with_last_reads(found: list[tuple[Any, tuple[int, ...], int]], answer: int) -> list[_Line]:
    read: set[int] = {answer}
    lines = []
    for step, inputs, output in reversed(found):
        last = tuple(set(inputs) - read)
        read |= set(inputs)
        lines.append(_Line(step, inputs, output, last))
    return lines[::-1]


def _entry_of(lines: Sequence[_Line], answer: int) -> int | None:
    readers = [number for number, line in enumerate(lines) if 0 in line.inputs]
    if len(readers) != 1 or answer == 0 or not isinstance(lines[readers[0]].step, Convolution):
        return None
    return readers[0]


def _require(known: bool, given: Sequence[Any]) -> None:
    if not known:
        kinds = ", ".join(type(one).__name__ for one in given)
        raise UnsupportedModelError(f"A call of the network takes {kinds}, whose gradient is not known.")


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds_tensors(one) for one in value)
    return not isinstance(value, (int, float, complex, str, slice, torch.dtype, torch.device, type(None)))
