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

from mgs_core import statistics
from mgs_core._protocol import Convolution, LayerStatistics, Lookup, Outer

#: Elements of a slice of rows, chosen to stay in the processor's cache.
_SLICE = 1 << 20
#: Elements of one sample's gradient up to which a convolution in groups, a group for each sample, is fastest (on CPU).
_GROUPED = 1 << 16


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
    heads = [left] if left.gradients.shape[1] == 1 else [_head(left, head) for head in range(left.gradients.shape[1])]
    if isinstance(left, Lookup):
        n, _, _, o = left.gradients.shape
        return _sum_of([_lookup(use) for use in heads if isinstance(use, Lookup)]) if n * left.size * o <= _SLICE << 4 else None
    if statistics.prefers_pairwise(left, left):
        return None
    return _sum_of([_apply(_OuterKernel, use.inputs, use.gradients[:, 0]) for use in heads if isinstance(use, Outer)])


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


def _apply(function: Any, *arguments: Any) -> torch.Tensor:
    result: torch.Tensor = function.apply(*arguments)
    return result


class _OuterKernel(torch.autograd.Function):
    """Kernel of rows `Σ_s a ⊗ d`, from inputs (n, g, s, i) and gradients (n, g, s, o), by slices along i."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inputs, gradients)
        n = inputs.shape[0]
        a, d = inputs.flatten(0, 1), gradients.flatten(0, 1)
        kernel = a.new_zeros(n, n)
        for where in _slices(a.shape[2], d.shape[0] * d.shape[2]):
            rows = torch.bmm(a[:, :, where].mT, d).view(n, -1)
            kernel.addmm_(rows, rows.T)
        return kernel

    @staticmethod
    @once_differentiable
    @full_precision()
    def backward(ctx: Any, *gradients_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, gradients = ctx.saved_tensors
        mixing = gradients_out[0] + gradients_out[0].T
        n = inputs.shape[0]
        a, d = inputs.flatten(0, 1), gradients.flatten(0, 1)
        to_a, to_d = torch.empty_like(a), torch.zeros_like(d)
        for where in _slices(a.shape[2], d.shape[0] * d.shape[2]):
            rows = torch.bmm(a[:, :, where].mT, d)
            mixed = (mixing @ rows.view(n, -1)).view_as(rows)
            to_a[:, :, where] = torch.bmm(d, mixed.mT)
            to_d.baddbmm_(a[:, :, where], mixed)
        return to_a.view_as(inputs), to_d.view_as(gradients)


def _slices(length: int, width: int) -> list[slice]:
    """Divide an axis so that slices of `width` elements for each index are of the size that is fast."""
    step = max(8, _SLICE // width)
    return [slice(start, start + step) for start in range(0, length, step)]


def _convolution(use: Convolution) -> torch.Tensor | None:
    n, k, s, groups, o = use.gradients.shape[:5]
    i, positions, window = use.images.shape[3], prod(use.gradients.shape[5:]), prod(use.window)
    pairwise = groups * (n * s * positions) ** 2 * (i * window + o + 60)
    rows = k * groups * i * window * o * n * (s * positions + n + 30)
    if pairwise <= rows or s > 1 or any(before != after for before, after in use.pads):
        return None
    images = use.images.flatten(0, 3)
    convolution = _grouped if groups * i * o * window <= _GROUPED and use.images.device.type == "cpu" else _by_offset
    return _sum_of([convolution(use, images, use.gradients[:, head].flatten(0, 3)) for head in range(k)])


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
        for where in _windows(ctx.use, gradients.shape[1:]):
            rows = torch.bmm(d, padded[where].flatten(2).mT).view(ctx.n, -1)
            kernel.addmm_(rows, rows.T)
        return kernel

    @staticmethod
    @once_differentiable
    @full_precision()
    def backward(ctx: Any, *gradients_out: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        images, gradients = ctx.saved_tensors
        mixing = gradients_out[0] + gradients_out[0].T
        d, padded = _padded(ctx, images, gradients)
        to_d, to_padded = torch.zeros_like(d), torch.zeros_like(padded)
        for where in _windows(ctx.use, gradients.shape[1:]):
            x = padded[where]
            flat = x.flatten(2)
            rows = torch.bmm(d, flat.mT)
            mixed = (mixing @ rows.view(ctx.n, -1)).view_as(rows)
            to_d.baddbmm_(mixed, flat)
            to_padded[where] += torch.bmm(mixed.mT, d).view_as(x)
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


def _lookup(use: Lookup) -> torch.Tensor:
    """Add the gradients up in a table for each sample."""
    n, _, s, o = use.gradients.shape
    place = use.indices + use.size * torch.arange(n, device=use.indices.device)[:, None]
    rows = use.gradients.new_zeros(n * use.size, o).index_add(0, place.reshape(-1), use.gradients.reshape(n * s, o))
    rows = rows.view(n, -1)
    return symmetric_product(rows, rows)


def _head(use: Any, head: int) -> Any:
    return replace(use, gradients=use.gradients[:, head : head + 1])


def _sum_of(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
