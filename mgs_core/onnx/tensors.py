"""Turn tensors of a file into NumPy arrays, checking sizes before memory is taken and never leaving the model's folder."""

from __future__ import annotations

from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from mgs_core._types import Array
from mgs_core.onnx.errors import damaged, unsupported

#: Elements that one tensor may have whose size a file only declares (4 GiB in float32).
MAX_ELEMENTS = 1 << 30
_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
_NUMBERS = _FLOATS | {
    TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64,
    TensorProto.BOOL, TensorProto.UINT32, TensorProto.UINT64,
}  # fmt: skip


def check_size(shape: tuple[int, ...], where: str) -> None:
    """Refuse a shape that no honest model has, before memory is taken.

    Args:
        shape: sizes of the axes.
        where: names the node or tensor.

    Raises:
        ArgumentError: when a size is negative or the whole exceeds `MAX_ELEMENTS`.
    """
    if any(size < 0 for size in shape):
        raise damaged(where, f"has a negative size in its shape {list(shape)}")
    if prod(shape) > MAX_ELEMENTS:
        raise damaged(where, f"asks for {prod(shape)} elements, shape {list(shape)}; at most {MAX_ELEMENTS} are allowed")


def dtype_of(code: int, where: str, precision: str | None = None) -> np.dtype:
    """Return the NumPy dtype of an ONNX element type.

    Args:
        code: of `TensorProto.DataType`.
        where: names the node or tensor.
        precision: dtype that replaces every floating-point type, or None.

    Returns:
        The dtype.

    Raises:
        UnsupportedModelError: when the type is no plain number.
    """
    if code not in _NUMBERS:
        known = code in TensorProto.DataType.values()
        name = TensorProto.DataType.Name(code) if known else str(code)
        raise unsupported(where, f"has the element type {name}", "Use a model of floating-point, integer and bool tensors.")
    if precision is not None and code in _FLOATS:
        return np.dtype(precision)
    return np.dtype(str(helper.tensor_dtype_to_np_dtype(code)))


def is_float(dtype: Any) -> bool:
    """Say whether a dtype is one of floating-point numbers, bfloat16 among them.

    Args:
        dtype: of NumPy or ml_dtypes.
    """
    return bool(np.issubdtype(dtype, np.floating)) or np.dtype(dtype).name == "bfloat16"


def to_array(tensor: TensorProto, folder: Path | None, where: str, precision: str | None = None) -> Array:
    """Return the values of a tensor.

    Args:
        tensor: with its data inside or in a file beside the model.
        folder: the model's folder; None when the model came as an object.
        where: names the tensor.
        precision: as for `dtype_of`.

    Returns:
        The array; floating-point values in `precision`.

    Raises:
        ArgumentError: when size and data disagree, or the external file is missing or outside the folder.
        UnsupportedModelError: when the type is no plain number.
    """
    dtype = dtype_of(tensor.data_type, where)
    shape = tuple(tensor.dims)
    check_size(shape, where)
    size = prod(shape) * dtype.itemsize
    if tensor.data_location == TensorProto.EXTERNAL:
        data = _read_external(tensor, folder, size, where)
        array = np.frombuffer(data, dtype.newbyteorder("<")).reshape(shape)
    elif tensor.HasField("raw_data"):
        if len(tensor.raw_data) != size:
            raise damaged(where, f"holds {len(tensor.raw_data)} bytes; its shape {list(shape)} and type need {size}")
        array = np.frombuffer(tensor.raw_data, dtype.newbyteorder("<")).reshape(shape)
    else:
        try:
            array = numpy_helper.to_array(tensor)
        except Exception as error:  # onnx raises whatever NumPy does where counts disagree
            raise damaged(where, f"cannot be read: {error}") from error
    return np.array(array, dtype=dtype_of(tensor.data_type, where, precision))


def _read_external(tensor: TensorProto, folder: Path | None, size: int, where: str) -> bytes:
    if folder is None:
        raise damaged(where, "has its data in an external file, and the model came as an object", "Load the model by its path.")
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    parts = {*PurePosixPath(location).parts, *PureWindowsPath(location).parts}
    if (
        not location
        or "\0" in location
        or ".." in parts
        or PurePosixPath(location).is_absolute()
        or PureWindowsPath(location).anchor
    ):
        raise damaged(
            where, f"has external data at {location!r}; it must be a relative path without '..'", "Do not trust this file."
        )
    path = folder / location
    try:
        inside = path.resolve(strict=True).is_relative_to(folder.resolve(strict=True))
    except (OSError, RuntimeError) as error:
        raise damaged(where, f"has external data at {location!r}, which cannot be opened: {error}", "Copy it there.") from error
    if not inside:
        raise damaged(
            where, f"has external data at {location!r}, a link out of the model's folder", "Copy the file into the folder."
        )
    if not path.is_file():
        raise damaged(where, f"has external data at {location!r}, which is no file")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
    except ValueError as error:
        raise damaged(where, f"has an external offset or length that is no number: {error}") from error
    available = path.stat().st_size
    if offset < 0 or length != size or offset + length > available:
        raise damaged(
            where, f"needs {size} bytes; {location!r} has {available}, of which the tensor claims {length} from byte {offset}"
        )
    with path.open("rb") as file:
        file.seek(offset)
        data: bytes = file.read(length)
    return data
