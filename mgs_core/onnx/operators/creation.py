"""Constants, types and values that pass through."""

from __future__ import annotations

from math import ceil

import numpy as np

from mgs_core._types import Array, Namespace
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.common import integers, native_dtype
from mgs_core.onnx.operators.registry import Run, operator
from mgs_core.onnx.tensors import check_size


@operator("Constant")
def constant(node: Node, xp: Namespace) -> Run:
    """Return a constant."""
    given = [(name, value) for name, value in node.attributes.items() if name.startswith("value")]
    if len(given) != 1:
        raise node.damaged(f"has {len(given)} values; 1 is needed")
    name, value = given[0]
    if name in ("value_string", "value_strings"):
        raise node.unsupported("is a string", "Only numbers are evaluated.")
    kind = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}.get(name)
    array = np.asarray(value, dtype=kind)
    if node.precision is not None and np.issubdtype(array.dtype, np.floating):
        array = array.astype(node.precision)
    return lambda: array


@operator("ConstantOfShape", since=9, host=None)
def constant_of_shape(node: Node, xp: Namespace) -> Run:
    """Fill a shape with one value."""
    value = np.asarray(node.attributes.get("value", np.zeros(1, node.dtype(1))))
    if value.size != 1:
        raise node.damaged(f"has a value of {value.size} elements; 1 is needed")

    def run(shape: Array) -> Array:
        wanted = integers(shape)
        check_size(wanted, str(node))
        return np.full(wanted, value.reshape(()), dtype=value.dtype)

    return run


@operator("Range", since=11, host=None)
def arange(node: Node, xp: Namespace) -> Run:
    """Count from start to limit."""

    def run(start: Array, limit: Array, delta: Array) -> Array:
        first, step = start.item(), delta.item()
        if step == 0:
            raise node.damaged("counts in steps of 0")
        count = max(0, ceil((limit.item() - first) / step))
        check_size((count,), str(node))
        return (first + step * np.arange(count)).astype(start.dtype)

    return run


@operator("EyeLike", since=9)
def eye_like(node: Node, xp: Namespace) -> Run:
    """Return ones on a diagonal."""
    kind, k = node.attributes.get("dtype"), node.attributes["k"]

    def run(x: Array) -> Array:
        dtype = x.dtype if kind is None else native_dtype(xp, node.dtype(kind))
        return xp.astype(xp.asarray(np.eye(x.shape[0], x.shape[1], k=k)), dtype)

    return run


@operator("Identity")
def identity(node: Node, xp: Namespace) -> Run:
    """Return the input."""
    return lambda x: x


@operator("Cast", since=6)
def cast(node: Node, xp: Namespace) -> Run:
    """Convert to another type."""
    dtype = native_dtype(xp, node.dtype(node.attributes["to"]))
    return lambda x: x if x.dtype == dtype else xp.astype(x, dtype)


@operator("CastLike", since=15)
def cast_like(node: Node, xp: Namespace) -> Run:
    """Convert to the type of the second input."""
    return lambda x, like: x if x.dtype == like.dtype else xp.astype(x, like.dtype)


@operator("Dropout", since=7, host=(1, 2), many=True)
def dropout(node: Node, xp: Namespace) -> Run:
    """Return the input: a model is evaluated in inference mode, or drops nothing."""

    def check(ratio: Array, training: Array) -> None:
        if training is not None and np.any(training) and (ratio is None or np.any(ratio)):
            raise node.unsupported("is in training mode, which is random", "Export the model in inference mode.")

    def run(x: Array, ratio: Array = None, training: Array = None) -> list[Array]:
        check(ratio, training)
        return [x, xp.ones_like(x) == 1]

    if not node.has(1) or 1 in node.constants:
        check(node.constants.get(1), node.constants.get(2))
    return run
