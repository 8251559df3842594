"""An exported program (`torch.export.save`, `.pt2`) as a module tree, read without running anything in it.

`torch.export.load` unpickles the sample inputs and some constants, evaluates the text of sizes, compiles names
into Python, resolves dotted names to functions and opens compiled libraries. Here a file is first reduced to
its graph and its plain tensors, every text in the graph is checked against what ATen programs hold, and only the
reduced copy is given to torch.
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from parchgrad.errors import ModelError, UnsupportedModelError
from parchgrad.layers import Convolution

# The records of an archive (torch.export.pt2_archive) that are kept.
_GRAPH = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_TENSORS = re.compile(r"data/(weights/weight|constants/tensor)_\d+")
_PLAIN = ("archive_format", "archive_version", "byteorder", ".data/version", _GRAPH, *_CONFIGS)

# What the texts of a graph may be, by the key they stand under; others are names.
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file)_?[a-z][a-z0-9_]*\.[A-Za-z][A-Za-z0-9_]*"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|neg|eq|ne|lt|le|gt|ge)|torch\.sym_(max|min|not)"
)
_NAME = re.compile(r"[A-Za-z0-9_.@+-]*")
# Sizes as SymPy prints them, to be evaluated as Python: "Mul(Integer(49), Symbol('s77', positive=True))".
_SIZE = re.compile(
    r"(?:(?:Symbol|Integer|Rational|Add|Mul|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|IntTrueDiv|Max|Min)\("
    r"|'[su]\d+'|(?:positive|nonnegative|integer)=True|-?\d+|[), ])*"
)
_TEXTS = {
    "target": _OPERATOR,
    "as_operator": _OPERATOR,
    "expr_str": _SIZE,
    "as_string": re.compile(r"[A-Za-z0-9_., >-]*"),  # an option of an operator: 'same', 'tanh', 'bij,bjk->bik'
    "type": re.compile(r"cpu"),  # of a device
    "nn_module_stack": re.compile(r"[A-Za-z0-9_.,;@<>\[\]() -]*"),
}
_TREES = ("in_spec", "out_spec")
_TREE_TYPES = (None, "builtins.tuple", "builtins.list", "builtins.dict")

_CONVOLUTION_MODULE = re.compile(r"torch\.nn\.modules\.conv\.Conv(Transpose)?[123]d")
_CONVOLUTIONS = re.compile(r"aten\.(conv[123]d|conv_transpose[123]d|convolution|_convolution)\b")


class Part(nn.Module):
    """A module of the program: its own graph, run node by node so that the hooks of its children are met."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *values: Any) -> Any:
        return fx.Interpreter(self, graph=self.graph).run(*values, enable_io_processing=False)


class ExportedConvolution(Part, Convolution):
    """A module of the program whose result is a convolution's output."""

    def __init__(self, graph: fx.Graph, out_channels: int) -> None:
        super().__init__(graph)
        self.out_channels = out_channels


@dataclass(frozen=True)
class Sides:
    """The heights and widths a program was exported for, bounds included; what it does beyond them is unknown."""

    height: tuple[float, float]
    width: tuple[float, float]
    square: bool  # exported with one size for both

    @property
    def only(self) -> tuple[int, int] | None:
        """The one (height, width) there is, if there is one."""
        (low, high), (left, right) = self.height, self.width
        return (int(low), int(left)) if low == high and left == right else None

    def fit(self, height: int, width: int) -> bool:
        within = self.height[0] <= height <= self.height[1] and self.width[0] <= width <= self.width[1]
        return within and (height == width or not self.square)

    def __str__(self) -> str:
        (low, high), (left, right) = self.height, self.width
        text = f"{low:g} x {left:g}" if self.only else f"{low:g}..{high:g} x {left:g}..{right:g}"
        return f"{text}, square" if self.square else text


class Program(Part):
    """A whole program: images `(B, 3, h, w)` to logits. Raises UnsupportedModelError for other sizes than its own."""

    def __init__(self, graph: fx.Graph, sides: Sides) -> None:
        super().__init__(graph)
        self.sides = sides

    def forward(self, *values: Any) -> Any:
        (images,) = values
        if not self.sides.fit(*images.shape[2:]):
            found = " x ".join(str(side) for side in images.shape[2:])
            raise UnsupportedModelError(f"The program was exported for images of {self.sides} pixels, got {found}.")
        answer = super().forward(images)
        return answer[0] if isinstance(answer, (tuple, list)) and len(answer) == 1 else answer


def is_program(path: str | os.PathLike[str]) -> bool:
    """Whether the file's name says that it is an exported program."""
    return Path(path).suffix == ".pt2"


def reduce_program(path: str | os.PathLike[str]) -> bytes:
    """The archive at `path` with nothing in it but its graph and plain tensors; sample inputs are left out.

    Raises ModelError where the file is no exported program, and UnsupportedModelError where it holds what
    could run code: pickled objects, compiled libraries, operators other than ATen's.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].split("/")[0] + "/"
            records = {name.removeprefix(root): name for name in archive.namelist()}
            kept = {name: archive.read(full) for name, full in records.items() if _keeps(name)}
    except (OSError, zipfile.BadZipFile, IndexError) as error:
        raise ModelError(f"Program '{path.name}' cannot be read: {error}.") from error
    if kept.get("archive_format") != b"pt2" or not {_GRAPH, *_CONFIGS} <= kept.keys():
        raise ModelError(f"Program '{path.name}' is not a file of torch.export.save; write it with this PyTorch.")
    if any(record.startswith("data/aotinductor/") for record in records):
        raise UnsupportedModelError(f"Program '{path.name}' holds compiled libraries; save it with torch.export.save.")
    try:
        contents = {name: json.loads(kept[name]) for name in (_GRAPH, *_CONFIGS)}
        for name in _CONFIGS:
            _check_tensors(path.name, contents[name])
        _reduce_graph(path.name, contents[_GRAPH])
        for name, content in contents.items():
            _check_texts(path.name, content)
            kept[name] = json.dumps(content).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ModelError(f"Program '{path.name}' is not one that this PyTorch writes ({found}).") from error
    return _archive(kept)


def load_program(path: str | os.PathLike[str]) -> Program:
    """The program at `path` as a module tree with the names it was exported with, weights trainable.

    Its convolutions are found by `layers.convolutions`, and hooks on them see the convolution's own output.
    Raises as `reduce_program`, and UnsupportedModelError for programs exported in training mode, of more than
    one input, or for batches of one size.
    """
    name = Path(path).name
    try:
        exported = torch.export.load(io.BytesIO(reduce_program(path)))
        tree = torch.export.unflatten(exported)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"Program '{name}' cannot be read: {type(error).__name__}: {error}.") from error
    inputs = [node for node in tree.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1 or not isinstance(inputs[0].meta.get("val"), Tensor):
        raise UnsupportedModelError(f"Program '{name}' takes {len(inputs)} inputs, expected images alone.")
    shape = inputs[0].meta["val"].shape
    if len(shape) != 4:
        raise UnsupportedModelError(f"Program '{name}' takes {len(shape)} axes, expected images (batch, 3, h, w).")
    if isinstance(shape[0], int):
        raise UnsupportedModelError(
            f"Program '{name}' was exported for batches of {shape[0]}; export it for any: "
            "torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},)), "
            "with two images or more."
        )
    _check_evaluation_mode(name, tree)
    program = Program(_bare(tree.graph), _sides(name, shape[2:], exported.range_constraints))
    _fill(program, tree)
    return program


def _keeps(record: str) -> bool:
    return record in _PLAIN or _TENSORS.fullmatch(record) is not None


def _check_tensors(name: str, config: dict[str, Any]) -> None:
    for tensor, payload in config["config"].items():
        if payload["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
            raise UnsupportedModelError(
                f"Program '{name}': '{tensor}' is stored as a pickle, which may run code when read; "
                "only programs of plain tensors are taken."
            )


def _reduce_graph(name: str, program: dict[str, Any]) -> None:
    """Take out of the program's description what explaining does not need."""
    program["guards_code"] = []  # Python that torch would compile
    for node in program["graph_module"]["graph"]["nodes"]:
        node["metadata"] = {k: v for k, v in node["metadata"].items() if k == "nn_module_stack"}
        if node["target"].startswith("torch.ops.higher_order."):
            raise UnsupportedModelError(
                f"Program '{name}' switches gradients or autocast, or branches, inside ({node['target']}); "
                "export it without."
            )


def _check_texts(name: str, content: dict[str, Any]) -> None:
    for key, text in _texts(content):
        if key in _TREES:
            if not all(kind in _TREE_TYPES for kind in _tree_types(json.loads(text))):
                raise UnsupportedModelError(f"Program '{name}': its {key} holds more than tuples, lists and dicts.")
        elif not _TEXTS.get(key, _NAME).fullmatch(text):
            shown = text if len(text) <= 80 else f"{text[:80]}..."
            raise UnsupportedModelError(
                f"Program '{name}': {key} {shown!r} is not of an ATen program; export it on the CPU with torch.export."
            )


def _texts(value: Any, key: str = "name") -> Iterator[tuple[str, str]]:
    """Every text in the description with the key it stands under; keys themselves are names."""
    if isinstance(value, dict):
        if value.get("as_custom_obj"):
            raise ValueError("a custom object")
        for inner, child in value.items():
            yield "name", inner
            yield from _texts(child, inner)
    elif isinstance(value, list):
        for child in value:
            yield from _texts(child, key)
    elif isinstance(value, str):
        yield key, value


def _tree_types(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield value.get("type")
        for child in value.values():
            yield from _tree_types(child)
    elif isinstance(value, list):
        for child in value:
            yield from _tree_types(child)


def _archive(records: dict[str, bytes]) -> bytes:
    from torch.export.pt2_archive import PT2ArchiveWriter

    buffer = io.BytesIO()
    with PT2ArchiveWriter(buffer) as writer:
        for name, content in records.items():
            if name != ".data/version" and name != "byteorder":  # the writer's own
                writer.write_bytes(name, content)
        writer.write_bytes(_SAMPLES, b"")
    return buffer.getvalue()


def _sides(name: str, sizes: Sequence[Any], ranges: Mapping[Any, Any]) -> Sides:
    bounds: list[tuple[float, float]] = []
    for size in sizes:
        allowed = None if isinstance(size, int) else ranges.get(size.node.expr)
        if allowed is None and not isinstance(size, int):
            raise UnsupportedModelError(f"Program '{name}' takes images whose side is {size}; give Dim or numbers.")
        bounds.append((size, size) if allowed is None else (float(allowed.lower), float(allowed.upper)))
    height, width = bounds
    free = [str(size.node.expr) for size in sizes if not isinstance(size, int)]
    return Sides(height, width, square=len(free) == 2 and free[0] == free[1])


def _check_evaluation_mode(name: str, tree: nn.Module) -> None:
    for part in tree.modules():
        for node in getattr(part, "graph", fx.Graph()).nodes:
            kind = str(node.target)
            # aten::dropout(input, p, train); aten::batch_norm(input, weight, bias, mean, var, training, ...), which
            # without means and variances of its own standardises weights, in evaluation too.
            trains = kind.startswith("aten.dropout") and node.args[2] is True
            trains |= kind.startswith("aten.batch_norm.") and node.args[5] is True and node.args[3] is not None
            if node.op == "call_function" and trains:
                raise UnsupportedModelError(
                    f"Program '{name}' was exported in training mode ({node.name}); call model.eval() before exporting."
                )


def _fill(target: Part, source: nn.Module, path: str = "") -> None:
    """Give `target` the tensors and, as parts of our own, the children of `source`, whose names `path` precedes."""
    for name, parameter in source.named_parameters(recurse=False, remove_duplicate=False):
        target.register_parameter(name, parameter)
    for name, buffer in source.named_buffers(recurse=False, remove_duplicate=False):
        target.register_buffer(name, buffer, name not in source._non_persistent_buffers_set)
    for name, value in vars(source).items():  # constants that the graph reads
        if isinstance(value, Tensor):
            target.register_buffer(name, value, persistent=False)
    for name, child in source.named_children():
        target.add_module(name, _part(child, f"{path}{name}"))


def _part(source: nn.Module, path: str) -> Part:
    graph = getattr(source, "graph", None)
    if not isinstance(graph, fx.Graph):  # holds tensors or children only
        part = Part(fx.Graph())
    else:
        channels = _convolution_channels(graph)
        convolves = any(_is_convolution(node) for node in graph.nodes)
        if channels is None and convolves and _CONVOLUTION_MODULE.fullmatch(str(getattr(source, "_ty", ""))):
            raise UnsupportedModelError(
                f"Convolution '{path}' of the program gives more than its own output (forward hooks were exported "
                "into it); export the network without."
            )
        part = Part(_bare(graph)) if channels is None else ExportedConvolution(_bare(graph), channels)
    _fill(part, source, f"{path}.")
    return part


def _convolution_channels(graph: fx.Graph) -> int | None:
    """Output channels, where the graph's result is a convolution's."""
    outputs = list(graph.find_nodes(op="output"))
    if not outputs:
        return None
    result = outputs[0].args[0]
    if not isinstance(result, fx.Node) or not _is_convolution(result):
        return None
    return int(result.meta["val"].shape[1])


def _is_convolution(node: fx.Node) -> bool:
    return node.op == "call_function" and _CONVOLUTIONS.match(str(node.target)) is not None


def _bare(graph: fx.Graph) -> fx.Graph:
    """A copy without what torch notes about its nodes: symbolic tensors, which cannot be copied again."""
    copied = fx.Graph()
    answer = copied.graph_copy(graph, {}, return_output_node=True)
    if isinstance(answer, tuple):
        copied.output(answer[0])
    for node in copied.nodes:
        node.meta = {}
    return copied
