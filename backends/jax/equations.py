"""Equations of a jaxpr: their own jaxprs, how one is evaluated, and whether its derivative rule outlives a derivative."""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from mgs_core._types import Array

from .fingerprint import fingerprint

#: Primitives that do nothing but call.
INLINED = {"jit", "pjit", "closed_call", "core_call", "core_closed_call"}


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
    # functions among the parameters (rules of their own, devices): let JAX pass them on
    if any(name in equation.params for name in ("jvp_jaxpr_fun", "jvp_jaxpr_thunk", "bwd", "manual_axes")):
        outputs = [variable for variable in equation.outvars if type(variable).__name__ != "DropVar"]
        given = {v: value for v, value in zip(equation.invars, operands, strict=True) if not isinstance(v, Literal)}
        body = next(equation.params[name] for name in ("call_jaxpr", "fun_jaxpr", "jaxpr") if name in equation.params)
        body = body.jaxpr if isinstance(body, ClosedJaxpr) else body
        jaxpr = body.replace(constvars=(), invars=list(given), outvars=outputs, eqns=[equation], effects=equation.effects)
        results = iter(jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))(*given.values()))
        return [None if type(variable).__name__ == "DropVar" else next(results) for variable in equation.outvars]
    result = equation.primitive.bind(*operands, **equation.params)
    return list(result) if equation.primitive.multiple_results else [result]


def loses_rules(jaxpr: Jaxpr) -> bool:
    """Say whether values that come with a derivative have other derivatives than the program by itself.

    Where a derivative is taken, `custom_vjp` gives the value by its forward rule, as operations without a rule of their own; so
    does `custom_jvp`, unless its rule calls the function again.

    Args:
        jaxpr: the program.

    Returns:
        True when they may.
    """
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name.startswith("custom_vjp") or (name == "custom_jvp_call" and not _calls_itself(equation)):
            return True
        for value in equation.params.values() if name != "custom_jvp_call" else ():
            for entry in value if isinstance(value, (tuple, list)) else (value,):
                body = entry.jaxpr if isinstance(entry, ClosedJaxpr) else entry
                if isinstance(body, Jaxpr) and loses_rules(body):
                    return True
    return False


def _calls_itself(equation: Any) -> bool:
    shapes = [jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype) for variable in equation.invars]
    traced = jax.make_jaxpr(lambda *given: jax.vjp(lambda *operands: bind(equation, list(operands)), *given)[0])(*shapes).jaxpr
    calls = {variable: made for made in traced.eqns if made.primitive is equation.primitive for variable in made.outvars}
    own = fingerprint(equation.params["call_jaxpr"])
    return all(variable in calls and fingerprint(calls[variable].params["call_jaxpr"]) == own for variable in traced.outvars)
