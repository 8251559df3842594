"""Engines that compute a prediction and its gradient under the rule: in PyTorch (`interface`), or from an ONNX graph.

Importing this loads no torch: the names of the interface do when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parchgrad.runtimes.interface import AtLastMap, Gradients, Plan, Points, Runtime, Tell, Witness

__all__ = ["AtLastMap", "Gradients", "Plan", "Points", "Runtime", "Tell", "Witness"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("parchgrad.runtimes.interface"), name)
    raise AttributeError(f"module 'parchgrad.runtimes' has no attribute '{name}'")
