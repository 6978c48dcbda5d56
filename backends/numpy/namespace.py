"""Array-API names for arrays that autograd traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd.tracer import getval, isbox

from mgs_core._types import Array

from . import primitives


class _LinearAlgebra:
    cholesky = staticmethod(anp.linalg.cholesky)
    det = staticmethod(anp.linalg.det)
    inv = staticmethod(anp.linalg.inv)


class TracedNamespace:
    """Offer autograd's functions under array-API names; plain NumPy arrays are taken too.

    Names that the array API and autograd share come through `__getattr__`. The names with `mgs_` are those of
    `mgs_core.onnx.extensions`.
    """

    linalg = _LinearAlgebra
    concat = staticmethod(anp.concatenate)
    pow = staticmethod(anp.power)
    bitwise_invert = staticmethod(anp.invert)
    bitwise_left_shift = staticmethod(anp.left_shift)
    bitwise_right_shift = staticmethod(anp.right_shift)
    finfo = staticmethod(np.finfo)
    iinfo = staticmethod(np.iinfo)
    arange = staticmethod(np.arange)
    eye = staticmethod(np.eye)
    zeros = staticmethod(np.zeros)
    ones = staticmethod(np.ones)
    full = staticmethod(np.full)
    flip = staticmethod(primitives.flip)
    round = staticmethod(anp.round)
    mgs_relu = staticmethod(primitives.relu)
    mgs_sigmoid = staticmethod(primitives.sigmoid)
    mgs_softmax = staticmethod(primitives.softmax)
    mgs_log_softmax = staticmethod(primitives.log_softmax)
    mgs_einsum = staticmethod(anp.einsum)

    def __getattr__(self, name: str) -> Any:
        """Return autograd's function of that name, and keep it: a look-up costs as much as a small operation."""
        function = getattr(anp, name)
        setattr(self, name, function)
        return function

    @staticmethod
    def mgs_values(array: Any) -> Any:
        """Return the values behind what is traced, however deep."""
        while isbox(array):
            array = getval(array)
        return array

    mgs_constant = mgs_values  # what is not traced is a constant of the derivative

    @staticmethod
    def isdtype(dtype: Any, kind: Any) -> bool:
        """Say whether a dtype is of a kind; NumPy itself does not know bfloat16."""
        if getattr(dtype, "name", "") == "bfloat16":
            return kind in ("real floating", "numeric")
        return bool(np.isdtype(dtype, kind))

    @staticmethod
    def asarray(value: Any, dtype: Any = None) -> Array:
        """Return the value as an array; a traced array stays traced."""
        if anp.numpy_boxes.ArrayBox in type(value).__mro__:
            return value if dtype is None or dtype == value.dtype else value.astype(dtype)
        return np.asarray(value, dtype=dtype)

    @staticmethod
    def astype(array: Array, dtype: Any, copy: bool = True) -> Array:
        """Return the array in another dtype."""
        return array if array.dtype == dtype and not copy else array.astype(dtype)

    @staticmethod
    def reshape(array: Array, shape: Any) -> Array:
        """Return the array in another shape; nothing is traced where it has that shape."""
        return array if array.shape == shape else anp.reshape(array, shape)

    @staticmethod
    def permute_dims(array: Array, axes: Any) -> Array:
        """Return the array with its axes permuted; a reshape where only axes of length 1 move."""
        moved = [axis for axis in axes if array.shape[axis] != 1]
        if moved == sorted(moved):
            return TracedNamespace.reshape(array, tuple(array.shape[axis] for axis in axes))
        return primitives.transpose(array, tuple(axes))

    @staticmethod
    def zeros_like(array: Array, dtype: Any = None) -> Array:
        """Return zeros of the array's shape."""
        return np.zeros(array.shape, dtype=dtype or array.dtype)

    @staticmethod
    def ones_like(array: Array, dtype: Any = None) -> Array:
        """Return ones of the array's shape."""
        return np.ones(array.shape, dtype=dtype or array.dtype)

    @staticmethod
    def full_like(array: Array, value: Any, dtype: Any = None) -> Array:
        """Return the array's shape filled with a value."""
        return np.full(array.shape, value, dtype=dtype or array.dtype)

    @staticmethod
    def stack(arrays: Sequence[Array], axis: int = 0) -> Array:
        """Return the arrays along a new axis; autograd's own copies each of them first."""
        return anp.concatenate([anp.expand_dims(array, axis) for array in arrays], axis)

    @staticmethod
    def take(array: Array, indices: Array, axis: int = 0) -> Array:
        """Return the slices at the indices along an axis."""
        return array[(slice(None),) * (axis % array.ndim) + (indices,)] if axis else array[indices]

    @staticmethod
    def argsort(array: Array, axis: int = -1, descending: bool = False, stable: bool = True) -> Array:
        """Return the places that sort the array; equal values keep their order."""
        if descending:
            length = array.shape[axis]
            turned = anp.argsort(anp.flip(array, axis=axis), axis=axis, kind="stable")
            return anp.flip(length - 1 - turned, axis=axis)
        return anp.argsort(array, axis=axis, kind="stable")

    @staticmethod
    def cumulative_sum(array: Array, axis: int = -1, dtype: Any = None) -> Array:
        """Return the running sums along an axis."""
        summed = anp.cumsum(array, axis=axis)
        return summed if dtype is None or summed.dtype == dtype else summed.astype(dtype)

    @staticmethod
    def mgs_patches(x: Array, window: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Array:
        """Return the windows of x (n, channels, *space), already padded: (n, channels, *window, *output positions)."""
        return primitives.patches(x, tuple(window), tuple(strides), tuple(dilations))

    @staticmethod
    def mgs_pad(x: Array, widths: Any, *, value: float = 0.0) -> Array:
        """Return x with a constant around it."""
        return primitives.pad(x, tuple(widths), value)

    @staticmethod
    def mgs_max_pool(x: Array, *, window: Any, strides: Any, pads: Any, dilations: Any) -> Array:
        """Return the greatest of each window; padding counts as the least value."""
        if any(map(any, pads)):
            least = -np.inf if np.issubdtype(x.dtype, np.floating) else np.iinfo(x.dtype).min
            x = primitives.pad(x, ((0, 0), (0, 0), *pads), least)
        return primitives.max_pool(x, tuple(window), tuple(strides), tuple(dilations))
