"""ONNX graphs as functional models, evaluated on any array namespace."""
