"""Record autograd's computation graph, and differentiate it at chosen nodes.

autograd keeps for each operation a node with its parents and its vector-Jacobian product. A `TapeNode` keeps the operation and
its arguments as well, so that one can see where a parameter meets data, read the input there, and take the gradient there.
Everything stays differentiable for an outer trace, because arguments keep their outer boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd.core import SparseObject, primitive_vjps, sparse_add, vspace
from autograd.core import VJPNode as _VJPNode
from autograd.numpy.numpy_vjps import unbroadcast
from autograd.tracer import Box, Node, getval, isbox, new_box, notrace_primitives, toposort, trace_stack

from mgs_core._types import Array


class TapeNode(Node):  # type: ignore[misc]  # autograd has no types
    """Hold one operation: `value = function(*arguments, **options)`, with the arguments that are on the tape.

    Attributes:
        value: the result.
        function: autograd's primitive; None for a root.
        arguments: its arguments, as values.
        options: its keyword arguments.
        positions: which arguments are on the tape.
        parents: their nodes, in that order.
        name: of the parameter, for a root; else empty.
    """

    __slots__ = ["arguments", "function", "name", "options", "parents", "positions", "value"]

    def __init__(self, value: Array, function: Any, arguments: Any, options: Any, positions: Any, parents: Any) -> None:
        self.value, self.function, self.arguments, self.options = value, function, arguments, options
        self.positions, self.parents, self.name = tuple(positions), list(parents), ""

    def initialize_root(self, name: str, value: Array) -> None:
        """Make the node a root."""
        self.__init__(value, None, (), {}, (), ())  # type: ignore[misc]  # autograd makes roots without __init__
        self.name = name

    def pull(self, gradient: Array, wanted: Iterable[int]) -> list[Array]:
        """Return the gradients of the parents at the wanted places in `parents`."""
        chosen = tuple(wanted)
        if self.function not in primitive_vjps:
            raise NotImplementedError(f"autograd has no derivative of {getattr(self.function, '__name__', self.function)!r}.")
        argnums = tuple(self.positions[place] for place in chosen)
        parts = primitive_vjps[self.function](argnums, self.value, self.arguments, self.options)(gradient)
        return [_dense(part, self.parents[place]) for part, place in zip(parts, chosen, strict=True)]


# what autograd does not record (comparisons, rounding), neither does the tape
notrace_primitives[TapeNode] = notrace_primitives[_VJPNode]


class Tape:
    """Hold the record of one evaluation.

    Attributes:
        value: the function's result.
        nodes: the operations from the result back to the roots, each after all that depend on it.
    """

    def __init__(self, function: Callable[[dict[str, Array]], Array], parameters: Mapping[str, Array]) -> None:
        """Evaluate `function(parameters)` and record it.

        Args:
            function: of a dict of arrays.
            parameters: the arrays to follow, by name.
        """
        with trace_stack.new_trace() as trace:
            boxes = {name: new_box(value, trace, TapeNode.new_root(name, value)) for name, value in parameters.items()}
            result = function(boxes)
        if isbox(result) and result._trace == trace:
            self.value: Array = result._value
            self.nodes: list[TapeNode] = list(toposort(result._node))
        else:
            self.value, self.nodes = result, []

    def pull(
        self,
        gradient: Array,
        keep: Iterable[TapeNode],
        stop: Callable[[TapeNode, TapeNode], bool] | None = None,
        *,
        open_gates: bool = False,
    ) -> dict[TapeNode, Array]:
        """Propagate a gradient of the result backwards.

        Args:
            gradient: of the shape of `value`.
            keep: nodes whose gradients are wanted.
            stop: `(node, parent)`: whether not to go on from the node to this parent.
            open_gates: let NaN go through both branches of `where`, whose derivative is else zero where values say so.

        Returns:
            The gradients of the wanted nodes that were reached.
        """
        wanted = set(keep)
        found: dict[TapeNode, Array] = {}
        pending: dict[TapeNode, Array] = {self.nodes[0]: gradient} if self.nodes else {}
        for node in self.nodes:
            if node not in pending:
                continue
            at_node = pending.pop(node)
            if node in wanted:
                found[node] = at_node
            places = [i for i, parent in enumerate(node.parents) if stop is None or not stop(node, parent)]
            for place, part in zip(places, node.pull(at_node, places) if places else (), strict=True):
                parent = node.parents[place]
                if open_gates and getattr(node.function, "__name__", "") == "where":
                    part = part + _dense(0.0 * at_node, parent)
                pending[parent] = _added(parent, pending[parent], part) if parent in pending else part
        return found


def value_and_gradient(
    function: Callable[[dict[str, Array]], Array], parameters: Mapping[str, Array]
) -> tuple[Array, dict[str, Array]]:
    """Return the scalar `function(parameters)` and its gradient by name; differentiable for an outer trace."""
    tape = Tape(function, parameters)
    roots = {node.name: node for node in tape.nodes if node.name}
    found = tape.pull(anp.ones(anp.shape(tape.value), dtype=plain(tape.value).dtype), roots.values())
    zero = {name: anp.zeros(value.shape, dtype=value.dtype) for name, value in parameters.items()}
    return tape.value, {name: found.get(roots[name], zero[name]) if name in roots else zero[name] for name in parameters}


def _dense(part: Array, parent: TapeNode) -> Array:
    """Return a gradient as an array of the parent's shape and dtype.

    That of indexing comes as an object that knows only how to be added; that of a maximum comes in float64 whatever the dtype,
    and that of `where` in the shape of the result.
    """
    value, of = plain(part), plain(parent.value)
    if isinstance(value, SparseObject):
        return sparse_add(vspace(of), None, part)
    if not isinstance(of, (np.ndarray, np.generic)):  # a list or tuple of arrays, or in a tape of a tape such an object
        return part
    part = part if np.shape(value) == of.shape else unbroadcast(part, anp.metadata(of))
    return part if value.dtype == of.dtype else part.astype(of.dtype)


def _added(parent: TapeNode, one: Array, other: Array) -> Array:
    """Return the sum of two gradients of a node; of lists of arrays too, as those of `split` and `eigh` are."""
    of = plain(parent.value)
    return vspace(of).add(one, other) if isinstance(of, (list, tuple)) else one + other


def plain(array: Array) -> Any:
    """Return the NumPy array below every trace."""
    return getval(array) if isinstance(array, Box) else array
