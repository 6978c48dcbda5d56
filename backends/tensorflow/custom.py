"""Operations with a gradient of their own, as of `tf.custom_gradient`, in another graph than they were traced in."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from tensorflow.python.framework.ops import gradient_registry

from mgs_core._errors import UnsupportedModelError
from mgs_core._types import Array

from .operations import Scope, again


def with_gradient(op: Any, inputs: list[Array], scope: Scope) -> list[Array]:
    """Return an operation's outputs on other inputs, with its own gradient.

    The gradient refers to tensors of the graph that the operation was traced in. So it is traced in turn, and repeated where it
    is asked for with what those tensors are there.

    Args:
        op: the operation.
        inputs: what its inputs are here.
        scope: what other tensors are here.

    Returns:
        The outputs.

    Raises:
        UnsupportedModelError: when the gradient is not known, as of a saved model without it.
    """
    try:
        function = gradient_registry.lookup(op.get_attr("_gradient_op_type").decode())
    except LookupError as error:
        raise UnsupportedModelError(
            f"`model` must know the gradients of its operations; got none of {op.name!r}. "
            "Register it with tf.RegisterGradient; save a model with "
            "tf.saved_model.SaveOptions(experimental_custom_gradients=True)."
        ) from error

    def gradient(*upstream: Array) -> list[Array]:
        present = [place for place, value in enumerate(upstream) if value is not None]
        places: list[int] = []

        def traced(*values: Array) -> list[Array]:
            given = dict(zip(present, values, strict=True))
            found = function(op, *(given.get(place) for place in range(len(upstream))))
            found = list(found) if isinstance(found, (list, tuple)) else [found]
            places[:] = [place for place, value in enumerate(found) if value is not None]
            return [tf.convert_to_tensor(found[place]) for place in places]

        values = [tf.convert_to_tensor(upstream[place]) for place in present]
        specs = [tf.TensorSpec(value.shape, value.dtype) for value in values]
        graph = tf.function(traced, autograph=False).get_concrete_function(*specs).graph
        held = [scope.value(external) for external, _ in graph.captures]
        inside = scope.inside(graph.inputs, [*values, *held])
        found = dict(zip(places, inside.repeat(graph.outputs), strict=True))
        return [found.get(place) for place in range(len(inputs))]

    outputs = again(op, list(inputs))
    # what tf.custom_gradient would register by a name is kept for ever, with all graphs that it refers to
    outputs[0].op._gradient_function = lambda _, *upstream: gradient(*upstream)
    return outputs
