"""The array-API functions that `mgs_core` calls, on TensorFlow tensors, and native versions of what ONNX operators need.

`tf.experimental.numpy` is not used: it promotes types its own way and switches methods on every tensor of the process.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

from mgs_core._types import Array

from .determinant import log_determinant

Axis: TypeAlias = int | Sequence[int] | None
Pairs: TypeAlias = Sequence[tuple[int, int]]

_KINDS: dict[str, Callable[[Any], bool]] = {
    "bool": lambda dtype: bool(dtype.is_bool),
    "signed integer": lambda dtype: bool(dtype.is_integer and not dtype.is_unsigned),
    "unsigned integer": lambda dtype: bool(dtype.is_unsigned),
    "integral": lambda dtype: bool(dtype.is_integer),
    "real floating": lambda dtype: bool(dtype.is_floating),
    "complex floating": lambda dtype: bool(dtype.is_complex),
    "numeric": lambda dtype: bool(dtype.is_integer or dtype.is_floating or dtype.is_complex),
}


def _reduction(function: Callable[..., Array]) -> Any:
    def reduce(array: Array, *, axis: Axis = None, keepdims: bool = False, dtype: Any = None) -> Array:
        array = array if dtype is None else tf.cast(array, dtype)
        return function(array, axis=list(axis) if isinstance(axis, Sequence) else axis, keepdims=keepdims)

    return staticmethod(reduce)


def _position(function: Callable[..., Array]) -> Any:
    def find(array: Array, *, axis: int | None = None, keepdims: bool = False) -> Array:
        found = function(tf.reshape(array, [-1]) if axis is None else array, axis=0 if axis is None else axis)
        return tf.expand_dims(found, axis) if keepdims and axis is not None else found

    return staticmethod(find)


class TensorFlowNamespace:
    """Implement the part of the array-API standard that the core and the ONNX interpreter use."""

    bfloat16, float16, float32, float64 = tf.bfloat16, tf.float16, tf.float32, tf.float64
    int8, int16, int32, int64 = tf.int8, tf.int16, tf.int32, tf.int64
    uint8, uint16, uint32, uint64, bool = tf.uint8, tf.uint16, tf.uint32, tf.uint64, tf.bool
    inf, nan, pi = float("inf"), float("nan"), np.pi
    linalg = SimpleNamespace(cholesky=tf.linalg.cholesky, det=tf.linalg.det, matmul=tf.matmul)

    abs, ceil, floor, round, sign = map(staticmethod, (tf.abs, tf.math.ceil, tf.floor, tf.round, tf.sign))
    exp, expm1, log, log1p = map(staticmethod, (tf.exp, tf.math.expm1, tf.math.log, tf.math.log1p))
    sqrt, square, negative = map(staticmethod, (tf.sqrt, tf.square, tf.negative))
    sin, cos, tan, asin, acos, atan = map(staticmethod, (tf.sin, tf.cos, tf.tan, tf.asin, tf.acos, tf.atan))
    sinh, cosh, tanh, asinh, acosh, atanh = map(staticmethod, (tf.sinh, tf.cosh, tf.tanh, tf.asinh, tf.acosh, tf.atanh))
    isfinite, isinf, isnan = map(staticmethod, (tf.math.is_finite, tf.math.is_inf, tf.math.is_nan))
    add, subtract, multiply, divide = map(staticmethod, (tf.add, tf.subtract, tf.multiply, tf.divide))
    pow, remainder, maximum, minimum = map(staticmethod, (tf.pow, tf.math.floormod, tf.maximum, tf.minimum))
    equal, less, less_equal, greater = map(staticmethod, (tf.equal, tf.less, tf.less_equal, tf.greater))
    greater_equal, not_equal = map(staticmethod, (tf.greater_equal, tf.not_equal))
    logical_and, logical_or, logical_not = map(staticmethod, (tf.logical_and, tf.logical_or, tf.logical_not))
    logical_xor = staticmethod(tf.math.logical_xor)
    bitwise_and, bitwise_or, bitwise_xor = map(
        staticmethod, (tf.bitwise.bitwise_and, tf.bitwise.bitwise_or, tf.bitwise.bitwise_xor)
    )
    bitwise_invert, bitwise_left_shift = map(staticmethod, (tf.bitwise.invert, tf.bitwise.left_shift))
    bitwise_right_shift = staticmethod(tf.bitwise.right_shift)
    matmul, ones_like, zeros_like, broadcast_to = map(staticmethod, (tf.matmul, tf.ones_like, tf.zeros_like, tf.broadcast_to))
    reshape, permute_dims, astype = map(staticmethod, (tf.reshape, tf.transpose, tf.cast))
    sum, mean, prod = map(_reduction, (tf.reduce_sum, tf.reduce_mean, tf.reduce_prod))
    max, min, any, all = map(_reduction, (tf.reduce_max, tf.reduce_min, tf.reduce_any, tf.reduce_all))
    argmax, argmin = map(_position, (tf.argmax, tf.argmin))

    def asarray(self, value: Any, *, dtype: Any = None) -> Array:
        """Return the value as a tensor."""
        if isinstance(value, (tf.Tensor, tf.Variable)) and dtype is not None:
            return tf.cast(value, dtype)
        return tf.convert_to_tensor(value, dtype=dtype)

    def arange(self, start: int, stop: int | None = None, step: int = 1, *, dtype: Any = tf.int64) -> Array:
        """Return start, start + step, … before stop."""
        first, last = (0, start) if stop is None else (start, stop)
        return tf.cast(tf.range(first, last, step, dtype=tf.int64), dtype)

    def eye(self, n: int, *, dtype: Any = tf.float32) -> Array:
        """Return the identity matrix."""
        return tf.eye(n, dtype=dtype)

    def full(self, shape: Sequence[int], value: Any, *, dtype: Any = None) -> Array:
        """Return an array filled with a value."""
        return tf.fill(shape, tf.convert_to_tensor(value, dtype=dtype))

    def full_like(self, array: Array, value: Any) -> Array:
        """Return an array of the same shape filled with a value."""
        return tf.fill(tf.shape(array), tf.cast(value, array.dtype))

    def zeros(self, shape: Sequence[int], *, dtype: Any = tf.float32) -> Array:
        """Return zeros."""
        return tf.zeros(shape, dtype)

    def ones(self, shape: Sequence[int], *, dtype: Any = tf.float32) -> Array:
        """Return ones."""
        return tf.ones(shape, dtype)

    def concat(self, arrays: Sequence[Array], *, axis: int = 0) -> Array:
        """Join along an axis."""
        return tf.concat(arrays, axis)

    def stack(self, arrays: Sequence[Array], *, axis: int = 0) -> Array:
        """Join along a new axis."""
        return tf.stack(arrays, axis)

    def expand_dims(self, array: Array, *, axis: int = 0) -> Array:
        """Return the array with a new axis of length 1."""
        return tf.expand_dims(array, axis)

    def where(self, condition: Array, left: Array, right: Array) -> Array:
        """Choose elementwise."""
        return tf.where(condition, left, right)

    def take(self, array: Array, indices: Array, *, axis: int = 0) -> Array:
        """Return the slices at these indices of an axis."""
        return tf.gather(array, indices, axis=axis)

    def flip(self, array: Array, *, axis: Axis = None) -> Array:
        """Reverse the order along axes."""
        axes = range(array.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
        return tf.reverse(array, [place % array.ndim for place in axes])

    def argsort(self, array: Array, *, axis: int = -1, descending: builtins.bool = False, stable: builtins.bool = True) -> Array:
        """Return the indices that sort."""
        return tf.cast(tf.argsort(array, axis, "DESCENDING" if descending else "ASCENDING", stable=stable), tf.int64)

    def cumulative_sum(self, array: Array, *, axis: int) -> Array:
        """Return the running sum."""
        return tf.cumsum(array, axis)

    def cumulative_prod(self, array: Array, *, axis: int) -> Array:
        """Return the running product."""
        return tf.math.cumprod(array, axis)

    def logaddexp(self, left: Array, right: Array) -> Array:
        """Return `log(exp(left) + exp(right))`."""
        return tf.maximum(left, right) + tf.math.softplus(-tf.abs(left - right))

    def isdtype(self, dtype: Any, kind: Any) -> builtins.bool:
        """Say whether the dtype is of a kind."""
        kinds = kind if isinstance(kind, tuple) else (kind,)
        return builtins.any(_KINDS[k](tf.as_dtype(dtype)) if isinstance(k, str) else tf.as_dtype(dtype) == k for k in kinds)

    def finfo(self, dtype: Any) -> SimpleNamespace:
        """Return the limits of a floating-point dtype."""
        dtype = tf.as_dtype(dtype)
        digits, least = {tf.bfloat16: (7, -126), tf.float16: (10, -14), tf.float32: (23, -126), tf.float64: (52, -1022)}[dtype]
        return SimpleNamespace(
            eps=2.0**-digits, max=float(dtype.max), min=float(dtype.min), smallest_normal=2.0**least, dtype=dtype
        )

    def iinfo(self, dtype: Any) -> SimpleNamespace:
        """Return the limits of an integer dtype."""
        dtype = tf.as_dtype(dtype)
        return SimpleNamespace(max=int(dtype.max), min=int(dtype.min), dtype=dtype)

    @staticmethod
    def mgs_product(left: Array, right: Array) -> Array:
        """Return `left rightᵀ` over the last axis, (..., n, p) and (..., m, p) to (..., n, m)."""
        return _gram(left) if left is right else tf.matmul(left, right, transpose_b=True)

    # what ONNX operators ask for beyond the standard: mgs_core/onnx/extensions.py says what each must do

    mgs_relu, mgs_erf, mgs_einsum = map(staticmethod, (tf.nn.relu, tf.math.erf, tf.einsum))

    def mgs_pad(self, x: Array, widths: Pairs, *, value: Any = 0.0) -> Array:
        """Return x with the value around it."""
        return tf.pad(x, widths, constant_values=tf.cast(value, x.dtype))

    def mgs_labels(self, labels: Array, c: int) -> Any:
        """Return labels as integers of NumPy; None where they are not known yet, then the graph refuses bad ones as it runs."""
        labels = tf.convert_to_tensor(labels)
        while tf.is_symbolic_tensor(labels) and labels.op.type == "Identity":
            labels = labels.op.inputs[0]
        known = tf.get_static_value(labels)
        if known is None:
            labels = labels if labels.dtype.is_floating else tf.cast(labels, tf.int64)  # in 8 bits `c` may have no room
            valid = tf.reduce_all((labels >= 0) & (labels < c))
            range_ = [tf.reduce_min(labels), tf.reduce_max(labels)]
            tf.debugging.Assert(valid, [f"`targets` must be labels in 0..{c - 1}; got least and most", *range_])
        return known

    def mgs_shares(self, targets: Array) -> Array:
        """Return shares of the outputs; the graph refuses those below 0 as it runs."""
        if targets.dtype == tf.bool:
            return targets
        least = tf.reduce_min(targets)
        message = '`targets` must be labels, or shares of the outputs of at least 0, for output="target"; got'
        tf.debugging.Assert(least >= 0, [message, least])
        return targets

    mgs_log_determinant = staticmethod(log_determinant)

    def mgs_values(self, array: Array) -> Any:
        """Return the values as an array of NumPy; None where they are not known yet, or would have to be waited for."""
        return tf.get_static_value(array) if tf.is_symbolic_tensor(array) or "CPU" in array.device else None

    def mgs_lookup(self, table: Array, indices: Array) -> Array:
        """Return `table[indices]`."""
        return tf.gather(table, indices)

    def mgs_scatter(self, data: Array, indices: Array, updates: Array, *, reduction: str) -> Array:
        """Return data with updates written at indices."""
        names = {"none": "update", "add": "add", "max": "max", "min": "min"}
        if reduction == "mul":
            rows = tf.equal(tf.expand_dims(indices, 1), tf.range(data.shape[0], dtype=indices.dtype))
            return data * tf.reduce_prod(tf.where(rows, tf.expand_dims(updates, 1), tf.ones_like(updates[:1])), axis=0)
        return getattr(tf, f"tensor_scatter_nd_{names[reduction]}")(data, tf.expand_dims(indices, 1), updates)

    def mgs_convolution(
        self, x: Array, weight: Array, *, strides: Sequence[int], pads: Pairs, dilations: Sequence[int], groups: int
    ) -> Array:
        """Return the cross-correlation of x (n, i, *space) with weight (o, i/groups, *window)."""
        rank = weight.ndim - 2
        if groups > 1 or builtins.any(size > 1 for size in dilations) or rank > 3:
            from mgs_core.onnx.extensions import portable  # TensorFlow differentiates neither groups nor dilations on a CPU

            return portable(self, "convolution")(x, weight, strides=strides, pads=pads, dilations=dilations, groups=groups)
        x = _channels_last(tf.pad(x, ((0, 0), (0, 0), *pads)))
        window = tf.transpose(weight, (*range(2, weight.ndim), 1, 0))
        return _channels_first(tf.nn.convolution(x, window, list(strides), "VALID"))

    def mgs_max_pool(
        self, x: Array, *, window: Sequence[int], strides: Sequence[int], pads: Pairs, dilations: Sequence[int]
    ) -> Array:
        """Return the greatest of each window."""
        if not _poolable(window, strides, dilations):
            from mgs_core.onnx.extensions import portable

            return portable(self, "max_pool")(x, window=window, strides=strides, pads=pads, dilations=dilations)
        value = x.dtype.min
        return _pool("MAX", self.mgs_pad(x, ((0, 0), (0, 0), *pads), value=value), window, strides, dilations)

    def mgs_average_pool(
        self, x: Array, *, window: Sequence[int], strides: Sequence[int], pads: Pairs, dilations: Sequence[int]
    ) -> Array:
        """Return the mean of each window; padding counts as zeros."""
        if not _poolable(window, strides, dilations):
            from mgs_core.onnx.extensions import portable

            return portable(self, "average_pool")(x, window=window, strides=strides, pads=pads, dilations=dilations)
        return _pool("AVG", self.mgs_pad(x, ((0, 0), (0, 0), *pads)), window, strides, dilations)


@tf.custom_gradient  # type: ignore[untyped-decorator]  # tensorflow is not followed
def _gram(rows: Array) -> Any:
    """Return `R Rᵀ`; its derivative is `(G + Gᵀ) R`, one product where the product rule has two."""

    def gradient(upstream: Array) -> Array:
        return tf.matmul(upstream + tf.linalg.matrix_transpose(upstream), rows)

    return tf.matmul(rows, rows, transpose_b=True), gradient


def _channels_last(x: Array) -> Array:
    return tf.transpose(x, (0, *range(2, x.ndim), 1))


def _channels_first(x: Array) -> Array:
    return tf.transpose(x, (0, x.ndim - 1, *range(1, x.ndim - 1)))


def _poolable(window: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> builtins.bool:
    """Say whether TensorFlow pools so: not with strides and dilations at once, nor with strides beyond the window."""
    apart = builtins.any(size > 1 for size in strides) and builtins.any(size > 1 for size in dilations)
    return not apart and builtins.all(step <= size for step, size in zip(strides, window, strict=True))


def _pool(kind: str, x: Array, window: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Array:
    spread = tf.nn.pool(_channels_last(x), list(window), kind, strides=list(strides), padding="VALID", dilations=list(dilations))
    return _channels_first(spread)


namespace = TensorFlowNamespace()
