"""Operators that rearrange, join, cut and repeat."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from mgs_core._types import Array, Namespace
from mgs_core.onnx.extensions import extension
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.common import axes_of, axis_of, integers
from mgs_core.onnx.operators.registry import Run, operator
from mgs_core.onnx.tensors import check_size


@operator("Shape", host_result=True)
def shape_of(node: Node, xp: Namespace) -> Run:
    """Return the shape, or a part of it."""
    start, end = node.attributes.get("start", 0), node.attributes.get("end")
    return lambda x: np.asarray(tuple(x.shape)[start:end], dtype=np.int64)


@operator("Size", host_result=True)
def size_of(node: Node, xp: Namespace) -> Run:
    """Return the number of elements."""
    return lambda x: np.asarray(prod(x.shape), dtype=np.int64)


@operator("Reshape", since=5, host=(1,))
def reshape(node: Node, xp: Namespace) -> Run:
    """Reshape; −1 stands for what is left, 0 for the input's own size."""
    keep = not node.attributes.get("allowzero", 0)
    known = integers(node.constants[1]) if 1 in node.constants else None

    def run(x: Array, shape: Array) -> Array:
        wanted = known or integers(shape)
        if keep and 0 in wanted:
            if any(size == 0 and at >= x.ndim for at, size in enumerate(wanted)):
                raise node.damaged(f"copies an axis that its input {tuple(x.shape)} lacks: {list(wanted)}")
            wanted = tuple(x.shape[at] if size == 0 else size for at, size in enumerate(wanted))
        return xp.reshape(x, wanted)

    return run


@operator("Flatten")
def flatten(node: Node, xp: Namespace) -> Run:
    """Reshape to a matrix."""
    axis = node.attributes["axis"]

    def run(x: Array) -> Array:
        cut = axis if axis == x.ndim else axis_of(axis, x.ndim, node)
        return xp.reshape(x, (prod(x.shape[:cut]), prod(x.shape[cut:])))

    return run


@operator("Squeeze", since=13, host=(1,))
def squeeze(node: Node, xp: Namespace) -> Run:
    """Drop axes of length 1."""
    return lambda x, axes=None: _squeeze(node, xp, x, None if axes is None else integers(axes))


@operator("Squeeze", since=1)
def squeeze_by_attribute(node: Node, xp: Namespace) -> Run:
    """Drop axes of length 1, named by an attribute."""
    return lambda x: _squeeze(node, xp, x, node.attributes.get("axes"))


def _squeeze(node: Node, xp: Namespace, x: Array, axes: Any) -> Array:
    chosen = [at for at, size in enumerate(x.shape) if size == 1] if axes is None else axes_of(axes, x.ndim, node)
    if any(x.shape[at] != 1 for at in chosen):
        raise node.damaged(f"drops the axes {list(chosen)} of a tensor {tuple(x.shape)}")
    return xp.reshape(x, tuple(size for at, size in enumerate(x.shape) if at not in chosen))


@operator("Unsqueeze", since=13, host=(1,))
def unsqueeze(node: Node, xp: Namespace) -> Run:
    """Insert axes of length 1."""
    known = integers(node.constants[1]) if 1 in node.constants else None
    return lambda x, axes: _unsqueeze(node, xp, x, known or integers(axes))


@operator("Unsqueeze", since=1)
def unsqueeze_by_attribute(node: Node, xp: Namespace) -> Run:
    """Insert axes of length 1, named by an attribute."""
    return lambda x: _unsqueeze(node, xp, x, node.attributes["axes"])


def _unsqueeze(node: Node, xp: Namespace, x: Array, axes: Any) -> Array:
    rank = x.ndim + len(axes)
    places = axes_of(axes, rank, node)
    rest = iter(x.shape)
    return xp.reshape(x, tuple(1 if at in places else next(rest) for at in range(rank)))


@operator("Transpose")
def transpose(node: Node, xp: Namespace) -> Run:
    """Permute the axes; by default reverse them."""
    order = node.attributes.get("perm")

    def run(x: Array) -> Array:
        chosen = axes_of(order, x.ndim, node) if order is not None else tuple(range(x.ndim))[::-1]
        return xp.permute_dims(x, chosen)

    return run


@operator("Concat", since=4)
def concat(node: Node, xp: Namespace) -> Run:
    """Join along an axis."""
    axis = node.attributes["axis"]
    return lambda *parts: xp.concat(list(parts), axis=axis_of(axis, parts[0].ndim, node))


@operator("CenterCropPad", since=18, host=(1,))
def center_crop_pad(node: Node, xp: Namespace) -> Run:
    """Cut the middle out along axes that are too long, and put zeros around along those that are too short."""

    def run(x: Array, shape: Array) -> Array:
        given, wanted = node.attributes.get("axes"), integers(shape)
        axes = axes_of(range(x.ndim) if given is None else given, x.ndim, node)
        if len(axes) != len(wanted):
            raise node.damaged(f"has a shape {list(wanted)} for {len(axes)} axes")
        kept, widths = [slice(None)] * x.ndim, [(0, 0)] * x.ndim
        for axis, size in zip(axes, wanted, strict=True):
            spare = x.shape[axis] - size
            kept[axis] = slice(spare // 2, spare // 2 + size) if spare > 0 else slice(None)
            widths[axis] = (-spare // 2, -spare - (-spare // 2)) if spare < 0 else (0, 0)
        check_size(tuple(max(sum(pair), 0) + size for pair, size in zip(widths, x.shape, strict=True)), str(node))
        return extension(xp, "pad")(x[tuple(kept)], tuple(widths))

    return run


@operator("Split", since=2, many=True)
def split_by_attribute(node: Node, xp: Namespace) -> Run:
    """Cut along an axis into parts named by an attribute, or equal ones."""
    return lambda x: _split(node, x, node.attributes.get("split"))


@operator("Split", since=13, host=(1,), many=True)
def split(node: Node, xp: Namespace) -> Run:
    """Cut along an axis into parts named by an input, or equal ones, the last smaller."""
    return lambda x, sizes=None: _split(node, x, None if sizes is None else integers(sizes))


def _split(node: Node, x: Array, sizes: Any) -> list[Array]:
    axis = axis_of(node.attributes["axis"], x.ndim, node)
    if sizes is None:
        count = node.attributes.get("num_outputs") or len(node.outputs)
        step = -(-x.shape[axis] // count)
        sizes = [max(0, min(step, x.shape[axis] - at * step)) for at in range(count)]
    if sum(sizes) != x.shape[axis] or min(sizes, default=0) < 0 or len(sizes) < len(node.outputs):
        raise node.damaged(f"cuts the axis {axis} of a tensor {tuple(x.shape)} into {list(sizes)}")
    starts = np.cumsum([0, *sizes]).tolist()
    front = (slice(None),) * axis
    return [x[(*front, slice(start, start + size), ...)] for start, size in zip(starts, sizes, strict=False)]


@operator("Expand", since=8, host=(1,))
def expand(node: Node, xp: Namespace) -> Run:
    """Repeat axes of length 1 by broadcasting."""

    def run(x: Array, shape: Array) -> Array:
        wanted = np.broadcast_shapes(tuple(x.shape), integers(shape))
        check_size(wanted, str(node))
        return xp.broadcast_to(x, wanted)

    return run


@operator("Tile", since=6, host=(1,))
def tile(node: Node, xp: Namespace) -> Run:
    """Repeat the whole along each axis."""

    def run(x: Array, repeats: Array) -> Array:
        counts = integers(repeats)
        if len(counts) != x.ndim or min(counts, default=0) < 0:
            raise node.damaged(f"repeats a tensor {tuple(x.shape)} by {list(counts)}")
        check_size(tuple(size * count for size, count in zip(x.shape, counts, strict=True)), str(node))
        for axis, count in enumerate(counts):
            if count != 1:
                front, size, back = tuple(x.shape[:axis]), x.shape[axis], tuple(x.shape[axis + 1 :])
                wide = xp.broadcast_to(xp.expand_dims(x, axis=axis), (*front, count, size, *back))
                x = xp.reshape(wide, (*front, count * size, *back))
        return x

    return run


@operator("DepthToSpace")
def depth_to_space(node: Node, xp: Namespace) -> Run:
    """Move blocks of channels into space."""
    block, column = node.attributes["blocksize"], node.attributes.get("mode", "DCR") == "DCR"

    def run(x: Array) -> Array:
        n, channels, height, width = x.shape
        rest = channels // (block * block)
        if column:
            x = xp.permute_dims(xp.reshape(x, (n, block, block, rest, height, width)), (0, 3, 4, 1, 5, 2))
        else:
            x = xp.permute_dims(xp.reshape(x, (n, rest, block, block, height, width)), (0, 1, 4, 2, 5, 3))
        return xp.reshape(x, (n, rest, height * block, width * block))

    return _blocks(node, block, run)


@operator("SpaceToDepth")
def space_to_depth(node: Node, xp: Namespace) -> Run:
    """Move blocks of space into channels."""
    block, column = node.attributes["blocksize"], node.attributes.get("mode", "DCR") == "DCR"

    def run(x: Array) -> Array:
        n, channels, height, width = x.shape
        x = xp.reshape(x, (n, channels, height // block, block, width // block, block))
        x = xp.permute_dims(x, (0, 3, 5, 1, 2, 4) if column else (0, 1, 3, 5, 2, 4))
        return xp.reshape(x, (n, channels * block * block, height // block, width // block))

    return _blocks(node, block, run)


def _blocks(node: Node, block: int, run: Run) -> Run:
    if block < 1:
        raise node.damaged(f"has blocksize {block}")
    return run
