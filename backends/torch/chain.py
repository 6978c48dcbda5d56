"""What lies between a parameter and the place where it meets data: nothing, views, or operations on parameters alone."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from .graph import Edge, Graph, called
from .observed import kept_gradients

_WEIGHT_NORM = "WeightNormInterface"
#: Views with several outputs, which share no element.
SPLITS = {"Split", "SplitWithSizes", "UnsafeSplit", "UnsafeSplitWithSizes", "Unbind"}
_VIEWS = {
    "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Select", "Slice", "Clone",
    "Alias", "ToCopy", "Diagonal", "Flip",
} | SPLITS  # fmt: skip


def is_view(graph: Graph, number: int) -> bool:
    """Return whether the node only rearranges or selects elements of its one input."""
    real = not graph.dtype((number, 0)).is_complex  # else a chain: the gradient of a real number is the real part
    return real and len(graph.inputs[number]) == 1 and graph.name(number) in _VIEWS


def sources(graph: Graph, edge: Edge) -> list[str]:
    """Return the parameters at the end of the chain that comes down to the edge."""
    return [graph.parameters[below] for below in _chain(graph, edge) if below in graph.parameters]


def _chain(graph: Graph, edge: Edge) -> list[Edge]:
    """Return the edges of the chain that ends in this one, each once."""
    found: dict[Edge, None] = {}
    stack = [edge]
    while stack:
        edge = stack.pop()
        if edge in found:
            continue
        found[edge] = None
        if edge not in graph.parameters:
            stack += [below for below in reversed(graph.inputs[edge[0]]) if below is not None]
    return list(found)


def view_key(graph: Graph, edge: Edge) -> tuple[Any, ...] | None:
    """Return the steps from the parameter to the edge when all are views, else None."""
    if edge in graph.parameters:
        return ()
    (below, *others) = graph.inputs[edge[0]] or (None,)
    steps = None if below is None or others or not is_view(graph, edge[0]) else view_key(graph, below)
    return None if steps is None else (*steps, (*graph.steps[edge[0]], edge[1]))


def places_in(graph: Graph, source: Edge, name: str) -> torch.Tensor:
    """Return, for each element of the parameter, its place behind the views, counted from 1; 0 when it is not there.

    A view's backward moves elements, so it is asked to move their numbers; in digits below 256, which every precision holds.
    """
    shape = graph.shape(source)
    number = torch.arange(1, prod(shape) + 1, device=graph.heads.device)
    places, factor = torch.zeros((), dtype=torch.int64, device=graph.heads.device), 1
    while factor <= prod(shape):
        digits = (number // factor % 256).reshape(shape).to(graph.dtype(source))
        (digit,) = pull_chain(graph, source, digits, [name], differentiable=False)
        places = places + digit.reshape(-1).to(torch.int64) * factor
        factor *= 256
    return places


def pull_chain(
    graph: Graph, source: Edge, gradient: torch.Tensor, names: list[str], *, differentiable: bool
) -> list[torch.Tensor]:
    """Return the gradients of parameters from that at the end of their chain.

    Args:
        graph: the graph.
        source: the end of the chain.
        gradient: the gradient there.
        names: the parameters.
        differentiable: keep the graph.

    Returns:
        One gradient for each name.
    """
    edges = {name: edge for edge, name in graph.parameters.items()}
    gradient = gradient.to(graph.dtype(source))
    if differentiable and any(graph.name(number) == _WEIGHT_NORM for number, _ in _chain(graph, source)):
        by_edge = _pull_by_hand(graph, source, gradient)
        return [by_edge[edges[name]] for name in names]
    return _pull(graph, source, gradient, [edges[name] for name in names], create_graph=differentiable)


def pull_chains(graph: Graph, source: Edge, gradients: torch.Tensor, names: list[str]) -> list[torch.Tensor] | None:
    """Return what `pull_chain` does for a batch of gradients; None where an operation in the chain takes only one."""
    edges = {name: edge for edge, name in graph.parameters.items()}
    gradients = gradients.to(graph.dtype(source))
    try:
        found = _pull(graph, source, gradients, [edges[name] for name in names], is_grads_batched=True, materialize_grads=False)
    except RuntimeError:
        return None
    return None if any(part is None for part in found) else found


def _pull(graph: Graph, source: Edge, gradient: torch.Tensor, edges: list[Edge], **options: bool) -> list[torch.Tensor]:
    top, *wanted = (GradientEdge(graph.nodes[number], output) for number, output in (source, *edges))
    options = {"materialize_grads": True, **options}
    with kept_gradients(graph.nodes):
        return list(torch.autograd.grad([top], wanted, [gradient], retain_graph=True, allow_unused=True, **options))


def _pull_by_hand(graph: Graph, edge: Edge, gradient: torch.Tensor) -> dict[Edge, torch.Tensor]:
    """Pull a gradient node by node, past weight normalisations, whose second derivative PyTorch has wrong.

    Their own backward takes the norms that it kept for constants (PyTorch 2.13: `gradgradcheck` of `torch._weight_norm` fails).
    """
    total: dict[Edge, torch.Tensor] = {edge: gradient}
    numbers = {number for number, _ in _chain(graph, edge)} - {number for number, _ in graph.parameters}
    for number in sorted(numbers, reverse=True):  # a node comes after those that it depends on
        node = graph.nodes[number]
        given = [total.get((number, output)) for output in range(len(node._input_metadata))]
        if all(part is None for part in given):
            continue
        parts = _through_weight_norm(node, given[0]) if graph.name(number) == _WEIGHT_NORM else called(node, given)
        for child, part in zip(graph.inputs[number], parts, strict=True):
            if child is not None and part is not None:
                part = part.sum_to_size(graph.shape(child))
                total[child] = total[child] + part if child in total else part
    return total


def _through_weight_norm(node: Any, gradient: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients in v and g of `g v / ‖v‖`, the norm over all axes but one."""
    v, g, axis = node._saved_v, node._saved_g, int(node._saved_dim)
    axes = [other for other in range(v.ndim) if other != axis]
    square = (v * v).sum(axes, keepdim=True)
    along = (gradient * v).sum(axes, keepdim=True) / square
    return (g / square.sqrt()) * (gradient - v * along), along * square.sqrt()
