"""Weights from the kernel of per-sample losses: a sample whose gradient opposes the rest of its batch stops pulling."""

from __future__ import annotations

from mgs_core._matrix import in_single, side
from mgs_core._namespace import array_namespace
from mgs_core._types import Array, Shaped


def agreement(kernel: Shaped[Array, "n n"]) -> Shaped[Array, " n"]:
    """Return how far the sum of the others' gradients points along each sample's own, `r_a = Σ_{b≠a} K_ab / √K_aa`.

    Args:
        kernel: kernel of the per-sample losses, (n, n).

    Returns:
        (n,), in single precision at least; 0 for a sample without gradient, or without others, NaN where the kernel is. Averaged
        over steps, low values rank suspicious labels.

    Raises:
        ArgumentError: when the kernel is not square, or no real floating-point numbers.

    References:
        This library's own; it is not in the paper.

    Example:
        >>> import numpy as np
        >>> import mgs_core as mgs
        >>> mgs.agreement(np.array([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]))
        array([ 0.,  0., -2.])
    """
    n, xp = side(kernel), array_namespace(kernel)
    kernel = in_single(kernel)
    identity = xp.eye(n, dtype=kernel.dtype)
    diagonal = xp.sum(kernel * identity, axis=1)
    none = diagonal <= 0
    root = xp.sqrt(xp.where(none, xp.ones_like(diagonal), diagonal))
    others = xp.sum(kernel * (1.0 - identity), axis=1)  # a sum less the diagonal would round by it
    return xp.where(none, xp.zeros_like(diagonal), others / root)


def agreement_weights(kernel: Shaped[Array, "n n"]) -> Shaped[Array, " n"]:
    """Return weights `w_a ∝ max(0, r_a)` with mean 1, where r is `agreement`; train on `mean(w · loss)`.

    Treat the weights as constants in the gradient. When no sample agrees with the rest, all weights are 1; so is that of a batch
    of one, as the last of an epoch may be.

    Args:
        kernel: kernel of the per-sample losses, (n, n).

    Returns:
        (n,), at least 0, mean 1.

    Raises:
        ArgumentError: when the kernel is not square.

    References:
        This library's own; it is not in the paper.

    Example:
        >>> import numpy as np
        >>> import mgs_core as mgs
        >>> mgs.agreement_weights(np.array([[1.0, 0.9, -0.5], [0.9, 1.0, -0.5], [-0.5, -0.5, 1.0]]))
        array([1.5, 1.5, 0. ])
    """
    r = agreement(kernel)
    xp = array_namespace(r)
    kept = xp.where(r <= 0, xp.zeros_like(r), r)  # NaN stays
    mean = xp.mean(kept)
    none = mean <= 0
    return xp.where(none, xp.ones_like(kept), kept / xp.where(none, xp.ones_like(mean), mean))
