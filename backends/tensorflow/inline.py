"""Bring what a model hides into the open graph: variables that it reads by itself, and `tf.function`s that it calls.

The model is traced, and the operations that its outputs need are repeated in the current graph, with the caller's tensors in
place of the variables' values. Assignments are not among them, so the variables stay as they are; and graphs of the user's, which
a gradient of a loop or of a branch would rewrite, are only read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import tensorflow as tf

from mgs_core._errors import UnsupportedModelError
from mgs_core._types import Array

from .custom import with_gradient
from .flow import BRANCHES, LOOPS, branch, loop
from .operations import again, body, functions_of, needed

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_ASSIGNS = ("Assign", "ResourceScatter", "ResourceApply", "ResourceStridedSliceAssign")
#: Operations that read a variable, and what each is for the value.
_READS: dict[str, Callable[..., Array]] = {
    "ReadVariableOp": lambda op, value: tf.identity(value),
    "ResourceGather": lambda op, value, indices: tf.gather(value, indices, batch_dims=op.get_attr("batch_dims")),
    "ResourceGatherNd": lambda op, value, indices: tf.gather_nd(value, indices),
    "VariableShape": lambda op, value: tf.shape(value, out_type=op.get_attr("out_type")),
}
#: A tensor of a traced graph.
_Key: TypeAlias = tuple[Any, str]


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
        UnsupportedModelError: when a variable is read by an operation that no value can stand in for.
    """
    variables = {name: value for name, value in given.items() if isinstance(value, tf.Variable)}
    if not variables:
        graph = tf.compat.v1.get_default_graph()
        start = len(graph.get_operations())
        outputs = function(dict(parameters), inputs)
        if not _calls(graph.get_operations()[start:]):
            return outputs

    def traced(tensors: dict[str, Array], inputs: Any) -> Array:
        return function({**tensors, **variables}, inputs)

    tensors = {name: value for name, value in parameters.items() if name not in variables}
    concrete = tf.function(traced, autograph=False).get_concrete_function(tensors, inputs)
    flat = [leaf for leaf in tf.nest.flatten((tensors, inputs)) if leaf is not None]
    captures = concrete.graph.captures
    placeholders = [*concrete.inputs[: len(flat)], *(internal for _, internal in captures)]
    held = {id(value.handle): parameters[name] for name, value in variables.items()}
    scope = _Scope({}, held).inside(placeholders, [*flat, *(external for external, _ in captures)])
    return scope.repeat(concrete.outputs)[0]


def _calls(ops: list[Any]) -> bool:
    """Say whether there is a call of a function among the operations, or in the loops and branches among them."""
    return any(op.type in _CALLS or any(_calls(body(op, name).get_operations()) for name in functions_of(op)) for op in ops)


@dataclass(frozen=True, eq=False)
class _Scope:
    """Hold what tensors of traced graphs are in the graphs that are being built.

    Attributes:
        values: by graph and name.
        held: the values to read of variables, by the identity of the handle.
    """

    values: dict[_Key, Array]
    held: Mapping[int, Array]

    def inside(self, placeholders: list[Array], values: list[Array]) -> _Scope:
        """Return the scope of a function's graph that is called with these values.

        Args:
            placeholders: the graph's inputs.
            values: what they are.
        """
        given = {_key(tensor): value for tensor, value in zip(placeholders, values, strict=True)}
        return _Scope({**self.values, **given}, self.held)

    def repeat(self, wanted: list[Array]) -> list[Array]:
        """Repeat the operations that tensors of one traced graph need, in the current graph.

        Args:
            wanted: the tensors.

        Returns:
            What they are here.
        """
        ops = needed(wanted, lambda tensor: _key(tensor) in self.values)
        used = {tensor.name for tensor in (*wanted, *(tensor for op in ops for tensor in op.inputs))}
        for op in ops:
            _refuse_assigned(op)
            inputs = [self.values[_key(tensor)] for tensor in op.inputs]
            outputs = [tensor for tensor in op.outputs if tensor.name in used]
            for tensor, value in zip(outputs, self._again(op, inputs, outputs), strict=True):
                self.values[_key(tensor)] = value
        return [self.values[_key(tensor)] for tensor in wanted]

    def value(self, tensor: Array) -> Array:
        """Return what a tensor that a function holds from outside is here.

        Args:
            tensor: eager, or of a traced graph, or of one that is being built.
        """
        graph: Any = tf.compat.v1.get_default_graph()
        while graph is not None and tf.is_symbolic_tensor(tensor):
            if graph is tensor.graph:
                return tensor
            graph = getattr(graph, "outer_graph", None)
        if not tf.is_symbolic_tensor(tensor):
            return tensor
        return _Scope({**self.values}, self.held).repeat([tensor])[0]  # what is made now is not of the graph of the others

    def _again(self, op: Any, inputs: list[Array], outputs: list[Array]) -> list[Array]:
        """Return those of an operation's outputs on other inputs."""
        read = [self.held.get(id(value)) for value in inputs]
        places = [place for place, tensor in enumerate(op.outputs) if any(tensor is output for output in outputs)]
        if op.type in _READS and read[0] is not None:
            return [_READS[op.type](op, read[0], *inputs[1:])]
        if op.type in _CALLS:
            graph = body(op, op.get_attr("f").name)
            # a gradient that was taken of the function before has added outputs to its graph, behind those of the call
            return self.inside(graph.inputs, inputs).repeat([graph.outputs[place] for place in places])
        if op.type in LOOPS:
            return _shaped(loop(op, inputs, places, self), outputs)
        if op.type in BRANCHES:
            return _shaped(branch(op, inputs, places, self), outputs)
        if op.type == "Placeholder":
            raise UnsupportedModelError(
                f"`model` must have custom gradients of what their functions were given; got one that holds {op.name!r} of "
                "another graph. Pass it in; save a model with tf.saved_model.SaveOptions(experimental_custom_gradients=True)."
            )
        if any(value is not None for value in read):
            raise UnsupportedModelError(
                f"`model` must read its variables as tensors; operation {op.name!r} ({op.type}) takes one otherwise. "
                "Pass the parameters in: mgs_core.FunctionalModel(function, parameters) with tensors."
            )
        found = with_gradient(op, inputs, self) if "_gradient_op_type" in op.node_def.attr else again(op, inputs)
        return _shaped([found[place] for place in places], outputs)


def _refuse_assigned(op: Any) -> None:
    """Refuse to read a variable after an assignment in the model, which is not repeated."""
    before = op.control_inputs if op.type not in LOOPS else [*op.control_inputs, op]  # of which a loop's next step reads
    assigned = set().union(*map(_written, before))
    if assigned and _read(op) & assigned:
        raise UnsupportedModelError(
            f"`model` must not read a variable that it has assigned before; operation {op.name!r} ({op.type}) does. "
            "Assign outside of the model, or go on with the value itself, which was assigned."
        )


def _written(op: Any) -> set[str]:
    """Return the names of the handles that an operation assigns to, or a function that it calls."""
    if op.type.startswith(_ASSIGNS):
        return {tensor.name for tensor in op.inputs if tensor.dtype == tf.resource}
    return _through(op, lambda graph: graph.get_operations(), _written)


def _read(op: Any) -> set[str]:
    """Return the names of the handles that an operation reads, or a function that it calls for its outputs."""
    if op.type in _READS:
        return {op.inputs[0].name}
    return _through(op, lambda graph: needed(graph.outputs, lambda tensor: False), _read)


def _through(op: Any, operations: Callable[[Any], list[Any]], names: Callable[[Any], set[str]]) -> set[str]:
    """Return what operations of the functions that are called name, by the handles that are given to them."""
    found: set[str] = set()
    for function in functions_of(op) if any(tensor.dtype == tf.resource for tensor in op.inputs) else ():
        graph = body(op, function)
        inside = set().union(*map(names, operations(graph)))
        given = op.inputs[len(op.inputs) - len(graph.inputs) :]  # behind what chooses a branch
        found |= {value.name for tensor, value in zip(graph.inputs, given, strict=True) if tensor.name in inside}
    return found


def _key(tensor: Array) -> _Key:
    return tensor.graph, tensor.name


def _shaped(values: list[Array], like: list[Array]) -> list[Array]:
    """Return new tensors with what was known of the shapes of those that they repeat."""
    for value, tensor in zip(values, like, strict=True):
        value.set_shape(tensor.shape)
    return values
