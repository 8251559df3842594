"""Examples of what is sent and answered, for the OpenAPI document; each is an instance of its type.

The answers about `squeezenet1_1` are real ones of SqueezeNet 1.1 to a photograph of a spaniel, shortened.
"""

import re
from typing import Any

from pydantic import BaseModel

from parchgrad import __version__
from service.protocols import schemas as protocol
from service.schemas import (
    ErrorBody,
    ExplainAnswer,
    ExplainResult,
    ExplanationAnswer,
    FailedAnswer,
    MissingExplanation,
    ModelAnswer,
    ModelEntry,
    ModelIdentity,
    ModelListing,
    PredictAnswer,
    Prediction,
    PredictResult,
    Quality,
    Software,
    Transform,
    option_bounds,
    option_defaults,
)

Examples = dict[str, dict[str, Any]]

# One sentence of each code, as a caller may read it.
MESSAGES = {
    "malformed_request": "The multipart body ends before its last boundary.",
    "no_image": "The request carries no file part named 'image'.",
    "image_empty": "The image has no bytes.",
    "image_truncated": "The image ends before its data does.",
    "image_corrupt": "The image cannot be decoded.",
    "unauthorized": "A key is needed: 'Authorization: Bearer TOKEN' or 'X-API-Key: TOKEN'.",
    "forbidden": "Key 'camera' may not load or unload models.",
    "not_found": "There is nothing at '/explian'.",
    "unknown_model": "There is no model 'resnet'; there is 'squeezenet1_1'.",
    "unknown_version": "Model 'squeezenet1_1' has no version '7'; it has '1'.",
    "method_not_allowed": "The method is not allowed at '/explain'.",
    "not_acceptable": "image/png answers one map of one image; use application/json.",
    "load_failed": "Model 'squeezenet1_1' was not loaded: its golden map did not match.",
    "body_too_large": "The body passes 320131072 bytes, the most that are accepted.",
    "too_many_images": "A request may carry at most 16 images.",
    "image_too_many_bytes": "The image has more than 20000000 bytes, the most that are accepted.",
    "image_too_many_pixels": "The image has 60000 x 60000 pixels; at most 50000000 are accepted.",
    "image_too_complex": "The image has too many scans.",
    "content_type_unsupported": "Content-Encoding is not supported; send the body as it is.",
    "image_unsupported": "The image is of no format that is decoded.",
    "unknown_field": "Field 'quantil' is not an option of /explain; its options are top_k, timeout_ms, and so on.",
    "option_unsupported": "Parameter 'priority' is 3; requests have no sequence and no priority.",
    "option_invalid": "Option 'quantile' is '2'; allowed: a number in (0, 1].",
    "unknown_class": "Option 'target' is 'unicorn'; allowed: an index in 0..999 or a class name, such as 'tench'.",
    "target_not_in_table": "Table 'squeezenet1_1' has no row for class 152 (Japanese spaniel); it covers 10 of 1000 "
    "classes. selection=instance needs no row.",
    "map_not_finite": "The map overflows float32 under these options; gamma may be too large.",
    "queue_full": "256 images or maps are waiting, the most is 256.",
    "rate_limited": "Key 'camera' has used its 60 requests a minute.",
    "client_closed_request": "The client went away.",
    "internal": "The service failed on this request; its log says why.",
    "not_ready": "The model is still loading.",
    "map_shed": "More than 128 images or maps are waiting.",
    "out_of_memory": "The device has not the memory for 1 images.",
    "audit_unavailable": "The audit log cannot be written.",
    "storage_full": "The service's disk has no room for the images of this request.",
    "deadline_exceeded": "No answer within 30000 ms.",
}

_MODEL = ModelIdentity(
    name="squeezenet1_1",
    version="1",
    weights_sha256="3c445d0a4f121dd029cf5ebb60b931f7b1ca3dbd0773e12dea9cbd486a27c4bd",
    table_sha256="c970027ba744b781c4bb57ecfc3c431bc8e3357a13b781849e8bc5ea661481b9",
)
_SOFTWARE = Software(parchgrad=__version__, runtime="torch 2.14.1+cu130", device="cpu")
_IMAGE = "f7db500168ded99c42bc8ff105aad31f8b1497d358f7b0d692de919466c3bac6"
_SPRINGER = Prediction(index=217, label="English springer, English springer spaniel", probability=0.9080260396003723)
_PREDICTIONS = [_SPRINGER, Prediction(index=215, label="Brittany spaniel", probability=0.015402575023472309)]
_EXPLANATION = ExplanationAnswer(
    target=_SPRINGER,
    method="gradient",
    rule=True,
    quantile=0.1,
    gamma="inf",
    selection="class",
    conserve="independent",
    layers=["*"],
    normality_filter=False,
    seed="logit",
    polarity="both",
    transform=Transform(original_size=(224, 224), exif_orientation=1, crop_box=(14.0, 14.0, 210.0, 210.0)),
    quality=Quality(gini=0.953838178844584, identity_layers=0),
)
_SHED = MissingExplanation(status="shed", reason=MESSAGES["map_shed"])
_BAD_IMAGE = FailedAnswer(error=ErrorBody(code="image_truncated", message=MESSAGES["image_truncated"]))


def _explained(explanation: ExplanationAnswer | MissingExplanation) -> ExplainResult:
    return ExplainResult(image_sha256=_IMAGE, predictions=_PREDICTIONS, explanation=explanation)


def _explain_answer(*results: ExplainResult | FailedAnswer) -> ExplainAnswer:
    return ExplainAnswer(model=_MODEL, software=_SOFTWARE, request_id="b1e9", results=list(results))


_TENSORS = [
    protocol.TensorMetadata(name="images", datatype="FP32", shape=[-1, 3, 224, 224]),
    protocol.TensorMetadata(name="image_bytes", datatype="BYTES", shape=[-1]),
    protocol.TensorMetadata(name="target", datatype="INT64", shape=[-1]),
]
_OUTPUTS = [
    protocol.TensorMetadata(name="logits", datatype="FP32", shape=[-1, 1000]),
    protocol.TensorMetadata(name="saliency", datatype="FP32", shape=[-1, 224, 224]),
]

_OF: dict[type[BaseModel], dict[str, BaseModel]] = {
    PredictAnswer: {
        "one image": PredictAnswer(
            model=_MODEL, software=_SOFTWARE, results=[PredictResult(image_sha256=_IMAGE, predictions=_PREDICTIONS)]
        ),
    },
    ExplainAnswer: {
        "without the map's values (saliency=none)": _explain_answer(_explained(_EXPLANATION)),
        "a map shed under load": _explain_answer(_explained(_SHED)),
        "one bad image of two": _explain_answer(_BAD_IMAGE, _explained(_EXPLANATION)),
    },
    ModelListing: {
        "one serves, one does not": ModelListing(
            default=_MODEL.name,
            models=[
                ModelEntry(
                    name="mobilenet_v2", version="1", state="UNAVAILABLE", reason="The golden map did not match."
                ),
                ModelEntry(state="READY", **_MODEL.model_dump()),
            ],
        )
    },
    ModelAnswer: {
        "shortened to two labels": ModelAnswer(
            **_MODEL.model_dump(),
            labels=["tench", "goldfish"],
            input={"size": [224, 224], "rule": "shorter_side", "resize": 256},
            table={"classes": [0, 1]},
            options=option_defaults({"quantile": 0.1, "gamma": "inf", "layers": ["*"]}, timeout_ms=30_000),
            bounds=option_bounds(2, ["features.0", "features.3.squeeze"], max_timeout_ms=120_000),
            limits={"image_bytes": 20_000_000, "image_pixels": 50_000_000, "images": 16},
        )
    },
    protocol.ProtocolError: {"a message": protocol.ProtocolError(error=MESSAGES["unknown_model"])},
    protocol.ServerMetadata: {
        "this server": protocol.ServerMetadata(
            name="parchgrad", version=__version__, extensions=["binary_tensor_data", "model_repository"]
        )
    },
    protocol.Health: {"a live server": protocol.Health(live=True, ready=True)},
    protocol.ModelMetadata: {
        "some tensors of a model": protocol.ModelMetadata(
            name=_MODEL.name, versions=["1"], platform="parchgrad_pytorch", inputs=_TENSORS, outputs=_OUTPUTS
        )
    },
    protocol.ModelReady: {"a model": protocol.ModelReady(name=_MODEL.name, ready=True)},
    protocol.InferRequest: {
        "an encoded image, its class and logits asked for": protocol.InferRequest(
            id="1",
            inputs=[
                protocol.InferInput(name="image_bytes", datatype="BYTES", shape=[1], data=["iVBORw0KGgo="]),
                protocol.InferInput(name="target", datatype="INT64", shape=[1], data=[-1]),
            ],
            outputs=[protocol.RequestedOutput(name="target"), protocol.RequestedOutput(name="logits")],
        )
    },
    protocol.InferResponse: {
        "the predicted class": protocol.InferResponse(
            model_name=_MODEL.name,
            model_version="1",
            id="1",
            parameters={"weights_sha256": _MODEL.weights_sha256, "table_sha256": _MODEL.table_sha256},
            outputs=[protocol.InferOutput(name="target", datatype="INT64", shape=[1], data=[217])],
        )
    },
    protocol.IndexRequest: {"only what serves": protocol.IndexRequest(ready=True)},
    protocol.ChangeRequest: {"nothing to say": protocol.ChangeRequest()},
    protocol.V1Models: {"one model": protocol.V1Models(models=[_MODEL.name])},
    protocol.V1PredictAnswer: {
        "one instance": protocol.V1PredictAnswer(model=_MODEL, software=_SOFTWARE, predictions=[_PREDICTIONS])
    },
    protocol.V1ExplainAnswer: {
        "two instances, one shed": protocol.V1ExplainAnswer(
            model=_MODEL,
            software=_SOFTWARE,
            predictions=[_PREDICTIONS, _PREDICTIONS],
            explanations=[_EXPLANATION, _SHED],
        )
    },
}

INDEX = [protocol.IndexEntry(name=_MODEL.name, version="1", state="READY", reason="")]


def of(model: type[BaseModel]) -> Examples:
    """The examples of a type, by what they show; what is None is left out, as in every answer."""
    return {
        _identifier(name): {"summary": name, "value": one.model_dump(mode="json", exclude_none=True)}
        for name, one in _OF.get(model, {}).items()
    }


def _identifier(name: str) -> str:
    return "_".join(re.findall("[a-z0-9]+", name))


def of_index() -> Examples:
    return {"one_model": {"value": [entry.model_dump() for entry in INDEX]}}


def of_instances(route: str) -> Examples:
    """V1's body for `predict` or `explain`."""
    options = {"target": 217, "quantile": 0.1, "gamma": "inf"} if route == "explain" else {"top_k": 2}
    return {"one_instance": {"value": {"instances": [{"image": {"b64": "iVBORw0KGgo="}, **options}]}}}
