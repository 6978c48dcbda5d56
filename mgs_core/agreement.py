"""Weights from the kernel of per-sample losses: a sample whose gradient opposes the rest of its batch stops pulling."""

from __future__ import annotations

from mgs_core._namespace import array_namespace
from mgs_core._types import Array, Shaped
from mgs_core.penalty import _square


def agreement(kernel: Shaped[Array, "n n"]) -> Shaped[Array, " n"]:
    """Return how far the sum of the others' gradients points along each sample's own, `r_a = Σ_{b≠a} K_ab / √K_aa`.

    Args:
        kernel: kernel of the per-sample losses, (n, n).

    Returns:
        (n,); 0 for a sample without gradient, or without others. Averaged over steps, low values rank suspicious labels.

    Raises:
        ArgumentError: when the kernel is not square.

    References:
        This library's own; it is not in the paper.

    Example:
        >>> import numpy as np
        >>> import mgs_core as mgs
        >>> mgs.agreement(np.array([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]]))
        array([ 0.,  0., -2.])
    """
    n = _square(kernel)
    xp = array_namespace(kernel)
    diagonal = xp.sum(kernel * xp.eye(n, dtype=kernel.dtype), axis=1)
    positive = diagonal > 0
    root = xp.sqrt(xp.where(positive, diagonal, xp.ones_like(diagonal)))
    return xp.where(positive, (xp.sum(kernel, axis=1) - diagonal) / root, xp.zeros_like(diagonal))


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
    kept = xp.where(r > 0, r, xp.zeros_like(r))
    mean = xp.mean(kept)
    some = mean > 0
    return xp.where(some, kept / xp.where(some, mean, xp.ones_like(mean)), xp.ones_like(kept))
