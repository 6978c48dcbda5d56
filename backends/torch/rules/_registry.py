"""The registry of rules, and what a rule is asked and answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, TypeAlias

import torch

from mgs_core._protocol import LayerStatistics, Outer, Scale, Sum

from ..graph import Graph

#: `(gradients (n, k, g, s, o), inputs (n, g, s, i) or None, **common) → statistics`.
Make: TypeAlias = Callable[..., LayerStatistics]
#: Takes an array of the output's shape to (n, 1, s, o).
Split: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Place:
    """Hold one input of one node, at which a parameter (or what is computed from parameters alone) meets data."""

    graph: Graph
    number: int
    slot: int

    @property
    def node(self) -> Any:
        """Return the autograd node."""
        return self.graph.nodes[self.number]

    @property
    def output(self) -> torch.Size:
        """Return the shape of the node's first output."""
        return self.graph.shape((self.number, 0))

    @property
    def weight(self) -> torch.Size:
        """Return the shape of what comes from the parameter."""
        edge = self.graph.inputs[self.number][self.slot]
        if edge is None:
            raise TypeError("`slot` must be an input that leads to a parameter.")
        return self.graph.shape(edge)


@dataclass(frozen=True, eq=False)
class Site:
    """Hold what the layer statistics at a place are made of.

    Attributes:
        arrange: takes the gradient at the output to (groups, *lead, o); the samples are among the lead axes.
        make: makes the statistics.
        inputs: gives the layer's input as (groups, *lead, i); None when there is none. Called only for statistics.
        transposed: the weight stands as (o, i) where the statistics have (i, o).
        shared: whether the gradient is that at the output, only rearranged: then a weight and its bias have the same.
        rows: makes (n, 1, 1, o), summed over the positions, from the function that splits an array by samples and the gradient;
            None leaves the sum to the statistics.
    """

    arrange: Callable[[torch.Tensor], torch.Tensor]
    make: Make
    inputs: Callable[[], torch.Tensor] | None = None
    transposed: bool = False
    shared: bool = False
    rows: Callable[[Split, torch.Tensor], torch.Tensor] | None = None


Rule: TypeAlias = Callable[[Place], Site | None]
_RULES: dict[str, Rule] = {}


def register(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for nodes by name, without the ending "Backward0"."""

    def enter(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return enter


def site_of(place: Place) -> Site | None:
    """Return the site at a place; None when no rule knows it, so that explicit rows are needed."""
    rule = _RULES.get(place.graph.name(place.number))
    # of complex numbers the node's own backward knows what is conjugate
    return rule(place) if rule is not None and not place.graph.dtype((place.number, 0)).is_complex else None


def outer(gradients: torch.Tensor, inputs: torch.Tensor, **common: Any) -> Outer:
    """Make the statistics of a product."""
    return Outer(gradients=gradients, inputs=inputs, **common)


def total(gradients: torch.Tensor, inputs: None, **common: Any) -> Sum:
    """Make the statistics of a sum."""
    return Sum(gradients=gradients.squeeze(2), **common)


def scale(gradients: torch.Tensor, inputs: torch.Tensor, **common: Any) -> Scale:
    """Make the statistics of an elementwise product."""
    return Scale(gradients=gradients.squeeze(2), inputs=inputs.squeeze(1), **common)


def elementwise(place: Place, factor: Callable[[], torch.Tensor] | float, own: tuple[int, ...] | None = None) -> Site:
    """Return the site of an operation with `∂output/∂weight = factor`, elementwise with broadcasting.

    Args:
        place: the place.
        factor: a number, or gives what the gradient is multiplied by; broadcastable to the output.
        own: axes of the output that the weight has; None where it broadcasts from the right.

    Returns:
        The site.
    """
    out = place.output
    if own is None:
        aligned = (1,) * (len(out) - len(place.weight)) + tuple(place.weight)
        own = tuple(axis for axis, length in enumerate(aligned) if length > 1)
    arrange = partial(_lead_first, own=own)
    if callable(factor):
        get = factor
        return Site(arrange, scale, lambda: arrange(get().expand(out)))
    return Site(lambda gradient: arrange(gradient * factor if factor != 1 else gradient), total)


def _lead_first(array: torch.Tensor, own: tuple[int, ...]) -> torch.Tensor:
    lead = [axis for axis in range(array.ndim) if axis not in own]
    array = array.permute([*lead, *own])  # there may be no element: a last size of -1 would be unknown
    return array.reshape(1, *array.shape[: len(lead)], prod(array.shape[len(lead) :]))
