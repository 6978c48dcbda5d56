"""Array-API names for arrays that autograd traces."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd.extend import defvjp, primitive

from mgs_core._types import Array


class _LinearAlgebra:
    cholesky = staticmethod(anp.linalg.cholesky)


class TracedNamespace:
    """Offer autograd's functions under array-API names; plain NumPy arrays are taken too.

    Names that the array API and autograd share come through `__getattr__`.
    """

    linalg = _LinearAlgebra
    concat = staticmethod(anp.concatenate)
    permute_dims = staticmethod(anp.transpose)
    pow = staticmethod(anp.power)
    isdtype = staticmethod(np.isdtype)
    finfo = staticmethod(np.finfo)
    arange = staticmethod(np.arange)
    eye = staticmethod(np.eye)
    zeros = staticmethod(np.zeros)
    ones = staticmethod(np.ones)
    full = staticmethod(np.full)
    iinfo = staticmethod(np.iinfo)
    asin, acos, atan = staticmethod(anp.arcsin), staticmethod(anp.arccos), staticmethod(anp.arctan)
    asinh, acosh, atanh = staticmethod(anp.arcsinh), staticmethod(anp.arccosh), staticmethod(anp.arctanh)

    def __getattr__(self, name: str) -> Any:
        """Return autograd's function of that name."""
        return getattr(anp, name)

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
    def zeros_like(array: Array, dtype: Any = None) -> Array:
        """Return zeros of the array's shape."""
        return np.zeros(array.shape, dtype=dtype or array.dtype)

    @staticmethod
    def ones_like(array: Array, dtype: Any = None) -> Array:
        """Return ones of the array's shape."""
        return np.ones(array.shape, dtype=dtype or array.dtype)

    @staticmethod
    def take(array: Array, indices: Array, axis: int = 0) -> Array:
        """Return the slices at the indices along an axis."""
        return array[(slice(None),) * (axis % array.ndim) + (indices,)] if axis else array[indices]

    @staticmethod
    def mgs_patches(x: Array, window: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Array:
        """Return the windows of x (n, channels, *space), already padded: (n, channels, *window, *output positions)."""
        return _patches(x, tuple(window), tuple(strides), tuple(dilations))


@primitive  # type: ignore[untyped-decorator]  # autograd has no types
def _patches(x: Array, window: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]) -> Array:
    out = _positions(x.shape[2:], window, strides, dilations)
    steps = x.strides[2:]
    shape = (*x.shape[:2], *window, *out)
    moves = (
        *x.strides[:2],
        *(a * b for a, b in zip(steps, dilations, strict=True)),
        *(a * b for a, b in zip(steps, strides, strict=True)),
    )
    return np.ascontiguousarray(np.lib.stride_tricks.as_strided(x, shape, moves, writeable=False))


@primitive  # type: ignore[untyped-decorator]  # autograd has no types
def _fold(
    patches: Array, space: tuple[int, ...], window: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> Array:
    """Add the windows back: the adjoint of `_patches`."""
    out = _positions(space, window, strides, dilations)
    total = np.zeros((*patches.shape[:2], *space), dtype=patches.dtype)
    for offset in product(*(range(size) for size in window)):
        where = tuple(
            slice(at * d, at * d + (count - 1) * s + 1, s)
            for at, d, s, count in zip(offset, dilations, strides, out, strict=True)
        )
        total[(slice(None), slice(None), *where)] += patches[(slice(None), slice(None), *offset)]
    return total


def _positions(space: Sequence[int], window: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> tuple[int, ...]:
    return tuple((size - d * (w - 1) - 1) // s + 1 for size, w, s, d in zip(space, window, strides, dilations, strict=True))


defvjp(
    _patches,
    lambda ans, x, window, strides, dilations: lambda g: _fold(g, x.shape[2:], window, strides, dilations),
    argnums=(0,),
)
defvjp(
    _fold,
    lambda ans, patches, space, window, strides, dilations: lambda g: _patches(g, window, strides, dilations),
    argnums=(0,),
)
