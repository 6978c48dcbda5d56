"""Losses and penalties of other methods, against the array-API interface."""

from __future__ import annotations

from mgs_core._namespace import array_namespace
from mgs_core._types import Array
from mgs_core.heads import log_softmax

_ITERATIONS = 16


def generalised_cross_entropy(outputs: Array, targets: Array, truncation: float) -> Array:
    """Return `Σ_k t_k (1 − p_k^q) / q` of each sample, p the softmax: cross-entropy for q → 0, mean absolute error for q = 1.

    Args:
        outputs: logits, (n, c).
        targets: probabilities t, (n, c).
        truncation: q, above 0, at most 1.

    Returns:
        (n,).

    References:
        Zhang and Sabuncu, NeurIPS 2018, arXiv 1805.07836.
    """
    xp = array_namespace(outputs, targets)
    return xp.sum(targets * (1.0 - xp.exp(truncation * log_softmax(outputs))), axis=1) / truncation


def spectral_gradient(weight: Array) -> Array:
    """Return the gradient of `σ(W)² / 2`, which is `σ u vᵀ = u uᵀ W`, with u by power iteration from `W Wᵀ1`.

    Args:
        weight: W, two or more axes; the axes after the first are taken together.

    Returns:
        An array of the weight's shape. Cost: 32 products of W with a vector.

    References:
        Yoshida and Miyato 2017, arXiv 1705.10941.
    """
    xp = array_namespace(weight)
    matrix = xp.reshape(weight, (weight.shape[0], -1))
    turned = xp.permute_dims(matrix, (1, 0))
    left = matrix @ (turned @ xp.ones_like(matrix[:, :1]))
    for _ in range(_ITERATIONS):
        left = matrix @ (turned @ (left / (_norm(left) + 1e-30)))
    left = left / (_norm(left) + 1e-30)
    return xp.reshape(left @ xp.permute_dims(turned @ left, (1, 0)), weight.shape)


def _norm(vector: Array) -> Array:
    xp = array_namespace(vector)
    return xp.sqrt(xp.sum(vector * vector))
