"""What an operation of a graph says of itself: the functions that it calls, and its values on others than its own inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tensorflow as tf


def functions_of(op: Any) -> list[str]:
    """Return the names of the functions in its attributes: the branches of a condition, the body of a loop or a call."""
    attributes = [op.node_def.attr[name] for name in op.node_def.attr]
    return [function.name for value in attributes for function in (value.func, *value.list.func) if function.name]


def input_names(op: Any) -> list[str]:
    """Return the names of its inputs, as `replay` takes them; one for each where none is a list."""
    return ["axis" if argument.name == "split_dim" else argument.name for argument in op.op_def.input_arg]


def replay(op: Any, given: Mapping[str, Any]) -> list[Any]:
    """Return the operation's outputs on these inputs, as arrays of NumPy."""
    options = {attribute.name: op.get_attr(attribute.name) for attribute in op.op_def.attr if attribute.type != "type"}
    with tf.init_scope():
        return [found.numpy() for found in tf.nest.flatten(getattr(tf.raw_ops, op.type)(**given, **options))]
