"""Structural keys of traced programs: equal keys mean equal programs, so that a program is analysed and compiled once.

A trace makes new objects each time, so objects are compared by content where their content is known, and by identity elsewhere:
an unknown object costs a new compilation. Constants are inputs of a program: equal keys say nothing of their values, on which it
may depend whether samples interact; see `interaction.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

#: Objects of JAX that say where and when a function was traced, not what it does.
_BOOKKEEPING = {"Store", "EqualStore", "DynamicJaxprTrace"}


class _Same:
    """Compare an object by identity, and keep it alive so that the identity is not given to another."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def fingerprint(value: Any) -> Hashable:
    """Return a hashable key that equals another's only when the two values do the same.

    Args:
        value: a jaxpr, the parameters of an equation, or a part of them.

    Returns:
        The key.
    """
    return _key(value, {})


def _key(value: Any, seen: dict[int, Any]) -> Hashable:
    if isinstance(value, ClosedJaxpr):
        return ("closed", _key(value.jaxpr, seen), tuple(_key(constant, seen) for constant in value.consts))
    if isinstance(value, Jaxpr):
        return _of_jaxpr(value, seen)
    if isinstance(value, Mapping):
        return (
            "mapping",
            tuple((str(name), _key(entry, seen)) for name, entry in sorted(value.items(), key=lambda i: str(i[0]))),
        )
    if type(value) in (list, tuple):
        return (type(value).__name__, tuple(_key(entry, seen) for entry in value))
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None), np.dtype)):
        return (type(value).__name__, repr(value))
    if isinstance(value, (np.ndarray, np.generic)):
        return ("array", value.shape, str(value.dtype), value.tobytes()) if value.dtype != object else _Same(value)
    if isinstance(value, jax.Array):
        return _Same(value)
    return _of_function(value, seen)


def _of_jaxpr(jaxpr: Jaxpr, seen: dict[int, Any]) -> Hashable:
    if id(jaxpr) in seen:  # the same function, called again
        return ("again", seen[id(jaxpr)])
    seen[id(jaxpr)] = len(seen)
    numbers: dict[Any, int] = {}

    def atom(variable: Any) -> Hashable:
        if isinstance(variable, Literal):
            return ("literal", str(variable.aval), _key(np.asarray(variable.val), seen))
        return (numbers.setdefault(variable, len(numbers)), str(variable.aval))

    bound = tuple(atom(variable) for variable in (*jaxpr.constvars, *jaxpr.invars))
    equations = tuple(
        (
            e.primitive.name,
            tuple(atom(variable) for variable in e.invars),
            _key(e.params, seen),
            tuple(str(variable.aval) if type(variable).__name__ == "DropVar" else atom(variable) for variable in e.outvars),
        )
        for e in jaxpr.eqns
    )
    return ("jaxpr", bound, equations, tuple(atom(variable) for variable in jaxpr.outvars))


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return cell


def _of_function(value: Any, seen: dict[int, Any]) -> Hashable:
    """Return the key of a function by its code and what it closes over, of other objects by equality or identity."""
    if id(value) in seen:
        return ("again", seen[id(value)])
    if isinstance(value, FunctionType):
        seen[id(value)] = len(seen)
        world = (value.__code__, _Same(value.__globals__), _key(value.__defaults__, seen), _key(value.__kwdefaults__, seen))
        return ("function", *world, tuple(_key(_content(cell), seen) for cell in value.__closure__ or ()))
    if isinstance(value, MethodType):
        return ("method", _key(value.__func__, seen), _key(value.__self__, seen))
    if isinstance(value, functools.partial):
        return ("partial", _key(value.func, seen), _key(value.args, seen), _key(value.keywords, seen))
    if hasattr(value, "transforms") and hasattr(value, "f"):  # a function that JAX has wrapped
        return ("wrapped", _key(value.f, seen), _key(value.transforms, seen), _key(value.params, seen))
    if type(value) is object or type(value).__name__ in _BOOKKEEPING:
        return type(value).__name__
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return (type(value), value)
