"""ParchGrad: saliency maps from class-wise selected channels, with predictions. See README.md.

Importing this is light: torch, or onnxruntime, is loaded when a name that needs it is first used, and where it is not
installed that name raises MissingPackageError.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from parchgrad.errors import ParchGradError, missing_package

if TYPE_CHECKING:
    from parchgrad.attribution import ParchGrad
    from parchgrad.build import build_table
    from parchgrad.client import AsyncClient, Client
    from parchgrad.explainer import Explainer, Explanation
    from parchgrad.models import Model, add_model, load_model
    from parchgrad.runtimes.onnx_runtime import OnnxExplainer
    from parchgrad.tables import SelectionTable, load_table

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "Client",
    "Explainer",
    "Explanation",
    "Model",
    "OnnxExplainer",
    "ParchGrad",
    "ParchGradError",
    "SelectionTable",
    "add_model",
    "build_table",
    "load_model",
    "load_table",
]

_HOME = {
    "AsyncClient": "client",
    "Client": "client",
    "Explainer": "explainer",
    "Explanation": "explainer",
    "Model": "models",
    "OnnxExplainer": "runtimes.onnx_runtime",
    "ParchGrad": "attribution",
    "SelectionTable": "tables",
    "add_model": "models",
    "build_table": "build",
    "load_model": "models",
    "load_table": "tables",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        try:
            return getattr(import_module(f"parchgrad.{_HOME[name]}"), name)
        except ModuleNotFoundError as error:
            if (named := missing_package(f"parchgrad.{name}", error)) is None:
                raise
            raise named from error
    raise AttributeError(f"module 'parchgrad' has no attribute '{name}'")
