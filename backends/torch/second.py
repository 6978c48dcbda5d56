"""Second derivatives of common operations that pass over their arrays less often, and keep less, than PyTorch's own.

While a gradient is computed to be differentiated again, hooks put these in place of what autograd would record at the node. The
gradient itself is the one that the node computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointError

from .attention import FUSED_ATTENTION, replace_attention
from .graph import operation
from .products import differentiated_once

# (node, gradient above, gradient of the first input) → the same gradient, recorded anew
_Replacement = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


@contextmanager
def cheaper_second_derivatives(nodes: Iterable[Any]) -> Iterator[None]:
    """Within it, gradients that pass these nodes are recorded by the functions of this file.

    Args:
        nodes: autograd nodes.

    Yields:
        Nothing.
    """
    handles = []
    try:
        for node in nodes:
            name = operation(node)
            if name == FUSED_ATTENTION:
                handles.append(node.register_hook(partial(replace_attention, node)))
            elif name in _REPLACEMENTS:
                handles.append(node.register_hook(partial(_replace, node, _REPLACEMENTS[name])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def normalised_rows(node: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x as (rows, elements), a row for each mean of a layer or group normalisation, the means, and 1/deviation."""
    mean, inverse = node._saved_result1.detach().reshape(-1, 1), node._saved_result2.detach().reshape(-1, 1)
    return x.reshape(len(mean), -1), mean, inverse


def _replace(node: Any, replacement: _Replacement, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # a gradient may arrive at the statistics too: that of a derivative that is among the model's outputs
    with_statistics = any(gradient is not None for gradient in outputs[1:])
    if inputs[0] is None or outputs[0] is None or not outputs[0].numel() or with_statistics or outputs[0].is_complex():
        return inputs
    try:
        return (replacement(node, outputs[0], inputs[0].detach()), *inputs[1:])
    except CheckpointError:  # which gives what the node keeps once in a backward pass, and gave it to the node
        return inputs


class _Linear(torch.autograd.Function):
    """Gradient that is linear in the gradient above and constant in the rest; `adjoint(gradient, saved)` is its transpose."""

    @staticmethod
    def forward(
        ctx: Any, above: torch.Tensor, saved: torch.Tensor, value: torch.Tensor, adjoint: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        ctx.save_for_backward(saved)
        ctx.adjoint = adjoint
        return value.view_as(value)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.adjoint(gradients[0], ctx.saved_tensors[0]), None, None, None


def _masked(gradient: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Return the gradient where a rectifier let its input through."""
    passed: torch.Tensor = torch.ops.aten.threshold_backward(gradient, result, 0)
    return passed


def _pooled(gradient: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the gradient at the maximum of each window."""
    return gradient.flatten(-2).gather(-1, indices.flatten(-2)).view_as(indices)


class _Normalised(torch.autograd.Function):
    """Gradient of a normalisation without its shift, `g(u) = r (u − mean(u) − x̂ mean(u x̂))` for u = gradient · gain.

    Its scalar product with v is that of u with g(v), and changes with x by
    `−r (mean(u x̂) g(v) + mean(v x̂) g(u) + mean(u g(v)) x̂)`.
    """

    @staticmethod
    def forward(
        ctx: Any, above: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, value: torch.Tensor, node: Any, axis: int
    ) -> torch.Tensor:
        ctx.save_for_backward(above, x, weight, value)
        ctx.statistics, ctx.axis = normalised_rows(node, x)[1:], axis
        return value.view_as(value)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        above, x, weight, value = ctx.saved_tensors
        mean, inverse = ctx.statistics
        gain = None if weight is None else weight.reshape(*weight.shape, *(1,) * (x.ndim - ctx.axis - weight.ndim))
        arrays = (above if gain is None else above * gain, gradients[0], value, x)
        u, v, of_u, flat = (array.reshape(len(mean), -1).to(mean.dtype) for array in arrays)
        of_v: torch.Tensor = torch.ops.aten.native_layer_norm_backward(
            v, flat, [flat.shape[1]], mean, inverse, None, None, [True, False, False]
        )[0]
        normal = torch.sub(flat, mean).mul_(inverse)
        products = torch.empty_like(u)

        def average(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return torch.mul(left, right, out=products).mean(1, keepdim=True)

        along_u, along_v, both = (average(*pair).mul_(-inverse) for pair in ((u, normal), (v, normal), (u, of_v)))
        to_x = normal.mul_(both).addcmul_(of_v, along_u).addcmul_(of_u, along_v)
        projected, to_weight = of_v.view(x.shape), None
        if gain is not None and ctx.needs_input_grad[2]:
            to_weight = torch.mul(above, projected, out=products.view(x.shape)).sum_to_size(gain.shape).reshape(weight.shape)
        to_above = projected if gain is None else projected.mul_(gain)
        return to_above.to(above.dtype), to_x.view(x.shape).to(x.dtype), to_weight, None, None, None


class _Convolved(torch.autograd.Function):
    """Gradient in the input of a convolution, which is linear in the gradient above and in the weight.

    Its scalar product with v is that of the gradient above with the convolution of v, so its derivatives are those of a
    convolution. PyTorch's own derivative in the weight is a convolution with a window as large as the image, which is slow.
    """

    @staticmethod
    def forward(ctx: Any, above: torch.Tensor, weight: torch.Tensor, value: torch.Tensor, settings: list[Any]) -> torch.Tensor:
        ctx.save_for_backward(above, weight)
        ctx.settings = settings
        return value.view_as(value)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        (above, weight), v = ctx.saved_tensors, gradients[0]
        to_above, to_weight = torch.convolution(v, weight, None, *ctx.settings), None
        if ctx.needs_input_grad[1]:
            to_weight = torch.ops.aten.convolution_backward(above, v, weight, None, *ctx.settings, [False, True, False])[1]
        return to_above, to_weight, None, None


def _apply(function: Any, *arguments: Any) -> torch.Tensor:
    result: torch.Tensor = function.apply(*arguments)
    return result


def _of_layer_norm(node: Any, above: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    axis = value.ndim - len(node._saved_normalized_shape)
    return _apply(_Normalised, above, node._saved_input, node._saved_weight, value, node, axis)


def _of_convolution(node: Any, above: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    return _apply(_Convolved, above, node._saved_weight, value, [getattr(node, f"_saved_{name}") for name in names])


_REPLACEMENTS: dict[str, _Replacement] = {
    "Hardsigmoid": lambda node, above, value: _apply(  # PyTorch has none
        _Linear, above, node._saved_self, value, torch.ops.aten.hardsigmoid_backward
    ),
    "Relu": lambda node, above, value: _apply(_Linear, above, node._saved_result, value, _masked),
    "MaxPool2DWithIndices": lambda node, above, value: _apply(_Linear, above, node._saved_result1, value, _pooled),
    "Convolution": _of_convolution,
    "NativeLayerNorm": _of_layer_norm,
    "NativeGroupNorm": lambda node, above, value: _apply(
        _Normalised, above, node._saved_input, node._saved_weight, value, node, 1
    ),
}
