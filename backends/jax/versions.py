"""What differs between versions of JAX, told by what there is.

Up to JAX 0.10 a `ClosedJaxpr` holds a `Jaxpr` and the values of its constants; since 0.11 there is one class, which holds both.
A `scan` then holds trees in place of the numbers of its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, Primitive, jaxpr_as_fun

from mgs_core._types import Array

try:
    from jax.extend.core import ClosedJaxpr as ClosedJaxpr
except ImportError:  # JAX 0.12 has it as another name of Jaxpr, for the time being
    ClosedJaxpr = Jaxpr


def parts(jaxpr: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """Return what has the equations, and the values of the constants.

    Args:
        jaxpr: of either kind.

    Returns:
        (jaxpr, constants).
    """
    # the attribute `jaxpr` of the one class is the jaxpr itself, for the time being
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def opened(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    """Return the jaxpr with its constants as its first inputs.

    Args:
        jaxpr: of either kind.

    Returns:
        The jaxpr, without values.
    """
    jaxpr, _ = parts(jaxpr)
    return jaxpr.replace(constvars=(), invars=[*jaxpr.constvars, *jaxpr.invars])


def as_function(jaxpr: Jaxpr | ClosedJaxpr) -> Callable[..., list[Array]]:
    """Return the function that a jaxpr without constants, or a closed one, computes.

    Args:
        jaxpr: the jaxpr.

    Returns:
        `(*inputs) → outputs`.
    """
    function: Callable[..., list[Array]] = jaxpr_as_fun(jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ()))
    return function


def has_values(array: Array) -> bool:
    """Return whether an array's values can be read: it is not traced, and no other process holds a part of it.

    Args:
        array: of JAX or NumPy.
    """
    if isinstance(array, jax.core.Tracer):
        return False
    return bool(getattr(array, "is_fully_addressable", True) or array.is_fully_replicated)


def counts_of_scan(equation: Any) -> tuple[int, int]:
    """Return how many operands of a `scan` are the same in each step, and how many are carried; slices follow them.

    Args:
        equation: the scan.

    Returns:
        (constants, carried).
    """
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()
    return len(constants), len(carried)


def takes_functions(primitive: Primitive) -> bool:
    """Say whether a primitive is bound with functions, which JAX makes from an equation's parameters in its own way.

    Args:
        primitive: the primitive.

    Returns:
        True for derivative rules, `shard_map` and the like.
    """
    return type(primitive).get_bind_params is not Primitive.get_bind_params
