"""Resize: along each axis a product with a small matrix of interpolation weights, which is made on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mgs_core._types import Array, Namespace
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.common import axes_of, integers
from mgs_core.onnx.operators.registry import Run, operator
from mgs_core.onnx.tensors import check_size


@operator("Resize", since=11, host=(1, 2, 3))
def resize(node: Node, xp: Namespace) -> Run:
    """Interpolate to another size."""

    def run(x: Array, roi: Array = None, scales: Array = None, sizes: Array = None) -> Array:
        given = node.attributes.get("axes")
        axes = axes_of(range(x.ndim) if given is None else given, x.ndim, node)
        wanted = None if scales is None or not np.size(scales) else np.asarray(scales, dtype=np.float64)
        lengths = [x.shape[axis] for axis in axes]
        crop = np.asarray(roi, dtype=np.float64) if roi is not None and np.size(roi) else np.repeat([0.0, 1.0], len(axes))
        if wanted is None:
            wanted, out = _from_sizes(node, lengths, integers(sizes) if sizes is not None else ())
        else:
            whole = wanted
            if node.attributes["coordinate_transformation_mode"] == "tf_crop_and_resize":
                whole = wanted * (crop[len(axes) :] - crop[: len(axes)])
            out = [int(np.floor(length * scale)) for length, scale in zip(lengths, whole, strict=True)]
        return _resize(node, xp, x, axes, wanted, out, crop)

    return run


@operator("Upsample", since=9, host=(1,))
def upsample(node: Node, xp: Namespace) -> Run:
    """Interpolate to a multiple of the size, corners at corners' distance, as before opset 10."""

    def run(x: Array, scales: Array) -> Array:
        wanted = np.asarray(scales, dtype=np.float64)
        out = [int(np.floor(length * scale)) for length, scale in zip(x.shape, wanted, strict=True)]
        return _resize(node, xp, x, tuple(range(x.ndim)), wanted, out, np.repeat([0.0, 1.0], x.ndim))

    return run


def _from_sizes(node: Node, lengths: Sequence[int], sizes: Sequence[int]) -> tuple[Array, list[int]]:
    if len(sizes) != len(lengths) or min(sizes, default=1) < 1 or min(lengths, default=1) < 1:
        raise node.damaged(f"resizes the axes of lengths {list(lengths)} to {list(sizes)}")
    scales = np.asarray(sizes) / np.asarray(lengths)
    policy = node.attributes.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return scales, list(sizes)
    scale = scales.min() if policy == "not_larger" else scales.max()
    return np.full(len(lengths), scale), [int(np.floor(scale * length + 0.5)) for length in lengths]


def _resize(node: Node, xp: Namespace, x: Array, axes: Sequence[int], scales: Array, out: Sequence[int], crop: Array) -> Array:
    if np.any(scales <= 0) or not np.all(np.isfinite(scales)):
        raise node.damaged(f"has scales {scales.tolist()}")
    shape = list(x.shape)
    for axis, size in zip(axes, out, strict=True):
        shape[axis] = size
    check_size(tuple(shape), str(node))
    outside: Any = np.zeros((1,) * x.ndim, dtype=bool)
    for at, (axis, scale, size) in enumerate(zip(axes, scales, out, strict=True)):
        mode = node.attributes.get("coordinate_transformation_mode", "asymmetric")
        if scale == 1.0 and size == x.shape[axis] and mode != "tf_crop_and_resize":
            continue
        places, beyond = _places(node, mode, x.shape[axis], float(scale), size, crop[at], crop[at + len(axes)])
        outside = outside | beyond.reshape(tuple(-1 if other == axis else 1 for other in range(x.ndim)))
        x = _along(node, xp, x, axis, places, float(scale))
    if not np.any(outside):
        return x
    filler = xp.full_like(x, node.attributes.get("extrapolation_value", 0.0))
    return xp.where(xp.asarray(np.broadcast_to(outside, x.shape)), filler, x)


def _places(node: Node, mode: str, length: int, scale: float, size: int, start: float, end: float) -> tuple[Array, Array]:
    """Return where, in the input, the outputs along an axis lie, and which lie outside a crop."""
    y = np.arange(size, dtype=np.float64)
    width = scale * length
    inside = np.zeros(size, dtype=bool)
    if mode == "half_pixel":
        return (y + 0.5) / scale - 0.5, inside
    if mode == "pytorch_half_pixel":
        return (np.full(size, -0.5) if width == 1 else (y + 0.5) / scale - 0.5), inside
    if mode == "half_pixel_symmetric":
        return length / 2 * (1 - size / width) + (y + 0.5) / scale - 0.5, inside
    if mode == "asymmetric":
        return y / scale, inside
    if mode == "align_corners":
        return (np.zeros(size) if width == 1 else y * (length - 1) / (width - 1)), inside
    if mode == "tf_crop_and_resize":
        span = (end - start) * (length - 1)
        places = (np.full(size, span / 2) if width == 1 else y * span / (width - 1)) + start * (length - 1)
        return places, (places < 0) | (places > length - 1)
    raise node.damaged(f"has coordinate_transformation_mode {mode!r}")


def _along(node: Node, xp: Namespace, x: Array, axis: int, places: Array, scale: float) -> Array:
    length, mode = x.shape[axis], node.attributes["mode"]
    if mode == "nearest":
        return xp.take(x, xp.asarray(np.clip(_nearest(node, places), 0, length - 1)), axis=axis)
    if mode not in ("linear", "cubic"):
        raise node.damaged(f"has mode {mode!r}")
    check_size((len(places), length), str(node))
    weights = xp.astype(xp.asarray(_weights(node, places, length, scale)), x.dtype)  # (length, size)
    order = [other for other in range(x.ndim) if other != axis] + [axis]
    y = xp.matmul(xp.permute_dims(x, tuple(order)), weights)
    return xp.permute_dims(y, tuple(order.index(at) for at in range(x.ndim)))


def _nearest(node: Node, places: Array) -> Array:
    mode = node.attributes.get("nearest_mode", "floor")
    if mode not in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
        raise node.damaged(f"has nearest_mode {mode!r}")
    rounded = {
        "round_prefer_floor": np.ceil(places - 0.5), "round_prefer_ceil": np.floor(places + 0.5),
        "floor": np.floor(places), "ceil": np.ceil(places),
    }[mode]  # fmt: skip
    return rounded.astype(np.int64)


def _weights(node: Node, places: Array, length: int, scale: float) -> Array:
    """Return the weights (length, size) by which the inputs along an axis make the outputs."""
    cubic = node.attributes["mode"] == "cubic"
    squeeze = min(scale, 1.0) if node.attributes.get("antialias", 0) else 1.0
    reach = int(np.ceil((2 if cubic else 1) / squeeze))
    steps = np.floor(places)[:, None].astype(np.int64) + np.arange(-reach, reach + 2)
    distance = np.abs(steps - places[:, None]) * squeeze
    if cubic:
        a = node.attributes["cubic_coeff_a"]
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a
        values = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
    else:
        values = np.maximum(1.0 - distance, 0.0)
    if node.attributes.get("exclude_outside", 0):
        values = np.where((steps < 0) | (steps >= length), 0.0, values)
    if node.attributes.get("exclude_outside", 0) or squeeze < 1.0:
        values = values / values.sum(axis=1, keepdims=True)
    weights = np.zeros((length, len(places)))
    np.add.at(weights, (np.clip(steps, 0, length - 1), np.arange(len(places))[:, None]), values)
    return weights
