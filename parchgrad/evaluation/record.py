"""What has to be known to repeat an evaluation: what was evaluated, on what, with which options and programs."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

import parchgrad
from parchgrad.evaluation.methods import Method
from parchgrad.evaluation.study import Effort
from parchgrad.models import Model
from parchgrad.sources import Source
from parchgrad.tables import SelectionTable

# Those whose code decides a number.
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "pillow", "grad-cam", "zennit")


def settings_of(
    model: Model,
    table: SelectionTable,
    source: Source,
    methods: Sequence[Method],
    effort: Effort,
    *,
    places: Mapping[str, Any] | None = None,
    mosaics: int,
    photographs: int,
    seed: int,
    batch_size: int,
    device: str,
    command: str = "",
) -> dict[str, Any]:
    """JSON types only; what `study` keeps with its results. Two evaluations of the same settings find the same."""
    return {
        "command": command,
        "model": {
            "name": model.name,
            "version": model.version,
            "weights_sha256": model.weights_sha256,
            "input": list(model.preprocessing.size),
        },
        "table": {
            "name": table.name,
            "version": table.version,
            "table_sha256": table.table_sha256,
            "classes": len(table.classes),
            "defaults": table.defaults.to_json(),
        },
        "data": {
            "root": source.root,
            "fingerprint": source.fingerprint(),
            "images": len(source),
            "classes": len(source.classes),
        },
        "places": dict(places or {}),
        "pictures": {"mosaics": mosaics, "photographs": photographs, "seed": seed},
        "methods": {method.name: method.options for method in methods},
        "effort": asdict(effort) | {"road": list(effort.road)},
        "batch_size": batch_size,
        "device": device,
        "versions": {"parchgrad": parchgrad.__version__, "python": platform.python_version()}
        | {name: version for name in PACKAGES if (version := _version(name))},
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
