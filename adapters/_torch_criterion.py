"""The loss of each sample, from a criterion of PyTorch that reduces them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import mgs_core as mgs


def sample_losses(
    criterion: Callable[..., Any], outputs: torch.Tensor, arguments: tuple[Any, ...], keywords: dict[str, Any], *, each: bool
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Return losses (n,) and how to reduce them, such that reduced they are the criterion's own value; 0 if nothing counts.

    Unless `each` sample's loss is needed, the value of a criterion that gives no other, as one that compares samples, will do.
    """
    n = outputs.shape[0]
    if n == 0:
        raise mgs.ArgumentError("`outputs` must hold at least one sample; got 0. Leave empty batches out.")
    unreduced, reduction = _without_reduction(criterion)
    elements = unreduced(outputs, *arguments, **keywords)
    if not each and isinstance(elements, torch.Tensor) and elements.ndim == 0:
        return elements, lambda value: value
    if not isinstance(elements, torch.Tensor) or elements.ndim == 0 or elements.shape[0] != n:
        shape = tuple(getattr(elements, "shape", ()))
        raise mgs.ArgumentError(
            f"`criterion` must be able to give a loss for each of {n} samples; got shape {shape}. "
            "Give it an argument or attribute `reduction`, or return losses of shape (n,); outputs have the samples first. "
            'A loss that compares samples has none: penalise another head, as output="trace".'
        )
    losses = elements.reshape(n, -1).sum(1)
    if reduction == "sum":
        return losses, torch.sum
    if reduction == "none":
        return losses * (n / elements.numel()), torch.mean
    # what a mean divides by (weights of classes, ignored targets) only the criterion knows; it does not depend on the outputs
    with torch.no_grad():
        total, size = elements.sum(), elements.abs().sum()
        mean = criterion(outputs, *arguments, **keywords)
        divisor = torch.where(total.abs() > 1e-3 * size, total / mean, float(elements.numel()))
    return losses * (n / divisor), torch.mean


def _without_reduction(criterion: Callable[..., Any]) -> tuple[Callable[..., Any], str]:
    """Return the criterion without reduction, and its reduction: "mean" (of some kind), "sum" or "none"."""
    if hasattr(criterion, "reduction"):
        unreduced: Any = copy.copy(criterion)
        unreduced.reduction = "none"
        return unreduced, str(criterion.reduction)
    try:
        called = criterion.forward if isinstance(criterion, torch.nn.Module) else criterion
        argument = inspect.signature(called).parameters.get("reduction")
    except ValueError:  # a function that does not say what it takes
        argument = None
    if argument is None:
        return criterion, "none"
    return partial(criterion, reduction="none"), str(argument.default)
