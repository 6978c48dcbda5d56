"""The array-API functions that `mgs_core` calls, on TensorFlow tensors.

`tf.experimental.numpy` is not used: it promotes types its own way and switches methods on every tensor of the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import tensorflow as tf

from mgs_core._types import Array


def _axis(axis: int | Sequence[int] | None) -> Any:
    return list(axis) if isinstance(axis, Sequence) else axis


class TensorFlowNamespace:
    """Implement the part of the array-API standard that the core uses."""

    float16, float32, float64, bfloat16 = tf.float16, tf.float32, tf.float64, tf.bfloat16
    int8, int16, int32, int64, uint8 = tf.int8, tf.int16, tf.int32, tf.int64, tf.uint8
    bool = tf.bool
    linalg = SimpleNamespace(cholesky=tf.linalg.cholesky)

    abs, exp, log, sign, sqrt = map(staticmethod, (tf.abs, tf.exp, tf.math.log, tf.sign, tf.sqrt))
    square, tanh, where = map(staticmethod, (tf.square, tf.tanh, tf.where))
    maximum, minimum, ones_like, zeros_like = map(staticmethod, (tf.maximum, tf.minimum, tf.ones_like, tf.zeros_like))

    def asarray(self, value: Any, *, dtype: Any = None) -> Array:
        """Return the value as a tensor."""
        return tf.convert_to_tensor(value, dtype=dtype)

    def astype(self, array: Array, dtype: Any) -> Array:
        """Return the array in another dtype."""
        return tf.cast(array, dtype)

    def arange(self, stop: int, *, dtype: Any = tf.int64) -> Array:
        """Return 0, 1, …, stop − 1."""
        return tf.cast(tf.range(stop, dtype=tf.int64), dtype)

    def eye(self, n: int, *, dtype: Any = tf.float32) -> Array:
        """Return the identity matrix."""
        return tf.eye(n, dtype=dtype)

    def concat(self, arrays: Sequence[Array], *, axis: int = 0) -> Array:
        """Join along an axis."""
        return tf.concat(arrays, axis)

    def stack(self, arrays: Sequence[Array], *, axis: int = 0) -> Array:
        """Join along a new axis."""
        return tf.stack(arrays, axis)

    def reshape(self, array: Array, shape: Sequence[int]) -> Array:
        """Return the array in another shape."""
        return tf.reshape(array, shape)

    def permute_dims(self, array: Array, axes: Sequence[int]) -> Array:
        """Return the array with its axes in another order."""
        return tf.transpose(array, axes)

    def expand_dims(self, array: Array, *, axis: int = 0) -> Array:
        """Return the array with a new axis of length 1."""
        return tf.expand_dims(array, axis)

    def matmul(self, left: Array, right: Array) -> Array:
        """Return the matrix product."""
        return tf.matmul(left, right)

    def sum(self, array: Array, *, axis: int | Sequence[int] | None = None, keepdims: Any = False) -> Array:
        """Return the sum."""
        return tf.reduce_sum(array, axis=_axis(axis), keepdims=keepdims)

    def mean(self, array: Array, *, axis: int | Sequence[int] | None = None, keepdims: Any = False) -> Array:
        """Return the mean."""
        return tf.reduce_mean(array, axis=_axis(axis), keepdims=keepdims)

    def max(self, array: Array, *, axis: int | Sequence[int] | None = None, keepdims: Any = False) -> Array:
        """Return the maximum."""
        return tf.reduce_max(array, axis=_axis(axis), keepdims=keepdims)

    def finfo(self, dtype: Any) -> SimpleNamespace:
        """Return the relative spacing of numbers, as `.eps`."""
        digits = {tf.bfloat16: 7, tf.float16: 10, tf.float32: 23, tf.float64: 52}
        return SimpleNamespace(eps=2.0 ** -digits[tf.as_dtype(dtype)])


namespace = TensorFlowNamespace()
