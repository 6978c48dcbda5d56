"""Let `while` loops end: on made-up values one that waits for convergence may run for ever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, Literal

from mgs_core._types import Array

from .equations import INLINED, bind, inner, shapes
from .versions import ClosedJaxpr, parts

#: Rounds after which a loop is given up.
_MOST = 1000
#: Calls that compute what their own jaxpr does; their rules for derivatives are lost where they are inlined.
_CALLS = {*INLINED, "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"}


def has_loops(jaxpr: Jaxpr | ClosedJaxpr) -> bool:
    """Say whether there is a `while` loop in a program, however deep.

    Args:
        jaxpr: the program.
    """
    return any(equation.primitive.name == "while" or any(map(has_loops, _own(equation))) for equation in parts(jaxpr)[0].eqns)


def bounded(closed: Jaxpr | ClosedJaxpr) -> Jaxpr | ClosedJaxpr:
    """Return a program of the same values, in which a loop that goes on after 1000 rounds gives NaN.

    Args:
        closed: the program.

    Returns:
        The program, for evaluation alone; itself where it has no loops.
    """
    if not has_loops(closed):
        return closed
    jaxpr, constants = parts(closed)
    found: ClosedJaxpr = jax.make_jaxpr(lambda *inputs: _evaluate(jaxpr, constants, inputs))(*shapes(jaxpr.invars))
    return found


def _own(equation: Any) -> list[Any]:
    """Return the jaxprs among an equation's parameters."""
    found = [each for value in equation.params.values() for each in (value if isinstance(value, (tuple, list)) else [value])]
    return [each for each in found if isinstance(each, (Jaxpr, ClosedJaxpr))]


def _evaluate(jaxpr: Jaxpr, constants: Sequence[Array], inputs: Sequence[Array]) -> list[Array]:
    values: dict[Any, Array] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *inputs), strict=True))

    def value(variable: Any) -> Array:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        operands, name = [value(variable) for variable in equation.invars], equation.primitive.name
        if name == "while":
            found = _while(equation.params, operands)
        elif name in _CALLS and any(map(has_loops, _own(equation))):
            found = _evaluate(*parts(inner(equation)), operands)
        elif name == "scan":
            found = bind(_with(equation, jaxpr=bounded(equation.params["jaxpr"])), operands)
        elif name == "cond":
            found = bind(_with(equation, branches=tuple(map(bounded, equation.params["branches"]))), operands)
        else:
            found = bind(equation, operands)
        values.update(zip(equation.outvars, found, strict=True))
    return [value(variable) for variable in jaxpr.outvars]


def _with(equation: Any, **params: Any) -> Any:
    return equation.replace(params={**equation.params, **params})


def _while(params: dict[str, Any], operands: list[Array]) -> list[Array]:
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    of_condition, of_body, start = operands[:first], operands[first:second], operands[second:]

    def goes_on(state: Sequence[Array]) -> Array:
        """Return a scalar; of a loop under vmap one for each copy, which goes on by itself, its axes the first ones."""
        return _evaluate(*parts(params["cond_jaxpr"]), [*of_condition, *state])[0]

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        now = goes_on(state[1:])
        after = _evaluate(*parts(params["body_jaxpr"]), [*of_body, *state[1:]])
        return state[0] + 1, *(jnp.where(_beside(now, new), new, old) for old, new in zip(state[1:], after, strict=True))

    _, *found = lax.while_loop(lambda state: (state[0] < _MOST) & jnp.any(goes_on(state[1:])), step, (0, *start))
    ended = ~goes_on(found)
    return [
        jnp.where(_beside(ended, value), value, jnp.nan) if jnp.issubdtype(value.dtype, jnp.inexact) else value for value in found
    ]


def _beside(which: Array, value: Array) -> Array:
    return jnp.reshape(which, (*which.shape, *(1 for _ in range(value.ndim - which.ndim))))
