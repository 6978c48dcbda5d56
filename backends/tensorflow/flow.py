"""Loops and branches of a traced graph, built anew: functions of their own, which a gradient may rewrite."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from mgs_core._types import Array

from .operations import Scope, body, constant, needed

LOOPS = ("While", "StatelessWhile")
BRANCHES = ("If", "StatelessIf", "Case", "StatelessCase")


def branch(op: Any, inputs: list[Array], places: list[int], scope: Scope) -> list[Array]:
    """Return outputs of a condition on other inputs.

    Args:
        op: the operation.
        inputs: what its inputs are here.
        places: numbers of the outputs that are wanted.
        scope: what other tensors are here.
    """
    chosen, *given = inputs

    def chosen_one(name: str) -> Any:
        graph = body(op, name)
        return lambda: scope.inside(graph.inputs, given).repeat([graph.outputs[place] for place in places])

    if "Case" in op.type:
        functions = [chosen_one(function.name) for function in op.get_attr("branches")]
        found: list[Array] = tf.switch_case(chosen, functions)
    else:
        functions = [chosen_one(op.get_attr(name).name) for name in ("then_branch", "else_branch")]
        found = tf.cond(tf.cast(chosen, tf.bool), *functions)
    return found


def loop(op: Any, inputs: list[Array], places: list[int], scope: Scope) -> list[Array]:
    """Return outputs of a loop on other inputs.

    Variables of the loop that stay as they are become tensors that the loop holds; those that nothing needs, as the intermediate
    values that an earlier gradient asked for, are left out.

    Args:
        op: the operation.
        inputs: what its inputs are here.
        places: numbers of the outputs that are wanted.
        scope: what other tensors are here.
    """
    condition, step = (body(op, op.get_attr(name).name) for name in ("cond", "body"))
    stay = {place for place, output in enumerate(step.outputs) if _origin(output) is step.inputs[place]}
    wanted = {*places, *_reached(condition, condition.outputs)}
    while more := _reached(step, [step.outputs[place] for place in wanted]) - wanted:
        wanted |= more
    moving = sorted(wanted - stay)

    def within(graph: Any, variables: tuple[Array, ...]) -> Scope:
        now = {**dict(enumerate(inputs)), **dict(zip(moving, variables, strict=True))}
        return scope.inside(graph.inputs, [now[place] for place in range(len(inputs))])

    limit = constant(op.inputs[1]) if "_num_original_outputs" in op.node_def.attr else None
    declared = [tf.TensorShape(shape) for shape in op.get_attr("output_shapes")] or [tf.TensorShape(None)] * len(inputs)
    # what was not known when it was traced may be known now
    known = [inputs[place].shape if str(declared[place]) == str(op.inputs[place].shape) else declared[place] for place in moving]

    def built(shapes: list[Any]) -> list[Array]:
        found: list[Array] = tf.while_loop(
            lambda *variables: within(condition, variables).repeat(condition.outputs)[0],
            lambda *variables: within(step, variables).repeat([step.outputs[place] for place in moving]),
            [inputs[place] for place in moving],
            shape_invariants=shapes,
            parallel_iterations=op.get_attr("parallel_iterations"),
            maximum_iterations=None if limit is None or limit < 0 else limit,
        )
        return found

    try:
        found = built(known)
    except ValueError:  # a size that was not known changes from step to step
        found = built([declared[place] for place in moving])
    values = {**dict(enumerate(inputs)), **dict(zip(moving, found, strict=True))}
    return [values[place] for place in places]


def _origin(tensor: Array) -> Array:
    while tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
    return tensor


def _reached(graph: Any, outputs: list[Array]) -> set[int]:
    """Return the numbers of the inputs that the outputs depend on."""
    names = {op.name for op in needed(outputs, lambda tensor: False)}
    return {place for place, tensor in enumerate(graph.inputs) if tensor.op.name in names}
