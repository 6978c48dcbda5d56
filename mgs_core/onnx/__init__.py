"""ONNX graphs as functional models, evaluated on any array namespace."""

from mgs_core.onnx.model import OnnxFunction as OnnxFunction
from mgs_core.onnx.model import OnnxModel as OnnxModel
from mgs_core.onnx.model import load as load
from mgs_core.onnx.saving import save as save

__all__ = ["OnnxFunction", "OnnxModel", "load", "save"]
