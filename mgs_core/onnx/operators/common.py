"""Small helpers that operators share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from mgs_core._types import Array, Namespace
from mgs_core.onnx.graph import Node


def integers(array: Array) -> tuple[int, ...]:
    """Return the elements of a host array as integers."""
    return tuple(int(value) for value in np.ravel(array))


def axis_of(axis: int, rank: int, node: Node) -> int:
    """Return an axis counted from the front.

    Args:
        axis: from −rank to rank − 1.
        rank: number of axes.
        node: that names it.

    Returns:
        From 0 to rank − 1.

    Raises:
        ArgumentError: when the axis is out of range.
    """
    if not -rank <= axis < rank:
        raise node.damaged(f"names the axis {axis} of a tensor with {rank} axes")
    return axis % rank


def axes_of(axes: Iterable[int], rank: int, node: Node) -> tuple[int, ...]:
    """Return axes counted from the front, each once."""
    found = tuple(axis_of(axis, rank, node) for axis in axes)
    if len(set(found)) != len(found):
        raise node.damaged(f"names the same axis twice: {found}")
    return found


def native_dtype(xp: Namespace, dtype: Any) -> Any:
    """Return the namespace's dtype for a NumPy dtype; of JAX without 64-bit types, the one that stands for it."""
    if np.dtype(dtype).name == "bfloat16" and hasattr(xp, "bfloat16"):
        return xp.bfloat16
    return xp.asarray(np.zeros((), dtype=dtype)).dtype


def is_half(x: Array) -> bool:
    """Say whether an array is of 16-bit floating point."""
    return "float16" in str(x.dtype)


def root(xp: Namespace, total: Array, p: float = 2.0) -> Array:
    """Return the p-th root of sums of powers, a p-norm; its derivative at 0, where it has none, is 0."""
    zero = total == 0
    inner = xp.where(zero, xp.ones_like(total), total)  # keeps 1/0 out of the derivative
    found = xp.sqrt(inner) if p == 2 else inner ** (1.0 / p)
    return xp.where(zero, xp.zeros_like(found), found)


def is_real(xp: Namespace, x: Array) -> bool:
    """Say whether an array is floating-point."""
    # NumPy's own isdtype knows nothing of bfloat16
    return is_half(x) or bool(xp.isdtype(x.dtype, "real floating"))


def is_integral(xp: Namespace, x: Array) -> bool:
    """Say whether an array holds integers."""
    return bool(xp.isdtype(x.dtype, "integral"))
