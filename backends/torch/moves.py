"""Ask of a graph whether values decide which samples meet: then its plan may be wrong for the next batch, and is not kept.

Ways between samples that values close (a factor of zero, a mask, a matrix that is the identity for once) are found by a backward
pass that begins with NaN, for `0 · NaN = NaN`. Operations in which values choose a way, so that NaN goes no other (indexing,
sorting), are known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from mgs_core._layout import Layout, find_layout, halves, reaches_others

from .graph import Edge, Graph

#: `(edges, weights)` → for each weighting (n,) of the samples, the gradients of the sum over samples and heads at the edges.
Gradients = Callable[[list[Edge], list[torch.Tensor]], list[list[torch.Tensor | None]]]

# data say to which sample they take a row
_MOVERS = {
    "Cummax", "Cummin", "Embedding", "EmbeddingBag", "Gather", "IndexAdd", "IndexCopy", "IndexPut", "IndexSelect",
    "MaskedScatter", "MaskedSelect", "PackPaddedSequence", "Scatter", "ScatterAdd", "ScatterReduce",
    "SegmentReduce", "Sort", "SparseAddmm", "Take", "Topk",
}  # fmt: skip
_PRODUCTS = {"Addmm", "Addmv", "Baddbmm", "Bmm", "Mm", "Mv"}
# elementwise, with a derivative that is zero, not zero times what comes, where values say so
_GATES = {
    "Clamp", "ClampMax", "ClampMin", "Fmax", "Fmin", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "MaskedFill",
    "Maximum", "Minimum", "NanToNum", "Relu", "Softshrink", "Threshold", "Where",
}  # fmt: skip


def indexed(graph: Graph, number: int) -> bool:
    """Return whether the node takes rows of activations, not of a parameter's table, to where data say."""
    if graph.name(number) == "Index":
        return not graph.steps[number][-1]  # see read_graph
    return graph.name(number) in _MOVERS and not any(edge in graph.parameters for edge in graph.inputs[number])


def values_decide(
    graph: Graph,
    sites: Mapping[Edge, Layout],
    weights: list[torch.Tensor],
    gradients: Gradients,
    arrange: Callable[[Edge, torch.Tensor], torch.Tensor],
) -> bool:
    """Return whether values may let samples meet, or take rows to other samples, in another batch.

    Args:
        graph: the graph.
        sites: where the samples are at the outputs of the sites.
        weights: those of `sample_weights`.
        gradients: pulls gradients.
        arrange: arranges the gradient at the output of a site to (groups, *lead, features).
    """
    n = len(weights[0])
    if n == 1 or not sites:
        return False
    active: set[int] = set()
    along: list[Edge] = []
    for number, edges in enumerate(graph.inputs):
        if any(edge is not None and edge[0] in active for edge in edges):
            active.add(number)
            node = graph.nodes[number]
            if graph.name(number) in _PRODUCTS and _has_sparse(node):
                return True
            if indexed(graph, number):
                if not hasattr(node, "_saved_dim"):
                    return True
                along.append((number, 0))
        elif any(edge[0] == number for edge in sites):
            active.add(number)
    if along and _moves_samples(graph, along, weights, gradients):
        return True
    for half in halves(n):
        nan = torch.full_like(weights[0], torch.nan)
        nan[half] = 1.0
        with torch.autograd.set_detect_anomaly(False), _open_gates(graph, active):
            (tainted,) = gradients(list(sites), [nan])
        pairs = zip(sites.items(), tainted, strict=True)
        if any(value is not None and reaches_others(arrange(edge, value), layout, n, half) for (edge, layout), value in pairs):
            return True
    return False


def by_element(gradient: torch.Tensor) -> torch.Tensor:
    """Return (1, *lead, 1), or (1, *lead, 2) of complex numbers: the samples may be on any axis."""
    return (torch.view_as_real(gradient) if gradient.is_complex() else gradient[..., None])[None]


def _has_sparse(node: Any) -> bool:
    held = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    return any(isinstance(value, torch.Tensor) and value.layout != torch.strided for value in held)


def _moves_samples(graph: Graph, edges: list[Edge], weights: list[torch.Tensor], gradients: Gradients) -> bool:
    """Return whether one of the nodes moves entries along the axis of the samples."""
    for edge, flat, *weighted in zip(edges, *gradients(edges, [torch.ones_like(weights[0]), *weights]), strict=True):
        if flat is None:
            continue
        eps = torch.finfo(flat.dtype).eps
        layout, state = find_layout(by_element(flat), [by_element(value) for value in weighted], weights, eps)
        dim = graph.nodes[edge[0]]._saved_dim
        dim -= (dim >= 1 << 63) << 64  # kept without a sign
        if state != "sure" or layout is None or dim % flat.ndim == layout.axis:
            return True
    return False


@contextmanager
def _open_gates(graph: Graph, active: set[int]) -> Iterator[None]:
    """Let NaN go through gates that values have closed."""

    def opened(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(None if part is None else part + (0.0 * outputs[0]).sum_to_size(part.shape) for part in inputs)

    gates = [graph.nodes[number] for number in active if graph.name(number) in _GATES]
    handles = [gate.register_hook(opened) for gate in gates]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
