"""Operators that choose elements by position."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from mgs_core._types import Array, Namespace
from mgs_core.onnx.extensions import extension
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.common import axes_of, axis_of, integers, native_dtype
from mgs_core.onnx.operators.registry import Run, operator
from mgs_core.onnx.tensors import check_size


@operator("Gather")
def gather(node: Node, xp: Namespace) -> Run:
    """Look up slices along an axis."""
    axis = node.attributes["axis"]
    known = node.constants.get(1)
    single = int(known) if known is not None and known.ndim == 0 else None
    counted = known is not None and bool(np.all(known >= 0))
    lookup = extension(xp, "lookup")

    def run(data: Array, indices: Array) -> Array:
        place = axis_of(axis, data.ndim, node)
        size = data.shape[place]
        if known is not None and known.size and not (-size <= known.min() and known.max() < size):
            raise node.damaged(f"looks up {known.min()} to {known.max()} on an axis of length {size}")
        if single is not None:
            return data[(*(slice(None),) * place, single % size, ...)]
        if not counted:
            indices = _from_front(xp, indices, size)
        if place == 0:
            return lookup(data, indices)
        taken = xp.take(data, xp.reshape(indices, (-1,)), axis=place)
        return xp.reshape(taken, (*data.shape[:place], *indices.shape, *data.shape[place + 1 :]))

    return run


@operator("GatherElements", since=11)
def gather_elements(node: Node, xp: Namespace) -> Run:
    """Take for each place of the indices the element that differs from it on one axis only."""
    axis = node.attributes["axis"]
    return lambda data, indices: take_along(xp, data, indices, axis_of(axis, data.ndim, node))


@operator("GatherND", since=11)
def gather_nd(node: Node, xp: Namespace) -> Run:
    """Take slices at index tuples."""
    batch = node.attributes.get("batch_dims", 0)

    def run(data: Array, indices: Array) -> Array:
        lead, rest, flat = _tuples(node, xp, data, indices, batch)
        taken = xp.take(xp.reshape(data, (-1,)), xp.reshape(flat, (-1,)), axis=0)
        return xp.reshape(taken, (*lead, *rest))

    return run


@operator("Slice", since=10, host=(1, 2, 3, 4))
def cut(node: Node, xp: Namespace) -> Run:
    """Cut ranges out of axes."""

    def run(x: Array, starts: Array, ends: Array, axes: Array = None, steps: Array = None) -> Array:
        first, last = integers(starts), integers(ends)
        places = range(len(first)) if axes is None else integers(axes)
        return _slice(node, xp, x, first, last, places, (1,) * len(first) if steps is None else integers(steps))

    return run


@operator("Slice", since=1)
def cut_by_attributes(node: Node, xp: Namespace) -> Run:
    """Cut ranges, named by attributes, out of axes."""
    first, last = node.attributes["starts"], node.attributes["ends"]
    places = node.attributes.get("axes") or range(len(first))
    return lambda x: _slice(node, xp, x, first, last, places, (1,) * len(first))


def _slice(node: Node, xp: Namespace, x: Array, starts: Any, ends: Any, axes: Any, steps: Any) -> Array:
    where, turned = [slice(None)] * x.ndim, []
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise node.damaged(f"cuts from {list(starts)} to {list(ends)} in steps of {list(steps)} on the axes {list(axes)}")
    for start, end, axis, step in zip(starts, ends, axes_of(axes, x.ndim, node), steps, strict=True):
        chosen = range(*slice(start, end, step).indices(x.shape[axis]))
        if step > 0:
            where[axis] = slice(chosen.start, max(chosen.start, chosen.stop), step)
        else:  # not every framework steps backwards
            where[axis] = slice(chosen[-1], chosen[0] + 1, -step) if len(chosen) else slice(0, 0)
            turned.append(axis)
    y = x[tuple(where)]
    return xp.flip(y, axis=tuple(turned)) if turned else y


@operator("Compress", since=9, host=(1,))
def compress(node: Node, xp: Namespace) -> Run:
    """Keep the slices where a condition holds."""
    axis = node.attributes.get("axis")

    def run(x: Array, condition: Array) -> Array:
        x = xp.reshape(x, (-1,)) if axis is None else x
        place = 0 if axis is None else axis_of(axis, x.ndim, node)
        return xp.take(x, xp.asarray(np.nonzero(condition[: x.shape[place]])[0]), axis=place)

    return run


@operator("Unique", since=11, host=None, many=True)
def unique(node: Node, xp: Namespace) -> Run:
    """Return what occurs, sorted or in order of first occurrence, with places and counts."""
    axis, in_order = node.attributes.get("axis"), node.attributes["sorted"]

    def run(x: Array) -> list[Array]:
        found, first, inverse, counts = np.unique(x, return_index=True, return_inverse=True, return_counts=True, axis=axis)
        inverse = np.reshape(inverse, (-1,))
        if not in_order:
            order = np.argsort(first, kind="stable")
            found = np.take(found, order, axis=axis or 0)
            first, counts, inverse = first[order], counts[order], np.argsort(order, kind="stable")[inverse]
        return [found, *(part.astype(np.int64) for part in (first, inverse, counts))]

    return run


@operator("NonZero", since=9, host=None)
def nonzero(node: Node, xp: Namespace) -> Run:
    """Return the places of what is not 0."""
    return lambda x: np.asarray(np.nonzero(x), dtype=np.int64)


@operator("ScatterElements", since=11)
@operator("Scatter", since=9)
def scatter_elements(node: Node, xp: Namespace) -> Run:
    """Write elements at places that differ from their own on one axis only."""
    axis, reduction = node.attributes["axis"], node.attributes.get("reduction", "none")
    write = extension(xp, "scatter")

    def run(data: Array, indices: Array, updates: Array) -> Array:
        place = axis_of(axis, data.ndim, node)
        flat = _flat_places(xp, data.shape, indices, place)
        written = write(*(xp.reshape(part, (-1,)) for part in (data, flat, updates)), reduction=reduction)
        return xp.reshape(written, data.shape)

    return run


@operator("ScatterND", since=11)
def scatter_nd(node: Node, xp: Namespace) -> Run:
    """Write slices at index tuples."""
    reduction, write = node.attributes.get("reduction", "none"), extension(xp, "scatter")

    def run(data: Array, indices: Array, updates: Array) -> Array:
        _, _, flat = _tuples(node, xp, data, indices, 0)
        written = write(*(xp.reshape(part, (-1,)) for part in (data, flat, updates)), reduction=reduction)
        return xp.reshape(written, data.shape)

    return run


@operator("OneHot", since=9, host=(1,))
def one_hot(node: Node, xp: Namespace) -> Run:
    """Return `on` at the index and `off` elsewhere, along a new axis."""
    axis = node.attributes["axis"]

    def run(indices: Array, depth: Array, values: Array) -> Array:
        size, place = integers(depth)[0], axis_of(axis, indices.ndim + 1, node)
        check_size((*indices.shape, size), str(node))
        steps = xp.reshape(
            xp.astype(xp.arange(size), indices.dtype), tuple(-1 if at == place else 1 for at in range(indices.ndim + 1))
        )
        return xp.where(xp.expand_dims(_from_front(xp, indices, size), axis=place) == steps, values[1], values[0])

    return run


@operator("TopK", since=10, host=(1,), many=True)
def top_k(node: Node, xp: Namespace) -> Run:
    """Return the k greatest or smallest along an axis, and their places."""
    axis, largest = node.attributes["axis"], node.attributes.get("largest", 1)
    dtype = native_dtype(xp, "int64")

    def run(x: Array, k: Array) -> list[Array]:
        place, count = axis_of(axis, x.ndim, node), integers(k)[0]
        if not 0 <= count <= x.shape[place]:
            raise node.damaged(f"takes {count} of {x.shape[place]} elements")
        order = xp.argsort(x, axis=place, descending=bool(largest), stable=True)
        chosen = order[(*(slice(None),) * place, slice(0, count), ...)]
        return [take_along(xp, x, chosen, place), xp.astype(chosen, dtype)]

    return run


@operator("Trilu", since=14, host=(1,))
def triangle(node: Node, xp: Namespace) -> Run:
    """Keep what is above or below a diagonal."""
    upper = node.attributes["upper"]

    def run(x: Array, k: Array = None) -> Array:
        shift = 0 if k is None else integers(k)[0]
        rows, columns = x.shape[-2:]
        distance = np.arange(columns) - np.arange(rows)[:, None]
        return xp.where(xp.asarray(distance >= shift if upper else distance <= shift), x, xp.zeros_like(x))

    return run


@operator("ReverseSequence", since=10, host=(1,))
def reverse_sequence(node: Node, xp: Namespace) -> Run:
    """Turn the first so many steps of each sequence around."""
    time, batch = node.attributes["time_axis"], node.attributes["batch_axis"]

    def run(x: Array, lengths: Array) -> Array:
        steps = np.arange(x.shape[time])[:, None]
        order = np.where(steps < lengths, np.asarray(lengths) - 1 - steps, steps)  # (time, batch)
        shape = [1] * x.ndim
        shape[time], shape[batch] = x.shape[time], x.shape[batch]
        order = np.broadcast_to((order if time < batch else order.T).reshape(shape), x.shape)
        return take_along(xp, x, xp.asarray(order), time)

    return run


@operator("TensorScatter", since=24)
def tensor_scatter(node: Node, xp: Namespace) -> Run:
    """Write updates into a cache along an axis, from a place of its own for each sample on."""
    circular = node.attributes["mode"] == "circular"
    if node.attributes["mode"] not in ("linear", "circular"):
        raise node.damaged(f"has mode {node.attributes['mode']!r}")

    def run(cache: Array, update: Array, starts: Array = None) -> Array:
        axis = axis_of(node.attributes["axis"], cache.ndim, node)
        size, count = cache.shape[axis], update.shape[axis]
        if axis == 0 or not 0 < count <= size:
            raise node.damaged(f"writes {tuple(update.shape)} along the axis {axis} of {tuple(cache.shape)}")
        steps = xp.reshape(xp.arange(size), tuple(-1 if at == axis else 1 for at in range(cache.ndim)))
        first = xp.zeros_like(steps) if starts is None else xp.reshape(starts, (-1, *(1,) * (cache.ndim - 1)))
        source = xp.astype(steps, first.dtype) - first
        source = source % size if circular else source
        inside = xp.logical_and(source >= 0, source < count)
        chosen = xp.broadcast_to(xp.where(inside, source, xp.zeros_like(source)), cache.shape)
        return xp.where(inside, take_along(xp, update, chosen, axis), cache)

    return run


@operator("Pad", since=2)
def pad_by_attributes(node: Node, xp: Namespace) -> Run:
    """Add values, named by attributes, around a tensor."""
    return lambda x: _pad(node, xp, x, node.attributes["pads"], node.attributes["value"], range(x.ndim))


@operator("Pad", since=11, host=(1, 2, 3))
def pad(node: Node, xp: Namespace) -> Run:
    """Add values around a tensor."""

    def run(x: Array, pads: Array, value: Array = None, axes: Array = None) -> Array:
        filler = 0 if value is None else np.asarray(value).reshape(-1)[0].item() if np.size(value) else 0
        return _pad(node, xp, x, integers(pads), filler, range(x.ndim) if axes is None else integers(axes))

    return run


def _pad(node: Node, xp: Namespace, x: Array, pads: Any, value: Any, axes: Any) -> Array:
    places, mode = axes_of(axes, x.ndim, node), node.attributes["mode"]
    if len(pads) != 2 * len(places):
        raise node.damaged(f"has {len(pads)} pads for {len(places)} axes")
    widths = [(0, 0)] * x.ndim
    for at, axis in enumerate(places):
        widths[axis] = (pads[at], pads[at + len(places)])
    sizes = [size + before + after for size, (before, after) in zip(x.shape, widths, strict=True)]
    check_size(tuple(sizes), str(node))
    if mode == "constant":
        grown = tuple((max(before, 0), max(after, 0)) for before, after in widths)
        x = extension(xp, "pad")(x, grown, value=value) if any(map(any, grown)) else x
        kept = [
            slice(max(-before, 0), size + max(before, 0) + max(after, 0) - max(-after, 0))
            for size, (before, after) in zip((s - sum(g) for s, g in zip(x.shape, grown, strict=True)), widths, strict=True)
        ]
        return x[tuple(kept)] if any(min(pair) < 0 for pair in widths) else x
    if mode not in ("reflect", "edge", "wrap"):
        raise node.damaged(f"has mode {mode!r}")
    for axis, (before, after) in enumerate(widths):
        if before or after:
            steps = np.pad(np.arange(x.shape[axis]), (max(before, 0), max(after, 0)), mode=mode)
            steps = steps[max(-before, 0) : len(steps) - max(-after, 0)]
            x = xp.take(x, xp.asarray(steps), axis=axis)
    return x


def _from_front(xp: Namespace, indices: Array, size: int) -> Array:
    return xp.where(indices < 0, indices + size, indices)


def take_along(xp: Namespace, data: Array, indices: Array, axis: int) -> Array:
    """Return the elements that `indices`, of the data's rank, names along an axis."""
    flat = xp.reshape(_flat_places(xp, data.shape, indices, axis), (-1,))
    return xp.reshape(xp.take(xp.reshape(data, (-1,)), flat, axis=0), indices.shape)


def _flat_places(xp: Namespace, shape: Any, indices: Array, axis: int) -> Array:
    """Return the places, in the flattened data, of the elements that `indices` names along an axis."""
    base = np.zeros((1,) * len(shape), dtype=np.int64)
    for at, count in enumerate(indices.shape):
        if at != axis:
            own = (np.arange(count) * prod(shape[at + 1 :])).reshape(
                tuple(-1 if other == at else 1 for other in range(len(shape)))
            )
            base = base + own
    found = _from_front(xp, indices, shape[axis])
    return found * prod(shape[axis + 1 :]) + xp.astype(xp.asarray(base), found.dtype)


def _tuples(node: Node, xp: Namespace, data: Array, indices: Array, batch: int) -> tuple[tuple[int, ...], tuple[int, ...], Array]:
    """Return the shape of the tuples, that of the slices, and the places of all elements in the flattened data."""
    depth = indices.shape[-1]
    if not 0 <= batch <= data.ndim - depth or not depth:
        raise node.damaged(f"takes tuples of {depth} from a tensor {tuple(data.shape)}")
    lead, rest = tuple(indices.shape[:-1]), tuple(data.shape[batch + depth :])
    flat = 0
    for at in range(depth):
        flat = flat + _from_front(xp, indices[..., at], data.shape[batch + at]) * prod(data.shape[batch + at + 1 :])
    for at in range(batch):
        own = np.arange(lead[at]) * prod(data.shape[at + 1 :])
        flat = flat + xp.astype(xp.asarray(own.reshape(tuple(-1 if k == at else 1 for k in range(len(lead))))), indices.dtype)
    within = xp.astype(xp.arange(prod(rest)), indices.dtype)
    return (
        lead,
        rest,
        xp.expand_dims(xp.broadcast_to(flat, lead), axis=-1 if lead else 0) * 1 + xp.reshape(within, (*(1,) * len(lead), -1)),
    )
