"""Which initialisers of a graph are its trained parameters.

An ONNX file does not say. The rule: a floating-point initialiser is a parameter when it reaches, as it is or through nodes that
take nothing but constants and sizes, an input where networks keep weights (`_WEIGHTS`), or a place where it is added to or
multiplied with data that earlier parameters have touched, except

* numbers of rank 0, and single elements unless they are added to the output of a layer with one unit: ε, scales, exponents;
* values that are not finite or as small as a type goes: attention masks;
* what also reaches an input that takes statistics, bounds or sizes (running mean and variance, Clip, Pad, Resize, …);
* what is named as running statistics are: `running_mean`, `running_var`, `moving_mean`, `moving_variance`;
* what is applied to the raw inputs elementwise: scalers.

A fixed table that is added to data (sinusoidal positions) looks like a trained one. `load(…, parameters=…)` chooses by name.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mgs_core._types import Array
from mgs_core.onnx.graph import Graph, Node

_WEIGHTS: dict[str, frozenset[int]] = {
    name: frozenset(places)
    for name, places in {
        "MatMul": (0, 1), "Gemm": (0, 1, 2), "Conv": (1, 2), "ConvTranspose": (1, 2), "Einsum": range(8), "Gather": (0,),
        "BatchNormalization": (1, 2), "LayerNormalization": (1, 2), "InstanceNormalization": (1, 2), "GroupNormalization": (1, 2),
        "RMSNormalization": (1,), "PRelu": (1,), "Concat": range(1 << 10), "LSTM": (1, 2, 3, 7), "GRU": (1, 2, 3),
        "RNN": (1, 2, 3), "DeformConv": (1, 3), "LinearClassifier": (1, 2), "LinearRegressor": (1, 2),
    }.items()
}  # fmt: skip
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Sum"}
#: Rearrange their first input, and take sizes besides.
_VIEWS = {
    "Identity",
    "Cast",
    "Transpose",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Split",
    "Slice",
    "Expand",
    "Tile",
    "CastLike",
}
_STATISTICS = ("running_mean", "running_var", "moving_mean", "moving_variance")


def trained(graph: Graph, nodes: Iterable[Node]) -> list[str]:
    """Return the names of the initialisers that are trained, in the order of their first use.

    Args:
        graph: the graph.
        nodes: those on which the outputs depend, in order.

    Returns:
        Names.
    """
    nodes = list(nodes)
    candidates = {name for name, value in graph.initializers.items() if _may_be_weight(name, value)}
    sources: dict[str, frozenset[str]] = {name: frozenset((name,)) for name in candidates}  # constant value → its candidates
    constant = set(graph.initializers)
    touched: set[str] = set()  # data that a parameter has touched
    single: set[str] = set()  # outputs of layers with one unit
    chosen: dict[str, None] = {}
    barred: set[str] = set()
    for node in nodes:
        given = [name for name in node.inputs if name]
        carried = given[:1] if node.operator in _VIEWS else given
        if all(name in constant for name in carried):
            constant.update(node.outputs)
            joined = frozenset().union(*(sources.get(name, frozenset()) for name in carried))
            sources.update(dict.fromkeys(node.outputs, joined))
            continue
        meets = False
        for place, name in enumerate(node.inputs):
            found = sources.get(name, frozenset())
            if not found:
                continue
            others = [other for other in given if other not in constant]
            weight = place in _WEIGHTS.get(node.operator, ()) or place >= node.explicit
            if node.operator in _ELEMENTWISE:
                weight = any(other in touched for other in others)
                if not any(other in single for other in others):
                    found = frozenset(source for source in found if graph.initializers[source].size > 1)
            if weight:
                chosen.update(dict.fromkeys(sorted(found)))
            else:
                barred |= found
            meets = meets or (weight and bool(found))
        if meets or any(name in touched for name in given):
            touched.update(node.outputs)
        if _one_unit(node, graph, single):
            single.update(node.outputs)
    return [name for name in chosen if name not in barred]


def _may_be_weight(name: str, value: Array) -> bool:
    if not np.issubdtype(value.dtype, np.floating) and value.dtype.name != "bfloat16":
        return False
    if value.ndim == 0 or value.size == 0 or name.endswith(_STATISTICS):
        return False
    largest = float(np.max(np.abs(value.astype(np.float64))))
    return bool(np.isfinite(largest) and largest < 1e30)


def _one_unit(node: Node, graph: Graph, single: set[str]) -> bool:
    """Say whether a node gives the output of a layer with one unit, so that a single element added to it is a bias."""
    if node.operator in ("MatMul", "Conv"):
        weight = graph.initializers.get(node.inputs[1])
        return weight is not None and weight.ndim >= 2 and weight.shape[-1 if node.operator == "MatMul" else 0] == 1
    return node.operator in ("Reshape", "Squeeze", "Identity") and node.inputs[0] in single
