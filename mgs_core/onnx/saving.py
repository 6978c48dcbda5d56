"""Write a model back, with its current parameters."""

from __future__ import annotations

from os import PathLike, fspath
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from mgs_core._errors import ArgumentError
from mgs_core._registry import get_backend
from mgs_core.onnx.lifting import LIFTED
from mgs_core.onnx.model import OnnxModel


def save(model: Any, path: str | PathLike[str], *, parameters: Any = None) -> None:
    """Write a valid ONNX file with the model's parameters in the place of those that were read.

    Args:
        model: from `mgs_core.onnx.load`.
        path: of the file to write.
        parameters: arrays by name, as an optimiser gave them; None for `model.parameters`.

    Raises:
        ArgumentError: when the model is no `OnnxModel`, parameters do not fit, or the file cannot be written.

    Example:
        >>> import tempfile
        >>> import mgs_core as mgs
        >>> from mgs_core.experiments.models import build
        >>> model = mgs.onnx.load(build("mlp", (8, 8), 10, seed=0).plain)
        >>> halved = {name: value / 2 for name, value in model.parameters.items()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mgs.onnx.save(model, f"{folder}/halved.onnx", parameters=halved)
        ...     again = mgs.onnx.load(f"{folder}/halved.onnx")
        >>> bool((again.parameters["output.weight"] == halved["output.weight"]).all())
        True
    """
    if not isinstance(model, OnnxModel):
        raise ArgumentError(f"`model` must come from mgs_core.onnx.load; got {type(model).__name__}.")
    values = model.parameters if parameters is None else parameters
    if set(values) != set(model.parameters):
        raise ArgumentError(f"`parameters` must have the names {sorted(model.parameters)}; got {sorted(values)}.")
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer} | _lifted(proto)
    copies = {
        copy: np.asarray(get_backend(values[table]).to_numpy(values[table])).T
        for copy, table in model.ties.items()
        if table in values
    }
    for name, value in {**values, **copies}.items():
        array, tensor = np.asarray(get_backend(value).to_numpy(value)), tensors[name]
        if name in model.cut:
            array = np.concatenate([array, np.zeros_like(array)], axis=-1)
        shape = tuple(tensor.dims) if isinstance(tensor, onnx.TensorProto) else model.parameters[name].shape
        if array.shape != shape:
            raise ArgumentError(f"`parameters` must keep their shapes; got {array.shape} for {name!r} of {shape}.")
        if not np.all(np.isfinite(array.astype(np.float64))):
            raise ArgumentError(f"`parameters` must be finite; got NaN or infinity in {name!r}.")
        if isinstance(tensor, onnx.AttributeProto):
            tensor.floats[:] = np.ravel(array).tolist()
            continue
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array.astype(dtype)), name))
    try:
        onnx.checker.check_model(proto, full_check=True)
        onnx.save(proto, fspath(path))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:  # ValueError: larger than protobuf allows
        raise ArgumentError(
            f"`path` must be a place where a valid model can be written; got {fspath(path)!r}: {error}"
        ) from error


def _lifted(proto: onnx.ModelProto) -> dict[str, onnx.AttributeProto]:
    """Return the attributes that `lift` made parameters of, by their names as such."""
    found = {}
    for node in proto.graph.node:
        if node.op_type in LIFTED:
            label = node.name or next(name for name in node.output if name)
            found.update({f"{label}.{attribute.name}": attribute for attribute in node.attribute})
    return found
