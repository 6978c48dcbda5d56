"""Say why an operator is not evaluated, and how to go on."""

from __future__ import annotations

from mgs_core._errors import UnsupportedModelError
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.registry import supported

_QUANTISED = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger",
}  # fmt: skip
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
_TREES = {"TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor"}
#: Operators that are refused for good, even where ONNX defines them by others.
REFUSED = frozenset(_QUANTISED | _RANDOM | _TREES)


def why_refused(node: Node) -> UnsupportedModelError:
    """Return the error for a node without a registered operator.

    Args:
        node: the node.

    Returns:
        The error, to be raised.
    """
    if node.operator in _QUANTISED:
        return node.unsupported(
            "is quantised: its weights are integers, which have no gradient", "Use the model as it was before quantisation."
        )
    if node.operator in _RANDOM:
        return node.unsupported("is random, so its outputs have no kernel", "Export the model in inference mode.")
    if node.operator in _TREES:
        return node.unsupported("is a tree ensemble, which has no gradient", "Use a model that is trained by gradients.")
    since = supported().get((node.domain, node.operator))
    if since:
        return node.unsupported(
            f"is older than the supported version {since[0]} of its operator", "Convert it with onnx.version_converter."
        )
    return node.unsupported("has no implementation here", "Export with other operators, or decompose it.")
