"""Windows of images, and their sums: two linear primitives, each the other's transpose, each one kernel of XLA.

XLA for CPU takes tens of milliseconds to compile a kernel, and fuses a pad or a concatenation only where what it makes is read
once: so windows are cut without concatenations, and added up by pads that are read once. Transposed by JAX, either would become
the other kind, of several kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import product
from math import prod
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mgs_core._types import Array

Sizes: TypeAlias = tuple[int, ...]
#: Windows of more elements are added up one axis after the other: a kernel tries each of its pads for each element.
_AT_ONCE = 64


def windows(x: Array, *, window: Sequence[int], out: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Array:
    """Cut windows.

    Args:
        x: (..., *space).
        window: sizes of the window.
        out: numbers of windows along each axis.
        strides: distances between windows.
        dilations: distances between a window's elements.

    Returns:
        (..., *window, *out).
    """
    space = tuple(x.shape[x.ndim - len(window) :])
    axes = tuple(zip(space, window, out, strides, dilations, strict=True))
    cut: Array = _cut.bind(x, axes=axes)
    return cut


def _cut_windows(x: Array, axes: tuple[Sizes, ...]) -> Array:
    """Shift the copies of an axis by reshaping them: where rows become longer by the shift, each copy begins later by it."""
    lead = x.ndim - len(axes)
    for at, (length, size, out, stride, dilation) in zip(range(lead, lead + 2 * len(axes), 2), axes, strict=True):
        before, after = x.shape[:at], x.shape[at + 1 :]
        x = lax.broadcast_in_dim(x, (*before, size, length, *after), (*range(at), *range(at + 1, x.ndim + 1)))
        x = lax.reshape(x, (*before, size * length, *after))
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, size * dilation if axis == at else 0, 0) for axis in range(x.ndim)])
        x = lax.reshape(x, (*before, size, length + dilation, *after))
        x = lax.slice_in_dim(x, 0, (out - 1) * stride + 1, stride, at + 1)
    return lax.transpose(x, (*range(lead), *range(lead, x.ndim, 2), *range(lead + 1, x.ndim, 2)))


def _add_windows(x: Array, axes: tuple[Sizes, ...]) -> Array:
    """Add up windows (..., *window, *out) to (..., *space)."""
    space, window, out, _, _ = zip(*axes, strict=True)
    lead = x.shape[: x.ndim - 2 * len(axes)]
    if len(axes) > 1 and prod(window) > _AT_ONCE:
        x = _add_windows(jnp.moveaxis(x, len(lead) + len(axes) - 1, -2), axes[-1:])
        return jnp.moveaxis(_add_windows(jnp.moveaxis(x, -1, len(lead)), axes[:-1]), len(lead), -1)
    zero, total = jnp.zeros((), x.dtype), jnp.zeros((*lead, *space), x.dtype)
    for place in product(*map(range, window)):
        start, end = (*[0] * len(lead), *place, *[0] * len(axes)), (*lead, *[at + 1 for at in place], *out)
        part = lax.reshape(lax.slice(x, start, end), (*lead, *out))
        edges = [
            (at * dilation, length - at * dilation - (count - 1) * stride - 1, stride - 1)
            for at, (length, _, count, stride, dilation) in zip(place, axes, strict=True)
        ]
        total = total + lax.pad(part, zero, [*[(0, 0, 0)] * len(lead), *edges])
    return total


def _primitive(name: str, function: Callable[..., Array]) -> Primitive:
    primitive = Primitive(name)
    primitive.def_impl(function)
    primitive.def_abstract_eval(lru_cache(lambda x, axes: jax.make_jaxpr(partial(function, axes=axes))(x).out_avals[0]))
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    batching.primitive_batchers[primitive] = lambda x, axis, axes: (primitive.bind(jnp.moveaxis(x[0], axis[0], 0), axes=axes), 0)
    return primitive


_cut = _primitive("windows", _cut_windows)
_add = _primitive("add_windows", _add_windows)
ad.deflinear2(_cut, lambda change, _, axes: [_add.bind(change, axes=axes)])
ad.deflinear2(_add, lambda change, _, axes: [_cut.bind(change, axes=axes)])
