"""What has to be known to repeat an evaluation: what was evaluated, on what, with which options and programs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

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
    places: Mapping[str, Any],
    photographs: NDArray[np.int64],
    mosaics: NDArray[np.int64] | None,
    allow_used: bool,
    used_known: bool,
    seed: int,
    batch_size: int,
    device: str,
    command: str = "",
) -> dict[str, Any]:
    """JSON types only; what `study` keeps with its results. Two evaluations of the same settings find the same.

    `photographs` `(n,)` and `mosaics` `(m, 4)` are the source's images drawn; `used_known` says whether the table has
    a record of the images it was built from, `allow_used` that they may be among these all the same.
    """
    drawn = hashlib.sha256()
    mosaics = np.empty((0, 4), np.int64) if mosaics is None else mosaics
    for index in (*photographs.tolist(), -1, *mosaics.ravel().tolist()):
        drawn.update(b"\0" if index < 0 else source.name(index).encode() + b"\n")
    return {
        "command": command,
        "model": {
            "name": model.name,
            "version": model.version,
            "weights_sha256": model.weights_sha256,
            "preprocessing": asdict(model.preprocessing),
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
        "held_out": {"table has a record of its images": used_known, "they are allowed": allow_used},
        "places": dict(places),
        "pictures": {
            "mosaics": len(mosaics),
            "photographs": len(photographs),
            "seed": seed,
            "drawn_sha256": drawn.hexdigest(),
        },
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
