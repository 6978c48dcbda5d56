"""Turn a ModelProto into the validated `Graph`: functions of the model are put in place, and every name is made unique."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, ValueInfoProto, defs

from mgs_core._types import Array
from mgs_core.onnx.attributes import bound, definition, read_attributes
from mgs_core.onnx.errors import damaged, unsupported
from mgs_core.onnx.graph import Graph, Node, Value, in_order
from mgs_core.onnx.operators.refused import REFUSED
from mgs_core.onnx.operators.registry import NEWEST, find
from mgs_core.onnx.tensors import dtype_of, to_array
from mgs_core.onnx.types import check_types

#: Nodes that a model may have once its functions are put in place.
MAX_NODES = 200_000
_MAX_DEPTH = 16


def parse(model: ModelProto, folder: Path | None, precision: str | None = None) -> Graph:
    """Return the graph of a model.

    Args:
        model: as read.
        folder: of its external data, or None.
        precision: dtype that replaces every floating-point type, or None.

    Returns:
        The graph.

    Raises:
        ArgumentError: when the model breaks the rules of ONNX; names the node or tensor.
        UnsupportedModelError: when it uses a domain, version or type that is not evaluated.
    """
    graph = _Parser(model, folder, precision).graph(model.graph, _Scope(_versions(model.opset_import)), "")
    check_types(graph)
    return graph


@dataclass(frozen=True)
class _Scope:
    """Hold what names mean at a place.

    Attributes:
        versions: opset of each domain.
        names: local name → unique name.
        bindings: attributes of the call, in the body of a function.
        depth: of nested calls and subgraphs.
        calls: the functions that are being put in place.
    """

    versions: Mapping[str, int]
    names: dict[str, str] = field(default_factory=dict)
    bindings: Mapping[str, AttributeProto] = field(default_factory=dict)
    depth: int = 0
    calls: frozenset[tuple[str, str, str]] = frozenset()

    def rename(self, name: str) -> str:
        """Return the unique name."""
        return self.names.get(name, name)


class _Parser:
    def __init__(self, model: ModelProto, folder: Path | None, precision: str | None) -> None:
        self._folder, self._precision = folder, precision
        self._nodes, self._numbers = 0, count()
        self._taken: set[str] = set()
        self._functions: dict[tuple[str, str, str], FunctionProto] = {}
        for function in model.functions:
            key = (_domain(function.domain), function.name, function.overload)
            if key in self._functions:
                raise damaged(f"function {function.name!r}", "is defined twice")
            self._functions[key] = function

    def graph(self, graph: GraphProto, scope: _Scope, prefix: str) -> Graph:
        """Parse a graph or, with a prefix, a subgraph, whose names hide those outside."""
        if scope.depth > _MAX_DEPTH:
            raise damaged(f"graph {graph.name!r}", f"is nested more than {_MAX_DEPTH} deep")
        scope = _Scope(scope.versions, dict(scope.names), scope.bindings, scope.depth, scope.calls)
        initializers: dict[str, Array] = {}
        if graph.sparse_initializer:
            raise unsupported(f"graph {graph.name!r}", "has sparse initialisers", "Save them as dense tensors.")
        for tensor in graph.initializer:
            where = f"initialiser {tensor.name!r}"
            if not tensor.name:
                raise damaged("an initialiser", "has no name")
            initializers[self._define(tensor.name, scope, prefix, where)] = to_array(tensor, self._folder, where, self._precision)
        local = {tensor.name for tensor in graph.initializer}
        inputs = []
        for info in graph.input:
            if info.name in local:  # files before IR version 4 list initialisers among the inputs
                continue
            name = self._define(info.name, scope, prefix, f"input {info.name!r}")
            inputs.append(self._value(info, name, f"input {info.name!r}"))
        nodes = self._in_scope(graph.node, scope, prefix)
        own = set(initializers) | {value.name for value in inputs} | {name for node in nodes for name in node.outputs}
        outer = {name for node in nodes for name in node.inputs} - own if prefix else set()
        nodes = in_order(nodes, own - {name for node in nodes for name in node.outputs} | (outer & self._taken))
        outputs = []
        for info in graph.output:
            name = scope.rename(info.name)
            if name not in own and not (prefix and name in self._taken):
                raise damaged(f"output {info.name!r}", "is given by no node, input or initialiser")
            outputs.append(self._value(info, name, f"output {info.name!r}", lenient=True))
        return Graph(graph.name, inputs, outputs, initializers, nodes)

    def _in_scope(self, protos: Iterable[NodeProto], scope: _Scope, prefix: str) -> list[Node]:
        """Parse the nodes of one graph or function body, after all their outputs have unique names."""
        protos = list(protos)
        for proto in protos:
            for name in proto.output:
                if name:
                    self._define(name, scope, prefix, f"output {name!r} of node {proto.name or proto.op_type!r}")
        nodes: list[Node] = []
        for proto in protos:
            nodes += self._node(proto, scope, prefix)
        return nodes

    def _define(self, name: str, scope: _Scope, prefix: str, where: str) -> str:
        unique = f"{prefix}{name}"
        if not name or unique in self._taken:
            raise damaged(where, "has a name that is empty or taken; values must have unique names")
        self._taken.add(unique)
        scope.names[name] = unique
        return unique

    def _value(self, info: ValueInfoProto, name: str, where: str, *, lenient: bool = False) -> Value:
        kind = (info.type.WhichOneof("value") or "tensor_type").removesuffix("_type")
        if kind != "tensor":
            if lenient or kind in ("sequence", "optional"):
                return Value(name, None, None, kind)
            raise unsupported(where, f"is a {kind}", "Only tensors can be inputs.")
        tensor = info.type.tensor_type
        if lenient and tensor.elem_type == onnx.TensorProto.STRING:
            return Value(name, None, None, "strings")
        dtype = dtype_of(tensor.elem_type, where, self._precision) if tensor.elem_type else None
        if not tensor.HasField("shape"):
            return Value(name, dtype, None)
        shape: list[int | str | None] = []
        for axis in tensor.shape.dim:
            which = axis.WhichOneof("value")
            shape.append(axis.dim_value if which == "dim_value" else axis.dim_param or None)
        return Value(name, dtype, tuple(shape))

    def _node(self, proto: NodeProto, scope: _Scope, prefix: str) -> list[Node]:
        self._nodes += 1
        label = f"{prefix}{proto.name or next((name for name in proto.output if name), '')}"
        domain = _domain(proto.domain)
        where = f"node {label!r} ({proto.op_type})"
        if self._nodes > MAX_NODES:
            raise damaged(where, f"is beyond the limit of {MAX_NODES} nodes")
        key = (domain, proto.op_type, proto.overload)
        if key in self._functions:
            return self._call(proto, self._functions[key], scope, label, where)
        if domain not in scope.versions:
            raise damaged(where, f"is of the domain {domain or 'ai.onnx'!r}, whose version the model does not import")
        opset = scope.versions[domain]
        if domain not in NEWEST:
            raise unsupported(where, f"is of the domain {domain!r}", f"Export with operators of {_domains()}.")
        try:
            schema = defs.get_schema(proto.op_type, opset, domain)
        except defs.SchemaError as error:
            raise damaged(where, f"is no operator of {domain or 'ai.onnx'} at opset {opset}") from error
        for kind, names, low, high in (
            ("inputs", proto.input, schema.min_input, schema.max_input),
            ("outputs", proto.output, schema.min_output, schema.max_output),
        ):
            if not low <= len(names) <= high:
                raise damaged(where, f"has {len(names)} {kind}; from {low} to {high} are allowed")
        if (
            schema.has_function and proto.op_type not in REFUSED and find(domain, proto.op_type, opset) is None
        ):  # an operator that ONNX itself defines by others
            return self._call(proto, definition(schema, opset), scope, label, where)
        attributes = read_attributes(proto, schema, scope.bindings, where, self._folder, self._precision)
        captured: list[str] = []
        for name, value in attributes.items():
            if isinstance(value, GraphProto):
                deeper = _Scope(scope.versions, scope.names, scope.bindings, scope.depth + 1, scope.calls)
                body = self.graph(value, deeper, f"{label}.{name}.{next(self._numbers)}/")
                attributes[name] = body
                captured += [free for free in body.free() if free not in captured]
        inputs = tuple(scope.rename(name) if name else "" for name in proto.input)
        outputs = tuple(scope.rename(name) if name else "" for name in proto.output)
        return [
            Node(proto.op_type, domain, opset, label, (*inputs, *captured), outputs, attributes, len(inputs), self._precision)
        ]

    def _call(self, proto: NodeProto, function: FunctionProto, scope: _Scope, label: str, where: str) -> list[Node]:
        """Put the body of a function in the place of a node."""
        key = (_domain(function.domain), function.name, function.overload)
        if key in scope.calls:
            raise damaged(where, "calls a function that calls itself")
        if scope.depth > _MAX_DEPTH:
            raise damaged(where, f"is nested more than {_MAX_DEPTH} deep")
        if len(proto.input) > len(function.input) or len(proto.output) > len(function.output):
            raise damaged(where, f"has more inputs or outputs than its function {function.name!r}")
        names = {inner: scope.rename(outer) if outer else "" for inner, outer in zip(function.input, proto.input, strict=False)}
        names |= dict.fromkeys(function.input[len(proto.input) :], "")
        bindings = bound(proto, function, scope.bindings)
        prefix = f"{label}.{next(self._numbers)}/"
        inside = _Scope(_versions(function.opset_import), names, bindings, scope.depth + 1, scope.calls | {key})
        body = self._in_scope(function.node, inside, prefix)
        given = {name for name in names.values() if name}
        made = {name for node in body for name in node.outputs}
        for node in body:
            for name in node.inputs:
                if name and name not in given and name not in made:
                    raise node.damaged(f"takes {name!r}, which nothing in function {function.name!r} gives")
        for outer, inner in zip(proto.output, function.output, strict=False):
            if outer:
                source = inside.names.get(inner, "")
                if not source:
                    raise damaged(where, f"has no value for output {inner!r} of its function")
                body.append(Node("Identity", "", NEWEST[""], f"{prefix}{inner}", (source,), (scope.rename(outer),), {}, 1))
        return body


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _domains() -> str:
    return ", ".join(name or "ai.onnx" for name in NEWEST)


def _versions(imports: Any) -> dict[str, int]:
    versions: dict[str, int] = {}
    for entry in imports:
        domain = _domain(entry.domain)
        if versions.get(domain, entry.version) != entry.version:
            raise damaged(f"domain {domain or 'ai.onnx'!r}", "is imported in two versions")
        if domain in NEWEST and not 1 <= entry.version <= NEWEST[domain]:
            raise unsupported(
                f"domain {domain or 'ai.onnx'!r}", f"is imported at version {entry.version}; known are 1 to {NEWEST[domain]}",
                "Export for an older opset.",
            )  # fmt: skip
        versions[domain] = entry.version
    return versions
