"""Rules: for an equation in which a weight meets data, the layer's input and how to bring both sides into the common layout.

One function for each primitive. It sees one sample, so that no axis holds the samples. The common layout is that of the layer
statistics: groups g, positions s, features i and o.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from mgs_core._types import Array

from .views import View
from .windows import windows


@dataclass(frozen=True, eq=False)
class Rule:
    """Hold what one equation says about the weight at one place.

    Attributes:
        kind: which layer statistics.
        weight: the view of the parameter; its value is (g, i, o), or (size, o) for lookups.
        gradient: takes the gradient at the equation's output to (g, s, o).
        inputs: takes the other operand to (g, s, i), or to (s,) for lookups.
        valid: takes the other operand to (s,) booleans: which positions touch the table at all.
        size: rows of a table.
        bind: evaluates the equation from its operands, where that is better not left to JAX.
    """

    kind: Literal["outer", "lookup"]
    weight: View
    gradient: Callable[[Array], Array]
    inputs: Callable[[Array], Array]
    valid: Callable[[Array], Array] | None = None
    size: int = 0
    bind: Callable[..., Array] | None = None


def rule_for(equation: Any, place: int, view: View) -> Rule | None:
    """Return the rule of an equation for the weight at one place among its operands, or None when there is none.

    Args:
        equation: of a jaxpr of one sample.
        place: of the weight.
        view: the weight.

    Returns:
        The rule or None.
    """
    rule = _RULES.get(equation.primitive.name)
    floating = jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)
    return rule(equation, place, view) if rule is not None and floating else None


def _dot_general(equation: Any, place: int, view: View) -> Rule | None:
    contracting, batch = equation.params["dimension_numbers"]
    data_shape, weight_shape = (equation.invars[at].aval.shape for at in (1 - place, place))
    data_axes, data_groups = tuple(contracting[1 - place]), tuple(batch[1 - place])
    axes, groups = tuple(contracting[place]), tuple(batch[place])
    data_free = tuple(axis for axis in range(len(data_shape)) if axis not in (*data_axes, *data_groups))
    free = tuple(axis for axis in range(len(weight_shape)) if axis not in (*axes, *groups))
    g = prod(weight_shape[axis] for axis in groups)
    i = prod(weight_shape[axis] for axis in axes)
    s, o = prod(data_shape[axis] for axis in data_free), prod(weight_shape[axis] for axis in free)

    def arrange(weight: Array) -> Array:
        return jnp.reshape(jnp.transpose(weight, (*groups, *axes, *free)), (g, i, o))

    def gradient(d: Array) -> Array:
        return jnp.reshape(d, (g, s, o)) if place == 1 else jnp.swapaxes(jnp.reshape(d, (g, o, s)), 1, 2)

    def inputs(x: Array) -> Array:
        return jnp.reshape(jnp.transpose(x, (*data_groups, *data_free, *data_axes)), (g, s, i))

    return Rule("outer", view.then(("matrix", groups, axes, free), arrange), gradient, inputs)


def _convolution(equation: Any, place: int, view: View) -> Rule | None:
    params = equation.params
    if place != 1 or params["batch_group_count"] != 1:
        return None
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    shape, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    window = tuple(shape[axis] for axis in numbers.rhs_spec[2:])
    features, i = shape[numbers.rhs_spec[0]], shape[numbers.rhs_spec[1]]
    space = tuple(out[axis] for axis in numbers.out_spec[2:])
    s, o = out[numbers.out_spec[0]] * prod(space), features // groups
    width = prod(window) * i
    channels_last = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])

    def arrange(weight: Array) -> Array:
        weight = jnp.transpose(weight, (*numbers.rhs_spec[2:], *numbers.rhs_spec[:2]))
        weight = jnp.reshape(weight, (prod(window), groups, o, i))
        return jnp.reshape(jnp.transpose(weight, (1, 0, 3, 2)), (groups, width, o))

    def gradient(d: Array) -> Array:
        return jnp.moveaxis(jnp.reshape(jnp.transpose(d, channels_last), (s, groups, o)), 1, 0)

    def inputs(x: Array) -> Array:
        x = jnp.transpose(x, numbers.lhs_spec)
        margins = [(low, high, factor - 1) for (low, high), factor in zip(params["padding"], params["lhs_dilation"], strict=True)]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *margins])
        x = jnp.reshape(x, (x.shape[0], groups, i, *x.shape[2:]))
        how = {"window": window, "out": space, "strides": params["window_strides"], "dilations": params["rhs_dilation"]}
        x = windows(x, **how)  # (s, g, i, *window, *out)
        order = (1, *range(3, 3 + len(window)), 2, 0, *range(3 + len(window), x.ndim))
        return jnp.swapaxes(jnp.reshape(jnp.transpose(x, order), (groups, width, s)), 1, 2)

    def by_products(x: Array, weight: Array) -> Array:
        y = jnp.reshape(jnp.moveaxis(inputs(x) @ arrange(weight), 0, 1), (out[numbers.out_spec[0]], *space, features))
        return jnp.transpose(y, tuple(np.argsort(channels_last).tolist()))

    bind = _strided(equation, by_products) if max(params["window_strides"], default=1) > 1 else None
    return Rule("outer", view.then(("convolution", numbers.rhs_spec, groups), arrange), gradient, inputs, bind=bind)


def _strided(equation: Any, by_products: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    """Return a strided convolution whose derivative in the data is written as a product with the windows.

    A penalty needs that derivative's own derivative in the weight. Left to JAX it becomes a convolution that XLA for CPU (0.10)
    takes 15 to 50 times as long for as for a weight's ordinary gradient; of a product, it takes no longer.
    """

    @jax.custom_jvp  # type: ignore[untyped-decorator]  # jax is not followed
    def convolution(x: Array, weight: Array) -> Array:
        return equation.primitive.bind(x, weight, **equation.params)

    def tangent(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
        (x, weight), (x_change, weight_change) = primals, tangents
        out = convolution(x, weight)
        change = jnp.zeros_like(out)
        if not isinstance(x_change, SymbolicZero):
            change = change + by_products(x_change, weight)
        if not isinstance(weight_change, SymbolicZero):
            change = change + convolution(x, weight_change)
        return out, change

    convolution.defjvp(tangent, symbolic_zeros=True)
    bind: Callable[..., Array] = convolution
    return bind


def _gather(equation: Any, place: int, view: View) -> Rule | None:
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    table, indices, out = equation.invars[0].aval.shape, equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    cut = [at for at, (size, length) in enumerate(zip(sizes, table, strict=True)) if size != length]
    # slices are whole but along one axis; `jax.vmap(lambda i: table[i])` gives where they start along the others too
    axes = [at for at in numbers.start_index_map if sizes[at] == 1 and set(cut) <= {at}]
    if place != 0 or not axes or numbers.operand_batching_dims or prod(table) == 0:
        return None
    axis, column = axes[0], tuple(numbers.start_index_map).index(axes[0])
    lead = tuple(at for at in range(len(out)) if at not in numbers.offset_dims)
    s, size = prod(indices[:-1]), table[axis]
    o = prod(table) // size
    mode = lax.GatherScatterMode.from_any(equation.params["mode"])

    def arrange(weight: Array) -> Array:
        return jnp.reshape(jnp.moveaxis(weight, axis, 0), (size, o))

    def gradient(d: Array) -> Array:
        return jnp.reshape(jnp.transpose(d, (*lead, *numbers.offset_dims)), (1, s, o))

    def inputs(index: Array) -> Array:
        index = jnp.reshape(index[..., column], (s,))
        return jnp.clip(index, 0, size - 1) if mode == lax.GatherScatterMode.CLIP else index

    def valid(index: Array) -> Array:
        index = jnp.reshape(index, (s, -1))
        last = jnp.asarray([table[at] - sizes[at] for at in numbers.start_index_map], index.dtype)  # of where a slice may start
        return jnp.all((index >= 0) & (index <= last[None, :]), 1)

    key, drops = ("table", axis), mode == lax.GatherScatterMode.FILL_OR_DROP
    return Rule("lookup", view.then(key, arrange), gradient, inputs, valid=valid if drops else None, size=size)


_RULES: Mapping[str, Callable[[Any, int, View], Rule | None]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "gather": _gather,
}
