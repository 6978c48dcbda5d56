"""Losses and penalties of other methods, against the array-API interface."""

from __future__ import annotations

from mgs_core._namespace import array_namespace
from mgs_core._types import Array
from mgs_core.heads import log_softmax

_ROUNDS, _TINY = 8, 1e-18  # whose square float32 can hold


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


def singular_vector(weight: Array, vector: Array, rounds: int = _ROUNDS) -> Array:
    """Return the left singular vector u of the largest singular value of W, nearer to it than the vector given.

    Singular values are close together at random, and a penalty brings them closer. So u is carried over from step to step, as in
    the paper, and follows the weight; and it climbs the Rayleigh quotient `‖Wᵀu‖²` by conjugate gradients (Polak and Ribière),
    each to the top of the plane of u and the direction, where power iteration would need some hundred rounds.

    Args:
        weight: W, two or more axes; the axes after the first are taken together.
        vector: (m, 1), m the first axis of W, norm 1: where to begin.
        rounds: each takes two products of W with a vector.

    Returns:
        (m, 1), of norm 1; `vector` while W is 0.

    References:
        Yoshida and Miyato 2017, arXiv 1705.10941, algorithm 1, where one round of power iteration stands here.
    """
    xp = array_namespace(weight)
    matrix = xp.reshape(weight, (weight.shape[0], -1))
    turned = xp.permute_dims(matrix, (1, 0))
    image = matrix @ (turned @ vector)
    value = _dot(vector, image)
    residual = direction = image - value * vector
    for _ in range(rounds):
        across = direction - _dot(vector, direction) * vector
        across = across / (xp.sqrt(_dot(across, across)) + _TINY)
        other = matrix @ (turned @ across)
        # the first eigenvector of W Wᵀ in the plane, ((value, between), (between, its quotient across)), by half their difference
        between, half = _dot(vector, other), 0.5 * (value - _dot(across, other))
        root = xp.sqrt(half * half + between * between)
        along, aside = xp.where(half < 0, between, half + root + _TINY), xp.where(half < 0, root - half, between)
        size = xp.sqrt(along * along + aside * aside)
        along, aside = along / size, aside / size
        vector, image = along * vector + aside * across, along * image + aside * other
        value, before = _dot(vector, image), residual
        residual = image - value * vector
        share = _dot(residual, residual - before) / (_dot(before, before) + _TINY)
        direction = residual + xp.where(share > 0, share, 0.0 * share) * direction
    return vector / xp.sqrt(_dot(vector, vector))


def spectral_gradient(weight: Array, vector: Array) -> Array:
    """Return the gradient of `σ(W)² / 2`, which is `σ u vᵀ = u uᵀ W`.

    Args:
        weight: W, as for `singular_vector`.
        vector: u, (m, 1).

    Returns:
        An array of the weight's shape.
    """
    xp = array_namespace(weight)
    matrix = xp.reshape(weight, (weight.shape[0], -1))
    return xp.reshape(vector @ (xp.permute_dims(vector, (1, 0)) @ matrix), weight.shape)


def _dot(a: Array, b: Array) -> Array:
    return array_namespace(a, b).sum(a * b)
