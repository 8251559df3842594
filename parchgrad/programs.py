"""An exported program (`torch.export.save`, `.pt2`) as a module tree, read without running anything in it.

`torch.export.load` unpickles the sample inputs and some constants, evaluates the text of sizes, compiles names
into Python, imports what the nesting of inputs names, resolves dotted names to functions and opens compiled
libraries. Here a program is first written anew from the parts that ATen programs consist of, each of a known form,
and its plain tensors; only that copy is given to torch.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from parchgrad.errors import ModelError, UnsupportedModelError
from parchgrad.layers import Convolution

# The records of an archive (torch.export.pt2_archive) that are read; of the tensors, those that the configs name.
_GRAPH = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_WEIGHTS = "data/weights/"
_CONSTANTS = "data/constants/"
_CONFIGS = {
    f"{_WEIGHTS}model_weights_config.json": (_WEIGHTS, re.compile(r"weight_\d{1,9}")),
    f"{_CONSTANTS}model_constants_config.json": (_CONSTANTS, re.compile(r"tensor_\d{1,9}")),
}

# What the texts of a program may be.
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?P<name>_?[a-z][a-z0-9_]*)\.(?P<overload>[A-Za-z][A-Za-z0-9_]*)"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|neg|eq|ne|lt|le|gt|ge)|torch\.sym_(max|min|not)"
)
_VALUE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")  # a value of the graph, which becomes a Python variable
_PATH = re.compile(r"(?:(?!__)[A-Za-z0-9_@+-]+(?:\.(?!__)[A-Za-z0-9_@+-]+)*)?")  # of a module or tensor
_OPTION = re.compile(r"[A-Za-z0-9_., >-]*")  # of an operator: 'same', 'tanh', 'bij,bjk->bik'
_STACKED = re.compile(r"(?P<key>[A-Za-z0-9_.@-]*),(?P<path>[^,;]*),(?P<type>[A-Za-z0-9_.,@<>\[\]() -]*)")
_SYMBOL = re.compile(r"s\d{1,9}")
_SIZE = re.compile(r"[A-Za-z0-9'=,() -]*")
_FUNCTIONS = frozenset(
    {"Integer", "Rational", "Add", "Mul", "Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv"}
    | {"Max", "Min"}
)
_LONGEST = 1000  # characters of a name or size
_LONGEST_LIST = 20_000  # of a tree, or of the modules a node stands in

# ATen operators that do more than compute new tensors from given ones, which their schemas do not say: memory as it
# was found, files, and storage under tensors changed.
_EFFECTS = re.compile(r"(new_)?empty(_.*)?|from_file|set_|set|resize(_.*)?|data|record_stream|(requires|retain)_grad_?")
_PRIVATE = frozenset(
    {"_adaptive_avg_pool2d", "_assert_tensor_metadata", "_convolution", "_log_softmax", "_softmax", "_to_copy"}
    | {"_native_batch_norm_legit_no_training", "_unsafe_index", "_unsafe_view", "_weight_norm"}
    | {"_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"}
)
# Composite operators may give back an argument without their schemas saying so; of these the result is always new.
_FRESH = re.compile(
    r"_?conv(olution|[123]d|_transpose[123]d)|linear|matmul|bilinear|prelu|(batch|group|instance|layer|rms)_norm"
    r"|(adaptive_)?(avg|max)_pool[123]d|(log_)?softmax|scaled_dot_product_attention|multiply|subtract|divide"
)
_TENSORS = frozenset({"Tensor", "Optional[Tensor]", "List[Tensor]"})

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
        answer = super().forward(images.clone())  # into which it may write
        return answer[0] if isinstance(answer, (tuple, list)) and len(answer) == 1 else answer


def is_program(path: str | os.PathLike[str]) -> bool:
    """Whether the file's name says that it is an exported program."""
    return Path(path).suffix == ".pt2"


def reduce_program(path: str | os.PathLike[str]) -> bytes:
    """The archive at `path` written anew: its graph, of known parts alone, and the plain tensors it names.

    Raises ModelError where the file is no exported program, and UnsupportedModelError where it holds what
    could run code or change its own answers: pickled objects, compiled libraries, operators other than ATen's
    that compute tensors from tensors.
    """
    path = Path(path)
    records = _records(path)
    try:
        contents: dict[str, Any] = {_GRAPH: _PROGRAM(json.loads(records[_GRAPH]), "the program")}
        tensors: dict[str, bytes] = {}
        for config, (folder, file) in _CONFIGS.items():
            contents[config] = {"config": _tensors(json.loads(records[config]), file, folder, records, tensors)}
        _check_operators(contents[_GRAPH])
    except _ForeignError as error:
        raise UnsupportedModelError(f"Program '{path.name}': {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        found = f"{type(error).__name__}: {str(error)[:200]}"
        raise ModelError(f"Program '{path.name}' is not one that this PyTorch writes ({found}).") from error
    kept = {name: json.dumps(content).encode() for name, content in contents.items()}
    return _archive({"archive_version": records["archive_version"], **kept, **tensors})


def load_program(path: str | os.PathLike[str]) -> Program:
    """The program at `path` as a module tree with the names it was exported with, weights trainable.

    Its convolutions are found by `layers.convolutions`, and hooks on them see the convolution's own output.
    Raises as `reduce_program`, and UnsupportedModelError for programs of more than one input, or for batches
    of one size.
    """
    return read_reduced(reduce_program(path), Path(path).name)


def read_reduced(content: bytes, name: str) -> Program:
    """As `load_program`, from what `reduce_program` gave: never from other bytes. `name` is for messages."""
    from torch.export.pt2_archive._package import load_pt2  # torch.export.load hides the error in its log

    try:
        with _quiet("torch._export.serde.serialize", "torch.export.pt2_archive._package", "torch.export.unflatten"):
            exported = load_pt2(io.BytesIO(content)).exported_programs["model"]
            tree = torch.export.unflatten(exported)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        found = f"{type(error).__name__}: {lines[-1][:300] if lines else ''}"
        raise ModelError(f"Program '{name}' cannot be read: {found}.") from error
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
    program = Program(_bare(tree.graph), _sides(name, shape[2:], exported.range_constraints))
    _fill(program, tree)
    return program


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """What torch logs is kept off the error stream; what matters of it is in the error."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


# --- the archive ----------------------------------------------------------------------------------------------------


def _records(path: Path) -> Mapping[str, bytes]:
    """What the archive holds, by name without its root, as far as it may be kept; each read once, none unpacked.

    Raises ModelError and UnsupportedModelError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            root = entries[0].filename.split("/")[0] + "/"
            found = {entry.filename.removeprefix(root): entry for entry in entries}
            plain = all(entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1 for entry in entries)
            if not plain or len(found) < len(entries):
                raise zipfile.BadZipFile("it has compressed, encrypted or repeated records")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise zipfile.BadZipFile("its records are larger than the file")
            records = {name: archive.read(entry) for name, entry in found.items() if name != _SAMPLES}
    except (OSError, zipfile.BadZipFile, IndexError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise ModelError(f"Program '{path.name}' cannot be read: {error}.") from error
    if records.get("archive_format") != b"pt2" or not {_GRAPH, *_CONFIGS, "archive_version"} <= records.keys():
        raise ModelError(f"Program '{path.name}' is not a file of torch.export.save; write it with this PyTorch.")
    if any(record.startswith("data/aotinductor/") for record in records):
        raise UnsupportedModelError(f"Program '{path.name}' holds compiled libraries; save it with torch.export.save.")
    if records.get("byteorder", b"little") != b"little":
        raise UnsupportedModelError(f"Program '{path.name}' was written on a machine of another byte order.")
    return records


def _archive(records: Mapping[str, bytes]) -> bytes:
    from torch.export.pt2_archive import PT2ArchiveWriter

    buffer = io.BytesIO()
    with PT2ArchiveWriter(buffer) as writer:
        for name, content in {"archive_format": b"pt2", **records, _SAMPLES: b""}.items():
            writer.write_bytes(name, content)
    return buffer.getvalue()


# --- the description, copied part by part: what is not named here is left out, or refused where torch would read it --

_Copy = Callable[[Any, str], Any]  # the value, and the key it stands under, to its copy; raises _ForeignError


class _ForeignError(ValueError):
    """A part of a program that an ATen program, exported on the CPU, does not have; the text ends a sentence."""


def _foreign(value: Any, key: str) -> _ForeignError:
    shown = repr(value[:80] + "..." if isinstance(value, str) and len(value) > 80 else value)
    return _ForeignError(f"{key} {shown[:100]} is not of an ATen program; export it on the CPU with torch.export.")


def _text(pattern: re.Pattern[str], longest: int = _LONGEST) -> _Copy:
    def copy(value: Any, key: str) -> str:
        if type(value) is not str or len(value) > longest or not pattern.fullmatch(value):
            raise _foreign(value, key)
        return str(value)

    return copy


def _integer(value: Any, key: str) -> int:
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise _foreign(value, key)
    return value


def _number(value: Any, key: str) -> float | str:
    if type(value) is float or value in ("Infinity", "-Infinity", "NaN"):
        found: float | str = value
        return found
    return _integer(value, key)


def _among(*values: Any) -> _Copy:
    def copy(value: Any, key: str) -> Any:
        for known in values:
            if type(value) is type(known) and value == known:
                return known
        raise _foreign(value, key)

    return copy


def _maybe(copy: _Copy) -> _Copy:
    return lambda value, key: None if value is None else copy(value, key)


def _always(made: Any) -> _Copy:
    """Whatever was there: torch gets `made`."""
    return lambda value, key: made


def _empty(value: Any, key: str) -> Any:
    if value:
        raise _foreign(value, key)
    return {}


def _each(copy: _Copy) -> _Copy:
    def copied(value: Any, key: str) -> list[Any]:
        if type(value) is not list:
            raise _foreign(value, key)
        return [copy(child, key) for child in value]

    return copied


def _mapping(name: _Copy, copy: _Copy) -> _Copy:
    return lambda value, key: {name(inner, "name"): copy(child, inner) for inner, child in value.items()}


def _record(**parts: _Copy) -> _Copy:
    """A record of exactly these parts; one that is not there is None."""
    return lambda value, key: {part: copy(value.get(part), part) for part, copy in parts.items()}


def _one_of(**kinds: _Copy) -> _Copy:
    def copy(value: Any, key: str) -> dict[str, Any]:
        if type(value) is not dict or len(value) != 1 or not kinds.keys() >= value.keys():
            raise _foreign(value, key)
        ((kind, content),) = value.items()
        return {kind: kinds[kind](content, kind)}

    return copy


def _size(value: Any, key: str) -> str:
    """A size as SymPy prints it, which torch evaluates as Python: "Mul(Integer(49), Symbol('s77', positive=True))"."""
    text = _text(_SIZE)(value, key)
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise _foreign(value, key) from error
    if not _is_size(tree):
        raise _foreign(value, key)
    return ast.unparse(tree)


def _is_size(tree: ast.expr) -> bool:
    match tree:
        case ast.Constant(value=int(value)) | ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
            return not isinstance(value, bool) and value < 2**63
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=keywords):
            return _SYMBOL.fullmatch(name) is not None and all(
                keyword.arg in ("positive", "nonnegative", "integer")
                and isinstance(keyword.value, ast.Constant)
                and keyword.value.value is True
                for keyword in keywords
            )
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return name in _FUNCTIONS and all(_is_size(argument) for argument in arguments)
    return False


def _tree(value: Any, key: str) -> str:
    """The nesting of inputs or outputs (torch.utils._pytree), whose contexts torch reads with a hook that imports."""
    if type(value) is not str or len(value) > _LONGEST_LIST:
        raise _foreign(value, key)
    content = json.loads(value)
    if type(content) is not list or len(content) != 2 or type(content[0]) is not int or content[0] != 1:
        raise _foreign(value, key)
    return json.dumps([1, _branch(content[1], key)])


def _branch(value: Any, key: str) -> dict[str, Any]:
    more = _ForeignError(f"its {key} holds more than tuples, lists and dicts.")
    if type(value) is not dict or value.keys() != {"type", "context", "children_spec"}:
        raise more
    kind, context, children = value["type"], value["context"], value["children_spec"]
    if type(children) is not list or not (kind is None or type(kind) is str):
        raise more
    if kind is None and context is None and not children:
        return {"type": None, "context": None, "children_spec": []}
    if kind == "builtins.dict" and type(context) is str:
        names = json.loads(context)
        if type(names) is not list or len(names) != len(children):
            raise more
        made = json.dumps([_text(_VALUE)(name, key) for name in names])
    elif kind in ("builtins.tuple", "builtins.list") and context in (None, "null", "[]"):
        made = "null"
    else:
        raise more
    return {"type": kind, "context": made, "children_spec": [_branch(child, key) for child in children]}


def _target(value: Any, key: str) -> str:
    if type(value) is str and value.startswith("torch.ops.higher_order."):
        raise _ForeignError(
            f"it switches gradients or autocast, or branches, inside ({value[:100]}); export it without."
        )
    target: str = _text(_OPERATOR)(value, key)
    return target


def _stack(value: Any, key: str) -> str:
    """The modules that a node stands in, 'key,path,type' of each."""
    text: str = _text(re.compile(r"[^\n\r]*"), _LONGEST_LIST)(value, key)
    for item in text.split(";"):
        found = _STACKED.fullmatch(item)
        if found is None or not _PATH.fullmatch(found["path"]):
            raise _foreign(item, key)
    return text


def _metadata(value: Any, key: str) -> dict[str, str]:
    return (
        {"nn_module_stack": _stack(value["nn_module_stack"], "nn_module_stack")} if "nn_module_stack" in value else {}
    )


_NAME = _text(_VALUE)
_FLAG = _among(True, False)
_TENSOR = _record(name=_NAME)
_DEVICE = _record(type=_among("cpu"), index=_always(None))
_SYM_INT = _one_of(as_name=_NAME, as_int=_integer)
_LENGTH = _one_of(
    as_expr=_record(expr_str=_size, hint=_maybe(_one_of(as_int=_integer, as_float=_number))), as_int=_integer
)
_META = _record(
    dtype=_integer, sizes=_each(_LENGTH), requires_grad=_FLAG, device=_DEVICE, strides=_each(_LENGTH),
    storage_offset=_LENGTH, layout=_integer,
)  # fmt: skip
_ARGUMENT = _one_of(
    as_none=_FLAG, as_tensor=_TENSOR, as_tensors=_each(_TENSOR), as_bool=_FLAG, as_bools=_each(_FLAG),
    as_optional_tensors=_each(_one_of(as_tensor=_TENSOR, as_none=_FLAG)),
    as_int=_integer, as_ints=_each(_integer), as_sym_int=_SYM_INT, as_sym_ints=_each(_SYM_INT),
    as_float=_number, as_floats=_each(_number), as_sym_float=_one_of(as_name=_NAME, as_float=_number),
    as_sym_bool=_one_of(as_name=_NAME, as_bool=_FLAG), as_string=_text(_OPTION), as_device=_DEVICE,
    as_scalar_type=_integer, as_memory_format=_integer, as_layout=_integer,
)  # fmt: skip
_NODE = _record(
    target=_target,
    inputs=_each(_record(name=_text(re.compile(r"[A-Za-z0-9_]*")), arg=_ARGUMENT, kind=_maybe(_among(1, 2)))),
    outputs=_each(_ARGUMENT),
    metadata=_metadata,
    is_hop_single_tensor_return=_always(None),
    name=_maybe(_NAME),
)
_KEPT_INPUTS = {
    "parameter": _record(arg=_TENSOR, parameter_name=_text(_PATH)),
    "buffer": _record(arg=_TENSOR, buffer_name=_text(_PATH), persistent=_FLAG),
    "tensor_constant": _record(arg=_TENSOR, tensor_constant_name=_text(_PATH)),
}
_CALL = _record(
    inputs=_always([]), outputs=_always([]), in_spec=_tree, out_spec=_tree, forward_arg_names=_maybe(_each(_NAME))
)


def _module_call(value: Any, key: str) -> dict[str, Any]:
    """Of the whole program how it is called; of its parts torch finds that out."""
    path = _text(_PATH)(value["fqn"], "fqn")
    return {"fqn": path, "signature": _CALL(value["signature"], "signature") if path == "" else None}


_PROGRAM = _record(
    graph_module=_record(
        graph=_record(
            inputs=_each(_ARGUMENT), outputs=_each(_ARGUMENT), nodes=_each(_NODE),
            tensor_values=_mapping(_NAME, _META), sym_int_values=_mapping(_NAME, _LENGTH), sym_bool_values=_empty,
            is_single_tensor_return=_FLAG, custom_obj_values=_empty, sym_float_values=_mapping(_NAME, _one_of(
                as_expr=_record(expr_str=_size, hint=_maybe(_one_of(as_float=_number))), as_float=_number)),
        ),
        signature=_record(
            input_specs=_each(_one_of(user_input=_record(arg=_ARGUMENT), **_KEPT_INPUTS)),
            output_specs=_each(_one_of(user_output=_record(arg=_ARGUMENT))),
        ),
        module_call_graph=_each(_module_call), metadata=_always({}), treespec_namedtuple_fields=_always({}),
    ),
    opset_version=_mapping(_among("aten"), _integer),
    range_constraints=_mapping(
        _text(_SYMBOL), _record(min_val=_maybe(_integer), max_val=_maybe(_integer))
    ),
    schema_version=_record(major=_integer, minor=_integer), verifiers=_each(_among("TRAINING", "ATEN")),
    torch_version=_text(re.compile(r"[A-Za-z0-9_.+-]*")), guards_code=_always([]),  # Python that torch would compile
)  # fmt: skip


def _tensors(
    content: Any, file: re.Pattern[str], folder: str, records: Mapping[str, bytes], kept: dict[str, bytes]
) -> dict[str, Any]:
    """The description of stored tensors by name, whose records are added to `kept`."""
    described: dict[str, Any] = {}
    for tensor, payload in content["config"].items():
        path = _text(_PATH)(tensor, "name")
        record, pickled = payload["path_name"], payload["use_pickle"]
        if pickled is not False or type(record) is not str or not file.fullmatch(record):
            raise _ForeignError(
                f"'{path}' is stored as a pickle, which may run code when read; only programs of plain tensors are "
                "taken."
            )
        meta = _META(payload["tensor_meta"], "tensor_meta")
        kept[folder + record] = records[folder + record]
        if not kept[folder + record] and {"as_int": 0} not in meta["sizes"]:
            raise ValueError(f"the tensor '{path}' has no values")
        described[path] = {
            "path_name": record, "is_param": _FLAG(payload["is_param"], "is_param"), "use_pickle": False,
            "tensor_meta": meta,
        }  # fmt: skip
    return described


# --- what its operators do ------------------------------------------------------------------------------------------


def _check_operators(program: Mapping[str, Any]) -> None:
    """Every operator computes tensors from tensors alone, and none writes into the program's own.

    Raises _ForeignError. Writing into results on the way is what `relu_` does. Views of weights count as weights.
    """
    own = {
        content["arg"]["name"]
        for spec in program["graph_module"]["signature"]["input_specs"]
        for kind, content in spec.items()
        if kind in _KEPT_INPUTS
    }
    calls = []
    for node in program["graph_module"]["graph"]["nodes"]:
        target = _OPERATOR.fullmatch(node["target"])
        if target is None or target["name"] is None:
            _check_size_operator(node)
            continue
        operator = _operator(node["target"], target["name"], target["overload"])
        calls.append((node, operator, _arguments(node, operator)))
    for call in calls:
        _check_repeatable(*call)
    for call in calls:
        own |= _own_results(*call, own)


def _check_size_operator(node: Mapping[str, Any]) -> None:
    """Python's operators serve sizes alone."""
    kinds = {kind for given in node["inputs"] for kind in given["arg"]}
    if not kinds <= {"as_int", "as_float", "as_bool", "as_sym_int", "as_sym_float", "as_sym_bool"}:
        raise _foreign(node["target"], "target")


def _operator(target: str, name: str, overload: str) -> torch._ops.OpOverload:
    if _EFFECTS.fullmatch(name) or (name.startswith("_") and name not in _PRIVATE):
        raise _foreign(target, "target")
    packet = getattr(torch.ops.aten, name, None)
    operator = getattr(packet, overload, None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    if not isinstance(operator, torch._ops.OpOverload):
        raise _ForeignError(f"its operator '{target}' is not one of PyTorch {torch.__version__}; export it with this.")
    results = {str(result.real_type) for result in operator._schema.returns}
    of_sizes = name.startswith("sym_") and results <= {"int", "SymInt"}
    if not (results and results <= _TENSORS) and not of_sizes and name != "_assert_tensor_metadata":
        raise _ForeignError(f"its operator '{target}' does or gives something other than tensors; export it without.")
    return operator


def _arguments(node: Mapping[str, Any], operator: torch._ops.OpOverload) -> dict[str, dict[str, Any]]:
    """What the operator is given by name; what goes by position has its place."""
    known = [argument.name for argument in operator._schema.arguments]
    given = {argument["name"]: argument["arg"] for argument in node["inputs"]}
    placed = {argument["name"] for argument in node["inputs"] if argument["kind"] != 2}
    if len(given) < len(node["inputs"]) or not given.keys() <= set(known) or placed != set(known[: len(placed)]):
        raise _ForeignError(f"the arguments of '{node['target']}' are not those of PyTorch {torch.__version__}.")
    return given


def _check_repeatable(
    node: Mapping[str, Any], operator: torch._ops.OpOverload, given: Mapping[str, Mapping[str, Any]]
) -> None:
    """It draws no random numbers and gathers no statistics, as dropout and batch_norm do in training mode."""
    draws = torch.Tag.nondeterministic_seeded in operator.tags
    # Without means of its own batch_norm standardises weights, in evaluation too.
    gathers = "as_tensor" in given.get("running_mean", {}) and not operator._schema.name.endswith("_no_training")
    if not draws and not gathers:
        return
    flags = [a for a in operator._schema.arguments if a.name in ("train", "training", "use_input_stats")]
    if not flags:
        raise _ForeignError(f"its operator '{node['target']}' answers otherwise each time; export it without.")
    for flag in flags:
        default = flag.default_value if flag.has_default_value() else None
        if given.get(flag.name, {"as_bool": default}) != {"as_bool": False}:
            name = node["name"] or node["target"]
            raise _ForeignError(f"it was exported in training mode ({name}); call model.eval() before exporting.")


def _own_results(
    node: Mapping[str, Any], operator: torch._ops.OpOverload, given: Mapping[str, Mapping[str, Any]], own: set[str]
) -> set[str]:
    """The results that are, or may be, views of the program's own tensors. Raises _ForeignError for writing there."""
    schema = operator._schema
    touched = {a.name: a.alias_info.is_write for a in schema.arguments if a.alias_info is not None}
    for argument, writes in touched.items():
        found = own.intersection(_values(given.get(argument, {})))
        if writes and found:
            raise _ForeignError(f"'{node['target']}' writes into its own weights ({min(found)}); export it without.")
    if not touched and _may_give_back(operator):
        touched = dict.fromkeys(given, False)
    if not any(own.intersection(_values(given.get(argument, {}))) for argument in touched):
        return set()
    return {value for output in node["outputs"] for value in _values(output)}


def _may_give_back(operator: torch._ops.OpOverload) -> bool:
    name, overload = operator._schema.name, operator._schema.overload_name
    full_name = f"{name}.{overload}" if overload else name
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(full_name, "CompositeImplicitAutograd")
    return composite and not _FRESH.fullmatch(name.removeprefix("aten::"))


def _values(argument: Mapping[str, Any]) -> Iterator[str]:
    """The names of the tensors in an argument or result."""
    for content in argument.values():
        for item in content if isinstance(content, list) else [content]:
            if isinstance(item, dict):
                inner = item.get("as_tensor", item)
                if isinstance(inner, dict) and isinstance(inner.get("name"), str):
                    yield inner["name"]


# --- the module tree ------------------------------------------------------------------------------------------------


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
