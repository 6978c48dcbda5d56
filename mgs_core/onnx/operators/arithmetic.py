"""Elementwise arithmetic, comparison and logic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

from mgs_core._types import Array, Namespace
from mgs_core.onnx.extensions import extension
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.common import is_integral, is_real
from mgs_core.onnx.operators.registry import Run, operator

# operator → (first opset, function of the namespace that gives the function of the arrays)
_TABLE: dict[str, tuple[int, Callable[[Namespace], Run]]] = {
    "Add": (7, lambda xp: lambda a, b: a + b),
    "Sub": (7, lambda xp: lambda a, b: a - b),
    "Mul": (7, lambda xp: lambda a, b: a * b),
    "Neg": (1, lambda xp: lambda x: -x),
    "Abs": (1, lambda xp: xp.abs),
    "Reciprocal": (1, lambda xp: lambda x: 1.0 / x),
    "Sqrt": (1, lambda xp: xp.sqrt),
    "Exp": (1, lambda xp: xp.exp),
    "Log": (1, lambda xp: xp.log),
    "Sin": (7, lambda xp: xp.sin),
    "Cos": (7, lambda xp: xp.cos),
    "Tan": (7, lambda xp: xp.tan),
    "Asin": (7, lambda xp: xp.asin),
    "Acos": (7, lambda xp: xp.acos),
    "Atan": (7, lambda xp: xp.atan),
    "Sinh": (9, lambda xp: xp.sinh),
    "Cosh": (9, lambda xp: xp.cosh),
    "Tanh": (1, lambda xp: xp.tanh),
    "Asinh": (9, lambda xp: xp.asinh),
    "Acosh": (9, lambda xp: xp.acosh),
    "Atanh": (9, lambda xp: xp.atanh),
    "Erf": (9, lambda xp: extension(xp, "erf")),
    "Floor": (1, lambda xp: xp.floor),
    "Ceil": (1, lambda xp: xp.ceil),
    "Round": (11, lambda xp: xp.round),
    "Sign": (9, lambda xp: xp.sign),
    "IsNaN": (9, lambda xp: lambda x: x != x),
    "Equal": (7, lambda xp: lambda a, b: a == b),
    "Greater": (7, lambda xp: lambda a, b: a > b),
    "Less": (7, lambda xp: lambda a, b: a < b),
    "GreaterOrEqual": (12, lambda xp: lambda a, b: a >= b),
    "LessOrEqual": (12, lambda xp: lambda a, b: a <= b),
    "And": (7, lambda xp: xp.logical_and),
    "Or": (7, lambda xp: xp.logical_or),
    "Xor": (7, lambda xp: xp.logical_xor),
    "Not": (1, lambda xp: xp.logical_not),
    "BitwiseAnd": (18, lambda xp: xp.bitwise_and),
    "BitwiseOr": (18, lambda xp: xp.bitwise_or),
    "BitwiseXor": (18, lambda xp: xp.bitwise_xor),
    "BitwiseNot": (18, lambda xp: xp.bitwise_invert),
    "Max": (8, lambda xp: lambda *x: reduce(xp.maximum, x)),
    "Min": (8, lambda xp: lambda *x: reduce(xp.minimum, x)),
    "Sum": (8, lambda xp: lambda *x: reduce(lambda a, b: a + b, x)),
    "Mean": (8, lambda xp: lambda *x: reduce(lambda a, b: a + b, x) / len(x)),
    "Where": (9, lambda xp: xp.where),
    "Det": (11, lambda xp: lambda x: xp.linalg.det(x)),
}


def _from_table(node: Node, xp: Namespace, make: Callable[[Namespace], Run]) -> Run:
    return make(xp)


for _name, (_since, _make) in _TABLE.items():
    operator(_name, since=_since)(partial(_from_table, make=_make))


@operator("Div", since=7)
def div(node: Node, xp: Namespace) -> Run:
    """Divide; integers are rounded towards zero."""

    def run(a: Array, b: Array) -> Array:
        if not is_integral(xp, a):
            return a / b
        quotient = a // b
        rest = a - quotient * b
        up = xp.logical_and(rest != 0, xp.logical_xor(a < 0, b < 0))
        return quotient + xp.astype(up, quotient.dtype)

    return run


@operator("Mod", since=10)
def mod(node: Node, xp: Namespace) -> Run:
    """Return the rest of a division, with the sign of the divisor, or of the dividend with `fmod`."""
    if not node.attributes["fmod"]:
        return lambda a, b: xp.remainder(a, b)

    def run(a: Array, b: Array) -> Array:
        rest = xp.remainder(xp.abs(a), xp.abs(b))
        return xp.where(a < 0, -rest, rest)

    return run


@operator("Pow", since=7)
def power(node: Node, xp: Namespace) -> Run:
    """Raise to a power; the result has the base's type."""
    known = node.constants.get(1)
    scalar = known.item() if known is not None and known.ndim == 0 else None

    def run(a: Array, b: Array) -> Array:
        if scalar is not None and is_real(xp, a):
            if scalar == 2:
                return a * a
            return xp.sqrt(a) if scalar == 0.5 else a**scalar
        if a.dtype == b.dtype:
            return a**b
        if is_real(xp, a):
            return a ** xp.astype(b, a.dtype)
        return xp.astype(xp.astype(a, b.dtype) ** b, a.dtype)

    return run


@operator("BitShift", since=11)
def bit_shift(node: Node, xp: Namespace) -> Run:
    """Shift bits left or right; a shift that is negative or reaches the width shifts everything out."""
    left = node.attributes["direction"] == "LEFT"
    shift = xp.bitwise_left_shift if left else xp.bitwise_right_shift

    def run(a: Array, b: Array) -> Array:
        width = int("".join(filter(str.isdigit, str(a.dtype).rpartition("int")[2])))
        zero = xp.zeros_like(b)
        far = xp.logical_or(b < zero, b > xp.full_like(b, width - 1))
        gone = xp.zeros_like(a)
        gone = gone if left else xp.where(a < gone, gone - xp.ones_like(gone), gone)
        return xp.where(far, gone, shift(a, xp.where(far, zero, b)))

    return run


@operator("IsInf", since=10)
def is_inf(node: Node, xp: Namespace) -> Run:
    """Say which elements are infinite, of the signs asked for."""
    positive, negative = node.attributes["detect_positive"], node.attributes["detect_negative"]

    def run(x: Array) -> Array:
        infinite = xp.isinf(x)
        if positive and negative:
            return infinite
        if positive:
            return xp.logical_and(infinite, x > 0)
        return xp.logical_and(infinite, x < 0) if negative else xp.zeros_like(infinite)

    return run


@operator("Clip", since=6)
def clip_by_attributes(node: Node, xp: Namespace) -> Run:
    """Limit to a range given by attributes."""
    low, high = node.attributes.get("min"), node.attributes.get("max")

    def run(x: Array) -> Array:
        return clip(xp, x, None if low is None else xp.full_like(x, low), None if high is None else xp.full_like(x, high))

    return run


@operator("Clip", since=11)
def clip_by_inputs(node: Node, xp: Namespace) -> Run:
    """Limit to a range given by inputs."""
    return lambda x, low=None, high=None: clip(xp, x, low, high)


def clip(xp: Namespace, x: Array, low: Any, high: Any) -> Array:
    """Return min(max(x, low), high), with derivative 1 on the bounds.

    Args:
        xp: namespace.
        x: array.
        low: array, or None for no bound.
        high: array, or None for no bound.

    Returns:
        The array, limited.
    """
    if low is not None:
        x = xp.where(x < low, low, x)
    return x if high is None else xp.where(x > high, high, x)
