"""Array-API names for JAX arrays: those of jax.numpy, and what the core uses where a namespace offers it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mgs_core._errors import ArgumentError
from mgs_core._protocol import LayerStatistics, Outer
from mgs_core._types import Array
from mgs_core.contraction import MEMORY_BUDGET, prefers_pairwise
from mgs_core.statistics import as_rows

from .versions import has_values

Pairs: TypeAlias = Sequence[tuple[int, int]]


#: Values of traced arrays by the arrays' identities, while these are alive: the labels of a batch whose samples are traced.
_known: ContextVar[Mapping[int, Array]] = ContextVar("known", default=MappingProxyType({}))


@contextmanager
def known(traced: Sequence[Array], values: Sequence[Array]) -> Iterator[None]:
    """Let labels among traced arrays be seen by their values.

    Args:
        traced: arrays.
        values: what stands for each; those that are traced themselves are not known.
    """
    token = _known.set({id(a): b for a, b in zip(traced, values, strict=True) if has_values(b)})
    try:
        yield
    finally:
        _known.reset(token)


class JaxNamespace:
    """Offer jax.numpy, with extensions."""

    def __getattr__(self, name: str) -> Any:
        """Return jax.numpy's function of that name."""
        return getattr(jnp, name)

    mgs_einsum = staticmethod(jnp.einsum)
    mgs_erf = staticmethod(jax.scipy.special.erf)
    mgs_relu = staticmethod(jax.nn.relu)

    @staticmethod
    def mgs_convolution(
        x: Array, weight: Array, *, strides: Sequence[int], pads: Pairs, dilations: Sequence[int], groups: int
    ) -> Array:
        """Return the cross-correlation of x (n, i, *space) with weight (o, i/groups, *window)."""
        return lax.conv_general_dilated(x, weight, strides, pads, rhs_dilation=dilations, feature_group_count=groups)

    @staticmethod
    def mgs_pad(x: Array, widths: Pairs, *, value: float = 0.0) -> Array:
        """Return x with `value` added around it, one pair of widths for each axis."""
        return jnp.pad(x, widths, constant_values=value)

    @staticmethod
    def mgs_lookup(table: Array, indices: Array) -> Array:
        """Return `table[indices]`, indices of any shape."""
        return jnp.take(table, indices, axis=0)

    @staticmethod
    def mgs_scatter(data: Array, indices: Array, updates: Array, *, reduction: str) -> Array:
        """Return data (size,) with updates (m,) written at indices (m,); of equal indices the last counts without reduction."""
        at = data.at[indices]
        if reduction == "none":
            order = jnp.zeros(data.shape, int).at[indices].max(jnp.arange(1, indices.shape[0] + 1))
            return jnp.where(order > 0, updates[jnp.maximum(order - 1, 0)], data) if indices.shape[0] else data
        reductions = {"add": at.add, "mul": at.multiply, "max": at.max, "min": at.min}
        if reduction not in reductions:
            raise ArgumentError(f"`reduction` must be none, {', '.join(reductions)}; got {reduction!r}. Choose one of them.")
        return reductions[reduction](updates)

    @staticmethod
    def mgs_labels(labels: Array, c: int) -> Any:
        """Return labels as NumPy's, whole numbers as integers; None where they have no values, or on a device that would wait."""
        if isinstance(labels, jax.core.Tracer):
            labels = _known.get().get(id(labels))
        if labels is None or not has_values(labels) or any(device.platform != "cpu" for device in labels.devices()):
            return None
        values = np.asarray(labels)
        whole = values.astype(np.int64)
        return whole if np.all(whole == values) else values

    @staticmethod
    def mgs_values(array: Array) -> Any:
        """Return the values as an array of NumPy; None where there are none yet, or that would wait for a device."""
        if not has_values(array) or any(device.platform != "cpu" for device in array.devices()):
            return None
        return np.asarray(array)

    @staticmethod
    def mgs_picked(outputs: Array, labels: Array) -> Array:
        """Return the labelled outputs (n,); NaN, with a gradient of NaN, for a label that names none."""
        c = outputs.shape[-1]
        if jnp.issubdtype(labels.dtype, jnp.integer) and jnp.iinfo(labels.dtype).bits < 32:
            labels = labels.astype(jnp.int32)  # in 8 bits there may be no room for c
        labels = jnp.expand_dims(labels, -1)
        known = (labels >= 0) & (labels < c)
        picked = jnp.where((labels == jnp.arange(c, dtype=labels.dtype)[None]) | ~known, outputs, 0.0)
        return jnp.sum(picked * jnp.where(known, 1.0, jnp.nan), -1)  # within the sum, so that the gradient has the NaN too

    @staticmethod
    def mgs_shares(targets: Array) -> Array:
        """Return shares of the outputs; NaN for those below 0, which are targets of a regression."""
        if not jnp.issubdtype(targets.dtype, jnp.floating):
            return targets
        return jnp.where(targets < 0, jnp.nan, targets)

    @staticmethod
    def mgs_product(left: Array, right: Array) -> Array:
        """Return `left rightᵀ` over the last axis, (..., n, p) and (..., m, p) to (..., n, m), in float32 at least."""
        return _gram(left) if left is right else _product(left, right)

    @staticmethod
    def mgs_weighted_gradient(use: LayerStatistics, weights: Array) -> Array | None:
        """Return `Σ_a w_a g_a` (p,) of a weight's rows, if its kernel is made of them: XLA sees that they are the same."""
        if not isinstance(use, Outer) or use.gradients.shape[1] > 1 or prefers_pairwise(use, use):
            return None
        n, groups, _, i = use.inputs.shape
        if n * groups * i * use.gradients.shape[-1] > MEMORY_BUDGET:  # the kernel makes them in slices
            return None
        found = jnp.reshape(weights, (1, n)) @ jnp.reshape(as_rows(use), (n, -1))
        return jnp.ravel(found if use.restore is None else use.restore(found[None]))

    @staticmethod
    def mgs_log_determinant(kernel: Array, eps: float) -> Array:
        """Return log det(I + K), as `penalty.py` says, but in the kernel's own precision; NaN if not definite."""
        return _log_determinant(kernel, eps)


def _product(left: Array, right: Array) -> Array:
    inexact = [array.dtype for array in (left, right) if jnp.issubdtype(array.dtype, jnp.inexact)]
    dtype = max([*inexact, jnp.dtype(jnp.float32)], key=lambda dtype: jnp.finfo(dtype).bits)
    left, right = (array if jnp.issubdtype(array.dtype, jnp.inexact) else array.astype(dtype) for array in (left, right))
    last, batch = (left.ndim - 1,), tuple(range(left.ndim - 2))
    product: Array = lax.dot_general(left, right, ((last, last), (batch, batch)), preferred_element_type=dtype)
    return product


@jax.custom_jvp  # type: ignore[untyped-decorator]  # jax is not followed
def _gram(rows: Array) -> Array:
    """Return `R Rᵀ`; its derivative is `T + Tᵀ` with `T = Ṙ Rᵀ`, one product where the product rule has two."""
    return _product(rows, rows)


@_gram.defjvp  # type: ignore[untyped-decorator]  # jax is not followed
def _gram_tangent(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (rows,), (change,) = primals, tangents
    half = _product(change, rows)
    return _gram(rows), half + jnp.swapaxes(half, -1, -2)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _log_determinant(kernel: Array, eps: float) -> Array:
    """Use `d log det M = tr(M⁻¹ dM)`; two calls of LAPACK, where the derivative of Cholesky's factor makes it three."""
    factor, ridge = _factor(kernel, eps)
    return _of_factor(factor, ridge, lax.cond(ridge > 1.0, _traced_inverse, lambda factor: 0.0 * factor[0, 0], factor))


@_log_determinant.defjvp  # type: ignore[untyped-decorator]  # jax is not followed
def _log_determinant_tangent(eps: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (kernel,), (change,) = primals, tangents
    factor, ridge = _factor(kernel, eps)
    inverse = jnp.eye(kernel.shape[0], dtype=kernel.dtype)
    for transpose in (False, True):
        inverse = lax.linalg.triangular_solve(factor, inverse, left_side=True, lower=True, transpose_a=transpose)
    value = _of_factor(factor, ridge, lax.stop_gradient(jnp.trace(inverse)))
    return value, jnp.sum(inverse.T * change)


def _factor(kernel: Array, eps: float) -> tuple[Array, Array]:
    """Factor K with the ridge, and return that too."""
    known = lax.stop_gradient(kernel)
    size = 4.0 * eps * jnp.trace(known) / kernel.shape[0] ** 0.5
    small, large = (jnp.maximum(1.0, noise) for noise in (size, 4.0 * eps * jnp.sqrt(jnp.sum(known**2))))
    least = jnp.min(jnp.diagonal(_cholesky(known, small)))  # exactly at least the root of `small`, without rounding
    ridge = jnp.where(least**2 > 0.95 * small, small, large)
    return _cholesky(kernel, ridge), ridge


def _cholesky(kernel: Array, ridge: Array) -> Array:
    """Factor K with a ridge; its transpose, in fact, for LAPACK counts columns first, and would have it copied."""
    factor: Array = lax.linalg.cholesky(jnp.where(_diagonal(kernel), kernel + ridge, kernel).T, symmetrize_input=False)
    return factor


def _traced_inverse(factor: Array) -> Array:
    identity = jnp.eye(factor.shape[0], dtype=factor.dtype)
    return jnp.sum(lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True) ** 2)


def _of_factor(factor: Array, ridge: Array, traced_inverse: Array) -> Array:
    value = 2.0 * jnp.sum(jnp.log(jnp.where(_diagonal(factor), factor, 1.0)))
    return value - jnp.minimum(jnp.log(ridge) * ridge * traced_inverse, lax.stop_gradient(value))


def _diagonal(square: Array) -> Array:
    return jnp.eye(square.shape[0], dtype=bool)
