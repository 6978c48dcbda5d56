"""What the derivatives written by hand have in common: precision, memory that is used again, and that they are the last ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from math import prod
from typing import Any, TypeVar, cast

import torch

from mgs_core._errors import ArgumentError
from mgs_core.contraction import MEMORY_BUDGET

Function = TypeVar("Function", bound=Callable[..., Any])


def full_precision(function: Function) -> Function:
    """Let the products of a function have the precision of their arguments, whatever automatic mixed precision says."""

    @wraps(function)
    def guarded(*arguments: Any, **keywords: Any) -> Any:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*arguments, **keywords)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*arguments, **keywords)

    return cast(Function, guarded)


@full_precision
def symmetric_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `left rightᵀ` over the last axis."""
    if right is left and left.requires_grad:
        return recorded(_Gram, left)
    return left @ right.mT


class _Gram(torch.autograd.Function):
    """`R Rᵀ`, for a batch of matrices."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        return rows @ rows.mT

    @staticmethod
    @full_precision
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = ctx.saved_tensors[0]
        return (gradients[0] + gradients[0].mT) @ rows


def on_host(array: torch.Tensor) -> bool:
    """Return whether the processor computes with it: elsewhere each operation costs a launch, and no cache need be kept."""
    return array.device.type == "cpu"


def room(array: torch.Tensor, cache: int) -> int:
    """Return how many elements are best handled at a time: what the processor's cache has room for, or all that memory has."""
    return cache if on_host(array) else MEMORY_BUDGET


def is_capturing() -> bool:
    """Return whether operations are recorded for a graph of the device, so that there are no values to look at."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def add_gram(kernel: torch.Tensor, rows: torch.Tensor) -> None:
    """Add `R Rᵀ` to the kernel."""
    kernel.addmm_(rows, rows.T)


def recorded(function: Any, *arguments: Any) -> torch.Tensor:
    """Return what an autograd function gives, recorded in the graph."""
    result: torch.Tensor = function.apply(*arguments)
    return result


class Buffers:
    """Hold memory that is used again: to get new memory from the system takes about as long as to compute what goes there."""

    def __init__(self, like: torch.Tensor) -> None:
        self._like = like
        self._held: dict[int, torch.Tensor] = {}

    def take(self, number: int, *shape: int) -> torch.Tensor:
        """Return an array of the shape, with anything in it, in the buffer of that number."""
        size = prod(shape)
        held = self._held.get(number)
        if held is None or held.numel() < size:
            held = self._held[number] = self._like.new_empty(size)
        return held[:size].view(shape)


def differentiated_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let the `backward` of an autograd function refuse to be differentiated again.

    PyTorch's `once_differentiable` does so only where the gradient above needs gradients and all leaves are asked for; elsewhere
    a part of the next derivative would be missing in silence.
    """

    @wraps(backward)
    def guarded(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        depends = [tensor for tensor in (*ctx.saved_tensors, *gradients) if tensor is not None]
        parts = found if isinstance(found, tuple) else (found,)
        return tuple(None if part is None else recorded(_Last, part, *depends) for part in parts)

    return guarded


class _Last(torch.autograd.Function):
    """A gradient whose derivative, in what it depends on, is refused."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, *depends: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> Any:
        raise ArgumentError(
            "`create_graph` must be False for the gradient of a penalty on the kernel; got one that is differentiated again. "
            "Differentiate the loss without the penalty twice."
        )
