"""The dense engine, CPU or CUDA: autograd over a private view of the model, whose hooks apply the rule.

It takes every model and option, and is what the pruned engine is measured and tested against. The caller's model is
never touched: only the view is in eval mode, frozen and hooked. Each call keeps its state in its own `_Pass`, found
by the hooks through a thread-local slot, so threads share one view without a lock.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from parchgrad.defaults import CONSERVE
from parchgrad.errors import UnsupportedModelError
from parchgrad.rule import Conserve, apply_factors, channel_factors
from parchgrad.runtimes import AtLastMap, Gradients, Plan, Tell, Witness
from parchgrad.runtimes.evidence_seed import NO_LAST_MAP, extent, last_map, refusal, weighed
from parchgrad.runtimes.pruned.tracing import trace
from parchgrad.runtimes.view import gap_features, private_view
from parchgrad.selection import best_ranked, by_instance
from parchgrad.tables import NORMALITY_LEVEL, LayerTable, SelectionTable

# Sizes of images whose last map is remembered; they are found out anew beyond it.
_MOST_SIZES = 1024


@dataclass(frozen=True)
class Found:
    """The call that gives the last map, or why there is none. `kept`: it follows from the network's structure, and
    not from its weights as they are now."""

    place: fx.Node | str
    kept: bool


class DenseEngine:
    """`module` and `table` on `device` (default: where the module's weights are)."""

    def __init__(self, module: nn.Module, table: SelectionTable, device: str | torch.device | None = None) -> None:
        table.check_layers(module)
        self._source = module
        self._module = private_view(module, device)
        weights = next(p for p in self._module.parameters() if p.is_floating_point())
        self._device, self._dtype = weights.device, weights.dtype
        self._table = table
        self._layers = {name: _on_device(layer, self._device) for name, layer in table.layers.items()}
        self._rank = table.rank.to(self._device)
        self._current = threading.local()
        self._looking = threading.Lock()
        self._calls: fx.Graph | str | None = None  # once the last map was asked for; else why there are none
        self._last_maps: dict[tuple[int, ...], fx.Node | str] = {}  # by size of the images; else why there is none
        for name in table.layers:
            self._module.get_submodule(name).register_forward_hook(self._hook(name))

    @property
    def layer_names(self) -> tuple[str, ...]:
        return self._table.layer_names

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def predict(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return checked_logits(self._module(images.detach().to(self._device).clone()), images, self._table)

    def gradients(self, images: Tensor, targets: Tensor, plan: Plan, witness: Witness | None = None) -> Gradients:
        """See Runtime. `witness` is told of every call of a layer of the table, the rule acting there or not."""
        # A caller may be inside no_grad or inference_mode; autograd is ours here.
        with torch.inference_mode(False), torch.enable_grad():
            leaf = images.detach().to(self._device)
            leaf = (leaf.clone() if leaf.is_inference() else leaf).requires_grad_()
            run = _Pass(self._table, self._layers, self._rank, plan, self._device, witness)
            self._current.run = run
            try:
                # A copy goes in: a network that works in place on its input must not meet a leaf.
                logits = checked_logits(self._forward(leaf.clone(), plan), images, self._table)
            finally:
                self._current.run = None
            run.require_all_layers_seen()
            targets = targets.to(self._device)
            targets = torch.where(targets < 0, logits.detach().argmax(dim=1), targets)
            run.targets = targets
            if bool(plan.guided.any()):
                _guide(logits, plan.guided.to(self._device))
            score = seed_score(logits, targets, plan.probability_weighted.to(self._device))
            (gradients,) = torch.autograd.grad(score.sum(), leaf)
        return Gradients(logits.detach(), targets, gradients, run.identity_layers())

    def at_last_map(self, images: Tensor, targets: Tensor, probability_weighted: Tensor) -> AtLastMap:
        """See Runtime. Autograd sees the way from the last map on alone."""
        with torch.inference_mode(False), torch.enable_grad():
            images = images.detach().to(self._device).clone()  # the network may work in place on its input
            place = self._last_map(images.shape[1:], "method")
            kept: list[Tensor] = []

            def cut(node: fx.Node, value: Any) -> Any:
                if node is not place:
                    return value
                kept.append(value.detach().requires_grad_())
                return kept[0].clone()  # what follows may work in place

            logits = checked_logits(_Calls(self._module, place.graph, cut)(images), images, self._table)
            targets = targets.to(self._device)
            targets = torch.where(targets < 0, logits.detach().argmax(dim=1), targets)
            score = seed_score(logits, targets, probability_weighted.to(self._device))
            (gradients,) = torch.autograd.grad(score.sum(), kept[0])
        return AtLastMap(logits.detach(), targets, kept[0].detach(), gradients)

    def require_last_map(self, size: Sequence[int], option: str = "seed", *, look: bool = True) -> None:
        """Raises OptionError where images of this size, (3, h, w), have no last map, which this of OF_LAST_MAP needs.

        Without `look` only where that is known already: nothing is computed, and nobody waited for.
        """
        if look:
            self._last_map(size, option)
        elif isinstance(known := self._last_maps.get(tuple(size)), str):
            raise refusal(known, option)

    def _forward(self, images: Tensor, plan: Plan) -> object:
        if not bool(plan.evidence.any()):
            return self._module(images)
        which = plan.evidence.to(self._device)

        def weigh(values: Tensor) -> Tensor:
            # A node of its own: a hook at `values` would come after the rule's, where a convolution gives them.
            handed_on = values.clone()
            kept = values.detach()
            handed_on.register_hook(lambda grad: weighed(grad, kept, which))  # type: ignore[no-untyped-call]
            return handed_on

        place = self._last_map(images.shape[1:])
        return _Calls(self._module, place.graph, lambda node, value: weigh(value) if node is place else value)(images)

    def _last_map(self, size: Sequence[int], option: str = "seed") -> fx.Node:
        """The call that gives the network's last map, which `option` needs. Raises OptionError."""
        size = tuple(size)
        place = self._last_maps.get(size)
        if place is None:
            with self._looking:
                place = self._last_maps.get(size)
                if place is None:
                    found = self._found_last_map(size)
                    place = found.place
                    if found.kept:
                        if len(self._last_maps) >= _MOST_SIZES:
                            self._last_maps.clear()
                        self._last_maps[size] = place
        if isinstance(place, str):
            raise refusal(place, option)
        return place

    def _found_last_map(self, size: tuple[int, ...]) -> Found:
        """The calls of an image of noise are followed, and compared with what the network itself answers."""
        with torch.inference_mode(False), torch.no_grad():
            if self._calls is None:
                try:
                    # Of another view: this one has our hooks, which `trace` would take for the network's.
                    self._calls = trace(private_view(self._source)).graph
                except UnsupportedModelError as error:
                    self._calls = f"where its last map is cannot be told: {error}".rstrip(".")
            if isinstance(self._calls, str):
                return Found(self._calls, kept=True)
            noise = torch.randn((1, *size), generator=torch.Generator().manual_seed(0))
            image = noise.to(self._device, self._dtype)
            extents: dict[fx.Node, tuple[int, ...] | None] = {}

            def note(node: fx.Node, value: object) -> object:
                extents[node] = extent(value)
                return value

            expected = self._module(image.clone())
            try:
                found = _Calls(self._module, self._calls, note)(image.clone())
            except Exception as error:
                if is_memory(error):
                    raise
                return Found("the network as it was traced fails where the network itself does not", kept=False)
            if not isinstance(expected, Tensor) or not isinstance(found, Tensor) or not _alike(found, expected):
                return Found("the network as it was traced answers something else than the network itself", kept=False)
            finite = bool(expected.isfinite().all())  # else little was compared
        *calls, output = [node for node in self._calls.nodes if node.op != "placeholder"]
        images = next(node for node in self._calls.nodes if node.op == "placeholder")
        answer = output.args[0]
        place = last_map([(node, node.all_input_nodes) for node in calls], extents, images, answer)
        return Found(NO_LAST_MAP, kept=True) if place is None else Found(place, kept=finite)

    def _hook(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            run: _Pass | None = getattr(self._current, "run", None)
            if run is not None:
                run.attach(name, output)

        return hook


class _Calls(fx.Interpreter):
    """The traced calls, over a network's own modules and their hooks; `seen` gives what goes on of each value."""

    def __init__(self, module: nn.Module, calls: fx.Graph, seen: Callable[[fx.Node, Any], Any]) -> None:
        super().__init__(module, graph=calls)
        self._seen = seen

    def __call__(self, images: Tensor) -> object:
        return self.run(images, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        return self._seen(n, super().run_node(n))


def _alike(found: Tensor, expected: Tensor) -> bool:
    """Whether the same calls gave both; an engine may add them up in another order. What is not finite in one has to
    be so in both."""
    if found.shape != expected.shape:
        return False
    known = expected.isfinite()
    largest = float(expected.where(known, 0.0).abs().max())
    within = 4 * math.sqrt(torch.finfo(expected.dtype).eps) * largest
    return bool(((found - expected).abs() <= within).where(known, ~found.isfinite()).all())


class _Pass:
    """The state of one forward and backward pass: which channels each image selects in each layer."""

    def __init__(
        self,
        table: SelectionTable,
        layers: dict[str, LayerTable],
        rank: Tensor,
        plan: Plan,
        device: torch.device,
        witness: Witness | None,
    ) -> None:
        self._table, self._layers, self._rank, self._device = table, layers, rank, device
        self._plan, self._witness = plan, witness
        self._on_device = {
            "gamma": plan.gamma.to(device),
            "log_alpha": plan.log_alpha.to(device),
            "instance": plan.instance.to(device),
            "normality_filter": plan.normality_filter.to(device),
            "active": plan.active.to(device),
            "count": plan.count.to(device),
        }
        self._conserve = Conserve.of([CONSERVE[i] for i in plan.conserve.tolist()], len(plan), device)
        self._index = {name: i for i, name in enumerate(layers)}
        self._active_layers = {n for n, used in zip(layers, plan.active.any(dim=0).tolist(), strict=True) if used}
        self._any_instance = bool(plan.instance.any())
        self._any_alpha = not bool(plan.log_alpha.isnan().all())
        self._any_filter = bool(plan.normality_filter.any())
        self._seen: set[str] = set()
        self._identity: dict[str, Tensor] = {}
        self._rows: Tensor | None = None
        self._by_quantile: list[Tensor] | None = None
        self.targets: Tensor | None = None  # set between forward and backward

    def attach(self, name: str, output: Tensor) -> None:
        """Called as layer `name` returns: have its output's gradient scaled on the way back."""
        active, witness = name in self._active_layers, self._witness
        if not (active or witness) or not output.requires_grad:
            return
        tell = None if witness is None else witness.ran(name, output.detach())
        if not active:
            output.register_hook(lambda grad: tell(grad, None, None) if tell else None)  # type: ignore[no-untyped-call]
            return
        self._seen.add(name)
        # Before an in-place activation overwrites the output.
        gap = gap_features(output.detach()) if self._any_instance else None
        output.register_hook(lambda grad: self._scale(name, grad, gap, tell))  # type: ignore[no-untyped-call]

    def require_all_layers_seen(self) -> None:
        missing = [name for name in self._layers if name in self._active_layers - self._seen]
        if missing:
            raise took_no_part(missing, self._table)

    def identity_layers(self) -> Tensor:
        """`(B,)`: active layers whose gradient passed unchanged, in every call of a layer called twice."""
        total = torch.zeros(len(self._plan), dtype=torch.long, device=self._device)
        for name in self._active_layers:
            active = self._on_device["active"][:, self._index[name]]
            total += active & self._identity[name] if name in self._identity else active
        return total

    def _scale(self, name: str, grad: Tensor, gap: Tensor | None, tell: Tell | None) -> Tensor:
        selected = self._select(name, gap)
        factors = channel_factors(grad, selected, self._on_device["gamma"], self._conserve)
        self._identity[name] = self._identity.get(name, factors.identity) & factors.identity
        if tell is not None:
            tell(grad, selected, factors)
        return apply_factors(grad, selected, factors)

    def _select(self, name: str, gap: Tensor | None) -> Tensor:
        layer, i, on = self._layers[name], self._index[name], self._on_device
        count, log_alpha = on["count"][:, i], on["log_alpha"]
        selected = self._selected_by_quantile()[i]
        if self._any_alpha:
            rows = self._target_rows()
            by_alpha = layer.log_p[rows.clamp(min=0)] <= log_alpha[:, None]
            asked = on["active"][:, i] & (rows >= 0)
            selected = torch.where(torch.isnan(log_alpha)[:, None], selected, by_alpha & asked[:, None])
        if gap is not None:
            instance = by_instance(gap, layer.mean, layer.std, count, log_alpha) & on["active"][:, i, None]
            selected = torch.where(on["instance"][:, None], instance, selected)
        if self._any_filter and layer.normality_p is not None:
            selected = selected & ((layer.normality_p < NORMALITY_LEVEL) | ~on["normality_filter"][:, None])
        return selected

    def _selected_by_quantile(self) -> list[Tensor]:
        """The mask `(B, C)` of each layer. Where the rule does not act no channel is selected: an empty side
        passes unchanged."""
        if self._by_quantile is None:
            rows = self._target_rows()
            count = self._on_device["count"] * (self._on_device["active"] & (rows >= 0)[:, None])
            widths = [layer.channels for layer in self._layers.values()]
            self._by_quantile = best_ranked(self._rank, rows.clamp(min=0), count, widths)
        return self._by_quantile

    def _target_rows(self) -> Tensor:
        if self._rows is None:
            assert self.targets is not None
            self._rows = self._table.row_of_class.to(self._device)[self.targets]
        return self._rows


def checked_logits(logits: object, images: Tensor, table: SelectionTable) -> Tensor:
    """What a model returned, if it is logits of the table's classes. Raises UnsupportedModelError."""
    expected = (len(images), len(table.labels))
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or found != expected:
        raise UnsupportedModelError(
            f"The model returned {found}; with the {expected[1]} classes of table '{table.name}' "
            f"expected logits of shape {expected}."
        )
    return logits


def is_memory(error: Exception) -> bool:
    """Whether a machine's memory was the reason, not the network."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def took_no_part(missing: Sequence[str], table: SelectionTable) -> UnsupportedModelError:
    """The error that active layers of the table did not run."""
    return UnsupportedModelError(
        f"Layer '{missing[0]}' of table '{table.name}' took no part in the model's forward pass"
        + (f", nor did {len(missing) - 1} more." if len(missing) > 1 else ".")
    )


def seed_score(logits: Tensor, targets: Tensor, probability_weighted: Tensor) -> Tensor:
    """What is differentiated for each image, `(B,)`: its target's logit, or probability times logit."""
    if not bool(probability_weighted.any()):
        return logits.gather(1, targets[:, None])[:, 0]
    return mixed_score(logits, targets, probability_weighted)


def mixed_score(logits: Tensor, targets: Tensor, probability_weighted: Tensor) -> Tensor:
    """`seed_score`, whichever way `probability_weighted` is."""
    logit = logits.gather(1, targets[:, None])[:, 0]
    probability = logits.softmax(dim=1).gather(1, targets[:, None])[:, 0]
    return torch.where(probability_weighted, probability * logit, logit)


# Autograd nodes of ReLU in all its spellings (modules, functional, in place), and the node's attribute
# that must be 0 for the operation to be one; ReLU6 is a Hardtanh from 0.
_RELU_NODES = {
    "ReluBackward": None,
    "ThresholdBackward": "_saved_threshold",
    "HardtanhBackward": "_saved_min_val",
    "ClampMinBackward": "_saved_min",
    "ClampBackward": "_saved_min",
}


def _is_relu(node: torch.autograd.graph.Node) -> bool:
    bound = _RELU_NODES.get(node.name().rstrip("0123456789"), "")
    return bound is None or (bound != "" and getattr(node, bound) == 0)


def _guide(logits: Tensor, guided: Tensor) -> None:
    """Guided backpropagation: let only positive gradient into each ReLU, for the `guided` images.

    Done on the graph of this very pass, so that functional, reused and in-place ReLUs are all met.
    """

    def positive_only(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        grad = gradients[0]
        rows = guided.reshape(-1, *(1,) * (grad.dim() - 1))
        return (torch.where(rows, grad.clamp(min=0), grad), *gradients[1:])

    found = False
    for node in _graph(logits):
        if "CopySlices" in node.name():
            raise UnsupportedModelError(
                "guided_backprop cannot see which operation the model writes in place into a slice of a tensor."
            )
        if _is_relu(node):
            node.register_prehook(positive_only)
            found = True
    if not found:
        raise UnsupportedModelError("guided_backprop needs a model with ReLU; this one has none.")


def _graph(logits: Tensor) -> Iterator[torch.autograd.graph.Node]:
    seen: set[torch.autograd.graph.Node] = set()
    waiting = [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend(following for following, _ in node.next_functions)


def _on_device(layer: LayerTable, device: torch.device) -> LayerTable:
    tested = None if layer.normality_p is None else layer.normality_p.to(device)
    return LayerTable(
        layer.log_p.to(device), layer.rank.to(device), layer.mean.to(device), layer.std.to(device), tested
    )
