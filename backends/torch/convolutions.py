"""Contractions of convolutions, by the cheapest of four ways: pairs of positions or rows, each for few channels and for many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import torch
from torch.nn import functional

from mgs_core import contraction as core
from mgs_core._protocol import Convolution, Outer, Rows

from .products import Buffers, add_gram, differentiated_once, full_precision, on_host, recorded, room

#: Elements of one sample's gradient up to which a convolution in groups, a group for each sample, is fastest (on CPU).
_GROUPED = 1 << 16
#: Elements of all patches up to which cutting them out is faster still.
_UNFOLDED = 1 << 17
#: Elements of the products of positions that are made at a time, chosen to stay in the processor's cache.
_PRODUCTS = 1 << 19
#: How much larger than the gradients at the output rows may be that are kept in their place.
_KEPT = 3


def of_convolution(use: Convolution) -> torch.Tensor | None:
    """Return the contribution of a convolution to the kernel of a batch with itself; None for what the core does as well."""
    n, k, s, groups, o = use.gradients.shape[:5]
    i, positions, window = use.images.shape[3], prod(use.gradients.shape[5:]), prod(use.window)
    if s > 1 or any(before != after for before, after in use.pads):
        return None
    shifted = all(stride == 1 for stride in use.strides)
    per_pair = i + k * o + 60 + 10 * window if shifted else i * window + k * o + 60
    pairwise = groups * (n * positions) ** 2 * per_pair
    rows = k * groups * i * window * o * n * (positions + n + 30)
    unfolds = n * groups * i * window * positions <= room(use.images, _UNFOLDED)
    if pairwise <= rows and shifted and (on_host(use.images) or not unfolds):
        return recorded(_ShiftedKernel, use, use.images, use.gradients)
    if pairwise <= rows or unfolds:
        unfolded = _unfolded(use)
        found: torch.Tensor = core.contribution(unfolded, unfolded)
        return found
    function = _GroupedKernel if groups * i * o * window <= _GROUPED and on_host(use.images) else _OffsetKernel
    by_head = use.gradients.split(1, dim=1) if k > 1 else [use.gradients]
    parts = [recorded(function, use, use.images.flatten(0, 3), gradients.flatten(0, 4)) for gradients in by_head]
    return sum(parts[1:], start=parts[0])


def kept_rows(use: Convolution) -> Rows | None:
    """Return rows in place of the statistics where they are made anyway and take no more than some times the memory."""
    n, k, s, groups, o = use.gradients.shape[:5]
    i, positions, window = use.images.shape[3], prod(use.gradients.shape[5:]), prod(use.window)
    small = groups * i * o * window <= _GROUPED and i * window <= _KEPT * positions and on_host(use.images)
    if not small or k * s > 1 or use.view[:-1] or any(before != after for before, after in use.pads):
        return None
    rows = _grouped_rows(use, use.images.flatten(0, 3), use.gradients.flatten(0, 4))
    return Rows(use.parameter, rows.reshape(n, 1, -1))


def patches(x: torch.Tensor, window: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> torch.Tensor:
    """Return the windows of images, (n, channels, *window, *output positions), as a view."""
    for axis, (width, stride, dilation) in enumerate(zip(window, strides, dilations, strict=True), start=2):
        x = x.unfold(axis, dilation * (width - 1) + 1, stride)[..., ::dilation]
    rank = len(window)
    return x.permute(0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank))


def _unfolded(use: Convolution) -> Outer:
    """Take the patches from the images."""
    n, k, _, groups, o = use.gradients.shape[:5]
    widths = [width for pair in reversed(use.pads) for width in pair]
    x = use.images.flatten(1, 3)
    x = functional.pad(x, widths) if any(widths) else x
    cut = _pixel_by_pixel if on_host(x) and prod(use.window) > 1 else _along_images
    return Outer(use.parameter, use.gradients.reshape(n, k, groups, o, -1).mT, inputs=cut(use, x, groups))


def _along_images(use: Convolution, x: torch.Tensor, groups: int) -> torch.Tensor:
    """Return patches, (n, groups, positions, channels · window), as a device reads and writes them at once."""
    cut = patches(x, use.window, use.strides, use.dilations)
    return cut.reshape(len(x), groups, -1, prod(use.gradients.shape[5:])).mT


def _pixel_by_pixel(use: Convolution, x: torch.Tensor, groups: int) -> torch.Tensor:
    """Return patches, (n, groups, positions, window · channels), by one operation with a derivative of one."""
    x = x.movedim(1, -1)
    pixels = torch.arange(prod(x.shape[:-1]), device=x.device).view(x.shape[:-1])
    for axis, (width, stride, dilation) in enumerate(zip(use.window, use.strides, use.dilations, strict=True), start=1):
        pixels = pixels.unfold(axis, dilation * (width - 1) + 1, stride)[..., ::dilation]
    cut = x.reshape(-1, x.shape[-1]).index_select(0, pixels.flatten())
    return cut.view(len(x), -1, prod(use.window), groups, x.shape[-1] // groups).permute(0, 3, 1, 2, 4).flatten(3)


class _ShiftedKernel(torch.autograd.Function):
    """Kernel of a convolution whose window moves by single pixels, by pairs of positions.

    The product of two patches is the sum, over the window, of products of pixels, `A_(as)(bt) = Σ_w P_(a,s+w)(b,t+w)`, and these
    serve other pairs too: so the products of all pixels are made once, and added up shifted.
    """

    @staticmethod
    def forward(ctx: Any, use: Convolution, images: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        ctx.use = replace(use, gradients=None, images=None, restore=None)
        ctx.save_for_backward(images, gradients)
        x, d = _positions_first(images), _positions_first(gradients.squeeze(2))
        n, positions = len(images), prod(gradients.shape[5:])
        kernel = d.new_empty(n, n)
        for samples in _tiles(d):
            inner, outer = _pairs(ctx.use, x, d, samples)
            kernel[samples] = inner.mul_(outer).view(-1, samples.stop - samples.start, positions, n).sum((0, 2))
        return kernel

    @staticmethod
    @differentiated_once
    @full_precision
    def backward(ctx: Any, *gradients_out: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        images, gradients = ctx.saved_tensors
        mixing = gradients_out[0] + gradients_out[0].T
        x, d = _positions_first(images), _positions_first(gradients.squeeze(2))
        to_x, to_d = torch.empty_like(x), torch.empty_like(d)
        for samples in _tiles(d):
            inner, outer = _pairs(ctx.use, x, d, samples)
            factor = mixing[samples].view(-1, *(1 for _ in ctx.use.window), len(mixing))
            to_d[..., samples, :] = _applied(inner.mul_(factor), d)
            outer.mul_(factor)
            spread = outer.new_zeros(*x.shape[:-2], samples.stop - samples.start, *x.shape[1:-1])
            for place, pixels in _meetings(ctx.use, x, d):
                spread[pixels] += outer[place]
            to_x[..., samples, :] = _applied(spread, x)
        return None, _positions_last(to_x, images), _positions_last(to_d, gradients.squeeze(2)).unsqueeze(2)


def _positions_first(array: torch.Tensor) -> torch.Tensor:
    """Arrange (n, h, groups, c, *positions) to (groups, *positions, n, h·c): a shift moves all samples alike."""
    return array.permute(2, *range(4, array.ndim), 0, 1, 3).flatten(-2).contiguous()


def _positions_last(array: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Arrange it back."""
    last = array.ndim - 1
    array = array.view(*array.shape[:-1], like.shape[1], like.shape[3])
    return array.permute(last - 1, last, 0, last + 1, *range(1, last - 1))


def _tiles(d: torch.Tensor) -> list[slice]:
    """Divide the samples so that the products of all their positions with all others are few enough."""
    n, positions = d.shape[-2], prod(d.shape[1:-2])
    step = max(1, room(d, _PRODUCTS) // (len(d) * positions**2 * n))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _pairs(use: Convolution, x: torch.Tensor, d: torch.Tensor, samples: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return products of patches and of gradients, (groups, *out, some samples, *out, n)."""
    pixels, outer = (_products(array[..., samples, :], array) for array in (x, d))
    inner = torch.zeros_like(outer)
    for place, at in _meetings(use, x, d):
        inner[place] += pixels[at]
    return inner, outer


def _products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the products (groups, *positions, some samples, *positions, n)."""
    products = torch.bmm(left.flatten(1, -2), right.flatten(1, -2).mT)
    return products.view(*left.shape[:-1], *right.shape[1:-1])


def _applied(products: torch.Tensor, array: torch.Tensor) -> torch.Tensor:
    """Return `products @ array`, (groups, *positions, some samples, c)."""
    lead = products.shape[: array.ndim - 1]
    return torch.bmm(products.view(len(array), prod(lead[1:]), -1), array.flatten(1, -2)).view(*lead, -1)


def _meetings(use: Convolution, x: torch.Tensor, d: torch.Tensor) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Yield, for each element of the window, the pairs of output positions at which it is within the image, and its pixels."""
    every = slice(None)
    for offset in product(*map(range, use.window)):
        places, pixels = [], []
        for at, dilation, (before, _), length, out in zip(
            offset, use.dilations, use.pads, x.shape[1:], d.shape[1:], strict=False
        ):
            shift = at * dilation - before
            start, stop = max(0, -shift), min(out, length - shift)
            places.append(slice(start, max(start, stop)))
            pixels.append(slice(start + shift, max(start, stop) + shift))
        yield (every, *places, every, *places, every), (every, *pixels, every, *pixels, every)


class _GroupedKernel(torch.autograd.Function):
    """Kernel of a convolution's rows, which its own gradient in the weight makes: a group for each sample."""

    @staticmethod
    def forward(ctx: Any, use: Convolution, images: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        rows = _grouped_rows(use, images, gradients)
        ctx.settings = _in_groups(use)
        ctx.shape = (-1, use.images.shape[3], *use.window)
        ctx.save_for_backward(images, gradients, rows)
        return rows @ rows.T

    @staticmethod
    @differentiated_once
    @full_precision
    def backward(ctx: Any, *gradients_out: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        images, gradients, rows = ctx.saved_tensors
        mixed = ((gradients_out[0] + gradients_out[0].T) @ rows).view(ctx.shape)
        to_gradients = torch.convolution(images[None], mixed, None, *ctx.settings)[0]
        to_images = torch.ops.aten.convolution_backward(
            gradients[None], images[None], mixed, None, *ctx.settings, [True, False, False]
        )[0][0]
        return None, to_images, to_gradients


def _grouped_rows(use: Convolution, images: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """Return rows (n, p) in the order of the weight, (groups, o, i, *window)."""
    weights = images.new_empty(1).expand(len(gradients), use.images.shape[3], *use.window)
    settings = _in_groups(use)
    rows: torch.Tensor = torch.ops.aten.convolution_backward(
        gradients[None], images[None], weights, None, *settings, [False, True, False]
    )[1]
    return rows.reshape(len(use.images), -1)


def _in_groups(use: Convolution) -> tuple[Any, ...]:
    """Return strides, padding, dilations, transposed, output padding, and groups of one convolution for all samples."""
    padding, nothing = [before for before, _ in use.pads], [0] * len(use.window)
    return use.strides, padding, use.dilations, False, nothing, prod(use.images.shape[:3])


class _OffsetKernel(torch.autograd.Function):
    """Kernel of a convolution's rows, one element of the window at a time: then they are the product of a slice and gradients."""

    @staticmethod
    def forward(ctx: Any, use: Convolution, images: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        ctx.use = replace(use, gradients=None, images=None, restore=None)
        ctx.save_for_backward(images, gradients)
        ctx.n, ctx.groups, ctx.o, ctx.i = *(use.gradients.shape[axis] for axis in (0, 3, 4)), use.images.shape[3]
        d, padded = _padded(ctx, images, gradients)
        kernel = d.new_zeros(ctx.n, ctx.n)
        for _, _, rows in _rows_by_offset(ctx, d, padded, gradients.shape[1:], Buffers(d)):
            add_gram(kernel, rows.view(ctx.n, -1))
        return kernel

    @staticmethod
    @differentiated_once
    @full_precision
    def backward(ctx: Any, *gradients_out: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        images, gradients = ctx.saved_tensors
        mixing = gradients_out[0] + gradients_out[0].T
        d, padded = _padded(ctx, images, gradients)
        to_d, to_padded = torch.zeros_like(d), torch.zeros_like(padded)
        buffers = Buffers(d)
        for where, flat, rows in _rows_by_offset(ctx, d, padded, gradients.shape[1:], buffers):
            mixed = buffers.take(2, *rows.shape)
            torch.mm(mixing, rows.view(ctx.n, -1), out=mixed.view(ctx.n, -1))
            to_d.baddbmm_(mixed, flat)
            to_padded[where] += torch.bmm(mixed.mT, d, out=flat).view_as(padded[where])
        for axis, (before, _) in enumerate(ctx.use.pads, start=1):
            to_padded = to_padded.narrow(axis + 1, before, images.shape[axis])
        return None, to_padded.reshape(images.shape), to_d.view_as(gradients)


def _rows_by_offset(
    ctx: Any, d: torch.Tensor, padded: torch.Tensor, out: torch.Size, buffers: Buffers
) -> Iterator[tuple[tuple[Any, ...], torch.Tensor, torch.Tensor]]:
    """Yield for each element of the window what it sees of the padded image, that as (n·g, i, positions), and its rows."""
    for where in _windows(ctx.use, out):
        x = padded[where]
        flat = buffers.take(0, *x.shape).copy_(x).flatten(2)
        yield where, flat, torch.bmm(d, flat.mT, out=buffers.take(1, len(d), ctx.o, ctx.i))


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
