"""Check the element types of a graph against the operators' schemas, as far as they are known before it runs."""

from __future__ import annotations

from onnx import defs

from mgs_core.onnx.graph import Graph, Node

_NAMES = {"float": "float32", "double": "float64"}
_FLOATS = {"float16", "bfloat16", "float32", "float64"}


def check_types(graph: Graph, known: dict[str, str] | None = None) -> None:
    """Refuse nodes whose inputs are of types that their operator does not take, or that must agree and do not.

    Args:
        graph: the graph; its subgraphs are checked with it.
        known: types of the values outside, by name; those of this graph are added.

    Raises:
        ArgumentError: names the node, the input and the types.
    """
    known = {} if known is None else known
    known |= {name: value.dtype.name for name, value in graph.initializers.items()}
    known |= {value.name: value.dtype.name for value in graph.inputs if value.dtype is not None and value.kind == "tensor"}
    for node in graph.nodes:
        _check(node, known)
        for body in node.attributes.values():
            if isinstance(body, Graph):
                check_types(body, known)


def _check(node: Node, known: dict[str, str]) -> None:
    schema = defs.get_schema(node.operator, node.opset, node.domain)
    bound: dict[str, str] = {}
    for at, name in enumerate(node.inputs[: node.explicit]):
        formal = schema.inputs[min(at, len(schema.inputs) - 1)]
        if name not in known:
            continue
        found, allowed = known[name], {_plain(each, node) for each in formal.types}
        # what takes one floating-point type is evaluated in all: derivatives are checked in double precision
        if found not in allowed and not (found in _FLOATS and allowed & _FLOATS):
            raise node.damaged(f"takes {name!r} of the type {found}; {', '.join(sorted(filter(None, allowed)))} are allowed")
        if not formal.is_homogeneous:
            continue
        wanted = bound.setdefault(formal.type_str, found)
        if found != wanted:
            raise node.damaged(f"takes {name!r} of the type {found}, and another input of the type {wanted}; they must agree")
    for at, name in enumerate(node.outputs):
        formal = schema.outputs[min(at, len(schema.outputs) - 1)]
        kinds = {_plain(each, node) for each in formal.types}
        result = bound.get(formal.type_str) or (kinds.pop() if len(kinds) == 1 else "")
        if name and result and formal.is_homogeneous:
            known[name] = result


def _plain(kind: str, node: Node) -> str:
    """Return the dtype's name for "tensor(float)"; empty for sequences and other kinds."""
    if not kind.startswith("tensor("):
        return ""
    name = kind.removeprefix("tensor(").removesuffix(")")
    return _widened(_NAMES.get(name, name), node)


def _widened(name: str, node: Node) -> str:
    """Return the precision that replaces a floating-point type, where the model is loaded in one."""
    return node.precision if node.precision and name in _FLOATS else name
