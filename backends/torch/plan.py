"""Find where the parameters meet data, in a graph of one structure.

Going up from a parameter, a node either only reshapes or transforms it (`weight.T`, weight normalisation: part of the *chain*),
or is the *site* where data enter. The gradient at the node's output tells them apart: at a site, its rows belong to single
samples (see the core's `_layout.py`); in a chain they do not. So every node that a chain reaches is taken for a site and tested,
and goes to the chain if it fails. Samples interact where data enter a chain, so that samples separate only later, where no data
enter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from mgs_core._errors import SamplesInteractError, UnsupportedModelError
from mgs_core._layout import BASE, Layout, find_layout, rounding, sample_weights

from .chain import is_view, sources
from .graph import Edge, Graph
from .moves import Gradients, by_element, values_decide
from .rules import Place, Site, site_of
from .rules.normalisation import BATCH_NORMS
from .scattered import Scattered, find_scattered

# of their inputs only the first can be data
_DATA_FIRST = {*BATCH_NORMS, "Convolution", "NativeLayerNorm", "NativeGroupNorm"}
# the data are among what the node keeps, not among its inputs
_DATA_INSIDE = {
    "Embedding", "EmbeddingBag", "Index", "IndexSelect", "Gather", "Take", "Expand", "Repeat", "Where", "MaskedFill", "IndexFill",
}  # fmt: skip


@dataclass(frozen=True)
class Use:
    """Hold one use of a parameter, by numbers in the graph, so that it fits every graph of the same structure.

    Attributes:
        site: number of the node.
        slot: which of its inputs.
        source: the edge there.
        layouts: where the samples are, for each output of the node; one for a node with a rule.
    """

    site: int
    slot: int
    source: Edge
    layouts: tuple[Layout | Scattered | None, ...]


@dataclass(frozen=True)
class Plan:
    """Hold the uses of all parameters.

    Attributes:
        uses: the uses.
        sure: whether the plan may hold for other values too: not where zeros hide the samples, nor where values decide which of
            them meet.
    """

    uses: tuple[Use, ...]
    sure: bool


def make_plan(graph: Graph, n: int, gradients: Gradients, inputs: Set[tuple[int, int]] = frozenset()) -> Plan:
    """Find the uses of every parameter.

    Args:
        graph: the graph.
        n: number of samples.
        gradients: pulls gradients.
        inputs: where the values of data are, as far as they are known, and how many.

    Returns:
        The plan.

    Raises:
        SamplesInteractError: when samples interact after a parameter.
        UnsupportedModelError: when it only seems so, for a backward function is not linear.
    """
    try:
        return _find_plan(graph, n, gradients, inputs)
    except SamplesInteractError:
        if _bends(graph, n, gradients):
            raise UnsupportedModelError(
                "`model` must have a backward pass that is linear in the gradient that comes in; got one that is not, as of a "
                "torch.autograd.Function or a hook of a tensor that normalises, clips or rounds gradients, or adds to them. Take "
                "it out on the steps that are measured, or clip the gradients of parameters, after the backward pass."
            ) from None
        raise


def _bends(graph: Graph, n: int, gradients: Gradients) -> bool:
    """Return whether the gradients of the parameters do not grow as the heads' weights do."""
    factor = float(2**BASE)  # of the largest weight
    ones = torch.ones(n, dtype=graph.heads.dtype, device=graph.heads.device)
    for single, many in zip(*gradients(list(graph.parameters), [ones, factor * ones]), strict=True):
        if single is None or many is None or single.is_sparse or not bool(torch.isfinite(many).all()):
            continue
        tolerance = rounding(torch.finfo(single.dtype).eps) * single.abs().max() + torch.finfo(single.dtype).tiny
        if bool(((many / factor - single).abs() > tolerance).any()):
            return True
    return False


def _find_plan(graph: Graph, n: int, gradients: Gradients, inputs: Set[tuple[int, int]]) -> Plan:
    weights = [torch.tensor(weight, dtype=graph.heads.dtype, device=graph.heads.device) for weight in sample_weights(n)]
    failed: set[int] = set()
    known: dict[int, _Found] = {}
    while True:
        sites = _classify(graph, failed)
        fresh = [number for number, slots in sites.items() if number not in known or known[number].layouts.keys() != slots.keys()]
        if not fresh:
            break
        known |= _test(graph, fresh, sites, weights, gradients)
        # what has only chains for inputs belongs to the chain where one sample cannot tell, or no data have entered yet: then
        # rows of single samples are by chance, as those of normalised weights of classes of which the batch has one sample each
        mixed = [
            number
            for number in fresh
            if not known[number].separate
            or (
                _alone(graph, number, sites[number])
                and (n == 1 or not (known[number].silent or _data_may_have_entered(graph, number)))
            )
        ]
        up = [number for number in mixed if not _data_enter(graph, number, sites[number])]
        if mixed and not up:  # activations meet the parameter here, and samples mix later
            raise _interaction(graph, sites[mixed[0]].values())
        failed.update(up)
        for number in mixed:
            del known[number]
    root = len(graph.nodes) - 1
    if n > 1 and root in failed:  # they separate nowhere, up to the heads
        raise _interaction(graph, [(root, 0)])
    for number, slots in sites.items():
        # samples separate where no data enter: they entered before, and were mixed
        if _alone(graph, number, slots) and not known[number].silent:
            raise _interaction(graph, slots.values())
    data = set().union(*(_constants(graph, number) for number in sites))
    for number in failed:  # a constant that is data elsewhere is data here
        held = {(tensor.data_ptr(), tensor.numel()) for tensor in _tensors(graph, number)}
        if not data.isdisjoint(_constants(graph, number)) or not inputs.isdisjoint(held):
            raise _interaction(graph, [(number, 0)])
    uses = [
        Use(number, slot, edge, known[number].layouts[slot]) for number, slots in sites.items() for slot, edge in slots.items()
    ]
    sure = all(known[number].sure for number in sites)
    at = {(use.site, output): layout for use in uses for output, layout in enumerate(use.layouts) if isinstance(layout, Layout)}
    arrange = {use.site: arrangement(site_of(Place(graph, use.site, use.slot))) for use in uses}
    holds = sure and not values_decide(graph, at, weights, gradients, lambda edge, gradient: arrange[edge[0]](gradient))
    return Plan(tuple(uses), holds)


#: Where the samples are at an output of a node, and how sure that is.
_Seen: TypeAlias = tuple[Layout | Scattered | None, str]


@dataclass(frozen=True)
class _Found:
    """Hold the layouts of a node by slot; whether samples separate there, for other values too, or all is zero."""

    layouts: dict[int, tuple[Layout | Scattered | None, ...]]
    separate: bool
    sure: bool
    silent: bool


def _alone(graph: Graph, number: int, slots: dict[int, Edge]) -> bool:
    """Return whether no data can enter at the node."""
    return not _data_enter(graph, number, slots) and not _data_may_enter(graph, number)


def _data_enter(graph: Graph, number: int, slots: dict[int, Edge]) -> bool:
    """Return whether the node has an input that depends on parameters and is no chain: activations."""
    return any(edge is not None and slot not in slots for slot, edge in enumerate(graph.inputs[number]))


def _data_may_enter(graph: Graph, number: int) -> bool:
    """Return whether the node has an input that may be data: a constant, or what the node keeps."""
    name = graph.name(number)
    inputs = graph.inputs[number]
    return name in _DATA_INSIDE or any(edge is None for edge in (inputs[:1] if name in _DATA_FIRST else inputs))


def _data_may_have_entered(graph: Graph, number: int) -> bool:
    """Return whether data may enter at a node that leads from the parameters to this one."""
    nodes = [number]
    for node in nodes:
        if _data_may_enter(graph, node):
            return True
        below = {edge[0] for edge in graph.inputs[node] if edge is not None}
        nodes += below.difference(nodes)
    return False


def _constants(graph: Graph, number: int) -> set[int]:
    """Return where the constants are kept that the node holds."""
    return {tensor.untyped_storage().data_ptr() for tensor in _tensors(graph, number)}


def _tensors(graph: Graph, number: int) -> list[torch.Tensor]:
    """Return the constants that the node holds, but for single numbers."""
    node = graph.nodes[number]
    held = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    tensors = [value for value in held if isinstance(value, torch.Tensor) and not value.requires_grad and value.numel() > 1]
    return [tensor for tensor in tensors if tensor.layout == torch.strided]


def _classify(graph: Graph, failed: set[int]) -> dict[int, dict[int, Edge]]:
    """Return the sites, with the slots at which a chain ends."""
    entries = {number for number, _ in graph.parameters}
    chain: set[int] = set()
    sites: dict[int, dict[int, Edge]] = {}
    for number, edges in enumerate(graph.inputs):
        slots = {
            slot: edge
            for slot, edge in enumerate(edges)
            if edge is not None and (edge in graph.parameters or (edge[0] in chain and edge[0] not in entries))
        }
        if not slots:
            continue
        if is_view(graph, number) or number in failed:
            chain.add(number)
        else:
            sites[number] = slots
    return sites


def _test(
    graph: Graph, fresh: list[int], sites: dict[int, dict[int, Edge]], weights: list[torch.Tensor], gradients: Gradients
) -> dict[int, _Found]:
    """Test whether samples separate at the nodes."""
    edges = [(number, output) for number in fresh for output in range(len(graph.nodes[number]._input_metadata))]
    flat, *weighted = gradients(edges, [torch.ones_like(weights[0]), *weights])
    at = {edge: (flat[place], [found[place] for found in weighted]) for place, edge in enumerate(edges)}
    results = {}
    for number in fresh:
        layouts: dict[int, tuple[Layout | Scattered | None, ...]] = {}
        states: list[str] = []
        scattered = not _alone(graph, number, sites[number])  # a chain may lead to one sample only
        seen: dict[Any, _Seen] = {}
        for slot in sites[number]:
            site = site_of(Place(graph, number, slot))
            outputs = [edge for edge in edges if edge[0] == number] if site is None else [(number, 0)]
            found = [_of_output(arrangement(site), *at[edge], weights, scattered, seen) for edge in outputs]
            layouts[slot] = tuple(layout for layout, _ in found)
            states += [state for _, state in found]
        results[number] = _Found(
            layouts,
            separate="mixed" not in states,
            sure="open" not in states and "silent" not in states,
            silent=all(state in ("silent", "absent") for state in states),
        )
    return results


def _of_output(
    arrange: Callable[[torch.Tensor], torch.Tensor],
    flat: torch.Tensor | None,
    weighted: list[torch.Tensor | None],
    weights: list[torch.Tensor],
    scattered: bool,
    seen: dict[Any, _Seen],
) -> _Seen:
    if flat is None:
        return None, "absent"
    if flat.is_nested:
        raise UnsupportedModelError(
            "`model` must not compute with nested tensors; got one. Pad the sequences and mask the padding."
        )
    if flat.layout != torch.strided:
        raise UnsupportedModelError(
            f"`model` must not make sparse tensors of its parameters; got one ({flat.layout}). Multiply by a mask instead."
        )
    first, *others = (arrange(gradient) for gradient in (flat, *weighted) if gradient is not None)
    # a weight and its bias see the same gradient, which is looked at once
    view = (flat.data_ptr(), first.shape, first.stride()) if first.data_ptr() == flat.data_ptr() else object()
    if view not in seen:
        layout, state = find_layout(first, others, weights, torch.finfo(flat.dtype).eps)
        rows = find_scattered(first, others, len(weights[0])) if scattered and state == "mixed" else None
        seen[view] = (layout, state) if rows is None else (rows, "open")
    return seen[view]


def arrangement(site: Site | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return how the gradient is arranged to (groups, *lead, features); without a rule every axis may hold the samples."""
    return by_element if site is None else site.arrange


def _interaction(graph: Graph, edges: Iterable[Edge]) -> SamplesInteractError:
    names = [name for edge in edges for name in sources(graph, edge)]
    mixing = [n for n in range(len(graph.nodes)) if graph.name(n) in BATCH_NORMS and graph.nodes[n]._saved_training]
    gains = [graph.parameters[edges[1]] for edges in (graph.inputs[n] for n in mixing) if edges[1] in graph.parameters]
    if mixing:
        where = "batch normalisation in training mode"
        remedy = (
            'Use `model.eval()`, MGSLoss(…, batch_norm="frozen"), Configured(model, batch_norm="frozen"), another normalisation,'
        )
        where += "".join(f", {layer!r}" for layer in (name.rpartition(".")[0] for name in gains) if layer)
    else:
        where = "statistics over the batch, outputs flat over positions, or a loss that compares samples"
        remedy = 'Penalise another head than such a loss, as `output="trace"`; or use `model.eval()`,'
    return SamplesInteractError(
        f"`model` must treat each sample by itself; got samples that interact after parameter {names[0]!r} ({where}). "
        f"{remedy} or leave these parameters out by `parameters=`."
    )
