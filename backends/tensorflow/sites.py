"""Bring each place where a parameter meets data into the layout of the layer statistics.

One rule for each operation says what it needs: the layer's input, and how to arrange the gradient at the operation's output to
(groups, *lead, features). The samples are somewhere among the lead axes; `mgs_core._layout` finds out where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from mgs_core._types import Array

from . import convolutions


@dataclass(frozen=True, eq=False)
class Site:
    """Hold one place where a weight, a parameter or a rearranged one, meets data.

    Attributes:
        kind: which layer statistics it has.
        arrange: takes the gradient at the output to (groups, *lead, o).
        inputs: the layer's input: outer (groups, *lead, i); scale (1, *lead, o); lookup (1, *lead), integers; sum None.
        order: takes an array of the weight's shape to the order (g, i, o); None when that is its own.
        size: rows of a table.
    """

    kind: Literal["outer", "sum", "scale", "lookup"]
    arrange: Callable[[Array], Array]
    inputs: Array = None
    order: Callable[[Any], Any] | None = None
    size: int = 0


def find_site(op: Any, position: int) -> Site | None:
    """Return the site of the weight that is the operation's input at this position, or None when no rule knows it.

    Args:
        op: a graph operation.
        position: which of its inputs is the weight.
    """
    if op.type not in _RULES or not all(tensor.shape.is_fully_defined() for tensor in (*op.inputs, *op.outputs)):
        return None
    return _RULES[op.type](op, position)


def _contraction(op: Any, position: int, labels: tuple[str, str], out: str) -> Site | None:
    """Treat a product of two tensors with named axes, as in einsum."""
    weight, data = labels[position], labels[1 - position]
    if any(len(set(names)) < len(names) for names in (weight, data, out)) or set(weight) - set(data) - set(out):
        return None
    shared = [a for a in weight if a in data and a in out]
    summed = [a for a in weight if a in data and a not in out]
    own = [a for a in weight if a not in data]
    lead = [a for a in out if a not in weight]
    length = dict(zip(out, op.outputs[0].shape, strict=True)) | dict(zip(weight, op.inputs[position].shape, strict=True))
    groups = prod(length[a] for a in shared)

    def arranged(array: Array, names: str, last: list[str]) -> Array:
        array = tf.transpose(array, [names.index(a) for a in (*shared, *lead, *last)])
        return tf.reshape(array, (groups, *(length[a] for a in lead), prod(length[a] for a in last)))

    inputs = op.inputs[1 - position]
    alone = [data.index(a) for a in data if a not in weight and a not in out]
    if set(lead) - set(data):
        return None  # the weight is repeated over an axis without data
    if alone:
        inputs = tf.reduce_sum(inputs, axis=alone)
        data = "".join(a for a in data if a in weight or a in out)
    axes = [weight.index(a) for a in (*shared, *summed, *own)]
    return Site(
        "outer",
        lambda gradient: arranged(gradient, out, own),
        arranged(inputs, data, summed),
        None if axes == sorted(axes) else lambda array: np.transpose(array, axes),
    )


def _matmul(op: Any, position: int) -> Site | None:
    left = "ia" if op.get_attr("transpose_a") else "ai"
    right = "bi" if op.get_attr("transpose_b") else "ib"
    return _contraction(op, position, (left, right), "ab")


def _batch_matmul(op: Any, position: int) -> Site | None:
    rank = op.outputs[0].shape.rank
    batch = "".join(chr(ord("A") + axis) for axis in range(rank - 2))
    shapes = [tensor.shape for tensor in op.inputs]
    labels = []
    for number, shape in enumerate(shapes):
        names = batch[len(batch) - (shape.rank - 2) :]
        if any(length != full for length, full in zip(shape[:-2], op.outputs[0].shape[rank - shape.rank : -2], strict=True)):
            return None  # broadcasting of axes of length 1
        adjoint = op.get_attr("adj_y" if number else "adj_x")
        matrix = ("bi" if adjoint else "ib") if number else ("ia" if adjoint else "ai")
        labels.append(names + matrix)
    return _contraction(op, position, (labels[0], labels[1]), batch + "ab")


def _einsum(op: Any, position: int) -> Site | None:
    equation = op.get_attr("equation").decode().replace(" ", "")
    operands, _, out = equation.partition("->")
    labels = operands.split(",")
    if "." in equation or len(labels) != 2:
        return None
    return _contraction(op, position, (labels[0], labels[1]), out)


def _elementwise(kind: Literal["sum", "scale"], factor: Callable[[Any, int], Array]) -> Callable[[Any, int], Site | None]:
    """Make the rule of an operation with `∂output/∂weight = factor`, elementwise with broadcasting."""

    def rule(op: Any, position: int) -> Site | None:
        out, shape = tuple(op.outputs[0].shape), tuple(op.inputs[position].shape)
        channels_first = op.type == "BiasAdd" and op.get_attr("data_format") == b"NCHW"
        tail = (1,) * (len(out) - 2) if channels_first else ()
        aligned = (1,) * (len(out) - len(shape) - len(tail)) + shape + tail
        own = [axis for axis, length in enumerate(aligned) if length > 1]
        if any(out[axis] != aligned[axis] for axis in own):
            return None
        lead_axes = [axis for axis, length in enumerate(aligned) if length == 1]
        lead, size = [out[axis] for axis in lead_axes], prod(shape)

        def arrange(array: Array) -> Array:
            return tf.reshape(tf.transpose(array, [*lead_axes, *own]), (1, *lead, size))

        multiplier = factor(op, position)
        if kind == "scale":
            return Site("scale", arrange, arrange(tf.broadcast_to(multiplier, out)))
        return Site("sum", arrange if multiplier is None else lambda gradient: arrange(gradient * multiplier))

    return rule


def _lookup(op: Any, position: int) -> Site | None:
    table, indices = op.inputs[:2]
    if position != 0 or op.get_attr("batch_dims") != 0 or tf.get_static_value(op.inputs[2]) != 0:
        return None
    size, width = table.shape[0], prod(table.shape[1:])
    return Site("lookup", lambda d: tf.reshape(d, (1, *indices.shape, width)), tf.expand_dims(indices, 0), size=size)


def _convolution(op: Any, position: int) -> Site | None:
    if position != 1:
        return None
    found = convolutions.transposed(op) if "BackpropInput" in op.type else convolutions.forward(op)
    return None if found is None else Site("outer", *found)


def _other(op: Any, position: int) -> Array:
    return op.inputs[1 - position]


def _quotient(op: Any, position: int) -> Array:
    above, below = op.inputs
    return 1.0 / below if position == 0 else -above / below**2


_PLAIN = _elementwise("sum", lambda op, position: None)
_RULES: Mapping[str, Callable[[Any, int], Site | None]] = {
    "MatMul": _matmul,
    **dict.fromkeys(("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), _batch_matmul),
    "Einsum": _einsum,
    **dict.fromkeys(("Add", "AddV2", "BiasAdd", "BroadcastTo", "Tile"), _PLAIN),
    "Sub": _elementwise("sum", lambda op, position: None if position == 0 else tf.constant(-1.0, op.outputs[0].dtype)),
    "Mul": _elementwise("scale", _other),
    "RealDiv": _elementwise("sum", _quotient),
    "GatherV2": _lookup,
    **dict.fromkeys(("Conv2D", "Conv3D", "DepthwiseConv2dNative"), _convolution),
    **dict.fromkeys(("Conv2DBackpropInput", "Conv3DBackpropInputV2"), _convolution),
}
