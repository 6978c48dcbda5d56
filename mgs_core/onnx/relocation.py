"""Move the weights of a file to where they can be parameters: among the initialisers of its graph, each for itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx

_FLOATS = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)
#: Inputs of batch normalisation that are no weights: running mean and variance.
_STATISTICS = (3, 4)


def relocate(model: onnx.ModelProto) -> None:
    """Move weights from Constant nodes and from the bodies of If, Loop and Scan, and part statistics from weights.

    Args:
        model: changed in place; its outputs stay what they are.
    """
    _hoist(model.graph)
    _raise(model.graph)
    _part(model.graph)
    model.ir_version = max(model.ir_version, 4)  # before, each initialiser was an input too


def _hoist(graph: onnx.GraphProto) -> None:
    """Make initialisers of the Constant nodes of a file whose weights are there, for it has no floating-point initialisers."""
    if any(tensor.data_type in _FLOATS and tensor.dims for tensor in graph.initializer) or graph.sparse_initializer:
        return
    for node in [node for node in graph.node if node.op_type == "Constant" and len(node.output) == 1]:
        tensors = [attribute.t for attribute in node.attribute if attribute.name == "value" and attribute.HasField("t")]
        if len(tensors) == 1 and tensors[0].data_type in _FLOATS and tensors[0].dims:
            graph.initializer.add().CopyFrom(tensors[0])
            graph.initializer[-1].name = node.output[0]
            graph.node.remove(node)


def _raise(graph: onnx.GraphProto) -> None:
    """Make initialisers of the graph of those that its nodes' own graphs hold, unless another value has the name."""
    bodies = list(_bodies(graph))
    names = Counter(name for each in (graph, *bodies) for name in _names(each))
    for body in bodies:
        given = {value.name for value in body.output}  # which must stay where it is
        for tensor in list(body.initializer):
            if tensor.name not in given and tensor.data_type in _FLOATS and tensor.dims and names[tensor.name] == 1:
                graph.initializer.add().CopyFrom(tensor)
                body.initializer.remove(tensor)


def _part(graph: onnx.GraphProto) -> None:
    """Give running statistics a tensor of their own where an exporter has merged them with equal weights, as fresh ones are."""
    same = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity" and node.input}
    uses = Counter(same.get(name, name) for node in graph.node if node.op_type != "Identity" for name in node.input)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    names = {*_names(graph)}
    for node in graph.node:
        for place in _STATISTICS if node.op_type == "BatchNormalization" and len(node.input) > max(_STATISTICS) else ():
            name = same.get(node.input[place], node.input[place])
            if name not in tensors or uses[name] < 2:
                continue
            own = f"{name} (statistics of {node.output[0]}, {place})"
            if own not in names:
                copy = graph.initializer.add()
                copy.CopyFrom(tensors[name])
                copy.name = node.input[place] = own
                uses[name] -= 1


def _bodies(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield body
                yield from _bodies(body)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (value.name for value in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (name for node in graph.node for name in node.output)
