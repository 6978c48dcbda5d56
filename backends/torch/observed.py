"""Tensors whose gradients users look at, by `retain_grad` or `register_hook`: to them a pass of this library is one too many.

In PyTorch every pass through a tensor that retains its gradient adds to it, and nothing says which tensors of a graph these are,
or have hooks. So the two methods of `torch.Tensor` note them, from the import of this backend on, and do what they always do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

_METHODS = ("retain_grad", "register_hook")
_observed: Any = WeakIdKeyDictionary()


def note_observed() -> None:
    """Have tensors noted from now on."""
    for name in _METHODS:
        method = getattr(torch.Tensor, name)
        if not hasattr(method, "notes_tensors"):
            setattr(torch.Tensor, name, _noting(method))


def _noting(method: Any) -> Any:
    @wraps(method)
    def noting(self: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        if self.grad_fn is not None:  # a parameter gets its gradient in any case
            _observed[self] = True
        return method(self, *arguments, **keywords)

    vars(noting)["notes_tensors"] = True
    return noting


def observed(nodes: Iterable[Any]) -> list[torch.Tensor]:
    """Return the tensors made by these nodes whose gradients users look at."""
    if not _observed:
        return []
    made = set(nodes)
    return [tensor for tensor in list(_observed) if tensor.grad_fn in made]


@contextmanager
def kept_gradients(nodes: Iterable[Any]) -> Iterator[None]:
    """Leave the gradients that tensors made by these nodes retain as they were before."""
    before = [(tensor, tensor.grad) for tensor in observed(nodes) if tensor.retains_grad]
    try:
        yield
    finally:
        for tensor, gradient in before:
            tensor.grad = gradient
