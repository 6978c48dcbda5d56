"""Register one builder for each operator, by domain and the opset version since which it holds.

A builder takes the node and the namespace, reads attributes once, and returns the function that is called on arrays:

    @operator("Neg", since=1)
    def neg(node, xp):
        return lambda x: -x
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mgs_core._types import Namespace
from mgs_core.onnx.graph import Node

#: Evaluates a node: arrays (None where an input is absent) to an array, or to a sequence of arrays for `many`.
Run: TypeAlias = Callable[..., Any]
#: Makes the function of a node.
Builder: TypeAlias = Callable[[Node, Namespace], Run]

#: `(node, places of the inputs, backend) → (function, places of the outputs)`.
Control: TypeAlias = Callable[[Node, Sequence[Any], Any], tuple[Run, list[Any]]]

#: Newest opset of each domain whose operators have been read against the specification.
NEWEST = {"": 28, "ai.onnx.ml": 5}


@dataclass(frozen=True)
class Operator:
    """Hold a registered operator.

    Attributes:
        build: the builder.
        since: first opset version for which it holds.
        host: positions of inputs that are wanted as NumPy arrays, because they fix shapes; None for all.
        many: whether the function returns a sequence, one entry for each output.
        host_result: whether the result is a NumPy array whatever the inputs (shapes).
        control: for operators with subgraphs: makes the function, which takes each input where it lives, and says where its
            results live; None for others.
    """

    build: Builder
    since: int
    host: frozenset[int] | None
    many: bool
    host_result: bool
    control: Control | None = None


_OPERATORS: dict[tuple[str, str], list[Operator]] = {}


def operator(
    *names: str, since: int = 1, domain: str = "", host: Iterable[int] | None = (), many: bool = False, host_result: bool = False
) -> Callable[[Builder], Builder]:
    """Register the decorated builder.

    Args:
        *names: operators that it builds.
        since: first opset version for which it holds.
        domain: "" for ai.onnx.
        host: as for `Operator`.
        many: as for `Operator`.
        host_result: as for `Operator`.

    Returns:
        The decorator, which returns the builder unchanged.
    """

    def register(build: Builder) -> Builder:
        places = None if host is None else frozenset(host)
        for name in names:
            add(name, Operator(build, since, places, many, host_result), domain)
        return build

    return register


def add(name: str, entry: Operator, domain: str = "") -> None:
    """Register an operator.

    Args:
        name: of the operator.
        entry: how it is built.
        domain: "" for ai.onnx.
    """
    versions = _OPERATORS.setdefault((domain, name), [])
    versions.append(entry)
    versions.sort(key=lambda each: -each.since)


def find(domain: str, name: str, opset: int) -> Operator | None:
    """Return the operator as it is since the newest version that is not newer than `opset`; None when there is none."""
    for entry in _OPERATORS.get((domain, name), ()):
        if entry.since <= opset:
            return entry
    return None


def supported() -> dict[tuple[str, str], list[int]]:
    """Return the operators by (domain, name), with the versions since which each is registered, oldest first."""
    return {key: [entry.since for entry in reversed(entries)] for key, entries in sorted(_OPERATORS.items())}
