"""Gradients in the current graph, in which what is known of shapes and axes are constants.

TensorFlow's gradients compute from constants which axes a broadcast is summed over, and how a transposition is undone. XLA must
know that before it compiles, and cannot find it out in the second derivative of a loop.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from mgs_core._types import Array

from .operations import input_names, replay

#: Operations of gradients from shapes or axes to axes.
_OF_SHAPES = {"BroadcastGradientArgs", "InvertPermutation"}


def gradients(scalars: Array, seed: Array, tensors: list[Array]) -> list[Array]:
    """Return the gradients of `Σ seed · scalars` at the tensors, None where nothing depends on one."""
    start = len(scalars.graph.get_operations())
    found = tf.gradients(scalars, tensors, grad_ys=seed) if tensors else []
    _settle(scalars.graph.get_operations()[start:])
    return [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in found]


def _settle(ops: list[Any]) -> None:
    """Make constants of what gradients find out about shapes and axes, for XLA must know it, in loops too."""
    for op in ops:
        values = _evaluated(op) if op.type in _OF_SHAPES else None
        for output, value in zip(op.outputs, values or (), strict=False):
            constant = tf.constant(value, output.dtype)  # where NumPy's int64 would do, its operation gives int32
            for reader in output.consumers():
                for place in [place for place, tensor in enumerate(reader.inputs) if tensor.name == output.name]:
                    reader._update_input(place, constant)


def _evaluated(op: Any) -> list[Any] | None:
    """Return the values of an operation's outputs where they follow from shapes."""
    given = {}
    for name, tensor in zip(input_names(op), op.inputs, strict=True):
        value = tf.get_static_value(tensor)
        if value is None and tensor.op.type == "StridedSlice":
            (value,) = _evaluated(tensor.op) or (None,)
        if value is None:
            return None
        given[name] = value
    return replay(op, given)
