"""A model and its table as one graph in files: ONNX, an entry of a Triton model repository, or OpenVINO IR.

Every export is first run against PyTorch (parity.py); where it differs nothing is written.
"""

from __future__ import annotations

from parchgrad.export.write import Exported, export_onnx, export_openvino, export_triton

__all__ = ["Exported", "export_onnx", "export_openvino", "export_triton"]
