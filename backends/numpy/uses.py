"""Find where parameters meet data on a tape, and bring each such place into the layout of the layer statistics.

One function for each operation says what it needs: the layer's input, and how to arrange the gradient at the operation's
output to (groups, *lead, features). The samples are somewhere among the lead axes; `mgs_core._layout` finds out where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import autograd.numpy as anp
import numpy as np
from autograd.numpy.numpy_boxes import ArrayBox

from mgs_core._types import Array

from . import primitives
from .tape import TapeNode, plain


@dataclass(frozen=True, eq=False)
class Site:
    """Hold one place where a parameter, or a view of it, meets data.

    Attributes:
        kind: which layer statistics it has.
        lead: lengths of the axes among which the samples are.
        arrange: takes the gradient at the output to (groups, *lead, o).
        inputs: the layer's input: outer (groups, *lead, i); scale (1, *lead, o); lookup (1, *lead), integers; sum None.
        transposed: whether the weight stands as (o, i).
        size: rows of a table.
    """

    kind: Literal["outer", "sum", "scale", "lookup"]
    lead: tuple[int, ...]
    arrange: Callable[[Array], Array]
    inputs: Array = None
    transposed: bool = False
    size: int = 0


@dataclass(frozen=True, eq=False)
class Use:
    """Hold one use of a parameter.

    Attributes:
        parameter: its name.
        node: the operation.
        views: operations between the parameter and this one, from the parameter on.
        site: the place, or None when no rule knows the operation.
    """

    parameter: str
    node: TapeNode
    views: tuple[TapeNode, ...]
    site: Site | None

    @property
    def view_key(self) -> tuple[Any, ...]:
        """Return what must agree for two uses to share coordinates."""
        steps = tuple((v.function.__name__, repr(v.arguments[1:]), repr(v.options)) for v in self.views)
        return (*steps, self.site is not None and self.site.transposed)


def find_uses(nodes: list[TapeNode]) -> tuple[list[Use], Callable[[TapeNode, TapeNode], bool]]:
    """Return the uses on a tape, and whether a gradient need not flow from a node to its parent.

    Args:
        nodes: the tape's nodes, from the result back.

    Returns:
        (uses in the order of evaluation, stop).
    """
    views: dict[TapeNode, tuple[str, tuple[TapeNode, ...]]] = {}
    uses: list[Use] = []
    for node in reversed(nodes):
        if node.name:
            views[node] = (node.name, ())
            continue
        on_view = [place for place, parent in enumerate(node.parents) if parent in views]
        if len(node.parents) == 1 and on_view and _is_view(node):
            name, chain = views[node.parents[0]]
            views[node] = (name, (*chain, node))
            continue
        for place in on_view:
            name, chain = views[node.parents[place]]
            rule = _RULES.get(node.function)
            uses.append(Use(name, node, chain, rule(node, node.positions[place]) if rule else None))
    return uses, lambda node, parent: parent in views


def _is_view(node: TapeNode) -> bool:
    if node.function is ArrayBox.__getitem__:
        index = node.arguments[1] if isinstance(node.arguments[1], tuple) else (node.arguments[1],)
        return all(isinstance(entry, (int, slice, type(None), type(Ellipsis))) for entry in index)
    return node.function in _VIEWS and node.positions == (0,)


_VIEWS = {
    anp.reshape,
    anp.transpose,
    primitives.transpose,
    primitives.flip,
    anp.swapaxes,
    anp.moveaxis,
    anp.squeeze,
    anp.expand_dims,
    anp.ravel,
}


def _matmul(node: TapeNode, position: int) -> Site | None:
    left, right = node.arguments[:2]
    if position == 1:
        return _weight_right(left, right, anp.shape(node.value))
    # W X = (Xᵀ Wᵀ)ᵀ: the same rule on swapped axes
    if left.ndim != 2 or right.ndim < 2:
        return None
    inputs = anp.swapaxes(right, -1, -2)
    return Site(
        "outer", inputs.shape[:-1], lambda g: anp.expand_dims(anp.swapaxes(g, -1, -2), 0), anp.expand_dims(inputs, 0), True
    )


def _dot(node: TapeNode, position: int) -> Site | None:
    left, right = node.arguments[:2]
    if left.ndim < 2 or right.ndim != 2 or (position == 0 and left.ndim != 2):
        return None
    return _matmul(node, position)


def _weight_right(inputs: Array, weight: Array, out: tuple[int, ...]) -> Site | None:
    if weight.ndim < 2 or inputs.ndim < 2:
        return None
    batch = weight.shape[:-2]
    grouped = [axis for axis, length in enumerate(batch) if length > 1]
    if len(grouped) > 1:
        return None
    lead_rank = len(out) - 1
    inputs = anp.broadcast_to(inputs, (*out[:-2], *inputs.shape[-2:]))
    if not grouped:
        return Site("outer", out[:-1], lambda g: anp.expand_dims(g, 0), anp.expand_dims(inputs, 0))
    axis = lead_rank - 1 - len(batch) + grouped[0]
    lead = tuple(length for place, length in enumerate(out[:-1]) if place != axis)
    return Site("outer", lead, lambda g: anp.moveaxis(g, axis, 0), anp.moveaxis(inputs, axis, 0))


def _elementwise(kind: Literal["sum", "scale"], factor: Callable[[TapeNode, int], Array]) -> Callable[..., Site | None]:
    """Make the rule of an operation with `∂output/∂weight = factor` (None for 1), elementwise with broadcasting."""

    def rule(node: TapeNode, position: int) -> Site | None:
        out, shape = anp.shape(node.value), anp.shape(node.arguments[position])
        aligned = (1,) * (len(out) - len(shape)) + tuple(shape)
        own = [axis for axis, length in enumerate(aligned) if length > 1]
        lead_axes = [axis for axis, length in enumerate(aligned) if length == 1]
        lead = tuple(out[axis] for axis in lead_axes)
        size = prod(shape)

        order = [*lead_axes, *own]

        def arrange(array: Array) -> Array:
            return anp.reshape(array if order == sorted(order) else anp.transpose(array, order), (1, *lead, size))

        multiplier = factor(node, position)
        if kind == "scale":
            return Site("scale", lead, arrange, arrange(anp.broadcast_to(multiplier, out)))
        return Site("sum", lead, arrange if multiplier is None else lambda g: arrange(g * multiplier))

    return rule


def _lookup(node: TapeNode, position: int) -> Site | None:
    table, index = node.arguments[:2]
    if position != 0 or isinstance(index, tuple):
        return None
    indices = np.asarray(plain(index))
    if not np.issubdtype(indices.dtype, np.integer):
        return None
    size, width = table.shape[0], prod(table.shape[1:])
    indices = indices.astype(np.int64)  # in 8 bits the size may have no room
    indices = np.where(indices < 0, indices + size, indices)
    return Site("lookup", indices.shape, lambda g: anp.reshape(g, (1, *indices.shape, width)), indices[None], size=size)


def _other(node: TapeNode, position: int) -> Array:
    return node.arguments[1 - position]


def _division(node: TapeNode, position: int) -> Array:
    above, below = node.arguments[:2]
    return 1.0 / below if position == 0 else -above / below**2


_RULES: Mapping[Any, Callable[[TapeNode, int], Site | None]] = {
    anp.matmul: _matmul,
    anp.dot: _dot,
    anp.add: _elementwise("sum", lambda node, position: None),
    anp.subtract: _elementwise("sum", lambda node, position: None if position == 0 else -1.0),
    anp.multiply: _elementwise("scale", _other),
    anp.true_divide: _elementwise("sum", _division),
    ArrayBox.__getitem__: _lookup,
}
