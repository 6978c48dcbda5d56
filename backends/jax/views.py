"""Views: arrays that hold elements of one parameter, each at most once, in another arrangement.

Because nothing is repeated, scaled or mixed, per-sample gradients have the same inner products in the view's coordinates as in
the parameter's, and the pull-back of the view brings them there when two uses with different views meet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mgs_core._protocol import Restore
from mgs_core._types import Array

from .fingerprint import fingerprint

_REARRANGEMENTS = {"transpose", "reshape", "squeeze", "rev", "slice", "copy"}


@dataclass(frozen=True)
class View:
    """Hold a parameter's name and the steps that lead from the parameter to the view; equal when the steps are.

    Attributes:
        parameter: the name.
        keys: what identifies the steps.
        loops: numbers of the scans that run over a leading axis of the view, outermost first; later steps act below these axes.
        steps: the functions; each from array to array.
    """

    parameter: str
    keys: tuple[Any, ...] = ()
    loops: tuple[int, ...] = field(default=(), compare=False)
    steps: tuple[Callable[[Array], Array], ...] = field(default=(), compare=False)

    def then(self, key: Any, step: Callable[[Array], Array]) -> View:
        """Return the view after one more step below the axes of the loops."""
        for _ in self.loops:
            step = jax.vmap(step)
        return replace(self, keys=(*self.keys, (len(self.loops), key)), steps=(*self.steps, step))

    def within(self, loop: int) -> View:
        """Return the view as the body of a scan sees it, one slice of the first axis at a time."""
        return replace(self, keys=(*self.keys, "scan"), loops=(*self.loops, loop))

    def __call__(self, parameter: Array) -> Array:
        """Return the view of the parameter's value, the axes of the loops first."""
        for step in self.steps:
            parameter = step(parameter)
        return parameter

    def restore(self, like: jax.ShapeDtypeStruct) -> Restore:
        """Return the map from rows (n, k, size of the view) to rows of the parameter (n, k, p).

        Args:
            like: shape and dtype of the parameter.

        Returns:
            The map.
        """
        if not self.steps:
            return None

        def restore(rows: Array) -> Array:
            shape = jax.eval_shape(self, like)
            pull = jax.linear_transpose(self, like)
            lead = rows.shape[:-1]
            flat = jnp.reshape(rows, (prod(lead), *shape.shape)).astype(shape.dtype)
            (pulled,) = jax.vmap(pull)(flat)
            return jnp.reshape(pulled, (*lead, prod(like.shape))).astype(rows.dtype)

        return restore


def views_after(equation: Any, view: View) -> list[View] | None:
    """Return the views that an equation makes of its one operand, one for each output, or None when it makes none."""
    name, params = equation.primitive.name, equation.params
    if name in _REARRANGEMENTS or _keeps_elements(equation) or _is_cast(equation):
        return [view.then((name, fingerprint(params)), lambda value: equation.primitive.bind(value, **params))]
    if name == "split":
        sizes, axis = tuple(int(size) for size in params["sizes"]), params["axis"]
        ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
        return [
            view.then(("part", axis, end - size, end), _part(axis, end - size, end))
            for size, end in zip(sizes, ends, strict=True)
        ]
    if name == "unstack":  # of `for weight in weights`, since JAX 0.11
        axis = params["axis"]
        return [view.then(("entry", axis, at), _entry(axis, at)) for at in range(len(equation.outvars))]
    return None


def _entry(axis: int, at: int) -> Callable[[Array], Array]:
    return lambda value: lax.index_in_dim(value, at, axis, keepdims=False)


def _part(axis: int, start: int, end: int) -> Callable[[Array], Array]:
    return lambda value: lax.slice_in_dim(value, start, end, axis=axis)


def _keeps_elements(equation: Any) -> bool:
    if equation.primitive.name != "broadcast_in_dim" or len(equation.invars) != 1:
        return False
    return bool(prod(equation.invars[0].aval.shape) == prod(equation.outvars[0].aval.shape))


def _is_cast(equation: Any) -> bool:
    return equation.primitive.name == "convert_element_type" and bool(jnp.issubdtype(equation.params["new_dtype"], jnp.floating))
