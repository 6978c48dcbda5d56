"""Sums, means, extremes and norms over axes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import numpy as np

from mgs_core._types import Array, Namespace
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.common import axes_of, axis_of, integers, is_real, native_dtype, root
from mgs_core.onnx.operators.registry import Run, operator

Reduction = Callable[[Namespace, Array, tuple[int, ...]], Array]


def _extreme(name: str) -> Reduction:
    def reduce(xp: Namespace, x: Array, axes: tuple[int, ...]) -> Array:
        if not is_real(xp, x) and xp.isdtype(x.dtype, "bool"):
            return (xp.any if name == "max" else xp.all)(x, axis=axes, keepdims=True)
        if any(x.shape[axis] == 0 for axis in axes):  # of nothing: the value that any other beats
            real = is_real(xp, x)
            least, most = (-float("inf"), float("inf")) if real else (xp.iinfo(x.dtype).min, xp.iinfo(x.dtype).max)
            shape = tuple(1 if at in axes else size for at, size in enumerate(x.shape))
            return xp.full(shape, least if name == "max" else most, dtype=x.dtype)
        return getattr(xp, name)(x, axis=axes, keepdims=True)

    return reduce


def _log_sum_exp(xp: Namespace, x: Array, axes: tuple[int, ...]) -> Array:
    if any(x.shape[axis] == 0 for axis in axes):
        return xp.log(_sum(xp, x, axes))
    top = xp.max(x, axis=axes, keepdims=True)
    top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    return top + xp.log(_sum(xp, xp.exp(x - top), axes))


def _sum(xp: Namespace, x: Array, axes: tuple[int, ...]) -> Array:
    return xp.sum(x, axis=axes, keepdims=True, dtype=x.dtype) if not is_real(xp, x) else xp.sum(x, axis=axes, keepdims=True)


def _mean(xp: Namespace, x: Array, axes: tuple[int, ...]) -> Array:
    if is_real(xp, x):
        return xp.mean(x, axis=axes, keepdims=True)
    total, count = _sum(xp, xp.astype(x, native_dtype(xp, np.dtype(np.int64))), axes), prod(x.shape[axis] for axis in axes)
    return xp.astype(xp.sign(total) * (xp.abs(total) // count), x.dtype)  # towards zero, as onnxruntime rounds


_REDUCTIONS: dict[str, Reduction] = {
    "ReduceSum": _sum,
    "ReduceMean": _mean,
    "ReduceProd": lambda xp, x, axes: xp.prod(x, axis=axes, keepdims=True),
    "ReduceMax": _extreme("max"),
    "ReduceMin": _extreme("min"),
    "ReduceL1": lambda xp, x, axes: _sum(xp, xp.abs(x), axes),
    "ReduceL2": lambda xp, x, axes: root(xp, _sum(xp, x * x, axes)),
    "ReduceSumSquare": lambda xp, x, axes: _sum(xp, x * x, axes),
    "ReduceLogSum": lambda xp, x, axes: xp.log(_sum(xp, x, axes)),
    "ReduceLogSumExp": _log_sum_exp,
}


def _build(node: Node, xp: Namespace, reduction: Reduction) -> Run:
    """Reduce over the axes that an attribute or an input names."""
    keep, idle = node.attributes["keepdims"], node.attributes.get("noop_with_empty_axes", 0)

    def run(x: Array, axes: Any = None) -> Array:
        chosen = node.attributes.get("axes") if axes is None else integers(axes)
        if not chosen and idle:
            # of one element each: the operator's own function still applies, the sum does not
            return xp.reshape(reduction(xp, xp.expand_dims(x, axis=-1), (x.ndim,)), x.shape)
        places = axes_of(chosen, x.ndim, node) if chosen else tuple(range(x.ndim))
        y = reduction(xp, x, places)
        return y if keep else xp.reshape(y, tuple(size for at, size in enumerate(x.shape) if at not in places))

    return run


for _name, _reduction in _REDUCTIONS.items():
    operator(_name, since=13 if _name == "ReduceSum" else 18, host=(1,))(partial(_build, reduction=_reduction))
    operator(_name, since=1)(partial(_build, reduction=_reduction))


@operator("ArgMax", "ArgMin")
def arg_extreme(node: Node, xp: Namespace) -> Run:
    """Return the place of the greatest or smallest along an axis; the first of equals, or the last on demand."""
    find = xp.argmax if node.operator == "ArgMax" else xp.argmin
    axis, keep, last = node.attributes["axis"], node.attributes["keepdims"], node.attributes.get("select_last_index", 0)
    dtype = native_dtype(xp, "int64")

    def run(x: Array) -> Array:
        place = axis_of(axis, x.ndim, node)
        found = x.shape[place] - 1 - find(xp.flip(x, axis=place), axis=place) if last else find(x, axis=place)
        return xp.astype(xp.expand_dims(found, axis=place) if keep else found, dtype)

    return run


@operator("CumSum", "CumProd", since=11, host=(1,))
def cumulative(node: Node, xp: Namespace) -> Run:
    """Accumulate along an axis, from either end, each element included or not."""
    exclusive, reverse = node.attributes["exclusive"], node.attributes["reverse"]
    total = node.operator == "CumSum"

    def run(x: Array, axis: Array) -> Array:
        place = axis_of(integers(axis)[0], x.ndim, node)
        x = xp.flip(x, axis=place) if reverse else x
        y = (xp.cumulative_sum if total else xp.cumulative_prod)(x, axis=place)
        y = y if y.dtype == x.dtype else xp.astype(y, x.dtype)
        if exclusive:
            front = (slice(None),) * place
            start = x[(*front, slice(0, 1), ...)]
            start = xp.zeros_like(start) if total else xp.ones_like(start)
            y = xp.concat([start, y[(*front, slice(0, max(0, x.shape[place] - 1)), ...)]], axis=place)[
                (*front, slice(0, x.shape[place]), ...)
            ]
        return xp.flip(y, axis=place) if reverse else y

    return run
