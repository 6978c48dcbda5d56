"""Bring what a model hides into the open graph: variables that it reads by itself, and `tf.function`s that it calls.

The model is traced, and the operations that its outputs need are repeated in the current graph, with the caller's tensors in
place of the variables' values. Assignments are not among them, so the variables stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from mgs_core._errors import UnsupportedModelError
from mgs_core._types import Array

from .operations import functions_of

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
#: Operations that read a variable, and what each is for the value.
_READS: dict[str, Callable[..., Array]] = {
    "ReadVariableOp": tf.identity,
    "ResourceGather": tf.gather,
    "ResourceGatherNd": tf.gather_nd,
}


def call(function: Callable[[dict[str, Array], Any], Array], parameters: Mapping[str, Array], given: Any, inputs: Any) -> Array:
    """Call a function of parameters in the current graph, so that each use of a parameter is an operation of that graph.

    Args:
        function: `(parameters by name, inputs) → outputs`; it may read the variables in `given` by itself instead.
        parameters: tensors of the current graph by name.
        given: what the user passed as parameters, by the same names; some may be variables.
        inputs: the batch.

    Returns:
        The outputs.

    Raises:
        UnsupportedModelError: when a variable is read within control flow, or there is a custom gradient, which refers to the
            graph that it was traced in.
    """
    variables = {name: value for name, value in given.items() if isinstance(value, tf.Variable)}
    handles = {id(value.handle): parameters[name] for name, value in variables.items()}
    if not variables:
        graph = tf.compat.v1.get_default_graph()
        start = len(graph.get_operations())
        outputs = function(dict(parameters), inputs)
        new = graph.get_operations()[start:]
        if not any(op.type in _CALLS for op in new) or any("_gradient_op_type" in op.node_def.attr for op in new):
            return outputs

    def traced(tensors: dict[str, Array], inputs: Any) -> Array:
        return function({**tensors, **variables}, inputs)

    tensors = {name: value for name, value in parameters.items() if name not in variables}
    concrete = tf.function(traced, autograph=False).get_concrete_function(tensors, inputs)
    flat = [leaf for leaf in tf.nest.flatten((tensors, inputs)) if leaf is not None]
    values = dict(zip((tensor.name for tensor in concrete.inputs), flat, strict=False))
    held = {}
    for external, internal in concrete.graph.captures:
        held[internal.name] = handles.get(id(external))
        values[internal.name] = external
    return _repeat(concrete.graph, values, held, concrete.outputs)[0]


def _repeat(graph: Any, values: dict[str, Array], held: Mapping[str, Array | None], wanted: list[Array]) -> list[Array]:
    """Repeat the operations of a traced graph that the wanted tensors need.

    `values` holds tensors by name that need no operation; `held`, for the handles of variables, the values to read.
    """
    needed, pending = set(), [tensor.op for tensor in wanted]
    while pending:
        op = pending.pop()
        if op.name not in needed:
            needed.add(op.name)
            pending += [tensor.op for tensor in op.inputs if tensor.name not in values]
    here = tf.compat.v1.get_default_graph()
    for op in graph.get_operations():
        if op.name not in needed or all(tensor.name in values for tensor in op.outputs):
            continue
        read = [held.get(tensor.name) for tensor in op.inputs]
        inputs = [values[tensor.name] for tensor in op.inputs]
        if op.type in _READS and read[0] is not None:
            found = [_READS[op.type](read[0], *inputs[1:])]
        elif op.type in _CALLS:
            body = graph._get_function(op.get_attr("f").name).graph
            inside = dict(zip((tensor.name for tensor in body.inputs), inputs, strict=True))
            variables = dict(zip((tensor.name for tensor in body.inputs), read, strict=True))
            # a gradient that was taken of the function before has added outputs to its graph, behind those of the call
            found = _repeat(body, inside, variables, body.outputs[: len(op.outputs)])
        elif any(value is not None for value in read):
            raise UnsupportedModelError(
                f"`model` must read its variables outside of control flow; operation {op.name!r} ({op.type}) reads one within. "
                "Read it before the loop and pass its value in, or unroll the loop."
            )
        else:
            attributes = {name: op.node_def.attr[name] for name in op.node_def.attr}
            if "_gradient_op_type" in attributes:
                raise UnsupportedModelError(
                    f"`model` must have no custom gradient where it reads variables by itself; got one at {op.name!r}. "
                    "Pass the parameters in: mgs_core.FunctionalModel(function, parameters) with tensors."
                )
            for name in functions_of(op):
                here._add_function_recursive(graph._get_function(name))
            dtypes = [tensor.dtype for tensor in op.outputs]
            found = here.create_op(
                op.type, inputs, dtypes, attrs=attributes, op_def=op.op_def, name=op.name.split("/")[-1]
            ).outputs
        values.update((tensor.name, value) for tensor, value in zip(op.outputs, found, strict=True))
    return [values[tensor.name] for tensor in wanted]
