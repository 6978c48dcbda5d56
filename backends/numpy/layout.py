"""Find the sample axis of a use by a weighted second backward pass.

A row of the gradient that belongs to sample a is scaled by exactly `w_a` when the head of sample a is weighted by `w_a`. That
gives the axis; and where no axis is scaled so, the place does not belong to single samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import autograd.numpy as anp
import numpy as np

from mgs_core._types import Array


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
        """Rearrange (groups, *lead, features) to (n, groups, s, features)."""
        groups, *lead, features = array.shape
        if groups == 1 and self.axis <= 0 and self.sample_first:  # samples are first already
            return anp.reshape(array, (n, 1, prod(lead) // n, features))
        if self.axis < 0:
            return anp.reshape(array, (1, groups, prod(lead), features))
        if groups == 1 and self.axis == 0 and self.sample_first:  # the samples stand first already
            return anp.reshape(array, (n, 1, prod(lead) // n, features))
        length = lead[self.axis]
        parts = (n, length // n) if self.sample_first else (length // n, n)
        before, after = lead[: self.axis], lead[self.axis + 1 :]
        array = anp.reshape(array, (groups, *before, *parts, *after, features))
        place = 1 + self.axis + (0 if self.sample_first else 1)
        rest = [axis for axis in range(array.ndim) if axis != place]
        return anp.reshape(anp.transpose(array, (place, *rest)), (n, groups, prod(lead) // n, features))


def find_layout(gradient: Array, weighted: Array, weights: Array) -> tuple[Layout | None, bool]:
    """Find the layout of one use.

    Args:
        gradient: plain gradient of the sum of the heads, (groups, *lead, features).
        weighted: that of the weighted sum.
        weights: (n,), distinct and positive.

    Returns:
        (layout or None, whether the answer holds for other values too: False where a zero gradient leaves it open).
    """
    n = weights.shape[0]
    if n == 1:
        return Layout(-1), True
    size = float(np.max(np.abs(gradient), initial=0.0))
    tolerance = 1e3 * float(np.finfo(gradient.dtype).eps) * size
    candidates = list(_candidates(gradient.shape[1:-1], n))
    fits = [layout for layout in candidates if _fits(layout, gradient, weighted, weights, tolerance)]
    if not fits and candidates and size <= noise_floor(gradient.dtype):
        return candidates[0], False  # a head that does not depend on the outputs: rounding errors, which any layout may hold
    return (fits[0] if fits else None), len(fits) == 1 and size > 0


def noise_floor(dtype: Any) -> float:
    """Return the size below which the gradient of a head of size 1 may be nothing but rounding."""
    return 10.0 * float(np.finfo(dtype).eps)


def _fits(layout: Layout, gradient: Array, weighted: Array, weights: Array, tolerance: float) -> bool:
    n = weights.shape[0]
    expected = layout.split(gradient, n) * weights[:, None, None, None]
    return bool(np.all(np.abs(layout.split(weighted, n) - expected) <= tolerance))


def _candidates(lead: tuple[int, ...], n: int) -> Iterator[Layout]:
    exact = [axis for axis, length in enumerate(lead) if length == n]
    merged = [axis for axis, length in enumerate(lead) if length % n == 0 and length > n]
    yield from (Layout(axis) for axis in exact)
    for axis in merged:
        yield Layout(axis, sample_first=True)
        yield Layout(axis, sample_first=False)
