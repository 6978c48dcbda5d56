"""The log determinant of a kernel, with its inverse for the gradient."""

from __future__ import annotations

from typing import Any

import torch

from .products import on_host, recorded


def log_determinant(kernel: torch.Tensor, eps: float) -> torch.Tensor:
    """Return log det(I + K), as the core's `penalty.py` says.

    Of a K without a factor it is NaN on a device: to raise there would wait for it.

    Args:
        kernel: K, (n, n).
        eps: of the precision in which K was computed.
    """
    wide = kernel if kernel.device.type == "mps" else kernel.double()
    value: torch.Tensor = recorded(_LogDeterminant, wide, eps).to(kernel.dtype)
    return value


class _LogDeterminant(torch.autograd.Function):
    """Use `d log det M = tr(M⁻¹ dM)`; the derivative of Cholesky's factor takes four times as long."""

    @staticmethod
    def forward(ctx: Any, kernel: torch.Tensor, eps: float) -> torch.Tensor:
        n = len(kernel)
        sizes = kernel.trace() / n**0.5, kernel.square().sum().sqrt()
        small, large = ((4.0 * eps * size).clamp_min(1.0) for size in sizes)
        _, failed = torch.linalg.cholesky_ex(_ridged(kernel, small))
        ridge = torch.where(failed == 0, small, large)
        if on_host(kernel):
            factor = torch.linalg.cholesky(_ridged(kernel, ridge))
            inverse = torch.cholesky_inverse(factor)
        else:  # by what a graph of the device can capture
            factor, failed = torch.linalg.cholesky_ex(_ridged(kernel, ridge))
            factor = factor + torch.where(failed == 0, 0.0, torch.nan)
            half = torch.linalg.solve_triangular(factor, torch.eye(n, dtype=kernel.dtype, device=kernel.device), upper=False)
            inverse = half.mT @ half
        value = 2.0 * factor.diagonal().log().sum()
        ctx.save_for_backward(kernel, ridge, inverse)
        excess = torch.minimum(ridge.log() * ridge * inverse.trace(), value)
        found: torch.Tensor = value - excess
        return found

    @staticmethod
    def backward(ctx: Any, above: torch.Tensor) -> tuple[torch.Tensor, None]:
        kernel, ridge, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            inverse = torch.linalg.inv(_ridged(kernel, ridge))
        return above * inverse, None


def _ridged(kernel: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    return kernel + torch.diag(ridge.expand(len(kernel)))
