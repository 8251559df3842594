"""The prediction graph: a network's forward pass in ONNX, as plain as it comes, and which node is which layer."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common
from torch import Tensor, nn

from parchgrad.errors import UnsupportedModelError
from parchgrad.layers import convolutions
from parchgrad.runtimes.view import private_view

OPSET = 20
# Where a slice without an end ends: beyond any axis.
_LAST = 2**31 - 1
_CONVOLUTIONS = ("Conv", "ConvTranspose")
# Set by PyTorch's exporter on each node: the modules around it, outermost first, then the node's own name.
_SCOPES = "pkg.torch.onnx.name_scopes"
# The loggers through which the exporter tells its progress, and of what it would like to have installed.
_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch.fx.experimental.symbolic_shapes")


@dataclass(frozen=True)
class Prediction:
    """A network's forward pass as an ONNX graph that nothing has been fused in.

    `model`: input `images` (batch, 3, height, width) and output `logits` (batch, classes), both of the network's
    dtype, the first axis symbolic; shapes inferred. `layers`: name of each Conv and ConvTranspose node -> name of
    the layer, its dotted `named_modules` path.
    """

    model: onnx.ModelProto
    layers: dict[str, str]


def trace_prediction(module: nn.Module, size: tuple[int, int], native: bool) -> Prediction:
    """Export the module's forward pass, in eval mode, for images of `size` (height, width).

    With `native`, height and width are symbolic as well, and `size` is only an example. The module is not
    touched. Raises UnsupportedModelError where the module cannot be exported, fixes an axis that must stay
    symbolic, calls a convolution twice, or convolves outside of its convolution layers.
    """
    view = private_view(module)
    channels = convolutions(view)
    free = {0: "batch", 2: "height", 3: "width"} if native else {0: "batch"}
    dtype = next((p.dtype for p in view.parameters() if p.is_floating_point()), torch.float32)
    device = next((p.device for p in view.parameters()), torch.device("cpu"))
    # Any batch but 0 and 1, which stand for themselves while a network is traced.
    images = torch.zeros(2, 3, *size, dtype=dtype, device=device)
    program = _export(view, images, free)
    graph = program.graph
    ir.passes.Sequential(common.InlinePass(), common.RemoveUnusedNodesPass())(program)
    if len(graph.outputs) != 1:
        raise UnsupportedModelError(f"The model gives {len(graph.outputs)} tensors; expected the logits alone.")
    layers = _layers(graph, channels)
    _plain(program)
    _name_axes(program, free, type(module).__name__)
    return Prediction(_proto(program), {name: layers[name] for node in graph if (name := node.name or "") in layers})


def _export(view: nn.Module, images: Tensor, free: Mapping[int, str]) -> ir.Model:
    """PyTorch's exporter, silenced: it logs its steps and warns of its own deprecated calls."""
    try:
        with _silence():
            axes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
            axes[images] = dict.fromkeys(free, torch.export.Dim.DYNAMIC)
            traced = torch.export.export(view, (images,), dynamic_shapes=axes, strict=False)
            _plain_means(traced)
            program = torch.onnx.export(
                traced,
                dynamo=True,
                optimize=False,
                input_names=["images"],
                output_names=["logits"],
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:
        name = type(view).__name__
        raise UnsupportedModelError(f"Model '{name}' cannot be exported to ONNX: {_one_line(error)}") from error
    if program is None:
        raise UnsupportedModelError(f"Model '{type(view).__name__}' cannot be exported to ONNX.")
    return program.model


def _plain_means(traced: torch.export.ExportedProgram) -> None:
    """Pooling to one position is a mean. PyTorch's own rewriting keeps the memory layout too, by gathering."""
    for node in traced.graph.nodes:
        if node.target is torch.ops.aten.adaptive_avg_pool2d.default and set(node.args[1]) == {1}:
            node.target, node.args = torch.ops.aten.mean.dim, (node.args[0], [-1, -2], True)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        # Where it fails, it prints the graph that it has so far.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _one_line(error: BaseException) -> str:
    """The innermost cause, in one line: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    line = line if len(line) <= 300 else f"{line[:300]}..."
    return f"{type(error).__name__}: {line}"


def _plain(program: ir.Model) -> None:
    """Tidy up without fusing: constants computed, unused nodes gone, names and BatchNorm kept.

    Equal nodes stay apart: the rule acts at each convolution, also where two share weights and input.
    """
    _count_windows(program.graph)
    onnxscript.optimizer.fold_constants(program, onnx_shape_inference=True)
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedNodesPass(),
    )(program)
    _drop_zero_biases(program.graph)
    _drop_whole_slices(program.graph)
    _keep_batch(program.graph)
    common.RemoveUnusedNodesPass()(program)


def _count_windows(graph: ir.Graph) -> None:
    """Max-pools of `ceil_mode` by the paddings that give as many windows, where sides are known.

    A last window that begins in the padding does not count: not to PyTorch nor to ONNX Runtime, but to ONNX's shape
    inference (1.23).
    """
    for node in graph:
        if node.op_type != "MaxPool" or not node.attributes.get_int("ceil_mode", 0):
            continue
        shapes = [one.shape for one in (node.inputs[0], node.outputs[0]) if one is not None and one.shape is not None]
        if len(shapes) < 2:
            continue
        sides, windows = ([side for side in list(one)[2:] if isinstance(side, int)] for one in shapes)
        kernel = node.attributes.get_ints("kernel_shape")
        if not len(sides) == len(windows) == len(kernel):
            continue
        strides = node.attributes.get_ints("strides", [1] * len(sides))
        spread = node.attributes.get_ints("dilations", [1] * len(sides))
        pads = list(node.attributes.get_ints("pads", [0] * 2 * len(sides)))
        for axis, (side, count) in enumerate(zip(sides, windows, strict=True)):
            reach = (count - 1) * strides[axis] + spread[axis] * (kernel[axis] - 1) + 1
            pads[len(sides) + axis] = max(0, reach - side - pads[axis])
        node.attributes["pads"] = ir.AttrInt64s("pads", pads)
        node.attributes["ceil_mode"] = ir.AttrInt64("ceil_mode", 0)


def _drop_zero_biases(graph: ir.Graph) -> None:
    """A convolution without a bias comes with one of zeros."""
    for node in graph:
        if node.op_type in _CONVOLUTIONS and len(node.inputs) == 3:
            bias = _constant(node.inputs[2])
            if bias is not None and not bias.any():
                node.resize_inputs(2)


def _drop_whole_slices(graph: ir.Graph) -> None:
    """What `x[:, 0]` cuts of the batch is all of it."""
    for node in tuple(graph):
        if node.op_type != "Slice" or node.outputs[0] in graph.outputs:
            continue
        source, start, end, _, *step = node.inputs
        if source is None:
            continue
        starts, ends, steps = _constant(start), _constant(end), _constant(step[0]) if step else np.ones(1)
        if any(bounds is None for bounds in (starts, ends, steps)) or starts.any():
            continue
        if (ends >= _LAST).all() and (steps == 1).all():
            ir.convenience.replace_all_uses_with(node.outputs[0], source)


def _keep_batch(graph: ir.Graph) -> None:
    """Reshape's target with the batch size looked up and put first -> the constant target that keeps the axis."""
    images = graph.inputs[0]
    for node in tuple(graph):
        if node.op_type != "Reshape":
            continue
        source, target = node.inputs
        if source is None or target is None or _first(source) is None or _first(source) != _first(images):
            continue
        join = target.producer()
        if join is None or join.op_type != "Concat" or not _is_batch(join.inputs[0], images):
            continue
        rest = [_constant(part) for part in join.inputs[1:]]
        if any(part is None for part in rest):
            continue
        kept = [0, *(int(size) for part in rest for size in part.flatten())]
        if 0 in kept[1:]:
            continue
        number = ir.tensor(kept, dtype=ir.DataType.INT64, name=f"{node.name}_target")
        value = ir.Value(
            name=number.name, shape=ir.Shape([len(kept)]), type=ir.TensorType(ir.DataType.INT64), const_value=number
        )
        graph.register_initializer(value)
        node.replace_input_with(1, value)
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _first(value: ir.Value) -> int | ir.SymbolicDim | None:
    return value.shape[0] if value.shape else None


def _is_batch(value: ir.Value | None, images: ir.Value) -> bool:
    """Whether a value is the number of images: Shape's first entry, perhaps squeezed and given its axis again."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "Shape":
            return (
                node.inputs[0] is images
                and node.attributes.get_int("start", 0) == 0
                and node.attributes.get_int("end", 0) == 1
            )
        if node.op_type not in ("Squeeze", "Unsqueeze", "Reshape"):
            return False
        value = node.inputs[0]
    return False


def _constant(value: ir.Value | None) -> Any:
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def _name_axes(program: ir.Model, free: Mapping[int, str], name: str) -> None:
    """Our names for the symbolic axes of the images, in every shape of the graph."""
    images = program.graph.inputs[0]
    renamed: dict[str, str] = {}
    shape = images.shape or ir.Shape([])
    for axis, ours in free.items():
        dim = shape[axis]
        if isinstance(dim, int):
            raise UnsupportedModelError(f"Model '{name}' fixes the axis '{ours}' of the images at {dim}.")
        renamed[str(dim.value)] = ours
    values = [*program.graph.inputs, *(output for node in program.graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([dim if isinstance(dim, int) else _renamed(dim, renamed) for dim in value.shape])


def _renamed(dim: ir.SymbolicDim, names: Mapping[str, str]) -> str | None:
    """A symbolic size, perhaps an expression such as `((s14 - 1)//2) + 1`, in other names."""
    if dim.value is None:
        return None
    return re.sub(r"[A-Za-z_]\w*", lambda found: names.get(found[0], found[0]), str(dim.value))


def _proto(program: ir.Model) -> onnx.ModelProto:
    model = ir.to_proto(program)
    # What the exporter noted for its own debugging: stack traces with this machine's paths.
    for holder in (model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info):
        scopes = [one for one in holder.metadata_props if one.key == _SCOPES]  # which module a node came from
        del holder.metadata_props[:]
        holder.metadata_props.extend(scopes)
    model.graph.name = "prediction"
    inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(model, data_prop=True)
    weights = {initializer.name for initializer in inferred.graph.initializer}
    shapes = [info for info in inferred.graph.value_info if info.name not in weights]
    del inferred.graph.value_info[:]
    inferred.graph.value_info.extend(shapes)
    return inferred


def _layers(graph: ir.Graph, channels: Mapping[str, int]) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in graph:
        if node.op_type not in _CONVOLUTIONS:
            continue
        layer = _layer(node, channels)
        if layer is None:
            raise UnsupportedModelError(
                f"ONNX node '{node.name}' ({node.op_type}) belongs to no convolution layer of the model; "
                "expected every convolution to be a module."
            )
        if layer in found.values():
            raise UnsupportedModelError(f"Module '{layer}' is called several times; a graph takes one call a layer.")
        found[node.name or ""] = layer
    return found


def _layer(node: ir.Node, channels: Mapping[str, int]) -> str | None:
    """By the modules around the node, the innermost first (weights may be shared or computed), else by its weight."""
    scopes: list[str] = re.findall(r"'([^']*)'", node.metadata_props.get(_SCOPES, ""))
    for scope in reversed(scopes[:-1]):
        if scope in channels:
            return scope
    weight = node.inputs[1]
    layer = (weight.name or "").removesuffix(".weight") if weight is not None else ""
    return layer if layer in channels else None
