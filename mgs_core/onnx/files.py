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
    source = getattr(source, "model_proto", source)  # of torch.onnx.export
    if isinstance(source, onnx.ModelProto):
        model.CopyFrom(source)
        _check(model, "the ModelProto")
        return model, None
    if not isinstance(source, (str, os.PathLike)):
        raise ArgumentError(
            f"`model` must be a path or an onnx.ModelProto; got {type(source).__name__}. "
            "Of bytes make one by onnx.load_from_string."
        )
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
