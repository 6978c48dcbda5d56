"""Refuse models in which samples interact: one sample's scalars must not change with the rest of the batch.

The batch's scalars are compared with those of each sample alone, once per program. That takes values. Where they are known, they
are used, with the parameters moved a little, for an output layer that starts at zero would hide everything in front of it. Under
jit, grad or vmap, values are made up: the comparison runs while the function is traced, and costs nothing when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from mgs_core._errors import SamplesInteractError
from mgs_core._types import Array

_MOVE = 0.05


def refuse_interaction(
    whole: Callable[..., Array], single: ClosedJaxpr, parameters: Sequence[Array], samples: Sequence[Array]
) -> None:
    """Compare the batch's scalars with those of each sample alone.

    Args:
        whole: `(parameters, samples) → (n, k)`, of the whole batch.
        single: the jaxpr of one sample: parameters and the leaves of a sample to (k,).
        parameters: values or traced arrays.
        samples: leaves of the batch.

    Raises:
        SamplesInteractError: when they differ by more than rounding.
    """
    batch = jax.make_jaxpr(whole)([*map(_shape, parameters)], [*map(_shape, samples)])
    with jax.ensure_compile_time_eval():
        draw = np.random.default_rng(0)
        known: dict[int, Array] = {}
        theta = [_moved(value, draw) for value in parameters]
        data = [_value(value, draw, sample=True) for value in samples]
        constants = [[known.setdefault(id(c), _value(c, draw)) for c in jaxpr.consts] for jaxpr in (single, batch)]

        def compare(theta: list[Array], data: list[Array], constants: list[list[Array]]) -> tuple[Array, Array]:
            one = jaxpr_as_fun(ClosedJaxpr(_open(single), ()))
            alone = jax.vmap(lambda *leaves: one(*constants[0], *theta, *leaves)[0])(*data)
            (together,) = jaxpr_as_fun(ClosedJaxpr(_open(batch), ()))(*constants[1], *theta, *data)
            return alone, together

        alone, together = (np.asarray(value, np.float64) for value in jax.jit(compare)(theta, data, constants))
    eps = float(jnp.finfo(single.out_avals[0].dtype).eps)
    defined = np.isfinite(alone) | np.isfinite(together)
    size = float(np.max(np.abs(together), initial=0.0, where=np.isfinite(together)))
    difference = np.abs(alone - together)[defined]
    # written so that NaN on one side, which a batch of one can give, is refused too
    if not np.all(difference <= max(eps**0.5, 1e-6) * size):
        raise SamplesInteractError(
            "`model` must treat each sample by itself; got outputs that change with the rest of the batch (batch statistics, "
            "attention across the batch, or a loss that divides by a statistic of it; or dropout). Use inference mode: "
            "`use_running_average=True`, `deterministic=True`; and a loss without reduction."
        )


def _open(jaxpr: ClosedJaxpr) -> Any:
    return jaxpr.jaxpr.replace(constvars=(), invars=[*jaxpr.jaxpr.constvars, *jaxpr.jaxpr.invars])


def _shape(value: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def _moved(value: Array, draw: np.random.Generator) -> Array:
    made_up = _value(value, draw)
    if made_up is not value:
        return made_up
    scale = _MOVE * (float(jnp.std(value)) or 1.0)
    return value + jnp.asarray(scale * draw.normal(size=value.shape), value.dtype)


def _value(value: Array, draw: np.random.Generator, *, sample: bool = False) -> Array:
    """Return the value, or one made up in its place where it is traced."""
    if not isinstance(value, jax.core.Tracer):
        return value
    shape, dtype = value.shape, value.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0, impl=dtype._impl.name), shape)
    if jnp.issubdtype(dtype, jnp.inexact):
        if len(shape) >= 2 or sample:
            width = 1 if sample else np.prod(shape[:-1])
            return jnp.asarray(draw.normal(size=shape) / np.sqrt(max(width, 1)), dtype)
        return jnp.asarray(draw.uniform(0.5, 1.5, size=shape), dtype)  # gains, variances
    return jnp.asarray(draw.integers(0, 2, size=shape), dtype)
