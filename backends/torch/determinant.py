"""The log determinant of a kernel, with its inverse for the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .products import on_host, recorded


def log_determinant(kernel: torch.Tensor, eps: float) -> torch.Tensor:
    """Return log det(I + K), as the core's `penalty.py` says.

    Of a K without a factor it is NaN on a device: to raise there would wait for it.

    Args:
        kernel: K, (n, n).
        eps: of the precision in which K was computed.
    """
    wide = kernel if kernel.device.type == "mps" else kernel.double()
    transformed = torch._C._functorch.is_functorch_wrapped_tensor(wide) or forward_ad._current_level >= 0
    value: torch.Tensor = _by_factor(wide, eps) if transformed else recorded(_LogDeterminant, wide, eps)
    return value.to(kernel.dtype)


def _by_factor(kernel: torch.Tensor, eps: float) -> torch.Tensor:
    """Return it by operations that every transform of `torch.func` knows."""
    ridge, _, inverse = _factored(kernel.detach(), eps, look=False)
    value: torch.Tensor = 2.0 * torch.linalg.cholesky(_ridged(kernel, ridge)).diagonal().log().sum()
    return value - torch.minimum(ridge.log() * ridge * inverse.trace(), value.detach())


class _LogDeterminant(torch.autograd.Function):
    """Use `d log det M = tr(M⁻¹ dM)`; the derivative of Cholesky's factor takes four times as long."""

    @staticmethod
    def forward(ctx: Any, kernel: torch.Tensor, eps: float) -> torch.Tensor:
        look = on_host(kernel) and get_proxy_mode() is None and not torch.compiler.is_compiling()
        ridge, factor, inverse = _factored(kernel, eps, look=look, inverted=not look or ctx.needs_input_grad[0])
        ctx.save_for_backward(kernel, ridge, inverse)
        value = 2.0 * factor.diagonal().log().sum()
        if look and not bool(ridge > 1.0):
            return value
        excess = torch.minimum(ridge.log() * ridge * inverse.trace(), value)
        found: torch.Tensor = value - excess
        return found

    @staticmethod
    def backward(ctx: Any, above: torch.Tensor) -> tuple[torch.Tensor, None]:
        kernel, ridge, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            inverse = torch.linalg.inv(_ridged(kernel, ridge))
        return above * inverse, None


def _factored(
    kernel: torch.Tensor, eps: float, *, look: bool, inverted: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the ridge, the factor and the inverse of K with it.

    Args:
        kernel: K, (n, n).
        eps: as for `log_determinant`.
        look: decide by values what is needed, which a trace cannot.
        inverted: the inverse is wanted in any case.
    """
    n = len(kernel)
    small, ridge = ((4.0 * eps * size).clamp_min(1.0) for size in (kernel.trace() / n**0.5, kernel.square().sum().sqrt()))
    if not look or bool(ridge > 1.0):
        _, failed = torch.linalg.cholesky_ex(_ridged(kernel, small))
        ridge = torch.where(failed == 0, small, ridge)
    if on_host(kernel):
        factor = torch.linalg.cholesky(_ridged(kernel, ridge))
        return ridge, factor, torch.cholesky_inverse(factor) if inverted or bool(ridge > 1.0) else factor
    # by what a graph of the device can capture
    factor, failed = torch.linalg.cholesky_ex(_ridged(kernel, ridge))
    factor = factor + torch.where(failed == 0, 0.0, torch.nan)
    half = torch.linalg.solve_triangular(factor, torch.eye(n, dtype=kernel.dtype, device=kernel.device), upper=False)
    return ridge, factor, half.mT @ half


def _ridged(kernel: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    return kernel + torch.diag(ridge.expand(len(kernel)))
