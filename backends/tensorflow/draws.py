"""Values for tensors that have none, because the caller is being traced."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import tensorflow as tf

from mgs_core._types import Array


class Draw:
    """Draw values: random ones, and others where a model is not defined for these.

    Args:
        given: a tree `(parameters, inputs, targets)` of tensors, some of which may have values.
    """

    def __init__(self, given: Any) -> None:
        self._given = given
        self._leaves = tf.nest.flatten(given)
        sizes = [len(tf.nest.flatten(part)) for part in given]
        self._parts = np.repeat(["parameters", "inputs", "targets"], sizes)
        with tf.init_scope():
            self._known = [
                None if leaf is None or tf.is_symbolic_tensor(leaf) else tf.convert_to_tensor(leaf) for leaf in self._leaves
            ]
        self._positive: tuple[str, ...] = ()
        whole = [
            place
            for place, (leaf, part) in enumerate(zip(self._leaves, self._parts, strict=True))
            if part == "inputs" and leaf is not None and leaf.dtype.is_integer
        ]
        #: Which integer inputs are drawn from 1 on, as lengths are: none, all, or one of them; the last is the choice now.
        self._choices = [*([[place] for place in whole] if len(whole) > 1 else []), *([whole] if whole else []), []]

    def raise_(self) -> bool:
        """Draw positive inputs from now on, then positive parameters too, as a logarithm needs; return whether that is new."""
        before = len(self._positive)
        self._positive = ("inputs", "parameters")[: before + 1]
        return len(self._positive) > before

    def shift(self) -> bool:
        """Draw integer inputs from 1 on instead of from 0 on, as lengths are; return whether that is new, and there are some."""
        new = not self._choices[-1] and len(self._choices) > 1
        if new:
            self._choices.pop()
        return new

    def choose(self) -> None:
        """Draw others of the integer inputs from 1 on, where the model has no values for these."""
        self._choices = self._choices[:-1] or self._choices

    def own(self, values: Any) -> bool:
        """Say whether none of the values was drawn.

        Args:
            values: a tree of them.
        """
        return all(map(operator.is_, tf.nest.flatten(values), self._known))

    def values(self, attempt: int) -> tuple[Any, bool]:
        """Return values for the tensors, and whether all are their own.

        Args:
            attempt: in the first they have their own as far as they have some; then all are drawn.
        """
        random = np.random.default_rng(attempt)
        with tf.init_scope():
            values = [
                self._drawn(leaf, random, attempt, place) if value is None or attempt else value
                for place, (leaf, value) in enumerate(zip(self._leaves, self._known, strict=True))
            ]
        packed = tf.nest.pack_sequence_as(self._given, values)
        return packed, self.own(packed)

    def _drawn(self, leaf: Array, random: np.random.Generator, attempt: int, place: int) -> Array:
        if leaf is None:
            return None
        part, least = self._parts[place], int(place in self._choices[-1])
        shape, floating = tuple(leaf.shape), leaf.dtype.is_floating
        if leaf.dtype == tf.string:
            return tf.zeros(shape, leaf.dtype)  # empty texts
        if part == "targets":  # floating ones too may be labels; as probabilities, zeros would leave no loss
            if attempt % 2 == 0:  # some alike and some not, for a loss may compare samples of one label, or of two
                return tf.cast(tf.constant(np.indices(shape).sum(axis=0) % 2), leaf.dtype)
            return tf.zeros(shape, leaf.dtype) if floating else tf.ones(shape, leaf.dtype)
        if not floating:  # tokens that are all alike would leave attention without a gradient
            bits = random.integers(0, 2, shape) + least if least or attempt % 2 == 0 else np.ones(shape)
            return tf.cast(tf.constant(bits), leaf.dtype)
        fan_in = max(1, int(np.prod(shape[:-1])))
        scale = 1.0 if len(shape) < 2 else fan_in**-0.5
        smaller = 4.0 ** -(attempt // 2)  # where losses clip what is large, no gradient would be seen
        value = smaller * (0.5 * (len(shape) < 2) + scale * random.normal(size=shape))
        return tf.constant(np.abs(value) + 0.01 if part in self._positive else value, dtype=leaf.dtype)
