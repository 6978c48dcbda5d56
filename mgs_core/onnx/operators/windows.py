"""Convolution and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import array_api_compat.numpy as host_namespace
import numpy as np

from mgs_core._types import Array, Namespace
from mgs_core.onnx.extensions import extension, lowest, portable
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.common import integers, native_dtype, root
from mgs_core.onnx.operators.registry import Run, operator
from mgs_core.onnx.tensors import check_size

Pairs = list[tuple[int, int]]


@operator("Conv")
def conv(node: Node, xp: Namespace) -> Run:
    """Correlate with a window, in groups."""
    product, groups = extension(xp, "convolution"), node.attributes["group"]
    if groups < 1:
        raise node.damaged(f"has {groups} groups")

    def run(x: Array, weight: Array, bias: Array = None) -> Array:
        rank = _rank(node, x)
        if weight.ndim != x.ndim or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
            raise node.damaged(f"cannot correlate {tuple(x.shape)} with a weight {tuple(weight.shape)} in {groups} groups")
        window = declared(node, "kernel_shape", tuple(weight.shape[2:]))
        if window != tuple(weight.shape[2:]):
            raise node.damaged(f"declares the window {window} for a weight {tuple(weight.shape)}")
        strides, dilations = declared(node, "strides", (1,) * rank), declared(node, "dilations", (1,) * rank)
        pads = _pads(node, tuple(x.shape[2:]), window, strides, dilations)
        _positions(node, tuple(x.shape), window, strides, pads, dilations)
        y = product(x, weight, strides=strides, pads=tuple(pads), dilations=dilations, groups=groups)
        return y if bias is None else y + xp.reshape(bias, (1, -1, *(1,) * rank))

    return run


@operator("ConvTranspose")
def conv_transpose(node: Node, xp: Namespace) -> Run:
    """Apply the adjoint of a convolution."""
    product, groups = extension(xp, "convolution_transpose"), node.attributes["group"]
    automatic = node.attributes["auto_pad"]
    if groups < 1:
        raise node.damaged(f"has {groups} groups")

    def run(x: Array, weight: Array, bias: Array = None) -> Array:
        rank = _rank(node, x)
        if weight.ndim != x.ndim or x.shape[1] != weight.shape[0] or weight.shape[0] % groups:
            raise node.damaged(f"cannot spread {tuple(x.shape)} with a weight {tuple(weight.shape)} in {groups} groups")
        window = tuple(weight.shape[2:])
        ones, zeros = (1,) * rank, (0,) * rank
        strides, dilations = declared(node, "strides", ones), declared(node, "dilations", ones)
        extra = declared(node, "output_padding", zeros, least=0)
        full = [s * (size - 1) + d * (w - 1) + 1 for size, s, d, w in zip(x.shape[2:], strides, dilations, window, strict=True)]
        wanted = node.attributes.get("output_shape")
        if wanted is None and automatic in ("SAME_UPPER", "SAME_LOWER"):
            wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
        if wanted is not None:
            total = [f + e - w for f, e, w in zip(full, extra, wanted[-rank:], strict=True)]
            upper = automatic == "SAME_UPPER"
            pads = [(t // 2, t - t // 2) if upper else (t - t // 2, t // 2) for t in total]
        elif automatic == "VALID" or "pads" not in node.attributes:
            pads = [(0, 0)] * rank
        else:
            pads = pads_of(node, rank)
        out = [f + e - before - after for f, e, (before, after) in zip(full, extra, pads, strict=True)]
        check_size((x.shape[0], weight.shape[1] * groups, *out), str(node))
        y = product(x, weight, strides=strides, pads=tuple(pads), dilations=dilations, groups=groups, output_padding=extra)
        return y if bias is None else y + xp.reshape(bias, (1, -1, *(1,) * rank))

    return run


@operator("MaxPool", many=True)
def max_pool(node: Node, xp: Namespace) -> Run:
    """Return the greatest of each window, and its place in the flattened input."""
    pool = extension(xp, "max_pool")

    def run(x: Array) -> list[Array]:
        window, strides, pads, dilations = _window(node, x)
        options: dict[str, Any] = {"strides": strides, "pads": tuple(pads), "dilations": dilations}
        y = pool(x, window=window, **options)
        return [y, _places_of_maxima(node, xp, x, window, **options)] if node.wants(1) else [y]

    return run


def _places_of_maxima(
    node: Node, xp: Namespace, x: Array, window: Sequence[int], strides: Sequence[int], pads: Sequence[tuple[int, int]],
    dilations: Sequence[int],
) -> Array:  # fmt: skip
    space, rank = tuple(x.shape[2:]), len(window)
    numbers = np.arange(prod(space)).reshape(space)
    if node.attributes.get("storage_order", 0):  # counted along the first axis
        numbers = np.arange(prod(space)).reshape(space[::-1]).T
    numbers = np.pad(numbers, pads, constant_values=-1)
    table = portable(host_namespace, "patches")(numbers[None, None], window, strides, dilations)
    shape = tuple(table.shape[2 + rank :])
    filled = extension(xp, "pad")(x, ((0, 0), (0, 0), *pads), value=lowest(xp, x.dtype)) if any(map(any, pads)) else x
    patches = xp.reshape(extension(xp, "patches")(filled, window, strides, dilations), (*x.shape[:2], prod(window), prod(shape)))
    first = xp.argmax(patches, axis=2)  # (n, i, positions)
    where = first * prod(shape) + xp.astype(xp.arange(prod(shape)), first.dtype)
    places = xp.take(xp.asarray(table.reshape(-1)), xp.reshape(where, (-1,)), axis=0)
    images = xp.reshape(xp.arange(prod(x.shape[:2])) * prod(space), (*x.shape[:2], *(1,) * rank))
    dtype = native_dtype(xp, "int64")
    return xp.astype(xp.reshape(places, (*x.shape[:2], *shape)), dtype) + xp.astype(images, dtype)


@operator("MaxUnpool", since=9, host=(2,))
def max_unpool(node: Node, xp: Namespace) -> Run:
    """Put the greatest of each window back to its place among zeros."""
    write = extension(xp, "scatter")

    def run(x: Array, places: Array, shape: Array = None) -> Array:
        rank = _rank(node, x)
        window, strides = declared(node, "kernel_shape", (1,) * rank), declared(node, "strides", (1,) * rank)
        out = [
            (size - 1) * s - sum(pair) + w
            for size, s, w, pair in zip(x.shape[2:], strides, window, pads_of(node, rank), strict=True)
        ]
        full = tuple(x.shape[:2]) + tuple(out)
        check_size(full, str(node))
        zeros = xp.zeros((prod(full),), dtype=x.dtype)
        y = xp.reshape(write(zeros, xp.reshape(places, (-1,)), xp.reshape(x, (-1,)), reduction="none"), full)
        wanted = full if shape is None else integers(shape)
        if len(wanted) != len(full) or any(size < least for size, least in zip(wanted, full, strict=True)):
            raise node.damaged(f"has output_shape {list(wanted)} for {list(full)} numbers")
        check_size(wanted, str(node))
        return extension(xp, "pad")(y, tuple((0, size - least) for size, least in zip(wanted, full, strict=True)))

    return run


@operator("Col2Im", since=18, host=(1, 2))
def col2im(node: Node, xp: Namespace) -> Run:
    """Add windows up to an image: the adjoint of cutting it into windows."""
    spread = extension(xp, "convolution_transpose")

    def run(x: Array, image_shape: Array, block_shape: Array) -> Array:
        image, window = integers(image_shape), integers(block_shape)
        rank = len(image)
        strides, dilations = declared(node, "strides", (1,) * rank), declared(node, "dilations", (1,) * rank)
        pads = pads_of(node, rank)
        check_size(image, str(node))
        positions = _positions(node, (1, 1, *image), window, strides, pads, dilations)
        points = prod(window)
        if x.ndim != 3 or x.shape[1] % points or x.shape[2] != prod(positions):
            raise node.damaged(f"cannot add {tuple(x.shape)} up to images {list(image)} by windows {list(window)}")
        n, channels = x.shape[0], x.shape[1] // points
        rest = [
            size + sum(pair) - (count - 1) * s - d * (w - 1) - 1
            for size, pair, count, s, d, w in zip(image, pads, positions, strides, dilations, window, strict=True)
        ]
        ones = xp.astype(xp.asarray(np.eye(points).reshape(points, 1, *window)), x.dtype)
        windows = xp.reshape(x, (n * channels, points, *positions))
        y = spread(windows, ones, strides=strides, pads=tuple(pads), dilations=dilations, groups=1, output_padding=tuple(rest))
        return xp.reshape(y, (n, channels, *image))

    return run


@operator("AveragePool")
def average_pool(node: Node, xp: Namespace) -> Run:
    """Return the mean of each window."""
    pool, padded = extension(xp, "average_pool"), node.attributes.get("count_include_pad", 0)

    def run(x: Array) -> Array:
        window, strides, pads, dilations = _window(node, x)
        y = pool(x, window=window, strides=strides, pads=tuple(pads), dilations=dilations)
        if not any(map(any, pads)):
            return y
        declared = _window(node, x, ceil=False)[2] if padded else [(0, 0)] * len(window)
        share = _shares(tuple(x.shape[2:]), window, strides, pads, dilations, declared)
        return y if np.all(share == 1.0) else y * xp.astype(xp.asarray(prod(window) / share), y.dtype)

    return run


@operator("LpPool", since=2)
def lp_pool(node: Node, xp: Namespace) -> Run:
    """Return the p-norm of each window."""
    pool, p = extension(xp, "average_pool"), float(node.attributes["p"])

    def run(x: Array) -> Array:
        window, strides, pads, dilations = _window(node, x)
        powers = xp.abs(x) ** p
        means = pool(powers, window=window, strides=strides, pads=tuple(pads), dilations=dilations)
        return root(xp, means * prod(window), p)

    return run


@operator("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(node: Node, xp: Namespace) -> Run:
    """Reduce all spatial axes."""
    p = float(node.attributes.get("p", 2))

    def run(x: Array) -> Array:
        axes = tuple(range(2, x.ndim))
        if node.operator == "GlobalLpPool":
            return root(xp, xp.sum(xp.abs(x) ** p, axis=axes, keepdims=True), p)
        reduce = xp.mean if node.operator == "GlobalAveragePool" else xp.max
        return reduce(x, axis=axes, keepdims=True)

    return run


def _rank(node: Node, x: Array) -> int:
    if x.ndim < 3:
        raise node.damaged(f"takes a tensor of shape {tuple(x.shape)}; samples, channels and space are needed")
    return int(x.ndim - 2)


def declared(node: Node, name: str, default: Sequence[int], *, least: int = 1) -> tuple[int, ...]:
    """Return an attribute of one integer for each spatial axis, or the default; refuse others."""
    values = tuple(node.attributes.get(name) or default)
    if len(values) != len(default) or min(values, default=least) < least:
        raise node.damaged(f"has {name} {list(values)}; {len(default)} integers of at least {least} are needed")
    return values


def pads_of(node: Node, rank: int) -> Pairs:
    """Return the attribute `pads` as pairs (before, after)."""
    pads = node.attributes.get("pads") or [0] * (2 * rank)
    if len(pads) != 2 * rank or min(pads) < 0:
        raise node.damaged(f"has pads {list(pads)}; {2 * rank} integers of at least 0 are needed")
    return list(zip(pads[:rank], pads[rank:], strict=True))


def _pads(node: Node, space: Sequence[int], window: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Pairs:
    automatic = node.attributes.get("auto_pad", "NOTSET")
    if automatic == "NOTSET":
        return pads_of(node, len(window))
    if automatic == "VALID":
        return [(0, 0)] * len(window)
    if automatic not in ("SAME_UPPER", "SAME_LOWER"):
        raise node.damaged(f"has auto_pad {automatic!r}")
    pads = []
    for size, w, s, d in zip(space, window, strides, dilations, strict=True):
        total = max(0, (-(-size // s) - 1) * s + d * (w - 1) + 1 - size)
        small, large = total // 2, total - total // 2
        pads.append((small, large) if automatic == "SAME_UPPER" else (large, small))
    return pads


def _positions(
    node: Node, shape: Sequence[int], window: Sequence[int], strides: Sequence[int], pads: Pairs, dilations: Sequence[int],
    ceil: bool = False,
) -> list[int]:  # fmt: skip
    """Return the number of windows along each axis; refuse none, and more than memory holds."""
    counts = []
    for size, w, s, (before, after), d in zip(shape[2:], window, strides, pads, dilations, strict=True):
        room = size + before + after - d * (w - 1) - 1
        if room < 0:
            raise node.damaged(f"has a window {tuple(window)} that is larger than its input {tuple(shape)} with pads {pads}")
        count = (-(-room // s) if ceil else room // s) + 1
        if ceil and (count - 1) * s >= size + before:  # a window that would start in the padding behind
            count -= 1
        counts.append(count)
    check_size((*shape[:2], *counts, *window), str(node))
    check_size((*shape[:2], *(size + sum(pair) for size, pair in zip(shape[2:], pads, strict=True))), str(node))
    return counts


def _window(node: Node, x: Array, *, ceil: bool = True) -> tuple[tuple[int, ...], tuple[int, ...], Pairs, tuple[int, ...]]:
    """Return window, strides, pads and dilations of a pooling; pads reach further where sizes are rounded up."""
    rank = _rank(node, x)
    window = declared(node, "kernel_shape", (1,) * rank)
    strides, dilations = declared(node, "strides", (1,) * rank), declared(node, "dilations", (1,) * rank)
    pads = _pads(node, tuple(x.shape[2:]), window, strides, dilations)
    up = bool(ceil and node.attributes.get("ceil_mode", 0))
    counts = _positions(node, tuple(x.shape), window, strides, pads, dilations, up)
    if not up:
        return window, strides, pads, dilations
    reached = [
        max(after, (count - 1) * s + d * (w - 1) + 1 - size - before)
        for count, s, d, w, size, (before, after) in zip(counts, strides, dilations, window, x.shape[2:], pads, strict=True)
    ]
    return window, strides, [(before, after) for (before, _), after in zip(pads, reached, strict=True)], dilations


def _shares(
    space: Sequence[int], window: Sequence[int], strides: Sequence[int], pads: Pairs, dilations: Sequence[int], counted: Pairs
) -> Array:
    """Return how many places of each window count: those inside, and those in the `counted` part of the padding."""
    share = np.ones(())
    for size, w, s, (before, after), d, (low, high) in zip(space, window, strides, pads, dilations, counted, strict=True):
        starts = np.arange(0, size + before + after - d * (w - 1), s)
        places = starts[:, None] + d * np.arange(w) - before
        share = share[..., None] * np.sum((places >= -low) & (places < size + high), axis=1)
    return share
