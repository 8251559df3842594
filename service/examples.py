"""Examples of what is sent and answered, for the OpenAPI document; each is an instance of its type.

The requests may be sent as they are to a service of the bundled model, and the answers are what it gave.
"""

import base64
import hashlib
import re
from typing import Any

from pydantic import BaseModel

from parchgrad import __version__
from parchgrad.activation_histograms import BINS, EDGES, FEWEST_IMAGES, normal
from service.protocols import schemas as protocol
from service.schemas import (
    OPTIONS,
    REQUEST_OPTIONS,
    AttackAnswer,
    AttackChannel,
    AttackedClass,
    AttackLayer,
    AttackSaid,
    ClassComparisonAnswer,
    ClassGraphAnswer,
    ClassGraphChannelAnswer,
    ClassGraphClassAnswer,
    ClassGraphEdge,
    ClassGraphLayer,
    ClassGraphNode,
    ClassGraphPlace,
    ClassName,
    ComparedLayer,
    ErrorBody,
    ExplainAnswer,
    ExplainResult,
    ExplanationAnswer,
    FailedAnswer,
    GradientShares,
    LayerAnswer,
    LayerChannel,
    LayerRule,
    LayersAnswer,
    MapMovement,
    MapStack,
    MissingExplanation,
    ModelAnswer,
    ModelEntry,
    ModelIdentity,
    ModelListing,
    PageState,
    Perturbation,
    PredictAnswer,
    Prediction,
    PredictResult,
    Quality,
    SaliencyMap,
    SampleListing,
    ServedClass,
    Software,
    TrafficAnswer,
    TrafficBucket,
    TrafficClass,
    TrafficFigure,
    TrafficLayer,
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
    "image_truncated": "The png ends too early.",
    "image_corrupt": "The png is damaged.",
    "unauthorized": "A key is needed: 'Authorization: Bearer TOKEN' or 'X-API-Key: TOKEN'.",
    "forbidden": "Key 'camera' may not load or unload models.",
    "attack_off": "Attacks are off here; PARCHGRAD_ATTACKS=true turns them on.",
    "not_found": "There is nothing at '/explian'.",
    "unknown_model": "There is no model 'resnet'; there is 'scenes'.",
    "no_class_graph": "Model 'scenes' version 1 has no class graph; build one: "
    "parchgrad class-graph build scenes --data IMAGES.",
    "unknown_version": "Model 'scenes' has no version '7'; it has '1'.",
    "method_not_allowed": "GET is not allowed at '/explain'; use POST.",
    "not_acceptable": "image/png answers one map of one image; use application/json.",
    "load_failed": "Model 'scenes' was not loaded: Golden saliency map is off by 0.41 (relative L2), allowed 0.2.",
    "body_too_large": "The body passes 320131072 bytes, the most that are accepted.",
    "too_many_images": "A request may carry at most 16 images.",
    "image_too_many_bytes": "The image has more than 20000000 bytes, the most that are accepted.",
    "image_too_many_pixels": "The image has 60000x60000 = 3600000000 pixels; at most 50000000 are accepted.",
    "image_too_complex": "The JPEG has 400 scans; at most 100 are accepted.",
    "content_type_unsupported": "Content-Type is 'text/plain'; expected multipart/form-data with 'image' files, or "
    "image/*.",
    "image_unsupported": "The bytes are not an image of a known format; expected one of jpeg, png, gif, webp, bmp, "
    "tiff.",
    "unknown_field": "Field 'quantil' is not an option of /explain; its options are "
    f"{', '.join([*OPTIONS, *REQUEST_OPTIONS])}.",
    "option_unsupported": "Parameter 'priority' is 3; requests have no sequence and no priority.",
    "option_invalid": "Option 'quantile' is '2'; allowed: a number in (0, 1].",
    "unknown_class": "Option 'target' is 'cupp'; allowed: an index in 0..9, a class name or id, predicted or top:k. "
    "Did you mean 'cup'?",
    "target_not_in_table": "Table 'scenes' has no row for class 9 (umbrella); it covers 9 of 10 classes. "
    "selection=instance or rule=false needs no row.",
    "map_not_finite": "The map overflows float32 under these options; gamma may be too large.",
    "queue_full": "256 images or maps are waiting, the most is 256.",
    "rate_limited": "Key 'camera' has used its 60 requests a minute.",
    "client_closed_request": "The client went away.",
    "internal": "The service failed on this request; its log says why.",
    "not_ready": "The model is still loading.",
    "map_shed": "128 images or maps are waiting.",
    "out_of_memory": "The device has not the memory for 1 images.",
    "audit_unavailable": "The audit log cannot be written; the log says why.",
    "prediction_not_finite": "The model's output overflows float32 for this input.",
    "storage_full": "The service's disk has no room for the images of this request.",
    "deadline_exceeded": "No answer within 30000 ms.",
}

# A scene with an umbrella, from the generator that the model was trained with: 48 x 48 pixels of 8 colours, PNG.
PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAADAAAAAwBAMAAAClLOS0AAAAGFBMVEW9ur6vqLWpprF2r2qhnKqPlZiIiI2EPmfTNDgfAAACRUlEQVR42l2TTW4U"
    "QQyFP7t7wWrGNWHDJmomB6CZyQFQpByFS3EUpEAuADQHSNLJFhF7EhZIJGUWPR0FvCq9J/+8Z5ewD4tTcwDqJwCdiYAJ30NPBKucX90zwpCN8Dwm"
    "QjbliAQqVF4DtAAUPTgRexzs4GcoI0ADsNrItrxAX0m5qtfm/N6X0rI2ID9+iA5GAmgLyFs1IM+ardUbDq/2zQ+21gGcQfOo9XCUtUFrzWtTgAdA"
    "mmExghZCj7rE5uF7+pMRqqxWbSGjuBjngIHUSbECOMnDPHs/zsrFCAJAADQBfLIknfvjd1MfSUjK7O4t/ouJ6gOZTXRw6vGTtU7qVMidjD3aGCVE"
    "DQ8AD+zyCs4BIkPD2QvcJTmN6mmogwRACkGlBYNIhbJfdlfT8TfHrA1oS1DGJYBdgJN3fYIsFSPqjsuvNwwVfLe4TySjpd4syOoi9XBEq3YHO5ZB"
    "i40BsOwTqBnYYwBqA9CNRHcLIJUw22IqPXDdyUs+D9PpeXPaEUrTQ70zmS0Za9jFfHBUdrXMFl48fgcNYEtHX3NNOlS4XkILA6y9eLvb1m9CylgR"
    "0KTHi5PyntEgqOCgwt1q8QXqyI8OHA8QaMEWA8Cfi6GKeUp6SVALBgBu4tDTQ4AENEz66Tq4IjADdgZq/3ywEEDs+efcLCuGZUB6BErQABtnjHjK"
    "NJQl0Gwi6rOKUmgR2OKJYnNGmXpkkASXzLgA1k7n6UBKFjIgyZhsn1YhliAlg8BC+S/WAZaBZpFJ0bpDlDWGYPAXSo4Qor04o2IAAAAASUVORK5C"
    "YII="
)

_MODEL = ModelIdentity(
    name="scenes",
    version="1",
    weights_sha256="1967e2bf45d32fb00874c04026042204aa72bcd730599a966b268d58f019ad24",
    table_sha256="e7b5e4e46e58b89b0919372750f403192a3489cd69e67d3567e8d86c110de1f7",
)
_SOFTWARE = Software(parchgrad=__version__, runtime="torch 2.14.1+cu130", device="cpu")
_IMAGE = hashlib.sha256(base64.b64decode(PICTURE)).hexdigest()
_UMBRELLA = Prediction(index=9, label="umbrella", probability=0.9885961413383484)
_PREDICTIONS = [_UMBRELLA, Prediction(index=5, label="leaf", probability=0.00691528944298625)]
_EXPLANATION = ExplanationAnswer(
    target=_UMBRELLA,
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
    transform=Transform(original_size=(48, 48), exif_orientation=1, crop_box=(0.0, 0.0, 48.0, 48.0)),
    quality=Quality(gini=0.8872914695724038, identity_layers=0),
)
_SHED = MissingExplanation(status="shed", reason=MESSAGES["map_shed"])
_BAD_IMAGE = FailedAnswer(error=ErrorBody(code="image_truncated", message=MESSAGES["image_truncated"]))


def _explained(explanation: ExplanationAnswer | MissingExplanation) -> ExplainResult:
    return ExplainResult(image_sha256=_IMAGE, predictions=_PREDICTIONS, explanation=explanation)


def _explain_answer(*results: ExplainResult | FailedAnswer) -> ExplainAnswer:
    return ExplainAnswer(model=_MODEL, software=_SOFTWARE, request_id="b1e9", results=list(results))


_TABLE_DEFAULTS = {
    "quantile": 0.1, "gamma": "inf", "conserve": "independent", "selection": "class", "layers": ["*"],
    "normality_filter": False,
}  # fmt: skip
_LAYERS = (
    "features.0.0", "features.2.first.0", "features.2.second.0", "features.2.skip.0", "features.3.first.0",
    "features.3.second.0", "features.3.skip.0", "features.4.first.0", "features.4.second.0", "features.5.first.0",
    "features.5.second.0", "features.5.skip.0", "features.6.first.0", "features.6.second.0", "features.7.0",
)  # fmt: skip
_PROBABILITIES: list[float | None] = [
    0.0002229236124549061, 0.00023059648810885847, 0.00028723248397000134, 0.0005666473880410194,
    0.0011440328089520335, 0.00691528944298625, 0.0001177182057290338, 0.00010203130659647286, 0.0018173720454797149,
    0.9885961413383484,
]  # fmt: skip
_TENSORS = [
    protocol.TensorMetadata(name="images", datatype="FP32", shape=[-1, 3, -1, -1]),
    protocol.TensorMetadata(name="image_bytes", datatype="BYTES", shape=[-1]),
    protocol.TensorMetadata(name="target", datatype="INT64", shape=[-1]),
    protocol.TensorMetadata(name="quantile", datatype="FP32", shape=[-1]),
    protocol.TensorMetadata(name="gamma", datatype="FP32", shape=[-1]),
]
_OUTPUTS = [
    protocol.TensorMetadata(name="logits", datatype="FP32", shape=[-1, 10]),
    protocol.TensorMetadata(name="probabilities", datatype="FP32", shape=[-1, 10]),
    protocol.TensorMetadata(name="target", datatype="INT64", shape=[-1]),
    protocol.TensorMetadata(name="saliency", datatype="FP32", shape=[-1, -1, -1]),
]

_SEEN = TrafficClass(
    label="all classes", images=0, reference="normal", divergence=[None], expected=[None], bound=[None]
)

# Not of the bundled model: the numbers of a layer that fits a page, whose one selected channel sends back 3 and 1.
_MAP_PAIR = MapStack(shape=(2, 1, 2), dtype="int8", scales=[0.023622, 0.015748], data="f0IrAA==")
_LAYER = LayerAnswer(
    name="features.0.0", call=0, calls=1, kind="Conv2d", kernel=[3, 3], stride=[1, 1], groups=1, shape=[2, 1, 2],
    active=True, selected=[1],
    rule=LayerRule(
        m=1.0, n=1.0, k=0.0, a=1.0, b=1.41421, selected_factor=1.41421, unselected_factor=0.0, identity=False,
        sd_before=1.41421, sd_after=1.41421,
    ),
    energy=GradientShares(plain=14.0, before=14.0, after=20.0),
    selected_share=GradientShares(plain=0.714286, before=0.714286, after=1.0),
    sums=MapStack(shape=(3, 1, 2), dtype="int8", scales=[0.023622, 0.015748, 0.033407], data="fyp/AH8q"),
    channels=[
        LayerChannel(
            index=1, selected=True, feature=0.75, deviations=1.5, rank=0, log_p=-41.2, factor=1.41421,
            share=GradientShares(plain=0.714286, before=0.714286, after=1.0),
        ),
        LayerChannel(
            index=0, selected=False, feature=0.5, deviations=-0.25, rank=1, log_p=-0.4, factor=0.0,
            share=GradientShares(plain=0.285714, before=0.285714, after=0.0),
        ),
    ],
    activation=MapStack(shape=(2, 1, 2), dtype="uint8", scales=[0.00588, 0.00392], data="/wD/AA=="),
    plain=_MAP_PAIR,
    before=_MAP_PAIR,
)  # fmt: skip

# Not of the bundled model: a class turned, and pictures of nothing.
_TURNED = [
    AttackedClass(index=9, label="umbrella", before=0.9886, after=0.0712),
    AttackedClass(index=5, label="leaf", before=0.00692, after=0.918),
]
_TINY_MAP = SaliencyMap(shape=(1, 2), dtype="uint8", scale=0.00392, encoding="base64", data="/4A=")

_OF: dict[type[BaseModel], dict[str, BaseModel]] = {
    PageState: {"as it starts": PageState(parchgrad=__version__, keys=False, attacks=False)},
    SampleListing: {"two pictures": SampleListing(samples=["mosaic_3.png", "scene_9.png"])},
    ClassGraphAnswer: {
        "two layers, two classes": ClassGraphAnswer(
            **_MODEL.model_dump(),
            layers=[
                ClassGraphLayer(name="features.0.0", channels=24, selected=2),
                ClassGraphLayer(name="features.2.first.0", channels=48, selected=5),
            ],
            classes=[
                ClassGraphPlace(index=1, label="cup", images=400, x=0.61, y=-0.2),
                ClassGraphPlace(index=9, label="umbrella", images=400, x=-0.4, y=1.0),
            ],
            built={"by": f"parchgrad {__version__}"},
        )
    },
    ClassGraphClassAnswer: {
        "two channels, one influence": ClassGraphClassAnswer(
            index=9,
            label="umbrella",
            images=400,
            nodes=[
                ClassGraphNode(layer="features.0.0", channel=7, strength=1, log_p=-120.5, pagerank=0.4),
                ClassGraphNode(layer="features.2.first.0", channel=31, strength=0.71, log_p=-96.25, pagerank=0.6),
            ],
            nodes_in_all=160,
            edges=[ClassGraphEdge(source=0, target=1, weight=0.18)],
            edges_in_all=1,
        )
    },
    ClassComparisonAnswer: {
        "one layer": ClassComparisonAnswer(
            a=ClassName(index=9, label="umbrella"),
            b=ClassName(index=1, label="cup"),
            layers=[ComparedLayer(layer="features.0.0", shared=[7], only_a=[3], only_b=[12])],
        )
    },
    ClassGraphChannelAnswer: {
        "a channel of two classes": ClassGraphChannelAnswer(
            layer="features.0.0",
            channel=7,
            classes=[
                ServedClass(index=9, label="umbrella", strength=1, log_p=-120.5),
                ServedClass(index=1, label="cup", strength=0.4, log_p=-31.5),
            ],
            classes_in_all=2,
            exemplars=9,
        )
    },
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
    LayersAnswer: {
        "one small layer": LayersAnswer(
            model=_MODEL,
            software=_SOFTWARE,
            request_id="b1e9",
            image_sha256=_IMAGE,
            predictions=_PREDICTIONS,
            target=_UMBRELLA,
            options={"method": "gradient", "rule": True, "seed": "logit", **_TABLE_DEFAULTS},
            order="activation",
            identity_layers=0,
            transform=Transform(original_size=(48, 48), exif_orientation=1, crop_box=(0.0, 0.0, 48.0, 48.0)),
            maps=MapStack(shape=(2, 1, 2), dtype="uint8", scales=[0.00118, 0.00196], data="/4D/AA=="),
            layers=[_LAYER],
        )
    },
    AttackAnswer: {
        "a class turned by two levels": AttackAnswer(
            model=_MODEL,
            software=_SOFTWARE,
            request_id="b1e9",
            image_sha256=_IMAGE,
            attack=AttackSaid(kind="pgd", strength=2.0, steps=10, seed=0),
            changed=True,
            old=_TURNED[0],
            new=_TURNED[1],
            predictions=_TURNED,
            picture="iVBORw0KGgo=",
            attacked="iVBORw0KGgo=",
            perturbation=Perturbation(png="iVBORw0KGgo=", factor=63, largest=2, mean=1.6),
            options={"method": "gradient", "rule": True, "seed": "logit", **_TABLE_DEFAULTS},
            map_before=_TINY_MAP,
            map_after=_TINY_MAP,
            movement=MapMovement(agreement=0.91, overlap=0.64, shift=0.02),
            layers=[
                AttackLayer(
                    name="features.0.0",
                    channels=24,
                    size=0.3,
                    of_old=-0.2,
                    of_new=0.4,
                    excited=[AttackChannel(index=3, before=0.1, after=1.2, of_old=False, of_new=True)],
                    inhibited=[AttackChannel(index=17, before=0.8, after=-0.1, of_old=True, of_new=False)],
                )
            ],
        )
    },
    ModelListing: {
        "one model": ModelListing(default=_MODEL.name, models=[ModelEntry(state="READY", **_MODEL.model_dump())])
    },
    TrafficAnswer: {
        "one layer, nothing seen yet": TrafficAnswer(
            **_MODEL.model_dump(),
            span="hour",
            bucket_seconds=120,
            watch_rate=0.01,
            workers=1,
            fewest_images=FEWEST_IMAGES,
            images=0,
            images_of_others=0,
            edges=EDGES.tolist(),
            layers=["head"],
            classes=[_SEEN],
            chosen=_SEEN,
            distributions=[TrafficLayer(name="head", values=0, live=[0] * BINS, reference=normal().round(6).tolist())],
            history=[TrafficBucket(start=1_700_000_040, images=0, divergence=[None], bound=[None])],
            figures=[TrafficFigure(name="gini", lowest=0, highest=1, maps=0, quantiles=[], history=[])],
        )
    },
    ModelAnswer: {
        "with less of its table": ModelAnswer(
            **_MODEL.model_dump(),
            labels=[
                "butterfly",
                "cup",
                "fish",
                "house",
                "key",
                "leaf",
                "mushroom",
                "sailboat",
                "star",
                "umbrella",
            ],
            input={
                "size": [128, 128],
                "rule": "native",
                "resize": None,
                "mean": [0.5, 0.5, 0.5],
                "std": [0.25, 0.25, 0.25],
                "interpolation": "bilinear",
                "min_side": 48,
                "max_side": 512,
            },
            table={"classes": list(range(10)), "defaults": _TABLE_DEFAULTS},
            options=option_defaults(_TABLE_DEFAULTS, timeout_ms=30_000),
            bounds=option_bounds(10, _LAYERS, max_timeout_ms=120_000),
            limits={"image_bytes": 20_000_000, "image_pixels": 50_000_000, "images": 16},
        )
    },
    protocol.ProtocolError: {"a message": protocol.ProtocolError(error=MESSAGES["unknown_model"])},
    protocol.ServerMetadata: {
        "this server": protocol.ServerMetadata(
            name="parchgrad",
            version=__version__,
            extensions=["binary_tensor_data", "model_configuration", "model_repository", "parameters"],
        )
    },
    protocol.Health: {"a live server": protocol.Health(live=True, ready=True)},
    protocol.ModelMetadata: {
        "a model of any image size": protocol.ModelMetadata(
            name=_MODEL.name, versions=["1"], platform="parchgrad_pytorch", inputs=_TENSORS, outputs=_OUTPUTS
        )
    },
    protocol.ModelReady: {"a model": protocol.ModelReady(name=_MODEL.name, ready=True)},
    protocol.InferRequest: {
        "an encoded image, its class and probabilities asked for": protocol.InferRequest(
            id="1",
            inputs=[
                protocol.InferInput(name="image_bytes", datatype="BYTES", shape=[1], data=[PICTURE]),
                protocol.InferInput(name="target", datatype="INT64", shape=[1], data=[-1]),
            ],
            outputs=[protocol.RequestedOutput(name="target"), protocol.RequestedOutput(name="probabilities")],
        )
    },
    protocol.InferResponse: {
        "the predicted class and the probabilities": protocol.InferResponse(
            model_name=_MODEL.name,
            model_version="1",
            id="1",
            parameters={"weights_sha256": _MODEL.weights_sha256, "table_sha256": _MODEL.table_sha256},
            outputs=[
                protocol.InferOutput(name="probabilities", datatype="FP32", shape=[1, 10], data=_PROBABILITIES),
                protocol.InferOutput(name="target", datatype="INT64", shape=[1], data=[_UMBRELLA.index]),
            ],
        )
    },
    protocol.IndexRequest: {"only what serves": protocol.IndexRequest(ready=True)},
    protocol.ChangeRequest: {"nothing to say": protocol.ChangeRequest()},
    protocol.V1Models: {"one model": protocol.V1Models(models=[_MODEL.name])},
    protocol.V1PredictAnswer: {
        "one instance": protocol.V1PredictAnswer(model=_MODEL, software=_SOFTWARE, predictions=[_PREDICTIONS])
    },
    protocol.V1ExplainAnswer: {
        "one instance": protocol.V1ExplainAnswer(
            model=_MODEL, software=_SOFTWARE, predictions=[_PREDICTIONS], explanations=[_EXPLANATION]
        ),
        "two instances, one shed": protocol.V1ExplainAnswer(
            model=_MODEL,
            software=_SOFTWARE,
            predictions=[_PREDICTIONS, _PREDICTIONS],
            explanations=[_EXPLANATION, _SHED],
        ),
    },
}

# What stands in a path.
PATH = {
    "name": _MODEL.name,
    "version": _MODEL.version,
    "path": "main.js",
    "file": "scene_9.png",
    "index": "9",
    "other": "1",
    "layer": "features.0.0",
    "channel": "7",
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
    explain = {"target": "umbrella", "quantile": 0.1, "gamma": "inf", "saliency": "none"} if route == "explain" else {}
    return {"one_instance": {"value": {"instances": [{"image": {"b64": PICTURE}, "top_k": 2, **explain}]}}}
