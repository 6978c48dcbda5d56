"""What an operation of a graph says of itself: the functions that it calls, what it needs, and its values on other inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import tensorflow as tf
from tensorflow.python.framework.function_def_to_graph import function_def_to_graph

from mgs_core._types import Array


@runtime_checkable
class Scope(Protocol):
    """Say what tensors of traced graphs are in the graphs that are being built."""

    def inside(self, placeholders: list[Array], values: list[Array]) -> Scope:
        """Return the scope of a function's graph whose inputs have these values."""
        ...

    def repeat(self, wanted: list[Array]) -> list[Array]:
        """Repeat in the current graph what tensors of one traced graph need, and return what they are here."""
        ...

    def value(self, tensor: Array) -> Array:
        """Return what a tensor is here that a function holds from outside: eager, or of a traced or a current graph."""
        ...


def functions_of(op: Any) -> list[str]:
    """Return the names of the functions in its attributes: the branches of a condition, the body of a loop or a call."""
    attributes = [op.node_def.attr[name] for name in op.node_def.attr]
    return [function.name for value in attributes for function in (value.func, *value.list.func) if function.name]


def body(op: Any, name: str) -> Any:
    """Return the graph of a function that an operation calls.

    Args:
        op: the operation.
        name: of the function.

    Raises:
        KeyError: when there is none.
    """
    graph = op.graph
    while graph is not None:
        function = graph._get_function(name)
        if function is not None:
            found = getattr(function, "graph", None)
            return function_def_to_graph(function.cached_definition) if found is None else found
        graph = getattr(graph, "outer_graph", None)
    raise KeyError(name)


def needed(wanted: list[Array], known: Callable[[Array], bool]) -> list[Any]:
    """Return the operations that tensors depend on, each behind those that it needs itself.

    Their own order will not do: a gradient of a loop gives it inputs that were made after it.

    Args:
        wanted: tensors of one graph.
        known: says of a tensor that it needs no operation.
    """
    order, seen = [], set()
    pending = [(tensor.op, False) for tensor in wanted if not known(tensor)]
    while pending:
        op, ready = pending.pop()
        if ready:
            order.append(op)
        elif op.name not in seen:
            seen.add(op.name)
            pending += [(op, True), *((tensor.op, False) for tensor in op.inputs if not known(tensor))]
    return order


def again(op: Any, inputs: list[Array]) -> list[Array]:
    """Repeat an operation in the current graph, with the gradient that its type has.

    Args:
        op: the operation.
        inputs: for its inputs.
    """
    here: Any = tf.compat.v1.get_default_graph()
    # another place, and a gradient of its own, would refer to what is not in this graph
    attributes = {name: op.node_def.attr[name] for name in op.node_def.attr if name not in ("_class", "_gradient_op_type")}
    for name in functions_of(op):
        here._add_function_recursive(op.graph._get_function(name))
    dtypes = [tensor.dtype for tensor in op.outputs]
    made = here.create_op(op.type, inputs, dtypes, attrs=attributes, op_def=op.op_def, name=op.name.split("/")[-1])
    return list(made.outputs)


def input_names(op: Any) -> list[str]:
    """Return the names of its inputs, as `replay` takes them; one for each where none is a list."""
    return ["axis" if argument.name == "split_dim" else argument.name for argument in op.op_def.input_arg]


def constant(tensor: Array) -> Any:
    """Return the value of a tensor of a traced graph that is made of constants alone; None for others."""
    values: dict[str, Any] = {}
    for op in needed([tensor], lambda known: tf.get_static_value(known) is not None):
        if op.op_def.is_stateful or op.type == "Placeholder" or functions_of(op) or len(op.op_def.input_arg) != len(op.inputs):
            return None
        given = [values[read.name] if read.name in values else tf.get_static_value(read) for read in op.inputs]
        if op.type == "Cast":
            found = [given[0].astype(op.outputs[0].dtype.as_numpy_dtype)]
        else:
            found = replay(op, dict(zip(input_names(op), given, strict=True)))
        values.update(zip((output.name for output in op.outputs), found, strict=True))
    return values.get(tensor.name, tf.get_static_value(tensor))


def replay(op: Any, given: Mapping[str, Any]) -> list[Any]:
    """Return the operation's outputs on these inputs, as arrays of NumPy."""
    options = {attribute.name: op.get_attr(attribute.name) for attribute in op.op_def.attr if attribute.type != "type"}
    with tf.init_scope():
        return [found.numpy() for found in tf.nest.flatten(getattr(tf.raw_ops, op.type)(**given, **options))]
