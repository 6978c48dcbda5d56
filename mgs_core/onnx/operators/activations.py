"""Activation functions."""

from __future__ import annotations

from math import pi, prod, sqrt

from mgs_core._types import Array, Namespace
from mgs_core.onnx.extensions import extension
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.arithmetic import clip
from mgs_core.onnx.operators.common import axis_of
from mgs_core.onnx.operators.registry import Run, operator


@operator("Relu")
def relu(node: Node, xp: Namespace) -> Run:
    """Return max(x, 0)."""
    return extension(xp, "relu")


@operator("Sigmoid")
def sigmoid(node: Node, xp: Namespace) -> Run:
    """Return 1/(1 + exp(−x))."""
    return extension(xp, "sigmoid")


@operator("LeakyRelu", since=6)
def leaky_relu(node: Node, xp: Namespace) -> Run:
    """Return x where it is positive and αx elsewhere."""
    alpha = node.attributes["alpha"]
    return lambda x: xp.where(x > 0, x, alpha * x)


@operator("PRelu", since=7)
def prelu(node: Node, xp: Namespace) -> Run:
    """Return x where it is positive and slope·x elsewhere."""
    return lambda x, slope: xp.where(x > 0, x, slope * x)


@operator("ThresholdedRelu", since=10)
def thresholded_relu(node: Node, xp: Namespace) -> Run:
    """Return x where it exceeds α and 0 elsewhere."""
    alpha = node.attributes["alpha"]
    return lambda x: xp.where(x > alpha, x, xp.zeros_like(x))


@operator("Elu", since=6)
def elu(node: Node, xp: Namespace) -> Run:
    """Return x where it is positive and α(exp(x) − 1) elsewhere."""
    alpha = node.attributes["alpha"]
    return lambda x: xp.where(x > 0, x, alpha * xp.expm1(_negative(xp, x)))


@operator("Selu", since=6)
def selu(node: Node, xp: Namespace) -> Run:
    """Return γ·elu(x)."""
    alpha, gamma = node.attributes["alpha"], node.attributes["gamma"]
    return lambda x: gamma * xp.where(x > 0, x, alpha * xp.expm1(_negative(xp, x)))


@operator("Celu", since=12)
def celu(node: Node, xp: Namespace) -> Run:
    """Return x where it is positive and α(exp(x/α) − 1) elsewhere."""
    alpha = node.attributes["alpha"]
    return lambda x: xp.where(x > 0, x, alpha * xp.expm1(_negative(xp, x) / alpha))


@operator("HardSigmoid", since=6)
def hard_sigmoid(node: Node, xp: Namespace) -> Run:
    """Return αx + β, limited to [0, 1]."""
    alpha, beta = node.attributes["alpha"], node.attributes["beta"]
    return lambda x: _unit(xp, alpha * x + beta)


@operator("HardSwish", since=14)
def hard_swish(node: Node, xp: Namespace) -> Run:
    """Return x times x/6 + 1/2 limited to [0, 1]."""
    return lambda x: x * _unit(xp, x / 6.0 + 0.5)


@operator("Softplus")
def softplus(node: Node, xp: Namespace) -> Run:
    """Return log(1 + exp(x))."""
    return lambda x: xp.logaddexp(x, xp.zeros_like(x))


@operator("Softsign")
def softsign(node: Node, xp: Namespace) -> Run:
    """Return x/(1 + |x|)."""
    return lambda x: x / (1.0 + xp.abs(x))


@operator("Mish", since=18)
def mish(node: Node, xp: Namespace) -> Run:
    """Return x·tanh(log(1 + exp(x)))."""
    return lambda x: x * xp.tanh(xp.logaddexp(x, xp.zeros_like(x)))


@operator("Swish", since=24)
def swish(node: Node, xp: Namespace) -> Run:
    """Return x·sigmoid(αx)."""
    alpha, logistic = node.attributes["alpha"], extension(xp, "sigmoid")
    return lambda x: x * logistic(alpha * x)


@operator("Gelu", since=20)
def gelu(node: Node, xp: Namespace) -> Run:
    """Return x·Φ(x), Φ the normal distribution function, or its approximation by tanh."""
    if node.attributes["approximate"] == "tanh":
        return lambda x: 0.5 * x * (1.0 + xp.tanh(sqrt(2.0 / pi) * (x + 0.044715 * x * x * x)))
    erf = extension(xp, "erf")
    return lambda x: 0.5 * x * (1.0 + erf(x * sqrt(0.5)))


@operator("Shrink", since=9)
def shrink(node: Node, xp: Namespace) -> Run:
    """Move x by `bias` towards 0 where |x| exceeds `lambd`; 0 elsewhere."""
    bias, limit = node.attributes["bias"], node.attributes["lambd"]

    def run(x: Array) -> Array:
        zero = xp.zeros_like(x)
        return xp.where(x < -limit, x + bias, xp.where(x > limit, x - bias, zero))

    return run


@operator("Softmax", "LogSoftmax", "Hardmax", since=13)
def softmax(node: Node, xp: Namespace) -> Run:
    """Normalise along an axis."""
    function, axis = _normalize(node, xp), node.attributes["axis"]
    return lambda x: function(x, axis_of(axis, x.ndim, node))


@operator("Softmax", "LogSoftmax", "Hardmax", since=1)
def softmax_of_matrix(node: Node, xp: Namespace) -> Run:
    """Normalise over all axes from `axis` on, as before opset 13."""
    function, axis = _normalize(node, xp), node.attributes["axis"]

    def run(x: Array) -> Array:
        first = axis_of(axis, x.ndim, node) if axis != x.ndim else axis
        rows = xp.reshape(x, (prod(x.shape[:first]), prod(x.shape[first:])))
        return xp.reshape(function(rows, 1), x.shape)

    return run


def _normalize(node: Node, xp: Namespace) -> Run:
    if node.operator == "Hardmax":
        return lambda x, axis: _hardmax(xp, x, axis)
    return extension(xp, "softmax" if node.operator == "Softmax" else "log_softmax")


def _hardmax(xp: Namespace, x: Array, axis: int) -> Array:
    place = xp.expand_dims(xp.argmax(x, axis=axis), axis=axis)
    steps = xp.reshape(xp.arange(x.shape[axis]), tuple(-1 if at == axis else 1 for at in range(x.ndim)))
    return xp.astype(steps == place, x.dtype)


def _negative(xp: Namespace, x: Array) -> Array:
    """Return min(x, 0): what lies beyond would overflow in the branch that is not taken."""
    return xp.where(x > 0, xp.zeros_like(x), x)


def _unit(xp: Namespace, x: Array) -> Array:
    return clip(xp, x, xp.zeros_like(x), xp.ones_like(x))
