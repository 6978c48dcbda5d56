"""Marks: the numbers by which a program tells entries of a sample apart, as −100 an ignored label, a token that pads, or NaN.

Made-up values must hold them, or else a mean over what is not ignored is never seen to ignore anything. They are read off the
program: what an input, moved and reshaped but not yet computed with, is compared with, and the lengths of the tables that it
indexes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, nan, prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from mgs_core._types import Array

from .versions import ClosedJaxpr, parts

#: Numbers of one input that are tried; a program compares with few.
_MOST = 8
#: Elements up to which a constant array is read.
_FEW = 64
_EQUAL, _ORDERED = {"eq", "ne"}, {"lt", "le", "gt", "ge"}
#: Primitives whose result holds the entries of their operands, or tells what they are.
_KEEPING = {
    "abs", "add", "broadcast_in_dim", "clamp", "concatenate", "convert_element_type", "copy", "dynamic_slice",
    "dynamic_update_slice", "gather", "max", "min", "neg", "optimization_barrier", "pad", "reshape", "rev",
    "scatter", "select_n", "slice", "squeeze", "stop_gradient", "sub", "transpose",
}  # fmt: skip


@dataclass
class Marks:
    """Hold what a program does with the entries of one input.

    Attributes:
        numbers: that they are compared with, and whether for equality.
        length: of the longest table that they index, or range of numbers that they are compared with.
        moved: whether what each entry has of its own is added to them, as where a batch is laid out in one table: then −1 would
            be an entry of the sample before.
    """

    numbers: dict[float, bool] = field(default_factory=dict)
    length: int = 0
    moved: bool = False

    def note(self, number: float, equal: bool) -> None:
        """Keep a number."""
        self.numbers[number] = equal or self.numbers.get(number, False)

    def variants(self, value: Array, draw: np.random.Generator) -> Iterator[Array]:
        """Yield the value with other entries in some places of each sample, more of them from sample to sample.

        Args:
            value: made-up values of the input, samples first.
            draw: draws places, and indices.
        """
        numbers = sorted(self.numbers, key=lambda number: not self.numbers[number])  # those of equality first: they mark
        if jnp.issubdtype(value.dtype, jnp.integer):
            if self.length > 2:  # 0 and 1 are what integers are made up of
                yield np.asarray(draw.integers(0, self.length, size=value.shape)).astype(value.dtype)
            known = (-1.0, 0.0, 1.0) if self.moved else (0.0, 1.0)
            fitting = [number for number in numbers if number not in known and _fits(number, value.dtype)]
        else:
            floating = bool(jnp.issubdtype(value.dtype, jnp.floating))
            top = float(jnp.finfo(value.dtype).max) if floating else 0.0
            fitting = [number for number in numbers if not top < abs(number) < inf] if floating else []
        for number in fitting[:_MOST]:
            few, size = len(value), prod(value.shape[1:])
            count = np.arange(few) % 2 if size == 1 else np.arange(few) * (size - 1) // max(few - 1, 1)
            chosen = draw.permuted(np.arange(size) < count[:, None], axis=1)
            yield np.where(np.reshape(chosen, value.shape), number, value).astype(value.dtype)


def _fits(number: float, dtype: Any) -> bool:
    return number == number // 1 and jnp.iinfo(dtype).min <= number <= jnp.iinfo(dtype).max


@dataclass(frozen=True)
class _Origin:
    """Say what a variable holds: entries of inputs, by their places; or constants, their numbers or a range from 0."""

    inputs: frozenset[int] = frozenset()
    numbers: tuple[float, ...] = ()
    length: int = 0

    def __or__(self, other: _Origin) -> _Origin:
        numbers = tuple(dict.fromkeys(self.numbers + other.numbers))[:_FEW]  # bounded, for a program may join them without end
        return _Origin(self.inputs | other.inputs, numbers, max(self.length, other.length))


_UNKNOWN = _Origin()


def marks_of(program: ClosedJaxpr, inputs: int) -> list[Marks]:
    """Return the marks of a program's last inputs.

    Args:
        program: the program.
        inputs: how many of its inputs, the last ones.

    Returns:
        As many marks.
    """
    found = [Marks() for _ in range(inputs)]
    others = len(parts(program)[0].invars) - inputs
    _follow(program, [_UNKNOWN] * others + [_Origin(frozenset({at})) for at in range(inputs)], found)
    return found


def _follow(program: Any, given: Sequence[_Origin], found: list[Marks]) -> list[_Origin]:
    """Note what a program does with entries of inputs; return the origins of its outputs."""
    jaxpr, constants = parts(program)
    origins: dict[Any, _Origin] = dict(zip(jaxpr.invars, given, strict=True))
    origins.update(zip(jaxpr.constvars, map(_of_constant, constants), strict=False))

    def origin(variable: Any) -> _Origin:
        return _of_constant(variable.val) if isinstance(variable, Literal) else origins.get(variable, _UNKNOWN)

    wraps = _wraps(jaxpr)
    for equation in jaxpr.eqns:
        operands = [origin(variable) for variable in equation.invars]
        if wraps.isdisjoint(equation.outvars):
            _note(equation, operands, found)
        kept = _UNKNOWN
        if equation.primitive.name == "iota":
            kept = _Origin(length=equation.params["shape"][equation.params["dimension"]])
        elif equation.primitive.name in _KEEPING:
            for operand in operands:
                kept = kept | operand
            fixed = all(isinstance(v, Literal) or o.inputs for v, o in zip(equation.invars, operands, strict=True))
            if equation.primitive.name in ("add", "sub") and kept.inputs and not fixed:
                for at in kept.inputs:
                    found[at].moved = True
                kept = _UNKNOWN  # other entries than those of the input
        results = [kept] * len(equation.outvars)
        for body in _bodies(equation.params):
            size = len(parts(body)[0].invars)
            # a branch, or the body of a loop, has fewer inputs, the last of them
            entering = operands[-size:] if 0 < size <= len(operands) else [_UNKNOWN] * size
            leaving = _follow(body, entering, found)
            results = leaving if len(leaving) == len(results) else results
        origins.update(zip(equation.outvars, results, strict=True))
    return [origin(variable) for variable in jaxpr.outvars]


def _wraps(jaxpr: Any) -> set[Any]:
    """Return the results of `x < 0` in `where(x < 0, x + length, x)`, as JAX has it of every index: that tells nothing apart."""
    made = {variable: equation for equation in jaxpr.eqns for variable in equation.outvars}
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name != "select_n" or len(equation.invars) != 3:
            continue
        less, plain, moved = equation.invars
        by = None if isinstance(moved, Literal) else made.get(moved)
        if by is not None and by.primitive.name == "add" and plain in by.invars and not isinstance(less, Literal):
            found.add(less)
    return found


def _note(equation: Any, operands: list[_Origin], found: list[Marks]) -> None:
    name, variables = equation.primitive.name, equation.invars
    if name in _EQUAL | _ORDERED:
        for one, other in (operands, operands[::-1]):
            for at in one.inputs:
                for number in other.numbers:
                    beside = max(1.0, abs(number))  # of a large number, number + 1 may be the same
                    for near in (number,) if name in _EQUAL else (number, number - beside, number + beside):
                        found[at].note(near, name in _EQUAL)
                found[at].length = max(found[at].length, other.length)
    if name == "is_finite" or (name in _EQUAL and variables[0] is variables[1]):
        for at in operands[0].inputs:
            found[at].note(nan, True)
    if name == "gather":
        table, indexed = variables[0].aval.shape, equation.params["dimension_numbers"].start_index_map
        for at in operands[1].inputs:
            found[at].length = max(found[at].length, *(table[axis] for axis in indexed))


def _bodies(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for entry in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(entry, "eqns") or hasattr(entry, "jaxpr"):
                yield entry


def _of_constant(value: Any) -> _Origin:
    dtype = getattr(value, "dtype", type(value))
    real = jnp.issubdtype(dtype, jnp.number) and not jnp.issubdtype(dtype, jnp.complexfloating)
    if getattr(value, "size", 1) > _FEW or not real:
        return _UNKNOWN
    try:
        numbers = np.ravel(np.asarray(value, dtype=np.float64))
    except Exception:  # a traced constant has no numbers, nor has one that was given away
        return _UNKNOWN
    return _Origin(numbers=tuple(float(number) for number in numbers if not np.isnan(number)))
