"""The weighted gradient `Σ_a w_a g_a`, from the layer statistics that gave the kernel: no further backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from mgs_core._namespace import array_namespace
from mgs_core._protocol import Convolution, LayerStatistics, Lookup, Outer, Rows, Scale, Sum
from mgs_core._types import Array, Namespace
from mgs_core.statistics import unfold


def weighted_gradient(uses: Iterable[LayerStatistics], weights: Array) -> dict[str, Array]:
    """Return `Σ_{a,k} w_ak g_ak` of each parameter.

    A namespace's `mgs_weighted_gradient(use, weights)` goes first; it returns None for what it does not do better.

    Args:
        uses: layer statistics of the n samples and k heads.
        weights: (n, k).

    Returns:
        Flat gradients (p,) by parameter; of the chosen parameters that the heads depend on.

    Raises:
        TypeError: when a kind of statistics is unknown.

    Cost:
        One product for each weight, as an ordinary backward pass has it.
    """
    total: dict[str, Array] = {}
    for use in uses:
        xp = array_namespace(use.gradients)
        native = getattr(xp, "mgs_weighted_gradient", None)
        part = None if native is None else native(use, weights)
        if part is None:
            part = xp.reshape(_contraction(xp, use, weights), (1, 1, -1))
            part = xp.reshape(use.restore(part) if use.restore is not None else part, (-1,))
        total[use.parameter] = total[use.parameter] + part if use.parameter in total else part
    return total


def _contraction(xp: Namespace, use: LayerStatistics, weights: Array) -> Array:
    n, k, *shape = use.gradients.shape
    if isinstance(use, (Sum, Rows)):
        flat = xp.matmul(xp.reshape(weights, (1, n * k)), xp.reshape(use.gradients, (n * k, prod(shape))))
        return flat if isinstance(use, Rows) else xp.sum(xp.reshape(flat, tuple(shape)), axis=0)
    weighted = use.gradients * xp.reshape(weights, (n, k, *(1 for _ in shape)))
    weighted = xp.reshape(weighted, (n, *shape)) if k == 1 else xp.sum(weighted, axis=1)
    if isinstance(use, Scale):
        return xp.sum(weighted * use.inputs, axis=(0, 1))
    if isinstance(use, Convolution):
        return _contraction(xp, unfold(use), weights)
    s, o = shape[-2:]
    if isinstance(use, Lookup):
        native = getattr(xp, "mgs_sum_by_index", None)
        values, indices = xp.reshape(weighted, (n * s, o)), xp.reshape(use.indices, (n * s,))
        if native is not None:
            return native(values, indices, use.size)
        hit = xp.astype(xp.expand_dims(xp.arange(use.size), axis=1) == xp.expand_dims(indices, axis=0), weighted.dtype)
        return xp.matmul(hit, values)
    if isinstance(use, Outer):
        groups, i = use.inputs.shape[1], use.inputs.shape[3]
        inputs = xp.reshape(xp.permute_dims(use.inputs, (1, 3, 0, 2)), (groups, i, n * s))
        return xp.matmul(inputs, xp.reshape(xp.permute_dims(weighted, (1, 0, 2, 3)), (groups, n * s, o)))
    raise TypeError(f"`uses` must be layer statistics; got {type(use).__name__}.")
