"""The autograd graph below the heads, as far as it leads to the chosen parameters.

A node is one operation's backward function. `next_functions` has one edge for each of its inputs: None for what needs no gradient
(data, constants), else the node that made it and which of that node's outputs it was. `_saved_…` are the tensors it keeps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from mgs_core._errors import UnsupportedModelError

from .products import is_capturing, on_host

#: Number of a node in `Graph.nodes`, and number of the node's output.
Edge: TypeAlias = tuple[int, int]

# they run parameters that the graph does not show
_OPAQUE = {
    "Python CheckpointFunction": "checkpointing with `use_reentrant=True`; set `use_reentrant=False`",
    "Python RegisterPostBackwardFunction": "parameters that fully_shard shards; use DistributedDataParallel",
    "DifferentiableGraph": "operations fused by torch.jit.script; use the module that was scripted, or PYTORCH_JIT=0",
}


@dataclass(eq=False)
class Graph:
    """Hold the nodes that depend on the chosen parameters, in topological order.

    Attributes:
        heads: the scalars, (n, k), at the root.
        nodes: autograd nodes.
        inputs: for each node and input, the edge; None when nothing there depends on a chosen parameter.
        parameters: the edges at which a chosen parameter enters, by name.
        steps: for each node, its name and settings (axes, strides, flags).
    """

    heads: torch.Tensor
    nodes: list[Any] = field(default_factory=list)
    inputs: list[tuple[Edge | None, ...]] = field(default_factory=list)
    parameters: dict[Edge, str] = field(default_factory=dict)
    steps: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def key(self) -> tuple[Any, ...]:
        """Return what two graphs of one structure have in common."""
        return (tuple(self.heads.shape), tuple(self.inputs), tuple(self.steps), tuple(self.parameters.values()))

    def name(self, number: int) -> str:
        """Return the operation's name, for instance "Addmm"."""
        return str(self.steps[number][0])

    def shape(self, edge: Edge) -> torch.Size:
        """Return the shape of the tensor that flows along the edge."""
        return torch.Size(self.nodes[edge[0]]._input_metadata[edge[1]].shape)

    def dtype(self, edge: Edge) -> torch.dtype:
        """Return the dtype of the tensor that flows along the edge."""
        dtype: torch.dtype = self.nodes[edge[0]]._input_metadata[edge[1]].dtype
        return dtype

    def zeros(self, edge: Edge) -> torch.Tensor:
        """Return a tensor of zeros as flows along the edge."""
        return torch.zeros(self.shape(edge), dtype=self.dtype(edge), device=self.heads.device)


def operation(node: Any) -> str:
    """Return the name of a node's operation, as "Addmm"; "Python Addmm" of one written in Python, which may bear any name."""
    name = _short(node.name())
    return f"Python {name}" if isinstance(node, BackwardCFunction) else name


def written_in(node: Any) -> str:
    """Return the module in which a function is written in Python, "" of other operations: its name alone may be anybody's."""
    return str(getattr(getattr(node, "_forward_cls", None), "__module__", ""))


@cache
def _short(name: str) -> str:
    return re.sub(r"Backward\d*$", "", name.rpartition("::")[2])


def called(node: Any, gradients: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    """Return what a node's backward gives for each of its inputs, in the order of `next_functions`.

    Args:
        node: of an operation.
        gradients: those at its outputs; None for an output that moves nothing.

    Returns:
        A gradient for each input, of the shape that the operation gave it; None where there is none.
    """
    if callable(node):
        parts = node(*gradients)
        return parts if isinstance(parts, tuple) else (parts,)
    # of a function written in Python: its backward gives a part for each argument, tensor or not
    try:
        parts = node.apply(*gradients)
    except (AttributeError, RuntimeError, TypeError):
        if all(gradient is not None for gradient in gradients):
            raise
        # it counts on zeros, which autograd puts in place of None unless told otherwise, and does not say whether it was
        shapes = node._input_metadata
        given = [
            torch.zeros(at.shape, dtype=at.dtype, device=at.device) if gradient is None else gradient
            for gradient, at in zip(gradients, shapes, strict=True)
        ]
        parts = node.apply(*given)
    parts = parts if isinstance(parts, tuple) else (parts,)
    needed = (part for part, needs in zip(parts, node.needs_input_grad, strict=False) if needs)
    return tuple(None if child is None else next(needed) for child, _ in node.next_functions)


def read_graph(heads: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> Graph:
    """Walk from the heads to the parameters.

    Args:
        heads: (n, k).
        parameters: the chosen ones by name; leaves of the graph or any tensors in it.

    Returns:
        The graph; without nodes when no parameter moves the heads.

    Raises:
        UnsupportedModelError: when an operation hides its parameters from the graph.
    """
    graph = Graph(heads)
    if heads.grad_fn is None:
        return graph
    entries = {}
    for name, parameter in parameters.items():
        edge = get_gradient_edge(parameter)
        entries[edge.node, edge.output_nr] = name
    places: dict[Any, int | None] = {}  # a node's number, None when it leads to no parameter
    stack: list[tuple[Any, bool]] = [(heads.grad_fn, False)]
    leaves: dict[Any, int] = {}
    while stack:
        node, below = stack.pop()
        if node in places:
            continue
        edges = node.next_functions
        if not below:
            stack.append((node, True))
            stack.extend((child, False) for child, output in edges if child is not None and (child, output) not in entries)
            continue
        inputs: list[Edge | None] = []
        for child, output in edges:
            if (child, output) in entries:
                if child not in leaves:
                    leaves[child] = _add(graph, child, (), ("parameter",))
                graph.parameters[leaves[child], output] = entries[child, output]
                inputs.append((leaves[child], output))
            else:
                place = places.get(child) if child is not None else None
                inputs.append(None if place is None else (place, output))
        name = operation(node)
        if name in _OPAQUE:
            raise UnsupportedModelError(f"`model` must show its parameters in the autograd graph; got {_OPAQUE[name]}.")
        if all(edge is None for edge in inputs):
            places[node] = None
        else:
            # whether the samples keep their places belongs to the structure
            moving = (_counts_off(node, heads.shape[0]),) if name == "Index" else ()
            places[node] = _add(graph, node, tuple(inputs), (name, *_settings(node), *moving))
    return graph


def _counts_off(node: Any, n: int) -> bool:
    """Return whether one of the tensors of an indexing operation is 0, 1, …, n − 1, so that the samples keep their places."""
    masks = (torch.bool, torch.uint8)
    given = [i for i in node._saved_indices if i is not None and i.numel() == n and i.dtype not in masks]
    if any(not on_host(index) for index in given) and is_capturing():
        raise UnsupportedModelError(
            "`model` must not be indexed by a tensor with an element for each sample while a graph of the device is captured, "
            "for its values decide where the samples are; got one. Use `gather`, or a criterion of PyTorch."
        )
    return any(bool((index.flatten() == torch.arange(n, device=index.device)).all()) for index in given)


def _add(graph: Graph, node: Any, inputs: tuple[Edge | None, ...], step: tuple[Any, ...]) -> int:
    graph.nodes.append(node)
    graph.inputs.append(inputs)
    graph.steps.append(step)
    return len(graph.nodes) - 1


_names: dict[type, tuple[str, ...]] = {}


def _settings(node: Any) -> tuple[Any, ...]:
    """Return the numbers that the node keeps (axes, strides, flags), which belong to the structure; tensors do not."""
    kind = type(node)
    if isinstance(node, BackwardCFunction):  # what its `forward` kept on ctx
        return tuple((name, value) for name, value in vars(node).items() if _is_setting(value))
    if kind not in _names:
        names = [name for name in dir(kind) if name.startswith("_saved_")]
        _names[kind] = tuple(name for name in names if _is_setting(getattr(node, name)))
    return tuple([value for name in _names[kind] if _is_setting(value := getattr(node, name))])


def _is_setting(value: Any) -> bool:
    """Return whether this is a setting; None may be one that was left out."""
    if value is None or isinstance(value, (int, str)):
        return True
    return isinstance(value, tuple) and all(entry is None or isinstance(entry, int) for entry in value)
