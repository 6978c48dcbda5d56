"""Sequence layers with a state: LinearAttention, whose steps are unrolled, and CausalConvWithState."""

from __future__ import annotations

from math import sqrt

from mgs_core._types import Array, Namespace
from mgs_core.onnx.extensions import extension
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.attention import by_head, repeat_heads
from mgs_core.onnx.operators.common import is_half
from mgs_core.onnx.operators.registry import Run, operator

_RULES = {"linear": (False, False), "gated": (True, False), "delta": (False, True), "gated_delta": (True, True)}


@operator("LinearAttention", since=27, many=True)
def linear_attention(node: Node, xp: Namespace) -> Run:
    """Read, at each step, a state S (keys, values) that decays and takes in keys and values: `o = scale · qᵀ S`."""
    heads, kv_heads, rule = (node.attributes.get(name) for name in ("q_num_heads", "kv_num_heads", "update_rule"))
    if not heads or not kv_heads or heads % kv_heads or rule not in _RULES:
        raise node.damaged(f"has {heads} heads of queries, {kv_heads} of keys and update_rule {rule!r}")
    gated, corrected = _RULES[rule]

    def run(q: Array, k: Array, v: Array, past: Array = None, decay: Array = None, beta: Array = None) -> list[Array]:
        if (decay is None) == gated or (beta is None) == corrected:
            raise node.damaged(f"has update_rule {rule!r}, and decay or beta do not fit it")
        dtype, wide = q.dtype, xp.float32 if is_half(q) else q.dtype
        q, k, v = (xp.astype(x, wide) for x in (q, k, v))
        q, k, v = by_head(node, xp, q, heads), by_head(node, xp, k, kv_heads), by_head(node, xp, v, kv_heads)
        n, _, steps, width = q.shape
        if gated:
            parts = by_head(node, xp, xp.astype(decay, wide), kv_heads)  # (n, h, t, 1 or keys)
            gates = xp.expand_dims(xp.exp(parts), axis=-1)
        if corrected:
            rates = xp.expand_dims(xp.permute_dims(xp.astype(beta, wide), (0, 2, 1)), axis=-1)  # (n, h or 1, t, 1)
        state = xp.zeros((n, kv_heads, width, v.shape[-1]), dtype=wide) if past is None else xp.astype(past, wide)
        scale, outputs = node.attributes["scale"] or 1.0 / sqrt(width), []
        for t in range(steps):
            key, value = xp.expand_dims(k[:, :, t, :], axis=-1), v[:, :, t, :]
            state = state * gates[:, :, t, ...] if gated else state
            if corrected:
                value = rates[:, :, t, :] * (value - xp.sum(state * key, axis=2))
            state = state + key * xp.expand_dims(value, axis=2)
            read = xp.matmul(xp.expand_dims(q[:, :, t, :], axis=2), repeat_heads(xp, state, heads // kv_heads))
            outputs.append(xp.reshape(read, (n, heads * v.shape[-1])) * scale)
        y = xp.stack(outputs, axis=1)
        return [xp.astype(y, dtype), xp.astype(state, dtype if past is None else past.dtype)]

    return run


@operator("CausalConvWithState", since=27, many=True)
def causal_conv(node: Node, xp: Namespace) -> Run:
    """Correlate each channel with its own window over the past, whose last steps come and go as a state."""
    product, sigmoid, activation = extension(xp, "convolution"), extension(xp, "sigmoid"), node.attributes["activation"]
    if activation not in ("none", "silu", "swish"):
        raise node.damaged(f"has the activation {activation!r}")

    def run(x: Array, weight: Array, bias: Array = None, past: Array = None) -> list[Array]:
        if x.ndim != 3 or tuple(weight.shape[:2]) != (x.shape[1], 1) or weight.ndim != 3 or weight.shape[2] < 1:
            raise node.damaged(f"cannot correlate {tuple(x.shape)} with a weight {tuple(weight.shape)}")
        reach = weight.shape[2] - 1
        padded = extension(xp, "pad")(x, ((0, 0), (0, 0), (reach, 0))) if past is None else xp.concat([past, x], axis=2)
        y = product(padded, weight, strides=(1,), pads=((0, 0),), dilations=(1,), groups=x.shape[1])
        y = y if bias is None else y + xp.reshape(bias, (1, -1, 1))
        y = y if activation == "none" else y * sigmoid(y)
        return [y, padded[:, :, padded.shape[2] - reach :]]

    return run
