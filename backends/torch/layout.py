"""Find the samples in an array by weighted backward passes.

A row of the gradient that belongs to sample a is scaled by exactly `w_a` when the heads of sample a are weighted by `w_a`. That
gives the axis; where no axis is scaled so, each row by itself may be, as where data route rows; else the place does not belong to
single samples. The weights are powers of two, so that scaling commutes with rounding in any precision; sample numbers are spelled
in digits, one pass each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import Literal

import torch

from mgs_core._layout import refuse_infinite

_BASE = 8  # weights 1, 2, …, 128: far from overflow even in float16
# what heads of size 1 may leave by rounding, relative to the precision
_NOISE = 10.0


@dataclass(frozen=True)
class Layout:
    """Say where the samples are among the lead axes.

    Attributes:
        axis: the axis that holds them; -1 when there is one sample and so no axis.
        before: positions merged into the axis that are slower than the sample (1: the sample is the slowest index).
    """

    axis: int
    before: int = 1

    def split(self, array: torch.Tensor, n: int) -> torch.Tensor:
        """Rearrange (groups, *lead, features) to (n, groups, s, features)."""
        groups, *lead, features = array.shape
        if self.axis < 0:
            return array.reshape(1, groups, prod(lead), features)
        front, length, rest = prod(lead[: self.axis]), lead[self.axis], prod(lead[self.axis + 1 :])
        after = length // (n * self.before)
        array = array.reshape(groups, front * self.before, n, after * rest, features)
        return array.permute(2, 0, 1, 3, 4).reshape(n, groups, prod(lead) // n, features)

    def spread(self, values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Return values (n,) along the axis of the samples, to be broadcast over an array (*lead) of this shape."""
        if self.axis < 0:
            return values.reshape((1,) * len(shape))
        length = shape[self.axis] // self.before
        along = values.repeat_interleave(length // values.shape[0]).repeat(self.before)
        return along.reshape(-1, *(1,) * (len(shape) - self.axis - 1))


class Scattered:
    """Say to which sample each row belongs, where samples have rows in any order and number.

    Attributes:
        owners: number of the sample for each position of the lead axes, flat; n where none is known, for the gradient is zero.
    """

    def __init__(self, owners: torch.Tensor, n: int) -> None:
        self.owners = owners
        order = torch.argsort(owners, stable=True)
        counts = torch.bincount(owners, minlength=n + 1)
        starts = counts.cumsum(0) - counts
        rank = torch.empty_like(owners)
        rank[order] = torch.arange(len(owners), device=owners.device) - starts[owners[order]]
        # the row of each sample and position; a row of zeros, the last one, where a sample has fewer
        self._rows = owners.new_full((n + 1, max(1, int(counts[:n].max()))), len(owners))
        known = owners < n
        self._rows[owners[known], rank[known]] = known.nonzero()[:, 0]
        self._rows = self._rows[:n]

    def split(self, array: torch.Tensor, n: int) -> torch.Tensor:
        """Rearrange (groups, *lead, features) to (n, groups, s, features), filled up with zeros."""
        array = array.reshape(array.shape[0], len(self.owners), array.shape[-1])
        return torch.nn.functional.pad(array, (0, 0, 0, 1))[:, self._rows].transpose(0, 1)

    def spread(self, values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Return values (n,) at the rows of each sample, 0 at those of none, as an array (*lead) of this shape."""
        return torch.nn.functional.pad(values, (0, 1))[self.owners].reshape(shape)


def sample_weights(n: int, like: torch.Tensor) -> list[torch.Tensor]:
    """Return weights (n,), one for each pass, that together tell the samples apart."""
    number = torch.arange(n, device=like.device)
    passes = []
    while True:
        passes.append(torch.pow(2.0, number % _BASE).to(like.dtype))
        number = number // _BASE
        n = -(-n // _BASE)
        if n <= 1:
            return passes


def find_layout(
    gradient: torch.Tensor, weighted: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], *, scattered: bool = False
) -> tuple[Layout | Scattered | None, Literal["sure", "open", "silent", "mixed"]]:
    """Find the layout of one use.

    Args:
        gradient: of the sum of the heads, (groups, *lead, features).
        weighted: those of the weighted sums.
        weights: (n,), positive.
        scattered: whether samples may have rows in any order and number.

    Returns:
        (layout or None; "sure", "open" where zero gradients leave more than one layout or another batch may have another,
        "silent" where all is zero, or "mixed" where no layout fits, for the rows belong to no single sample).

    Raises:
        ArgumentError: when the gradient is not finite.
    """
    n = weights[0].shape[0]
    if n == 1:
        return Layout(-1), "sure"
    candidates = list(_candidates(gradient.shape[1:-1], n))
    size = max(_size(gradient), *(_size(array) / float(weight.max()) for array, weight in zip(weighted, weights, strict=True)))
    refuse_infinite(isfinite(size))
    eps = torch.finfo(gradient.dtype).eps
    tolerance = 1e3 * min(eps, torch.finfo(torch.float32).eps) * size
    fits = [layout for layout in candidates if _fits(layout, gradient, weighted, weights, tolerance)]
    if candidates and (size == 0 or (not fits and size <= _NOISE * eps)):
        return candidates[0], "silent"
    if not fits:
        found = _scattered(gradient, weighted, n, tolerance) if scattered else None
        return found, "mixed" if found is None else "open"
    return fits[0], "sure" if len(fits) == 1 else "open"


def _size(array: torch.Tensor) -> float:
    return float(array.abs().max()) if array.numel() else 0.0


def _fits(
    layout: Layout, gradient: torch.Tensor, weighted: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], tolerance: float
) -> bool:
    n = weights[0].shape[0]
    flat = layout.split(gradient, n)
    for array, weight in zip(weighted, weights, strict=True):
        difference = layout.split(array, n) - flat * weight[:, None, None, None]
        if not bool((difference.abs() <= tolerance * weight[:, None, None, None]).all()):
            return False
    return True


def _scattered(gradient: torch.Tensor, weighted: Sequence[torch.Tensor], n: int, tolerance: float) -> Scattered | None:
    """Read the number of each row's sample from what the row is multiplied by; None where a row has no single factor."""
    rows, columns = prod(gradient.shape[1:-1]), gradient.shape[0] * gradient.shape[-1]
    flat, *scaled = (array.movedim(0, -2).reshape(rows, columns) for array in (gradient, *weighted))
    if not flat.numel():  # an expert without a sample
        return Scattered(torch.full((rows,), n, device=flat.device), n)
    size, largest = flat.abs().max(1)
    at = largest[:, None]
    owners = torch.zeros_like(largest)
    for place, array in enumerate(scaled):
        factor = (array.gather(1, at) / flat.gather(1, at)).squeeze(1)
        digit = factor.log2().round().nan_to_num(0.0).clamp(0, _BASE - 1)
        weight = torch.pow(2.0, digit).to(flat.dtype)[:, None]
        if not bool(((array - flat * weight).abs() <= tolerance * weight).all()):
            return None
        owners += digit.to(owners.dtype) * _BASE**place
    owners = torch.where(size > 0, owners, n)
    return Scattered(owners, n) if bool((owners <= n).all()) else None


def _candidates(lead: Sequence[int], n: int) -> Iterator[Layout]:
    """Yield the layouts that fit the shape, those with an axis of its own for the samples first."""
    yield from (Layout(axis) for axis, length in enumerate(lead) if length == n)
    for axis, length in enumerate(lead):
        if length > n and length % n == 0:
            positions = length // n
            befores = [before for before in range(1, positions + 1) if positions % before == 0]
            yield from (Layout(axis, before) for before in sorted(befores, key=lambda before: before not in (1, positions)))
