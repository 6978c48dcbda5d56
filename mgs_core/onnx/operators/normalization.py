"""Normalisations."""

from __future__ import annotations

from math import prod

import numpy as np

from mgs_core._types import Array, Namespace
from mgs_core.onnx.extensions import extension
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.common import axes_of, axis_of, is_half, native_dtype, root
from mgs_core.onnx.operators.registry import Run, operator


@operator("BatchNormalization", since=7, many=True)
def batch_normalization(node: Node, xp: Namespace) -> Run:
    """Normalise by fixed statistics."""
    if node.attributes.get("training_mode", 0) or len([name for name in node.outputs if name]) > 1:
        raise node.unsupported("is in training mode, where samples interact", "Export the model in inference mode.")
    epsilon = node.attributes["epsilon"]

    def run(x: Array, scale: Array, shift: Array, mean: Array, variance: Array) -> list[Array]:
        shape = (1, -1, *(1,) * (x.ndim - 2)) if x.ndim > 1 else (-1,)
        mean, variance, scale, shift = (xp.reshape(value, shape) for value in (mean, variance, scale, shift))
        return [(x - mean) * (1.0 / xp.sqrt(variance + epsilon)) * scale + shift]

    return run


@operator("LayerNormalization", since=17, many=True)
def layer_normalization(node: Node, xp: Namespace) -> Run:
    """Normalise each sample over its last axes."""
    axis, epsilon = node.attributes["axis"], node.attributes["epsilon"]

    def run(x: Array, scale: Array, shift: Array = None) -> list[Array]:
        kind = x.dtype
        x = _widened(xp, x, node)
        axes = tuple(range(axis_of(axis, x.ndim, node), x.ndim))
        mean = xp.mean(x, axis=axes, keepdims=True)
        centred = x - mean
        inverse = 1.0 / xp.sqrt(xp.mean(centred * centred, axis=axes, keepdims=True) + epsilon)
        y = _narrowed(xp, centred * inverse, kind) * scale
        return [y if shift is None else y + shift, mean, inverse]

    return run


@operator("RMSNormalization", since=23)
def rms_normalization(node: Node, xp: Namespace) -> Run:
    """Divide each sample by its root mean square over its last axes."""
    axis, epsilon = node.attributes["axis"], node.attributes["epsilon"]

    def run(x: Array, scale: Array) -> Array:
        kind = x.dtype
        x = _widened(xp, x, node)
        axes = tuple(range(axis_of(axis, x.ndim, node), x.ndim))
        return _narrowed(xp, x / xp.sqrt(xp.mean(x * x, axis=axes, keepdims=True) + epsilon), kind) * scale

    return run


@operator("InstanceNormalization", since=6)
def instance_normalization(node: Node, xp: Namespace) -> Run:
    """Normalise each channel of each sample over space."""
    epsilon = node.attributes["epsilon"]

    def run(x: Array, scale: Array, shift: Array) -> Array:
        shape = (1, -1, *(1,) * (x.ndim - 2))
        return _standard(xp, x, tuple(range(2, x.ndim)), epsilon) * xp.reshape(scale, shape) + xp.reshape(shift, shape)

    return run


@operator("GroupNormalization", since=18)
def group_normalization(node: Node, xp: Namespace) -> Run:
    """Normalise groups of channels of each sample; gain and shift are one for each channel, before opset 21 for each group."""
    groups, epsilon, by_group = node.attributes["num_groups"], node.attributes["epsilon"], node.opset < 21

    def run(x: Array, scale: Array, shift: Array) -> Array:
        kind, shape = x.dtype, tuple(x.shape)
        if groups < 1 or shape[1] % groups:
            raise node.damaged(f"cannot divide {shape[1]} channels into {groups} groups")
        x = xp.reshape(_widened(xp, x, node), (shape[0], groups, shape[1] // groups, prod(shape[2:])))
        x = _narrowed(xp, _standard(xp, x, (2, 3), epsilon), kind)
        if by_group:
            return xp.reshape(x * xp.reshape(scale, (1, -1, 1, 1)) + xp.reshape(shift, (1, -1, 1, 1)), shape)
        gains = (1, -1, *(1,) * (len(shape) - 2))
        return xp.reshape(x, shape) * xp.reshape(scale, gains) + xp.reshape(shift, gains)

    return run


@operator("MeanVarianceNormalization", since=9)
def mean_variance_normalization(node: Node, xp: Namespace) -> Run:
    """Normalise over the axes named; over all samples only when the batch axis is among them."""
    axes = node.attributes.get("axes") or [0, 2, 3]

    def run(x: Array) -> Array:
        places = axes_of(axes, x.ndim, node)
        centred = x - xp.mean(x, axis=places, keepdims=True)
        return centred / (root(xp, xp.mean(centred * centred, axis=places, keepdims=True)) + 1e-9)

    return run


@operator("LpNormalization")
def lp_normalization(node: Node, xp: Namespace) -> Run:
    """Divide by the 1- or 2-norm along an axis; what has norm 0 stays 0."""
    axis, p = node.attributes["axis"], node.attributes["p"]
    if p not in (1, 2):
        raise node.damaged(f"has p = {p}; 1 or 2 is needed")

    def run(x: Array) -> Array:
        place = axis_of(axis, x.ndim, node)
        size = xp.sum(xp.abs(x) if p == 1 else x * x, axis=place, keepdims=True)
        safe = xp.where(size > 0, size, xp.ones_like(size))  # x is 0 there, and 0/1 has a derivative
        return x / (safe if p == 1 else xp.sqrt(safe))

    return run


@operator("LRN")
def local_response_normalization(node: Node, xp: Namespace) -> Run:
    """Divide by the sum of squares of neighbouring channels."""
    size, alpha = node.attributes["size"], node.attributes["alpha"]
    beta, bias = node.attributes["beta"], node.attributes["bias"]
    before = (size - 1) // 2
    pad = extension(xp, "pad")

    def run(x: Array) -> Array:
        channels = x.shape[1]
        squares = pad(x * x, ((0, 0), (before, size - 1 - before), *((0, 0),) * (x.ndim - 2)))
        total = sum(squares[(slice(None), slice(at, at + channels), ...)] for at in range(size))
        return x / (bias + alpha / size * total) ** beta

    if size < 1:
        raise node.damaged(f"has size {size}")
    return run


def _standard(xp: Namespace, x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    centred = x - xp.mean(x, axis=axes, keepdims=True)
    return centred / xp.sqrt(xp.mean(centred * centred, axis=axes, keepdims=True) + epsilon)


def _widened(xp: Namespace, x: Array, node: Node) -> Array:
    """Return half-precision values in single precision, where the statistics are wanted in it."""
    if node.attributes.get("stash_type", 1) == 1 and is_half(x):
        return xp.astype(x, native_dtype(xp, np.float32))
    return x


def _narrowed(xp: Namespace, x: Array, kind: object) -> Array:
    return x if x.dtype == kind else xp.astype(x, kind)
