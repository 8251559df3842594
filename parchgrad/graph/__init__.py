"""Prediction and explanation as one plain ONNX graph."""
