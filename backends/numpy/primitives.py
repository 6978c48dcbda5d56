"""Operations that NumPy or autograd lacks, each with a derivative that can be differentiated again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import pi, prod, sqrt
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd.extend import defvjp, primitive

from mgs_core._types import Array

Sizes = tuple[int, ...]


@primitive  # type: ignore[untyped-decorator]  # autograd has no types
def patches(x: Array, window: Sizes, strides: Sizes, dilations: Sizes) -> Array:
    """Return the windows of x (n, i, *space): (n, i, *window, *positions)."""
    return np.ascontiguousarray(_windows(x, window, strides, dilations))


@primitive  # type: ignore[untyped-decorator]  # autograd has no types
def fold(parts: Array, space: Sizes, window: Sizes, strides: Sizes, dilations: Sizes) -> Array:
    """Add the windows back: the adjoint of `patches`."""
    total = np.zeros((*parts.shape[:2], *space), dtype=parts.dtype)
    for offset in product(*map(range, window)):
        total[_slices(offset, space, window, strides, dilations)] += parts[(slice(None), slice(None), *offset)]
    return total


defvjp(
    patches, lambda ans, x, window, strides, dilations: lambda g: fold(g, x.shape[2:], window, strides, dilations), argnums=(0,)
)
defvjp(fold, lambda ans, parts, space, window, strides, dilations: lambda g: patches(g, window, strides, dilations), argnums=(0,))


def max_pool(x: Array, window: Sizes, strides: Sizes, dilations: Sizes) -> Array:
    """Return the greatest of each window of x (n, i, *space), already padded; the first of equals has the derivative."""
    values = _plain(x)
    rank = len(window)
    if values is x:  # nothing is traced, so that no places are needed
        return _greatest(x, window, strides, dilations)
    views = _windows(values, window, strides, dilations)
    out = views.shape[2 + rank :]
    best = np.argmax(views.reshape(*views.shape[:2], prod(window), prod(out)), axis=2)  # (n, i, positions)
    corner = np.unravel_index(best, window)
    space = values.shape[2:]
    flat = np.zeros_like(best)
    starts = np.unravel_index(np.arange(prod(out)), out)
    for axis in range(rank):
        flat = flat * space[axis] + starts[axis] * strides[axis] + corner[axis] * dilations[axis]
    rows = np.arange(prod(values.shape[:2])).reshape(*values.shape[:2], 1) * prod(space)
    picked = pick(anp.reshape(x, (-1,)), (rows + flat).reshape(-1))
    return anp.reshape(picked, (*values.shape[:2], *out))


def _greatest(x: Array, window: Sizes, strides: Sizes, dilations: Sizes) -> Array:
    best = None
    for offset in product(*map(range, window)):
        where = _slices(offset, x.shape[2:], window, strides, dilations)
        best = x[where].copy() if best is None else np.maximum(best, x[where], out=best)
    return best


def _slices(offset: Sizes, space: Sizes, window: Sizes, strides: Sizes, dilations: Sizes) -> tuple[slice, ...]:
    """Return where, in (n, i, *space), the windows have the element at an offset."""
    out = _positions(space, window, strides, dilations)
    steps = zip(offset, dilations, strides, out, strict=True)
    return (slice(None), slice(None), *(slice(at * d, at * d + (count - 1) * s + 1, s) for at, d, s, count in steps))


@primitive  # type: ignore[untyped-decorator]  # autograd has no types
def pick(values: Array, places: Array) -> Array:
    """Return `values[places]` of a flat array."""
    return values[places]


@primitive  # type: ignore[untyped-decorator]  # autograd has no types
def spread(values: Array, places: Array, size: int) -> Array:
    """Add values at places of a flat array of zeros: the adjoint of `pick`."""
    return np.bincount(places, weights=values, minlength=size).astype(values.dtype)


defvjp(pick, lambda ans, values, places: lambda g: spread(g, places, values.shape[0]), argnums=(0,))
defvjp(spread, lambda ans, values, places, size: lambda g: pick(g, places), argnums=(0,))


@primitive  # type: ignore[untyped-decorator]  # autograd has no types
def relu(x: Array) -> Array:
    """Return max(x, 0); NaN stays NaN."""
    return np.maximum(x, 0)


defvjp(relu, lambda ans, x: lambda g: g * (_plain(x) > 0))


@primitive  # type: ignore[untyped-decorator]  # autograd has no types
def sigmoid(x: Array) -> Array:
    """Return 1/(1 + exp(−x)); 0 where exp(−x) overflows, for the value is below the least normal number there."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


defvjp(sigmoid, lambda ans, x: lambda g: g * ans * (1 - ans))


@primitive  # type: ignore[untyped-decorator]  # autograd has no types
def softmax(x: Array, axis: int) -> Array:
    """Return exp(x) / Σ exp(x) along an axis."""
    raised = np.exp(x - np.max(x, axis=axis, keepdims=True))
    return raised / np.sum(raised, axis=axis, keepdims=True)


defvjp(softmax, lambda ans, x, axis: lambda g: ans * (g - anp.sum(g * ans, axis=axis, keepdims=True)), argnums=(0,))


@primitive  # type: ignore[untyped-decorator]  # autograd has no types
def log_softmax(x: Array, axis: int) -> Array:
    """Return x − log Σ exp(x) along an axis."""
    shifted = x - np.max(x, axis=axis, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=axis, keepdims=True))


defvjp(log_softmax, lambda ans, x, axis: lambda g: g - anp.exp(ans) * anp.sum(g, axis=axis, keepdims=True), argnums=(0,))


@primitive  # type: ignore[untyped-decorator]  # autograd has no types
def flip(x: Array, axis: Any = None) -> Array:
    """Return x with axes reversed."""
    return np.flip(x, axis=axis)


defvjp(flip, lambda ans, x, axis=None: lambda g: flip(g, axis))


@primitive  # type: ignore[untyped-decorator]  # autograd has no types
def pad(x: Array, widths: tuple[tuple[int, int], ...], value: float = 0.0) -> Array:
    """Return x with a constant around it."""
    return np.pad(x, widths, constant_values=value)


def _cut(x: Array, widths: tuple[tuple[int, int], ...]) -> Array:
    return x[tuple(slice(before, size - after) for size, (before, after) in zip(x.shape, widths, strict=True))]


@primitive  # type: ignore[untyped-decorator]  # autograd has no types
def crop(x: Array, widths: tuple[tuple[int, int], ...]) -> Array:
    """Return x without its border: the adjoint of `pad`."""
    return np.ascontiguousarray(_cut(x, widths))


defvjp(pad, lambda ans, x, widths, value=0.0: lambda g: crop(g, widths), argnums=(0,))
defvjp(crop, lambda ans, x, widths: lambda g: pad(g, widths), argnums=(0,))


@primitive  # type: ignore[untyped-decorator]  # autograd has no types
def transpose(x: Array, axes: Sizes) -> Array:
    """Return x with its axes permuted; autograd's own sorts the axes again for each derivative."""
    return np.transpose(x, axes)


def _inverse(axes: Sizes) -> Sizes:
    return tuple(axes.index(at) for at in range(len(axes)))


defvjp(transpose, lambda ans, x, axes: lambda g: transpose(g, _inverse(axes)), argnums=(0,))


def make_erf(function: Any) -> Any:
    """Return the error function with its derivative.

    Args:
        function: of plain arrays.

    Returns:
        A primitive.
    """
    erf = primitive(function)
    defvjp(erf, lambda ans, x: lambda g: g * (2.0 / sqrt(pi)) * anp.exp(-x * x))
    return erf


def _plain(array: Array) -> Any:
    while hasattr(array, "_value"):
        array = array._value
    return array


def _windows(x: Array, window: Sizes, strides: Sizes, dilations: Sizes) -> Array:
    out = _positions(x.shape[2:], window, strides, dilations)
    steps = x.strides[2:]
    moves = (
        *x.strides[:2],
        *(a * b for a, b in zip(steps, dilations, strict=True)),
        *(a * b for a, b in zip(steps, strides, strict=True)),
    )
    return np.lib.stride_tricks.as_strided(x, (*x.shape[:2], *window, *out), moves, writeable=False)


def _positions(space: Sequence[int], window: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Sizes:
    return tuple((size - d * (w - 1) - 1) // s + 1 for size, w, s, d in zip(space, window, strides, dilations, strict=True))
