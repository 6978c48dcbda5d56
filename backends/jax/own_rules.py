"""Derivative rules of their own, of `custom_jvp` and `custom_vjp`: whether they outlive a derivative."""

from __future__ import annotations

from typing import Any

import jax
from jax.extend.core import Jaxpr

from .equations import bind, shapes
from .fingerprint import fingerprint
from .versions import ClosedJaxpr, parts


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
                if isinstance(entry, (Jaxpr, ClosedJaxpr)) and loses_rules(parts(entry)[0]):
                    return True
    return False


def _calls_itself(equation: Any) -> bool:
    given = shapes(equation.invars)
    both = jax.make_jaxpr(lambda *arrays: jax.vjp(lambda *operands: bind(equation, list(operands)), *arrays)[0])(*given)
    traced, _ = parts(both)
    calls = {variable: made for made in traced.eqns if made.primitive is equation.primitive for variable in made.outvars}
    own = fingerprint(equation.params["call_jaxpr"])
    return all(variable in calls and fingerprint(calls[variable].params["call_jaxpr"]) == own for variable in traced.outvars)
