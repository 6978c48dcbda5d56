"""ONNX graphs as functional models, evaluated on any array namespace."""

import importlib

from mgs_core._errors import extra

with extra("onnx", "mgs_core.onnx"):
    importlib.import_module("onnx")

from mgs_core.onnx.model import OnnxFunction as OnnxFunction
from mgs_core.onnx.model import OnnxModel as OnnxModel
from mgs_core.onnx.model import load as load
from mgs_core.onnx.saving import save as save

__all__ = ["OnnxFunction", "OnnxModel", "load", "save"]
