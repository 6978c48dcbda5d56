"""A `tf.Module` as a function of all its trainable variables, those of Keras layers that it holds too."""

from __future__ import annotations

import sys
from typing import Any

import tensorflow as tf
from tensorflow.python.eager.record import VariableWatcher

from mgs_core._errors import ArgumentError
from mgs_core._tree import add_named
from mgs_core._types import Array
from mgs_core.functional import FunctionalModel


def functional(module: Any) -> FunctionalModel:
    """Return a module as a functional model; its parameters go by the names of the variables, `w`, `w#2`, ….

    Args:
        module: the module. What its class says of `trainable_variables` goes; else these are all that are in its attributes, in
            lists and dicts of them, and in modules and Keras layers there.

    Returns:
        The functional model. It refuses to be traced where it reads a trainable variable that is not among its parameters, and
        where a Keras layer had no variables yet.
    """
    held = list(module._flatten(predicate=of_keras))
    unbuilt = [layer for layer in held if not getattr(layer, "built", True)]
    others = [variable for holder in held for variable in getattr(holder, "variables", [holder])]
    own = type(module).trainable_variables is not tf.Module.trainable_variables
    listed = [*module.trainable_variables, *(variable for variable in others if variable.trainable and not own)]
    names: dict[str, Array] = {}
    for variable in {id(_plain(variable)): variable for variable in listed}.values():
        # names of variables need not be unique
        add_named(names, getattr(variable, "path", variable.name.partition(":")[0]), _plain(variable))
    others = [*map(_plain, (*module.variables, *others))]

    def function(_: Any, inputs: Any) -> Array:
        with VariableWatcher() as watcher:  # sees those that are trainable
            outputs = module(inputs)
        late = [layer.name for layer in unbuilt if layer.variables]
        if late:
            raise ArgumentError(
                f"`model` must be built; got Keras layer {late[0]!r}, which had not seen a batch. Call the model on one first."
            )
        known = {id(variable.handle) for variable in (*names.values(), *others)}
        missing = [v.name for v in watcher.watched_variables() if v.dtype.is_floating and id(v.handle) not in known]
        if missing:
            raise ArgumentError(
                f"`model` must hold the variables that it reads in its attributes; got {', '.join(missing)}, which are not "
                "there. Pass mgs_core.FunctionalModel(lambda _, inputs: module(inputs), {name: variable}), with all that are "
                "trained; or let what is a constant have trainable=False."
            )
        return outputs

    return FunctionalModel(function, names)


def of_keras(leaf: Any) -> bool:
    """Say whether something is a layer or a variable of Keras."""
    keras = sys.modules.get("keras")  # who holds a layer has imported it
    return keras is not None and isinstance(leaf, (getattr(keras, "Layer", ()), getattr(keras, "Variable", ())))


def _plain(variable: Any) -> Any:
    """Return TensorFlow's own variable of one of Keras."""
    return variable if isinstance(variable, tf.Variable) else variable.value
