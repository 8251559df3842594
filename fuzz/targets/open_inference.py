"""A V2 request's body -> protocols/open_inference.py: tensors that come back as they lay in it, or a `ServiceError`.

A case is the text of Inference-Header-Content-Length (`-`: the header is absent), a line feed, and the body.
"""

import json
import struct
from collections.abc import Iterator
from copy import deepcopy
from itertools import combinations
from random import Random
from typing import Any

import numpy as np

from fuzz.target import FindingError, Mutate, Target
from service.errors import ServiceError
from service.protocols.open_inference import (
    DATATYPES,
    HEADER_LENGTH,
    InferRequest,
    InferResponse,
    Tensor,
    decode,
    encode,
    raw_bytes,
)

MAX_BYTES = 8192
CODES = ("malformed_request", "option_unsupported")


def check(case: bytes) -> None:
    length, _, body = case.partition(b"\n")
    try:
        request = decode(body, None if length == b"-" else length.decode("latin-1"))
    except ServiceError as error:
        if error.code not in CODES or len(error.message) > 500 or "\n" in error.message:
            raise FindingError(f"{error.code}: {error.message!r}") from error
        json.dumps(error.message).encode()
        return
    _bounded(request, len(body))
    tensors = list(request.inputs.values())
    _same(tensors, binary=True)
    _same([one for one in tensors if one.datatype != "BYTES" and _finite(one)], binary=False)


def _bounded(request: InferRequest, size: int) -> None:
    """No tensor is larger than the bytes that made it, and no two lie in the same bytes."""
    for one in request.inputs.values():
        # Two bytes of JSON make one element of up to eight.
        if one.data.nbytes > 8 * size or one.data.size > size:
            raise FindingError(f"{one.datatype} of shape {one.shape} came out of {size} bytes.")
    for one, other in combinations(request.inputs.values(), 2):
        if np.may_share_memory(one.data, other.data) and one.data.size and other.data.size:
            raise FindingError(f"Inputs {one.name!r} and {other.name!r} lie in the same bytes.")


def _same(tensors: list[Tensor], *, binary: bool) -> None:
    """What is encoded and decoded again is what it was."""
    asked = InferRequest({}, binary_output=binary)
    body, headers = encode(InferResponse("model", "1", tensors), asked)
    split = int(headers.get(HEADER_LENGTH, len(body)))
    message = json.dumps({"inputs": json.loads(body[:split])["outputs"]}).encode()
    again = decode(message + body[split:], str(len(message)))
    if list(again.inputs) != [one.name for one in tensors]:
        raise FindingError(f"{[one.name for one in tensors]} became {list(again.inputs)}.")
    for one in tensors:
        other = again.inputs[one.name]
        if (one.datatype, one.shape, raw_bytes(one)) != (other.datatype, other.shape, raw_bytes(other)):
            raise FindingError(f"{one!r} became {other!r}.")


def _finite(one: Tensor) -> bool:
    return bool(np.isfinite(one.data).all())


# --- cases that are almost right ---------------------------------------------------------------------------


_SIZES = (0, 1, 2, 3, 4, 8, -1, 2**31 - 1, 2**31, 2**32, 2**34, 2**62, 2**63, 2**64, 10**30, 1.5, "4", None, True)
_NAMES = ("images", "image_bytes", "target", "quantile", "gamma", "", "a" * 300, "\u00e9\n", "images")
_PARAMETERS = ("binary_data_size", "binary_data", "binary_data_output", "shared_memory_region", "classification", "x")
_VALUES: tuple[Any, ...] = (
    0, 1, -1, 255, 256, 2**63, -(2**63) - 1, 2**64, 10**400, 1e308, 1e39, 0.1, True, None, "text", "\u00e9", "", [],
    [1], [[1], [2]], [[1], 2], {}, {"a": 1},
)  # fmt: skip


def mutate(plain: Mutate) -> Mutate:
    """The JSON is changed one member at a time, and the lengths around it are made right again, or almost."""

    def mutated(case: bytes, most: int, random: Random) -> bytes:
        return changed(case, most, random)[:most]

    def changed(case: bytes, most: int, random: Random) -> bytes:
        length, _, body = case.partition(b"\n")
        split = int(length) if length.isdigit() and len(length) < 6 else len(body)
        try:
            message = json.loads(body[:split])
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict) or random.random() < 0.25:
            return plain(case, most, random)
        raw = body[split:]
        for _ in range(random.randrange(3)):
            _change(message, random)
        if raw and random.random() < 0.3:
            raw = plain(raw, most, random)
        raw = _fitted(message, raw, random)
        header = json.dumps(message).encode()
        told = len(header) + (random.choice((-1, 1, 10**6)) if random.random() < 0.1 else 0)
        return (b"-" if not raw and random.random() < 0.3 else str(told).encode()) + b"\n" + header + raw

    return mutated


def _change(message: dict[str, Any], random: Random) -> None:
    listed = [one for one in (message.get("inputs"), message.get("outputs")) if isinstance(one, list)]
    tensors = [one for group in listed for one in group if isinstance(one, dict)]
    if not tensors or random.random() < 0.2:
        message[random.choice(("inputs", "outputs", "id", "parameters", "model_name", "x"))] = _value(random)
        return
    one = random.choice(tensors)
    match random.randrange(9):
        case 0:
            random.choice(listed).append(deepcopy(one))
        case 1:
            one["name"] = random.choice(_NAMES)
        case 2:
            one["datatype"] = random.choice((*DATATYPES, "BF16", "", 1))
        case 3 if isinstance(one.get("shape"), list):
            one["shape"].insert(random.randrange(len(one["shape"]) + 1), random.choice(_SIZES))
        case 4 if one.get("shape") and isinstance(one["shape"], list):
            one["shape"][random.randrange(len(one["shape"]))] = random.choice(_SIZES)
        case 5 if isinstance(one.get("data"), list):
            one["data"].insert(random.randrange(len(one["data"]) + 1), _value(random))
        case 6:
            one["data"] = _value(random)
        case 7:
            one.pop(random.choice(list(one) or ["name"]), None)
        case _:
            parameters = one.get("parameters")
            one["parameters"] = {**parameters} if isinstance(parameters, dict) else {}
            one["parameters"][random.choice(_PARAMETERS)] = random.choice((random.choice(_SIZES), _value(random)))


def _value(random: Random) -> Any:
    return deepcopy(random.choice(_VALUES))


def _fitted(message: dict[str, Any], raw: bytes, random: Random) -> bytes:
    """The last raw input's declared size made what is left, so that the case comes further."""
    inputs = message.get("inputs")
    binary = [
        one["parameters"]
        for one in (inputs if isinstance(inputs, list) else ())
        if isinstance(one, dict) and isinstance(one.get("parameters"), dict) and "binary_data_size" in one["parameters"]
    ]
    if binary and random.random() < 0.5:
        taken = [one["binary_data_size"] for one in binary[:-1]]
        if all(type(size) is int and 0 <= size < MAX_BYTES for size in taken):
            raw += bytes(max(0, sum(taken) - len(raw)))
            binary[-1]["binary_data_size"] = len(raw) - sum(taken)
    return raw


# --- the start corpus --------------------------------------------------------------------------------------


def _case(*inputs: dict[str, Any], raw: bytes = b"", **message: Any) -> bytes:
    header = json.dumps({"inputs": inputs, **message}).encode()
    return f"{len(header)}\n".encode() + header + raw


def _binary(name: str, datatype: str, shape: list[int], size: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}


def seeds() -> Iterator[tuple[str, bytes]]:
    elements = b"".join(struct.pack("<I", len(text)) + text for text in (b"GIF89a", b"", b"\xff\xd8\0"))
    for datatype in DATATYPES:
        if datatype == "BYTES":
            yield "raw_BYTES", _case(_binary("x", datatype, [3], len(elements)), raw=elements)
            yield "json_BYTES", _case({"name": "x", "datatype": datatype, "shape": [2], "data": ["a", "\u00e9"]})
            continue
        size = 1 if datatype == "BOOL" else int("".join(filter(str.isdigit, datatype))) // 8
        yield f"raw_{datatype}", _case(_binary("x", datatype, [2, 3], 6 * size), raw=bytes([1, 0] * 3 * size))
        data = [True, False] if datatype == "BOOL" else [1, 0]
        yield f"json_{datatype}", _case({"name": "x", "datatype": datatype, "shape": [1, 2], "data": [data]})
    image = _binary("images", "FP32", [1, 3, 2, 2], 48)
    target = {"name": "target", "datatype": "INT64", "shape": [1], "data": [-1]}
    gamma = _binary("gamma", "FP32", [1], 4)
    yield "infer", _case(image, target, gamma, raw=bytes(48) + struct.pack("<f", float("inf")), id="42")
    yield "outputs", _case(image, raw=bytes(48), outputs=[{"name": "logits", "parameters": {"binary_data": True}}])
    yield "all_binary", _case(image, raw=bytes(48), parameters={"binary_data_output": True})
    yield "empty_side", _case(_binary("images", "FP32", [0, 3, 2, 2], 0))
    yield "scalar", _case({"name": "x", "datatype": "FP64", "shape": [], "data": [0.1]})
    yield "no_length", b"-\n" + _case(target).partition(b"\n")[2]
    yield "flat", _case({"name": "x", "datatype": "UINT8", "shape": [2, 2], "data": [1, 2, 3, 4]})
    # What lies.
    yield "length_too_long", b"9999\n" + _case(target).partition(b"\n")[2]
    yield "length_negative", b"-1\n" + _case(target).partition(b"\n")[2]
    yield "length_of_many_digits", b"9" * 5000 + b"\n" + _case(target).partition(b"\n")[2]
    yield "size_too_large", _case(_binary("images", "FP32", [1, 3, 2, 2], 480), raw=bytes(48))
    yield "size_negative", _case(_binary("images", "FP32", [1, 3, 2, 2], -48), raw=bytes(48))
    yield "shape_negative", _case(_binary("images", "FP32", [-1, -3, 2, 2], 48), raw=bytes(48))
    yield "shape_huge", _case(_binary("images", "FP32", [2**62, 4], 0))
    yield "shape_wraps", _case(_binary("images", "UINT8", [2**32, 2**32], 0))
    yield "rank_huge", _case(_binary("images", "UINT8", [1] * 100, 1), raw=b"\0")
    yield "bytes_left", _case(image, raw=bytes(49))
    yield "same_bytes", _case(image, _binary("other", "FP32", [1, 3, 2, 2], 48), raw=bytes(48))
    yield "same_name", _case(image, image, raw=bytes(96))
    yield "element_too_long", _case(_binary("image_bytes", "BYTES", [1], 8), raw=b"\xff\xff\xff\xffabcd")
    yield "element_missing", _case(_binary("image_bytes", "BYTES", [2], 8), raw=b"\x04\0\0\0abcd")
    yield "shared_memory", _case({**target, "parameters": {"shared_memory_region": "r"}})
    yield "deep", b"-\n" + b'{"inputs":' + b"[" * 2000
    yield "two_forms", _case({**image, "data": [0] * 12}, raw=bytes(48))


TARGET = Target(check, seeds, max_bytes=MAX_BYTES, mutate=mutate)
