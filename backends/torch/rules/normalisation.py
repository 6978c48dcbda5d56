"""Normalisation layers: gains multiply the normalised input, shifts are added."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ._registry import Place, Site, elementwise, register

#: Nodes of batch normalisations.
BATCH_NORMS = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")


@register("NativeLayerNorm")
def layer_norm(place: Place) -> Site | None:
    """Normalise over the last axes."""
    shape = tuple(place.node._saved_normalized_shape)
    own = tuple(range(len(place.output) - len(shape), len(place.output)))
    return _affine(place, own, lambda: _layer_normalised(place, len(shape)))


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
    node = place.node

    def normalised() -> torch.Tensor:
        x: torch.Tensor = node._saved_input
        groups = int(node._saved_group)
        flat = x.reshape(x.shape[0], groups, -1)
        centred = flat - flat.mean(-1, keepdim=True)
        inverse = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + node._saved_eps)
        return (centred * inverse).reshape(x.shape)

    return _affine(place, (1,), normalised)


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
    x: torch.Tensor = node._saved_input
    axes = (0, *range(2, x.ndim))
    variance, mean = torch.var_mean(x, axes, correction=0)
    return mean, torch.rsqrt(variance + eps)


@contextmanager
def frozen_batch_norm(nodes: Iterable[Any]) -> Iterator[None]:
    """Within it, gradients pass batch normalisations as if the statistics of the batch were constants."""
    handles = []
    try:
        for node in nodes:
            name = node.name().partition("Backward")[0]
            if name in BATCH_NORMS and node._saved_training and node._saved_input.shape[0] > 1:
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
    return (outputs[0] * factor.reshape(1, -1, *(1,) * (outputs[0].ndim - 2)), *inputs[1:])


def _affine(place: Place, own: tuple[int, ...], normalised: Callable[[], torch.Tensor]) -> Site | None:
    if place.slot == 1:
        return elementwise(place, normalised, own)
    return elementwise(place, 1.0, own) if place.slot == 2 else None


def _layer_normalised(place: Place, rank: int) -> torch.Tensor:
    x: torch.Tensor = place.node._saved_input
    axes = tuple(range(-rank, 0))
    centred = x - x.mean(axes, keepdim=True)
    return centred * _inverse_root((centred * centred).mean(axes, keepdim=True), place.node._saved_result2)


def _inverse_root(variance: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
    """Return `(variance + eps)^-½` for the eps, which the node does not keep, that gives the saved value.

    The saved value itself would count as a constant in the second derivative.
    """
    eps = (saved.to(variance.dtype) ** -2 - variance).detach()
    return torch.rsqrt(variance + eps)
