"""Rows of samples in any order and number, as where data route them: mixtures of experts, packed sequences."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from mgs_core._layout import BASE, rounding


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


def find_scattered(gradient: torch.Tensor, weighted: Sequence[torch.Tensor], n: int) -> Scattered | None:
    """Read the number of each row's sample from what the row is multiplied by.

    Args:
        gradient: of the sum of the heads, (groups, *lead, features).
        weighted: those of the sums weighted by `sample_weights`.
        n: number of samples.

    Returns:
        The layout, for this batch alone; None where a row has no single factor.
    """
    rows, columns = prod(gradient.shape[1:-1]), gradient.shape[0] * gradient.shape[-1]
    flat, *scaled = (array.movedim(0, -2).reshape(rows, columns) for array in (gradient, *weighted))
    if not flat.numel():  # an expert without a sample
        return Scattered(torch.full((rows,), n, device=flat.device), n)
    size, largest = flat.abs().max(1)
    tolerance = rounding(torch.finfo(flat.dtype).eps) * size.max()
    at = largest[:, None]
    owners = torch.zeros_like(largest)
    for place, array in enumerate(scaled):
        factor = (array.gather(1, at) / flat.gather(1, at)).squeeze(1)
        digit = (factor.log2().round() - 1).nan_to_num(0.0).clamp(0, BASE - 1)
        weight = torch.pow(2.0, 1 + digit).to(flat.dtype)[:, None]
        if not bool(((array - flat * weight).abs() <= tolerance * weight).all()):
            return None
        owners += digit.to(owners.dtype) * BASE**place
    owners = torch.where(size > 0, owners, n)
    return Scattered(owners, n) if bool((owners <= n).all()) else None
