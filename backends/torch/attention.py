"""The second derivative of fused attention on CPU, which PyTorch lacks.

With `S = scale Q Kᵀ + mask`, `P = softmax(S)` and `O = P V`, the gradients of Q, K and V for a gradient G of O are `scale T K`,
`scale Tᵀ Q` and `Pᵀ G`, where `T = P ∘ (G Vᵀ − rows(G ∘ O))` and `rows` sums each row. Their scalar product with q, k and v is
that of G with the change of O for changes q, k and v, `Ṗ V + P v` with `Ṗ = P ∘ (U − rows(P ∘ U))` and
`U = scale (q Kᵀ + Q kᵀ)`, which gives the derivatives. P is made again, for a few heads at a time, so that their matrices stay
in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointError

from mgs_core._errors import UnsupportedModelError

from .products import differentiated_once, full_precision

#: The node that this file is about.
FUSED_ATTENTION = "ScaledDotProductFlashAttentionForCpu"
#: Elements of the matrices P that are made at a time.
_CHUNK = 1 << 16


def replace_attention(node: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Record the gradients that the node computed so that they can be differentiated; to be partially applied as a hook.

    Args:
        node: of fused attention.
        inputs: the gradients of queries, keys and values; None where there is none.
        outputs: the gradient above.

    Returns:
        The same gradients.
    """
    if outputs[0] is None:
        return inputs
    try:
        arguments = (node._saved_query, node._saved_key, node._saved_value)
    except CheckpointError as error:
        raise UnsupportedModelError(
            "`model` must be twice differentiable for a penalty; got fused attention that is checkpointed, which is not. Choose "
            'another attention in the model, as `attn_implementation="eager"` of transformers, or do not checkpoint it.'
        ) from error
    values = [x if value is None else value.detach() for x, value in zip(arguments, inputs, strict=True)]
    function: Any = _Attended.apply
    found = function(outputs[0], *arguments, node, *values)
    return tuple(None if value is None else part for value, part in zip(inputs, found, strict=True))


class _Attended(torch.autograd.Function):
    """Gradients of the queries, keys and values, (…, heads, positions, features), which the node has computed."""

    @staticmethod
    def forward(
        ctx: Any, above: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, node: Any, *values: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(above, q, k, v)
        ctx.output, ctx.log_total = node._saved_output.detach(), node._saved_logsumexp
        ctx.causal, ctx.mask = node._saved_is_causal, node._saved_attn_mask
        ctx.scale = q.shape[-1] ** -0.5 if node._saved_scale is None else node._saved_scale
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    @differentiated_once
    @full_precision
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        above, q, k, v = ctx.saved_tensors
        to_q, to_k, to_v = gradients
        shared = q.shape[-3] // k.shape[-3]  # heads of queries that share one of keys
        k, v, to_k, to_v = (_for_each_query(array, shared) for array in (k, v, to_k, to_v))
        given = (above, q, k, v, to_q, to_k, to_v, ctx.output)
        arrays = [array.flatten(0, -3) for array in given]
        log_total, scale, mask = ctx.log_total.flatten(0, -2)[..., None], ctx.scale, _mask(ctx, q, k)
        wide = log_total.dtype
        results = [array.new_empty(array.shape) for array in arrays[:4]]
        step = max(1, _CHUNK // (arrays[1].shape[1] * arrays[2].shape[1]))
        for start in range(0, len(log_total), step):
            at = slice(start, start + step)
            above, q, k, v, to_q, to_k, to_v, output = (array[at].to(wide) for array in arrays)
            q, to_q = q * scale, to_q * scale
            weights = -log_total[at] if mask is None else mask(at) - log_total[at]
            weights = torch.baddbmm(weights, q, k.mT).exp_()
            inner = torch.bmm(above, v.mT).sub_((above * output).sum(-1, keepdim=True))
            change = torch.bmm(to_q, k.mT).baddbmm_(q, to_k.mT)
            change.sub_((weights * change).sum(-1, keepdim=True))
            moved = weights * change
            bent = torch.bmm(above, to_v.mT).addcmul_(inner, change)
            bent = torch._softmax_backward_data(bent, weights, -1, wide)
            inner.mul_(weights)
            found = (
                torch.bmm(moved, v).baddbmm_(weights, to_v),
                torch.bmm(bent, k).baddbmm_(inner, to_k).mul_(scale),
                torch.bmm(bent.mT, q).baddbmm_(inner.mT, to_q),
                torch.bmm(moved.mT, above),
            )
            for result, part in zip(results, found, strict=True):
                result[at] = part
        to_above, to_q, to_k, to_v = (result.view(array.shape) for result, array in zip(results, given[:4], strict=True))
        if shared > 1:
            to_k, to_v = (part.unflatten(-3, (-1, shared)).sum(-3) for part in (to_k, to_v))
        return (to_above, to_q, to_k, to_v, *(None,) * 4)


def _for_each_query(array: torch.Tensor, shared: int) -> torch.Tensor:
    """Return the array of keys or values for each head of queries, of which `shared` in turn have one."""
    return array if shared == 1 else array.repeat_interleave(shared, -3)


def _mask(ctx: Any, q: torch.Tensor, k: torch.Tensor) -> Callable[[slice], torch.Tensor] | None:
    """Return what gives, for a slice of all heads, what is added to their scores; one matrix where they share it."""
    shape, mask = (*q.shape[:-1], k.shape[-2]), ctx.mask
    if ctx.causal:
        mask = torch.full(shape[-2:], -torch.inf, dtype=ctx.log_total.dtype, device=q.device).triu_(1)
    if mask is None:
        return None
    if prod(mask.shape[:-2]) == 1:
        matrix = mask.reshape(mask.shape[-2:])
        return lambda at: matrix
    own, heads = mask.expand(shape), torch.arange(prod(shape[:-2]), device=q.device)
    return lambda at: own[torch.unravel_index(heads[at], shape[:-2])]
