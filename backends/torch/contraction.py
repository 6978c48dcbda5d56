"""PyTorch's own contractions of the costly layers, with derivatives that form no more than they must.

The derivative of `K = R Rᵀ` in the rows R, for a gradient G of K, is `(G + Gᵀ) R`: one product instead of two. Rows that are
larger than what they are made of are made again for it, a slice at a time, instead of being kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mgs_core import contraction as core
from mgs_core._protocol import Convolution, LayerStatistics, Lookup, Outer

#: Elements of a slice of rows, chosen to stay in the processor's cache; a slice has at least so many columns for each sample.
_SLICE, _LEAST = 1 << 19, 64
#: Elements of one sample's gradient up to which a convolution in groups, a group for each sample, is fastest (on CPU).
_GROUPED = 1 << 16
#: Elements of all patches up to which cutting them out is faster still.
_UNFOLDED = 1 << 17


@contextmanager
def full_precision() -> Iterator[None]:
    """Let products have the precision of their arguments, whatever automatic mixed precision says."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    else:
        yield


@full_precision()
def contribution(left: LayerStatistics, right: LayerStatistics, full: bool) -> torch.Tensor | None:
    """Return a layer's contribution to the kernel of a batch with itself; None for what the core does as well."""
    if full or right is not left or not isinstance(left, Outer | Convolution | Lookup):
        return None
    if isinstance(left, Convolution):
        return _convolution(left)
    heads = [_head(left, head) for head in range(left.gradients.shape[1])]
    if isinstance(left, Lookup):
        n, _, s, o = left.gradients.shape
        pairs = _equal_pairs(left) if left.indices.device.type == "cpu" else None  # how many there are, only the host knows
        if pairs is not None:
            return pairs
        if n * s * s * (o + 60) <= left.size * o * (n + 60):  # pairs of positions cost less than tables
            return None
        return _sum_of([_apply(_LookupKernel, use.indices, use.gradients.flatten(0, 1), use.size) for use in heads])
    if core.prefers_pairwise(left, left):
        return None
    return _sum_of(
        [_apply(_OuterKernel, use.inputs, use.gradients.squeeze(1), use.one) for use in heads if isinstance(use, Outer)]
    )


@full_precision()
def symmetric_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `left rightᵀ` over the last axis."""
    if right is left and left.requires_grad:
        return _apply(_Gram, left)
    return left @ right.mT


class _Gram(torch.autograd.Function):
    """`R Rᵀ`, for a batch of matrices."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        return rows @ rows.mT

    @staticmethod
    @full_precision()
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = ctx.saved_tensors[0]
        return (gradients[0] + gradients[0].mT) @ rows


@full_precision()
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


def _apply(function: Any, *arguments: Any) -> torch.Tensor:
    result: torch.Tensor = function.apply(*arguments)
    return result


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
        buffers = _Buffers(wide)
        for where in _slices(wide, narrow):
            part = wide[:, :, where]
            rows = torch.bmm(narrow.mT, part, out=buffers.take(0, len(part), narrow.shape[2], part.shape[2]))
            _add_gram(kernel, rows.view(n, -1))
        return kernel

    @staticmethod
    @once_differentiable
    @full_precision()
    def backward(ctx: Any, *gradients_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        mixing = gradients_out[0] + gradients_out[0].T
        n = mixing.shape[0]
        inputs, gradients = ctx.saved_tensors
        wide, narrow, swapped = _wide_first(inputs, gradients)
        # contiguous, for products into anything else are made one by one
        to_wide, to_narrow = wide.new_empty(wide.shape), narrow.new_empty(narrow.shape)
        buffers = _Buffers(wide)
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


class _Buffers:
    """Hold memory that is used again: to get new memory from the system takes about as long as to compute what goes there."""

    def __init__(self, like: torch.Tensor) -> None:
        self._like = like
        self._held: dict[int, torch.Tensor] = {}

    def take(self, number: int, *shape: int) -> torch.Tensor:
        """Return an array of the shape, with anything in it, in the buffer of that number."""
        size = prod(shape)
        held = self._held.get(number)
        if held is None or held.numel() < size:
            held = self._held[number] = self._like.new_empty(size)
        return held[:size].view(shape)


def _wide_first(inputs: torch.Tensor, gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    a, d = inputs.flatten(0, 1), gradients.flatten(0, 1)
    return (d, a, True) if d.shape[2] > a.shape[2] else (a, d, False)


def _slices(wide: torch.Tensor, narrow: torch.Tensor) -> list[slice]:
    """Divide the last axis of the wide one."""
    step = max(_LEAST, _SLICE // (len(narrow) * narrow.shape[2]))
    return [slice(start, start + step) for start in range(0, wide.shape[2], step)]


def _add_gram(kernel: torch.Tensor, rows: torch.Tensor) -> None:
    kernel.addmm_(rows, rows.T)


def _convolution(use: Convolution) -> torch.Tensor | None:
    n, k, s, groups, o = use.gradients.shape[:5]
    i, positions, window = use.images.shape[3], prod(use.gradients.shape[5:]), prod(use.window)
    pairwise = groups * (n * s * positions) ** 2 * (i * window + o + 60)
    rows = k * groups * i * window * o * n * (s * positions + n + 30)
    if s > 1 or any(before != after for before, after in use.pads):
        return None
    on_host = use.images.device.type == "cpu"
    if len(use.window) == 2 and (pairwise <= rows or (on_host and n * groups * i * window * positions <= _UNFOLDED)):
        unfolded = _unfolded(use)
        found: torch.Tensor = core.contribution(unfolded, unfolded)
        return found
    if pairwise <= rows:
        return None
    images = use.images.flatten(0, 3)
    convolution = _grouped if groups * i * o * window <= _GROUPED and on_host else _by_offset
    return _sum_of([convolution(use, images, _head(use, head).gradients.flatten(0, 4)) for head in range(k)])


def _unfolded(use: Convolution) -> Outer:
    """Cut out the patches of images in two dimensions, by one operation with a derivative of one, where the core has many."""
    n, k, _, groups, o, *out = use.gradients.shape
    padding = [before for before, _ in use.pads]
    patches = torch.ops.aten.im2col(use.images.flatten(1, 3), use.window, use.dilations, padding, use.strides)
    inputs, gradients = patches.view(n, groups, -1, prod(out)).mT, use.gradients.reshape(n, k, groups, o, -1).mT
    return Outer(use.parameter, gradients, use.view, use.restore, use.part, inputs=inputs)


def _grouped(use: Convolution, images: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Let the convolution's own weight gradient make the rows: a group for each sample."""
    n, _, _, groups, o = use.gradients.shape[:5]
    i, rank = use.images.shape[3], len(use.window)
    nothing = [0] * rank
    shape = images.new_empty(1).expand(n * groups * o, i, *use.window)
    padding = [before for before, _ in use.pads]
    rows = torch.ops.aten.convolution_backward(
        gradients[None], images[None], shape, None, use.strides, padding, use.dilations, False, nothing, n * groups,
        [False, True, False],
    )[1]  # fmt: skip
    rows = rows.reshape(n, -1)
    return symmetric_product(rows, rows)


def _by_offset(use: Convolution, images: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    return _apply(_OffsetKernel, use, images, gradients)


class _OffsetKernel(torch.autograd.Function):
    """Kernel of a convolution's rows, one element of the window at a time: then they are the product of a slice and gradients."""

    @staticmethod
    def forward(ctx: Any, use: Convolution, images: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        ctx.use = replace(use, gradients=None, images=None, restore=None)
        ctx.save_for_backward(images, gradients)
        ctx.n, ctx.groups, ctx.o, ctx.i = *(use.gradients.shape[axis] for axis in (0, 3, 4)), use.images.shape[3]
        d, padded = _padded(ctx, images, gradients)
        kernel = d.new_zeros(ctx.n, ctx.n)
        buffers = _Buffers(d)
        for where in _windows(ctx.use, gradients.shape[1:]):
            x = padded[where]
            flat = buffers.take(0, *x.shape).copy_(x).flatten(2)
            rows = torch.bmm(d, flat.mT, out=buffers.take(1, len(d), ctx.o, ctx.i))
            _add_gram(kernel, rows.view(ctx.n, -1))
        return kernel

    @staticmethod
    @once_differentiable
    @full_precision()
    def backward(ctx: Any, *gradients_out: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        images, gradients = ctx.saved_tensors
        mixing = gradients_out[0] + gradients_out[0].T
        d, padded = _padded(ctx, images, gradients)
        to_d, to_padded = torch.zeros_like(d), torch.zeros_like(padded)
        buffers = _Buffers(d)
        for where in _windows(ctx.use, gradients.shape[1:]):
            x = padded[where]
            flat = buffers.take(0, *x.shape).copy_(x).flatten(2)
            rows = torch.bmm(d, flat.mT, out=buffers.take(1, len(d), ctx.o, ctx.i))
            mixed = buffers.take(2, *rows.shape)
            torch.mm(mixing, rows.view(ctx.n, -1), out=mixed.view(ctx.n, -1))
            to_d.baddbmm_(mixed, flat)
            to_padded[where] += torch.bmm(mixed.mT, d, out=flat).view_as(x)
        for axis, (before, _) in enumerate(ctx.use.pads, start=1):
            to_padded = to_padded.narrow(axis + 1, before, images.shape[axis])
        return None, to_padded.reshape(images.shape), to_d.view_as(gradients)


def _padded(ctx: Any, images: torch.Tensor, gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    widths = [width for pair in reversed(ctx.use.pads) for width in pair]
    padded = functional.pad(images.reshape(ctx.n * ctx.groups, ctx.i, *images.shape[1:]), widths)
    return gradients.reshape(ctx.n * ctx.groups, ctx.o, -1), padded


def _windows(use: Convolution, out: torch.Size) -> list[tuple[Any, ...]]:
    """Return what each element of the window sees of the padded image."""
    places = []
    for offset in product(*map(range, use.window)):
        starts = (at * dilation for at, dilation in zip(offset, use.dilations, strict=True))
        slices = (slice(at, at + (size - 1) * step + 1, step) for at, size, step in zip(starts, out, use.strides, strict=True))
        places.append((..., *slices))
    return places


def _equal_pairs(use: Lookup) -> torch.Tensor | None:
    """Return the kernel as a sum over pairs of samples that look up the same row; None where there are many such pairs."""
    n, k, s, o = use.gradients.shape
    row = (use.indices + use.size * torch.arange(n)[:, None]).reshape(-1)
    seen, place = torch.unique(row, return_inverse=True)  # by sample, then by row
    order = torch.argsort(seen % use.size, stable=True)
    rows, samples, rank = (seen % use.size)[order], (seen // use.size)[order], torch.argsort(order)
    later = torch.searchsorted(rows, rows, right=True) - torch.arange(1, len(rows) + 1)  # in the same group
    count = int(later.sum())
    if 8 * count > n * use.size or count * k * o > core.MEMORY_BUDGET:
        return None
    left = torch.arange(len(rows)).repeat_interleave(later)
    right = left + 1 + torch.arange(count) - (later.cumsum(0) - later).repeat_interleave(later)
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
            _add_gram(kernel, rows)
        return kernel

    @staticmethod
    @once_differentiable
    @full_precision()
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
    step = max(1, (_SLICE << 2) // (n * ctx.size))
    for start in range(0, o, step):
        where = slice(start, min(start + step, o))
        part = gradients[..., where].flatten(0, 1)
        yield where, part.new_zeros(n * ctx.size, part.shape[1]).index_add_(0, ctx.places, part).view(n, -1)


def _head(use: Any, head: int) -> Any:
    """Return the use with one of its heads; without a slice, whose derivative is filled up with zeros, where there is one."""
    if use.gradients.shape[1] == 1:
        return use
    return replace(use, gradients=use.gradients[:, head : head + 1])


def _sum_of(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
