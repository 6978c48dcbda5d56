"""Find the sample axis of a use by a weighted second backward pass.

A row of the gradient that belongs to sample a is scaled by exactly `w_a` when the head of sample a is weighted by `w_a`. That
gives the axis; and where no axis is scaled so, the place does not belong to single samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import tensorflow as tf

from mgs_core._types import Array

from .namespace import namespace


@dataclass(frozen=True)
class Layout:
    """Say where the samples are among the lead axes.

    Attributes:
        axis: the axis that holds them, alone or merged with positions; -1 when there is one sample and so no axis.
        sample_first: of a merged axis, whether the sample is the slower index.
    """

    axis: int
    sample_first: bool = True

    def split(self, array: Array, n: int) -> Array:
        """Rearrange a tensor (groups, *lead, features) to (n, groups, s, features)."""
        groups, *lead, features = array.shape
        if self.axis < 0:
            return tf.reshape(array, (1, groups, prod(lead), features))
        length = lead[self.axis]
        parts = (n, length // n) if self.sample_first else (length // n, n)
        before, after = lead[: self.axis], lead[self.axis + 1 :]
        array = tf.reshape(array, (groups, *before, *parts, *after, features))
        place = 1 + self.axis + (0 if self.sample_first else 1)
        rest = [axis for axis in range(array.ndim) if axis != place]
        return tf.reshape(tf.transpose(array, (place, *rest)), (n, groups, prod(lead) // n, features))


def find_layout(gradient: Any, weighted: Any, weights: Any) -> tuple[Layout | None, bool]:
    """Find the layout of one use.

    Args:
        gradient: gradient of the sum of the heads as a NumPy array, (groups, *lead, features).
        weighted: that of the weighted sum.
        weights: (n,), distinct and positive.

    Returns:
        (layout or None, whether the answer is certain: False where a gradient of nothing but rounding leaves it open).
    """
    n = len(weights)
    if n == 1:
        return Layout(-1), True
    size = float(np.max(np.abs(gradient), initial=0.0))
    tolerance = min(1e3 * epsilon(gradient), 0.1) * size  # the least matters in half precision, whose cancellation is coarse
    fits = [layout for layout in _candidates(gradient.shape[1:-1], n) if _fits(layout, gradient, weighted, weights, tolerance)]
    return (fits[0] if fits else None), len(fits) < 2 and size > 10.0 * epsilon(gradient)


def epsilon(array: Any) -> float:
    """Return the relative spacing of numbers of the array's dtype."""
    return float(namespace.finfo(array.dtype).eps)


def _fits(layout: Layout, gradient: Any, weighted: Any, weights: Any, tolerance: float) -> bool:
    flat, scaled = (layout.split(tf.constant(array), len(weights)).numpy() for array in (gradient, weighted))
    return bool(np.all(np.abs(scaled - flat * weights[:, None, None, None]) <= tolerance))


def _candidates(lead: tuple[int, ...], n: int) -> Iterator[Layout]:
    exact = [axis for axis, length in enumerate(lead) if length == n]
    merged = [axis for axis, length in enumerate(lead) if length % n == 0 and length > n]
    yield from (Layout(axis) for axis in exact)
    for axis in merged:
        yield Layout(axis, sample_first=True)
        yield Layout(axis, sample_first=False)
