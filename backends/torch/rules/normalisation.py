"""Normalisation layers: gains multiply the normalised input, shifts are added."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mgs_core._protocol import Scale

from ..graph import operation
from ..products import differentiated_once
from ..second import normalised_rows
from ._registry import Place, Site, Split, elementwise, register, scale

#: Nodes of batch normalisations.
BATCH_NORMS = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")


@register("NativeLayerNorm")
def layer_norm(place: Place) -> Site | None:
    """Normalise over the last axes."""
    rank = len(place.node._saved_normalized_shape)
    return _normalisation(place, tuple(range(len(place.output) - rank, len(place.output))))


@register("FusedRmsNorm")
def rms_norm(place: Place) -> Site | None:
    """Divide by the root mean square over the last axes."""
    node = place.node
    shape = tuple(node._saved_normalized_shape)
    axes = tuple(range(-len(shape), 0))

    def normalised() -> torch.Tensor:
        x: torch.Tensor = node._saved_input
        return x * _inverse_root((x * x).mean(axes, keepdim=True), node._saved_result1)

    return (
        elementwise(place, normalised, tuple(range(len(place.output) - len(shape), len(place.output))))
        if place.slot == 1
        else None
    )


@register("NativeGroupNorm")
def group_norm(place: Place) -> Site | None:
    """Normalise over groups of channels."""
    return _normalisation(place, (1,))


@register(*BATCH_NORMS)
def batch_norm(place: Place) -> Site | None:
    """Normalise each channel by statistics of the batch or by fixed ones."""
    return _affine(place, (1,), lambda: batch_normalised(place.node))


def batch_normalised(node: Any) -> torch.Tensor:
    """Return the normalised input of a batch normalisation."""
    x: torch.Tensor = node._saved_input
    mean, inverse = batch_statistics(node)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    return (x - mean.reshape(shape)) * inverse.reshape(shape)


def batch_statistics(node: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and inverse root variance per channel, differentiable in the input where the batch gives them."""
    eps = getattr(node, "_saved_eps", None)
    eps = float(node._saved_epsilon if eps is None else eps)
    if not node._saved_training:
        return node._saved_running_mean, torch.rsqrt(node._saved_running_var + eps)
    x: torch.Tensor = node._saved_input.to(node._saved_result1.dtype)  # wider, in automatic mixed precision
    axes = (0, *range(2, x.ndim))
    variance, mean = torch.var_mean(x, axes, correction=0)
    return mean, torch.rsqrt(variance + eps)


@contextmanager
def frozen_batch_norm(nodes: Iterable[Any]) -> Iterator[None]:
    """Within it, gradients pass batch normalisations as if the statistics of the batch were constants."""
    handles = []
    try:
        for node in nodes:
            name = operation(node)
            if name in BATCH_NORMS and node._saved_training:
                handles.append(node.register_hook(partial(_pass_frozen, node)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_frozen(node: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    if outputs[0] is None:
        return inputs
    _, factor = batch_statistics(node)
    if node._saved_weight is not None:
        factor = factor * node._saved_weight
    passed = outputs[0] * factor.reshape(1, -1, *(1,) * (outputs[0].ndim - 2))
    return (passed.to(node._saved_input.dtype), *inputs[1:])


def _affine(place: Place, own: tuple[int, ...], normalised: Callable[[], torch.Tensor]) -> Site | None:
    if place.slot == 1:
        return elementwise(place, normalised, own)
    return elementwise(place, 1.0, own) if place.slot == 2 else None


def _normalisation(place: Place, own: tuple[int, ...]) -> Site | None:
    """Return the site of a gain or shift; the normalised input is made when it is needed, and not kept."""
    if place.slot != 1:
        return elementwise(place, 1.0, own) if place.slot == 2 else None

    def rows(split: Split, gradient: torch.Tensor) -> torch.Tensor:
        gain_rows: Any = _GainRows.apply
        made: torch.Tensor = gain_rows(gradient, place.node._saved_input, place.node, split)
        return made

    return replace(elementwise(place, 1.0, own), make=_summed, rows=rows)


def _summed(gradients: torch.Tensor, inputs: None, **common: Any) -> Scale:
    """Make the statistics of a gain whose rows are known."""
    return scale(gradients, torch.ones_like(gradients[:, 0]), **common)


class _GainRows(torch.autograd.Function):
    """Rows `Σ_s d x̂` of a gain, (n, 1, 1, o), from the gradient and the input of a layer or group normalisation."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, x: torch.Tensor, node: Any, split: Split) -> torch.Tensor:
        ctx.save_for_backward(gradient, x)
        ctx.split = split
        flat, ctx.mean, ctx.inverse = normalised_rows(node, x)
        normal = torch.sub(flat, ctx.mean).mul_(ctx.inverse).view(x.shape)
        return split(normal.mul_(gradient)).sum(2, keepdim=True)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        gradient, x = ctx.saved_tensors
        with torch.enable_grad():  # the derivative of a sum of rearranged elements rearranges and repeats
            like = gradient.new_zeros(()).expand(x.shape).requires_grad_()
            (spread,) = torch.autograd.grad(ctx.split(like).sum(2, keepdim=True), like, gradients[0])
        flat = x.reshape(len(ctx.mean), -1).to(ctx.mean.dtype)
        weighted = (spread.to(flat.dtype) * gradient).reshape(flat.shape)
        to_x = torch.ops.aten.native_layer_norm_backward(
            weighted, flat, [flat.shape[1]], ctx.mean, ctx.inverse, None, None, [True, False, False]
        )[0]
        normal = torch.sub(flat, ctx.mean).mul_(ctx.inverse).view(x.shape)
        return normal.mul_(spread).to(gradient.dtype), to_x.view(x.shape).to(x.dtype), None, None


def _inverse_root(variance: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
    """Return `(variance + eps)^-½` for the eps, which the node does not keep, that gives the saved value.

    The saved value itself would count as a constant in the second derivative.
    """
    eps = (saved.to(variance.dtype) ** -2 - variance).detach()
    return torch.rsqrt(variance + eps)
