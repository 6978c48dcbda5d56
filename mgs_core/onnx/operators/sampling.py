"""Operators that read between pixels: GridSample and DeformConv."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np

from mgs_core._types import Array, Namespace
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.common import native_dtype
from mgs_core.onnx.operators.indexing import take_along
from mgs_core.onnx.operators.registry import Run, operator
from mgs_core.onnx.operators.windows import declared, pads_of
from mgs_core.onnx.tensors import check_size

_MODES = {"bilinear": "linear", "bicubic": "cubic", "linear": "linear", "cubic": "cubic", "nearest": "nearest"}
_CUBIC = -0.75


@operator("GridSample", since=16)
def grid_sample(node: Node, xp: Namespace) -> Run:
    """Read an image at places that are given from −1 to 1, the last axis first."""
    mode, padding = _MODES.get(node.attributes["mode"], ""), node.attributes["padding_mode"]
    corners = bool(node.attributes["align_corners"])
    if not mode or padding not in ("zeros", "border", "reflection"):
        raise node.damaged(f"has mode {node.attributes['mode']!r} and padding_mode {padding!r}")

    def run(x: Array, grid: Array) -> Array:
        space = tuple(x.shape[2:])
        if len(space) < 1 or grid.ndim != x.ndim or grid.shape[-1] != len(space) or grid.shape[0] != x.shape[0]:
            raise node.damaged(f"cannot sample {tuple(x.shape)} at a grid {tuple(grid.shape)}")
        out = tuple(grid.shape[1:-1])
        check_size((*x.shape[:2], *out), str(node))
        places = []
        for axis, size in enumerate(space):
            unit = xp.reshape(grid[..., len(space) - 1 - axis], (x.shape[0], 1, prod(out)))
            places.append((unit + 1.0) * ((size - 1) / 2.0) if corners else ((unit + 1.0) * size - 1.0) / 2.0)
        y = _sample(xp, x, places, mode, padding, corners=corners)
        return xp.reshape(y, (*x.shape[:2], *out))

    return run


@operator("DeformConv", since=19)
def deform_conv(node: Node, xp: Namespace) -> Run:
    """Correlate with a window whose places are moved by offsets and weighted by a mask."""
    groups, offset_groups = node.attributes["group"], node.attributes["offset_group"]
    if groups < 1 or offset_groups < 1:
        raise node.damaged(f"has {groups} groups and {offset_groups} groups of offsets")

    def run(x: Array, weight: Array, offset: Array, bias: Array = None, mask: Array = None) -> Array:
        if x.ndim != 4 or weight.ndim != 4 or offset.ndim != 4:
            raise node.unsupported("is not two-dimensional", "Export with Conv.")
        (n, channels, *space), (o, per_group, *window), positions = x.shape, weight.shape, offset.shape[2:]
        points = prod(window)
        strides, dilations = declared(node, "strides", (1, 1)), declared(node, "dilations", (1, 1))
        pads = pads_of(node, 2)
        fits = channels == per_group * groups and o % groups == 0 and channels % offset_groups == 0
        if not fits or offset.shape[1] != 2 * offset_groups * points:
            raise node.damaged(f"cannot correlate {tuple(x.shape)} with {tuple(weight.shape)} at offsets {tuple(offset.shape)}")
        check_size((n, channels, points, *positions), str(node))
        moved = xp.reshape(offset, (n * offset_groups, points, 2, prod(positions)))
        steps = np.stack(np.meshgrid(*(np.arange(size) for size in window), indexing="ij")).reshape(2, points, 1)
        starts = np.stack(np.meshgrid(*(np.arange(size) for size in positions), indexing="ij")).reshape(2, 1, -1)
        places = []
        for axis in range(2):
            fixed = steps[axis] * dilations[axis] + starts[axis] * strides[axis] - pads[axis][0]
            place = moved[:, :, axis, :] + xp.astype(xp.asarray(fixed), offset.dtype)
            places.append(xp.reshape(place, (n * offset_groups, 1, -1)))
        parts = xp.reshape(x, (n * offset_groups, channels // offset_groups, *space))
        patches = xp.reshape(_sample(xp, parts, places, "linear", "zeros", corners=True), (n, channels, points, *positions))
        if mask is not None:
            weights = xp.reshape(mask, (n, offset_groups, 1, points, *positions))
            grouped = xp.reshape(patches, (n, offset_groups, channels // offset_groups, points, *positions))
            patches = grouped * weights
        patches = xp.reshape(patches, (n, groups, per_group * points, prod(positions)))
        mixed = xp.matmul(xp.reshape(weight, (groups, o // groups, per_group * points)), patches)
        y = xp.reshape(mixed, (n, o, *positions))
        return y if bias is None else y + xp.reshape(bias, (1, -1, 1, 1))

    return run


def _sample(xp: Namespace, x: Array, places: Sequence[Array], mode: str, padding: str, *, corners: bool) -> Array:
    """Interpolate x (n, i, *space) at places, one array (n, 1, p) for each spatial axis, in pixels: (n, i, p)."""
    space, count = tuple(x.shape[2:]), places[0].shape[2]
    integer = native_dtype(xp, "int64")
    pixels = [
        _pixels(xp, place, size, mode, padding, corners, integer, x.dtype) for place, size in zip(places, space, strict=True)
    ]
    strides = [prod(space[axis + 1 :]) for axis in range(len(space))]
    flat = xp.reshape(x, (*x.shape[:2], prod(space)))
    total = None
    for chosen in product(*pixels):
        at, share = 0, 1.0
        for (index, weight), stride in zip(chosen, strides, strict=True):
            at, share = at + index * stride, share * weight
        part = take_along(xp, flat, xp.broadcast_to(at, (*x.shape[:2], count)), 2) * share
        total = part if total is None else total + part
    return total


def _pixels(
    xp: Namespace, place: Array, size: int, mode: str, padding: str, corners: bool, integer: Any, dtype: Any
) -> list[tuple[Array, Array]]:
    """Return the pixels along an axis that make a place, each with its share; of pixels outside, the share is 0."""
    low, high = (0.0, size - 1.0) if corners else (-0.5, size - 0.5)
    place = xp.round(place) if mode == "nearest" else place
    beyond = xp.logical_or(place < low, place > high)
    if padding == "border":
        place = xp.where(beyond, _between(xp, place, 0.0, size - 1.0), place)
    elif padding == "reflection":
        place = xp.where(beyond, _reflected(xp, place, low, high), place)
    place = _between(xp, place, -3.0, size + 2.0)  # all of it is outside there
    first = xp.floor(place)
    part = place - first
    if mode == "nearest":
        shares = {0: xp.ones_like(part)}
    elif mode == "linear":
        shares = {0: 1.0 - part, 1: part}
    else:
        shares = {
            -1: _cubic(part + 1.0, near=False), 0: _cubic(part, near=True),
            1: _cubic(1.0 - part, near=True), 2: _cubic(2.0 - part, near=False),
        }  # fmt: skip
    found = []
    for step, share in shares.items():
        index = first + step
        if padding == "zeros":
            share = xp.where(xp.logical_or(index < 0, index > size - 1), xp.zeros_like(share), share)
        elif padding == "reflection":
            index = xp.floor(_reflected(xp, index, low, high) + 0.25)
        index = _between(xp, index, 0.0, size - 1.0)
        found.append((xp.astype(index, integer), xp.astype(share, dtype)))
    return found


def _between(xp: Namespace, x: Array, low: float, high: float) -> Array:
    return xp.minimum(xp.maximum(x, xp.full_like(x, low)), xp.full_like(x, high))


def _reflected(xp: Namespace, place: Array, low: float, high: float) -> Array:
    width = high - low
    if width == 0:
        return xp.full_like(place, low)
    turned = place - low - 2 * width * xp.floor((place - low) / (2 * width))
    return low + width - xp.abs(turned - width)


def _cubic(distance: Array, *, near: bool) -> Array:
    """Return the share of a pixel at most 1 away (near), or from 1 to 2."""
    if near:
        return ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance * distance + 1.0
    return ((_CUBIC * distance - 5 * _CUBIC) * distance + 8 * _CUBIC) * distance - 4 * _CUBIC
