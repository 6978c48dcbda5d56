"""Follow parameters through the operations that only rearrange or scale them, up to where they meet data.

The value of a tensor may be a sum of terms, each a rearranged parameter times a factor that does not depend on it: a reshaped
kernel, one slice of packed weights, or `β − μ·γ·rsqrt(σ²)` of a batch normalisation at inference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import tensorflow as tf

from mgs_core._types import Array

from .operations import input_names, replay


@dataclass(frozen=True, eq=False)
class Term:
    """Hold one parameter as it appears in a tensor.

    Attributes:
        parameter: its name.
        shape: its shape.
        steps: rearrangements since then, on NumPy arrays.
        flat: whether they all keep the flat order.
        factor: what it is multiplied by elementwise, of the tensor's shape or scalar; None for 1.
    """

    parameter: str
    shape: tuple[int, ...]
    steps: tuple[Callable[[Any], Any], ...] = ()
    flat: bool = True
    factor: Array = None

    def places(self) -> Any:
        """Return, for each element of the tensor, its place in the flat parameter; a NumPy array."""
        places = np.arange(prod(self.shape)).reshape(self.shape)
        for step in self.steps:
            places = step(places)
        return places


def follow(op: Any, terms: dict[str, list[Term]]) -> list[list[Term]] | None:
    """Return the terms of each output of an operation, or None when it does more than rearrange and scale parameters.

    Args:
        op: a graph operation that has terms among its inputs.
        terms: those known so far, by the name of the tensor.
    """
    shape = op.outputs[0].shape if op.outputs else None
    if shape is None or not shape.is_fully_defined():
        return None
    if op.type == "Identity" or (op.type == "Cast" and op.outputs[0].dtype.is_floating):  # of complex numbers there are rows
        return [terms[op.inputs[0].name]]
    if op.type == "StopGradient":
        return [[]]
    if op.type in ("Reshape", "ExpandDims", "Squeeze") and op.inputs[0].name in terms:
        if _spread(terms[op.inputs[0].name]):
            return None
        shape = tuple(shape)
        return [[_moved(term, lambda array: np.reshape(array, shape), True) for term in terms[op.inputs[0].name]]]
    if op.type in _REARRANGING:
        return _rearranged(op, terms)
    if op.type == "Neg":
        return [[_scaled(term, -1.0, op) for term in terms[op.inputs[0].name]]]
    if op.type in ("Add", "AddV2", "Sub", "BiasAdd", "Mul", "RealDiv"):
        return _combined(op, terms)
    return None


_REARRANGING = ("Transpose", "StridedSlice", "Slice", "Split", "SplitV", "Unpack", "ReverseV2")


def _spread(found: list[Term]) -> bool:
    """Say whether a term has a factor with axes, which would have to move with it."""
    return any(term.factor is not None and term.factor.shape.rank for term in found)


def _moved(term: Term, step: Callable[[Any], Any], flat: bool) -> Term:
    return replace(term, steps=(*term.steps, step), flat=term.flat and flat)


def _rearranged(op: Any, terms: dict[str, list[Term]]) -> list[list[Term]] | None:
    """Replay the operation on NumPy arrays; its other inputs must be constants."""
    names = input_names(op)
    constants, moved = {}, None
    for name, tensor in zip(names, op.inputs, strict=True):
        if tensor.name in terms:
            moved = name
            continue
        constants[name] = tf.get_static_value(tensor)
        if constants[name] is None:
            return None
    found = terms[op.inputs[names.index(moved)].name] if moved else []
    if moved is None or _spread(found):
        return None

    def step(number: int) -> Callable[[Any], Any]:
        return lambda array: replay(op, {moved: array, **constants})[number]

    return [[_moved(term, step(number), False) for term in found] for number in range(len(op.outputs))]


def _combined(op: Any, terms: dict[str, list[Term]]) -> list[list[Term]] | None:
    """Treat sums and products that keep the parameter's own shape, so that no data has joined it."""
    left, right = op.inputs
    found: list[Term] = []
    for tensor, other in ((left, right), (right, left)):
        if tensor.name not in terms:
            continue
        if tensor.shape != op.outputs[0].shape:
            return None
        for term in terms[tensor.name]:
            if op.type == "Mul":
                found.append(_scaled(term, other, op))
            elif op.type == "RealDiv":
                if tensor is right:
                    return None
                found.append(_scaled(term, 1.0 / other, op))
            else:
                found.append(_scaled(term, -1.0, op) if op.type == "Sub" and tensor is right else term)
    return [found]


def _scaled(term: Term, factor: Array, op: Any) -> Term:
    factor = tf.cast(factor, op.outputs[0].dtype)
    return replace(term, factor=factor if term.factor is None else tf.cast(term.factor, factor.dtype) * factor)
