"""The Open Inference Protocol's protobuf messages <-> the neutral ones of open_inference.py. Knows no model."""

from collections.abc import Mapping
from typing import Any

from tritonclient.grpc import service_pb2

from service.errors import ServiceError
from service.protocols.open_inference import (
    MAX_JSON_ELEMENTS,
    InferRequest,
    InferResponse,
    Parameters,
    Tensor,
    listed_tensor,
    raw_bytes,
    raw_tensor,
)

# Where the protocol lets a tensor's elements stand, by datatype; FP16 has no such place.
CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
FIELD_OF_TYPE = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}


def decode(message: "service_pb2.ModelInferRequest") -> InferRequest:
    """A ModelInferRequest's tensors, outputs and parameters; raw contents are not copied.

    Raises ServiceError(malformed_request), or option_unsupported for shared memory and classification.
    """
    for one in (*message.inputs, *message.outputs):
        for name in one.parameters:
            raise ServiceError("option_unsupported", f"Tensor {one.name[:64]!r}: {name[:64]!r} is not supported.")
    for kind, tensors in (("Input", message.inputs), ("Output", message.outputs)):
        names = [one.name for one in tensors]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise _malformed(f"{kind} {twice[:64]!r} is given twice.")
    inputs = _raw_inputs(message) if message.raw_input_contents else _typed_inputs(message)
    return InferRequest(
        inputs={tensor.name: tensor for tensor in inputs},
        outputs={one.name: True for one in message.outputs},
        binary_output=True,
        id=message.id,
        parameters=parameters(message.parameters),
    )


def _raw_inputs(message: "service_pb2.ModelInferRequest") -> list[Tensor]:
    raw = message.raw_input_contents
    if len(raw) != len(message.inputs) or any(one.HasField("contents") for one in message.inputs):
        raise _malformed(
            f"The request has {len(message.inputs)} inputs and {len(raw)} raw_input_contents; "
            "allowed: one for each input and no contents, or none at all."
        )
    return [raw_tensor(one.name, one.datatype, one.shape, data) for one, data in zip(message.inputs, raw, strict=True)]


def _typed_inputs(message: "service_pb2.ModelInferRequest") -> list[Tensor]:
    # Before any list is made of them: an element costs a list several times what it costs the message.
    elements = sum(len(values) for one in message.inputs for _, values in one.contents.ListFields())
    if elements > MAX_JSON_ELEMENTS:
        raise _malformed(
            f"The inputs have {elements} elements in contents; at most {MAX_JSON_ELEMENTS} are read: "
            "send raw_input_contents."
        )
    return [_typed_tensor(one) for one in message.inputs]


def _typed_tensor(one: "service_pb2.ModelInferRequest.InferInputTensor") -> Tensor:
    expected = CONTENTS.get(one.datatype)
    for field, _ in one.contents.ListFields():
        if field.name != expected:
            raise _malformed(
                f"Input {one.name[:64]!r} is {one.datatype[:64]} and has {field.name}; "
                f"allowed: {expected or 'raw_input_contents'}."
            )
    values = list(getattr(one.contents, expected)) if expected else []
    return listed_tensor(one.name, one.datatype, one.shape, values)


def parameters(given: "Mapping[str, service_pb2.InferParameter]") -> dict[str, bool | int | float | str]:
    """The value of each parameter. Raises ServiceError(malformed_request) where one has none."""
    values = {}
    for name, parameter in given.items():
        field = parameter.WhichOneof("parameter_choice")
        if field is None:
            raise _malformed(f"Parameter {name[:64]!r} has no value.")
        values[name] = getattr(parameter, field)
    return values


def encode(response: InferResponse) -> "service_pb2.ModelInferResponse":
    """The answer, all outputs as raw contents."""
    return service_pb2.ModelInferResponse(
        model_name=response.model_name,
        model_version=response.model_version,
        id=response.id,
        parameters=_parameters(response.parameters),
        outputs=[{"name": one.name, "datatype": one.datatype, "shape": one.shape} for one in response.outputs],
        raw_output_contents=[raw_bytes(one) for one in response.outputs],
    )


def _parameters(given: Parameters) -> dict[str, Any]:
    return {name: service_pb2.InferParameter(**{FIELD_OF_TYPE[type(value)]: value}) for name, value in given.items()}


def _malformed(message: str) -> ServiceError:
    return ServiceError("malformed_request", message)
