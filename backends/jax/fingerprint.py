"""Structural keys of traced programs: equal keys mean equal programs, so that a program is analysed and compiled once.

A trace makes new objects each time, so objects are compared by content where their content is known, and by identity elsewhere:
an unknown object costs a new compilation. Constants are inputs of a program: equal keys say nothing of their values, on which it
may depend whether samples interact; see `interaction.py`. Derivative rules that are not JAX's own may read what changes, the
slope of a surrogate gradient for instance: they are compared by what they come to when they are traced.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from types import CellType, FunctionType, MethodType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal

from mgs_core._types import Array

from .equations import bind, shapes
from .versions import ClosedJaxpr, has_values, parts

#: Objects of JAX that say where and when a function was traced, not what it does.
_BOOKKEEPING = {"Store", "EqualStore", "DynamicJaxprTrace"}
#: Primitives that come with a derivative rule.
_RULES = {"custom_jvp_call", "custom_vjp_call"}
#: Elements up to which arrays of the host are compared by value: a rule may make them anew each time.
_FEW = 1024
#: Derivatives that are traced: the gradient of a kernel takes two. Rules that call their own function have them without end.
_ORDERS = 2


class _Seen(dict[Hashable, tuple[int, Any]]):
    """Hold what was seen, numbered in order and kept alive: objects by identity, rules by structure; and how deep rules nest."""

    def __init__(self, rules: bool = True) -> None:
        super().__init__()
        self.rules, self.order = rules, 0

    def note(self, key: Hashable, value: Any) -> None:
        self[key] = (len(self), value)


class _Same:
    """Compare an object by identity, and keep it alive so that the identity is not given to another."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def fingerprint(value: Any, *, rules: bool = True, constants: bool = True) -> Hashable:
    """Return a hashable key that equals another's only when the two values do the same.

    Args:
        value: a jaxpr, the parameters of an equation, or a part of them.
        rules: whether derivative rules count too; no value depends on them.
        constants: whether the values of a jaxpr's own constants count; they do not where they are inputs of a program.

    Returns:
        The key.
    """
    seen = _Seen(rules)
    return _key(value, seen) if constants else _of_jaxpr(parts(value)[0], seen)


def _key(value: Any, seen: _Seen) -> Hashable:
    if isinstance(value, (Jaxpr, ClosedJaxpr)):
        jaxpr, constants = parts(value)
        return ("closed", _of_jaxpr(jaxpr, seen), tuple(_key(constant, seen) for constant in constants))
    if isinstance(value, Mapping):
        return (
            "mapping",
            tuple((str(name), _key(entry, seen)) for name, entry in sorted(value.items(), key=lambda i: str(i[0]))),
        )
    if isinstance(value, (set, frozenset)):
        return ("set", frozenset(_key(entry, seen) for entry in value))
    if type(value) in (list, tuple):
        return (type(value).__name__, tuple(_key(entry, seen) for entry in value))
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None), np.dtype)):
        return (type(value).__name__, repr(value))
    if isinstance(value, (np.ndarray, np.generic)):
        return ("array", value.shape, str(value.dtype), value.tobytes()) if value.dtype != object else _Same(value)
    if isinstance(value, jax.Array):
        return _of_array(value)
    return _of_function(value, seen)


def _of_array(value: Array) -> Hashable:
    plain = has_values(value) and not jnp.issubdtype(value.dtype, jax.dtypes.extended)
    if not plain or value.size > _FEW or value.is_deleted() or any(device.platform != "cpu" for device in value.devices()):
        return _Same(value)
    return ("array", str(jax.typeof(value)), value.sharding, np.asarray(value).tobytes())


def _of_jaxpr(jaxpr: Jaxpr, seen: _Seen) -> Hashable:
    if id(jaxpr) in seen:  # the same function, called again
        return ("again", seen[id(jaxpr)][0])
    seen.note(id(jaxpr), jaxpr)
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
            _of_rule(e, seen) if e.primitive.name in _RULES else _key(e.params, seen),
            tuple(str(variable.aval) if type(variable).__name__ == "DropVar" else atom(variable) for variable in e.outvars),
        )
        for e in jaxpr.eqns
    )
    return ("jaxpr", len(jaxpr.constvars), bound, equations, tuple(atom(variable) for variable in jaxpr.outvars))


def _of_rule(equation: Any, seen: _Seen) -> Hashable:
    """Return the key of an equation with a derivative rule of its own, by the rule's trace unless all of it is JAX's."""
    if not seen.rules:
        return _key(equation.params["call_jaxpr"], seen)
    own = _Seen()
    structure = (_key(equation.params, own), tuple(str(variable.aval) for variable in equation.invars))
    if structure in seen:
        return ("again", seen[structure][0])
    if seen.order == _ORDERS or all(_is_of_jax(value) for _, value in own.values()):
        return structure
    seen.note(structure, equation)
    moved = equation.invars if equation.primitive.name == "custom_jvp_call" else equation.outvars
    try:
        traced = jax.make_jaxpr(functools.partial(_differentiated, equation))(shapes(equation.invars), shapes(moved))
    except Exception:  # whatever it is, it is raised where the rule is used, if ever
        return structure
    seen.order += 1
    key = ("rule", _key(traced, seen), structure if equation.params["symbolic_zeros"] else None)
    seen.order -= 1
    return key


def _differentiated(equation: Any, operands: list[Array], changes: list[Array]) -> list[Any]:
    """Evaluate an equation and its derivative, forward from changes of the operands or backward from those of the results."""

    def call(*operands: Array) -> list[Any]:
        return bind(equation, list(operands))

    given = [_change(array) for array in changes]
    if equation.primitive.name == "custom_jvp_call":
        values, found = jax.jvp(call, operands, given)
    else:
        values, pull = jax.vjp(call, *operands)
        found = pull(given)
    return [leaf for leaf in jax.tree.leaves((values, found)) if leaf.dtype != jax.dtypes.float0]


def _change(array: Array) -> Any:
    return array if jnp.issubdtype(array.dtype, jnp.inexact) else np.zeros(array.shape, jax.dtypes.float0)


def _is_of_jax(value: Any) -> bool:
    module = getattr(value, "__module__", None)
    return not callable(value) or (isinstance(module, str) and module.split(".")[0] in ("jax", "jaxlib", "builtins"))


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return cell


def _of_function(value: Any, seen: _Seen) -> Hashable:
    """Return the key of a function by its code and what it closes over, of other objects by equality or identity."""
    if id(value) in seen:
        return ("again", seen[id(value)][0])
    if isinstance(value, FunctionType):
        seen.note(id(value), value)
        world = (value.__code__, _Same(value.__globals__), _key(value.__defaults__, seen), _key(value.__kwdefaults__, seen))
        return ("function", *world, tuple(_key(_content(cell), seen) for cell in value.__closure__ or ()))
    if isinstance(value, (jax.custom_jvp, jax.custom_vjp)):  # which a rule may call
        seen.note(id(value), value)
        return ("custom", _key(vars(value), seen))
    if isinstance(value, MethodType):
        return ("method", _key(value.__func__, seen), _key(value.__self__, seen))
    if isinstance(value, functools.partial):
        return ("partial", _key(value.func, seen), _key(value.args, seen), _key(value.keywords, seen))
    if hasattr(value, "transforms") and hasattr(value, "f"):  # a function that JAX has wrapped
        return ("wrapped", _key(value.f, seen), _key(value.transforms, seen), _key(value.params, seen))
    if type(value) is object or type(value).__name__ in _BOOKKEEPING:
        return type(value).__name__
    if callable(value):
        seen.note(id(value), value)
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return (type(value), value)
