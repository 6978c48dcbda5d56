"""Undo an exporter's habit: weights come into a loop as state that every step hands on unchanged. Let the body capture them."""

from __future__ import annotations

from mgs_core.onnx.graph import Graph, Node


def capture_invariants(graph: Graph) -> None:
    """Turn the states that a loop never changes into captured values.

    Args:
        graph: changed in place.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        for body in node.attributes.values():
            if isinstance(body, Graph):
                capture_invariants(body)
        nodes += _captured(node) if node.operator == "Loop" else []
        nodes.append(node)
    graph.nodes = nodes


def _captured(node: Node) -> list[Node]:
    """Drop the invariant states of a loop; return nodes that give its outputs of that name."""
    body: Graph = node.attributes["body"]
    states = node.explicit - 2
    if len(body.inputs) != states + 2 or len(body.outputs) < states + 1:
        return []  # refused when it is compiled
    same = {each.outputs[0]: each.inputs[0] for each in body.nodes if each.operator == "Identity"}
    fixed = [
        at for at in range(states) if _source(body.outputs[at + 1].name, same) == body.inputs[at + 2].name and node.inputs[at + 2]
    ]
    names = {body.inputs[at + 2].name: node.inputs[at + 2] for at in fixed}
    passed = [
        Node("Identity", "", 1, f"{node.name} ({node.outputs[at]})", (node.inputs[at + 2],), (node.outputs[at],), {}, 1)
        for at in fixed
        if at < len(node.outputs) and node.outputs[at]
    ]
    _rename(body, names)
    body.inputs = [value for at, value in enumerate(body.inputs) if at - 2 not in fixed]
    body.outputs = [value for at, value in enumerate(body.outputs) if at - 1 not in fixed]
    explicit = [name for at, name in enumerate(node.inputs[: node.explicit]) if at - 2 not in fixed]
    node.outputs = tuple(name for at, name in enumerate(node.outputs) if at not in fixed)
    node.inputs, node.explicit = (*explicit, *body.free()), len(explicit)
    return passed


def _source(name: str, same: dict[str, str]) -> str:
    while name in same:
        name = same[name]
    return name


def _rename(graph: Graph, names: dict[str, str]) -> None:
    for node in graph.nodes:
        node.inputs = tuple(names.get(name, name) for name in node.inputs)
        for body in node.attributes.values():
            if isinstance(body, Graph):
                _rename(body, names)
