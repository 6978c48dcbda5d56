"""If, Loop and Scan: their subgraphs are compiled as programs, and loops are unrolled as they run.

Which branch is taken and how often a loop runs must be known when the model is traced: from constants, shapes, or inputs that the
backend can read. State that starts on the host moves to the device when the body puts it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import array_api_compat.numpy as host_namespace
import numpy as np

from mgs_core._protocol import Backend
from mgs_core._types import Array
from mgs_core.onnx.graph import Graph, Node, needed
from mgs_core.onnx.operators.registry import Operator, Run, add
from mgs_core.onnx.program import Place, Program, compile_nodes, to_device, to_host

#: Steps that one loop may take.
MAX_STEPS = 100_000


def _run_if(node: Node, places: Sequence[Place], backend: Backend) -> tuple[Run, list[Place]]:
    """Evaluate one of two branches."""
    bodies = [_Body(node, node.attributes[name], places, backend, []) for name in ("then_branch", "else_branch")]
    if places[0] is Place.CONSTANT:
        bodies = [bodies[0 if _truth(node, node.constants[0]) else 1]]
    kinds = [_joined(pair) for pair in zip(*(body.program.places for body in bodies), strict=True)]
    for body in bodies:
        body.require(kinds)

    def run(condition: Any, *captured: Any) -> list[Any]:
        which = 0
        if len(bodies) > 1:
            known = to_host(backend, node, node.inputs[0], condition) if places[0] is Place.DEVICE else condition
            which = 0 if _truth(node, known) else 1
        return bodies[which](captured, [])

    return run, kinds


def _run_loop(node: Node, places: Sequence[Place], backend: Backend) -> tuple[Run, list[Place]]:
    """Repeat a body while a condition holds, at most so many times."""
    graph: Graph = node.attributes["body"]
    states = node.explicit - 2
    if len(graph.inputs) != states + 2 or len(graph.outputs) < states + 1:
        raise node.damaged(f"has a body with {len(graph.inputs)} inputs and {len(graph.outputs)} outputs for {states} states")
    kinds = [_dynamic(place) for place in places[2 : node.explicit]]
    while True:
        body = _Body(node, graph, places, backend, [Place.HOST, Place.HOST, *kinds])
        found = [_joined(pair) for pair in zip(kinds, body.program.places[1 : 1 + states], strict=True)]
        if found == kinds:
            break
        kinds = found
    scans = [_dynamic(place) for place in body.program.places[1 + states :]]
    body.require([body.program.places[0], *kinds, *scans])

    def run(trips: Any, condition: Any, *rest: Any) -> list[Any]:
        limit = None if trips is None else int(_known(node, backend, 0, trips))
        going = condition is None or _truth(node, _known(node, backend, 1, condition))
        state = [
            to_device(backend, value) if kind is Place.DEVICE and places[at] is not Place.DEVICE else value
            for at, (value, kind) in enumerate(zip(rest[:states], kinds, strict=True), start=2)
        ]
        captured, step = rest[states:], 0
        collected: list[list[Any]] = [[] for _ in scans]
        while going and (limit is None or step < limit):
            if step >= MAX_STEPS:
                raise node.unsupported(f"takes more than {MAX_STEPS} steps", "Export the model without this loop.")
            onward, *results = body(captured, [np.asarray(step), np.asarray(True), *state])
            state = results[:states]
            for column, value in zip(collected, results[states:], strict=True):
                column.append(value)
            going = _truth(node, _known(node, backend, 1, onward))
            step += 1
        return [*state, *(_stacked(node, backend, column, kind, 0) for column, kind in zip(collected, scans, strict=True))]

    return run, [*kinds, *scans]


def _run_scan(node: Node, places: Sequence[Place], backend: Backend) -> tuple[Run, list[Place]]:
    """Walk along axes of inputs, carrying state and collecting outputs."""
    if node.opset < 9:
        raise node.unsupported("is of an old form", "Convert it with onnx.version_converter.")
    graph: Graph = node.attributes["body"]
    count = node.attributes["num_scan_inputs"]
    states = node.explicit - count
    scans = len(graph.outputs) - states
    if not 1 <= count <= node.explicit or len(graph.inputs) != node.explicit or scans < 0:
        raise node.damaged(f"has a body with {len(graph.inputs)} inputs and {len(graph.outputs)} outputs for {count} scans")
    defaults = {
        "scan_input_axes": count,
        "scan_input_directions": count,
        "scan_output_axes": scans,
        "scan_output_directions": scans,
    }
    in_axes, in_turns, out_axes, out_turns = (node.attributes.get(name) or [0] * size for name, size in defaults.items())
    kinds = [_dynamic(place) for place in places[:states]]
    walked = [_dynamic(place) for place in places[states : node.explicit]]
    while True:
        body = _Body(node, graph, places, backend, [*kinds, *walked])
        found = [_joined(pair) for pair in zip(kinds, body.program.places[:states], strict=True)]
        if found == kinds:
            break
        kinds = found
    collected_kinds = [_dynamic(place) for place in body.program.places[states:]]
    body.require([*kinds, *collected_kinds])

    def run(*values: Any) -> list[Any]:
        state = [
            to_device(backend, value) if kind is Place.DEVICE and places[at] is not Place.DEVICE else value
            for at, (value, kind) in enumerate(zip(values[:states], kinds, strict=True))
        ]
        sequences, captured = values[states : node.explicit], values[node.explicit :]
        axes = [axis % sequence.ndim for axis, sequence in zip(in_axes, sequences, strict=True)]
        lengths = {sequence.shape[axis] for axis, sequence in zip(axes, sequences, strict=True)}
        if len(lengths) != 1:
            raise node.damaged(f"walks along axes of unequal lengths {sorted(lengths)}")
        (length,) = lengths
        columns: list[list[Any]] = [[] for _ in range(scans)]
        for step in range(length):
            now = [
                sequence[(*(slice(None),) * axis, length - 1 - step if turn else step, ...)]
                for sequence, axis, turn in zip(sequences, axes, in_turns, strict=True)
            ]
            results = body(captured, [*state, *now])
            state = results[:states]
            for column, value in zip(columns, results[states:], strict=True):
                column.append(value)
        stacked = [
            _stacked(node, backend, column[::-1] if turn else column, kind, axis)
            for column, kind, axis, turn in zip(columns, collected_kinds, out_axes, out_turns, strict=True)
        ]
        return [*state, *stacked]

    return run, [*kinds, *collected_kinds]


class _Body:
    """Hold a compiled subgraph of a node."""

    def __init__(self, node: Node, graph: Graph, places: Sequence[Place], backend: Backend, given: Sequence[Place]) -> None:
        self._backend = backend
        outer = dict(zip(node.inputs[node.explicit :], places[node.explicit :], strict=True))
        known = {name: node.constants[at] for at, name in enumerate(node.inputs) if at >= node.explicit and at in node.constants}
        inputs: dict[str, Place] = {name: place for name, place in outer.items() if place is not Place.CONSTANT}
        self._captured = [at for at, name in enumerate(node.inputs[node.explicit :]) if name in inputs]
        inputs |= {value.name: _dynamic(place) for value, place in zip(graph.inputs, given, strict=True)}
        outputs = [value.name for value in graph.outputs]
        nodes = needed(graph.nodes, outputs)
        self.program: Program = compile_nodes(
            nodes, outputs, inputs=inputs, constants={**known, **graph.initializers}, backend=backend
        )
        self._wanted: list[Place] = list(self.program.places)

    def require(self, places: Sequence[Place]) -> None:
        """Say where the outputs shall live."""
        self._wanted = list(places)

    def __call__(self, captured: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """Evaluate the subgraph."""
        values = self.program([*(captured[at] for at in self._captured), *arguments])
        return [
            to_device(self._backend, value) if wanted is Place.DEVICE and place is not Place.DEVICE else value
            for value, wanted, place in zip(values, self._wanted, self.program.places, strict=True)
        ]


def _dynamic(place: Place) -> Place:
    return Place.DEVICE if place is Place.DEVICE else Place.HOST


def _joined(places: Sequence[Place]) -> Place:
    return Place.DEVICE if Place.DEVICE in places else Place.HOST


def _known(node: Node, backend: Backend, at: int, value: Any) -> Array:
    return (
        np.asarray(value)
        if isinstance(value, (np.ndarray, np.generic))
        else to_host(backend, node, node.inputs[at] or "the condition", value)
    )


def _truth(node: Node, value: Array) -> bool:
    if np.size(value) != 1:
        raise node.damaged(f"has a condition of {np.size(value)} elements")
    return bool(np.reshape(value, ()))


def _stacked(node: Node, backend: Backend, column: list[Any], kind: Place, axis: int) -> Array:
    if not column:
        raise node.unsupported("collects outputs over no step, whose shape nothing tells", "Export the model without this loop.")
    return (backend.namespace if kind is Place.DEVICE else host_namespace).stack(column, axis=axis)


for _name, _control in {"If": _run_if, "Loop": _run_loop, "Scan": _run_scan}.items():
    add(_name, Operator(lambda node, xp: lambda *_: [], 1, frozenset(), True, False, _control))
