"""Attention and rotary positions."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from mgs_core._types import Array, Namespace
from mgs_core.onnx.extensions import extension
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.common import native_dtype
from mgs_core.onnx.operators.registry import Run, operator


@operator("Attention", since=23, many=True)
def attention(node: Node, xp: Namespace) -> Run:
    """Mix values by the softmax of scaled products of queries and keys, with masks, caches and grouped heads.

    Letters: n samples, h heads, q queries, s keys, d features.
    """
    attributes = node.attributes
    heads, kv_heads = attributes.get("q_num_heads"), attributes.get("kv_num_heads")
    cap, mode = attributes.get("softcap", 0.0), attributes.get("qk_matmul_output_mode", 0)
    precision = attributes.get("softmax_precision")

    def run(
        q: Array, k: Array, v: Array, mask: Array = None, past_k: Array = None, past_v: Array = None, filled: Array = None
    ) -> list[Array]:
        flat = q.ndim == 3
        if flat:
            if not heads or not kv_heads:
                raise node.damaged("takes tensors with 3 axes and lacks q_num_heads or kv_num_heads")
            q, k, v = by_head(node, xp, q, heads), by_head(node, xp, k, kv_heads), by_head(node, xp, v, kv_heads)
        before = 0 if past_k is None else past_k.shape[2]
        k = k if past_k is None else xp.concat([past_k, k], axis=2)
        v = v if past_v is None else xp.concat([past_v, v], axis=2)
        present = [k, v]
        repeats = q.shape[1] // k.shape[1]
        if repeats * k.shape[1] != q.shape[1]:
            raise node.damaged(f"has {q.shape[1]} heads of queries for {k.shape[1]} of keys")
        k, v = repeat_heads(xp, k, repeats), repeat_heads(xp, v, repeats)
        scale = attributes.get("scale")
        root = sqrt(1.0 / sqrt(q.shape[-1]) if scale is None else scale)
        products = xp.matmul(q * root, xp.permute_dims(k, (0, 1, 3, 2)) * root)
        products = xp.tanh(products / cap) * cap if cap else products
        allowed, bias = _masks(node, xp, products, mask, before, filled if past_k is None else None, filled)
        biased = products if bias is None else products + bias
        lowest = xp.full_like(biased, -float("inf"))
        biased = biased if allowed is None else xp.where(allowed, biased, lowest)
        wide = biased if precision is None else xp.astype(biased, native_dtype(xp, node.dtype(precision)))
        shares = _shares(xp, wide)
        shares = shares if shares.dtype == q.dtype else xp.astype(shares, q.dtype)
        y = xp.matmul(shares, v)
        if flat:
            n, h, length, d = y.shape
            y = xp.reshape(xp.permute_dims(y, (0, 2, 1, 3)), (n, length, h * d))
        return [y, *present, {2: biased, 3: shares}.get(mode, products)]

    return run


def by_head(node: Node, xp: Namespace, x: Array, heads: int) -> Array:
    """Return (n, heads, length, features / heads) for (n, length, features)."""
    n, length, features = x.shape
    if features % heads:
        raise node.damaged(f"cannot divide {features} features among {heads} heads")
    return xp.permute_dims(xp.reshape(x, (n, length, heads, features // heads)), (0, 2, 1, 3))


def repeat_heads(xp: Namespace, x: Array, repeats: int) -> Array:
    """Return each of the heads (second axis) so many times."""
    if repeats == 1:
        return x
    n, h, s, d = x.shape
    return xp.reshape(xp.broadcast_to(xp.expand_dims(x, axis=2), (n, h, repeats, s, d)), (n, h * repeats, s, d))


def _masks(
    node: Node, xp: Namespace, products: Array, mask: Array, before: int, frontier: Array, filled: Array
) -> tuple[Any, Any]:
    """Return which keys each query may see (None: all), and what is added to its products (None: nothing)."""
    queries, keys = products.shape[-2:]
    left, right = node.attributes.get("left_window_size", -1), node.attributes.get("right_window_size", -1)
    allowed: Any = None
    ahead = np.arange(keys) - np.arange(queries)[:, None]  # key's place relative to the query's, in the block
    if node.attributes.get("is_causal", 0) or left >= 0 or right >= 0:
        if frontier is None:
            shift: Any = np.asarray(ahead - before)
            space: Any = np
        else:  # the block ends where the filled part of an external cache ends
            offset = xp.reshape(frontier, (-1, 1, 1, 1)) - queries
            shift, space = xp.asarray(ahead) - offset, xp
        seen = (shift <= 0) if node.attributes.get("is_causal", 0) else (shift == shift)
        seen = space.logical_and(seen, shift >= -left) if left >= 0 else seen
        seen = space.logical_and(seen, shift <= right) if right >= 0 else seen
        allowed = xp.asarray(seen) if frontier is None else seen
    if filled is not None:
        inside = xp.asarray(np.arange(keys)) < xp.reshape(filled, (-1, 1, 1, 1))
        allowed = inside if allowed is None else xp.logical_and(allowed, inside)
    if mask is None:
        return allowed, None
    truth = bool(xp.isdtype(mask.dtype, "bool"))
    missing = keys - mask.shape[-1]
    if missing > 0:
        widths = (*((0, 0),) * (mask.ndim - 1), (0, missing))
        if truth:
            mask = extension(xp, "pad")(xp.astype(mask, products.dtype), widths) > 0
        else:
            mask = extension(xp, "pad")(mask, widths, value=-float("inf"))
    if truth:
        return (mask if allowed is None else xp.logical_and(allowed, mask)), None
    return allowed, mask


def _shares(xp: Namespace, x: Array) -> Array:
    """Return the softmax over the last axis; a row without any key gets zeros."""
    top = xp.max(x, axis=-1, keepdims=True)
    top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    raised = xp.exp(x - top)
    total = xp.sum(raised, axis=-1, keepdims=True)
    return raised / xp.where(total == 0, xp.ones_like(total), total)


@operator("RotaryEmbedding", since=23)
def rotary_embedding(node: Node, xp: Namespace) -> Run:
    """Rotate pairs of features by angles that depend on the position."""
    interleaved, width = node.attributes.get("interleaved", 0), node.attributes.get("rotary_embedding_dim", 0)
    heads, lookup = node.attributes.get("num_heads", 0), extension(xp, "lookup")

    def run(x: Array, cos: Array, sin: Array, positions: Array = None) -> Array:
        shape = tuple(x.shape)
        if x.ndim == 3 and not heads:
            raise node.damaged("takes a tensor with 3 axes and lacks num_heads")
        x = xp.permute_dims(x, (0, 2, 1, 3)) if x.ndim == 4 else xp.reshape(x, (*shape[:2], heads, shape[2] // heads))
        size = width or x.shape[-1]
        if positions is not None:
            cos, sin = lookup(cos, positions), lookup(sin, positions)
        cos, sin = xp.expand_dims(cos, axis=2), xp.expand_dims(sin, axis=2)
        turned, rest = x[..., :size], x[..., size:]
        if interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
        else:
            a, b = turned[..., : size // 2], turned[..., size // 2 :]
        real, imaginary = cos * a - sin * b, sin * a + cos * b
        if interleaved:
            turned = xp.reshape(xp.stack([real, imaginary], axis=-1), turned.shape)
        else:
            turned = xp.concat([real, imaginary], axis=-1)
        y = xp.concat([turned, rest], axis=-1) if size < x.shape[-1] else turned
        return xp.reshape(y, shape) if len(shape) == 3 else xp.permute_dims(y, (0, 2, 1, 3))

    return run
