"""Let `while` loops end: on made-up values one that waits for convergence may run for ever."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Jaxpr, Literal

from mgs_core._types import Array

from .equations import INLINED, bind, inner, shapes
from .versions import ClosedJaxpr, parts


@dataclass(frozen=True)
class Bound:
    """Say how loops end.

    Attributes:
        rounds: how many a loop may take.
        lost: whether what one that has not ended by then gives is NaN, which tells so; else it is what it has come to.
    """

    rounds: int
    lost: bool


#: Calls that compute what their own jaxpr does; their rules for derivatives are lost where they are inlined.
_CALLS = {*INLINED, "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call"}


def has_loops(jaxpr: Jaxpr | ClosedJaxpr) -> bool:
    """Say whether there is a `while` loop in a program, however deep.

    Args:
        jaxpr: the program.
    """
    return any(equation.primitive.name == "while" or any(map(has_loops, _own(equation))) for equation in parts(jaxpr)[0].eqns)


def bounded(closed: Jaxpr | ClosedJaxpr, bound: Bound) -> Jaxpr | ClosedJaxpr:
    """Return a program of the same values, whose loops end.

    Args:
        closed: the program.
        bound: how they end.

    Returns:
        The program, for evaluation alone; itself where it has no loops.
    """
    if not has_loops(closed):
        return closed
    jaxpr, constants = parts(closed)
    found: ClosedJaxpr = jax.make_jaxpr(lambda *inputs: _evaluate(jaxpr, constants, inputs, bound))(*shapes(jaxpr.invars))
    return found


def _own(equation: Any) -> list[Any]:
    """Return the jaxprs among an equation's parameters."""
    found = [each for value in equation.params.values() for each in (value if isinstance(value, (tuple, list)) else [value])]
    return [each for each in found if isinstance(each, (Jaxpr, ClosedJaxpr))]


def _evaluate(jaxpr: Jaxpr, constants: Sequence[Array], inputs: Sequence[Array], bound: Bound) -> list[Array]:
    values: dict[Any, Array] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *inputs), strict=True))

    def value(variable: Any) -> Array:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        operands, name = [value(variable) for variable in equation.invars], equation.primitive.name
        if name == "while":
            found = _while(equation.params, operands, bound)
        elif name in _CALLS and any(map(has_loops, _own(equation))):
            found = _evaluate(*parts(inner(equation)), operands, bound)
        elif name == "scan":
            found = bind(_with(equation, jaxpr=bounded(equation.params["jaxpr"], bound)), operands)
        elif name == "cond":
            branches = tuple(bounded(branch, bound) for branch in equation.params["branches"])
            found = bind(_with(equation, branches=branches), operands)
        else:
            found = bind(equation, operands)
        values.update(zip(equation.outvars, found, strict=True))
    return [value(variable) for variable in jaxpr.outvars]


def _with(equation: Any, **params: Any) -> Any:
    return equation.replace(params={**equation.params, **params})


def _while(params: dict[str, Any], operands: list[Array], bound: Bound) -> list[Array]:
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    of_condition, of_body, start = operands[:first], operands[first:second], operands[second:]

    def goes_on(state: Sequence[Array]) -> Array:
        """Return a scalar; of a loop under vmap one for each copy, which goes on by itself, its axes the first ones."""
        return _evaluate(*parts(params["cond_jaxpr"]), [*of_condition, *state], bound)[0]

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        now = goes_on(state[1:])
        after = _evaluate(*parts(params["body_jaxpr"]), [*of_body, *state[1:]], bound)
        return state[0] + 1, *(jnp.where(_beside(now, new), new, old) for old, new in zip(state[1:], after, strict=True))

    found: list[Array]
    _, *found = lax.while_loop(lambda state: (state[0] < bound.rounds) & jnp.any(goes_on(state[1:])), step, (0, *start))
    if not bound.lost:
        return found
    ended = ~goes_on(found)
    return [
        jnp.where(_beside(ended, value), value, jnp.nan) if jnp.issubdtype(value.dtype, jnp.inexact) else value for value in found
    ]


def _beside(which: Array, value: Array) -> Array:
    return jnp.reshape(which, (*which.shape, *(1 for _ in range(value.ndim - which.ndim))))
