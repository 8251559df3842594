"""What an exported graph says about itself: its metadata, the JSON object that every runtime of ours reads."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import onnx

import parchgrad
from parchgrad.graph.features import noted
from parchgrad.models import Model
from parchgrad.runtimes.onnx_metadata import FORMAT_VERSION, METADATA_KEY
from parchgrad.tables import SelectionTable

SEED = "logit"  # what is differentiated
_OF = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime")


def card(
    model: Model, table: SelectionTable, backward: str, opset: int, features: dict[str, Any] | None
) -> dict[str, Any]:
    """Model, table, what is fixed in the graph, where its features are, and what made it: JSON types only."""
    of_table = table.manifest()
    del of_table["labels"]  # the model's, to the last one
    return {
        "format_version": FORMAT_VERSION,
        "model": {
            "name": model.name,
            "version": model.version,
            "weights_sha256": model.weights_sha256,
            "architecture": model.architecture,
            "labels": list(model.labels),
            "class_ids": list(model.class_ids),
            "input": asdict(model.preprocessing),
        },
        "table": of_table,
        "graph": {
            "backward": backward,
            "conserve": table.defaults.conserve,
            "seed": SEED,
            "dtype": "float32",
            "opset": opset,
            "layers": list(table.layer_names),
        },
        **({} if features is None else {"features": features}),
        "versions": {"parchgrad": parchgrad.__version__, **{package: version(package) for package in _OF}},
    }


def describe(graph: onnx.ModelProto, model: Model, table: SelectionTable, backward: str) -> None:
    """Write the card into the graph, in place, and say in words what its tensors are."""
    opset = next(entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx"))
    features = noted(graph)
    described = card(model, table, backward, opset, None if features is None else json.loads(features))
    onnx.helper.set_model_props(graph, {METADATA_KEY: json.dumps(described)})
    graph.producer_name, graph.producer_version = "parchgrad", parchgrad.__version__
    graph.model_version = int(model.version)
    graph.graph.name = model.name
    graph.doc_string = (
        f"{model.architecture} with ParchGrad saliency maps: prediction and explanation in one graph. "
        f"Model '{model.name}', version {model.version}; selection table '{table.name}' of {len(table.classes)} "
        f"classes. Seed {SEED}, conserve {table.defaults.conserve}."
    )
    for value in (*graph.graph.input, *graph.graph.output):
        value.doc_string = _TENSORS.get(value.name, "")


_TENSORS = {
    "images": "Normalised images, (batch, 3, height, width).",
    "targets": "Class index to explain; -1 is the predicted class, (batch,).",
    "quantile": "Share of a layer's channels to select, one number or one a layer; 0: the rule does not act there.",
    "gamma": "Standard deviation of the selected side over that of the unselected side; may be infinite, (batch,).",
    "logits": "(batch, classes).",
    "probabilities": "Softmax of the logits, (batch, classes).",
    "target": "The class explained, (batch,).",
    "saliency": "Mean over colours of the attributions' magnitude, (batch, height, width).",
    "attributions": "Signed gradient of the target's logit under the rule, (batch, 3, height, width).",
    "identity_layers": "Layers whose gradient passed unchanged though the rule was to act, (batch,).",
    "covered": "False where the table has no row for the target: its attributions are NaN, (batch,).",
}
