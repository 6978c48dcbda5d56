"""PyTorch's own contractions of the costly layers, with derivatives that form no more than they must.

The derivative of `K = R Rᵀ` in the rows R, for a gradient G of K, is `(G + Gᵀ) R`: one product instead of two. Rows that are
larger than what they are made of are made again for it, a slice at a time, instead of being kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from mgs_core import contraction as core
from mgs_core._protocol import Convolution, LayerStatistics, Lookup, Outer

from .convolutions import of_convolution
from .products import Buffers, add_gram, differentiated_once, full_precision, on_host, recorded, room

#: Elements of a slice of rows, chosen to stay in the processor's cache; a slice has at least so many columns for each sample.
_SLICE, _LEAST = 1 << 19, 64


@full_precision
def contribution(left: LayerStatistics, right: LayerStatistics, full: bool) -> torch.Tensor | None:
    """Return a layer's contribution to the kernel of a batch with itself; None for what the core does as well."""
    if full or right is not left or not isinstance(left, Outer | Convolution | Lookup):
        return None
    if isinstance(left, Convolution):
        return of_convolution(left)
    if isinstance(left, Lookup):
        n, _, s, o = left.gradients.shape
        pairs = _equal_pairs(left) if on_host(left.indices) else None  # how many there are, only the host knows
        if pairs is not None:
            return pairs
        if n * s * s * (o + 60) <= left.size * o * (n + 60):  # pairs of positions cost less than tables
            return None
        return _sum_of([recorded(_LookupKernel, left.indices, d.flatten(0, 1), left.size) for d in _heads(left)])
    if core.prefers_pairwise(left, left):
        return None
    # each head by itself stays in the processor's cache; elsewhere fewer, larger products are faster
    heads = _heads(left) if on_host(left.gradients) else _heads(core.heads_as_outputs(left))
    return _sum_of([recorded(_OuterKernel, left.inputs, d.squeeze(1), left.one) for d in heads])


@full_precision
def weighted_gradient(use: LayerStatistics, weights: torch.Tensor) -> torch.Tensor | None:
    """Return `Σ_ak w_ak g_ak` of a weight, (p,), made as (g, o, i) as most modules hold it; else None."""
    if not isinstance(use, Outer | Convolution):
        return None
    n, k, *shape = use.gradients.shape
    weighted = use.gradients * weights.reshape(n, k, *(1 for _ in shape))
    weighted = weighted.squeeze(1) if k == 1 else weighted.sum(1)
    if isinstance(use, Outer):
        d, x = (array.movedim(1, 0).flatten(1, 2) for array in (weighted, use.inputs))
        found = torch.bmm(d.mT, x)
    elif any(before != after for before, after in use.pads):
        return None
    else:
        (groups, o), i, nothing = shape[1:3], use.images.shape[3], [0] * len(use.window)
        images, d = use.images.flatten(2, 3).flatten(0, 1), weighted.flatten(2, 3).flatten(0, 1)
        like = d.new_empty(1).expand(groups * o, i, *use.window)
        padding = [before for before, _ in use.pads]
        found = torch.ops.aten.convolution_backward(
            d, images, like, None, use.strides, padding, use.dilations, False, nothing, groups, [False, True, False]
        )[1].reshape(groups, o, -1)
    part = found.mT[None, None]
    return (part if use.restore is None else use.restore(part)).reshape(-1)


class _OuterKernel(torch.autograd.Function):
    """Kernel of rows `Σ_s a ⊗ d`, from (n, g, s, i) and (n, g, s, o): the same in both, sliced along the wider.

    With `bias`, that of rows `Σ_s d` is added.
    """

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, gradients: torch.Tensor, bias: bool) -> torch.Tensor:
        ctx.save_for_backward(inputs, gradients)
        n = inputs.shape[0]
        ctx.sums = gradients.sum(2).view(n, -1) if bias else None
        wide, narrow, _ = _wide_first(inputs, gradients)
        kernel = wide.new_zeros(n, n) if ctx.sums is None else ctx.sums @ ctx.sums.T
        buffers = Buffers(wide)
        for where in _slices(wide, narrow):
            part = wide[:, :, where]
            rows = torch.bmm(narrow.mT, part, out=buffers.take(0, len(part), narrow.shape[2], part.shape[2]))
            add_gram(kernel, rows.view(n, -1))
        return kernel

    @staticmethod
    @differentiated_once
    @full_precision
    def backward(ctx: Any, *gradients_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        mixing = gradients_out[0] + gradients_out[0].T
        n = mixing.shape[0]
        inputs, gradients = ctx.saved_tensors
        wide, narrow, swapped = _wide_first(inputs, gradients)
        # contiguous, for products into anything else are made one by one
        to_wide, to_narrow = wide.new_empty(wide.shape), narrow.new_empty(narrow.shape)
        buffers = Buffers(wide)
        for where in _slices(wide, narrow):
            part = wide[:, :, where]
            shape = (len(part), narrow.shape[2], part.shape[2])
            rows = torch.bmm(narrow.mT, part, out=buffers.take(0, *shape))
            mixed = buffers.take(1, *shape)
            torch.mm(mixing, rows.view(n, -1), out=mixed.view(n, -1))
            if part.shape == wide.shape:
                torch.bmm(narrow, mixed, out=to_wide)
            else:
                to_wide[:, :, where] = torch.bmm(narrow, mixed, out=buffers.take(2, *part.shape))
            if where.start == 0:
                torch.bmm(part, mixed.mT, out=to_narrow)
            else:
                to_narrow.baddbmm_(part, mixed.mT)
        of_inputs, of_gradients = (to_narrow, to_wide) if swapped else (to_wide, to_narrow)
        to_gradients = of_gradients.view_as(gradients)
        if ctx.sums is not None:
            to_gradients += (mixing @ ctx.sums).view_as(gradients[:, :, 0]).unsqueeze(2)
        return of_inputs.view_as(inputs), to_gradients, None


def _wide_first(inputs: torch.Tensor, gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    a, d = inputs.flatten(0, 1), gradients.flatten(0, 1)
    return (d, a, True) if d.shape[2] > a.shape[2] else (a, d, False)


def _slices(wide: torch.Tensor, narrow: torch.Tensor) -> list[slice]:
    """Divide the last axis of the wide one."""
    step = max(_LEAST, room(wide, _SLICE) // (len(narrow) * narrow.shape[2]))
    return [slice(start, start + step) for start in range(0, wide.shape[2], step)]


def _equal_pairs(use: Lookup) -> torch.Tensor | None:
    """Return the kernel as a sum over pairs of samples that look up the same row; None where there are many such pairs."""
    n, k, s, o = use.gradients.shape
    count_off = partial(torch.arange, device=use.indices.device)
    row = (use.indices + use.size * count_off(n)[:, None]).reshape(-1)
    seen, place = torch.unique(row, return_inverse=True)  # by sample, then by row
    order = torch.argsort(seen % use.size, stable=True)
    rows, samples, rank = (seen % use.size)[order], (seen // use.size)[order], torch.argsort(order)
    later = torch.searchsorted(rows, rows, right=True) - count_off(1, len(rows) + 1)  # in the same group
    count = int(later.sum())
    if 8 * count > n * use.size or count * k * o > core.MEMORY_BUDGET:
        return None
    left = count_off(len(rows)).repeat_interleave(later)
    right = left + 1 + count_off(count) - (later.cumsum(0) - later).repeat_interleave(later)
    gradients = use.gradients.transpose(1, 2).reshape(n * s, k * o)
    table = gradients.new_zeros(len(rows), k * o).index_add(0, rank[place], gradients)
    products = (table.index_select(0, left) * table.index_select(0, right)).sum(1)
    upper = products.new_zeros(n * n).index_add(0, samples[left] * n + samples[right], products).view(n, n)
    diagonal = products.new_zeros(n).index_add(0, samples, (table * table).sum(1))
    kernel: torch.Tensor = upper + upper.T + torch.diag(diagonal)
    return kernel


class _LookupKernel(torch.autograd.Function):
    """Kernel of tables (n, size, o) into which gradients (n, s, o) are added at indices (n, s), by slices along o."""

    @staticmethod
    def forward(ctx: Any, indices: torch.Tensor, gradients: torch.Tensor, size: int) -> torch.Tensor:
        n = len(indices)
        ctx.places = (indices + size * torch.arange(n, device=indices.device)[:, None]).reshape(-1)
        ctx.size = size
        ctx.save_for_backward(gradients)
        kernel = gradients.new_zeros(n, n)
        for _, rows in _tables(ctx, gradients):
            add_gram(kernel, rows)
        return kernel

    @staticmethod
    @differentiated_once
    @full_precision
    def backward(ctx: Any, *gradients_out: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        (gradients,) = ctx.saved_tensors
        mixing = gradients_out[0] + gradients_out[0].T
        result = torch.empty_like(gradients)
        for where, rows in _tables(ctx, gradients):
            mixed = (mixing @ rows).view(len(rows) * ctx.size, -1)
            result[..., where] = mixed[ctx.places].view(*gradients.shape[:2], -1)
        return None, result, None


def _tables(ctx: Any, gradients: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield rows (n, size · part of o)."""
    n, _, o = gradients.shape
    step = max(1, room(gradients, _SLICE << 2) // (n * ctx.size))
    for start in range(0, o, step):
        where = slice(start, min(start + step, o))
        part = gradients[..., where].flatten(0, 1)
        yield where, part.new_zeros(n * ctx.size, part.shape[1]).index_add_(0, ctx.places, part).view(n, -1)


def _heads(use: Outer | Lookup) -> list[torch.Tensor]:
    """Return the gradients of each head, (n, 1, …); without a slice, whose derivative is filled up with zeros, of one."""
    k = use.gradients.shape[1]
    return [use.gradients] if k == 1 else [use.gradients[:, head : head + 1] for head in range(k)]


def _sum_of(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
