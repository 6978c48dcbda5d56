"""A training step of TensorFlow that knows the batch size.

Keras traces one step for batches of any size; the kernel's contraction is chosen by size, so here each size gets a trace. The
iterator is advanced outside of the trace.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import tensorflow as tf

import mgs_core as mgs

from ._keras import keras


def make_train_function(model: Any, check: Callable[[Any], None]) -> Callable[[Iterator[Any]], Any]:
    """Return the function that the model's `fit` calls with an iterator.

    Args:
        model: a compiled Keras model.
        check: called with each batch before its step.
    """
    eager = model.run_eagerly
    step = model.train_step
    if not eager:
        step = tf.function(step, jit_compile=model.jit_compile, autograph=False)  # as Keras has it; errors keep their class
        step._omit_frequent_tracing_warning = True  # a trace for each size of batch is meant
    try:
        model.run_eagerly = True  # Keras shall not trace around this step
        function = model._make_function(step)
    finally:
        model.run_eagerly = eager

    begun = False

    def train(iterator: Iterator[Any]) -> Any:
        nonlocal begun
        first = next(iterator)
        one = model.distribute_strategy.experimental_local_results(first)[0]
        # layers of a subclassed model, which may itself pass for built; within the step their variables would have no values yet
        if not begun and not all(layer.built for layer in model._flatten_layers()):
            with model.distribute_strategy.scope():
                model(keras.utils.unpack_x_y_sample_weight(one)[0])
        begun = True
        check(one)
        try:
            return function(chain([first], iterator))
        except tf.errors.InvalidArgumentError as error:
            lacking = re.search(r"unsupported operations when trying to compile .* on XLA_\w+: (\w+)", str(error), re.DOTALL)
            if lacking is None:
                raise
            raise mgs.UnsupportedModelError(
                f"`jit_compile` must be off where XLA lacks an operation that the penalty needs; got True and a {lacking[1]} of "
                "numbers for which XLA has none. Compile the model with jit_compile=False."
            ) from error
        except tf.errors.NotFoundError as error:
            if not re.search("SymbolicGradient|No gradient defined for op", str(error)):
                raise
            raise mgs.UnsupportedModelError(
                "`model` must be twice differentiable for a penalty; got an operation, such as that of the CTC loss, whose "
                'gradient TensorFlow cannot differentiate. Penalise another head than the losses, or use `weighting="agreement"`.'
            ) from error

    return train
