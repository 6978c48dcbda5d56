"""Collect the layer statistics of a graph: one backward pass for each head, to the sites only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch.autograd.graph import GradientEdge

from mgs_core._layout import Layout
from mgs_core._protocol import Convolution, LayerStatistics, Rows
from mgs_core.contraction import MEMORY_BUDGET
from mgs_core.statistics import as_rows

from .chain import SPLITS, places_in, pull_chain, pull_chains, sources, view_key
from .graph import Edge, Graph, called
from .observed import kept_gradients
from .order import follow_each_contraction, next_number
from .plan import Plan, Use
from .products import room
from .rules import Place, Site, site_of
from .scattered import Scattered
from .second import cheaper_second_derivatives

#: Elements of gradients up to which several heads are faster together on a CPU: more of them leave its cache.
_TOGETHER = 1 << 22


def pull(graph: Graph, edges: list[Edge], seed: torch.Tensor, *, differentiable: bool = False) -> list[torch.Tensor | None]:
    """Return the gradients of `Σ seed · heads` at the edges; None where none arrives.

    Gradients of parameters are not computed: autograd runs only what leads to the edges.
    """
    return _autograd(graph, edges, seed, create_graph=differentiable)


def _autograd(graph: Graph, edges: list[Edge], seed: torch.Tensor, **options: bool) -> list[torch.Tensor | None]:
    if not edges:  # no use has statistics
        return []
    wanted = [GradientEdge(graph.nodes[number], output) for number, output in edges]
    with kept_gradients(graph.nodes):
        return list(torch.autograd.grad(graph.heads, wanted, seed, retain_graph=True, allow_unused=True, **options))


def _pull_heads(
    graph: Graph, edges: list[Edge], samples: int, wanted: range, differentiable: bool
) -> Iterator[list[torch.Tensor | None]]:
    """Yield the gradients of each head, of several at a time where PyTorch can and their gradients are small."""
    n, k = graph.heads.shape
    together = 1 if differentiable else max(1, MEMORY_BUDGET // _elements(graph, edges))
    for start in range(wanted.start, wanted.stop, together):
        heads = range(start, min(start + together, wanted.stop))
        seeds = torch.zeros(len(heads), n, k, dtype=graph.heads.dtype, device=graph.heads.device)
        for row, head in enumerate(heads):
            seeds[row, :samples, head] = 1.0
        batched = _pull_batch(graph, edges, seeds) if len(heads) > 1 else None
        for row, seed in enumerate(seeds):
            if batched is None:
                yield pull(graph, edges, seed, differentiable=differentiable)
            else:
                yield [None if part is None else part[row] for part in batched]


def groups_of_heads(graph: Graph, plan: Plan) -> list[range]:
    """Divide the heads into groups whose gradients at all sites are small enough to be handled together."""
    k, together = graph.heads.shape[1], max(1, room(graph.heads, _TOGETHER) // _elements(graph, _edges(plan)))
    return [range(start, min(start + together, k)) for start in range(0, k, together)]


def _edges(plan: Plan) -> list[Edge]:
    """Return the edges at which gradients are needed."""
    return list(dict.fromkeys((use.site, output) for use in plan.uses for output in range(len(use.layouts))))


def _elements(graph: Graph, edges: list[Edge]) -> int:
    """Return how many elements the gradients of one head have."""
    return max(1, sum(prod(graph.shape(edge)) for edge in edges))


def _pull_batch(graph: Graph, edges: list[Edge], seeds: torch.Tensor) -> list[torch.Tensor | None] | None:
    """Return the gradients for each of the seeds; None where an operation, such as one written in Python, takes only one."""
    try:
        return _autograd(graph, edges, seeds, is_grads_batched=True)
    except RuntimeError:
        return None


def weighted_pulls(graph: Graph, edges: list[Edge], weights: list[torch.Tensor]) -> list[list[torch.Tensor | None]]:
    """Return the gradients at the edges, for each weighting (n,) of the samples."""
    n, k = graph.heads.shape
    # distinct factors keep heads from cancelling, as the outputs of a softmax would
    factors = 1.0 + torch.arange(1, k + 1, device=graph.heads.device, dtype=graph.heads.dtype) / (k + 1)
    seed = factors.expand(n, k)
    return [pull(graph, edges, seed * weight[:, None]) for weight in weights]


def collect(graph: Graph, plan: Plan, samples: int, heads: range, *, differentiable: bool) -> list[LayerStatistics]:
    """Return the statistics of every use in the plan.

    Args:
        graph: the graph of a batch.
        plan: made for its structure.
        samples: only the first so many samples are wanted.
        heads: only these heads are.
        differentiable: keep the graph of the gradients.

    Returns:
        Statistics that together cover every chosen parameter that moves the heads.
    """
    edges = _edges(plan)
    first = next_number() if differentiable else 0
    with cheaper_second_derivatives(graph.nodes if differentiable else ()):
        found = [dict(zip(edges, pulled, strict=True)) for pulled in _pull_heads(graph, edges, samples, heads, differentiable)]
    statistics: list[LayerStatistics] = []
    with torch.set_grad_enabled(differentiable):
        for use in reversed(plan.uses):  # the layers next to the data come last
            at_outputs = [[gradients[use.site, output] for gradients in found] for output in range(len(use.layouts))]
            if any(gradient is not None for by_head in at_outputs for gradient in by_head):
                statistics += _Reader(graph, use, samples, len(heads), differentiable).read(at_outputs)
    if differentiable:
        follow_each_contraction(statistics, first)
    return _divided(statistics)


def _divided(statistics: list[LayerStatistics]) -> list[LayerStatistics]:
    """Number the parts of parameters that are split before all of their uses, such as packed weights of attention."""
    firsts: dict[str, set[tuple[Any, ...]]] = {}
    for use in statistics:
        # the first step from the parameter without the number of its output; () where there is no view
        step = use.view[0][:-1] if use.view and isinstance(use.view[0], tuple) else ()
        firsts.setdefault(use.parameter, set()).add(step)
    split = {name for name, steps in firsts.items() if len(steps) == 1 and next(iter(steps))[:1] in {(kind,) for kind in SPLITS}}
    return [replace(use, part=use.view[0][-1]) if use.parameter in split else use for use in statistics]


class _Reader:
    """Read the statistics of one use."""

    def __init__(self, graph: Graph, use: Use, samples: int, heads: int, differentiable: bool) -> None:
        self._graph, self._use, self._differentiable = graph, use, differentiable
        self._k = heads
        self._n = graph.heads.shape[0]
        self._samples = samples
        self._site = site_of(Place(graph, use.site, use.slot))
        self._names = sources(graph, use.source)
        self._views = view_key(graph, use.source)
        self._form = (1, 1)  # groups and outputs of the statistics

    def read(self, gradients: list[list[torch.Tensor | None]]) -> list[LayerStatistics]:
        """Return statistics, from the gradients by output of the node and head."""
        transposed = self._site is not None and self._site.transposed
        common: dict[str, Any] = {"parameter": self._names[0], "view": (*(self._views or ()), transposed)}
        if self._views or transposed:
            common["restore"] = self._restore
        use = (
            Rows(gradients=self._rows(gradients), **common)
            if self._site is None
            else self._layer(self._site, gradients[0], common)
        )
        if self._views is not None:
            return [use]
        rows = self._through_chain(self._to_source(as_rows(use)))
        return [Rows(name, part) for name, part in rows.items()]

    def _layer(self, site: Site, gradients: list[torch.Tensor | None], common: Mapping[str, Any]) -> LayerStatistics:
        layout = self._use.layouts[0]
        if layout is None:
            raise TypeError("`layouts` must give the layout of a site with a rule; got None.")
        some = next(gradient for gradient in gradients if gradient is not None)
        given = [torch.zeros_like(some) if gradient is None else gradient for gradient in gradients]

        def split(gradient: torch.Tensor) -> torch.Tensor:
            return self._split(layout, site.arrange(gradient))

        summed = site.rows if some.numel() else None  # not of an expert without a sample
        by_head = [split(gradient) if summed is None else summed(split, gradient) for gradient in given]
        d = torch.stack(by_head, dim=1) if len(by_head) > 1 else by_head[0].unsqueeze(1)
        if site.shared:  # a bias that is broadcast has the sum of what its weight has
            common = {**common, "origin": (self._use.site, layout, some.shape[-1] == d.shape[-1])}
        inputs = None
        if site.inputs is not None:
            at_layer = site.inputs()
            inputs = self._split(layout, at_layer if self._differentiable else at_layer.detach())
        use = site.make(d, inputs, **common)
        shape = use.gradients.shape
        self._form = shape[3:5] if isinstance(use, Convolution) else (shape[2], shape[-1])
        return use

    def _split(self, layout: Layout | Scattered, array: torch.Tensor) -> torch.Tensor:
        """Return (samples, groups, s, features)."""
        split = layout.split(array, self._n)
        # a slice of all would be filled up with zeros by its derivative
        return _wide(split if self._samples == self._n else split[: self._samples])

    def _rows(self, gradients: list[list[torch.Tensor | None]]) -> torch.Tensor:
        """Return rows in the coordinates of the source, by one call of the node's backward for each sample and head."""
        node, slot, shape = self._graph.nodes[self._use.site], self._use.slot, self._graph.shape(self._use.source)
        rows = []
        for sample in range(self._samples):
            for head in range(self._k):
                masked = [
                    None if by_head[head] is None else _of_sample(by_head[head], layout, sample, self._n)
                    for by_head, layout in zip(gradients, self._use.layouts, strict=True)
                ]
                part = called(node, masked)[slot]
                # none where the operation, itself a derivative, does not change with the parameter
                rows.append(self._graph.zeros(self._use.source) if part is None else part.sum_to_size(shape))
        return _wide(torch.stack(rows).reshape(self._samples, self._k, prod(shape)))

    def _to_source(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows (n, k, size) in the order of the source's elements, (n, k, *shape)."""
        shape = self._graph.shape(self._use.source)
        if self._site is not None and self._site.transposed:
            groups, o = self._form
            rows = rows.reshape(*rows.shape[:2], groups, -1, o).mT
        return rows.reshape(*rows.shape[:2], *shape)

    def _through_chain(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return rows (n, k, p) of the parameters, by a backward pass through the chain for each sample and head, or for all."""
        by_name: dict[str, list[torch.Tensor]] = {name: [] for name in self._names}
        rows = rows.flatten(0, 1)
        batched = None if self._differentiable else pull_chains(self._graph, self._use.source, rows, self._names)
        if batched is not None:
            return {name: part.reshape(self._samples, self._k, -1) for name, part in zip(self._names, batched, strict=True)}
        for row in rows:
            parts = pull_chain(self._graph, self._use.source, row, self._names, differentiable=self._differentiable)
            for name, part in zip(self._names, parts, strict=True):
                by_name[name].append(part.reshape(-1))
        return {name: torch.stack(parts).reshape(self._samples, self._k, -1) for name, parts in by_name.items()}

    def _restore(self, rows: torch.Tensor) -> torch.Tensor:
        rows = self._to_source(rows)  # not flat yet: that may copy
        if self._views and len(self._views) == 1 and self._views[0][0] == "T":  # of every nn.Linear
            return rows.mT.flatten(2)
        if self._views and rows.shape[:2] == (1, 1):
            (pulled,) = pull_chain(self._graph, self._use.source, rows[0, 0], self._names, differentiable=self._differentiable)
            return pulled.reshape(1, 1, -1)
        rows = rows.reshape(*rows.shape[:2], -1)  # `flatten` takes no element of a parameter, which has no axis
        if not self._views:
            return rows
        places = places_in(self._graph, self._use.source, self._names[0])
        rows = torch.nn.functional.pad(rows, (1, 0))  # place 0: elements of the parameter that the view leaves out
        return rows[:, :, places]


def _of_sample(gradient: torch.Tensor | None, layout: Layout | Scattered | None, sample: int, n: int) -> torch.Tensor | None:
    """Return the gradient with the rows of all other samples set to zero."""
    if gradient is None or layout is None:
        return gradient
    mask = torch.zeros(n, dtype=gradient.dtype, device=gradient.device)
    mask[sample] = 1.0
    return gradient * layout.spread(mask, gradient.shape)


def _wide(array: torch.Tensor) -> torch.Tensor:
    """Return low-precision values in float32, in which kernels are summed."""
    return array.float() if array.dtype in (torch.bfloat16, torch.float16) else array
