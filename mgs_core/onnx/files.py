"""Read a model file without trusting it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx
import onnx.numpy_helper

from mgs_core._errors import ArgumentError
from mgs_core.onnx.errors import damaged
from mgs_core.onnx.tensors import to_array

_FLOATS = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
_LIMIT = 1 << 31  # protobuf's own limit of a message


def read_model(source: Any) -> tuple[onnx.ModelProto, Path | None]:
    """Return the model and the folder of its external data.

    Args:
        source: a path, or a `ModelProto`, which is copied.

    Returns:
        (model, folder); the folder is None for a `ModelProto`.

    Raises:
        ArgumentError: when there is no such file or it is damaged.
    """
    model = onnx.ModelProto()
    if isinstance(source, onnx.ModelProto):
        model.CopyFrom(source)
        _check(model, "the ModelProto")
        return model, None
    if not isinstance(source, (str, os.PathLike)):
        raise ArgumentError(f"`model` must be a path or an onnx.ModelProto; got {type(source).__name__}.")
    path = Path(source)
    try:
        if not path.is_file():
            raise ArgumentError(f"`model` must be a file that exists; got {str(path)!r}. Check the path.")
        if path.stat().st_size >= _LIMIT:
            raise damaged(f"the file {path.name!r}", "is larger than protobuf allows", "Save the weights as external data.")
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(
            f"`model` must be a file that can be read; got {str(path)!r} ({error}). Check its permissions."
        ) from error
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's own class of errors, which is no part of this package's dependencies
        raise damaged(
            f"the file {path.name!r}", f"is no protobuf message of a model: {error}", "Check that it is complete."
        ) from error
    _check(model, f"the file {path.name!r}")
    return model, path.parent


def embed_external(model: onnx.ModelProto, folder: Path | None) -> None:
    """Put tensors whose data lie in other files into the model, so that it can be written elsewhere.

    Args:
        model: changed in place; its external data have been checked.
        folder: of the external data.
    """
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            array = to_array(tensor, folder, f"initialiser {tensor.name!r}")
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def hoist(model: onnx.ModelProto) -> None:
    """Make initialisers of the Constant nodes of a file whose weights are there, for it has no floating-point initialisers.

    Args:
        model: changed in place.
    """
    graph = model.graph
    if any(tensor.data_type in _FLOATS and tensor.dims for tensor in graph.initializer) or graph.sparse_initializer:
        return
    for node in [node for node in graph.node if node.op_type == "Constant" and len(node.output) == 1]:
        tensors = [attribute.t for attribute in node.attribute if attribute.name == "value" and attribute.HasField("t")]
        if len(tensors) == 1 and tensors[0].data_type in _FLOATS and tensors[0].dims:
            graph.initializer.add().CopyFrom(tensors[0])
            graph.initializer[-1].name = node.output[0]
            graph.node.remove(node)


def _check(model: onnx.ModelProto, where: str) -> None:
    if not model.HasField("graph") or not model.graph.output:
        raise damaged(where, "has no graph with outputs", "Check that it is an ONNX model, and complete.")
    _check_text(model, where)


def _check_text(message: Any, where: str) -> None:
    """Refuse strings that are not UTF-8: protobuf hands them out as bytes."""
    for field, value in message.ListFields():
        values = value if isinstance(value, (list, tuple)) or hasattr(value, "append") else [value]
        if field.type == field.TYPE_STRING:
            strange = [text for text in values if not isinstance(text, str)]
            if strange:
                raise damaged(where, f"has a {field.name} that is no text: {strange[0]!r}", "Check that it is complete.")
        elif field.type == field.TYPE_MESSAGE:
            for each in values:
                _check_text(each, where)
