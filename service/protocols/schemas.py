"""The messages of the Open Inference Protocol (V2) and of V1 as types, for the OpenAPI document; parses nothing.

What is read and written is `open_inference.py`'s and `kserve_v1.py`'s; the tests hold these types to it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.schemas import AnyExplanation, ModelIdentity, Prediction, Software

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64",
    "BYTES",
]  # fmt: skip
Parameters = dict[str, bool | int | float | str]
Side = Annotated[int, Field(ge=0)]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ProtocolError(Message):
    """The body of every status of 400 and above on the protocols' routes."""

    error: str


class ServerMetadata(Message):
    name: str
    version: str
    extensions: list[str]


class Health(Message):
    live: bool
    ready: bool


class TensorMetadata(Message):
    """`shape` begins with the batch dimension; -1 is any size."""

    name: str
    datatype: Datatype
    shape: list[int]


class ModelMetadata(Message):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(Message):
    name: str
    ready: bool


class InferInput(Message):
    """`data` flat or nested as `shape` is, or `binary_data_size` in `parameters` for raw bytes behind the JSON."""

    name: str
    datatype: Datatype
    shape: Annotated[list[Side], Field(max_length=16)]
    parameters: Parameters | None = None
    data: list[Any] | None = None


class RequestedOutput(Message):
    name: str
    parameters: Parameters | None = None


class InferRequest(Message):
    """One of the inputs `images` (FP32) and `image_bytes` (BYTES; base64 in JSON); options as `parameters`.

    Outputs are computed only if asked for; none named is all of them.
    """

    id: str | None = None
    model_name: str | None = None
    parameters: Parameters | None = None
    inputs: Annotated[list[InferInput], Field(min_length=1)]
    outputs: list[RequestedOutput] | None = None


class InferOutput(Message):
    """`data` row by row, null where there is no number; or `binary_data_size` in `parameters`."""

    name: str
    datatype: Datatype
    shape: list[int]
    parameters: Parameters | None = None
    data: list[float | None] | None = None


class InferResponse(Message):
    model_name: str
    model_version: str
    id: str | None = None
    parameters: Parameters | None = None
    outputs: list[InferOutput]


class IndexRequest(Message):
    """`ready`: only what serves."""

    ready: bool = False


class IndexEntry(Message):
    name: str
    version: str
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str


class ChangeRequest(Message):
    """Of Triton's parameters only `unload_dependents` is known, and without meaning: no model depends on another."""

    parameters: dict[Literal["unload_dependents"], Any] = {}


class V1Models(Message):
    models: list[str]


class V1PredictAnswer(Message):
    """`predictions`: of each instance its most probable classes."""

    model: ModelIdentity
    software: Software
    predictions: list[list[Prediction]]


class V1ExplainAnswer(V1PredictAnswer):
    """`explanations`: of each instance its map, or a list of maps where it said `top:k`."""

    explanations: list[AnyExplanation | list[AnyExplanation]]
