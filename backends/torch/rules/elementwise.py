"""Elementwise operations with broadcasting."""

from __future__ import annotations

import torch

from ._registry import Place, Site, elementwise, register, total


@register("Add")
def add(place: Place) -> Site | None:
    """`self + alpha · other`."""
    return elementwise(place, 1.0 if place.slot == 0 else float(place.node._saved_alpha))


@register("Sub")
def subtract(place: Place) -> Site | None:
    """`self − alpha · other`."""
    return elementwise(place, 1.0 if place.slot == 0 else -float(place.node._saved_alpha))


@register("Mul")
def multiply(place: Place) -> Site | None:
    """`self · other`."""
    node = place.node
    return elementwise(place, (lambda: node._saved_other) if place.slot == 0 else (lambda: node._saved_self))


@register("Div")
def divide(place: Place) -> Site | None:
    """`self / other`."""
    node = place.node
    if place.slot == 0:
        return elementwise(place, lambda: 1.0 / node._saved_other)
    return elementwise(place, lambda: -node._saved_self / node._saved_other**2)


@register("PreluKernel")
def prelu(place: Place) -> Site | None:
    """`x` where positive, else `weight · x`."""
    if place.slot != 1:
        return None
    x = place.node._saved_self
    return elementwise(place, lambda: torch.where(x > 0, torch.zeros_like(x), x))


@register("Expand")
def expand(place: Place) -> Site | None:
    """One weight repeated along new or single axes: a sum over them."""
    return elementwise(place, 1.0)


@register("Repeat")
def repeat(place: Place) -> Site | None:
    """One weight tiled along its axes: a sum over the tiles."""
    repeats = tuple(place.node._saved_repeats)
    shape = (1,) * (len(repeats) - len(place.weight)) + tuple(place.weight)
    split = [length for pair in zip(repeats, shape, strict=True) for length in pair]
    tiles, own = range(0, len(split), 2), range(1, len(split), 2)

    def arrange(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.reshape(split).permute(*tiles, *own).reshape(1, *repeats, -1)

    return Site(arrange, total)
