"""Sequences of tensors, held as Python lists of a structure that data do not change; optional values, which are never absent."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from mgs_core._types import Array, Namespace
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.common import axis_of, integers
from mgs_core.onnx.operators.registry import Run, operator


@operator("SequenceConstruct", since=11)
def construct(node: Node, xp: Namespace) -> Run:
    """Make a sequence of tensors."""
    return lambda *parts: list(parts)


@operator("SequenceEmpty", since=11)
def empty(node: Node, xp: Namespace) -> Run:
    """Make an empty sequence."""
    return lambda: []


@operator("SequenceAt", since=11, host=(1,))
def at(node: Node, xp: Namespace) -> Run:
    """Return one tensor of a sequence."""
    return lambda sequence, place: sequence[_place(node, place, len(sequence), len(sequence) - 1)]


@operator("SequenceInsert", since=11, host=(2,))
def insert(node: Node, xp: Namespace) -> Run:
    """Insert a tensor, by default at the end."""

    def run(sequence: list[Array], value: Array, place: Array = None) -> list[Array]:
        where = len(sequence) if place is None else _place(node, place, len(sequence), len(sequence))
        return [*sequence[:where], value, *sequence[where:]]

    return run


@operator("SequenceErase", since=11, host=(1,))
def erase(node: Node, xp: Namespace) -> Run:
    """Remove a tensor, by default the last."""

    def run(sequence: list[Array], place: Array = None) -> list[Array]:
        where = len(sequence) - 1 if place is None else _place(node, place, len(sequence), len(sequence) - 1)
        return [*sequence[:where], *sequence[where + 1 :]]

    return run


@operator("SequenceLength", since=11, host_result=True)
def length(node: Node, xp: Namespace) -> Run:
    """Count the tensors."""
    return lambda sequence: np.asarray(len(sequence), dtype=np.int64)


@operator("SplitToSequence", since=11, host=(1,))
def split_to_sequence(node: Node, xp: Namespace) -> Run:
    """Cut a tensor along an axis into a sequence."""
    keep = node.attributes["keepdims"]

    def run(x: Array, sizes: Array = None) -> list[Array]:
        axis = axis_of(node.attributes["axis"], x.ndim, node)
        total, front = x.shape[axis], (slice(None),) * axis
        if sizes is None:
            return [x[(*front, slice(k, k + 1) if keep else k, ...)] for k in range(total)]
        if sizes.ndim == 0:
            step = int(sizes)
            if step < 1:
                raise node.damaged(f"cuts into parts of {step}")
            starts = [*range(0, total, step), total]
        else:
            starts = np.cumsum([0, *integers(sizes)]).tolist()
        if starts[-1] != total or sorted(starts) != starts:
            raise node.damaged(f"cuts an axis of length {total} at {starts}")
        return [x[(*front, slice(a, b), ...)] for a, b in pairwise(starts)]

    return run


@operator("ConcatFromSequence", since=11)
def concat_from_sequence(node: Node, xp: Namespace) -> Run:
    """Join the tensors of a sequence along an axis, or along a new one."""
    axis, new = node.attributes["axis"], node.attributes["new_axis"]

    def run(sequence: list[Array]) -> Array:
        if not sequence:
            raise node.damaged("joins an empty sequence")
        if new:
            return xp.stack(sequence, axis=axis_of(axis, sequence[0].ndim + 1, node))
        return xp.concat(sequence, axis=axis_of(axis, sequence[0].ndim, node))

    return run


@operator("Optional", "OptionalGetElement", since=15)
def optional(node: Node, xp: Namespace) -> Run:
    """Return the value: a model is refused whose inputs may be absent."""
    if not node.has(0):
        raise node.unsupported("is an absent value", "Export without optional values.")
    return lambda x: x


@operator("OptionalHasElement", since=15, host_result=True)
def has_element(node: Node, xp: Namespace) -> Run:
    """Say whether a value is given."""
    return lambda x=None: np.asarray(x is not None)


def _place(node: Node, place: Array, count: int, last: int) -> int:
    where = int(place.item())
    if not -count <= where <= last:
        raise node.damaged(f"takes place {where} of a sequence of {count}")
    return where + count if where < 0 else where
