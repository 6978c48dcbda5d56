"""Which initialisers of a graph are its trained parameters.

An ONNX file does not say. The rule: a floating-point initialiser is a parameter when it reaches, as it is or through nodes that
take nothing but constants and sizes, an input where networks keep weights (`_WEIGHTS`), or a place where it is added to or
multiplied with data that earlier parameters have touched, except

* numbers of rank 0, and single elements unless they are added to the output of a layer with one unit: ε, scales, exponents;
* values that are not finite or as small as a type goes: attention masks;
* what also reaches an input that takes statistics, bounds or sizes (running mean and variance, Clip, Pad, Resize, …);
* what is subtracted or divided by: a mean, a deviation;
* ones and zeros for gain and shift of a normalisation, under a name that PyTorch's exporters give to constants: it has none;
* what is named as running statistics are: `running_mean`, `running_var`, `moving_mean`, `moving_variance`;
* what is applied to the raw inputs elementwise: scalers.

A fixed table that is added to data (sinusoidal positions) looks like a trained one. `load(…, parameters=…)` chooses by name.
"""

from __future__ import annotations

import re
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
_NORMALISATIONS = {name for name in _WEIGHTS if name.endswith("Normalization")}
#: What torch.onnx.export calls a constant, such as the gain of a group norm's inner instance norm.
_CONSTANT = re.compile(r"val_\d+|.*Constant(_\d+)?_output_0")
_STATISTICS = ("running_mean", "running_var", "moving_mean", "moving_variance")


def trained(graph: Graph, nodes: Iterable[Node]) -> list[str]:
    """Return the names of the initialisers that are trained, in the order of their first use.

    Args:
        graph: the graph.
        nodes: those on which the outputs depend, in order.

    Returns:
        Names.
    """
    walk = _Walk(graph)
    walk.nodes(nodes)
    return [name for name in walk.chosen if name not in walk.barred]


class _Walk:
    """Hold what is known of the values while the nodes, and those of subgraphs, are visited in order."""

    def __init__(self, graph: Graph) -> None:
        self._values = graph.initializers
        self._sources = {name: frozenset((name,)) for name, value in self._values.items() if _may_be_weight(name, value)}
        self._constant = set(self._values)
        self._touched: set[str] = set()  # data that a parameter has touched
        self._single: set[str] = set()  # outputs of layers with one unit
        self.chosen: dict[str, None] = {}
        self.barred: set[str] = set()

    def nodes(self, nodes: Iterable[Node]) -> bool:
        """Visit nodes; say whether a parameter meets data in one of them."""
        found = [self._node(node) for node in nodes]  # a list, so that all are visited
        return any(found)

    def _node(self, node: Node) -> bool:
        given = [name for name in node.inputs if name]
        bodies = [value for value in node.attributes.values() if isinstance(value, Graph)]
        carried = given[:1] if node.operator in _VIEWS else given
        if not bodies and all(name in self._constant for name in carried):
            self._constant.update(node.outputs)
            joined = frozenset().union(*(self._sources.get(name, frozenset()) for name in carried))
            self._sources.update(dict.fromkeys(node.outputs, joined))
            return False
        meets = self._bodies(bodies)
        for place, name in enumerate(node.inputs[: node.explicit]):
            meets = self._use(node, place, name) or meets
        if meets or any(name in self._touched for name in given):
            self._touched.update(node.outputs)
        if self._one_unit(node):
            self._single.update(node.outputs)
        return meets

    def _bodies(self, bodies: list[Graph]) -> bool:
        """Visit subgraphs, whose own inputs may be data that a parameter has touched."""
        for body in bodies:
            self._touched.update(value.name for value in body.inputs)
            self._constant.update(body.initializers)
        found = [self.nodes(body.nodes) for body in bodies]
        return any(found)

    def _use(self, node: Node, place: int, name: str) -> bool:
        """Judge the place where a value meets data; say whether it is that of a weight."""
        found = self._sources.get(name, frozenset())
        others = [other for other in node.inputs if other and other not in self._constant]
        weight = place in _WEIGHTS.get(node.operator, ())
        if node.operator in _ELEMENTWISE:
            weight = any(other in self._touched for other in others) and not (node.operator in ("Sub", "Div") and place == 1)
            if not any(other in self._single for other in others):
                found = frozenset(source for source in found if self._values[source].size > 1)
        if node.operator in _NORMALISATIONS:
            found = frozenset(source for source in found if not self._no_gain(source))
        if not found:
            return False
        if weight:
            self.chosen.update(dict.fromkeys(sorted(found)))
        else:
            self.barred |= found
        return weight

    def _no_gain(self, name: str) -> bool:
        """Say whether a gain or shift stands there only because the operator takes one."""
        return _CONSTANT.fullmatch(name) is not None and any(np.all(self._values[name] == value) for value in (0.0, 1.0))

    def _one_unit(self, node: Node) -> bool:
        """Say whether a node gives the output of a layer with one unit, so that a single element added to it is a bias."""
        if node.operator in ("MatMul", "Conv"):
            weight = self._values.get(node.inputs[1])
            return weight is not None and weight.ndim >= 2 and weight.shape[-1 if node.operator == "MatMul" else 0] == 1
        return node.operator in ("Reshape", "Squeeze", "Identity", "Cast") and node.inputs[0] in self._single


def _may_be_weight(name: str, value: Array) -> bool:
    if not np.issubdtype(value.dtype, np.floating) and value.dtype.name != "bfloat16":
        return False
    if value.ndim == 0 or value.size == 0 or name.endswith(_STATISTICS):
        return False
    largest = float(np.max(np.abs(value.astype(np.float64))))
    return bool(np.isfinite(largest) and largest < 1e30)
