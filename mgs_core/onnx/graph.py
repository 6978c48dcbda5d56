"""The validated form of a graph: unique names, nodes in order of evaluation, attributes as Python values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mgs_core._errors import ArgumentError, UnsupportedModelError
from mgs_core._types import Array
from mgs_core.onnx.errors import damaged, unsupported
from mgs_core.onnx.tensors import dtype_of


@dataclass(frozen=True)
class Value:
    """Describe an input or output of a graph.

    Attributes:
        name: its name.
        dtype: NumPy dtype; None where the file does not say.
        shape: sizes of the axes, a name or None where the size is free; None when the rank is not declared.
        kind: "tensor", "sequence" or "optional"; of an output also "strings".
    """

    name: str
    dtype: Any
    shape: tuple[int | str | None, ...] | None
    kind: str = "tensor"


@dataclass(eq=False)
class Node:
    """Hold one operation.

    Attributes:
        operator: its name, such as "Conv".
        domain: "" for ai.onnx.
        opset: version of the domain that the file imports.
        name: as in the file; the name of its first output where it has none.
        inputs: names of values, "" where an optional one is absent; captured values of subgraphs come last.
        outputs: names of values, "" where an optional one is absent.
        attributes: by name, with the operator's defaults filled in; subgraphs as `Graph`.
        explicit: number of inputs that are not captured.
        precision: dtype that replaces every floating-point type, or None.
        constants: values of inputs that are known before any data is, by position; filled in by the compiler.
    """

    operator: str
    domain: str
    opset: int
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    explicit: int
    precision: str | None = None
    constants: dict[int, Array] = field(default_factory=dict)

    def __str__(self) -> str:
        kind = f"{self.domain}.{self.operator}" if self.domain else self.operator
        return f"node {self.name!r} ({kind}, opset {self.opset})"

    def has(self, position: int) -> bool:
        """Say whether an input is given."""
        return position < self.explicit and self.inputs[position] != ""

    def wants(self, position: int) -> bool:
        """Say whether an output is used."""
        return position < len(self.outputs) and self.outputs[position] != ""

    def dtype(self, code: int) -> np.dtype:
        """Return the NumPy dtype of an ONNX element type, in the precision of the model."""
        return dtype_of(code, str(self), self.precision)

    def damaged(self, problem: str) -> ArgumentError:
        """Return the error for a node that breaks the rules of ONNX."""
        return damaged(str(self), problem)

    def unsupported(self, problem: str, remedy: str) -> UnsupportedModelError:
        """Return the error for a node that this library does not evaluate."""
        return unsupported(str(self), problem, remedy)


@dataclass(eq=False)
class Graph:
    """Hold a graph.

    Attributes:
        name: of the graph.
        inputs: without initialisers.
        outputs: in order.
        initializers: arrays by name.
        nodes: each after those whose results it takes.
    """

    name: str
    inputs: list[Value]
    outputs: list[Value]
    initializers: dict[str, Array]
    nodes: list[Node]

    def free(self) -> list[str]:
        """Return the names that are taken from an outer graph, in order of use."""
        own = {value.name for value in self.inputs} | set(self.initializers)
        own |= {name for node in self.nodes for name in node.outputs}
        used = [name for node in self.nodes for name in node.inputs] + [value.name for value in self.outputs]
        return list(dict.fromkeys(name for name in used if name and name not in own))


def needed(nodes: Iterable[Node], outputs: Iterable[str]) -> list[Node]:
    """Return the nodes on which the outputs depend, in order.

    Args:
        nodes: in order of evaluation.
        outputs: names of values.

    Returns:
        The nodes that matter; outputs that nothing takes are "".
    """
    wanted, kept = set(outputs), []
    for node in reversed(list(nodes)):
        outputs = tuple(name if name in wanted else "" for name in node.outputs)
        if any(outputs):
            kept.append(replace(node, outputs=outputs))
            wanted.update(node.inputs)
            wanted.discard("")
    return kept[::-1]


def in_order(nodes: list[Node], known: Iterable[str]) -> list[Node]:
    """Sort nodes so that each comes after those whose results it takes, keeping the file's order where it can.

    Args:
        nodes: any order.
        known: names that have values from the start.

    Returns:
        All nodes.

    Raises:
        ArgumentError: when an input has no source or the nodes form a cycle.
    """
    have = {"", *known}
    made = {name: node for node in nodes for name in node.outputs if name}
    for node in nodes:
        for name in node.inputs:
            if name not in have and name not in made:
                raise node.damaged(f"takes {name!r}, which no node, input or initialiser gives")
    waiting = {id(node): sum(name not in have for name in set(node.inputs)) for node in nodes}
    followers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in set(node.inputs) - have:
            followers.setdefault(name, []).append(node)
    ordered: list[Node] = []
    if all(_ready(nodes, have)):
        return nodes
    ready = [node for node in nodes if not waiting[id(node)]]
    for node in ready:  # grows while it is walked
        ordered.append(node)
        for name in node.outputs:
            for follower in followers.get(name, ()) if name else ():
                waiting[id(follower)] -= 1
                if not waiting[id(follower)]:
                    ready.append(follower)
    if len(ordered) < len(nodes):
        raise next(node for node in nodes if waiting[id(node)]).damaged("is part of a cycle or depends on one")
    return ordered


def _ready(nodes: list[Node], have: set[str]) -> Iterator[bool]:
    """Say for each node whether the file's own order gives its inputs first."""
    seen = set(have)
    for node in nodes:
        yield seen.issuperset(node.inputs)
        seen.update(node.outputs)
