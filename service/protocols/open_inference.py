"""The Open Inference Protocol's messages (V2): tensors, a request, a response, their bytes. Knows no HTTP, no model.

A tensor comes as JSON, or as raw bytes behind the JSON (the binary tensor extension). Nothing is allocated by a size
that a caller declares before the bytes that are there have been held against it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Any, TypeAlias, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError
from pydantic_core import from_json, to_json
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

from service.errors import ServiceError

HEADER_LENGTH = "Inference-Header-Content-Length"

# JSON costs a hundred times what the binary form does: five maps or an image and a half of 224 x 224.
MAX_JSON_ELEMENTS = 262_144
MAX_JSON_BYTES = 8_388_608
# Parsing is one call that nothing else runs beside; what costs it time is counted first, strings and all: base64 has
# none of these signs, and other text few.
MAX_JSON_SIGNS = {b",": MAX_JSON_ELEMENTS + 65_536, b"[": 65_536, b"{": 4096, b":": 8192}
MAX_TENSORS = 64  # a validator finds what is wrong with each one, which for hundreds of thousands takes seconds
MAX_RANK = 16
MAX_ELEMENTS = 2**34  # of a shape, sides of 0 counted as 1: numpy can hold all such shapes
MAX_BYTES_ELEMENTS = 65_536  # each element becomes an object of its own

DATATYPES = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64",
    "BYTES",
)  # fmt: skip

Array = np.ndarray[Any, Any]
Parameter: TypeAlias = StrictBool | StrictInt | StrictFloat | StrictStr
Parameters: TypeAlias = Mapping[str, bool | int | float | str]


@dataclass(frozen=True)
class Tensor:
    """`data` has the shape; its type is the datatype's, for BYTES objects of type bytes.

    `text`: its elements came as JSON strings, which hold text and no bytes.
    """

    name: str
    datatype: str
    data: Array
    text: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)


@dataclass(frozen=True)
class InferRequest:
    """`outputs` names what is asked for and whether as raw bytes; empty: all there is, by `binary_output`."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, bool] = field(default_factory=dict)
    binary_output: bool = False
    id: str = ""
    parameters: Parameters = field(default_factory=dict)
    model_name: str | None = None  # said again by some clients beside the one in the address

    def wants(self, name: str) -> bool:
        return not self.outputs or name in self.outputs

    def wants_raw(self, name: str) -> bool:
        return self.outputs.get(name, self.binary_output)


@dataclass(frozen=True)
class InferResponse:
    model_name: str
    model_version: str
    outputs: Sequence[Tensor]
    id: str = ""
    parameters: Parameters = field(default_factory=dict)


# --- the JSON's shape --------------------------------------------------------------------------------------


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class _Input(_Message):
    name: StrictStr
    datatype: StrictStr
    shape: Annotated[list[Annotated[StrictInt, Field(ge=0, le=MAX_ELEMENTS)]], Field(max_length=MAX_RANK)]
    parameters: dict[str, Parameter] | None = None
    data: Any = None  # held to datatype and shape below


class _Output(_Message):
    name: StrictStr
    parameters: dict[str, Parameter] | None = None


class _Request(_Message):
    id: StrictStr | None = None
    model_name: StrictStr | None = None
    parameters: dict[str, Parameter] | None = None
    inputs: Annotated[list[_Input], Field(max_length=MAX_TENSORS)]
    outputs: Annotated[list[_Output], Field(max_length=MAX_TENSORS)] | None = None


# --- reading -----------------------------------------------------------------------------------------------


def decode(body: bytes | bytearray | memoryview, header_length: str | None = None) -> InferRequest:
    """A request's body -> InferRequest; tensors of numbers lie in `body`, not copied.

    `header_length` is the header of that name: how many bytes of JSON the raw tensors follow. Raises
    ServiceError(malformed_request), or option_unsupported for shared memory and classification.
    """
    view = memoryview(body)
    split = _header_length(header_length, len(view))
    message = read_message(bytes(view[:split]), _Request)
    raw = view[split:]
    inputs: dict[str, Tensor] = {}
    listed = 0
    for one in message.inputs:
        _refuse_twice("Input", one.name, inputs)
        size = _binary_size(one)
        if size is None:
            tensor = listed_tensor(one.name, one.datatype, one.shape, one.data)
            listed += tensor.data.size
            if listed > MAX_JSON_ELEMENTS:
                raise _malformed(f"The inputs have {listed} elements in JSON; {_IN_BINARY}")
        else:
            if size > len(raw):
                raise _malformed(
                    f"Input {_short(one.name)} declares binary_data_size {size}; {len(raw)} bytes are left of the body."
                )
            tensor, raw = raw_tensor(one.name, one.datatype, one.shape, raw[:size]), raw[size:]
        inputs[one.name] = tensor
    if len(raw):
        raise _malformed(f"The body has {len(raw)} bytes that belong to no input.")
    outputs: dict[str, bool] = {}
    parameters = dict(message.parameters or {})
    binary_output = _flag(parameters.pop("binary_data_output", False), "binary_data_output")
    for asked in message.outputs or ():
        _refuse_twice("Output", asked.name, outputs)
        outputs[asked.name] = _asked_binary(asked, binary_output)
    return InferRequest(inputs, outputs, binary_output, message.id or "", parameters, message.model_name)


def raw_tensor(name: str, datatype: str, shape: Sequence[int], raw: memoryview | bytes) -> Tensor:
    """A tensor of little-endian bytes, row by row; of BYTES each element follows its length (uint32)."""
    elements, dtype = _elements(name, shape), _dtype(name, datatype)
    if datatype == "BYTES":
        _check_lengths(name, elements, memoryview(raw))
        return Tensor(name, datatype, deserialize_bytes_tensor(raw).reshape(tuple(shape)))
    if elements * dtype.itemsize != len(raw):
        raise _malformed(
            f"Input {_short(name)} is {datatype} of shape {list(shape)}, {elements * dtype.itemsize} bytes; "
            f"it carries {len(raw)}."
        )
    data = np.frombuffer(raw, dtype).reshape(tuple(shape))
    if datatype == "BOOL" and data.view(np.uint8).max(initial=0) > 1:
        raise _malformed(f"Input {_short(name)} is BOOL and has bytes other than 0 and 1.")
    return Tensor(name, datatype, data)


def listed_tensor(name: str, datatype: str, shape: Sequence[int], values: Any) -> Tensor:
    """A tensor of a list of values, flat or nested as the shape is."""
    elements, dtype = _elements(name, shape), _dtype(name, datatype)
    if elements > MAX_JSON_ELEMENTS:
        raise _malformed(f"Input {_short(name)} has {elements} elements in JSON; {_IN_BINARY}")
    flat = _flat(name, shape, elements, values)
    types = set(map(type, flat))
    if wrong := types.difference(_TYPES.get(dtype.kind, (int,))):
        raise _malformed(f"Input {_short(name)} is {datatype} and has an element that is {wrong.pop().__name__}.")
    if datatype == "BYTES":
        texts = np.empty(elements, dtype=np.object_)
        texts[:] = [one.encode() if isinstance(one, str) else one for one in flat]
        return Tensor(name, datatype, texts.reshape(tuple(shape)), text=str in types)
    data = _numbers(flat, dtype)
    if data is None:
        raise _malformed(f"Input {_short(name)} has a number that {datatype} does not hold.")
    return Tensor(name, datatype, data.reshape(tuple(shape)))


def _numbers(flat: list[Any], dtype: "np.dtype[Any]") -> Array | None:
    """None where one of them is out of the type's range."""
    if dtype.kind in "iu" and flat and not np.iinfo(dtype).min <= min(flat) <= max(flat) <= np.iinfo(dtype).max:
        return None
    try:
        with np.errstate(over="ignore"):
            data = np.array(flat, dtype)
    except OverflowError:  # an integer beyond float64
        return None
    return data if np.isfinite(data).all() else None


_TYPES = {"b": (bool,), "f": (float, int), "O": (str, bytes)}  # by dtype.kind; text from JSON, bytes from gRPC
_BINARY = "send binary data"
_IN_BINARY = f"at most {MAX_JSON_ELEMENTS} are read: {_BINARY}."


def _header_length(text: str | None, size: int) -> int:
    if text is None:
        length = size
    elif text.isascii() and text.isdigit() and len(text) <= 19 and int(text) <= size:
        length = int(text)
    else:
        raise _malformed(f"{HEADER_LENGTH} is {_short(text)}; allowed: 0..{size}, the body's length.")
    if length > MAX_JSON_BYTES:
        raise _malformed(
            f"The request has {length} bytes of JSON, at most {MAX_JSON_BYTES} are read: send binary data."
        )
    return length


Message = TypeVar("Message", bound=BaseModel)


def read_message(json: bytes | bytearray, kind: type[Message]) -> Message:
    """JSON -> a message of this kind. Raises ServiceError(malformed_request), saying where it is wrong."""
    for sign, most in MAX_JSON_SIGNS.items():
        if (count := json.count(sign)) > most:
            raise _malformed(f"The request's JSON has {count} '{sign.decode()}', at most {most} are read: {_BINARY}.")
    try:
        value = from_json(json, allow_inf_nan=False)
    except ValueError as error:
        raise _malformed(f"The request is not JSON (which has no NaN and no Infinity): {error}.") from None
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part)[:64] for part in first["loc"]) or "The request"
        raise _malformed(f"{place[:200]}: {first['msg']}.") from None


def _binary_size(one: _Input) -> int | None:
    """How many raw bytes belong to an input; None where it is in the JSON."""
    parameters = dict(one.parameters or {})
    size = parameters.pop("binary_data_size", None)
    for name in parameters:
        _refuse_parameter("Input", one.name, name)
    if (size is None) == (one.data is None):
        raise _malformed(f"Input {_short(one.name)} has 'data' or a 'binary_data_size', and one of them only.")
    if size is not None and (type(size) is not int or size < 0):
        raise _malformed(f"Input {_short(one.name)} declares binary_data_size {_short(size)}; allowed: a length.")
    return size if isinstance(size, int) else None


def _asked_binary(asked: _Output, default: bool) -> bool:
    parameters = dict(asked.parameters or {})
    binary = _flag(parameters.pop("binary_data", default), "binary_data")
    for name in parameters:
        _refuse_parameter("Output", asked.name, name)
    return binary


def _refuse_parameter(kind: str, owner: str, name: str) -> None:
    if name.startswith("shared_memory_") or name == "classification":
        raise ServiceError("option_unsupported", f"{kind} {_short(owner)}: {name} is not supported.")
    raise _malformed(f"{kind} {_short(owner)} has no parameter {_short(name)}.")


def _refuse_twice(kind: str, name: str, seen: Mapping[str, object]) -> None:
    if name in seen:
        raise _malformed(f"{kind} {_short(name)} is given twice.")


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise _malformed(f"Parameter '{name}' is {_short(value)}; allowed: true or false.")
    return value


def _elements(name: str, shape: Sequence[int]) -> int:
    """The product of a shape that numpy can hold."""
    if len(shape) > MAX_RANK or min(shape, default=0) < 0 or math.prod(max(1, side) for side in shape) > MAX_ELEMENTS:
        raise _malformed(f"Input {_short(name)} has a shape of more than {MAX_ELEMENTS} elements, or a negative side.")
    return math.prod(shape)


def _dtype(name: str, datatype: str) -> "np.dtype[Any]":
    if datatype not in DATATYPES:
        raise _malformed(f"Input {_short(name)} has datatype {_short(datatype)}; allowed: {', '.join(DATATYPES)}.")
    dtype: np.dtype[Any] = np.dtype(triton_to_np_dtype(datatype)).newbyteorder("<")
    return dtype


def _check_lengths(name: str, elements: int, raw: memoryview) -> None:
    """That `raw` is so many elements, each behind its length, and nothing else."""
    if elements > MAX_BYTES_ELEMENTS:
        raise _malformed(
            f"Input {_short(name)} has {elements} elements of BYTES; at most {MAX_BYTES_ELEMENTS} are read."
        )
    end = 0
    for _ in range(elements):
        begin = end + 4
        end = begin + int.from_bytes(raw[end:begin], "little")
        if begin > len(raw) or end > len(raw):
            raise _malformed(f"Input {_short(name)} has an element that passes the end of its {len(raw)} bytes.")
    if end != len(raw):
        raise _malformed(f"Input {_short(name)} has {len(raw) - end} bytes behind its {elements} elements.")


def _flat(name: str, shape: Sequence[int], elements: int, values: Any) -> list[Any]:
    """The elements in a row. Raises where their number, or a nesting, is not the shape's."""
    wrong = _malformed(f"Input {_short(name)} has data that is not {elements} elements of shape {list(shape)}.")
    if not isinstance(values, list):
        raise wrong
    flat: list[Any] = values
    if values and isinstance(values[0], list):
        rows: list[Any] = [values]
        for side in shape:
            if not all(isinstance(row, list) and len(row) == side for row in rows):
                raise wrong
            rows = list(chain.from_iterable(rows))
        flat = rows
    if len(flat) != elements:
        raise wrong
    return flat


def _malformed(message: str) -> ServiceError:
    return ServiceError("malformed_request", message)


def _short(value: object) -> str:
    """What a caller sent, to be read back to them."""
    return repr(value)[:80]


# --- writing -----------------------------------------------------------------------------------------------


def check_listed(elements: int) -> None:
    """Raises ServiceError(malformed_request) where outputs have more elements than are written in JSON."""
    if elements > MAX_JSON_ELEMENTS:
        raise _malformed(
            f"The outputs asked for have {elements} elements in JSON; at most {MAX_JSON_ELEMENTS} are written: "
            "ask for binary data."
        )


def encode(response: InferResponse, request: InferRequest) -> tuple[bytes, dict[str, str]]:
    """The body and its headers; each output raw or in JSON as the request asked. NaN and infinity are null in JSON.

    Raises ServiceError(malformed_request) where more elements than MAX_JSON_ELEMENTS were asked for in JSON.
    """
    binary = [request.wants_raw(one.name) for one in response.outputs]
    check_listed(sum(one.data.size for one, is_raw in zip(response.outputs, binary, strict=True) if not is_raw))
    outputs, raw = [], []
    for one, is_raw in zip(response.outputs, binary, strict=True):
        described: dict[str, Any] = {"name": one.name, "datatype": one.datatype, "shape": list(one.shape)}
        if is_raw:
            raw.append(raw_bytes(one))
            described["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            described["data"] = one.data.ravel().tolist()
        outputs.append(described)
    message: dict[str, Any] = {"model_name": response.model_name, "model_version": response.model_version}
    if response.id:
        message["id"] = response.id
    if response.parameters:
        message["parameters"] = dict(response.parameters)
    header = to_json({**message, "outputs": outputs}, inf_nan_mode="null")
    if not raw:
        return header, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(header))}
    return b"".join([header, *raw]), headers


def raw_bytes(tensor: Tensor) -> bytes:
    """The binary form; see `raw_tensor`."""
    if tensor.datatype == "BYTES":
        return bytes(serialize_byte_tensor(tensor.data).item()) if tensor.data.size else b""
    return tensor.data.astype(tensor.data.dtype.newbyteorder("<"), copy=False).tobytes()
