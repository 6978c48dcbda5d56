"""Which initialisers of a graph are its trained parameters.

An ONNX file does not say. The rule: a floating-point initialiser is a parameter when it reaches, as it is or through nodes that
take nothing but constants and sizes, an input where networks keep weights (`_WEIGHTS`), or a place where it is added to or
multiplied with data that earlier parameters have touched, or chosen in place of it (Where), except

* single numbers, unless they are added to the output of a layer with one unit: ε, scales, exponents;
* masks: values that are not finite or as small as a type goes; tables of 0 and one number of at most −10 (of one axis:
  −1000) that are added; a number that fills what Where replaces; initial states of zeros;
* two tables that data are multiplied by and whose squares add up to 1: cosine and sine of positions;
* what also stands at an input that takes statistics, bounds or sizes (running mean and variance, Clip, Pad, …);
* what is subtracted or divided by: a mean, a deviation; from the raw inputs, it is none elsewhere either;
* ones and zeros for gain and shift of a normalisation, under a name that PyTorch's exporters give to constants: it has none;
* what is named as running statistics are: `running_mean`, `running_var`, `moving_mean`, `moving_variance`; and the vectors of
  PyTorch's spectral norm, `parametrizations.….0._u` and `._v`;
* what is applied to the raw inputs elementwise: scalers.

Another fixed table that is added to data or multiplied with it (sinusoidal positions, the scale of a target) looks trained.
`load(…, parameters=…)` chooses by name, and `OnnxModel.uncounted` says what was left out, and why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from mgs_core._types import Array
from mgs_core.onnx.graph import Graph, Node
from mgs_core.onnx.tensors import is_float

_WEIGHTS: dict[str, frozenset[int]] = {
    name: frozenset(places)
    for name, places in {
        "MatMul": (0, 1), "Gemm": (0, 1, 2), "Conv": (1, 2), "ConvTranspose": (1, 2), "Einsum": range(8), "Gather": (0,),
        "GatherND": (0,),
        "BatchNormalization": (1, 2), "LayerNormalization": (1, 2), "InstanceNormalization": (1, 2), "GroupNormalization": (1, 2),
        "RMSNormalization": (1,), "PRelu": (1,), "Concat": range(1 << 10), "LSTM": (1, 2, 3, 5, 6, 7),
        "GRU": (1, 2, 3, 5), "RNN": (1, 2, 3, 5), "DeformConv": (1, 3), "LinearClassifier": (1, 2), "LinearRegressor": (1, 2),
    }.items()
}  # fmt: skip
_ELEMENTWISE = {"Add", "Sub", "Mul", "Div", "Sum", "Where"}
_LAYERS = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "Gather"}
#: Places of initial states in recurrent layers, which are zeros unless they are learnt.
_STATES = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}
_MASKED, _SURELY = -10.0, -1e3  # at most this is what a mask adds, e^−10 of the rest; and one that might be a bias
_LEAST_TABLE, _SLOTS = 8, 10_000
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
_STATISTICS = re.compile(r".*(running_mean|running_var|moving_mean|moving_variance|parametrizations\.\w+\.\d+\._[uv])")


def trained(graph: Graph, nodes: Sequence[Node]) -> tuple[list[str], dict[str, str]]:
    """Return the initialisers that are trained, and why the others are not.

    Args:
        graph: the graph.
        nodes: those on which the outputs depend, in order.

    Returns:
        (names in the order of their first use, reasons by the names of other floating-point initialisers that are used).
    """
    walk = _Walk(graph)
    walk.nodes(nodes)
    for name in _rotations({name: graph.initializers[name] for name in walk.factors}):
        walk.barred[name] = "with another, the cosine and sine of positions"
    chosen = dict.fromkeys(name for name in walk.chosen if name not in walk.barred)
    used = dict.fromkeys(name for node in nodes for name in node.inputs if name in graph.initializers)
    left = [name for name in used if name not in chosen and is_float(graph.initializers[name].dtype)]
    reasons = {**walk.reasons, **walk.barred}
    return list(chosen), {name: reasons.get(name) or _unseen(name, graph.initializers[name]) for name in left}


def _rotations(factors: Mapping[str, Array]) -> set[str]:
    """Return factors of which the squares of two add up to 1 everywhere, though neither is the same everywhere."""
    # by shape and mean, from which that of a partner is known
    squares: dict[tuple[tuple[int, ...], int], list[tuple[str, Array]]] = {}
    found: set[str] = set()
    for name, value in factors.items():
        square = np.square(value.astype(np.float64))
        # short ones match by chance
        if value.ndim < 2 or value.size < _LEAST_TABLE or not np.ptp(value) or np.max(square) > 1.01:
            continue
        place = round(_SLOTS * float(square.mean()))
        for other, partner in (pair for at in (-1, 0, 1) for pair in squares.get((value.shape, _SLOTS - place + at), ())):
            if np.allclose(square + partner, 1.0, atol=1e-2):
                found |= {name, other}
        squares.setdefault((value.shape, place), []).append((name, square))
    return found


class _Walk:
    """Hold what is known of the values while the nodes, and those of subgraphs, are visited in order."""

    def __init__(self, graph: Graph) -> None:
        self._values = graph.initializers
        self._sources = {
            name: frozenset((name,))
            for name, value in self._values.items()
            if is_float(value.dtype) and not _no_weight(name, value)
        }
        self._shapes = {name: value.shape for name, value in self._values.items()}
        self._constant = set(self._values)
        self._touched: set[str] = set()  # data that a parameter has touched
        self._single: set[str] = set()  # outputs of layers with one unit
        self.chosen: dict[str, None] = {}
        self.factors: dict[str, None] = {}  # what data are multiplied by
        self.barred: dict[str, str] = {}  # wherever else they stand, and why
        self.reasons: dict[str, str] = {}  # why values were not chosen at a place

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
            if node.operator not in ("Shape", "Size"):
                joined = frozenset().union(*(self._sources.get(name, frozenset()) for name in carried))
                self._sources.update(dict.fromkeys(node.outputs, joined))
            if given and given[0] in self._shapes and node.operator in ("Transpose", "Identity", "Cast"):
                shape = self._shapes[given[0]]
                if node.operator == "Transpose":
                    order = node.attributes.get("perm") or range(len(shape))[::-1]
                    shape = tuple(shape[axis] for axis in order if -len(shape) <= axis < len(shape))
                self._shapes[node.outputs[0]] = shape
            return False
        sliced = node.attributes["num_scan_inputs"] if node.operator == "Scan" else 0  # whose places are in the body
        meets = self._bodies(node, bodies, sliced)
        for place, name in enumerate(node.inputs[: node.explicit - sliced]):
            meets = self._use(node, place, name) or meets
        if meets or any(name in self._touched for name in given):
            self._touched.update(node.outputs)
        if self._one_unit(node):
            self._single.update(node.outputs)
        return meets

    def _bodies(self, node: Node, bodies: list[Graph], sliced: int) -> bool:
        """Visit subgraphs, whose own inputs may be data that a parameter has touched; but slices of a constant are constant."""
        for body in bodies:
            names = [value.name for value in body.inputs]
            for name, outer in zip(names[::-1][:sliced], node.inputs[: node.explicit][::-1], strict=False):
                if outer in self._constant:
                    self._constant.add(name)
                    self._sources[name] = self._sources.get(outer, frozenset())
            self._touched.update(name for name in names if name not in self._constant)
            self._constant.update(body.initializers)
        found = [self.nodes(body.nodes) for body in bodies]
        return any(found)

    def _use(self, node: Node, place: int, name: str) -> bool:
        """Judge the place where a value meets data; say whether it is that of a weight."""
        found = self._sources.get(name, frozenset())
        others = [other for other in node.inputs if other and other not in self._constant]
        weight, bias, raw = place in _WEIGHTS.get(node.operator, ()), False, True
        if node.operator in _ELEMENTWISE:
            raw = not any(other in self._touched for other in others)
            weight = not raw and not (node.operator in ("Sub", "Div") and place == 1)
            bias = node.operator in ("Add", "Sum") and any(other in self._single for other in others)
            if not bias:
                found = frozenset(source for source in found if self._values[source].size > 1)
            if node.operator in ("Add", "Sum"):
                found = self._but(found, _is_mask, "a mask: 0 and one number of at most −10")
            if node.operator == "Where":
                found = self._but(found, lambda value: not np.ptp(value), "one number, which fills what is replaced")
        if not bias:
            found = frozenset(source for source in found if self._values[source].ndim)
        if node.operator in _NORMALISATIONS:
            found = frozenset(source for source in found if not self._no_gain(source))
        if place in _STATES.get(node.operator, ()):
            found = self._but(found, lambda value: not np.any(value), "an initial state of zeros")
        if not found:
            return False
        if weight:
            self.chosen.update(dict.fromkeys(sorted(found)))
            self.factors.update(dict.fromkeys(sorted(found) if node.operator == "Mul" else ()))
        elif raw:
            self.barred.update(dict.fromkeys(sorted(found), f"stands where {node.operator} takes no weight"))
        return weight

    def _but(self, names: frozenset[str], is_no_weight: Callable[[Array], bool], why: str) -> frozenset[str]:
        """Return the names but for those of values that are no weights here for a reason."""
        none = {name for name in names if is_no_weight(self._values[name].astype(np.float64))}
        self.reasons.update(dict.fromkeys(none, why))
        return names - none

    def _no_gain(self, name: str) -> bool:
        """Say whether a gain or shift stands there only because the operator takes one."""
        return _CONSTANT.fullmatch(name) is not None and any(np.all(self._values[name] == value) for value in (0.0, 1.0))

    def _one_unit(self, node: Node) -> bool:
        """Say whether a node gives the output of a layer with one unit, so that a single element added to it is a bias."""
        if node.operator in ("Add", "Sub", "Sum"):  # until it has its bias
            return any(name in self._single for name in node.inputs) and not any(name in self._constant for name in node.inputs)
        if node.operator in _VIEWS - {"Expand", "Tile"} or node.operator in ("ReduceSum", "ReduceMean"):
            return any(name in self._single for name in node.inputs[:1])
        if node.operator not in _LAYERS or len(node.inputs) < 2:
            return False
        if node.has(2) and (node.inputs[2] not in self._values or np.any(self._values[node.inputs[2]])):
            return False  # it has its bias, but for the zero that JAX's exporter writes
        left, right = (self._shapes.get(name) for name in node.inputs[:2])
        if node.operator == "Einsum":
            return any(shape is not None and len(shape) == 1 for shape in (left, right))
        if node.operator == "MatMul":
            columns = None if right is None else right[-1] if len(right) > 1 else 1
            rows = None if left is None else left[-2] if len(left) > 1 else 1
            return 1 in (columns, rows)
        if node.operator == "Gather":
            return left is not None and len(left) > 1 and left[-1] == 1
        if right is None or len(right) < 2:
            return False
        if node.operator == "ConvTranspose":
            return bool(right[1] * node.attributes.get("group", 1) == 1)
        return bool(right[0 if node.operator == "Conv" or node.attributes.get("transB") else 1] == 1)


def _unseen(name: str, value: Array) -> str:
    return _no_weight(name, value) or ("a single number" if value.size == 1 else "not where networks keep weights")


def _is_mask(value: Array) -> bool:
    least = float(np.min(value))
    return (
        least <= (_MASKED if value.ndim > 1 else _SURELY)
        and bool(np.any(value == 0.0))
        and bool(np.all((value == 0.0) | (value == least)))
    )


def _no_weight(name: str, value: Array) -> str:
    """Say why a value is no weight wherever it stands; empty where it may be one."""
    if value.size == 0:
        return "empty"
    if _STATISTICS.fullmatch(name):
        return "statistics, by its name"
    largest = float(np.max(np.abs(value.astype(np.float64))))
    return "" if np.isfinite(largest) and largest < 1e30 else "not finite, or as large as a mask"
