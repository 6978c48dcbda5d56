"""A part of a computation as a function of its own, whose gradient is right whatever a tape outside has seen.

TensorFlow's own gradient of a call takes what it needs out of the call, and axes and sizes are among that. XLA, which must know
those before it compiles, then wants to know all that goes into the call, and compiles again for each batch. So within a graph the
gradient builds the part again, where it needs nothing but the call's inputs; what is then there twice is merged, by XLA and by
TensorFlow's own optimiser. Outside of a graph, or where a second evaluation would give other values, TensorFlow's own serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from mgs_core._types import Array

from .operations import functions_of

#: Operations with a state, or an effect, whose values are the same each time.
_SAME = {"Assert", "ReadVariableOp", "ResourceGather", "ResourceGatherNd"}


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of tensors as a graph of its own.

    Args:
        function: builds the graph; it is traced twice where there is a graph outside.
        arguments: trees of tensors.

    Returns:
        What it returns, connected to the arguments and to what the function holds of the graph outside.
    """
    concrete = tf.function(function, autograph=False).get_concrete_function(*arguments)  # a plain call would warn of retracing
    if tf.executing_eagerly() or _draws(concrete.graph):
        return concrete(*arguments)
    held = [external for external, _ in concrete.graph.captures if external.dtype.is_floating]
    outside: Any = tf.compat.v1.get_default_graph()

    def call(*connected: Array) -> Any:
        def gradient(*upstream: Array, variables: Any = ()) -> Any:
            def pulled(arguments: Any, upstream: list[Array]) -> list[Array]:
                ys = tf.nest.flatten(function(*arguments))
                inside = {id(external): internal for external, internal in tf.compat.v1.get_default_graph().captures}
                xs = [*_floating(arguments), *(inside[id(external)] for external in held), *variables]
                dys = [dy for y, dy in zip(ys, upstream, strict=True) if y.dtype.is_floating]
                found = tf.gradients(_floating(ys), xs, dys)
                return [tf.zeros_like(x) if g is None else tf.convert_to_tensor(g) for x, g in zip(xs, found, strict=True)]

            given = (arguments, [*map(tf.convert_to_tensor, upstream)])
            again = tf.function(pulled, autograph=False).get_concrete_function(*given)
            again.set_external_captures(_within(outside, again.captured_inputs))
            found = again(*given)
            return (found[: len(connected)], found[len(connected) :]) if variables else found

        return tf.nest.flatten(concrete(*arguments)), gradient

    connected = tf.custom_gradient(call)(*_floating(arguments), *held)
    return tf.nest.pack_sequence_as(concrete.structured_outputs, connected)


def _floating(tree: Any) -> list[Array]:
    return [leaf for leaf in tf.nest.flatten(tree) if leaf is not None and leaf.dtype.is_floating]


def _within(graph: Any, external: list[Array]) -> list[Array]:
    """Return a branch's or a loop's own tensors for those outside that it holds.

    TensorFlow differentiates a branch only where its gradient holds no others that are in no graph.
    """
    if not any(kind.__name__ == "ControlFlowFuncGraph" for kind in type(graph).__mro__):
        return external
    own = _held(graph)
    return [own.get(id(tensor), tensor) for tensor in external]


def _held(graph: Any) -> dict[int, Array]:
    """Return a graph's own tensors for those of all graphs around it, and of none, by the identity of these."""
    own = {id(external): internal for external, internal in getattr(graph, "captures", ())}
    around = _held(graph.outer_graph) if own else {}
    return {**{key: own[id(tensor)] for key, tensor in around.items() if id(tensor) in own}, **own}


def _draws(graph: Any) -> bool:
    """Return whether a second evaluation may give other values, as that of random numbers does."""
    for op in graph.get_operations():
        if op.op_def.is_stateful and op.type not in _SAME:
            bodies = [graph._get_function(name).graph for name in functions_of(op)]
            if not bodies or any(map(_draws, bodies)):
                return True
    return False
