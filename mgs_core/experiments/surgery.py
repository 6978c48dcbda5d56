"""Two cuts in a classifier's graph: its scores before the last softmax, and places for dropout masks before its dense layers."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, inliner

from mgs_core import onnx
from mgs_core._errors import ArgumentError

_PASSING = ("Identity", "Cast", "ZipMap", "Clip", "Flatten")  # hand scores on
_LAST = ("Softmax", "LogSoftmax", "Sigmoid")


def before_softmax(model: onnx.OnnxModel) -> tuple[ModelProto, str]:
    """Find the scores: what the last Softmax or Sigmoid takes, or the output itself where there is none.

    Args:
        model: the classifier.

    Returns:
        (graph, name): a copy with its functions put in place, and the value, which is an output of it.
    """
    proto = _copy(inliner.inline_local_functions(model.proto) if model.proto.functions else model.proto)
    made = {name: node for node in proto.graph.node for name in node.output}
    name = model.function.output
    while name in made and made[name].op_type in _PASSING:
        name = made[name].input[0]
    name = made[name].input[0] if name in made and made[name].op_type in _LAST else model.function.output
    return _showing(proto, name), name


def with_masks(proto: ModelProto, model: onnx.OnnxModel, shape: tuple[int, ...]) -> tuple[ModelProto, dict[str, int]]:
    """Multiply what each dense layer takes from earlier layers by a mask, which becomes an input (n, size).

    Args:
        proto: the classifier's graph.
        model: as loaded from it, on NumPy.
        shape: of a sample, as it takes it.

    Returns:
        (graph, masks): a copy, and names and sizes of the new inputs.

    Raises:
        ArgumentError: when no dense layer comes after another layer.
    """
    edited = _copy(proto)
    masks: dict[str, int] = {}
    for value, nodes in _dense(proto, model).items():
        size = _size(proto, model, value, shape)
        if size is None:  # its first axis is not that of the samples
            continue
        mask = f"mgs_mask_{len(masks)}"
        masks[mask] = size
        for at in nodes:
            edited.graph.node[at].input[0] = f"{mask}_masked"
        edited.graph.input.append(helper.make_tensor_value_info(mask, TensorProto.FLOAT, ["n", size]))
        edited.graph.node.extend([
            helper.make_node("Shape", [value], [f"{mask}_shape"], f"{mask}_shape"),
            helper.make_node("Reshape", [mask, f"{mask}_shape"], [f"{mask}_like"], f"{mask}_like"),
            helper.make_node("Mul", [value, f"{mask}_like"], [f"{mask}_masked"], f"{mask}_masked"),
        ])  # fmt: skip
    if not masks:
        raise ArgumentError("`model` must have a dense layer behind another layer for dropout; got none. Leave dropout out.")
    return edited, masks


def _dense(proto: ModelProto, model: onnx.OnnxModel) -> dict[str, list[int]]:
    """Return the values that dense layers take from earlier layers, each with the places of these layers."""
    weights = {*model.parameters, *model.ties}
    constant = {tensor.name for tensor in proto.graph.initializer}
    touched: set[str] = set()
    found: dict[str, list[int]] = {}
    for at, node in enumerate(proto.graph.node):
        given = [name for name in node.input if name]
        if constant.issuperset(given):
            constant.update(node.output)
            weights.update(node.output if weights.intersection(given) else ())
            continue
        if node.op_type in ("MatMul", "Gemm") and node.input[0] in touched and node.input[1] in weights:
            found.setdefault(node.input[0], []).append(at)
        if touched.union(weights).intersection(given):
            touched.update(node.output)
    return found


def _size(proto: ModelProto, model: onnx.OnnxModel, value: str, shape: tuple[int, ...]) -> int | None:
    """Return how many numbers a value has for each sample; None where its first axis is not that of the samples."""
    part = onnx.load(
        _showing(_copy(proto), value), output=value, dtype="float32", parameters=lambda name: name in model.parameters
    )
    sizes = [part(np.zeros((n, *shape), np.float32)).shape for n in (2, 3)]
    return sizes[0][1] if [rows for rows, _ in sizes] == [2, 3] else None


def _showing(proto: ModelProto, name: str) -> ModelProto:
    """Make a value an output."""
    if all(value.name != name for value in proto.graph.output):
        proto.graph.output.append(ValueInfoProto(name=name))
    return proto


def _copy(proto: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(proto)
    return copy
