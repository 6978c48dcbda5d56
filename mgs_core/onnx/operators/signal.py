"""Fourier transforms, as products with matrices of sines and cosines; complex numbers are pairs along the last axis."""

from __future__ import annotations

from math import prod

import numpy as np

from mgs_core._types import Array, Namespace
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.common import axis_of, integers
from mgs_core.onnx.operators.registry import Run, operator
from mgs_core.onnx.tensors import check_size


@operator("DFT", since=17, host=(1,))
def dft_by_attribute(node: Node, xp: Namespace) -> Run:
    """Transform along an axis that an attribute names."""
    return lambda x, length=None: _dft(node, xp, x, length, node.attributes["axis"])


@operator("DFT", since=20, host=(1, 2))
def dft(node: Node, xp: Namespace) -> Run:
    """Transform along an axis that an input names."""
    return lambda x, length=None, axis=None: _dft(node, xp, x, length, -2 if axis is None else integers(axis)[0])


@operator("STFT", since=17, host=(1, 3))
def stft(node: Node, xp: Namespace) -> Run:
    """Transform windows of a signal (n, length, 1 or 2): (n, windows, frequencies, 2)."""

    def run(signal: Array, step: Array, window: Array = None, length: Array = None) -> Array:
        stride = integers(step)[0]
        default = signal.shape[1] if window is None else window.shape[0]
        size = default if length is None else integers(length)[0]
        if signal.ndim != 3 or stride < 1 or not 0 < size <= signal.shape[1] or (window is not None and window.shape[0] != size):
            raise node.damaged(f"cuts {tuple(signal.shape)} into windows of {size} in steps of {stride}")
        starts = np.arange(0, signal.shape[1] - size + 1, stride)
        check_size((signal.shape[0], len(starts), size, signal.shape[2]), str(node))
        places = (starts[:, None] + np.arange(size)).reshape(-1)
        frames = xp.reshape(xp.take(signal, xp.asarray(places), axis=1), (signal.shape[0], len(starts), size, signal.shape[2]))
        frames = frames if window is None else frames * xp.reshape(window, (1, 1, size, 1))
        return _transform(node, xp, frames, size, size // 2 + 1 if node.attributes["onesided"] else size, 1.0)

    return run


def _dft(node: Node, xp: Namespace, x: Array, length: Array, axis: int) -> Array:
    place = axis_of(axis, x.ndim, node)
    inverse, onesided = bool(node.attributes["inverse"]), bool(node.attributes["onesided"])
    if place == x.ndim - 1 or x.shape[-1] not in (1, 2):
        raise node.damaged(f"transforms the axis {axis} of {tuple(x.shape)}, whose last axis holds real and imaginary parts")
    size = integers(length)[0] if length is not None else 2 * (x.shape[place] - 1) if inverse and onesided else x.shape[place]
    if size < 1:
        raise node.damaged(f"transforms a signal of length {size}")
    order = [*(at for at in range(x.ndim - 1) if at != place), place, x.ndim - 1]
    moved = xp.permute_dims(x, tuple(order))
    if inverse and onesided:
        y = _real_inverse(node, xp, moved, size)
    else:
        y = _transform(node, xp, moved, size, size // 2 + 1 if onesided else size, -1.0 if inverse else 1.0)
    return xp.permute_dims(y, tuple(order.index(at) for at in range(x.ndim)))


def _transform(node: Node, xp: Namespace, x: Array, size: int, frequencies: int, sign: float) -> Array:
    """Return the transform of x (…, steps, 1 or 2), cut or filled with zeros to `size`: (…, frequencies, 2)."""
    cos, sin = _waves(node, xp, x, size, frequencies)
    real = x[..., : cos.shape[0], 0]
    y = [xp.matmul(real, cos), -sign * xp.matmul(real, sin)]
    if x.shape[-1] == 2:
        imaginary = x[..., : cos.shape[0], 1]
        y = [y[0] + sign * xp.matmul(imaginary, sin), y[1] + xp.matmul(imaginary, cos)]
    result = xp.stack(y, axis=-1)
    return result if sign > 0 else result / size


def _real_inverse(node: Node, xp: Namespace, x: Array, size: int) -> Array:
    """Return the signal (…, size, 1) of which x holds the frequencies from 0 to size/2."""
    cos, sin = _waves(node, xp, x[..., : size // 2 + 1, :], size, size)
    twice = np.full(cos.shape[0], 2.0)
    twice[0] = 1.0
    if size % 2 == 0 and len(twice) == size // 2 + 1:
        twice[-1] = 1.0
    weights = xp.astype(xp.asarray(twice / size), x.dtype)
    y = xp.matmul(x[..., : cos.shape[0], 0] * weights, cos)
    if x.shape[-1] == 2:
        y = y - xp.matmul(x[..., : cos.shape[0], 1] * weights, sin)
    return xp.expand_dims(y, axis=-1)


def _waves(node: Node, xp: Namespace, x: Array, size: int, columns: int) -> tuple[Array, Array]:
    rows = min(size, x.shape[-2])
    check_size((rows, columns), str(node))
    check_size((prod(x.shape[:-2]), columns, 2), str(node))
    angles = (np.arange(rows)[:, None] * np.arange(columns)) % size * (2 * np.pi / size)
    return xp.astype(xp.asarray(np.cos(angles)), x.dtype), xp.astype(xp.asarray(np.sin(angles)), x.dtype)
