"""The V2 codec: what the stock client writes is read, what we write it reads, and nothing that lies gets through."""

import json
import re
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from service.errors import ServiceError
from service.protocols import open_inference
from service.protocols.open_inference import (
    DATATYPES,
    MAX_BYTES_ELEMENTS,
    MAX_JSON_BYTES,
    MAX_JSON_ELEMENTS,
    MAX_JSON_SIGNS,
    InferRequest,
    InferResponse,
    Tensor,
    decode,
    encode,
    raw_tensor,
)


def told(body: bytes, header_length: str | None = None, code: str = "malformed_request") -> str:
    """The error's message."""
    with pytest.raises(ServiceError) as caught:
        decode(body, header_length)
    assert caught.value.code == code
    return caught.value.message


def described(**fields: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": "FP32", "shape": [2]} | fields


def as_json(*inputs: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **fields}).encode()


def with_raw(raw: bytes, *inputs: dict[str, Any], **fields: Any) -> tuple[bytes, str]:
    header = as_json(*inputs, **fields)
    return header + raw, str(len(header))


def sent(*inputs: InferInput, outputs: list[InferRequestedOutput] | None = None, **fields: Any) -> InferRequest:
    """What the stock client writes, as we read it."""
    body, length = InferenceServerClient.generate_request_body(list(inputs), outputs=outputs, **fields)
    return decode(body, None if length is None else str(length))


def infer_input(name: str, data: np.ndarray, *, binary: bool) -> InferInput:
    made = InferInput(name, list(data.shape), np_to_triton_dtype(data.dtype))
    made.set_data_from_numpy(data, binary_data=binary)
    return made


# --- round trips -------------------------------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn) -> np.ndarray:
    dtype = np.dtype(triton_to_np_dtype(draw(st.sampled_from(DATATYPES))))
    shape = draw(arrays.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5))
    if dtype != np.object_:
        finite = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
        return draw(arrays.arrays(dtype, shape, elements=arrays.from_dtype(dtype, **finite)))
    text = st.text(st.characters(exclude_categories=("Cs",)), max_size=9).map(str.encode)
    return draw(arrays.arrays(dtype, shape, elements=text))


def same(read: Tensor, written: np.ndarray) -> None:
    assert read.shape == written.shape
    assert read.datatype == np_to_triton_dtype(written.dtype)
    assert read.data.dtype == written.dtype
    assert read.data.tolist() == written.tolist()


@settings(deadline=None)
@given(st.lists(st.tuples(tensors(), st.booleans()), max_size=4), st.text(max_size=9))
def test_what_the_stock_client_writes_is_read(ways: list[tuple[np.ndarray, bool]], identifier: str) -> None:
    inputs = [infer_input(f"x{i}", data, binary=binary) for i, (data, binary) in enumerate(ways)]
    request = sent(*inputs, request_id=identifier)
    assert request.id == identifier
    assert list(request.inputs) == [f"x{i}" for i in range(len(ways))]
    for tensor, (data, _) in zip(request.inputs.values(), ways, strict=True):
        same(tensor, data)


@settings(deadline=None)
@given(st.lists(st.tuples(tensors(), st.booleans()), max_size=4), st.text(max_size=9))
def test_what_is_written_the_stock_client_reads(given: list[tuple[np.ndarray, bool]], identifier: str) -> None:
    given = [(data, binary or data.dtype == np.object_) for data, binary in given]  # no output of ours is BYTES
    outputs = [Tensor(f"y{i}", np_to_triton_dtype(data.dtype), data) for i, (data, _) in enumerate(given)]
    request = InferRequest({}, {f"y{i}": binary for i, (_, binary) in enumerate(given)})
    body, headers = encode(InferResponse("m", "3", outputs, identifier, {"status": "ok"}), request)
    length = headers.get("Inference-Header-Content-Length")
    result = InferenceServerClient.parse_response_body(body, header_length=length and int(length))
    answer = result.get_response()
    assert (answer["model_name"], answer["model_version"], answer["parameters"]) == ("m", "3", {"status": "ok"})
    assert answer.get("id", "") == identifier
    for tensor in outputs:
        assert result.as_numpy(tensor.name).tolist() == tensor.data.tolist()


@pytest.mark.parametrize("values", [np.array([0.1, -3e38, 1e-45], np.float32), np.array([np.nan, np.inf], np.float32)])
def test_binary_outputs_keep_every_bit(values: np.ndarray) -> None:
    body, headers = encode(InferResponse("m", "1", [Tensor("y", "FP32", values)]), InferRequest({}, binary_output=True))
    result = InferenceServerClient.parse_response_body(
        body, header_length=int(headers["Inference-Header-Content-Length"])
    )
    assert result.as_numpy("y").tobytes() == values.tobytes()


def test_nan_is_null_in_json() -> None:
    body, headers = encode(
        InferResponse("m", "1", [Tensor("y", "FP32", np.array([np.nan, 0.5, np.inf], np.float32))]), InferRequest({})
    )
    assert headers == {"Content-Type": "application/json"}
    assert json.loads(body)["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [3], "data": [None, 0.5, None]}]


def test_nested_json_is_read_as_flat_is() -> None:
    nested = decode(as_json(described(shape=[2, 1, 3], data=[[[1, 2, 3]], [[4, 5, 6]]])))
    flat = decode(as_json(described(shape=[2, 1, 3], data=[1, 2, 3, 4, 5, 6])))
    assert nested.inputs["x"].data.tolist() == flat.inputs["x"].data.tolist() == [[[1, 2, 3]], [[4, 5, 6]]]


def test_a_string_in_json_is_text_and_raw_bytes_are_not() -> None:
    data = np.array([b"\xc3\xa9", b""], np.object_)
    assert sent(infer_input("x", data, binary=False)).inputs["x"].text
    assert not sent(infer_input("x", data, binary=True)).inputs["x"].text


def test_raw_numbers_are_not_copied() -> None:
    """A request of many images is held in memory once."""
    body, length = with_raw(bytes(4_000_000), described(shape=[1_000_000], parameters={"binary_data_size": 4_000_000}))
    tracemalloc.start()
    try:
        decode(bytearray(body), length)  # the copy of the body itself is the 4 MB
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


# --- what is asked for -------------------------------------------------------------------------------------


def test_outputs_are_asked_for_by_name_each_in_its_form() -> None:
    request = decode(
        as_json(
            outputs=[{"name": "a", "parameters": {"binary_data": True}}, {"name": "b"}],
            parameters={"binary_data_output": False, "quantile": 0.2},
        )
    )
    assert request.outputs == {"a": True, "b": False}
    assert request.parameters == {"quantile": 0.2}
    assert [request.wants(name) for name in "abc"] == [True, True, False]


def test_the_default_form_holds_where_an_output_names_none() -> None:
    request = decode(
        as_json(
            outputs=[{"name": "a", "parameters": {"binary_data": False}}, {"name": "b"}],
            parameters={"binary_data_output": True},
        )
    )
    assert request.outputs == {"a": False, "b": True}


def test_without_outputs_everything_is_wanted() -> None:
    request = sent(infer_input("x", np.zeros(1, np.float32), binary=True))
    assert request.binary_output
    assert request.outputs == {}
    assert request.wants("anything")


# --- what lies ---------------------------------------------------------------------------------------------

RAW = {"binary_data_size": 8}
HOSTILE = {
    "not json": (b"{", None, "not JSON"),
    "empty": (b"", None, "not JSON"),
    "not an object": (b"[]", None, "valid dictionary"),
    "not utf-8": (b'{"id": "\xff"}', None, "not JSON"),
    "lone surrogate": (rb'{"id": "\ud800", "inputs": []}', None, "not JSON"),
    "deep nesting": (b'{"inputs":' + b"[" * 10_000, None, "recursion limit"),
    "nan": (b'{"inputs": [{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}]}', None, "no NaN"),
    "infinity": (b'{"inputs": [{"name":"x","datatype":"FP32","shape":[1],"data":[Infinity]}]}', None, "no NaN"),
    "huge number": (b'{"inputs": [{"name":"x","datatype":"FP32","shape":[1],"data":[1e999]}]}', None, "does not hold"),
    "5000 digits": (b'{"inputs": ' + b"9" * 5000 + b"}", None, "not JSON"),
    "no inputs": (b"{}", None, "inputs: Field required"),
    "unknown field": (as_json(surprise=1), None, "surprise: Extra inputs"),
    "input's unknown field": (as_json(described(data=[1, 2], contents=[])), None, "inputs.0.contents"),
    "nested parameter": (as_json(parameters={"layers": ["a"]}), None, "parameters.layers"),
    "id is a number": (as_json(id=3), None, "id: "),
    "name is a number": (as_json(described(name=3)), None, "inputs.0.name"),
    "header length negative": (b"{}", "-1", "Content-Length is '-1'"),
    "header length beyond the body": (b"{}", "3", "allowed: 0..2"),
    "header length not a number": (b"{}", "2.0", "allowed: 0..2"),
    "header length empty": (b"{}", "", "allowed: 0..2"),
    "header length in other digits": (b"{}", "²", "allowed: 0..2"),
    "header length cuts the json": (as_json(described(data=[1, 2])), "9", "not JSON"),
    "two of one name": (as_json(described(data=[1, 2]), described(data=[1, 2])), None, "Input 'x' is given twice"),
    "two outputs of one name": (as_json(outputs=[{"name": "y"}, {"name": "y"}]), None, "Output 'y' is given twice"),
    "no data": (as_json(described()), None, "one of them only"),
    "data twice": (*with_raw(bytes(8), described(data=[1, 2], parameters=RAW)), "one of them only"),
    "declares more than there is": (*with_raw(bytes(7), described(parameters=RAW)), "7 bytes are left"),
    "the second takes the first's": (
        *with_raw(bytes(8), described(parameters=RAW), described(name="z", parameters=RAW)),
        "'z' declares binary_data_size 8; 0 bytes are left",
    ),
    "left over": (*with_raw(bytes(9), described(parameters=RAW)), "1 bytes that belong to no input"),
    "raw without a taker": (*with_raw(b"\0", described(data=[1, 2])), "1 bytes that belong to no input"),
    "size against shape": (*with_raw(bytes(8), described(shape=[3], parameters=RAW)), "12 bytes; it carries 8"),
    "size negative": (*with_raw(b"", described(parameters={"binary_data_size": -8})), "binary_data_size -8"),
    "size true": (*with_raw(b"", described(parameters={"binary_data_size": True})), "binary_data_size True"),
    "size a float": (*with_raw(bytes(8), described(parameters={"binary_data_size": 8.0})), "binary_data_size 8.0"),
    "size huge": (*with_raw(b"", described(parameters={"binary_data_size": 10**30})), "0 bytes are left"),
    "side negative": (as_json(described(shape=[-1], data=[])), None, "inputs.0.shape.0: .*greater than or equal to 0"),
    "side a float": (as_json(described(shape=[2.0], data=[1, 2])), None, "inputs.0.shape.0"),
    "side true": (as_json(described(shape=[True], data=[1])), None, "inputs.0.shape.0"),
    "side huge": (as_json(described(shape=[2**63], data=[])), None, "inputs.0.shape.0"),
    "sides' product overflows": (as_json(described(shape=[2**32] * 2, data=[])), None, "more than"),
    "sides' product with a zero": (
        *with_raw(b"", described(shape=[0, *[2**33] * 3], parameters={"binary_data_size": 0})),
        "more than",
    ),
    "too many sides": (as_json(described(shape=[1] * 40, data=[1])), None, "inputs.0.shape"),
    "too many inputs": (as_json(*[1] * 65), None, "inputs: List should have at most 64 items"),
    "too many outputs": (as_json(outputs=[1] * 65), None, "outputs: List should have at most 64 items"),
    "too few elements": (as_json(described(data=[1])), None, "not 2 elements"),
    "ragged": (as_json(described(shape=[2, 2], data=[[1], [2, 3, 4]])), None, "not 4 elements of shape"),
    "nested too deep": (as_json(described(data=[[1], [2]])), None, "element that is list"),
    "nested and flat": (as_json(described(data=[1, [2]])), None, "an element that is list"),
    "data is text": (as_json(described(data="ab")), None, "not 2 elements"),
    "unknown datatype": (as_json(described(datatype="FP8", data=[1, 2])), None, "'FP8'; allowed: BOOL"),
    "text for numbers": (as_json(described(data=["1", "2"])), None, "is FP32 and has an element that is str"),
    "true for a number": (as_json(described(data=[True, 1])), None, "element that is bool"),
    "null for a number": (as_json(described(data=[None, 1])), None, "element that is NoneType"),
    "fraction for an integer": (as_json(described(datatype="INT64", data=[1.5, 1])), None, "element that is float"),
    "number for text": (as_json(described(datatype="BYTES", data=[1, 2])), None, "element that is int"),
    "integer out of range": (as_json(described(datatype="UINT8", data=[256, 1])), None, "UINT8 does not hold"),
    "negative unsigned": (as_json(described(datatype="UINT64", data=[-1, 1])), None, "UINT64 does not hold"),
    "integer beyond 64 bits": (as_json(described(datatype="INT64", data=[2**70, 1])), None, "INT64 does not hold"),
    "integer beyond float64": (as_json(described(data=[10**400, 1])), None, "FP32 does not hold"),
    "number beyond float32": (as_json(described(data=[1e39, 1])), None, "FP32 does not hold"),
    "bool of 2": (*with_raw(bytes([2] * 8), described(datatype="BOOL", shape=[8], parameters=RAW)), "than 0 and 1"),
    "binary not a flag": (as_json(outputs=[{"name": "y", "parameters": {"binary_data": 1}}]), None, "true or false"),
    "input's parameter": (as_json(described(data=[1, 2], parameters={"content_type": "a"})), None, "'content_type'"),
}  # fmt: skip
RAW_BYTES = {  # elements of shape [2]
    "element's length lies": b"\x01\0\0\0a\xff\xff\xff\xff",
    "length cut off": b"\x01\0\0\0a\x01\0",
    "one too few": b"\x01\0\0\0a",
    "one too many": b"\0\0\0\0" * 3,
    "nothing": b"",
}
HOSTILE |= {
    name: (*with_raw(raw, described(datatype="BYTES", parameters={"binary_data_size": len(raw)})), "passes|behind")
    for name, raw in RAW_BYTES.items()
}


@pytest.mark.parametrize("case", HOSTILE, ids=lambda name: name.replace(" ", "-"))
def test_what_lies_is_refused_by_name(case: str) -> None:
    body, length, expected = HOSTILE[case]
    message = told(body, length)
    assert re.search(expected, message), message
    assert len(message) < 500


@pytest.mark.parametrize("name", ["shared_memory_region", "shared_memory_byte_size"])
def test_shared_memory_is_not_supported(name: str) -> None:
    assert name in told(as_json(described(parameters={name: 1})), code="option_unsupported")


def test_classification_is_not_supported() -> None:
    outputs = [{"name": "y", "parameters": {"classification": 3}}]
    assert "classification" in told(as_json(outputs=outputs), code="option_unsupported")


def test_json_tensors_are_capped_together_and_binary_is_named() -> None:
    half = MAX_JSON_ELEMENTS // 2
    fits = described(name="a", datatype="INT8", shape=[half], data=[0] * half)
    assert decode(as_json(fits)).inputs["a"].data.size == half
    more = described(name="b", datatype="INT8", shape=[half + 1], data=[0] * (half + 1))
    assert "send binary data" in told(as_json(fits, more))
    assert "send binary data" in told(b" " * (MAX_JSON_BYTES + 1))


@pytest.mark.parametrize("sign", MAX_JSON_SIGNS)
def test_json_that_costs_much_to_parse_is_not_parsed(sign: bytes) -> None:
    """It is not JSON either, which a parser would have said."""
    assert "send binary data" in told(sign * (MAX_JSON_SIGNS[sign] + 1))
    assert "not JSON" in told(sign * MAX_JSON_SIGNS[sign])


def test_json_outputs_are_capped_and_binary_is_named() -> None:
    response = InferResponse("m", "1", [Tensor("y", "INT8", np.zeros(MAX_JSON_ELEMENTS + 1, np.int8))])
    with pytest.raises(ServiceError, match="ask for binary data"):
        encode(response, InferRequest({}))
    assert encode(response, InferRequest({}, {"y": True}))


def test_a_declared_size_allocates_nothing() -> None:
    body, length = with_raw(
        b"", described(shape=[2**31], parameters={"binary_data_size": 2**33}), described(shape=[2**31], data=[])
    )
    tracemalloc.start()
    try:
        told(body, length)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_bytes_of_many_empty_elements_are_capped() -> None:
    raw = bytes(4 * (MAX_BYTES_ELEMENTS + 1))
    with pytest.raises(ServiceError, match=f"at most {MAX_BYTES_ELEMENTS}"):
        raw_tensor("x", "BYTES", [MAX_BYTES_ELEMENTS + 1], raw)
    with pytest.raises(ServiceError, match="behind its 1 elements"):  # and what the shape does not name is not made
        raw_tensor("x", "BYTES", [1], raw)


VALID, VALID_LENGTH = with_raw(
    b"\x02\0\0\0ab" + bytes(8),
    described(name="b", datatype="BYTES", shape=[1], parameters={"binary_data_size": 6}),
    described(name="f", shape=[1, 2], parameters={"binary_data_size": 8}),
    described(name="j", datatype="INT64", data=[[1], [2]], shape=[2, 1]),
    id="1", outputs=[{"name": "y", "parameters": {"binary_data": True}}], parameters={"binary_data_output": False},
)  # fmt: skip


@settings(deadline=None, max_examples=500)
@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(max_size=3)), max_size=4),
    st.one_of(st.just(VALID_LENGTH), st.integers(-5, len(VALID) + 5).map(str), st.text(max_size=4), st.none()),
)
def test_any_bytes_are_a_request_or_refused(edits: list[tuple[int, bytes]], length: str | None) -> None:
    """Each edit puts its bytes in the place of one; nothing but a ServiceError may come out."""
    body = bytearray(VALID)
    for place, replacement in edits:
        body[place : place + 1] = replacement
    try:
        request = decode(body, length)
    except ServiceError:
        return
    assert all(isinstance(tensor, Tensor) for tensor in request.inputs.values())


def test_the_valid_request_is_read() -> None:
    """The one that the test above mutates."""
    request = decode(VALID, VALID_LENGTH)
    assert request.inputs["b"].data.tolist() == [b"ab"]
    assert request.inputs["f"].data.tolist() == [[0.0, 0.0]]
    assert request.inputs["j"].data.tolist() == [[1], [2]]
    assert request.outputs == {"y": True}


def test_importing_the_codec_brings_neither_torch_nor_gevent() -> None:
    import subprocess
    import sys

    heavy = ("torch", "gevent", "grpc")
    code = f"import sys, service.protocols.open_inference; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert open_inference.__doc__
