"""Find the sample axis of a use by a weighted second backward pass, for backends that walk a recorded graph.

A row of the gradient that belongs to sample a is scaled by exactly `w_a` when the head of sample a is weighted by `w_a`. That
gives the axis; and where no axis is scaled so, the place does not belong to single samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, prod

from mgs_core._errors import ArgumentError
from mgs_core._namespace import array_namespace
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
        xp = array_namespace(array)
        groups, *lead, features = array.shape
        if groups == 1 and self.axis <= 0 and self.sample_first:  # the samples stand first already
            return xp.reshape(array, (n, 1, prod(lead) // n, features))
        if self.axis < 0:
            return xp.reshape(array, (1, groups, prod(lead), features))
        length = lead[self.axis]
        parts = (n, length // n) if self.sample_first else (length // n, n)
        before, after = lead[: self.axis], lead[self.axis + 1 :]
        array = xp.reshape(array, (groups, *before, *parts, *after, features))
        place = 1 + self.axis + (0 if self.sample_first else 1)
        rest = [axis for axis in range(array.ndim) if axis != place]
        return xp.reshape(xp.permute_dims(array, (place, *rest)), (n, groups, prod(lead) // n, features))


def find_layout(gradient: Array, weighted: Array, weights: Array, eps: float) -> tuple[Layout | None, bool]:
    """Find the layout of one use.

    Args:
        gradient: plain gradient of the sum of the heads, (groups, *lead, features).
        weighted: that of the weighted sum.
        weights: (n,), distinct and positive.
        eps: relative spacing of numbers of the gradient's dtype.

    Returns:
        (layout, None where the rows belong to no single sample; whether the answer holds for other values too: False where a
        gradient that is zero, or nothing but rounding, leaves it open).

    Raises:
        ArgumentError: when the gradient is not finite.
    """
    n = weights.shape[0]
    if n == 1:
        return Layout(-1), True
    candidates = list(_candidates(gradient.shape[1:-1], n))
    if not candidates:
        return None, True
    xp = array_namespace(gradient)
    size = float(xp.max(xp.abs(gradient))) if prod(gradient.shape) else 0.0
    refuse_infinite(isfinite(size))
    tolerance = min(1e3 * eps, 0.1) * size  # the least matters in half precision, whose cancellation is coarse
    fits = [layout for layout in candidates if _fits(layout, gradient, weighted, weights, tolerance)]
    if size <= noise_floor(eps):  # any layout may hold, or by rounding none
        return (fits or candidates)[0], False
    return (fits[0] if fits else None), len(fits) < 2


def refuse_infinite(finite: bool) -> None:
    """Raise unless gradients are finite; which sample they belong to could not be told."""
    if not finite:
        raise ArgumentError(
            "`model` must have finite gradients; got NaN or infinity. Look for them in inputs, targets and parameters."
        )


def noise_floor(eps: float) -> float:
    """Return the size below which the gradient of a head of size 1 may be nothing but rounding.

    Args:
        eps: relative spacing of numbers of the dtype.
    """
    return 10.0 * eps


def _fits(layout: Layout, gradient: Array, weighted: Array, weights: Array, tolerance: float) -> bool:
    n, xp = weights.shape[0], array_namespace(gradient)
    expected = layout.split(gradient, n) * weights[:, None, None, None]
    return bool(xp.all(xp.abs(layout.split(weighted, n) - expected) <= tolerance))


def _candidates(lead: tuple[int, ...], n: int) -> Iterator[Layout]:
    exact = [axis for axis, length in enumerate(lead) if length == n]
    merged = [axis for axis, length in enumerate(lead) if length % n == 0 and length > n]
    yield from (Layout(axis) for axis in exact)
    for axis in merged:
        yield Layout(axis, sample_first=True)
        yield Layout(axis, sample_first=False)
