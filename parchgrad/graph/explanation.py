"""Prediction and explanation as one plain ONNX graph: no autograd, no hooks, no Python when it runs.

(images, targets, quantile, gamma) -> (logits, probabilities, target, saliency, attributions, identity_layers,
covered). The gradient is written by going back through the prediction's own operators (derivatives.py), with the rule
at each convolution (rule.py). `pruned` takes each image by itself, in a Scan, and multiplies only the rows of the
weights that the rule leaves something of; `dense` takes the batch together and all rows, from static shapes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace

import numpy as np
import onnx
from onnx import TensorProto, helper

from parchgrad.defaults import CONSERVE
from parchgrad.errors import OptionError, UnsupportedModelError
from parchgrad.graph.backward import Backward
from parchgrad.graph.builder import Array, Builder
from parchgrad.graph.convolution import Convolution, Own
from parchgrad.graph.derivatives import Gradient, added, pull, whole
from parchgrad.graph.features import FEATURES_KEY, features_of
from parchgrad.graph.folding import fold_batch_norms
from parchgrad.graph.gradients import Even, Planes, Whole
from parchgrad.graph.pooling import Pooled
from parchgrad.graph.prediction import OPSET, Prediction
from parchgrad.graph.rule import Choice, Layer, choose, factors, is_choice, side_sums
from parchgrad.graph.values import Values
from parchgrad.tables import SelectionTable

BACKWARDS = ("pruned", "dense")
# The oldest file format that knows the operators of opset 20; ONNX Runtime and Triton read it.
IR_VERSION = 10


def explanation_graph(
    prediction: Prediction, table: SelectionTable, *, backward: str = "pruned", conserve: str | None = None
) -> onnx.ModelProto:
    """The graph of a prediction and a table; `conserve` defaults to the table's.

    Raises OptionError, and UnsupportedModelError naming operator and layer where one has no rule.
    """
    conserve = conserve or table.defaults.conserve
    if backward not in BACKWARDS:
        raise OptionError("backward", backward, ", ".join(BACKWARDS))
    if conserve not in CONSERVE:
        raise OptionError("conserve", conserve, ", ".join(CONSERVE))
    return _Assembly(prediction, table, conserve).model(backward)


class _Assembly:
    def __init__(self, prediction: Prediction, table: SelectionTable, conserve: str) -> None:
        self._table, self._conserve = table, conserve
        folded = self._folded = fold_batch_norms(prediction.model.graph)
        self._graph = folded.graph
        self._output_of = {node.name: node.output[0] for node in folded.graph.node}
        self._nodes = {layer: node for node, layer in prediction.layers.items() if layer in table.layers}
        self._values = Values(self._graph)
        images = self._graph.input[0]
        self._kind = images.type.tensor_type.elem_type
        self._dtype = np.dtype(helper.tensor_dtype_to_np_dtype(self._kind))
        self._layers = self._layers_of(prediction, folded.scales)
        self._sides = self._values.shape("images")[2:]

    def _layers_of(self, prediction: Prediction, scales: Mapping[str, Array]) -> dict[str, Layer]:
        """Convolution node -> its layer, in the table's order of layers."""
        nodes = {layer: node for node, layer in prediction.layers.items()}
        missing = [name for name in self._table.layer_names if name not in nodes]
        if missing:
            raise UnsupportedModelError(
                f"Layer '{missing[0]}' of table '{self._table.name}' takes no part in the exported prediction."
            )
        found, offset = {}, 0
        for number, (name, layer) in enumerate(self._table.layers.items()):
            found[nodes[name]] = Layer(number, offset, layer.channels, scales.get(nodes[name]))
            offset += layer.channels
        return found

    def model(self, backward: str) -> onnx.ModelProto:
        outer = Builder(self._dtype, "explain/")
        target = _chosen_target(outer)
        logits = "logits"
        rows = self._table.row_of_class.numpy().astype(np.int64)
        row = outer.op("Gather", outer.constant(rows), target)
        ranks = outer.constant(self._table.rank.numpy(), "ranks")
        choice = choose(
            outer, list(self._layers.values()), ranks, outer.op("Max", row, outer.integer(0)),
            "quantile", "gamma",
        )  # fmt: skip
        acting = _count_true(outer, outer.op("Greater", choice.count, outer.integer(0)))
        has_row = outer.op("Not", outer.op("Less", row, outer.integer(0)))
        covered = outer.op("Or", has_row, outer.op("Equal", acting, outer.integer(0)))
        classes = self._values.shape(logits)[1]
        if not isinstance(classes, int):
            raise UnsupportedModelError("The number of classes is not known before the graph runs.")
        seed = outer.op("OneHot", target, outer.integer(classes), outer.floats(0.0, 1.0))
        write = self._scanned if backward == "pruned" else self._together
        grad, identity = write(outer, seed, choice)
        attributions = self._where_there_is_one(outer, grad, covered)
        saliency = outer.op("ReduceMean", outer.op("Abs", attributions), outer.ints(1), keepdims=0)
        results = {
            "probabilities": outer.op("Softmax", logits, axis=-1),
            "target": target,
            "saliency": saliency,
            "attributions": attributions,
            # Without a row nothing is selected, and every layer passes the gradient unchanged.
            "identity_layers": outer.op("Where", covered, identity, acting),
            "covered": covered,
        }
        for name, value in results.items():
            outer.nodes.append(helper.make_node("Identity", [value], [name], name=name))
        whole = self._whole(outer, classes)
        helper.set_model_props(whole, {FEATURES_KEY: json.dumps(self._features(ranks))})
        return whole

    def _features(self, ranks: str) -> dict[str, object]:
        return features_of(
            self._values,
            self._table,
            {name: self._output_of[node] for name, node in self._nodes.items()},
            {name: self._folded.scales[node] for name, node in self._nodes.items() if node in self._folded.scales},
            {name: self._folded.shifts[node] for name, node in self._nodes.items() if node in self._folded.shifts},
            ranks,
        )

    def _where_there_is_one(self, b: Builder, grad: str, covered: str) -> str:
        """NaN for a target without a row, for options outside their bounds, and for an image without finite logits."""
        kept = b.op("Reshape", b.op("And", covered, is_choice(b, "quantile", "gamma")), b.ints(-1, 1, 1, 1))
        nothing = b.op("Where", kept, b.number(0.0), b.number(float("nan")))
        infinite = b.op("ReduceSum", b.op("Mul", "logits", b.number(0.0)), b.ints(1), keepdims=0)
        # Added, not chosen: to choose takes many times as long.
        return b.op("Add", grad, b.op("Add", nothing, b.op("Reshape", infinite, b.ints(-1, 1, 1, 1))))

    def _whole(self, outer: Builder, classes: int) -> onnx.ModelProto:
        sides = [
            side if isinstance(side, int) else name for side, name in zip(self._sides, ("height", "width"), strict=True)
        ]
        kind = self._kind
        inputs: list[tuple[str, int, list[str | int | None]]] = [
            ("images", kind, ["batch", 3, *sides]),
            ("targets", TensorProto.INT64, ["batch"]),
            ("quantile", TensorProto.FLOAT, ["batch", "layers"]),
            ("gamma", TensorProto.FLOAT, ["batch"]),
        ]
        outputs: list[tuple[str, int, list[str | int | None]]] = [
            ("logits", kind, ["batch", classes]),
            ("probabilities", kind, ["batch", classes]),
            ("target", TensorProto.INT64, ["batch"]),
            ("saliency", kind, ["batch", *sides]),
            ("attributions", kind, ["batch", 3, *sides]),
            ("identity_layers", TensorProto.INT64, ["batch"]),
            ("covered", TensorProto.BOOL, ["batch"]),
        ]
        for node in self._graph.node:
            del node.metadata_props[:]
        graph = helper.make_graph(
            [*self._graph.node, *outer.nodes],
            "prediction_and_explanation",
            [helper.make_tensor_value_info(*one) for one in inputs],
            [helper.make_tensor_value_info(*one) for one in outputs],
            [*self._graph.initializer, *outer.initializers],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)

    # --- the backward pass --------------------------------------------------------------------------------

    def _together(self, outer: Builder, seed: str, choice: Choice) -> tuple[str, str]:
        w = Backward(outer, self._values, lambda name: name, single=False, once=outer)
        sides = self._sides_of_layers(outer, choice)
        fine: dict[int, str] = {}

        def convolved(conv: Convolution, layer: Layer, grad: Gradient) -> Gradient:
            grad = whole(w, grad, conv.node.output[0])
            sums = side_sums(outer, sides[layer.number], grad)
            found = factors(outer, layer, sums, choice, self._positions(conv), self._conserve)
            fine[layer.number] = found.fine
            selected = outer.op(
                "Slice", choice.selected, outer.ints(layer.offset), outer.ints(layer.end), outer.ints(1)
            )
            return Whole(conv.pull_scaled(grad, selected, found))

        grads: dict[str, Gradient] = {"logits": Whole(seed)}
        self._back(w, reversed(self._values.nodes), grads, convolved)
        return self._ended(w, grads, fine, choice.count)

    def _scanned(self, outer: Builder, seed: str, choice: Choice) -> tuple[str, str]:
        """Each image by itself: its values are slices of the batch's, with a batch axis of 1.

        The batch goes back through the classifier together: its weights are read once for all.
        """
        head, rest = self._parts()
        together = Backward(outer, self._values, lambda name: name, single=False, once=outer)
        grads: dict[str, Gradient] = {"logits": Whole(seed)}
        self._back(together, head, grads, _no_convolution)

        inner = Builder(self._dtype, "image/")
        sliced: dict[str, str] = {}  # with a batch axis of 1
        bare: dict[str, str] = {}  # without one

        def kept(name: str) -> str:
            return sliced.setdefault(name, inner.name("kept"))

        w = Backward(inner, self._values, kept, single=True, once=outer)
        w.passed |= together.passed
        without = ("rank", "order", "count", "rows")
        mine = replace(
            choice,
            **{
                field.name: bare.setdefault(name, inner.name("kept")) if field.name in without else kept(name)
                for field in fields(Choice)
                for name in [getattr(choice, field.name)]
            },
        )
        sides = self._sides_of_layers(inner, mine)
        layers = list(self._layers.values())
        each = inner.ints(*[1] * len(layers))
        counts, rows = (
            inner.ops("Split", (name, each), len(layers), axis=0) if len(layers) > 1 else [name]
            for name in (mine.count, mine.rows)
        )
        within = np.concatenate([np.arange(layer.channels) for layer in layers])
        numbers = outer.constant(within.reshape(1, -1, 1, 1), "numbers")
        fine: dict[int, str] = {}

        def convolved(conv: Convolution, layer: Layer, grad: Gradient) -> Gradient:
            here = sides[layer.number]
            if isinstance(grad, Planes):
                sums = side_sums(inner, inner.op("Gather", here, grad.channels, axis=2), grad.name)
            elif isinstance(grad, Pooled):
                sums = grad.sums(here)
            else:
                grad = whole(w, grad, conv.node.output[0])
                sums = side_sums(inner, here, grad)
            found = factors(inner, layer, sums, mine, self._positions(conv), self._conserve)
            fine[layer.number] = found.fine
            own = Own(layer, mine, numbers, counts[layer.number], rows[layer.number], mine.infinite)
            return conv.pull_rows(grad, own, found)

        grads = {name: Even(kept(one)) if isinstance(one, Even) else Whole(kept(one)) for name, one in grads.items()
                 if isinstance(one, Even | Whole)}  # fmt: skip
        self._back(w, rest, grads, convolved)
        grad, identity = self._ended(w, grads, fine, inner.op("Unsqueeze", mine.count, inner.ints(0)))
        results = [inner.op("Squeeze", value, inner.ints(0)) for value in (grad, identity)]
        kinds = {name: self._kind_of(source, choice) for source, name in (*sliced.items(), *bare.items())}
        body = helper.make_graph(
            inner.nodes,
            "explanation_of_one_image",
            [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
            [
                helper.make_tensor_value_info(name, kind, None)
                for name, kind in zip(results, (self._kind, TensorProto.INT64), strict=True)
            ],
            inner.initializers,
        )
        scanned = [*(outer.op("Unsqueeze", source, outer.ints(1)) for source in sliced), *bare]
        one, two = outer.ops("Scan", scanned, 2, body=body, num_scan_inputs=len(scanned))
        return one, two

    def _kind_of(self, source: str, choice: Choice) -> int:
        kinds = {
            TensorProto.BOOL: (choice.selected, choice.infinite, choice.unasked),
            TensorProto.INT64: (choice.rank, choice.order, choice.count, choice.rows),
            TensorProto.DOUBLE: (choice.weights, choice.gamma),
            int(helper.np_dtype_to_tensor_dtype(np.promote_types(self._dtype, np.float32))): (choice.sides,),
        }
        return int(next((kind for kind, names in kinds.items() if source in names), self._kind))

    def _positions(self, conv: Convolution) -> int | None:
        sides = self._values.shape(conv.node.output[0])[2:]
        known = [side for side in sides if isinstance(side, int)]
        return int(np.prod(known)) if len(known) == len(sides) else None

    def _back(
        self,
        w: Backward,
        nodes: Iterable[onnx.NodeProto],
        grads: dict[str, Gradient],
        convolved: Callable[[Convolution, Layer, Gradient], Gradient],
    ) -> None:
        """Take `grads`, of values by name, back through the nodes, the last first.

        `convolved` takes the gradient at the output of a convolution under the rule to its input.
        """
        for node in nodes:
            arrived = [grads.pop(name, None) for name in node.output]
            if not any(arrived) or not self._values.of_images.intersection(node.input):
                continue
            if node.op_type == "Conv":
                (grad,) = arrived
                assert grad is not None
                conv = Convolution(w, node)
                layer = self._layers.get(node.name)
                if layer is None:
                    pulled: list[Gradient | None] = [Whole(conv.pull(whole(w, grad, node.output[0])))]
                else:
                    pulled = [convolved(conv, layer, grad)]
            else:
                pulled = pull(w, node, arrived)
            for name, part in zip(node.input, pulled, strict=False):
                if part is not None and name in self._values.of_images:
                    grads[name] = added(w, grads[name], part, name) if name in grads else part

    def _ended(self, w: Backward, grads: dict[str, Gradient], fine: dict[int, str], count: str) -> tuple[str, str]:
        """The gradient at the images, and how many layers of each passed it unchanged, `(b,)`."""
        b = w.b
        if "images" not in grads:
            raise UnsupportedModelError("Nothing of the logits' gradient comes back to the images.")
        unreached = [name for name, layer in self._layers.items() if layer.number not in fine]
        if unreached:
            raise UnsupportedModelError(f"No gradient comes back to the convolution '{unreached[0]}'.")
        passed = b.op("Not", b.op("Squeeze", b.op("Concat", *(fine[i] for i in sorted(fine)), axis=1), b.ints(2)))
        idle = b.op("And", passed, b.op("Greater", count, b.integer(0)))
        return whole(w, grads["images"], "images"), _count_true(b, idle)

    def _sides_of_layers(self, b: Builder, choice: Choice) -> list[str]:
        widths = [layer.channels for layer in self._layers.values()]
        if len(widths) == 1:
            return [choice.sides]
        return b.ops("Split", (choice.sides, b.ints(*widths)), len(widths), axis=2)

    def _parts(self) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
        """The nodes, the last first, up to the last convolution, and from there on."""
        nodes = list(reversed(self._values.nodes))
        first = next((i for i, node in enumerate(nodes) if node.op_type == "Conv"), len(nodes))
        return nodes[:first], nodes[first:]


def _no_convolution(conv: Convolution, layer: Layer, grad: Gradient) -> Gradient:
    raise AssertionError("there is none behind the last convolution")


def _count_true(b: Builder, flags: str) -> str:
    """How many of `(b, n)` bool, `(b,)`."""
    return b.op("ReduceSum", b.op("Cast", flags, to=TensorProto.INT64), b.ints(1), keepdims=0)


def _chosen_target(b: Builder) -> str:
    predicted = b.op("ArgMax", "logits", axis=1, keepdims=0)
    return b.op("Where", b.op("Less", "targets", b.integer(0)), predicted, "targets")
