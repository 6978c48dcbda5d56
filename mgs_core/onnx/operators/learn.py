"""Operators of the domain ai.onnx.ml that scikit-learn's linear models and pipelines are exported to."""

from __future__ import annotations

from typing import Any

import numpy as np

from mgs_core._types import Array, Namespace
from mgs_core.onnx.extensions import extension
from mgs_core.onnx.graph import Node
from mgs_core.onnx.operators.registry import Run, operator

_ML = "ai.onnx.ml"


@operator("LinearClassifier", domain=_ML, many=True)
def linear_classifier(node: Node, xp: Namespace) -> Run:
    """Score classes linearly; coefficients (classes, features) and intercepts come as inputs, lifted from attributes."""
    labels: Any = node.attributes.get("classlabels_ints")
    transform = _post_transform(node, xp, node.attributes["post_transform"])
    names = labels or node.attributes.get("classlabels_strings") or ()
    if node.wants(0) and not labels:
        raise node.unsupported("labels its classes by strings", "Choose the scores as the output.")

    def run(x: Array, coefficients: Array, intercepts: Array = None) -> list[Array]:
        scores = _linear(xp, x, coefficients, intercepts)
        two = scores.shape[1] == 1 and len(names) == 2
        if two and node.attributes["post_transform"] == "LOGISTIC":
            found = transform(scores)
            scores = xp.concat([1.0 - found, found], axis=1)
        else:
            scores = transform(xp.concat([-scores, scores], axis=1) if two else scores)
        if not node.wants(0):
            return [None, scores]
        return [xp.take(xp.asarray(np.asarray(labels, dtype=np.int64)), xp.argmax(scores, axis=1), axis=0), scores]

    return run


@operator("LinearRegressor", domain=_ML)
def linear_regressor(node: Node, xp: Namespace) -> Run:
    """Predict targets linearly; coefficients (targets, features) and intercepts come as inputs, lifted from attributes."""
    transform = _post_transform(node, xp, node.attributes["post_transform"])
    return lambda x, coefficients, intercepts=None: transform(_linear(xp, x, coefficients, intercepts))


@operator("Scaler", domain=_ML)
def scaler(node: Node, xp: Namespace) -> Run:
    """Return (x − offset)·scale, by feature."""
    offset, scale = (np.asarray(node.attributes.get(name) or [default]) for name, default in (("offset", 0.0), ("scale", 1.0)))

    def run(x: Array) -> Array:
        x = _floats(xp, x, node)
        return (x - xp.astype(xp.asarray(offset), x.dtype)) * xp.astype(xp.asarray(scale), x.dtype)

    return run


@operator("Normalizer", domain=_ML)
def normalizer(node: Node, xp: Namespace) -> Run:
    """Divide each sample by its norm; what has norm 0 stays 0."""
    norm = node.attributes["norm"]
    if norm not in ("MAX", "L1", "L2"):
        raise node.damaged(f"has norm {norm!r}")

    def run(x: Array) -> Array:
        x = _floats(xp, x, node)
        if norm == "L2":
            square = xp.sum(x * x, axis=-1, keepdims=True)
            return x / xp.sqrt(xp.where(square > 0, square, xp.ones_like(square)))
        size = xp.max(x, axis=-1, keepdims=True) if norm == "MAX" else xp.sum(xp.abs(x), axis=-1, keepdims=True)
        return x / xp.where(size == 0, xp.ones_like(size), size)

    return run


@operator("Imputer", domain=_ML)
def imputer(node: Node, xp: Namespace) -> Run:
    """Replace the value that stands for what is missing."""
    filler: Any = node.attributes.get("imputed_value_floats") or node.attributes.get("imputed_value_int64s")
    missing = node.attributes.get("replaced_value_float", 0.0)
    missing = missing if node.attributes.get("imputed_value_floats") else node.attributes.get("replaced_value_int64", 0)
    if not filler:
        raise node.damaged("has no value to put in")

    def run(x: Array) -> Array:
        gap = (x != x) if missing != missing else x == missing
        return xp.where(gap, xp.astype(xp.asarray(np.asarray(filler)), x.dtype), x)

    return run


@operator("Binarizer", domain=_ML)
def binarizer(node: Node, xp: Namespace) -> Run:
    """Return 1 where x exceeds the threshold, else 0."""
    threshold = node.attributes["threshold"]
    return lambda x: xp.astype(x > threshold, x.dtype)


@operator("FeatureVectorizer", domain=_ML)
def feature_vectorizer(node: Node, xp: Namespace) -> Run:
    """Join features."""
    return lambda *parts: xp.concat([_floats(xp, xp.reshape(part, (part.shape[0], -1)), node) for part in parts], axis=1)


@operator("ArrayFeatureExtractor", domain=_ML)
def array_feature_extractor(node: Node, xp: Namespace) -> Run:
    """Take features by place along the last axis."""

    def run(x: Array, places: Array) -> Array:
        taken = xp.take(x, xp.reshape(places, (-1,)), axis=x.ndim - 1)
        return xp.reshape(taken, (1, -1)) if x.ndim == 1 else taken

    return run


@operator("ZipMap", domain=_ML)
def zip_map(node: Node, xp: Namespace) -> Run:
    """Return the scores themselves: what ZipMap adds are names of their columns."""
    return lambda x: x


def _linear(xp: Namespace, x: Array, coefficients: Array, intercepts: Array) -> Array:
    x = xp.astype(x, coefficients.dtype) if x.dtype != coefficients.dtype else x
    y = xp.matmul(xp.reshape(x, (-1, x.shape[-1])), xp.permute_dims(coefficients, (1, 0)))
    return y if intercepts is None else y + intercepts


def _floats(xp: Namespace, x: Array, node: Node) -> Array:
    if xp.isdtype(x.dtype, "real floating"):
        return x
    return xp.astype(x, xp.asarray(np.zeros((), node.dtype(1))).dtype)


def _post_transform(node: Node, xp: Namespace, name: str) -> Run:
    if name == "NONE":
        return lambda x: x
    if name == "LOGISTIC":
        return extension(xp, "sigmoid")
    if name == "SOFTMAX":
        function = extension(xp, "softmax")
        return lambda x: function(x, x.ndim - 1)
    if name == "SOFTMAX_ZERO":

        def run(x: Array) -> Array:
            raised = xp.where(x == 0, xp.zeros_like(x), xp.exp(x - xp.max(x, axis=-1, keepdims=True)))
            return raised / xp.sum(raised, axis=-1, keepdims=True)

        return run
    raise node.unsupported(f"has the post_transform {name!r}", "Use NONE, LOGISTIC or SOFTMAX.")
