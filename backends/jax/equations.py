"""Equations of a jaxpr: their own jaxprs, and how one is evaluated."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
from jax.extend.core import Jaxpr, Literal

from mgs_core._types import Array

from .versions import ClosedJaxpr, as_function, parts, takes_functions

#: Primitives that do nothing but call.
INLINED = {"jit", "closed_call", "eval_jaxpr"}


def inner(equation: Any) -> Jaxpr | ClosedJaxpr:
    """Return the equation's own jaxpr.

    Args:
        equation: one that has one.

    Returns:
        The jaxpr.
    """
    jaxpr: Jaxpr | ClosedJaxpr = equation.params["jaxpr" if "jaxpr" in equation.params else "call_jaxpr"]
    return jaxpr


def bind(equation: Any, operands: list[Array]) -> list[Array]:
    """Evaluate one equation.

    Args:
        equation: the equation.
        operands: its operands' values.

    Returns:
        Its outputs.
    """
    if takes_functions(equation.primitive):  # rules of their own, devices: let JAX pass them on
        outputs = [variable for variable in equation.outvars if type(variable).__name__ != "DropVar"]
        given = {v: value for v, value in zip(equation.invars, operands, strict=True) if not isinstance(v, Literal)}
        body, _ = parts(inner(equation))
        jaxpr = body.replace(constvars=(), invars=list(given), outvars=outputs, eqns=[equation], effects=equation.effects)
        results = iter(as_function(jaxpr)(*given.values()))
        return [None if type(variable).__name__ == "DropVar" else next(results) for variable in equation.outvars]
    result = equation.primitive.bind(*operands, **equation.params)
    return list(result) if equation.primitive.multiple_results else [result]


def shapes(variables: Iterable[Any]) -> list[jax.ShapeDtypeStruct]:
    """Return shapes and dtypes of variables, to trace with.

    Args:
        variables: of an equation.
    """
    return [jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype) for variable in variables]
