"""A training step of TensorFlow that knows the batch size.

Keras traces one step for batches of any size; the kernel's contraction is chosen by size, so here each size gets a trace. The
iterator is advanced outside of the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import tensorflow as tf


def make_train_function(model: Any, check: Callable[[Any], None]) -> Callable[[Iterator[Any]], Any]:
    """Return the function that the model's `fit` calls with an iterator.

    Args:
        model: a compiled Keras model.
        check: called with each batch before its step.
    """
    eager = model.run_eagerly
    step = model.train_step if eager else tf.function(model.train_step, jit_compile=model.jit_compile)
    try:
        model.run_eagerly = True  # Keras shall not trace around this step
        function = model._make_function(step)
    finally:
        model.run_eagerly = eager

    def train(iterator: Iterator[Any]) -> Any:
        first = next(iterator)
        check(model.distribute_strategy.experimental_local_results(first)[0])
        return function(chain([first], iterator))

    return train
