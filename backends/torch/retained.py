"""Tensors that retain their gradient (`retain_grad`): the passes of this library leave it as it is.

In PyTorch every pass through such a tensor adds to its gradient, and nothing says which tensors of a graph these are. So
`torch.Tensor.retain_grad` notes them, from the import of this backend on, and does what it always does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

_retaining: Any = WeakIdKeyDictionary()
_retain_grad = torch.Tensor.retain_grad


@wraps(_retain_grad)
def _noted(self: torch.Tensor) -> None:
    _retain_grad(self)
    _retaining[self] = True


def note_retained() -> None:
    """Have tensors noted from now on."""
    if torch.Tensor.retain_grad is _retain_grad:
        torch.Tensor.retain_grad = _noted  # type: ignore[assignment]  # there is no other way to know them


def retained(nodes: Iterable[Any]) -> list[torch.Tensor]:
    """Return the tensors made by these nodes that retain their gradient."""
    if not _retaining:
        return []
    made = set(nodes)
    return [tensor for tensor in list(_retaining) if tensor.grad_fn in made]


@contextmanager
def kept_gradients(nodes: Iterable[Any]) -> Iterator[None]:
    """Leave the gradients that tensors made by these nodes retain as they were before."""
    before = [(tensor, tensor.grad) for tensor in retained(nodes)]
    try:
        yield
    finally:
        for tensor, gradient in before:
            tensor.grad = gradient
